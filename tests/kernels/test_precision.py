"""Products of fp32 tensors are rounded as torch's own on a GPU are, whichever of its setters said so."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from burnish.bench.cases.case import make_inputs, make_upstream, run
from burnish.bench.cases.registry import CASES
from burnish.bench.ops.static import compile_only
from burnish.kernels._chip import INTERPRET, precision
from triton.runtime.jit import JITFunction

pytestmark = pytest.mark.skipif(INTERPRET, reason="the interpreter compiles nothing")

OPS = ("flash_attention", "decode_attention", "moe_mlp", "token_logprobs", "token_divergence")
FIRST = {case.op: case for case in reversed(CASES) if case.op in OPS}
SETTERS: dict[str, Callable[[], None]] = {
    "torch.backends": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    "torch.backends.cuda.matmul": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "set_float32_matmul_precision": lambda: torch.set_float32_matmul_precision("high"),
    "allow_tf32": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
}


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """The setters' effects are undone: by the newer ones first, for until then the older ones raise."""
    places = torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = [place.fp32_precision for place in places]  # pyright: ignore[reportAttributeAccessIssue]
    yield
    for place in places:
        place.fp32_precision = "none"  # pyright: ignore[reportAttributeAccessIssue]
    torch.set_float32_matmul_precision("highest")
    for place, found in zip(places, before, strict=True):
        place.fp32_precision = found  # pyright: ignore[reportAttributeAccessIssue]


def launched(op: str, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The precision that the op's launches in fp32 are given, forward and backward."""
    found: set[str] = set()

    def record(kernel: JITFunction, *args: Any, **more: Any) -> None:
        numbers = kernel.signature.bind_partial(*args).arguments | more
        found.update(value for name, value in numbers.items() if name == "PRECISION")

    tensors = make_inputs(FIRST[op], FIRST[op].configurations[0], torch.float32, "cpu")
    upstream = make_upstream(FIRST[op], tensors)
    with compile_only("sm_90"), monkeypatch.context() as patch:
        patch.setattr(
            JITFunction, "run", lambda self, *args, grid, warmup, **more: record(self, *args, **more)
        )
        run(FIRST[op].fused, FIRST[op], tensors, upstream)
    return found


@pytest.mark.parametrize("op", OPS)
def test_every_setter_reaches_every_launch(op: str, monkeypatch: pytest.MonkeyPatch):
    assert launched(op, monkeypatch) == {"ieee"}
    SETTERS["torch.backends.cuda.matmul"]()
    assert launched(op, monkeypatch) == {"tf32"}


@pytest.mark.parametrize("setter", SETTERS)
def test_every_setter_is_read(setter: str):
    assert precision() == "ieee"
    SETTERS[setter]()
    assert precision() == "tf32"


@pytest.mark.slow
@pytest.mark.parametrize("setter", [None, *SETTERS])
@pytest.mark.parametrize("op", OPS)
def test_tf32_is_in_the_code_where_it_was_asked_for(op: str, setter: str | None):
    if setter is not None:
        SETTERS[setter]()
    case = FIRST[op]
    tensors = make_inputs(case, case.configurations[0], torch.float32, "cpu")
    with compile_only("sm_90") as launches:
        run(case.fused, case, tensors)
    products = [kernel.asm["ptx"] for kernel in launches if "tt.dot" in kernel.asm["ttir"]]
    assert products and all((".tf32" in ptx) == (setter is not None) for ptx in products)
