"""Weights as published folders have them: experts in both forms, layers that are passed over, which file is read."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from burnish.model import InputError, Transformer, weights
from burnish.model.adapter import hf_name, linears
from burnish.model.checkpoint import load_model, load_scalar_model, save_model
from burnish.model.config import Experts
from burnish.model.files.experts import to_disk
from burnish.model.files.tensors import Stored
from burnish.model.scalar import ScalarModel
from folders import INDEX, SINGLE, SMALL, UP, edit, quantized, rewrite, tensors_in
from safetensors.torch import load_file, save_file
from tiny import logits_of

SPARSE = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3"]
MIXTRAL = replace(
    SMALL,
    model_type="mixtral",
    experts=Experts(4, 2, 128, (True,) * 2, renormalize=True, balance_coefficient=0.001),
)


# ---- experts


def fuse(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Experts one by one to what save_original_format=False writes: stacked, the gate's rows before the up's."""
    found: dict[str, torch.Tensor] = {}
    experts: dict[str, dict[int, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        name = name.replace(".block_sparse_moe.", ".mlp.")
        one = re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)\.weight", name)
        if one is None:
            found[name] = tensor
            continue
        part = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}.get(one[3], one[3])
        experts.setdefault(f"{one[1]}.{part}", {})[int(one[2])] = tensor

    stacked = {
        name: torch.stack([several[e] for e in range(len(several))]) for name, several in experts.items()
    }

    for name, tensor in stacked.items():
        at, _, part = name.rpartition(".")
        if part == "down_proj":
            found[name] = tensor
        elif part == "gate_proj":
            found[f"{at}.gate_up_proj"] = torch.cat((tensor, stacked[f"{at}.up_proj"]), 1)
    return found


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("name", SPARSE)
def test_fused_experts_are_the_same_model(data, tmp_path, name, shards):
    source = data / "tiny-hf" / name
    shutil.copytree(source, tmp_path / name)
    rewrite(tmp_path / name, fuse(tensors_in(source)), shards)
    assert any(tensor.endswith(".experts.gate_up_proj") for tensor in tensors_in(tmp_path / name))
    for options in ({}, {"base_4bit": True}):
        ours, theirs = load_model(tmp_path / name, **options), load_model(source, **options)
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        assert all(torch.equal(t, ours.state_dict()[name]) for name, t in theirs.state_dict().items())
        assert torch.equal(logits_of(ours), logits_of(theirs))


@pytest.mark.parametrize("name", SPARSE)
def test_a_mixture_of_both_forms_is_refused(data, tmp_path, name):
    source = data / "tiny-hf" / name
    split = tensors_in(source)
    last = max(int(tensor.split(".")[2]) for tensor in split if ".experts." in tensor)
    fused = {n: t for n, t in fuse(split).items() if f"layers.{last}." in n and ".experts." in n}
    one_by_one = {n: t for n, t in split.items() if not (f"layers.{last}." in n and ".experts." in n)}
    shutil.copytree(source, tmp_path / name)
    for tensors in (one_by_one | fused, split | fused):
        rewrite(tmp_path / name, tensors)
        with pytest.raises(
            InputError,
            match=r"experts\S+: expected fused experts, as elsewhere in this folder, got a single one",
        ):
            load_model(tmp_path / name)


def test_a_fused_tensor_of_another_shape_is_refused(data, tmp_path):
    shutil.copytree(data / "tiny-hf" / "qwen3_moe", tmp_path / "moe")
    tensors = fuse(tensors_in(tmp_path / "moe"))
    name = next(name for name in tensors if name.endswith("experts.gate_up_proj"))
    rewrite(tmp_path / "moe", tensors | {name: tensors[name].transpose(1, 2)})
    with pytest.raises(InputError, match=rf"{name}: expected shape"):
        load_model(tmp_path / "moe")


@pytest.mark.parametrize("blocksize", [64, 4096])
def test_experts_in_4_bits_each_are_one_weight(tmp_path, blocksize):
    """Transformers 4 wrote such, the router in 4 bits, too. 4096: a block for half an expert."""
    folder = tmp_path / "mixtral"
    save_model(Transformer(MIXTRAL, seed=3), folder)
    meant = quantized(folder, lambda name: "_proj" in name or "block_sparse" in name, blocksize=blocksize)
    model = load_model(folder)
    experts = model.layers[0].mlp.experts
    assert experts.gate_up_proj.four_bit is not None and experts.down_proj.weight is None
    state = {name: layer.dense() for name, layer in linears(model).items()}
    found = to_disk(MIXTRAL, {f"{name}.weight": tensor for name, tensor in state.items()})
    assert all(torch.equal(tensor, meant[name]) for name, tensor in found.items())
    assert torch.equal(model.layers[0].mlp.gate.weight, meant["model.layers.0.block_sparse_moe.gate.weight"])
    assert logits_of(model).isfinite().all()


def test_experts_whose_blocks_cross_are_multiplied_out(tmp_path):
    experts = replace(MIXTRAL.experts, intermediate_size=129)
    config = replace(MIXTRAL, hidden_size=32, intermediate_size=129, experts=experts)
    save_model(Transformer(config, seed=3), tmp_path / "mixtral")
    meant = quantized(tmp_path / "mixtral", lambda name: ".experts." in name)
    model = load_model(tmp_path / "mixtral")
    assert model.layers[0].mlp.experts.down_proj.four_bit is None
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items() if ".experts." in name}
    assert all(torch.equal(tensor, meant[name]) for name, tensor in to_disk(config, state).items())


def test_the_correction_of_experts_is_kept_in_fp32(data):
    """It decides which expert is chosen; transformers keeps it so whatever the dtype."""
    source = data / "tiny-hf" / "deepseek_v3"
    model = load_model(source, torch.bfloat16)
    assert all(buffer.dtype == torch.float32 for _, buffer in model.named_buffers())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


# ---- names


@pytest.mark.parametrize("name", ["qwen2", "llama", "qwen3_moe", "deepseek_v3"])
def test_a_model_saved_without_its_head_has_shorter_names(data, tmp_path, name):
    """AutoModel writes it so, and embedding models are published so; the head, where there is one, stands beside it."""
    source = Path(shutil.copytree(data / "tiny-hf" / name, tmp_path / name))
    expected, tensors = logits_of(load_model(source)), tensors_in(source)
    rewrite(source, {key.removeprefix("model."): tensor for key, tensor in tensors.items()}, shards=2)
    assert torch.equal(logits_of(load_model(source)), expected)
    save_model(load_model(source), tmp_path / "saved")
    assert tensors_in(tmp_path / "saved").keys() == tensors.keys()
    if "lm_head.weight" in tensors:
        rewrite(
            source, {key.removeprefix("model."): t for key, t in tensors.items() if key != "lm_head.weight"}
        )
        with pytest.raises(InputError, match=r"lm_head\.weight: missing from the safetensors files"):
            load_model(source)


# ---- what is passed over


FURTHER = (
    "embed_tokens.weight",
    "enorm.weight",
    "eh_proj.weight",
    "shared_head.head.weight",
    "mlp.gate.weight",
)


def further_layers(*layers: int) -> dict[str, torch.Tensor]:
    return {f"model.layers.{layer}.{name}": torch.ones(3, 5) for layer in layers for name in FURTHER}


@pytest.fixture
def deepseek(data, tmp_path) -> Path:
    """A folder of 3 layers."""
    return Path(shutil.copytree(data / "tiny-hf" / "deepseek_v3", tmp_path / "deepseek"))


def test_layers_that_predict_further_tokens_are_never_read(deepseek, monkeypatch):
    expected, tensors, read = logits_of(load_model(deepseek)), tensors_in(deepseek), []
    edit(deepseek / "config.json", num_nextn_predict_layers=2)
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)}
    scale = {"model.layers.4.mlp.up_proj.weight_scale_inv": torch.ones(3)}  # of another format, even
    rewrite(deepseek, tensors | further_layers(3, 4) | old | scale)
    original = Stored.read
    monkeypatch.setattr(Stored, "read", lambda self: (read.append(self.name), original(self))[1])
    assert torch.equal(logits_of(load_model(deepseek)), expected)
    assert sorted(read) == sorted(tensors)
    # transformers' own name for num_nextn_predict_layers
    source = weights.Source(deepseek, {"num_mtp_layers": 2}, torch.float32, "cpu")
    config = load_model(deepseek).config
    assert weights._to_be_read(source, config, ()).keys() == tensors.keys()


@pytest.mark.parametrize(
    ("layers", "declared_count"), [([3], 0), ([3], None), ([4], 1), ([4], ...), ([3, 4, 5], 2), ([13], 2)]
)
def test_any_other_layer_is_refused(deepseek, layers, declared_count):
    raw = json.loads((deepseek / "config.json").read_text()) | {"num_nextn_predict_layers": declared_count}
    (deepseek / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))
    rewrite(deepseek, tensors_in(deepseek) | further_layers(*layers))
    with pytest.raises(InputError, match=rf"model\.layers\.{layers[-1]}\.\S+: unexpected"):
        load_model(deepseek)


def test_one_further_layer_is_passed_over_where_config_json_does_not_say_it(deepseek, folder):
    raw = json.loads((deepseek / "config.json").read_text())
    raw.pop("num_nextn_predict_layers")
    (deepseek / "config.json").write_text(json.dumps(raw))
    rewrite(deepseek, tensors_in(deepseek) | further_layers(3))
    load_model(deepseek)
    rewrite(folder, tensors_in(folder) | further_layers(2))  # no other architecture has any
    with pytest.raises(InputError, match=r"model\.layers\.2\.\S+: unexpected"):
        load_model(folder)


@pytest.mark.parametrize("value", [-1, True, "1", 1.0, [1], {"a": 1}])
def test_a_number_of_further_layers_is_an_integer(deepseek, value):
    edit(deepseek / "config.json", num_nextn_predict_layers=value)
    with pytest.raises(InputError, match=r"config\.json: num_nextn_predict_layers: expected an integer >= 0"):
        load_model(deepseek)


def test_sizes_are_compared_before_anything_is_read(folder, monkeypatch):
    monkeypatch.setattr(Stored, "read", lambda self: pytest.fail(f"{self.name} was read"))
    tensors = tensors_in(folder)
    for changed in (
        {UP + ".weight": torch.ones(3)},
        {"more": torch.ones(1)},
        {"lm_head.weight": torch.ones(1).int()},
    ):
        rewrite(folder, tensors | changed)
        with pytest.raises(InputError):
            load_model(folder)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux' list of mapped files")
def test_a_file_that_is_read_is_mapped_no_longer(folder, monkeypatch):
    """Its tensors would otherwise stay in memory beside the model, until the last file is through."""
    tensors, shards = {name: tensor.clone() for name, tensor in tensors_in(folder).items()}, 5
    names = [hf_name(name) for name in Transformer(SMALL, device="meta").state_dict()]
    for file in folder.glob("model*.safetensors"):
        file.unlink()
    place = {name: f"model-{i * shards // len(names)}.safetensors" for i, name in enumerate(names)}
    for file in dict.fromkeys(place.values()):
        save_file({name: tensors[name] for name in names if place[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"weight_map": place}))

    mapped, dense = [], weights._dense

    def counted(*args):
        lines = Path("/proc/self/maps").read_text().splitlines()
        mapped.append(len({line.split()[-1] for line in lines if str(folder) in line}))
        return dense(*args)

    monkeypatch.setattr(weights, "_dense", counted)
    load_model(folder)
    assert mapped == sorted(mapped, reverse=True) and mapped[0] == shards
    assert mapped[-1] <= 2


# ---- which files


def test_files_beside_the_weights_are_not_read(folder):
    expected = logits_of(load_model(folder))
    rewrite(folder, tensors_in(folder), shards=3)
    for name in (
        "consolidated.safetensors",
        "pytorch_model.bin",
        "original/consolidated.00.pth",
        "rust_model.ot",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not to be opened")
    assert torch.equal(logits_of(load_model(folder)), expected)


def test_one_whole_file_goes_before_an_index(folder):
    expected = logits_of(load_model(folder))
    (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": "gone.safetensors"}}))
    assert torch.equal(logits_of(load_model(folder)), expected)


def test_a_file_that_the_index_names_is_read_whole(folder):
    expected, tensors = logits_of(load_model(folder)), tensors_in(folder)
    rewrite(folder, tensors, shards=3)
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    edit(folder / INDEX, weight_map={n: file for n, file in weight_map.items() if n != "model.norm.weight"})
    assert torch.equal(logits_of(load_model(folder)), expected)

    stale = folder / next(file for file in weight_map.values() if file != weight_map["model.norm.weight"])
    save_file(load_file(stale) | {"model.norm.weight": torch.zeros(64)}, stale)
    with pytest.raises(InputError, match=r"model\.norm\.weight: is also in model-\d+\.safetensors"):
        load_model(folder)
    edit(folder / INDEX, weight_map=weight_map)  # which says whose is the one
    assert torch.equal(logits_of(load_model(folder)), expected)


@pytest.mark.parametrize("name", ["llama-tied-llama3rope", "gemma3_text"])
def test_a_tied_matrix_may_stand_under_the_heads_name_alone(data, tmp_path, name):
    folder = Path(shutil.copytree(data / "tiny-hf" / name, tmp_path / name))
    expected, scalar = logits_of(load_model(folder)), load_scalar_model(folder).state_dict()
    tensors = tensors_in(folder)
    rewrite(folder, tensors | {"lm_head.weight": tensors.pop("model.embed_tokens.weight")})
    assert torch.equal(logits_of(load_model(folder)), expected)
    again = load_scalar_model(folder).state_dict()
    assert again.keys() == scalar.keys() and all(torch.equal(again[key], scalar[key]) for key in scalar)


@pytest.mark.parametrize("file", ["a" * 5000 + ".safetensors", "a\0.safetensors", "a\n.safetensors"])
def test_a_file_name_that_none_can_have_is_refused(folder, file):
    (folder / SINGLE).rename(folder / "other.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(InputError, match=r"a: expected a \.safetensors file of the same folder") as caught:
        load_model(folder)
    assert len(str(caught.value)) < 600 and "\n" not in str(caught.value)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_json_that_is_nested_without_end_is_no_json(folder, file):
    (folder / file).write_text('{"a": ' + "[" * 100_000)
    with pytest.raises(InputError, match=f"{file}: not JSON: objects and lists deeper"):
        load_model(folder)


@pytest.mark.parametrize("value", ["x", True, float("nan"), 1e300, 10**400, [1.0]])
def test_the_bias_of_a_score_is_a_number(tmp_path, value):
    save_model(ScalarModel(SMALL), tmp_path / "reward")
    edit(tmp_path / "reward" / "config.json", score_bias=value)
    with pytest.raises(InputError, match=r"config\.json: score_bias: expected a number, got"):
        load_scalar_model(tmp_path / "reward")


def test_files_of_another_layout_alone_are_named(folder):
    (folder / SINGLE).rename(folder / "consolidated.safetensors")
    with pytest.raises(
        InputError,
        match=r"found neither \(consolidated\.safetensors is not read: its tensors have other names",
    ):
        load_model(folder)
