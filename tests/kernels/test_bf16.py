"""bf16 under the interpreter (tests/common/bf16.py) has torch's values, bit for bit."""

import pytest
import torch
from burnish.kernels._chip import INTERPRET
from torch import Tensor

if not INTERPRET:
    pytest.skip("compiled, the hardware rounds", allow_module_level=True)

import bf16
import ml_dtypes
import numpy as np
import triton
import triton.language as tl

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of infinities
BLOCK = 1 << 16


@triton.jit
def _cast(x_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at).to(y_ptr.dtype.element_ty))


@triton.jit
def _store(x_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at))


@triton.jit
def _arithmetic(a_ptr, b_ptr, sum_ptr, product_ptr, largest_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    a, b = tl.load(a_ptr + at), tl.load(b_ptr + at)
    tl.store(sum_ptr + at, a + b)
    tl.store(product_ptr + at, a * b)
    tl.store(largest_ptr + at, tl.maximum(a, b))


def every_bf16() -> Tensor:
    """All 65,536 bit patterns: subnormals, infinities and NaN among them."""
    return torch.arange(BLOCK, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def around_every_bf16() -> Tensor:
    """fp32 at each bf16, just above it, around the tie with the next and at it, just below the next."""
    high = torch.arange(BLOCK, dtype=torch.int64) << 16
    low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    return (high[None] + low[:, None]).flatten().to(torch.int32).view(torch.float32)


def assert_same_bits(found: Tensor, expected: Tensor) -> None:
    """But for a NaN's, of which any is as good."""
    assert found.dtype == expected.dtype
    assert torch.equal(found.isnan(), expected.isnan())
    real, width = ~expected.isnan(), {2: torch.int16, 4: torch.int32}[expected.element_size()]
    assert torch.equal(found.view(width)[real], expected.view(width)[real])


def check_narrowing(kernel=_cast) -> None:
    wide = around_every_bf16()
    narrow = torch.zeros(wide.shape, dtype=torch.bfloat16)
    kernel[(len(wide) // BLOCK,)](wide, narrow, BLOCK=BLOCK)
    assert_same_bits(narrow, wide.bfloat16())


@pytest.mark.parametrize("kernel", [_cast, _store], ids=["cast", "store"])
def test_fp32_rounds_to_nearest_even(kernel):
    check_narrowing(kernel)


def test_bf16_widens_exactly():
    narrow, wide = every_bf16(), torch.zeros(BLOCK)
    _cast[(1,)](narrow, wide, BLOCK=BLOCK)
    assert_same_bits(wide, narrow.float())


def test_each_operation_rounds_once():
    a = every_bf16()
    b = a[torch.randperm(BLOCK)]
    results = [torch.zeros_like(a) for _ in range(3)]
    _arithmetic[(1,)](a, b, *results, BLOCK=BLOCK)
    assert_same_bits(results[0], a + b)
    assert_same_bits(results[1], a * b)
    known = ~(a.isnan() | b.isnan())  # which of the two a maximum takes is the hardware's affair
    assert torch.equal(results[2][known], torch.maximum(a, b)[known])


def cut(data, to_float32: bool):
    """Toward zero, as the interpreter does by itself."""
    return (data.view(np.uint32) >> 16).astype(np.uint16) if not to_float32 else CONVERT(data, True)


def ties_away(data, to_float32: bool):
    """A tie to the larger one, not to the even."""
    if to_float32:
        return CONVERT(data, True)
    bits = ((data.view(np.uint32).astype(np.uint64) + 0x8000) >> 16).astype(np.uint16)
    return np.where(np.isnan(data), np.array(np.nan, ml_dtypes.bfloat16).view(np.uint16), bits)


def flushed(data, to_float32: bool):
    """Subnormals to zero."""
    return CONVERT(np.where(abs(data) < 2.0**-126, 0 * data, data), to_float32)


CONVERT = bf16.convert


@pytest.mark.parametrize("fault", [cut, ties_away, flushed])
def test_another_rounding_is_caught(fault, monkeypatch: pytest.MonkeyPatch):
    check_narrowing()
    monkeypatch.setattr(bf16, "convert", fault)
    with pytest.raises(AssertionError):
        check_narrowing()
