"""The code of docs/embedding.md, run as it stands there."""

import copy
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from burnish.bench.runs import embedding
from burnish.model.embedding import operands

pytest.importorskip("transformers", reason="transformers is not installed")

PAGE = Path(__file__).parents[2] / "docs" / "embedding.md"
APPLY, TRL, LOOP, LORA, EXPERTS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


def run(code, **names):
    exec(compile(code, str(PAGE), "exec"), names)
    return names


def test_apply_and_remove(load, ids):
    model = load("llama")
    want = model(ids).logits
    seen = []
    run(APPLY.replace("...", "look()"), model=model, look=lambda: seen.append(model(ids).logits))
    torch.testing.assert_close(seen[0], want, rtol=1e-5, atol=1e-5)
    assert not torch.equal(seen[0], want) and torch.equal(model(ids).logits, want)


def test_trl(load, monkeypatch, tmp_path):
    trl = pytest.importorskip("trl", reason="trl is not installed")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(96)}, unk_token="w0"))

    calls = []
    monkeypatch.setattr(
        operands, "token_logprobs", lambda *a, op=operands.token_logprobs, **k: calls.append(1) or op(*a, **k)
    )

    names = run(
        TRL,
        model=load("llama"),
        arguments=trl.SFTConfig(
            output_dir=str(tmp_path),
            max_steps=1,
            report_to="none",
            use_cpu=True,
            bf16=False,
            save_strategy="no",
        ),
        rows=datasets.Dataset.from_list([{"input_ids": list(range(3, 20))}] * 8),
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w2"),
    )
    assert calls and names["trainer"].state.global_step == 1


def test_loop(load, ids):
    model, trained = load("llama"), torch.rand(ids.shape) < 0.7
    again = copy.deepcopy(model)
    run(LOOP, model=model, batches=[(ids, trained), (ids.flip(0), trained)])
    optimizer = torch.optim.AdamW(again.parameters(), lr=1e-3)
    for batch in (ids, ids.flip(0)):
        targets = batch[:, 1:].masked_fill(~trained[:, 1:], -100)
        F.cross_entropy(again(batch).logits[:, :-1].flatten(0, 1), targets.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(model(ids).logits, again(ids).logits, rtol=1e-4, atol=1e-4)


def test_lora():
    base = torch.nn.Linear(24, 40)
    layer, x = run(LORA)["Adapted"](base, rank=4), torch.randn(2, 5, 24)
    assert torch.equal(layer(x), base(x))
    torch.nn.init.normal_(layer.lora_b)
    want = base(x) + layer.scaling * x @ layer.lora_a.T @ layer.lora_b.T
    torch.testing.assert_close(layer(x), want, rtol=1e-5, atol=1e-5)
    layer(x).sum().backward()
    assert base.weight.grad is None and layer.lora_a.grad is not None


@pytest.mark.parametrize("loss", embedding.LOSSES)
def test_the_step_whose_memory_is_measured(monkeypatch, loss):
    pytest.importorskip("trl", reason="trl is not installed")
    monkeypatch.setattr(embedding, "VOCABULARY", 128)
    monkeypatch.setattr(embedding, "SHAPE", embedding.SHAPE | {"hidden_size": 32, "intermediate_size": 48})
    rows = [
        {"head_of": loss, "embedded": embedded, **embedding.step(loss, embedded)}
        for embedded in (False, True)
    ]
    before, after = rows
    assert after["loss"] == pytest.approx(before["loss"], abs=1e-5)
    assert before["head"] == 3 * 4 * 128 * 2048 and after["gradients"] == before["gradients"] > 0
    assert embedding.table(rows).count("\n") == 4


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts(load, ids, name):
    model = load(name)
    want = model(ids).logits
    run(EXPERTS, model=model)
    assert model.config._experts_implementation == "moe_mlp"
    torch.testing.assert_close(model(ids).logits, want, rtol=1e-5, atol=1e-5)
