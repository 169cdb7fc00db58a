"""`--lora-rank` and `--base-4bit` in every algorithm: what is trained, written, merged and gone on with."""

import dataclasses
import json
import math
from typing import get_args

import pytest
import torch
from burnish.algorithms import distill, dpo, grpo, kto, ppo, reward, sft
from burnish.algorithms.__main__ import main
from burnish.algorithms.run.checks import CHECKPOINT
from burnish.model.adapter import adapters, linears, lora_config
from burnish.model.checkpoint import load_model, load_scalar_model, save_model
from burnish.model.packed import pack
from burnish.model.text.tokenizer import Tokenizer
from burnish.model.transformer import Transformer
from runs import dtypes_in, losses_of, metrics_of
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def configs(model_folder, demonstrations, prompts, tmp_path):
    """Every algorithm on a small task, with an adapter."""
    pairs = [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": row["completion"][::-1]}
        for row in map(json.loads, demonstrations.read_text().splitlines())
    ]
    preferences = write_rows(tmp_path / "preferences.jsonl", pairs)
    (tmp_path / "reward.py").write_text(
        "def ones(completion_ids, **_):\n    return [float(sum(i % 2 for i in ids)) for ids in completion_ids]\n"
    )

    common = {"steps": 2, "learning_rate": 1e-2, "device": "cpu", "lora_rank": 2, "model": model_folder}
    rl = {"data": prompts, "reward": (f"{tmp_path / 'reward.py'}:ones",), "max_new_tokens": 8}

    return {
        "sft": sft.Config(data=demonstrations, batch_size=24, **common),
        "dpo": dpo.Config(data=preferences, batch_size=8, **common),
        "kto": kto.Config(data=preferences, batch_size=8, **common),
        "reward": reward.Config(data=preferences, batch_size=8, **common),
        "grpo": grpo.Config(
            prompts_per_step=5, group_size=4, kl_coefficient=0.1, updates_per_rollout=2, **rl, **common
        ),
        "ppo": ppo.Config(
            prompts_per_step=8, epochs_per_rollout=1, critic_learning_rate=1e-2, **rl, **common
        ),
        "distill": distill.Config(
            data=demonstrations,
            teacher=model_folder,
            batch_size=8,
            student_samples=0.5,
            max_new_tokens=8,
            temperature=2.0,
            **common,
        ),
    }


TRAINERS = {
    "sft": sft,
    "dpo": dpo,
    "kto": kto,
    "reward": reward,
    "grpo": grpo,
    "ppo": ppo,
    "distill": distill,
}


@pytest.mark.parametrize("base_4bit", [False, True], ids=["lora", "qlora"])
@pytest.mark.parametrize("name", TRAINERS)
def test_every_algorithm_trains_an_adapter(configs, name, base_4bit, tmp_path):
    """The model that it writes loads back; a KL or a reference that is not the base would show at the first step."""
    cfg = dataclasses.replace(configs[name], base_4bit=base_4bit, output=tmp_path / "out")
    trained = TRAINERS[name].train(cfg)
    model = (load_scalar_model if name == "reward" else load_model)(trained)
    assert all(bool(lora.b.any()) for lora in adapters(model).values())
    assert (linears(model)["model.layers.0.mlp.up_proj"].four_bit is not None) == base_4bit

    # a KL or a reference that is not the base
    first = metrics_of(cfg.output)[0]
    if name == "dpo":
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    if name == "ppo":
        assert first["kl"] == pytest.approx(0, abs=1e-5) and first["first_ratio"] == pytest.approx(
            1, abs=1e-5
        )
    if name == "distill" and not base_4bit:  # the teacher is the student's base
        assert first["loss"] == pytest.approx(0, abs=1e-6)
    if name == "grpo":
        assert first["ratio"] == pytest.approx(1, abs=0.2) and 0 < first["kl"] < 1

    # trained on from what was written
    again = dataclasses.replace(cfg, lora_rank=0, model=trained, output=tmp_path / "again", base_4bit=False)
    went_on = TRAINERS[name].train(again)
    assert lora_config((load_scalar_model if name == "reward" else load_model)(went_on)) == lora_config(model)
    if name == "dpo":
        assert metrics_of(again.output)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("name", TRAINERS)
def test_every_algorithm_has_targets_dora_and_rslora(configs, name, tmp_path):
    flags = {
        "lora_targets": ("q_proj", "down_proj"),
        "lora_dora": True,
        "lora_rslora": True,
        "lora_alpha": 3.0,
    }
    cfg = dataclasses.replace(configs[name], output=tmp_path / "out", **flags)

    # what is written
    folders = [TRAINERS[name].train(cfg), *([cfg.output / "critic"] if name == "ppo" else [])]
    for folder in folders:
        load = load_scalar_model if name == "reward" or folder.name == "critic" else load_model
        model = load(folder)
        config, loras = lora_config(model), adapters(model)
        assert (
            config is not None
            and config.dora
            and config.rslora
            and {*config.targets} == {"q_proj", "down_proj"}
        )
        assert {key.rpartition(".")[2] for key in loras} == {*config.targets} and len(loras) == 4
        for key, lora in loras.items():
            assert lora.magnitude is not None and lora.scaling == pytest.approx(3 / math.sqrt(2))
            length = linears(model)[key].dense().norm(dim=1)

            # both are trained
            assert bool(lora.b.any()) and not torch.equal(lora.magnitude.detach(), length)

    first = metrics_of(cfg.output)[0]  # the policy that samples is the one that is trained
    if name == "ppo":
        assert first["first_ratio"] == pytest.approx(1, abs=1e-5)
    if name == "grpo":
        assert first["mismatch"] < 1e-5


VARIANTS = {  # beside the defaults
    "dpo": [{"loss": loss} for loss in get_args(dpo.Loss) if loss != "dpo"],
    "sft": [{"loss": "dft"}],
    "grpo": [{"loss": "gspo"}, {"loss": "cispo"}],
    "ppo": [{"advantage": advantage, "group_size": 2} for advantage in ("rloo", "reinforce_pp")],
    "distill": [
        {"loss": "policy_gradient", "student_samples": 1.0},
        {"loss": "sequence", "student_samples": 0.0, "temperature": 1.0, "teacher": None},
    ],
}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        pytest.param(name, changes, id=" ".join([name, *map(str, changes.values())]), marks=marks)
        for name in TRAINERS
        for changes in ({}, *VARIANTS.get(name, ()))
        for marks in [() if name in ("dpo", "ppo") and not changes else pytest.mark.slow]
    ],
)
def test_rank_16_on_a_4_bit_base_by_flags(configs, name, changes, tmp_path):
    """Optimizer state is of adapters alone, and of a head; the model that the command writes loads back."""
    cfg = dataclasses.replace(configs[name], output=tmp_path / "out", save_every=2, **changes)
    cfg = dataclasses.replace(cfg, lora_rank=16, base_4bit=True)
    without_critic = "advantage" in changes
    if without_critic:
        cfg = dataclasses.replace(cfg, critic_learning_rate=ppo.Config.critic_learning_rate)

    command = [name]
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        if value is True:
            command.append(f"--{field.name.replace('_', '-')}")
        elif value != field.default:
            values = value if isinstance(value, tuple) else (value,)
            command += [f"--{field.name.replace('_', '-')}", *map(str, values)]

    assert {"--lora-rank", "16", "--base-4bit"} <= set(command)
    assert main(command) == 0

    # optimizer state is of what is trained alone
    with safe_open(cfg.output / CHECKPOINT, "pt") as file:
        names = list(file.keys())
    parts = {"model": "optimizer"}
    if name == "ppo" and not without_critic:
        parts["critic"] = "critic_optimizer"
    for part, optimizer in parts.items():
        stored = [key for key in names if key.startswith(f"{part}/")]
        moments = [key for key in names if key.startswith(f"{optimizer}/") and "exp_avg_sq" in key]
        assert len(stored) == len(moments) > 0
        assert all(".lora." in key or key == f"{part}/score.weight" for key in stored)

    model = (load_scalar_model if name == "reward" else load_model)(cfg.output / "model")
    config = lora_config(model)
    assert config is not None and config.rank == 16
    assert linears(model)["model.layers.0.mlp.up_proj"].four_bit is not None
    assert all(bool(lora.b.any()) for lora in adapters(model).values())


def test_reinforcement_learning_has_no_dropout(configs, tmp_path):
    """The first ratio is of the policy that sampled, even where an adapter that has dropout is trained on."""
    first = sft.train(dataclasses.replace(configs["sft"], lora_dropout=0.5, output=tmp_path / "sft"))
    cfg = dataclasses.replace(configs["grpo"], model=first, lora_rank=0, output=tmp_path / "grpo")
    trained = grpo.train(cfg)
    assert metrics_of(cfg.output)[0]["mismatch"] < 1e-5
    assert load_model(trained).adapter.dropout == 0.5


@pytest.mark.parametrize("name", ["sft", "reward"])
def test_merged_it_is_a_plain_model(configs, name, tmp_path):
    trained = TRAINERS[name].train(
        dataclasses.replace(configs[name], output=tmp_path / "out", base_4bit=True)
    )
    merged = tmp_path / "merged"
    assert main(["merge", "--model", str(trained), "--output", str(merged)]) == 0

    packed, rows = pack([[1, 2, 3, 4, 5]]), torch.tensor([1, 2, 4])
    load = load_scalar_model if name == "reward" else load_model
    whole, adapted = load(merged), load(trained)
    assert lora_config(whole) is None and all(layer.four_bit is None for layer in linears(whole).values())
    with torch.no_grad():
        figures = [
            m.values(packed, rows) if name == "reward" else m.score(packed, rows)[0] for m in (whole, adapted)
        ]

    torch.testing.assert_close(*figures, atol=1e-5, rtol=1e-5)
    assert Tokenizer.load(merged).encode("1+2") == Tokenizer.load(trained).encode("1+2")
    assert main(["merge", "--model", str(merged), "--output", str(tmp_path / "again")]) == 1


# ---- what is written


@pytest.mark.parametrize("name", TRAINERS)
def test_a_bf16_model_comes_back_as_one(configs, name, tmp_path):
    """Trained in fp32, to the same numbers whatever is written; an adapter is fp32, and merged as its base is."""
    base = tmp_path / "bf16"
    save_model(
        load_model(configs[name].model), base, Tokenizer.load(configs[name].model), dtype=torch.bfloat16
    )
    cfg = dataclasses.replace(configs[name], model=base, steps=1)
    if name == "distill":
        cfg = dataclasses.replace(cfg, teacher=base)

    written = {}
    for dtype in ("auto", "float32"):
        run = dataclasses.replace(cfg, lora_rank=0, output=tmp_path / dtype, save_dtype=dtype)
        written[dtype] = TRAINERS[name].train(run)
        folders = [written[dtype], *([run.output / "critic"] if name == "ppo" else [])]
        expected = torch.bfloat16 if dtype == "auto" else torch.float32
        for folder in folders:
            assert dtypes_in(folder) == {expected}
            assert json.loads((folder / "config.json").read_text())["dtype"] == str(expected)[6:]

    rounded, exact = (load_file(folder / "model.safetensors") for folder in written.values())
    assert all(torch.equal(rounded[key], exact[key].bfloat16()) for key in exact)
    assert any(not torch.equal(rounded[key].float(), exact[key]) for key in exact)  # something was trained

    adapter = TRAINERS[name].train(dataclasses.replace(cfg, output=tmp_path / "adapter"))
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert {t.dtype for key, t in tensors.items() if ".lora_" in key} == {torch.float32}
    assert main(["merge", "--model", str(adapter), "--output", str(tmp_path / "merged")]) == 0
    assert dtypes_in(tmp_path / "merged") == {torch.bfloat16}


# ---- what is loaded


@pytest.mark.parametrize("name", ["sft", "dpo", "kto", "reward"])
def test_dropout_acts_in_training(configs, name, tmp_path):
    """An adapter with which training goes on has its dropout, too: a model is loaded in evaluation mode."""
    cfg = dataclasses.replace(configs[name], lora_dropout=0.5, output=tmp_path / "first")
    first = TRAINERS[name].train(cfg)
    load = load_scalar_model if name == "reward" else load_model
    assert not load(first).training and not load(cfg.model).training
    losses = []
    for dropout in (0.5, 0.0):
        file = first / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_dropout": dropout}))
        on = dataclasses.replace(
            cfg, model=first, lora_rank=0, lora_dropout=0.0, steps=1, output=tmp_path / str(dropout)
        )
        TRAINERS[name].train(on)
        losses.append(losses_of(on.output)[0])
    assert losses[0] != losses[1]


def test_a_forgotten_train_is_caught(configs, tmp_path, monkeypatch):
    monkeypatch.setattr(Transformer, "train", lambda self, mode=True: nn.Module.train(self, False))
    with pytest.raises(AssertionError):
        test_dropout_acts_in_training(configs, "sft", tmp_path)


def test_a_critic_goes_on_with_its_adapter_beside_a_new_one(configs, tmp_path):
    scorer = reward.train(dataclasses.replace(configs["reward"], output=tmp_path / "reward"))
    cfg = dataclasses.replace(
        configs["ppo"], reward=(), reward_model=scorer, lora_rank=3, output=tmp_path / "ppo"
    )
    assert lora_config(load_model(ppo.train(cfg))).rank == 3
    assert lora_config(load_scalar_model(cfg.output / "critic")).rank == 2
