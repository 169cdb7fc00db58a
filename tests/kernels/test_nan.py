"""A NaN that goes into an op comes out: of every output and every gradient that depends on the number in whose place it
stands. What depends on it the reference shows in fp64: that is what changes when the number does.

More may be NaN: 0 * NaN is NaN, so a value's NaN reaches queries that do not see it and share a tile with it.
"""

from collections.abc import Callable
from itertools import product
from types import ModuleType
from typing import Any

import pytest
import torch
from burnish.bench.cases.case import Case, Tensors, make_inputs, make_upstream, run, tensor, widen
from burnish.bench.cases.nf4 import absmax_alone
from burnish.bench.cases.registry import CASES
from burnish.kernels import decode_attention, flash_attention
from burnish.kernels._chip import FEW_KEYS, INTERPRET
from faults import Fault, check_of, control, faults_of
from torch import Tensor

# what the op's numbers do not depend on, or no number in [0, 1)
LEFT_OUT = {("dequantize_nf4", "like"), ("sample_tokens", "noise")}
LOOKED_AT = ("temperature", "teacher_logprobs")  # on a CPU, which refuses a NaN there
SLOW_INTERPRETED = (  # attention has tests of its own below
    *("flash_attention", "decode_attention", "moe_mlp", "token_divergence", "topk_divergence"),
)


Place = int | slice


def replaced(t: Tensor, place: Place, value: float | Tensor) -> Tensor:
    """The tensor with another number at `place`, counted through its elements."""
    flat = t.flatten().clone()
    flat[place] = value
    return flat.view(t.shape)


def dependent(
    case: Case, tensors: Tensors, name: str, upstream: list[Tensor]
) -> tuple[Place, dict[str, Tensor]]:
    """A place in a tensor, and of every output and gradient the numbers that depend on what stands there."""
    wide = widen(tensors, torch.float64)
    t = tensor(wide, name)
    before = run(case.reference, case, wide, upstream)
    places: list[Place] = [t.numel() // 2, 0, t.numel() - 1, slice(None)]
    for step, place in product((1, 30), places):
        other = replaced(t, place, t.flatten()[place] + step)
        after = run(case.reference, case, {**wide, name: other}, upstream)
        changed = {n: (x - after[n]).abs() > 1e-9 * (1 + x.abs()) for n, x in before.items()}
        if any(bool(x.any()) for x in changed.values()):
            return place, changed
    return slice(None), {
        n: torch.zeros_like(x, dtype=torch.bool) for n, x in before.items()
    }  # a softmax of one


def tables():
    """Each float tensor of each op. Quick are those of no case before; interpreted the first case's, as small as is."""
    seen, ops = set(), set()
    for case in CASES:
        smallest = INTERPRET and case.op != "sample_tokens"
        for index in (0, 1)[: len(case.shapes)]:
            for name, t in case.inputs(case.shapes[index], torch.float32, "cpu").items():
                if t is None or not t.is_floating_point() or (case.op, name) in LEFT_OUT:
                    continue
                first = case.op not in ops if INTERPRET else (case.op, name) not in seen
                wanted = index == (0 if smallest else min(1, len(case.shapes) - 1))
                quick = first and wanted and not (INTERPRET and case.op in SLOW_INTERPRETED)
                marks = [] if quick else [pytest.mark.slow]
                yield pytest.param(case, name, index, id=f"{case.name}-{name}-{index}", marks=marks)
        seen |= {(case.op, name) for name in case.inputs(case.shapes[0], torch.float32, "cpu")}
        ops.add(case.op)


def assert_comes_out(op: Callable[..., Any], case: Case, name: str, index: int, device: str) -> None:
    tensors = make_inputs(case, case.shapes[index], torch.float32, device)
    upstream = make_upstream(case, tensors)
    place, changed = dependent(case, tensors, name, upstream)
    broken = {**tensors, name: replaced(tensor(tensors, name), place, float("nan"))}
    for n, found in run(op, case, broken, upstream).items():
        hidden = changed[n] & ~found.isnan()
        assert not hidden.any(), f"{n}: {int(hidden.sum())} of {int(changed[n].sum())} numbers are not NaN"


@pytest.mark.parametrize("case, name, index", [*tables()])
def test_nan_comes_out(case: Case, name: str, index: int, device: str):
    if name in LOOKED_AT and not INTERPRET and device == "cpu":
        with pytest.raises(ValueError, match=f"{name}: expected .* got nan"):
            assert_comes_out(case.fused, case, name, index, device)
        return
    assert_comes_out(case.fused, case, name, index, device)


# ---- attention, in rows of few keys, and where one softmax is NaN as a whole


def lay(lengths, parents, device):
    """cu_seqlens and parents of segments of these lengths, and which row sees which, causally."""
    cu = torch.tensor([0, *lengths]).cumsum(0)
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    related = segment[:, None] == segment
    related |= torch.tensor(parents)[segment][:, None] == segment
    options = {"cu_seqlens": cu.to(torch.int32), "parents": torch.tensor(parents, dtype=torch.int32)}
    return {n: x.to(device) for n, x in options.items()}, related.tril()


def layouts(name, device):
    """The options of a call, and which of its queries sees which key: (T, S)."""
    if name == "shared prompt":
        return lay([5, 3, 9, 2], [-1, 0, 0, -1], device)
    T, _, kind = name.partition(" ")
    square = torch.ones(int(T), int(T), dtype=torch.bool)
    if kind == "full":
        return {"causal": False}, square
    if kind == "window":
        return {"window": 3}, square.tril() & square.triu(-2)
    return {"softcap": 2.0} if kind == "softcap" else {}, square.tril()


def attention_tables():
    """A layout, the tensor with a NaN, and whether the log-sum-exp is asked for: interpreted, it is the same kernel."""
    layouts = "1 causal", "5 causal", "19 causal", "19 full", "19 window", "5 softcap", "shared prompt"
    for layout, broken, with_lse in product(layouts, ("q", "k", "v", "sinks", "all"), (False, True)):
        quick = with_lse and layout in ("1 causal", "5 causal", "5 softcap") if INTERPRET else True
        mark = (
            [] if quick or (layout, broken, with_lse) == ("shared prompt", "k", True) else [pytest.mark.slow]
        )
        name = f"{layout}-{broken}-{'lse' if with_lse else 'out'}"
        yield pytest.param(layout, broken, with_lse, id=name, marks=mark)


@pytest.mark.parametrize("name, broken, with_lse", [*attention_tables()])
def test_attention(name: str, broken: str, with_lse: bool, device: str):
    assert_attention(flash_attention, name, broken, with_lse, device)


def assert_attention(op: Callable[..., Any], name: str, broken: str, with_lse: bool, device: str) -> None:
    """The rows that see the NaN are NaN, and so are the gradients of what they see."""
    options, visible = layouts(name, device)
    T = len(visible)
    lead = (T,) if "cu_seqlens" in options else (1, T)
    tensors = {n: torch.randn(*lead, 1, 16, device=device) for n in "qkv"}
    at = T // 3
    if broken == "sinks":
        tensors["sinks"] = torch.full((1,), float("nan"), device=device)
    elif broken == "all":
        tensors = {n: torch.full_like(x, float("nan")) for n, x in tensors.items()}
    else:
        tensors[broken][..., at, 0, 3] = float("nan")

    queries = {"q": torch.arange(T) == at, "k": visible[:, at], "v": visible[:, at]}.get(
        broken, visible.any(1)
    )
    keys = visible[queries].any(0)
    leaves = {n: x.requires_grad_() for n, x in tensors.items()}
    found = op(**leaves, **options, return_lse=with_lse)
    out, lse = found if with_lse else (found, None)
    total = out.sum() if lse is None else out.sum() + lse.sum()
    grads = dict(zip(leaves, torch.autograd.grad(total, [*leaves.values()]), strict=True))

    rows = out.isnan().view(T, 16)
    assert (rows[queries, 3] if broken == "v" else rows[queries]).all()
    assert grads["q"].isnan().view(T, 16)[queries].all()
    assert grads["k"].isnan().view(T, 16)[keys].all()
    if broken != "v":  # a value's own gradient does not depend on it, nor does the log-sum-exp
        assert grads["v"].isnan().view(T, 16)[keys].all()
        assert lse is None or lse.view(T)[queries].isnan().all()
    assert "sinks" not in grads or grads["sinks"].isnan().all()


@pytest.mark.parametrize("with_lse", [False, True], ids=["out", "lse"])
@pytest.mark.parametrize("sign", [-1, 1])
def test_an_infinite_score(sign: int, with_lse: bool, device: str):
    """-inf weighs nothing: as without the key; +inf is NaN."""
    q, k, v = (torch.rand(1, 5, 1, 16, device=device) for _ in range(3))
    infinite = k.clone()
    infinite[:, 0, :, 3] = sign * torch.inf
    found = flash_attention(q, infinite, v, return_lse=with_lse)
    out = found[0] if with_lse else found
    if sign > 0:
        assert out.isnan().all()
    else:
        assert not out[:, 0].any()  # nothing left to see
        torch.testing.assert_close(out[:, 1:], flash_attention(q[:, 1:], k[:, 1:], v[:, 1:]))


def decode_tables():
    """Interpreted, quick are long prefixes of each tensor: few keys are a path of the CPU."""
    for prefixed, length, broken in product(
        (False, True), (1, FEW_KEYS - 1, 40), ("q", "k_cache", "v_cache", "sinks")
    ):
        marks = [] if not INTERPRET or (prefixed and length == 40) else [pytest.mark.slow]
        name = f"{'prefix' if prefixed else 'own'}-{length}-{broken}"
        yield pytest.param(prefixed, length, broken, id=name, marks=marks)


@pytest.mark.parametrize("prefixed, length, broken", [*decode_tables()])
def test_decode(prefixed: bool, length: int, broken: str, device: str):
    assert_decode(decode_attention, prefixed, length, broken, device)


def assert_decode(op: Callable[..., Any], prefixed: bool, length: int, broken: str, device: str) -> None:
    """A sequence with a NaN, beside one without, which has no prefix."""
    tensors = {"q": torch.randn(2, 1, 16, device=device)}
    tensors |= {n: torch.randn(3, 40, 1, 16, device=device) for n in ("k_cache", "v_cache")}
    if broken == "sinks":
        tensors["sinks"] = torch.full((1,), float("nan"), device=device)
    else:
        tensors[broken][2 if prefixed and broken != "q" else 0] = float("nan")
    numbers = {"slot": [0, 1], "length": [length, 3]}
    if prefixed:
        numbers |= {"prefix_slot": [2, -1], "prefix_length": [length, 0]}
    tensors |= {n: torch.tensor(x, device=device) for n, x in numbers.items()}
    out = op(**tensors)
    assert out[0].isnan().all()
    assert broken == "sinks" or out[1].isfinite().all()


# ---- planted faults


def case_of(op: str) -> Case:
    return next(case for case in CASES if case.op == op)


@control
def few_keys(module: ModuleType, device: str) -> None:
    assert_attention(module.flash_attention, "1 causal", "q", False, device=device)


@control
def a_key_of_five(module: ModuleType, device: str) -> None:
    assert_attention(module.flash_attention, "5 causal", "k", True, device=device)


@control
def few_cached_keys(module: ModuleType, device: str) -> None:
    assert_decode(module.decode_attention, False, 3, "q", device=device)


@control
def a_prefixed_cache(module: ModuleType, device: str) -> None:
    assert_decode(module.decode_attention, True, 40, "k_cache", device=device)


@control
def a_clamped_gate(module: ModuleType, device: str) -> None:
    assert_comes_out(module.clamped_swiglu, case_of("clamped_swiglu"), "gate", 0, device)


@control
def a_maximum_of_bits(module: ModuleType, device: str) -> None:
    assert_comes_out(absmax_alone(module.quantize_nf4), case_of("quantize_nf4"), "weight", 0, device)


PATH = "triton" if INTERPRET or torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(
    "fault", [fault for fault in faults_of(__file__) if fault.path == PATH], ids=lambda fault: fault.id
)
def test_fault_is_caught(fault: Fault, device: str, copy_of: Callable[..., ModuleType]):
    module = copy_of(fault.file, fault, top=fault.file.split("/")[-1])
    with pytest.raises(AssertionError, match=r"assert|not NaN"):
        check_of(fault)(module, device)
