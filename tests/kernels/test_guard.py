"""The guard of interpreted kernels (tests/common/guard.py) catches what it is there for, and nothing else."""

import pytest
import torch
from burnish.kernels._chip import INTERPRET

if not INTERPRET:
    pytest.skip("the guard stands under Triton's interpreter", allow_module_level=True)

import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def _add_one(x_ptr, y_ptr, N, START, STEP, BLOCK: tl.constexpr):
    """Right where START is 0, STEP is BLOCK and N the length of both."""
    at = START + tl.program_id(0) * STEP + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at, mask=at < N) + 1, mask=at < N)


@triton.jit
def _sum(x_ptr, sum_ptr, BLOCK: tl.constexpr):
    part = tl.sum(tl.load(x_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)))
    tl.store(sum_ptr, tl.load(sum_ptr) + part)


@triton.jit
def _pairs(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """Two lanes to each element of y."""
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at // 2, tl.load(x_ptr + at))


@triton.jit
def _rows(x_ptr, y_ptr, stride, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y_ptr + tl.program_id(0) * N + at, tl.load(x_ptr + tl.program_id(0) * stride + at))


@triton.jit
def _described(x, y_ptr, N, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, x.load([0]), mask=at < N)


@triton.jit
def _count(y_ptr):
    tl.atomic_add(y_ptr, 1)


@triton.jit
def _picked(row_ptr, x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    """The row that is asked for, or zeros for -1."""
    at, row = tl.arange(0, BLOCK), tl.load(row_ptr + tl.program_id(0))
    tl.store(
        y_ptr + tl.program_id(0) * N + at,
        tl.load(x_ptr + row * N + at, (at < N) & (row >= 0), other=0.0),
        at < N,
    )


def caught(kind: str):
    return pytest.raises(InterpreterError, match=f"AccessError.*{kind}: _")


def test_right_kernels_pass():
    x, y = torch.arange(50.0), torch.zeros(50)
    _add_one[(4,)](x, y, 50, 0, 16, BLOCK=16)
    assert torch.equal(y, x + 1)
    _add_one[(4,)](x, x, 50, 0, 16, BLOCK=16)  # in place: each program its own elements
    assert torch.equal(y, x)
    _sum[(1,)](x, y, BLOCK=32)
    _pairs[(1,)](torch.ones(16), y, BLOCK=16)  # equal values


def test_lanes_that_are_masked_may_point_anywhere():
    x, y = torch.rand(2, 10), torch.ones(3, 10)
    _picked[(3,)](torch.tensor([1, -1, 0]), x, y, 10, BLOCK=16)
    assert torch.equal(y, torch.stack([x[1], torch.zeros(10), x[0]]))
    with caught("outside"):
        _picked[(1,)](torch.tensor([2]), x, y, 10, BLOCK=16)


def test_a_mask_one_too_wide_is_caught():
    x, y = torch.zeros(50), torch.zeros(50)
    with caught("outside"):
        _add_one[(4,)](x, y[:49], 50, 0, 16, BLOCK=16)
    with caught("outside"):
        _add_one[(4,)](x[:49], y, 50, 0, 16, BLOCK=16)


def test_a_read_before_the_start_is_caught():
    x, y = torch.zeros(64), torch.zeros(64)
    with caught("outside"):
        _add_one[(1,)](x[1:], y, 16, -1, 16, BLOCK=16)


def test_a_read_between_the_elements_of_a_view_is_caught():
    x, y = torch.zeros(4, 12), torch.zeros(4, 8)
    _rows[(4,)](x[:, :8], y, 12, N=8)
    with caught("outside"):
        _rows[(4,)](x[:, :7], y, 12, N=8)
    with caught("outside"):
        _rows[(4,)](torch.zeros(4, 8).double().float()[:, ::2], y, 8, N=4)


def test_overlapping_stores_of_two_programs_are_caught():
    x, y = torch.zeros(64), torch.zeros(64)
    with caught("race"):
        _add_one[(2,)](x, y, 64, 0, 15, BLOCK=16)


def test_a_sum_read_and_written_by_two_programs_is_caught():
    with caught("race"):
        _sum[(2,)](torch.ones(64), torch.zeros(1), BLOCK=32)


def test_two_views_of_one_memory_are_one():
    x = torch.zeros(64)
    with caught("race"):
        _add_one[(2,)](x[:48], x[16:], 32, 0, 16, BLOCK=16)  # the second reads what the first has written


def test_two_lanes_of_one_store_are_caught():
    with caught("twice"):
        _pairs[(1,)](torch.arange(16.0), torch.zeros(8), BLOCK=16)


def test_descriptors_are_seen():
    x, y = torch.ones(24), torch.zeros(24)
    described = TensorDescriptor(x, [20], [1], [32])
    _described[(1,)](described, y, 24, BLOCK=32)
    assert y.sum() == 20
    with caught("outside"):
        _described[(1,)](TensorDescriptor(x, [32], [1], [32]), y, 24, BLOCK=32)


def test_atomics_are_refused():
    with caught("atomic"):
        _count[(2,)](torch.zeros(1, dtype=torch.int32))
