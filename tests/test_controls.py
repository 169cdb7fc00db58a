"""Negative controls: faults planted in a copy of a kernel's source, each of which the accuracy rule must catch.

A fault that survives fails the suite: either the test is blind there, or the line it changes does nothing. Each reruns
only the smallest case that it must break, on the path where it lies: the Triton code (interpreted or on a GPU), or the
CPU path.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from burnish import kernels
from burnish.bench.cases.case import Case, assert_accurate, make_inputs
from burnish.bench.cases.lora import by_path, several
from burnish.bench.cases.moe import with_4bit_experts
from burnish.bench.cases.nf4 import absmax_alone, four_bit, multiplied_out
from burnish.bench.cases.registry import CASES
from burnish.bench.cases.sample import logprob_alone
from burnish.kernels import lora
from faults import Fault, read_faults

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
TRITON = INTERPRET or torch.cuda.is_available()
CAUGHT: tuple[type[Exception], ...] = (AssertionError,)
if INTERPRET:
    from triton.runtime.errors import InterpreterError

    CAUGHT += (InterpreterError,)  # by the guard, where a fault leads outside of the tensors


WRAPPED = {  # by op or case: ops on an NF4Weight, for Cases whose inputs are tensors, and what a Case has of outputs
    "nf4_linear": four_bit,
    "dequantize_nf4": multiplied_out,
    "quantize_nf4": absmax_alone,
    "sample_tokens": logprob_alone,
    "lora_linears": several,
    "lora_linear/4-bit base": four_bit,
    "moe_mlp/4-bit experts, adapters": with_4bit_experts,
}


FAULTS = [fault for fault in read_faults() if fault.case]
HERE = [fault for fault in FAULTS if (fault.path == "triton") == TRITON]


def case_of(fault: Fault, copy_of: Callable[..., ModuleType], planted: bool = True) -> Case:
    """The fault's case, whose op stands in a copy of its file that sees the fault, or a faithful copy."""
    case = next(c for c in CASES if c.name == fault.case)
    home = file_of(getattr(kernels, case.op))
    module = copy_of(fault.file, fault if planted else None, top=home)
    if case.op == "lora_linear" and case.family in lora.PATHS:
        return replace(case, fused=by_path(case.family, module))
    wrap = WRAPPED.get(case.name, WRAPPED.get(case.op, lambda op: op))
    return replace(case, fused=wrap(getattr(module, case.op)))


def file_of(op: Callable[..., Any]) -> str:
    return op.__module__.removeprefix("burnish.kernels.").replace(".", "/")


@pytest.mark.parametrize("fault", HERE, ids=lambda fault: fault.id)
def test_fault_is_caught(fault: Fault, device: str, copy_of: Callable[..., ModuleType]):
    case = case_of(fault, copy_of)
    tensors = make_inputs(case, case.shapes[fault.shape], torch.float32, device, fault.scale)
    with pytest.raises(CAUGHT, match=f"{case.name}: .*(error|differs|expected)|AccessError"):
        assert_accurate(case, tensors)


@pytest.mark.slow
@pytest.mark.parametrize("file", sorted({f.file for f in FAULTS}))
def test_a_faithful_copy_passes(file: str, device: str, copy_of: Callable[..., ModuleType]):
    """Without this, a copy that does not even run would count as a fault caught."""
    places = {(f.case, f.shape, f.scale): f for f in HERE if f.file == file}
    for fault in places.values():
        case = case_of(fault, copy_of, planted=False)
        assert_accurate(case, make_inputs(case, case.shapes[fault.shape], torch.float32, device, fault.scale))


def test_every_case_and_shape_is_there():
    """On every path, also that of the faults which this run does not plant."""
    shapes = {case.name: len(case.shapes) for case in CASES}
    assert [fault.id for fault in FAULTS if not 0 <= fault.shape < shapes.get(fault.case, 0)] == []
