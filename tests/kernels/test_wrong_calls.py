"""Wrong calls of every op, on both paths: one sentence, or an answer that holds no old memory and read nothing outside.

The tables stand in tests/wrong_calls. Under the interpreter every access is checked (tests/conftest.py),
and uninitialised memory is NaN. What is told of a GPU is what the Triton path does.
"""

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import pytest
import wrong_attention
import wrong_heads
import wrong_linear
import wrong_rest
import wrong_sample
from burnish import kernels
from burnish.kernels._chip import INTERPRET
from wrong import Wrong

TABLES = (wrong_attention, wrong_heads, wrong_linear, wrong_sample, wrong_rest)
CALLS = [call for table in TABLES for call in table.CALLS]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)
def test_wrong_call(call: Wrong):
    call.check(INTERPRET)


class Planted(NamedTuple):
    """A fault in a copy of a kernel file, and the call that must then be answered otherwise."""

    name: str
    file: str
    old: str
    new: str
    table: ModuleType
    op: str
    call: str
    triton: bool = True  # False: it lies in the CPU path


PLANTED = [
    Planted(
        "a row past the table",
        "rope",
        " & (row < table)",
        "",
        wrong_rest,
        "apply_rope",
        "rope: position past the table",
    ),
    Planted(
        "zeros for NaN",
        "rope",
        'nan = float("nan")',
        "nan = 0.0",
        wrong_rest,
        "apply_rope",
        "rope: position -1",
    ),
    Planted(
        "one adapter too many",
        "low_rank",
        "(ids < adapters)",
        "(ids <= adapters)",
        wrong_linear,
        "lora_linear",
        "lora: adapter past the stack",
    ),
    Planted(
        "none for NaN",
        "low_rank",
        'float("nan"), acc',
        "acc, acc",
        wrong_linear,
        "lora_linear",
        "lora: adapter -2",
    ),
    Planted(
        "an id cut to 32 bits",
        "low_rank",
        "ids = tl.load(adapter_ptr + rows, rows < M, other=-1)",
        "ids = tl.load(adapter_ptr + rows, rows < M, other=-1).to(tl.int32)",
        wrong_linear,
        "lora_linear",
        "lora: adapter 2^40",
    ),
    Planted(
        "dS of an adapter past the stack",
        "plain/lora",
        "ids.clamp(0, adapters - 1)",
        "ids.clamp(min=0)",
        wrong_linear,
        "lora_linear",
        "lora: adapter past the stack",
    ),
    Planted(
        "an expert cut to 32 bits",
        "route",
        "expert = tl.load(indices_ptr + n, n < N, other=-1)\n    kept",
        "expert = tl.load(indices_ptr + n, n < N, other=-1).to(tl.int32)\n    kept",
        wrong_rest,
        "moe_mlp",
        "moe: index 2^40",
    ),
    Planted(
        "ids not looked at",
        "low_rank",
        'check_ids("adapter"',
        '(lambda *_: 0)("adapter"',
        wrong_linear,
        "lora_linear",
        "lora: adapter -2",
        triton=False,
    ),
    Planted(
        "positions not looked at",
        "rope",
        'check_ids("positions"',
        '(lambda *_: 0)("positions"',
        wrong_rest,
        "apply_rope",
        "rope: position -1",
        triton=False,
    ),
]


def home_of(op: str) -> str:
    return getattr(kernels, op).__module__.removeprefix("burnish.kernels.").replace(".", "/")


@pytest.mark.parametrize(
    "fault", [f for f in PLANTED if f.triton == INTERPRET], ids=lambda f: f"{f.file}: {f.name}"
)
def test_a_planted_fault_is_caught(
    fault: Planted, copy_of: Callable[..., ModuleType], monkeypatch: pytest.MonkeyPatch
):
    (call,) = (call for call in CALLS if call.name == fault.call)
    copy = copy_of(fault.file, fault.old, fault.new, top=home_of(fault.op))
    monkeypatch.setattr(fault.table, fault.op, getattr(copy, fault.op))
    with pytest.raises((Exception, pytest.fail.Exception)):
        call.check(INTERPRET)


@pytest.mark.slow
@pytest.mark.parametrize("fault", {f.call: f for f in PLANTED}.values(), ids=lambda f: f.call)
def test_a_faithful_copy_passes(
    fault: Planted, copy_of: Callable[..., ModuleType], monkeypatch: pytest.MonkeyPatch
):
    """Without this, a copy that does not even run would count as a fault caught."""
    (call,) = (call for call in CALLS if call.name == fault.call)
    monkeypatch.setattr(fault.table, fault.op, getattr(copy_of(fault.file, top=home_of(fault.op)), fault.op))
    call.check(INTERPRET)


def test_names_are_unique():
    assert len({call.name for call in CALLS}) == len(CALLS)
