"""Adapters in PEFT's files: golden ones of PEFT 0.21.2, configs of every version, and what is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from burnish.model import InputError, Transformer, pack
from burnish.model.adapter import adapter_disabled, add_lora, linears, merge_lora
from burnish.model.adapters.config import LoraConfig
from burnish.model.checkpoint import load_model, save_model
from burnish.model.files import peft
from safetensors.torch import load_file, save_file
from tiny import TINY, logits_of, trained

GOLDEN = ["qwen3-lora", "qwen3-rslora", "qwen3-dora", "qwen3-rank_pattern"]


@pytest.fixture
def adapter_folder(data, tmp_path):
    """A function of a golden adapter's name: a copy to break, its base where the file says."""

    def copied(name: str) -> Path:
        shutil.copytree(data / "tiny-hf" / "qwen3", tmp_path / "qwen3", dirs_exist_ok=True)
        folder = Path(shutil.copytree(data / "tiny-peft" / name, tmp_path / name))
        edit(folder, base_model_name_or_path="../qwen3")
        return folder

    return copied


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


# ---- against PEFT


@pytest.mark.parametrize("name", GOLDEN)
def test_logits_are_those_of_peft(adapter_folder, data, name):
    model = load_model(adapter_folder(name))
    golden = load_file(data / "tiny-hf" / "qwen3" / "expected.safetensors")
    expected = load_file(data / "tiny-peft" / name / "expected.safetensors")["logits"]
    mask = golden["attention_mask"] == 1
    packed = pack([row[m].tolist() for row, m in zip(golden["input_ids"], mask, strict=True)])
    torch.testing.assert_close(logits_of(model, packed), expected[mask], atol=1e-5, rtol=0)
    assert not torch.allclose(golden["logits"][mask], expected[mask], atol=1e-3)  # the adapter does something
    merge_lora(model)
    torch.testing.assert_close(logits_of(model, packed), expected[mask], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", GOLDEN)
def test_what_is_saved_is_what_was_loaded(adapter_folder, tmp_path, name):
    source = adapter_folder(name)
    model = load_model(source)
    save_model(model, tmp_path / "saved")
    saved, was = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "saved", source))
    assert saved.keys() == was.keys() and all(torch.equal(saved[key], was[key]) for key in was)
    now, before = (
        json.loads((at / "adapter_config.json").read_text()) for at in (tmp_path / "saved", source)
    )
    assert now["base_model_name_or_path"] == "../qwen3"
    assert now.items() <= before.items()
    assert torch.equal(logits_of(load_model(tmp_path / "saved")), logits_of(model))


def test_modules_trained_whole_and_a_head_with_an_adapter_are_saved(tmp_path):
    save_model(Transformer(TINY, seed=1), tmp_path / "base")
    model = load_model(tmp_path / "base")
    base = str(tmp_path / "base")
    options = {"targets": ("q_proj", "lm_head"), "modules_to_save": ("norm", "embed_tokens"), "base": base}
    add_lora(model, 3, 5, **options)
    before = logits_of(model)
    trained(model)
    after = logits_of(model)

    save_model(model, tmp_path / "adapter")
    keys = load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    assert {"base_model.model.lm_head.lora_A.weight", "base_model.model.model.embed_tokens.weight"} <= keys

    again = load_model(tmp_path / "adapter")
    torch.testing.assert_close(logits_of(again), after)
    with adapter_disabled(again):
        assert torch.equal(logits_of(again), before)
    assert torch.equal(logits_of(again), logits_of(model))
    merge_lora(again)
    torch.testing.assert_close(logits_of(again), after, atol=1e-5, rtol=1e-5)


def test_which_modules_a_config_names():
    names = linears(Transformer(TINY)).keys()
    q0, q1 = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"
    some = lambda **options: [name for name in names if LoraConfig(4, 8, **options).targeted(name)]
    assert len(some()) == 14 and "lm_head" not in some()
    assert some(targets=("q_proj",)) == [q0, q1]
    assert some(targets=("q_proj",), layers=(1,)) == [q1]
    assert some(targets=("q_proj",), exclude=("layers.0.self_attn.q_proj",)) == [q1]
    assert some(targets=r".*\.1\..*q_proj") == [q1]
    assert some(targets=("q_proj",), layers=(1,), layers_pattern=("h", "layers")) == [q1]
    assert some(targets=("q_proj",), layers=(1,), layers_pattern=("h",)) == []
    assert some(targets=(q0, "v_proj", "lm_head"), layers=(1,)) == [q0, q1.replace("q_", "v_"), "lm_head"]
    assert some(targets=("q_proj", "lm_head"), modules_to_save=("lm_head",)) == [q0, q1]

    config = LoraConfig(4, 8, rank_pattern={"0.self_attn.q_proj": 16}, alpha_pattern={"q_proj": 32})
    assert [config.rank_of(name) for name in (q0, q1)] == [16, 4]
    assert [config.scaling_of(name) for name in (q0, q1, "model.layers.0.mlp.up_proj")] == [2, 8, 2]
    assert replace(config, rslora=True).scaling_of(q0) == 32 / 4


# the second base is tied: its head is no module that an adapter could have
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rslora": True, "dropout": 0.1},
        {"dora": True, "targets": ("q_proj", "down_proj"), "layers": (1,)},
        {
            "rank_pattern": {"q_proj": 5},
            "alpha_pattern": {"layers.0.mlp.up_proj": 3},
            "modules_to_save": ("norm",),
        },
        {"targets": r".*\.0\..*_proj", "exclude": ("v_proj",)},
    ],
    ids=["lora", "rslora", "dora", "patterns", "expression"],
)
def test_peft_loads_what_we_save(data, tmp_path, architecture, options):
    library, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base = data / "tiny-hf" / architecture
    model = load_model(base)
    add_lora(model, 3, base=str(base), **options)
    trained(model)
    save_model(model, tmp_path / "adapter")
    theirs = library.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter"
    )
    ids = [1, 5, 9, 4, 7]
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(logits_of(model, pack([ids])), expected, atol=1e-5, rtol=1e-5)
    theirs.save_pretrained(tmp_path / "again")
    assert torch.equal(logits_of(load_model(tmp_path / "again"), pack([ids])), logits_of(model, pack([ids])))


# ---- what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type: expected LORA, got 'IA3'"),
        ({"r": 0}, "r: expected a number of at least 1 and below 2147483647, got 0"),
        (
            {"lora_bias": True},
            "lora_bias: expected null or false, since the option is not supported, got",
        ),
        ({"bias": "all"}, 'bias: expected null or "none", since the option is not supported, got'),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: expected an initialisation"),
        ({"use_of_tomorrow": False}, "use_of_tomorrow: expected null, since the key is unknown .*got False"),
        ({"use_of_tomorrow": 0}, "use_of_tomorrow: expected null, .*got 0"),
        ({"lora_bias": 0}, "lora_bias: expected null or false, .*got 0"),
        ({"enable_lora": False}, "enable_lora: expected null, .*got False"),
        ({"enable_lora": [True, False, True]}, "enable_lora: expected null"),
        ({"trainable_token_indices": {"embed_tokens": [3]}}, "trainable_token_indices: expected null"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication: expected null"),
        ({"megatron_config": {"tensor": 2}}, "megatron_config: expected null"),
        ({"alora_invocation_tokens": [4]}, "alora_invocation_tokens: expected null"),
        ({"arrow_config": {"top_k": 3}}, "arrow_config: expected null"),
        ({"use_qalora": True}, "use_qalora: expected null or false"),
        ({"init_lora_weights": "corda", "corda_config": {}}, "init_lora_weights: expected an initialisation"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "an adapter of the embedding is not supported"),
        ({"lora_alpha": float("inf")}, "lora_alpha: expected a number of at least 0, got inf"),
        ({"lora_dropout": 1.0}, "lora_dropout: expected a number of at least 0 and below 1, got 1.0"),
        ({"use_dora": 0}, "use_dora: expected true or false, got 0"),
        ({"use_rslora": ""}, "use_rslora: expected true or false, got ''"),
        ({"rank_pattern": False}, "rank_pattern: expected whole numbers of at least 1, by module, got False"),
        ({"layers_to_transform": False}, "layers_to_transform: expected layer numbers, got False"),
        ({"layers_to_transform": [True]}, r"layers_to_transform: expected layer numbers, got \[True\]"),
        ({"modules_to_save": "lm_head"}, "modules_to_save: expected a list of names, got 'lm_head'"),
        (
            {"layers_to_transform": [0], "layers_pattern": "lay("},
            "layers_pattern: expected a regular expression",
        ),
        (
            {"layers_to_transform": [0], "target_modules": ".*q_proj"},
            "layers_to_transform: expected null, since target_modules is a regular expression",
        ),
        ({"target_modules": "q_proj("}, r"target_modules: expected a regular expression, got 'q_proj\('"),
        ({"target_modules": ["w_proj"]}, "target_modules: .*names no linear layer"),
        ({"modules_to_save": ["heads"]}, "modules_to_save: the model has no module 'heads'"),
        (
            {"base_model_name_or_path": "nowhere"},
            "base_model_name_or_path: expected a model folder, found none at 'nowhere'",
        ),
        (
            {"base_model_name_or_path": None},
            "base_model_name_or_path: expected a model folder, found none at None",
        ),
        ({"base_model_name_or_path": "x" * 5000}, "found none at 'xxx"),
        ({"base_model_name_or_path": "a\0b"}, "found none at 'a"),
        ({"r": 5}, r"q_proj.lora_A.weight: expected shape \(5, 32\), got \(4, 32\)|expected shape \(5, 48\)"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_by_name(adapter_folder, changes, message):
    folder = adapter_folder("qwen3-lora")
    edit(folder, **changes)
    with pytest.raises(InputError, match=f"qwen3-lora.*{message}"):
        load_model(folder)


# the keys that a version of PEFT added to adapter_config.json
ADDED = {
    "0.3": {"init_lora_weights": True},
    "0.4": {"revision": None, "auto_mapping": None, "layers_to_transform": None, "layers_pattern": None},
    "0.6": {"rank_pattern": {}, "alpha_pattern": {}, "loftq_config": {}},
    "0.8": {"megatron_config": None, "megatron_core": "megatron.core", "use_rslora": False},
    "0.10": {"use_dora": False, "layer_replication": None},
    "0.14": {"eva_config": None, "exclude_modules": None, "lora_bias": False},
    "0.15": {"corda_config": None, "trainable_token_indices": None},
    "0.18": {
        "target_parameters": None,
        "use_qalora": False,
        "qalora_group_size": 16,
        "peft_version": "0.18.0",
        "alora_invocation_tokens": None,
        "arrow_config": None,
        "ensure_weight_tying": False,
    },
    "0.21": {
        "use_bdlora": None,
        "lora_ga_config": None,
        "kasa_config": None,
        "velora_config": None,
        "monteclora_config": None,
    },
}


def of_version(version: str) -> dict:
    """adapter_config.json as PEFT of that version writes it, for the same adapter."""
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "x",
        "inference_mode": True,
        "r": 4,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "target_modules": ["q_proj", "v_proj"],
        "fan_in_fan_out": False,
        "bias": "none",
        "modules_to_save": None,
    }
    if version == "0.2":
        return config | {"enable_lora": None, "merge_weights": False}  # keys that no later version has

    assert version in ADDED
    for name, keys in ADDED.items():
        config |= keys
        if name == version:
            break
    return config


@pytest.mark.parametrize(
    "version", ["0.2", "0.3", "0.4", "0.6", "0.8", "0.10", "0.14", "0.15", "0.18", "0.21"]
)
def test_every_version_of_a_config_is_read(version):
    expected = LoraConfig(4, 16, targets=("q_proj", "v_proj"), base="x")
    raw = of_version(version)
    assert peft.read_config(raw, "here") == expected
    begun = {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}, "loftq_config": {"loftq_bits": 4}}
    assert peft.read_config(raw | begun | {"fan_in_fan_out": True}, "here") == expected
    assert peft.read_config(raw | {"layers_pattern": ""}, "here") == expected


KEY = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop(KEY),
            "q_proj.lora_B.weight: missing, although the adapter's config names its module",
        ),
        (
            lambda t: t.update({KEY.replace("q_proj", "k_proj"): t[KEY].clone()}),
            "k_proj.lora_B.weight: unexpected",
        ),
        (
            lambda t: t.update({"other": t[KEY].clone()}),
            "other: expected a name that begins base_model.model.",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_name(adapter_folder, change, message):
    folder = adapter_folder("qwen3-lora")
    edit_tensors(folder, change)
    with pytest.raises(InputError, match=message):
        load_model(folder)


def test_a_broken_file_and_a_pickled_one_are_named(adapter_folder):
    folder = adapter_folder("qwen3-lora")
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(InputError, match=r"adapter_model.safetensors: not a whole safetensors file"):
        load_model(folder)
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(InputError, match="found a pickled file, which is not read"):
        load_model(folder)


def edit(folder: Path, **changes) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
