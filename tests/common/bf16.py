"""bf16 under Triton's interpreter, as the hardware has it: rounded to nearest even after each operation.

By itself the interpreter keeps bf16 as 16-bit integers, cuts where the hardware rounds, and adds the integers.
install() gives it arrays of ml_dtypes.bfloat16. tests/kernels/test_bf16.py compares every value with torch.
"""

from typing import Any

import ml_dtypes
import numpy as np
import triton.language as tl
from triton.runtime import interpreter

BF16 = np.dtype(ml_dtypes.bfloat16)


def convert(data: Any, to_float32: bool) -> Any:
    """Between bf16 and fp32, as the bits that the interpreter then views."""
    with np.errstate(invalid="ignore"):  # a NaN stays one
        return data.astype(np.float32).view(np.uint32) if to_float32 else data.astype(BF16).view(np.uint16)


def install() -> None:
    numpy_dtype, convert_float = interpreter._get_np_dtype, interpreter._convert_float

    def get_np_dtype(dtype: Any) -> Any:
        scalar = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
        return BF16 if scalar == tl.bfloat16 else numpy_dtype(dtype)

    def convert_between(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if {source, target} != {tl.bfloat16, tl.float32}:
            return convert_float(data, source, target, rounding)
        toward_zero = getattr(rounding, "name", None) == "RTZ"
        assert not toward_zero, "bf16: no kernel rounds toward zero, and this is to nearest"
        return convert(data, to_float32=target == tl.float32)

    def get_bf16(self: Any, value: float) -> Any:
        return interpreter.TensorHandle(np.array([value], BF16), tl.bfloat16)

    interpreter._get_np_dtype, interpreter._convert_float = get_np_dtype, convert_between
    interpreter.InterpreterBuilder.get_bf16 = get_bf16
