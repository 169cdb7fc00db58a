"""`burnish memory`: the estimate beside what training held, its flags, and its sentences."""

import json
from dataclasses import fields, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from burnish.algorithms import distill, dpo, grpo, kto, memory, ppo, reward, sft
from burnish.algorithms.memory import MICRO_BATCH_TOKENS, ONLY_OF, PROMPTS, Config, estimate, main
from burnish.algorithms.recipes.sums import make_tokenizer
from burnish.model.checkpoint import save_model
from burnish.model.config import Experts, ModelConfig
from burnish.model.errors import InputError
from burnish.model.files.config_json import write_config
from burnish.model.text.tokenizer import Tokenizer
from burnish.model.transformer import Transformer
from torch.profiler import ProfilerActivity

METHODS = {
    "sft": sft,
    "dpo": dpo,
    "kto": kto,
    "reward": reward,
    "grpo": grpo,
    "ppo": ppo,
    "distill": distill,
}
SHAPE = ModelConfig(512, 128, 352, 3, 4, 2, tie_word_embeddings=True, eos_token_id=0)


@pytest.fixture
def wide(tmp_path):
    save_model(Transformer(SHAPE), tmp_path / "wide", Tokenizer(make_tokenizer(), eos="<eos>"))
    return tmp_path / "wide"


def peak(work) -> int:
    """The most bytes of tensors that were alive at a time while `work` ran."""
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    results: Any = profiler.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sft", "ppo", "distill"])
def test_a_run_takes_what_is_estimated(method, wide, demonstrations, prompts, tmp_path):
    """All tensors of a whole run, from loading to saving, within 15 %: PPO has a critic, distill a teacher."""
    torch.set_num_threads(1)
    (tmp_path / "odd.py").write_text(
        "def odd(completion_ids, **_):\n    return [len(x) % 3 for x in completion_ids]\n"
    )

    common = {
        "model": wide,
        "output": tmp_path / "run",
        "steps": 2,
        "device": "cpu",
        "micro_batch_tokens": 512,
    }
    sampled = {"prompts_per_step": 32, "group_size": 3, "max_new_tokens": 24}

    flags = {
        "sft": {"data": demonstrations, "batch_size": 64},
        "ppo": {"data": prompts, "reward": (f"{tmp_path}/odd.py:odd",), "minibatches": 1, **sampled},
        "distill": {"data": demonstrations, "teacher": wide, "batch_size": 64},
    }

    # the run, and the same flags for the estimate
    module = METHODS[method]

    measured = peak(lambda: module.train(module.Config(**common, **flags[method])))
    asked = {"max_prompt_length": 12, **sampled} if method == "ppo" else {}
    asked |= {"teacher": wide} if method == "distill" else {}
    found = estimate(Config(model=wide, method=method, micro_batch_tokens=512, device="cpu", **asked))
    assert found.total == pytest.approx(measured, rel=0.15)


def test_the_defaults_are_those_of_the_methods():
    for name, module in METHODS.items():
        defaults = {field.name: field.default for field in fields(module.Config)}
        assert defaults["micro_batch_tokens"] == MICRO_BATCH_TOKENS.get(name, 8192)
        if name in PROMPTS:
            prompts, group = PROMPTS[name]
            assert defaults.get("prompts_per_step", defaults.get("batch_size")) == prompts
            assert defaults.get("group_size", 1) == group
        own = {flag for flag in ONLY_OF if flag in defaults}
        own -= {"advantage"} if name == "grpo" else set()  # of which none has a critic
        assert own == {flag for flag, methods in ONLY_OF.items() if name in methods}, name


# ---- parts


@pytest.mark.slow
def test_further_models_are_counted(wide, tmp_path):
    base = Config(model=wide, method="ppo", device="cpu", micro_batch_tokens=256, prompts_per_step=2)
    whole = sum(p.numel() for p in Transformer(SHAPE).parameters())
    found = estimate(base)
    assert found.kept["reference"] == found.kept["weights"] == 4 * whole
    assert found.kept["critic"] == 4 * (whole + SHAPE.hidden_size)
    assert found.kept["critic's optimizer"] == 2 * found.kept["critic"]
    assert found.update["gradients"] == found.kept["weights"] + found.kept["critic"]
    assert found.sampling["sampling cache"] > 0

    fewer = estimate(replace(base, advantage="rloo", lora_rank=4))
    assert fewer.kept["reference"] == 0 and "critic" not in fewer.kept
    assert fewer.total < found.total / 2
    plain = estimate(replace(base, method="grpo", group_size=2))
    assert "reference" not in plain.kept
    assert (
        estimate(replace(base, method="grpo", group_size=2, kl_coefficient=0.1)).kept["reference"]
        == 4 * whole
    )
    taught = estimate(
        Config(model=wide, method="distill", teacher=wide, device="cpu", micro_batch_tokens=256)
    )
    assert taught.kept["teacher"] == 4 * whole and not taught.sampling


@pytest.mark.slow
def test_flags_that_save_memory_save_it(wide):
    base = Config(model=wide, device="cpu", micro_batch_tokens=1024)
    changes: dict[str, dict[str, Any]] = {
        "update": {"checkpoint_activations": True},
        "tokens": {"micro_batch_tokens": 512},
        "adapter": {"lora_rank": 4},
        "muon": {"optimizer": "muon"},
        "8 bits": {"optimizer": "adamw8bit"},
        "processes": {"processes": 8},
    }
    total = estimate(base).total
    assert all(estimate(replace(base, **change)).total < total for change in changes.values())


def test_experts_have_adapters_too(tmp_path):
    config = replace(SHAPE, experts=Experts(4, 2, 352, (True,) * 3, renormalize=True), model_type="mixtral")
    (tmp_path / "config.json").write_text(json.dumps(write_config(config)))
    found = estimate(
        Config(model=tmp_path, device="cpu", lora_rank=4, base_4bit=True, micro_batch_tokens=128)
    )
    in_attention = 4 * 3 * (4 * 128 * 2 + 4 * (2 * 128 + 64 * 2))
    assert found.kept["adapter"] > 2 * in_attention


# ---- sentences


@pytest.mark.slow
def test_a_report(wide, capsys, monkeypatch):
    cfg = Config(model=wide, device="cuda", micro_batch_tokens=1024)
    fitting = replace(cfg, checkpoint_activations=True)
    room = estimate(fitting).total
    monkeypatch.setattr(memory, "available", lambda device: room)
    found = main(cfg)
    printed = capsys.readouterr().out
    assert f"{found.total / 1e9:.2f} GB" in printed and "this machine has" in printed
    assert f"It does not fit: with --checkpoint-activations it takes {room / 1e9:.2f} GB." in printed

    main(fitting)
    assert "does not fit" not in capsys.readouterr().out
    monkeypatch.setattr(memory, "available", lambda device: None)
    main(fitting)
    assert "This machine has no GPU" in capsys.readouterr().out
    monkeypatch.setattr(memory, "available", lambda device: 1)
    main(replace(fitting, lora_rank=4, base_4bit=True))
    assert "no flag of this command makes it fit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"teacher": "x"}, "--teacher: --method sft has none"),
        ({"method": "grpo", "critic": "x"}, "--critic: --method grpo has none"),
        ({"method": "ppo", "critic": "x", "advantage": "rloo"}, "--critic: --advantage rloo has none"),
        ({"base_4bit": True}, "--base-4bit: expected --lora-rank"),
        ({"lora_alpha": 8.0}, "--lora-alpha: expected --lora-rank"),
        ({"processes": 0}, "--processes: expected a number at least 1"),
        ({"device": "tpu"}, "--device: expected cpu, cuda"),
        ({"model": "nowhere"}, "nowhere"),
    ],
)
def test_wrong_flags_get_a_sentence(flags, message, wide, tmp_path):
    given = {"model": wide, "device": "cpu", **flags}
    given |= {name: tmp_path / given[name] for name in ("teacher", "critic", "model") if name in flags}
    with pytest.raises(InputError, match=message):
        main(Config(**given))


def test_an_adapter_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="expected the folder of a whole model, got an adapter"):
        main(Config(model=tmp_path, device="cpu"))


def test_a_name_of_the_hub_gets_the_command_that_fetches_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"no such folder; .* `hf download Qwen/Qwen3-0.6B --local-dir"):
        main(Config(model=Path("Qwen/Qwen3-0.6B")))
