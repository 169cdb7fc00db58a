"""Wrong calls of every op, on both paths: one sentence, or an answer that holds no old memory and read nothing outside.

The tables stand in tests/wrong_calls. Under the interpreter every access is checked (tests/conftest.py),
and uninitialised memory is NaN. What is told of a GPU is what the Triton path does.
"""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import wrong_attention
import wrong_heads
import wrong_linear
import wrong_rest
import wrong_sample
from burnish import kernels
from burnish.kernels._chip import INTERPRET
from faults import Fault, check_of, control, faults_of
from wrong import Wrong

TABLES = (wrong_attention, wrong_heads, wrong_linear, wrong_rest, wrong_sample)
CALLS = [call for table in TABLES for call in table.CALLS]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)
def test_wrong_call(call: Wrong):
    call.check(INTERPRET)


# ---- planted faults

FAULTS = faults_of(__file__)
OPS = {"rope": "apply_rope", "lora": "lora_linear", "moe": "moe_mlp"}  # by the first word of a call's name


@control
def is_answered(call: Wrong) -> None:
    call.check(INTERPRET)


def call_of(fault: Fault, copy: Callable[..., ModuleType], monkeypatch, planted: bool = True) -> Wrong:
    """The call that a fault is on, of which the op stands in a copy of its file, with the fault or without."""
    table, call = next((t, call) for t in TABLES for call in t.CALLS if call.name == fault.on)
    op = OPS[fault.on.partition(":")[0]]
    home = getattr(kernels, op).__module__.removeprefix("burnish.kernels.").replace(".", "/")
    module = copy(fault.file, fault if planted else None, top=home)
    monkeypatch.setattr(table, op, getattr(module, op))
    return call


@pytest.mark.parametrize(
    "fault", [f for f in FAULTS if (f.path == "triton") == INTERPRET], ids=lambda fault: fault.id
)
def test_a_planted_fault_is_caught(fault: Fault, copy_of: Callable[..., ModuleType], monkeypatch):
    call = call_of(fault, copy_of, monkeypatch)
    with pytest.raises((Exception, pytest.fail.Exception)):
        check_of(fault)(call)


@pytest.mark.slow
@pytest.mark.parametrize("fault", {f.on: f for f in FAULTS}.values(), ids=lambda fault: fault.on)
def test_a_faithful_copy_passes(fault: Fault, copy_of: Callable[..., ModuleType], monkeypatch):
    """Without this, a copy that does not even run would count as a fault caught."""
    is_answered(call_of(fault, copy_of, monkeypatch, planted=False))


def test_no_table_is_forgotten():
    files = Path(wrong_rest.__file__).parent.glob("wrong_*.py")
    assert {table.__name__ for table in TABLES} == {file.stem for file in files}


def test_names_are_unique():
    assert len({call.name for call in CALLS}) == len(CALLS)
