"""`--lora-rank` and `--base-4bit` in SFT: what is trained, saved, resumed, loaded and refused."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from burnish.algorithms import sft
from burnish.algorithms.__main__ import main
from burnish.algorithms.run.checks import CHECKPOINT
from burnish.algorithms.run.targets import placed
from burnish.model.adapter import adapters, add_lora, linears, lora_config, quantize_base
from burnish.model.checkpoint import load_model, load_scalar_model, save_model
from burnish.model.errors import InputError
from burnish.model.files.folder import base_of, is_adapter
from burnish.model.linear import ExpertLinear, Linear
from burnish.model.text.tokenizer import Tokenizer
from faults import check_of, control, faults_of
from planted import plant
from runs import dtypes_in, losses_of
from safetensors import safe_open
from safetensors.torch import load_file


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
    assert (
        "expected --lora-rank for this model, because its 4-bit weights are frozen" in capsys.readouterr().err
    )

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


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"lora_rank": -1}, "--lora-rank: expected a number between 0 and 256, got -1"),
        ({"lora_alpha": 0.0}, "--lora-alpha: expected a number at least 1e-06"),
        ({"lora_dropout": 1.0}, "--lora-dropout: expected a number between 0 and 0.99"),
        ({"lora_rank": 0, "lora_alpha": 8.0}, "--lora-alpha: expected --lora-rank, too"),
        ({"lora_rank": 0, "lora_dropout": 0.1}, "--lora-dropout: expected --lora-rank, too"),
        ({"lora_rank": 0, "lora_dora": True}, "--lora-dora: expected --lora-rank, too"),
        ({"lora_rank": 0, "lora_rslora": True}, "--lora-rslora: expected --lora-rank, too"),
        ({"lora_rank": 0, "lora_targets": ("q_proj",)}, "--lora-targets: expected --lora-rank, too"),
        ({"lora_rank": 0, "base_4bit": True}, "--base-4bit: expected --lora-rank, too"),
        (
            {"lora_targets": ("q_proj", "query")},
            r"--lora-targets: expected all-linear, one regular expression, or names of linear layers \(q_proj, "
            "k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj\\), got query",
        ),
        (
            {"lora_targets": (".*_prj",)},
            "--lora-targets: expected an expression of whole names of linear layers",
        ),
        (
            {"lora_targets": (".*",)},
            r"--lora-targets: expected linear layers, got \.\*, which matches model.embed",
        ),
        ({"lora_targets": ("(",)}, "--lora-targets: expected a regular expression, got "),
    ],
)
def test_a_flag_that_would_be_ignored_is_refused(cfg, flags, message):
    with pytest.raises(InputError, match=message):
        sft.train(dataclasses.replace(cfg, **flags))
    assert not cfg.output.exists()


def test_a_rank_beside_an_adapter_is_refused(cfg, tmp_path):
    first = sft.train(cfg)
    with pytest.raises(
        InputError, match=r"--lora-rank: .* is an adapter, and training continues with its own rank"
    ):
        sft.train(dataclasses.replace(cfg, model=first, output=tmp_path / "again"))
    for name, value in (("dora", True), ("rslora", True), ("targets", ("q_proj",)), ("alpha", 3.0)):
        flags = {f"lora_{name}": value, "lora_rank": 0, "model": first, "output": tmp_path / "again"}
        with pytest.raises(InputError, match=f"--lora-{name}: .* is an adapter, and training continues with"):
            sft.train(dataclasses.replace(cfg, **flags))


# ---- the layers of --lora-targets


LAST = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"


@pytest.mark.parametrize(
    ("base", "targets", "expected"),
    [
        ("llama", (), (LAST, ())),
        ("llama", ("all-linear",), (LAST, ())),
        ("llama", ("q_proj", "lm_head", "q_proj"), (("q_proj", "lm_head"), ())),
        ("llama", ("model.layers.1.mlp.up_proj",), (("model.layers.1.mlp.up_proj",), ())),
        ("llama", (r".*\.0\..*(q|k)_proj",), (r".*\.0\..*(q|k)_proj", ())),
        ("mixtral", (), (LAST[:4], (GATE_UP, DOWN))),
        ("mixtral", ("q_proj", "down_proj"), (("q_proj",), (DOWN,))),
        ("mixtral", ("experts.gate_up_proj",), ((), (GATE_UP,))),
        ("mixtral", (r".*(q|down)_proj",), (r".*(q|down)_proj", (DOWN,))),
        ("qwen2_moe", ("down_proj",), (("down_proj",), (DOWN,))),  # of the shared expert, too
        ("qwen2_moe", ("shared_expert.down_proj",), (("shared_expert.down_proj",), ())),
        ("qwen2_moe", ("all-linear",), ((*LAST, "shared_expert_gate"), (GATE_UP, DOWN))),
    ],
)
def test_the_layers_that_get_an_adapter(data, base, targets, expected):
    model = load_model(data / "tiny-hf" / base)
    selected = placed(targets, linears(model))
    assert (selected["targets"], selected["parameters"]) == expected

    add_lora(model, 2, **selected)
    names = {name.partition(".layers.")[2].partition(".")[2] or name for name in adapters(model)}
    if base == "llama" and targets in ((), ("all-linear",)):
        assert {name.rpartition(".")[2] for name in names} == {*LAST} and len(adapters(model)) == 21
    elif isinstance(expected[0], tuple):
        assert all(any(name.endswith(end) for name in adapters(model)) for end in sum(expected, ()))
    else:
        assert len(adapters(model)) == {"llama": 2, "mixtral": 6}[base]


@pytest.mark.parametrize(
    ("base", "targets", "message"),
    [
        (
            "mixtral",
            ("gate_proj",),
            r"names of linear layers \(q_proj, .*gate_up_proj, down_proj\), got gate_proj",
        ),
        (
            "mixtral",
            (r".*\.0\..*_proj",),
            "expected mlp.experts.gate_up_proj of every layer or of none, got ",
        ),
        ("mixtral", ("model.layers.0.mlp.experts.down_proj",), "got model.layers.0.mlp.experts.down_proj"),
        ("llama", ("embed_tokens",), "got embed_tokens"),
        ("llama", ("q_proj", ".*k_proj"), r"got \.\*k_proj"),
    ],
)
def test_a_target_that_no_layer_has_is_refused(data, base, targets, message):
    with pytest.raises(InputError, match=f"--lora-targets: .*{message}"):
        placed(targets, linears(load_model(data / "tiny-hf" / base)))


@control
def targets_select_their_layers() -> None:
    layers = {name: Linear(2, 2) for name in ("lm_head", "model.layers.0.self_attn.q_proj")}
    layers |= {f"model.layers.{i}.mlp.experts.down_proj": ExpertLinear(2, 2, 2) for i in range(2)}
    assert placed(("all-linear",), layers)["targets"] == ("q_proj",)
    assert placed(("down_proj", "q_proj"), layers)["parameters"] == (DOWN,)
    for wrong in (("k_proj",), (r".*\.0\..*",)):
        try:
            placed(wrong, layers)
        except InputError:
            continue
        raise AssertionError(wrong)


@pytest.mark.parametrize("fault", faults_of(__file__), ids=lambda fault: fault.id)
def test_the_selection_of_layers_can_fail(fault, monkeypatch):
    targets_select_their_layers()
    plant(fault, monkeypatch)
    with pytest.raises(AssertionError):
        check_of(fault)()


def test_a_critic_leaves_out_the_head(data):
    layers = linears(load_scalar_model(data / "tiny-hf" / "llama"))
    assert placed(("q_proj", "lm_head"), layers, scores=True)["targets"] == ("q_proj",)
    with pytest.raises(InputError, match="got lm_head"):
        placed(("lm_head",), layers, scores=True)


def test_chat_and_evaluate_take_an_adapter(cfg, tmp_path, capsys):
    trained = str(sft.train(cfg))
    assert main(["chat", "--model", trained, "--prompt", "1+2+3=", "--max-new-tokens", "4"]) == 0
    data, output = str(cfg.data), str(tmp_path / "evaluation")
    assert main(["evaluate", "--model", trained, "--data", data, "--output", output, "--device", "cpu"]) == 0
    assert "perplexity" in capsys.readouterr().out


def test_a_base_that_has_gone_is_named(cfg, tmp_path, capsys):
    trained = sft.train(cfg)
    cfg.model.rename(tmp_path / "elsewhere")
    assert main(["chat", "--model", str(trained), "--prompt", "1"]) == 1
    message = capsys.readouterr().err
    assert "adapter_config.json: base_model_name_or_path: expected a model folder, found none at" in message


# ---- what is written


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
    assert (
        "found none at 'someone/Model-1B': write its path into the file, or merge" in capsys.readouterr().err
    )
    assert main(["merge", "--model", str(far), "--output", "merged", "--base", str(cfg.model)]) == 0
    model = load_model(far, base=cfg.model)
    assert lora_config(model).base == hub
    with pytest.raises(
        InputError, match="expected an adapter's folder, since a base is given, got a whole model"
    ):
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
    with pytest.raises(
        InputError, match=r"base_model_name_or_path: expected a model, leads back to .*, an adapter"
    ):
        load_model(one)
