"""Detection of the quantised format of a folder's weights.

Only bitsandbytes' 4-bit format is read (bnb.py). For any other format, an error names it. config.json has the format
under quantization_config. If it does not, the names and dtypes of the tensors show it.

Source: transformers 5.22 (utils/quantization_config.py, QuantizationMethod), and the formats' own packages
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from ..errors import InputError, shown
from .tensors import Stored

CONFIG = "quantization_config"
OTHERS = ("compression_config", "quantization")  # the keys of older compressed-tensors, and of MLX
WAY_OUT = "take a copy of the model in bf16, or in bitsandbytes' 4 bits"
METHODS = {  # quant_method -> the usual name
    **{"gptq": "GPTQ", "awq": "AWQ", "auto-round": "AutoRound", "aqlm": "AQLM", "vptq": "VPTQ", "hqq": "HQQ"},
    **{"eetq": "EETQ", "quanto": "quanto", "torchao": "torchao", "higgs": "HIGGS", "spqr": "SpQR"},
    **{"mxfp4": "MXFP4", "mxfp8": "MXFP8", "nvfp4": "NVFP4", "fp_quant": "FP-Quant", "quark": "Quark"},
    **{
        "fp8": "FP8",
        "fbgemm_fp8": "FP8 of FBGEMM",
        "bitnet": "BitNet",
        "modelopt": "ModelOpt",
        "gguf": "GGUF",
    },
    **{"compressed-tensors": "compressed-tensors", "exl2": "EXL2", "exl3": "EXL3", "sinq": "SINQ"},
}
TENSORS = (  # (pattern of a tensor's name, format); the first match decides
    (r".*\.g_idx", "GPTQ"),
    (r".*\.(qweight|qzeros)", "AWQ or GPTQ"),
    (r".*_proj_(blocks|scales)", "MXFP4"),
    (r".*\.weight_scale_inv", "FP8 in blocks"),
    (r".*\.(SCB|weight_format)", "bitsandbytes in 8 bits"),
    (r".*\.weight\.(absmax|quant_map|nested_\w+|quant_state\..*)", "bitsandbytes in 4 bits"),
    (r".*\.weight_(packed|shape|zero_point|g_idx)", "compressed-tensors"),
    (r".*\.weight_scale_2", "NVFP4"),
    (r".*\.(q_weight|q_scale_max|q_invperm)", "EXL2"),
    (r".*\.trellis", "EXL3"),
    (r".*\.W_q", "HQQ"),
    (r".*\.weight\._(data|scale|shift)", "quanto"),
    (r".*\.(codes|codebooks)", "AQLM"),
    (r".*\.(centroids|res_centroids|indices)(\..*)?", "VPTQ"),
    (r".*\.weight_scales", "EETQ"),
    (r".*_weight_(qdata|scale|zero_point)", "torchao"),
    (r".*\.biases", "MLX"),
    (r".*\.(weight|input)_scale", "FP8 or int8"),
)


def is_bnb_4bit(raw: dict[str, Any], source: Path) -> bool:
    """Return whether a parsed config.json declares bitsandbytes' 4-bit weights.

    Only the tensors show which of the weights are in 4 bits. Raises InputError naming any other quantised format.
    """
    for key in OTHERS:
        if raw.get(key):
            _refuse(source, key, "compressed-tensors" if key == OTHERS[0] else "MLX")
    quantization = raw.get(CONFIG)
    if quantization is None or quantization == {}:
        return False
    if not isinstance(quantization, dict):
        raise InputError(f"{source}: {CONFIG}: expected an object, got {shown(quantization)}: {WAY_OUT}")

    in_4_bits, in_8_bits = (
        quantization.get(f"load_in_{n}bit", quantization.get(f"_load_in_{n}bit")) for n in (4, 8)
    )
    method = quantization.get("quant_method", "bitsandbytes" if in_4_bits or in_8_bits else None)
    if method == "bitsandbytes" and in_4_bits is True and in_8_bits is not True:
        return True
    _refuse(source, CONFIG, _name(quantization, method, in_8_bits is True))


def of_tensors(tensors: Iterable[Stored]) -> tuple[Stored, str] | None:
    """Return (tensor, format) for the first tensor that shows a quantised format, or None.

    tensors: the tensors of a folder that do not fit a dense model.
    """
    tensors = [*tensors]
    for pattern, name in TENSORS:
        found = next((tensor for tensor in tensors if re.fullmatch(pattern, tensor.name)), None)
        if found is not None:
            return found, name
    found = next((tensor for tensor in tensors if str(tensor.dtype).startswith("F8_")), None)
    return None if found is None else (found, "FP8")


def refuse_tensor(tensor: Stored, name: str) -> NoReturn:
    """Raise InputError for a tensor of a quantised format, called `name`."""
    raise InputError(
        f"{tensor.file}: {shown(tensor.name)}: expected plain weights, since config.json names no quantisation, "
        f"got {name}: {WAY_OUT}"
    )


def _name(quantization: dict[str, Any], method: Any, in_8_bits: bool) -> str:
    if method == "bitsandbytes":
        return "bitsandbytes in 8 bits" if in_8_bits else "bitsandbytes without load_in_4bit"
    if method is None:
        mlx = {"bits", "group_size"} <= quantization.keys()
        return "MLX" if mlx else "a format without a quant_method"
    name = METHODS.get(method, shown(method)) if isinstance(method, str) else shown(method)
    if method == "fp8" and quantization.get("weight_block_size"):
        return f"{name} in blocks"
    if method == "compressed-tensors" and isinstance(quantization.get("format"), str):
        return f"{name} ({shown(quantization['format'])})"
    return name


def _refuse(source: Path, key: str, name: str) -> NoReturn:
    raise InputError(
        f"{source}: {key}: expected plain weights or bitsandbytes in 4 bits, got {name}, which is not read: {WAY_OUT}"
    )
