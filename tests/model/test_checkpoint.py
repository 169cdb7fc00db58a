"""Hugging Face folders: what is read, what is refused, and by which words."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from burnish.model import InputError, Rope, Transformer, pack
from burnish.model.checkpoint import load_model, save_model
from burnish.model.files.config_json import read_config, write_config
from folders import GOLDEN, SHARDED, edit, tensors_in
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import TINY

ARCHITECTURES = [*GOLDEN, SHARDED]
everywhere = pytest.mark.parametrize("architecture", ARCHITECTURES)


@pytest.fixture
def folder(data, tmp_path):
    """A copy of the golden llama to break."""
    return Path(shutil.copytree(data / "tiny-hf" / "llama", tmp_path / "llama"))


@pytest.fixture
def sharded(data, tmp_path):
    return Path(shutil.copytree(data / "tiny-hf" / "qwen3-sharded", tmp_path / "qwen3-sharded"))


# ---- reading and writing


@everywhere
def test_what_is_saved_is_what_was_loaded(data, tmp_path, architecture):
    source = data / "tiny-hf" / architecture
    model = load_model(source)
    save_model(model, tmp_path / "new" / "saved")
    saved, original = tensors_in(tmp_path / "new" / "saved"), tensors_in(source)
    assert saved.keys() == original.keys()
    assert ("lm_head.weight" in saved) is not model.config.tie_word_embeddings
    assert all(torch.equal(saved[name], original[name]) for name in original)

    with safe_open(tmp_path / "new" / "saved" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert load_model(tmp_path / "new" / "saved").config == model.config

    for name in ("config.json", "generation_config.json"):
        was, now = (json.loads((at / name).read_text()) for at in (source, tmp_path / "new" / "saved"))
        left_out = {"transformers_version", "pretraining_tp", "max_window_layers", "no_rope_layer_interval"}
        left_out |= {"output_router_logits", "num_nextn_predict_layers", "_sliding_window_pattern"}
        left_out |= {key for key, value in was.items() if key not in now and not value}
        left_out |= {key for key in ("head_dim", "sliding_window") if not was.get(key)}
        was = {key: value for key, value in was.items() if key not in left_out}
        assert (
            was.items() <= now.items()
            if name == "config.json"
            else json.loads((source / name).read_text()) == now
        )


def test_shards_give_the_model_of_the_single_file(data):
    whole, sharded = (load_model(data / "tiny-hf" / name) for name in ("qwen3", "qwen3-sharded"))
    golden = load_file(data / "tiny-hf" / "qwen3" / "expected.safetensors")
    packed = pack(golden["input_ids"][:1].tolist())
    assert torch.equal(whole.logits(whole(packed)), sharded.logits(sharded(packed)))


def test_weights_come_in_the_dtype_asked_for_and_are_saved_in_theirs(data, tmp_path):
    exact = load_model(data / "tiny-hf" / "llama")
    half = load_model(data / "tiny-hf" / "llama", dtype=torch.bfloat16)
    assert torch.equal(half.head, exact.head.bfloat16())
    assert all(weight.requires_grad for weight in half.parameters())
    save_model(half, tmp_path / "half")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    assert {tensor.dtype for tensor in tensors_in(tmp_path / "half").values()} == {torch.bfloat16}


def test_the_loaded_model_does_not_hang_on_its_file(folder):
    model = load_model(folder)
    before = model.head.clone()
    weights = folder / "model.safetensors"
    with weights.open("r+b") as file:
        file.seek(4096)
        file.write(bytes(weights.stat().st_size - 4096))
    assert torch.equal(model.head, before)


def test_a_tied_head_may_be_in_the_file_if_it_is_the_embedding(data, tmp_path):
    folder = Path(shutil.copytree(data / "tiny-hf" / "qwen2", tmp_path / "qwen2"))
    tensors = tensors_in(folder)
    save_file(
        tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()},
        folder / "model.safetensors",
    )
    load_model(folder)
    save_file(tensors | {"lm_head.weight": torch.ones(96, 32)}, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"lm_head\.weight: differs from model\.embed_tokens\.weight"):
        load_model(folder)


def test_constants_of_old_checkpoints_are_passed_over(folder):
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(tensors_in(folder) | old, folder / "model.safetensors")
    load_model(folder)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_transformers_loads_what_we_save(data, tmp_path, architecture):
    transformers = pytest.importorskip("transformers")
    model = load_model(data / "tiny-hf" / architecture)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape) / 50)
    save_model(model, tmp_path / "saved")
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", output_loading_info=True
    )
    assert not any(report.values()), report

    original = transformers.AutoConfig.from_pretrained(data / "tiny-hf" / architecture).to_diff_dict()
    saved = transformers.AutoConfig.from_pretrained(tmp_path / "saved").to_diff_dict()
    assert {key for key in original | saved if original.get(key) != saved.get(key)} <= {
        *("pretraining_tp", "head_dim", "num_nextn_predict_layers", "num_mtp_layers", "layer_types"),
    }

    state = theirs.state_dict()
    for name, tensor in tensors_in(tmp_path / "saved").items():
        if ".experts." in name or ".block_sparse_moe." in name:
            continue  # transformers holds them fused: the logits below see them
        assert torch.equal(state[name], tensor), name

    ids = [5, 17, 60, 8, 33, 90, 41, 2, 77]
    with torch.no_grad():
        ours = model.logits(model(pack([ids])))
        torch.testing.assert_close(ours, theirs(torch.tensor([ids])).logits[0], atol=1e-5, rtol=0)


# ---- config.json


@everywhere
def test_both_dialects_read_alike(data, architecture):
    new = json.loads((data / "tiny-hf" / architecture / "config.json").read_text())
    rope = dict(new["rope_parameters"])
    old = {key: value for key, value in new.items() if key not in ("rope_parameters", "dtype")}
    old["torch_dtype"] = "float32"
    if "sliding_attention" in rope:
        old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = dict(rope["full_attention"])
    old["rope_theta"] = rope.pop("rope_theta")
    old["rope_scaling"] = None if rope["rope_type"] == "default" else {"type": rope.pop("rope_type"), **rope}
    assert read_config(old) == read_config(new)


def minimal(model_type: str, **keys) -> dict:
    sizes = {"vocab_size": 8, "hidden_size": 16, "intermediate_size": 4, "num_hidden_layers": 4}
    return {"model_type": model_type, **sizes, "num_attention_heads": 4, "num_key_value_heads": 2, **keys}


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "smollm3"])
def test_absent_keys_take_the_values_of_transformers(model_type):
    """Set beside transformers' own classes where they are installed; the values that differ are spelled out here."""
    config = read_config(minimal(model_type))
    assert config.head_dim == (128 if model_type == "qwen3" else 4)
    assert config.windows == ((4096,) * 4 if model_type == "mistral" else (None, None, None, None))
    assert config.rope_layers == ((True, True, True, False) if model_type == "smollm3" else (True,) * 4)
    assert config.rope == Rope(2e6 if model_type == "smollm3" else 1e4)
    assert config.tie_word_embeddings is (model_type == "smollm3")
    assert (config.qkv_bias, config.output_bias) == (model_type == "qwen2", False)
    assert config.qk_norm is (model_type == "qwen3")


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "smollm3"])
def test_absent_keys_are_those_of_transformers_classes(model_type):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoConfig.for_model(**minimal(model_type)).to_dict()
    left_out = {"bos_token_id", "eos_token_id", "pad_token_id", "hidden_act"}
    ours = write_config(read_config(minimal(model_type)))
    for key in ours.keys() & theirs.keys() - left_out:
        if key != "architectures":
            assert ours[key] == theirs[key], key


def test_sliding_layers_are_read_from_every_spelling():
    windows = lambda **keys: read_config(minimal(**keys)).windows
    assert windows(model_type="mistral", sliding_window=7) == (7,) * 4
    assert windows(model_type="mistral", sliding_window=None) == (None, None, None, None)
    qwen = {"model_type": "qwen3", "sliding_window": 7, "use_sliding_window": True}
    assert windows(**qwen, max_window_layers=3) == (None, None, None, 7)
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    assert windows(**qwen, layer_types=kinds) == (7, None, 7, None)
    assert windows(**{**qwen, "use_sliding_window": False}, max_window_layers=0) == (None, None, None, None)
    smol = {**qwen, "model_type": "smollm3", "no_rope_layer_interval": 2}
    assert windows(**smol) == (None, 7, None, 7)


def test_null_head_dim_and_a_list_of_end_tokens():
    config = read_config(minimal("llama", head_dim=None, eos_token_id=[2, 3]))
    assert (config.head_dim, config.eos_token_id) == (4, (2, 3))
    assert write_config(config)["eos_token_id"] == [2, 3]


def test_a_config_that_its_architecture_cannot_spell_is_not_written():
    with pytest.raises(ValueError, match="qk_norm: llama"):
        write_config(replace(TINY, qk_norm=True))
    with pytest.raises(ValueError, match="windows: mistral"):
        write_config(replace(TINY, model_type="mistral", windows=(4, None)))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "gpt_neox"}, "model_type: expected one of llama.* got 'gpt_neox'"),
        ({"model_type": ...}, "model_type: expected one of"),
        ({"hidden_size": ...}, "hidden_size: missing"),
        ({"hidden_size": "32"}, "hidden_size: expected a positive integer, got '32'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: expected a positive integer, got 0"),
        ({"vocab_size": True}, "vocab_size: expected a positive integer, got True"),
        ({"rms_norm_eps": None}, "rms_norm_eps: expected a number"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings: expected true or false, got 'yes'"),
        (
            {"num_key_value_heads": 3},
            "num_attention_heads: expected a multiple of num_key_value_heads=3, got 4",
        ),
        ({"head_dim": 7}, "head_dim: expected an even number"),
        ({"hidden_act": "gelu"}, "hidden_act: expected 'silu', nothing else is supported, got 'gelu'"),
        ({"attention_dropout": 0.1}, "attention_dropout: expected 0.0"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: expected 1.0"),
        ({"rope_interleaved": True}, "rope_interleaved: expected False"),
        (
            {"quantization_config": {"quant_method": "gptq"}},
            "quantization_config: expected .* bitsandbytes in 4 bits, got GPTQ, which is not read",
        ),
        ({"sliding_window": 8}, "sliding_window: not supported for llama, got 8"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping: not supported"),
        ({"auto_map": {"AutoModel": "x.py"}}, "auto_map: not supported"),
        ({"eos_token_id": [2, "x"]}, "eos_token_id: expected a token id"),
        ({"rope_parameters": 3}, "rope_parameters: expected an object, got 3"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
            "rope_parameters.rope_type: expected one of",
        ),
        ({"rope_scaling": {"type": "longrope"}}, "rope_scaling.rope_type: expected one of.*got 'longrope'"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor: missing, rope_type linear needs it"),
        (
            {"rope_scaling": {"type": "linear", "factor": "2"}},
            "rope_scaling.factor: expected a number above 0, got '2'",
        ),
        (
            {"rope_parameters": {"mrope_section": [1]}},
            r"rope_parameters.mrope_section: not supported for .* default",
        ),
        ({"rope_parameters": {"full_attention": {}}}, "rope_parameters.full_attention: not supported"),
    ],
)
def test_config_is_refused_by_key(folder, changes, message):
    edit(folder / "config.json", **changes)
    with pytest.raises(InputError, match=message) as error:
        load_model(folder)
    assert str(error.value).startswith(str(folder / "config.json"))


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"layer_types": ["full_attention"]}, "layer_types: expected .* for each of 4 layers"),
        (
            {"layer_types": ["chunked_attention"] * 4},
            "layer_types: expected full_attention or sliding_attention",
        ),
        ({"layer_types": ["sliding_attention"] * 4}, "sliding_window: expected a window"),
        ({"no_rope_layers": [1, 0]}, "no_rope_layers: expected 0 or 1 for each of 4 layers"),
    ],
)
def test_layers_are_refused_by_key(keys, message):
    with pytest.raises(InputError, match=message):
        read_config(minimal("smollm3", **keys))


def test_keys_that_change_nothing_are_accepted(folder):
    edit(
        folder / "config.json",
        _name_or_path="x",
        use_mrope=False,
        unknown=None,
        is_llama_config=True,
        top_k=50,
    )
    load_model(folder)


# ---- broken folders


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="absent: expected a model folder, found nothing"):
        load_model(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file: expected a model folder, found a file"):
        load_model(tmp_path / "file")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("content", [b'{"model_type": ', b"\xff\xfe", b"[]"])
def test_broken_json_is_named(folder, name, content):
    (folder / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"llama/{name}: (not JSON|not UTF-8 text|expected a JSON object)"):
        load_model(folder)


def test_missing_files_are_named(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"expected model\.safetensors or .*found neither \(pickled"):
        load_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"config\.json: no such file"):
        load_model(folder)


@pytest.mark.parametrize("size", [0, 4, 1000, 100_000])
def test_a_truncated_file_is_named(folder, size):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    with pytest.raises(InputError, match=r"model\.safetensors: not a whole safetensors file"):
        load_model(folder)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("model.norm.weight"), r"llama: model\.norm\.weight: missing"),
        (
            lambda t: [t.pop(n) for n in list(t) if "layers.1" in n],
            r"model\.layers\.1\.\S+ and 8 more: missing",
        ),
        (lambda t: t.update(extra=torch.ones(1)), r"model\.safetensors: extra: unexpected"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(33)}),
            r"model\.norm\.weight: expected shape \(32,\), got \(33,\)",
        ),
        (
            lambda t: t.update({"lm_head.weight": torch.ones(96, 32).int()}),
            "lm_head.weight: expected floating point",
        ),
    ],
)
def test_wrong_tensors_are_named(folder, change, message):
    tensors = tensors_in(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=message):
        load_model(folder)


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    "weight_map, message",
    [
        (
            {NORM: "../qwen3-sharded/model-00003-of-00003.safetensors"},
            "expected a .safetensors file of the same folder",
        ),
        ({NORM: "/etc/passwd"}, "expected a .safetensors file of the same folder, got '/etc/passwd'"),
        ({NORM: "sub/model.safetensors"}, "expected a .safetensors file of the same folder"),
        ({NORM: "model.bin"}, "expected a .safetensors file of the same folder"),
        ({NORM: 3}, "expected a .safetensors file of the same folder, got 3"),
        ({NORM: "model-00009.safetensors"}, r"model-00009\.safetensors: no such file"),
        (
            {NORM: "model-00001-of-00003.safetensors"},
            r"model-00001-of-00003\.safetensors: model\.norm\.weight: missing",
        ),
    ],
)
def test_an_index_is_checked(sharded, weight_map, message):
    index = sharded / "model.safetensors.index.json"
    edit(index, weight_map=json.loads(index.read_text())["weight_map"] | weight_map)
    with pytest.raises(InputError, match=message) as error:
        load_model(sharded)
    assert str(sharded) in str(error.value)


def test_an_index_without_a_map_is_refused(sharded):
    edit(sharded / "model.safetensors.index.json", weight_map=...)
    with pytest.raises(InputError, match=r"index\.json: weight_map: expected an object"):
        load_model(sharded)


def test_generation_config_is_carried_along(folder, tmp_path):
    edit(folder / "generation_config.json", eos_token_id=[2, 7], temperature=0.6)
    save_model(load_model(folder), tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert (saved["eos_token_id"], saved["temperature"]) == ([2, 7], 0.6)
    save_model(Transformer(replace(TINY, eos_token_id=5)), tmp_path / "new")
    assert json.loads((tmp_path / "new" / "generation_config.json").read_text()) == {"eos_token_id": 5}
