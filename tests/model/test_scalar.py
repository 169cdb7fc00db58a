"""The scalar head: its values beside transformers' golden logits, and its folders."""

import json
import math

import pytest
import torch
from burnish.model import InputError, ModelConfig, Transformer, pack
from burnish.model.checkpoint import load_model, load_scalar_model, save_model
from burnish.model.scalar import ScalarModel
from folders import GOLDEN
from safetensors.torch import load_file, save_file

TINY = ModelConfig(
    vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
)
everywhere = pytest.mark.parametrize("architecture", GOLDEN)


@everywhere
def test_a_language_models_body_under_a_row_of_its_head_gives_that_tokens_logit(data, architecture):
    folder = data / "tiny-hf" / architecture
    golden = load_file(folder / "expected.safetensors")
    rows = [
        ids[mask == 1].tolist()
        for ids, mask in zip(golden["input_ids"], golden["attention_mask"], strict=True)
    ]
    model = load_scalar_model(folder)
    model.score.weight.data.copy_(load_model(folder).head[7:8])
    packed = pack(rows)
    values = model.values(packed, torch.arange(packed.tokens.numel()))
    expected = golden["logits"][golden["attention_mask"] == 1][:, 7]
    torch.testing.assert_close(values, expected, atol=1e-5, rtol=0)


def test_the_fresh_head(data):
    folder = data / "tiny-hf" / "llama"
    weight = load_scalar_model(folder).score.weight
    assert torch.equal(weight, load_scalar_model(folder).score.weight)
    assert not torch.equal(weight, load_scalar_model(folder, seed=1).score.weight)
    wide = ModelConfig(
        vocab_size=3, hidden_size=4096, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1024
    )
    drawn = ScalarModel(wide).score.weight
    assert drawn.shape == (1, 4096) and drawn.std().item() == pytest.approx(1 / math.sqrt(4097), rel=0.05)


def test_values_are_wide_under_autocast_and_reach_every_weight():
    model = ScalarModel(TINY)
    packed, rows = pack([[1, 2, 3], [4, 5]]), torch.tensor([2, 4])
    with torch.autocast("cpu", torch.bfloat16):
        assert model.values(packed, rows).dtype == torch.float32
    model.values(packed, rows).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
    assert model.double().values(packed, rows).dtype == torch.float64


def test_a_shared_prompt_changes_no_value():
    model = ScalarModel(TINY).double()
    prompt, a, b = [1, 2, 3], [4, 5, 6], [7]
    shared = model.values(pack([prompt, a, b], [-1, 0, 0]), torch.tensor([5, 6]))
    separate = model.values(pack([prompt + a, prompt + b]), torch.tensor([5, 9]))
    torch.testing.assert_close(shared, separate, atol=1e-12, rtol=0)


@everywhere
def test_what_is_saved_is_what_is_loaded(data, tmp_path, architecture):
    model = load_scalar_model(data / "tiny-hf" / architecture, seed=3)
    model.bias = -0.25
    save_model(model, tmp_path / "saved")
    again = load_scalar_model(tmp_path / "saved", seed=4)  # the head is no longer drawn
    assert again.bias == -0.25 and again.config == model.config
    for (name, one), other in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    tensors = load_file(tmp_path / "saved" / "model.safetensors")
    assert "score.weight" in tensors and "lm_head.weight" not in tensors
    assert all(name.startswith(("model.", "score.")) for name in tensors)
    raw = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert raw["architectures"][0].endswith("ForSequenceClassification") and len(raw["id2label"]) == 1


@pytest.mark.parametrize("side", ["left", "right"])
def test_transformers_padding_changes_nothing(data, tmp_path, side):
    """Here there is none; there the score of a padded row is read at its last real token, on either side."""
    transformers = pytest.importorskip("transformers")
    model = load_scalar_model(data / "tiny-hf" / "llama")
    save_model(model, tmp_path / "ours")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "ours", pad_token_id=0
    )
    sequences = [[5, 6, 7, 8, 9], [10, 11]]
    padding = [[0] * (5 - len(ids)) for ids in sequences]
    padded = [p + ids if side == "left" else ids + p for p, ids in zip(padding, sequences, strict=True)]
    tokens = torch.tensor(padded)
    with torch.no_grad():
        scores = theirs(tokens, attention_mask=(tokens != 0).long()).logits[:, 0]
    packed = pack(sequences)
    values = model.values(packed, packed.cu_seqlens[1:].long() - 1)
    torch.testing.assert_close(scores, values, atol=1e-5, rtol=0)


def test_refusals(tmp_path):
    save_model(ScalarModel(TINY), tmp_path / "scalar")
    with pytest.raises(InputError, match="expected a language model, found a LlamaForSequenceClassification"):
        load_model(tmp_path / "scalar")

    file = tmp_path / "scalar" / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"score.weight": torch.zeros(2, 16)}, file)
    with pytest.raises(InputError, match=r"score\.weight: expected shape \(1, 16\), got \(2, 16\)"):
        load_scalar_model(tmp_path / "scalar")
    save_file({name: tensor for name, tensor in tensors.items() if name != "score.weight"}, file)
    with pytest.raises(InputError, match=r"score\.weight: missing"):
        load_scalar_model(tmp_path / "scalar")

    save_model(Transformer(TINY), tmp_path / "causal")
    raw = json.loads((tmp_path / "causal" / "config.json").read_text())
    (tmp_path / "causal" / "config.json").write_text(json.dumps(raw | {"score_bias": "x"}))
    with pytest.raises(InputError, match=r"config\.json: score_bias: expected a number, got 'x'"):
        load_scalar_model(tmp_path / "causal")
