"""`--lora-rank` and `--base-4bit`: what is trained, saved, resumed and refused, the same in every algorithm."""

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import get_args

import pytest
import torch
from burnish.algorithms import distill, dpo, grpo, kto, ppo, reward, sft
from burnish.algorithms.__main__ import main
from burnish.algorithms.run.flags import CHECKPOINT
from burnish.model.adapter import adapters, linears, lora_config, quantize_base
from burnish.model.checkpoint import load_model, load_scalar_model, save_model
from burnish.model.errors import InputError
from burnish.model.files.folder import base_of, is_adapter
from burnish.model.packed import pack
from burnish.model.text.tokenizer import Tokenizer
from burnish.model.transformer import Transformer
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def losses_of(folder):
    return [line["loss"] for line in metrics_of(folder)]


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
    """From the command line; optimizer state is of adapters alone, and of a head; what is written loads back."""
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
        held = [key for key in names if key.startswith(f"{part}/")]
        moments = [key for key in names if key.startswith(f"{optimizer}/") and "exp_avg_sq" in key]
        assert len(held) == len(moments) > 0
        assert all(".lora." in key or key == f"{part}/score.weight" for key in held)

    model = (load_scalar_model if name == "reward" else load_model)(cfg.output / "model")
    config = lora_config(model)
    assert config is not None and config.rank == 16
    assert linears(model)["model.layers.0.mlp.up_proj"].four_bit is not None
    assert all(bool(lora.b.any()) for lora in adapters(model).values())


@pytest.fixture
def cfg(model_folder, demonstrations, tmp_path):
    return sft.Config(
        model=model_folder,
        data=demonstrations,
        output=tmp_path / "out",
        steps=4,
        batch_size=16,
        learning_rate=1e-2,
        warmup_steps=0,
        lora_rank=4,
        device="cpu",
    )


def test_a_folder_in_4_bits_is_trained_by_an_adapter_alone(cfg, tmp_path, capsys):
    """A published one names layers that are dense. They are dense again under the adapter that is saved."""
    model = load_model(cfg.model)
    quantize_base(model)
    dense = "model.layers.0.mlp.up_proj"
    linears(model)[dense].four_bit, linears(model)[dense].weight = (
        None,
        linears(load_model(cfg.model))[dense].weight,
    )
    save_model(model, tmp_path / "four", Tokenizer.load(cfg.model))
    assert dense in (tmp_path / "four" / "config.json").read_text()
    flags = ["--model", str(tmp_path / "four"), "--data", str(cfg.data), "--output", str(cfg.output)]
    flags += ["--steps", "3", "--batch-size", "16", "--learning-rate", "0.01", "--device", "cpu"]
    assert main(["sft", *flags]) == 1
    assert "its weights are in 4 bits, which are frozen: expected --lora-rank" in capsys.readouterr().err

    assert main(["sft", *flags, "--lora-rank", "8"]) == 0
    trained = load_model(cfg.output / "model")
    assert all(bool(lora.b.any()) for lora in adapters(trained).values())
    in_4_bits = {name for name, layer in linears(trained).items() if layer.four_bit is not None}
    assert in_4_bits == linears(trained).keys() - {dense, "lm_head"}
    assert losses_of(cfg.output)[-1] < losses_of(cfg.output)[0]


def test_training_makes_an_adapter_that_loads_back_on_its_base(cfg):
    before = {path.name: path.read_bytes() for path in cfg.model.iterdir()}
    trained = sft.train(dataclasses.replace(cfg, steps=40))
    assert losses_of(cfg.output)[-1] < 0.95 * losses_of(cfg.output)[0]
    assert {path.name: path.read_bytes() for path in cfg.model.iterdir()} == before
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in trained.iterdir()}
    assert not (trained / "config.json").exists()
    config = json.loads((trained / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    assert Path(config["base_model_name_or_path"]) == cfg.model.resolve()
    model, base = load_model(trained), load_model(cfg.model)
    for name, weight in base.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight)
    assert all(bool(lora.b.any()) for lora in adapters(model).values())
    assert Tokenizer.load(trained).encode("1+2") == Tokenizer.load(cfg.model).encode("1+2")


def test_only_the_adapter_is_trained_and_kept(cfg):
    sft.train(dataclasses.replace(cfg, save_every=4))
    with safe_open(cfg.output / CHECKPOINT, "pt") as file:
        names = list(file.keys())
    assert sum(name.startswith("model/") for name in names) == 2 * 7 * 2  # A and B of 7 linears in 2 layers
    assert all(".lora." in name for name in names if name.startswith("model/"))
    assert sum("exp_avg_sq" in name for name in names) == 2 * 7 * 2
    assert (cfg.output / "step-4" / "adapter_config.json").is_file()


@pytest.mark.parametrize(
    "flags", [{}, {"lora_dropout": 0.3}, {"base_4bit": True}], ids=["lora", "dropout", "4 bits"]
)
def test_resumed_equals_uninterrupted(cfg, tmp_path, flags):
    cfg = dataclasses.replace(cfg, save_every=2, schedule="constant", **flags)
    whole = sft.train(cfg)
    cut = dataclasses.replace(cfg, output=tmp_path / "cut", steps=2)
    sft.train(cut)
    resumed = sft.train(dataclasses.replace(cut, steps=4, resume=True))
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (whole, resumed))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert losses_of(cfg.output) == losses_of(tmp_path / "cut")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("base_4bit", [False, True], ids=["lora", "qlora"])
def test_a_gpu_trains_what_a_cpu_trains(cfg, tmp_path, base_4bit):
    """There the base is bf16, and so are the products."""
    for device in ("cpu", "cuda"):
        run = dataclasses.replace(cfg, output=tmp_path / device, base_4bit=base_4bit, device=device)
        trained = sft.train(run)
    assert losses_of(tmp_path / "cuda") == pytest.approx(losses_of(tmp_path / "cpu"), abs=0.02)
    model = load_model(trained, torch.bfloat16, "cuda")
    assert {lora.a.dtype for lora in adapters(model).values()} == {torch.float32}
    assert model.embed_tokens.weight.dtype == torch.bfloat16


def test_training_goes_on_with_a_saved_adapter(cfg, tmp_path):
    first = sft.train(cfg)
    again = dataclasses.replace(cfg, model=first, lora_rank=0, output=tmp_path / "again")
    second = sft.train(again)
    assert losses_of(again.output)[0] < losses_of(cfg.output)[0]
    config, before = (lora_config(load_model(folder)) for folder in (second, first))
    assert config == before


def test_dropout_is_only_in_training(cfg, tmp_path):
    plain, dropped = (
        sft.train(dataclasses.replace(cfg, output=tmp_path / str(p), lora_dropout=p)) for p in (0.0, 0.5)
    )
    assert losses_of(tmp_path / "0.0") != losses_of(tmp_path / "0.5")
    assert json.loads((dropped / "adapter_config.json").read_text())["lora_dropout"] == 0.5
    assert load_model(plain).adapter is not None


def test_reinforcement_learning_has_no_dropout(configs, tmp_path):
    """Not even that of an adapter it goes on with: the first ratio is of the policy that sampled."""
    first = sft.train(dataclasses.replace(configs["sft"], lora_dropout=0.5, output=tmp_path / "sft"))
    cfg = dataclasses.replace(configs["grpo"], model=first, lora_rank=0, output=tmp_path / "grpo")
    trained = grpo.train(cfg)
    assert metrics_of(cfg.output)[0]["mismatch"] < 1e-5
    assert load_model(trained).adapter.dropout == 0.5


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"lora_rank": -1}, "--lora-rank: expected a number between 0 and 256, got -1"),
        ({"lora_alpha": 0.0}, "--lora-alpha: expected a number at least 1e-06"),
        ({"lora_dropout": 1.0}, "--lora-dropout: expected a number between 0 and 0.99"),
        ({"lora_rank": 0, "lora_alpha": 8.0}, "--lora-alpha: expected --lora-rank beside it"),
        ({"lora_rank": 0, "lora_dropout": 0.1}, "--lora-dropout: expected --lora-rank beside it"),
        ({"lora_rank": 0, "base_4bit": True}, "--base-4bit: 4-bit weights are frozen: expected --lora-rank"),
    ],
)
def test_a_flag_that_would_be_ignored_is_refused(cfg, flags, message):
    with pytest.raises(InputError, match=message):
        sft.train(dataclasses.replace(cfg, **flags))
    assert not cfg.output.exists()


def test_a_rank_beside_an_adapter_is_refused(cfg, tmp_path):
    first = sft.train(cfg)
    with pytest.raises(
        InputError, match=r"--lora-rank: .* is an adapter, with which training goes on as it is"
    ):
        sft.train(dataclasses.replace(cfg, model=first, output=tmp_path / "again"))


def test_chat_and_evaluate_take_an_adapter(cfg, tmp_path, capsys):
    trained = str(sft.train(cfg))
    assert main(["chat", "--model", trained, "--prompt", "1+2+3=", "--max-new-tokens", "4"]) == 0
    data, output = str(cfg.data), str(tmp_path / "evaluation")
    assert main(["evaluate", "--model", trained, "--data", data, "--output", output, "--device", "cpu"]) == 0
    assert "perplexity" in capsys.readouterr().out


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


def test_a_base_that_has_gone_is_named(cfg, tmp_path, capsys):
    trained = sft.train(cfg)
    cfg.model.rename(tmp_path / "elsewhere")
    assert main(["chat", "--model", str(trained), "--prompt", "1"]) == 1
    message = capsys.readouterr().err
    assert "adapter_config.json: base_model_name_or_path: expected a model folder, found none at" in message


# ---- what is written


def dtypes_in(folder):
    (file,) = folder.glob("*model.safetensors")
    return {tensor.dtype for tensor in load_file(file).values()}


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


def test_merge_writes_a_plain_folder_in_another_dtype(cfg, tmp_path, capsys):
    for dtype in ("bfloat16", "float16", "float32"):
        output = tmp_path / dtype
        assert main(["merge", "--model", str(cfg.model), "--output", str(output), "--dtype", dtype]) == 0
        assert dtypes_in(output) == {getattr(torch, dtype)}
    assert main(["merge", "--model", str(cfg.model), "--output", str(tmp_path / "auto")]) == 1
    assert "expected an adapter's folder, with an adapter_config.json, or --dtype" in capsys.readouterr().err
    model = load_model(cfg.model)
    torch.nn.init.constant_(model.norm.weight, 1e5)
    save_model(model, tmp_path / "large", Tokenizer.load(cfg.model))
    command = ["merge", "--model", str(tmp_path / "large"), "--output", str(tmp_path / "half"), "--dtype"]
    assert main([*command, "float16"]) == 1 and not (tmp_path / "half").exists()
    assert "model.norm.weight: expected numbers up to 65504" in capsys.readouterr().err


def test_what_a_run_has_trained_is_not_lost_for_a_dtype(cfg, tmp_path, capsys):
    model = load_model(cfg.model)
    torch.nn.init.constant_(model.norm.weight, 1e5)
    save_model(model, tmp_path / "large", Tokenizer.load(cfg.model))
    cfg = dataclasses.replace(cfg, model=tmp_path / "large", lora_rank=0, steps=1, save_dtype="float16")
    assert dtypes_in(sft.train(cfg)) == {torch.float32}
    assert "written in float32: model.norm.weight: expected numbers up to" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"--save-dtype: expected one of auto, float32, .*got 'int8'"):
        sft.train(dataclasses.replace(cfg, output=tmp_path / "other", save_dtype="int8"))


def test_a_resumed_run_writes_the_same_bf16_bits(cfg, tmp_path):
    base = tmp_path / "bf16"
    save_model(load_model(cfg.model), base, Tokenizer.load(cfg.model), dtype=torch.bfloat16)
    cfg = dataclasses.replace(cfg, model=base, lora_rank=0, save_every=2, schedule="constant")
    whole = sft.train(cfg)
    cut = dataclasses.replace(cfg, output=tmp_path / "cut", steps=2)
    sft.train(cut)
    assert dtypes_in(tmp_path / "cut" / "step-2") == {torch.bfloat16}
    state = load_file(tmp_path / "cut" / CHECKPOINT)
    assert {t.dtype for t in state.values() if t.is_floating_point()} == {torch.float32}
    resumed = sft.train(dataclasses.replace(cut, steps=4, resume=True))
    one, other = (load_file(folder / "model.safetensors") for folder in (whole, resumed))
    assert all(torch.equal(one[name], other[name]) for name in one)


# ---- what is loaded


@pytest.mark.parametrize("name", ["sft", "dpo", "kto", "reward"])
def test_dropout_acts_in_training(configs, name, tmp_path):
    """Also that of an adapter with which training goes on: a model is loaded in evaluation mode."""
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


def test_the_base_keeps_the_name_that_it_was_called_by(cfg, tmp_path, monkeypatch, capsys):
    """Found from where the run was started, from anywhere by the folders around the run, and by --base."""
    monkeypatch.chdir(cfg.model.parent)
    relative = Path(cfg.model.name)
    first = sft.train(dataclasses.replace(cfg, model=relative, output=Path("runs/first"))).resolve()
    named = lambda folder: json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named(first) == relative.name
    (elsewhere := tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(elsewhere)
    again = dataclasses.replace(cfg, model=first, lora_rank=0, output=tmp_path / "again")
    assert named(sft.train(again)) == relative.name

    far = first.rename(tmp_path.parent / f"{tmp_path.name}-far")
    file = far / "adapter_config.json"
    hub = "someone/Model-1B"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": hub}))
    assert main(["merge", "--model", str(far), "--output", "merged"]) == 1
    assert "found none at 'someone/Model-1B': write its path there, or merge" in capsys.readouterr().err
    assert main(["merge", "--model", str(far), "--output", "merged", "--base", str(cfg.model)]) == 0
    model = load_model(far, base=cfg.model)
    assert lora_config(model).base == hub
    with pytest.raises(InputError, match="expected an adapter's folder beside a base, got a whole model"):
        load_model("merged", base=cfg.model)


def test_a_relative_name_is_of_one_base(cfg, tmp_path, monkeypatch):
    """A base called as a run calls its own folder is told from that; another of that name, where one stands, is not."""
    project = tmp_path / "project"
    shutil.copytree(cfg.model, project / "model")
    monkeypatch.chdir(project)
    sft.train(dataclasses.replace(cfg, model=Path("model"), output=Path("out"), save_every=2))
    step = project / "out" / "step-2"
    for start in (project, project / "out", step, tmp_path):
        monkeypatch.chdir(start)
        assert base_of(step) == base_of(project / "out" / "model") == project / "model"

    shutil.copytree(cfg.model, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        InputError, match=r"expected one model folder, found .*/model and .*/project/model at 'model'"
    ):
        load_model(step)
    assert adapters(load_model(step, base=project / "model"))


def test_a_critic_goes_on_with_its_adapter_beside_a_new_one(configs, tmp_path):
    scorer = reward.train(dataclasses.replace(configs["reward"], output=tmp_path / "reward"))
    cfg = dataclasses.replace(
        configs["ppo"], reward=(), reward_model=scorer, lora_rank=3, output=tmp_path / "ppo"
    )
    assert lora_config(load_model(ppo.train(cfg))).rank == 3
    assert lora_config(load_scalar_model(cfg.output / "critic")).rank == 2


def test_a_config_beside_an_adapter_is_passed_over(cfg, tmp_path):
    """Other trainers write the base's config.json there; what decides is whose weights are there."""
    trained = sft.train(cfg)
    (trained / "config.json").write_bytes((cfg.model / "config.json").read_bytes())
    assert is_adapter(trained) and adapters(load_model(trained))
    assert main(["merge", "--model", str(trained), "--output", str(tmp_path / "merged")]) == 0
    save_model(load_model(cfg.model), tmp_path / "plain")
    (tmp_path / "plain" / "adapter_config.json").write_text("{}")
    assert not is_adapter(tmp_path / "plain")


def test_adapters_that_are_each_others_base_are_refused(cfg, tmp_path):
    one = sft.train(cfg)
    other = Path(shutil.copytree(one, tmp_path / "other"))
    for folder, base in ((one, other), (other, one)):
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(base)}))
    with pytest.raises(InputError, match=r"base_model_name_or_path: leads back to .*, an adapter"):
        load_model(one)
