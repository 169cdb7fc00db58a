"""Tensors are written in the dtype in which each was read, though training holds fp32."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from burnish.model import InputError, ModelConfig, Transformer
from burnish.model.adapter import add_lora, merge_lora
from burnish.model.checkpoint import load_model, load_scalar_model, save_model, stream_weights
from burnish.model.files.finite import TooLarge, cast
from safetensors.torch import load_file, save_file

TINY = ModelConfig(31, 16, 24, 2, 2, eos_token_id=0)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
MODELS = ["llama", "qwen2", "qwen3_moe", "gpt_oss", "deepseek_v3"]
# ends of names that stay fp32
WIDE = ("norm.weight", "correction_bias", "gate.weight", "router.weight", "sinks")


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def dtypes_in(folder: Path, file: str = "model.safetensors") -> set[torch.dtype]:
    return {tensor.dtype for tensor in load_file(folder / file).values()}


def states_in(folder: Path) -> set[str]:
    """The dtypes to which the weights in 4 bits are multiplied out."""
    states = [tensor for name, tensor in tensors_of(folder).items() if ".quant_state." in name]
    return {json.loads(bytes(state.tolist()))["dtype"] for state in states}


def dtype_key(folder: Path) -> str:
    return json.loads((folder / "config.json").read_text())["dtype"]


def folder_in(dtype: torch.dtype, source: Path, folder: Path) -> Path:
    """A copy in `dtype`, but for a few tensors in fp32, as publishers have it."""
    shutil.copytree(source, folder)
    tensors = {
        name: tensor if name.endswith(WIDE) else tensor.to(dtype)
        for name, tensor in tensors_of(source).items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_a_folder_comes_back_as_it_was(data, tmp_path, name, dtype):
    source = folder_in(dtype, data / "tiny-hf" / name, tmp_path / "source")
    model = load_model(source)
    assert {parameter.dtype for parameter in model.parameters()} == {FP32} and not model.training
    save_model(model, tmp_path / "saved")
    was, saved = tensors_of(source), tensors_of(tmp_path / "saved")
    assert {FP32, dtype} == {tensor.dtype for tensor in was.values()}
    for key, tensor in saved.items():
        assert tensor.dtype == was[key].dtype and torch.equal(tensor, was[key]), key
    assert dtype_key(tmp_path / "saved") == str(dtype).removeprefix("torch.")
    for key, tensor in stream_weights(model):
        assert tensor.dtype == was[key].dtype and torch.equal(tensor, was[key]), key


def test_a_dtype_that_is_asked_for_is_that_of_all(data, tmp_path):
    source = folder_in(BF16, data / "tiny-hf" / "llama", tmp_path / "source")
    for dtype in (FP32, FP16):
        save_model(load_model(source), tmp_path / "saved", dtype=dtype)
        assert dtypes_in(tmp_path / "saved") == {dtype}
        assert dtype_key(tmp_path / "saved") == str(dtype).removeprefix("torch.")


def test_what_was_made_or_cast_by_hand_stays_as_it_is(tmp_path):
    save_model(Transformer(TINY), tmp_path / "made")
    assert dtypes_in(tmp_path / "made") == {FP32}
    save_model(load_model(tmp_path / "made").bfloat16(), tmp_path / "cast")
    assert dtypes_in(tmp_path / "cast") == {BF16} and dtype_key(tmp_path / "cast") == "bfloat16"


@pytest.mark.parametrize("value", [7e4, -1e30])
def test_nothing_becomes_infinite(tmp_path, value):
    save_model(Transformer(TINY), tmp_path / "half", dtype=FP16)
    model = load_model(tmp_path / "half")
    with torch.no_grad():
        model.layers[1].mlp.up_proj.weight[2, 3] = value
    with pytest.raises(InputError, match=r"layers.1.mlp.up_proj.weight: expected numbers up to 65504, .*got"):
        save_model(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    save_model(model, tmp_path / "saved", dtype=BF16)
    assert all(tensor.isfinite().all() for tensor in tensors_of(tmp_path / "saved").values())


@pytest.mark.parametrize(
    "values, overflows",
    [([7e4, float("nan")], True), ([float("inf"), -7e4], True), ([float("inf"), 1.0], False), ([], False)],
)
def test_numbers_that_are_not_finite_hide_none_that_becomes_infinite(values, overflows):
    tensor = torch.tensor(values)
    if overflows:
        with pytest.raises(TooLarge, match="x: expected numbers up to 65504"):
            cast("x", tensor, FP16)
    else:
        assert torch.equal(cast("x", tensor, FP16), tensor.half())


def test_a_score_follows_the_body(tmp_path):
    save_model(Transformer(TINY), tmp_path / "language", dtype=BF16)
    save_model(load_scalar_model(tmp_path / "language"), tmp_path / "reward")
    assert dtypes_in(tmp_path / "reward") == {BF16}
    save_model(load_scalar_model(tmp_path / "reward"), tmp_path / "again")
    assert dtypes_in(tmp_path / "again") == {BF16}


# ---- adapters


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_an_adapter_is_fp32_and_goes_on_as_it_was(tmp_path, tied):
    """A module trained whole has the base's dtype, as PEFT writes it."""
    save_model(Transformer(replace(TINY, tie_word_embeddings=tied)), tmp_path / "base", dtype=BF16)
    model = load_model(tmp_path / "base")
    add_lora(model, 2, base=str(tmp_path / "base"), modules_to_save=("lm_head",))
    save_model(model, tmp_path / "new")
    tensors = load_file(tmp_path / "new" / "adapter_model.safetensors")
    assert {tensor.dtype for name, tensor in tensors.items() if ".lora_" in name} == {FP32}
    assert tensors["base_model.model.lm_head.weight"].dtype == BF16

    for dtype in (BF16, FP16):
        save_model(load_model(tmp_path / "new"), tmp_path / "asked", dtype=dtype)
        assert dtypes_in(tmp_path / "asked", "adapter_model.safetensors") == {dtype}
        save_model(load_model(tmp_path / "asked"), tmp_path / "on")
        assert dtypes_in(tmp_path / "on", "adapter_model.safetensors") == {dtype}

    merge_lora(model)
    save_model(model, tmp_path / "merged")
    assert dtypes_in(tmp_path / "merged") == {BF16}
    assert "lm_head.weight" in tensors_of(tmp_path / "merged")  # trained, a tied one is a matrix of its own


# ---- in 4 bits


def test_a_base_in_4_bits_is_merged_into_what_its_state_names(data, tmp_path):
    """Dense parts in bf16, the quantised ones of a model that was fp16 before."""
    shutil.copytree(data / "tiny-bnb" / "qwen3-nf4", tmp_path / "base")
    tensors = tensors_of(tmp_path / "base")
    for name, tensor in tensors.items():
        if ".quant_state." in name:
            state = json.loads(bytes(tensor.tolist())) | {"dtype": "float16"}
            tensors[name] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        elif ".weight." not in name and tensor.dtype == FP32:
            tensors[name] = tensor.to(BF16)
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})

    model = load_model(tmp_path / "base")
    save_model(model, tmp_path / "saved")
    for name, tensor in tensors_of(tmp_path / "saved").items():
        assert tensor.dtype == tensors[name].dtype, name
    assert states_in(tmp_path / "saved") == {"float16"}

    merge_lora(model)
    save_model(model, tmp_path / "merged")
    for name, tensor in tensors_of(tmp_path / "merged").items():
        assert tensor.dtype == (FP16 if f"{name}.absmax" in tensors else BF16), name


def test_a_base_put_into_4_bits_remembers_what_it_was(tmp_path):
    save_model(
        Transformer(replace(TINY, hidden_size=64, intermediate_size=64)), tmp_path / "base", dtype=BF16
    )
    model = load_model(tmp_path / "base", base_4bit=True)
    save_model(model, tmp_path / "saved")
    assert states_in(tmp_path / "saved") == {"bfloat16"}
    merge_lora(model)
    save_model(model, tmp_path / "merged")
    assert dtypes_in(tmp_path / "merged") == {BF16}
