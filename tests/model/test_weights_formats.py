"""Quantised formats that are not read: each is refused by its name."""

import shutil

import pytest
import torch
from burnish.model import InputError
from burnish.model.checkpoint import load_model, load_scalar_model
from folders import SINGLE, UP, edit, rewrite, tensors_in


@pytest.mark.parametrize(
    "quantization, name",
    [
        ({"quant_method": "gptq", "bits": 4, "modules_in_block_to_quantize": [["k"]]}, "GPTQ"),
        ({"quant_method": "awq", "modules_to_not_convert": None}, "AWQ"),
        ({"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}, "MXFP4"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}, "FP8 in blocks"),
        ({"quant_method": "fbgemm_fp8", "modules_to_not_convert": ["lm_head"]}, "FP8 of FBGEMM"),
        (
            {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"]},
            r"compressed-tensors \(pack-quantized\)",
        ),
        ({"quant_method": "hqq", "skip_modules": ["lm_head"]}, "HQQ"),
        ({"quant_method": "eetq"}, "EETQ"),
        ({"quant_method": "torchao", "quant_type": {"default": {}}}, "torchao"),
        ({"quant_method": "quanto", "weights": "int8"}, "quanto"),
        ({"quant_method": "aqlm"}, "AQLM"),
        ({"quant_method": "vptq"}, "VPTQ"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes in 8 bits"),
        ({"quant_method": "bitsandbytes"}, "bitsandbytes without load_in_4bit"),
        ({"load_in_8bit": True, "llm_int8_skip_modules": ["lm_head"]}, "bitsandbytes in 8 bits"),
        ({"load_in_4bit": True, "quant_method": "gptq"}, "GPTQ"),
        ({"group_size": 64, "bits": 4}, "MLX"),
        ({"quant_method": "a new one"}, "a new one"),
        ({"quant_method": ["gptq"]}, r"\['gptq'\]"),
        ({"quant_method": "x\n" * 5000}, r"'x\\nx"),
        ({"bits": 4}, "a format without a quant_method"),
    ],
)
def test_a_quantised_folder_is_refused_by_its_format(folder, quantization, name):
    edit(folder / "config.json", quantization_config=quantization)
    for load in (load_model, load_scalar_model):
        with pytest.raises(
            InputError, match=f"quantization_config: expected .* got {name}.*, which"
        ) as error:
            load(folder)
        message = str(error.value)
        assert message.startswith(f"{folder / 'config.json'}: ") and len(message) < 600
        assert message.isprintable()


@pytest.mark.parametrize("key", ["compression_config", "quantization"])
def test_older_keys_of_a_quantisation_are_named(folder, key):
    edit(folder / "config.json", **{key: {"bits": 4}})
    with pytest.raises(
        InputError, match=f"{key}: expected .* got (MLX|compressed-tensors), which is not read"
    ):
        load_model(folder)


@pytest.mark.parametrize("value", [[], [1], "gptq", "", 3, 0, True, False, 1.5])
def test_a_quantisation_that_is_no_object_is_refused(folder, value):
    edit(folder / "config.json", quantization_config=value)
    with pytest.raises(InputError, match="quantization_config: expected an object, got"):
        load_model(folder)


@pytest.mark.parametrize("value", [None, {}])
def test_no_quantisation_is_none(folder, value):
    edit(folder / "config.json", quantization_config=value)
    load_model(folder)


INT32, UINT8, INT8 = torch.int32, torch.uint8, torch.int8
FP8 = torch.float8_e4m3fn


@pytest.mark.parametrize(
    "parts, name",
    [
        ({"qweight": INT32, "qzeros": INT32, "g_idx": INT32, "scales": torch.float16}, "GPTQ"),
        ({"qweight": INT32, "qzeros": INT32, "scales": torch.float16}, "AWQ or GPTQ"),
        ({"weight": FP8, "weight_scale_inv": torch.float32}, "FP8 in blocks"),
        ({"weight": FP8, "weight_scale": torch.float32}, "FP8 or int8"),
        ({"weight": FP8}, "FP8"),
        ({"weight": INT8, "SCB": torch.float32, "weight_format": UINT8}, "bitsandbytes in 8 bits"),
        (
            {"weight": UINT8, "weight.absmax": UINT8, "weight.quant_map": torch.float32},
            "bitsandbytes in 4 bits",
        ),
        ({"weight_packed": INT32, "weight_shape": torch.int64}, "compressed-tensors"),
        ({"weight": UINT8, "weight_scale": FP8, "weight_scale_2": torch.float32}, "NVFP4"),
        ({"W_q": UINT8, "scale": torch.float16, "zero": torch.float16}, "HQQ"),
        ({"weight": INT8, "weight_scales": torch.float16}, "EETQ"),
        ({"weight._data": INT8, "weight._scale": torch.float16}, "quanto"),
        ({"_weight_qdata": INT8, "_weight_scale": torch.float16}, "torchao"),
        ({"codes": torch.int16, "codebooks": torch.float16, "scales": torch.float16}, "AQLM"),
        ({"indices": INT32, "centroids.weight": torch.float16}, "VPTQ"),
        ({"weight": torch.uint32, "scales": torch.float16, "biases": torch.float16}, "MLX"),
        ({"q_weight": INT32, "q_scale_max": torch.float16}, "EXL2"),
    ],
)
def test_tensors_tell_the_format_where_config_json_does_not(folder, parts, name):
    tensors = tensors_in(folder)
    del tensors[f"{UP}.weight"]
    rewrite(folder, tensors | {f"{UP}.{part}": torch.zeros(4, 2).to(dtype) for part, dtype in parts.items()})
    with pytest.raises(InputError, match=rf"{SINGLE}: {UP}\.\S+: expected .*, got {name}: take a copy"):
        load_model(folder)


def test_mxfp4_experts_tell_their_format(data, tmp_path):
    shutil.copytree(data / "tiny-hf" / "gpt_oss", tmp_path / "gpt")
    tensors = tensors_in(tmp_path / "gpt")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    del tensors[name]
    tensors |= {f"{name}_{part}": torch.zeros(2, 2, dtype=UINT8) for part in ("blocks", "scales")}
    rewrite(tmp_path / "gpt", tensors)
    with pytest.raises(InputError, match=r"gate_up_proj_blocks: expected .*, got MXFP4"):
        load_model(tmp_path / "gpt")


@pytest.mark.parametrize("dtype", [INT8, UINT8, INT32, torch.bool])
def test_integers_in_place_of_a_weight_are_refused(folder, dtype):
    tensors = tensors_in(folder)
    rewrite(folder, tensors | {f"{UP}.weight": torch.zeros_like(tensors[f"{UP}.weight"]).to(dtype)})
    with pytest.raises(InputError, match=rf"{UP}\.weight: expected floating point, got"):
        load_model(folder)
