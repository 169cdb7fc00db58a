"""Properties of every op, read from the registry: accuracy, repeatability, registration, compilation, layouts."""

from dataclasses import replace

import pytest
import torch
from burnish.bench.cases.case import (
    Case,
    Dims,
    assert_accurate,
    label,
    leaves,
    make_inputs,
    make_upstream,
    run,
)
from burnish.bench.cases.registry import CASES
from burnish.kernels._chip import INTERPRET, TARGET
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

COMPILED = torch.cuda.is_available()
TRITON = INTERPRET or COMPILED
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# bf16 has the exponents of fp32: the interpreter's seconds go to fp16, which alone has others
SCALED = DTYPES[:2] if INTERPRET else DTYPES
HALF = torch.bfloat16
BACKEND = (
    "inductor" if COMPILED else "aot_eager"
)  # one graph either way; code for the CPU adds seconds and proves nothing more

WIDE = {
    "weight",
    "bias",
    "sinks",
    "cos",
    "sin",
    "temperature",
    "magnitude",
    "absmax",
    "code",
    "nested_absmax",
    "nested_code",
    "offset",
}  # parameters and tables stay in fp32 under autocast

every_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
FIRST = {c.op: c for c in reversed(CASES)}


def each_op(interpreted: bool = True) -> pytest.MarkDecorator:
    """One case of it; the others, which would take minutes under the interpreter, are slow.

    interpreted=False: under the interpreter all are slow.
    """
    quick = [] if INTERPRET and not interpreted else list(FIRST.values())
    marked = [pytest.param(c, marks=[] if any(c is q for q in quick) else pytest.mark.slow) for c in CASES]
    return pytest.mark.parametrize("case", marked, ids=lambda c: c.name)


def each_shape_and_dtype() -> pytest.MarkDecorator:
    """Under the interpreter, bf16 at one shape of each case; its other shapes are slow."""
    rest = pytest.mark.slow if INTERPRET else ()
    marked = [
        pytest.param(
            case,
            dims,
            dtype,
            id=f"{case.name}-{label(dims)}-{dtype}",
            marks=rest if dtype == torch.bfloat16 and n != 1 % len(case.shapes) else (),
        )
        for case in CASES
        for n, dims in enumerate(case.shapes)
        for dtype in DTYPES
    ]
    return pytest.mark.parametrize("case, dims, dtype", marked)


@each_shape_and_dtype()
def test_accuracy(case: Case, dims: Dims, dtype: torch.dtype, device: str):
    luck = 2 * torch.finfo(dtype).eps if INTERPRET and dtype == torch.bfloat16 else 0.0
    assert_accurate(case, make_inputs(case, dims, dtype, device), luck=luck)


@pytest.mark.parametrize("dtype", SCALED, ids=str)
@pytest.mark.parametrize("scale", [1e-3, 30])
@every_case
def test_accuracy_at_scale(case: Case, scale: float, dtype: torch.dtype, device: str):
    if dtype == torch.float16 and scale not in case.half_scales:
        pytest.skip("the eager composition is not finite")
    assert_accurate(case, make_inputs(case, case.shapes[1 % len(case.shapes)], dtype, device, scale))


@pytest.mark.skipif(not COMPILED and TARGET is None, reason="they are a GPU's tiles")
@pytest.mark.parametrize(
    "case, dims", [pytest.param(c, d, id=f"{c.name}-{label(d)}") for c in CASES for d in c.configurations]
)
def test_accuracy_in_shipped_tiles(case: Case, dims: Dims, device: str):
    """The static proof's configurations: head dimensions that descriptors serve, hidden sizes of a row of the table."""
    assert_accurate(case, make_inputs(case, dims, HALF, device))


@each_op()
def test_same_bits_twice(case: Case, device: str):
    tensors = make_inputs(case, case.shapes[1 % len(case.shapes)], HALF, device)
    upstream = make_upstream(case, tensors)
    first, second = (run(case.fused, case, tensors, upstream) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@every_case
def test_any_strides(case: Case, device: str):
    tensors = make_inputs(case, case.shapes[1 % len(case.shapes)], torch.float32, device)
    upstream = make_upstream(case, tensors)
    strided = {
        n: spread(t) if n in leaves(case, tensors) and t is not None else t for n, t in tensors.items()
    }
    assert_accurate(case, strided, upstream=[spread(g) for g in upstream])
    ones = [
        torch.ones((), device=device, dtype=g.dtype).expand(g.shape) for g in upstream
    ]  # what .sum().backward() sends
    assert_accurate(case, tensors, upstream=ones)


def spread(t: Tensor) -> Tensor:
    """The same values with NaN between them: every stride is doubled, and a read past an element is caught."""
    wide = torch.full((*t.shape, 2), float("nan"), dtype=t.dtype, device=t.device)
    wide[..., 0] = t
    return wide[..., 0]


@pytest.mark.parametrize(
    "case, dims", [pytest.param(c, d, id=f"{c.name}-{label(d)}") for c in CASES for d in c.empty]
)
def test_empty(case: Case, dims: Dims, device: str):
    tensors = make_inputs(case, dims, torch.float32, device)
    upstream = make_upstream(case, tensors)
    fused, truth = (run(op, case, tensors, upstream) for op in (case.fused, case.reference))
    for name, t in truth.items():
        assert fused[name].shape == t.shape and torch.equal(fused[name], t), name


@every_case
def test_autocast(case: Case, device: str):
    """Half-precision activations meet fp32 parameters: the training policy."""
    tensors = make_inputs(case, case.shapes[1 % len(case.shapes)], torch.float32, device)
    for name, t in tensors.items():
        if t is not None and t.is_floating_point() and name not in WIDE:
            tensors[name] = t.to(HALF)
    assert_accurate(case, tensors, under=lambda: torch.autocast(device, HALF))


@each_op(interpreted=False)
def test_activation_checkpointing(case: Case, device: str):
    tensors = make_inputs(case, case.shapes[1 % len(case.shapes)], torch.float32, device)
    upstream = make_upstream(case, tensors)

    def again(**arguments):
        return checkpoint(case.fused, use_reentrant=False, **arguments)

    plain, recomputed = (run(op, case, tensors, upstream) for op in (case.fused, again))
    for name in plain:
        assert torch.equal(plain[name], recomputed[name]), name


@each_op(interpreted=False)
def test_compiles_as_one_graph(case: Case, device: str):
    torch.compiler.reset()
    compiled = replace(case, fused=torch.compile(case.fused, fullgraph=True, backend=BACKEND))
    assert_accurate(compiled, make_inputs(case, case.shapes[1 % len(case.shapes)], torch.float32, device))


@each_op(interpreted=False)
def test_compiles_for_any_sizes_and_numbers(case: Case, device: str):
    """Sizes and numbers are symbols of the graph: no check of theirs may ask for a value."""
    torch.compiler.reset()
    compiled = torch.compile(case.fused, fullgraph=True, dynamic=True, backend="eager")
    tensors = make_inputs(case, case.shapes[1 % len(case.shapes)], torch.float32, device)
    expected, found = (run(op, case, tensors) for op in (case.fused, compiled))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


class Record(TorchDispatchMode):
    """Keeps the calls of our registered ops, forward and backward, with their arguments."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "burnish":
            self.calls.setdefault(func, (args, kwargs or {}))
        return func(*args, **(kwargs or {}))


ON_CPU = ("moe_mlp", "decode_attention", "flash_attention")  # whose CPU paths are ops, where they read values


@each_op()
def test_registration(case: Case, device: str):
    if not TRITON and not (case.reads_values and case.op in ON_CPU):
        pytest.skip("on a CPU the op is plain torch")
    tensors = make_inputs(case, case.shapes[1 % len(case.shapes)], torch.float32, device)
    with Record() as record:
        run(case.fused, case, tensors, make_upstream(case, tensors))
    assert record.calls, "no op of the burnish namespace ran"
    differentiable = {id(t) for n, t in tensors.items() if n in leaves(case, tensors)}
    for op, (args, kwargs) in record.calls.items():
        first_order = "backward" not in op.name()

        def fresh(a, first_order=first_order):
            if isinstance(a, list):
                return [fresh(one) for one in a]
            if not isinstance(a, Tensor) or not a.is_floating_point():
                return a
            return (
                a.detach()
                .clone()
                .requires_grad_(first_order and (id(a) in differentiable or a.requires_grad))
            )

        args = tuple(fresh(a) for a in args)
        torch.library.opcheck(op, args, kwargs)


@pytest.mark.skipif(TRITON, reason="the reference is plain torch: once is enough")
@pytest.mark.parametrize(
    "case",
    # DoRA's norm passes no gradient, by definition
    [c for c in CASES if set(c.activations) - set(c.fixed) and c.family != "DoRA"],
    ids=lambda c: c.name,
)
def test_reference_gradients_by_finite_differences(case: Case):
    tensors = make_inputs(case, case.shapes[0], torch.float64, "cpu")
    names = leaves(case, tensors)

    def reference(*values):
        return case.reference(**{**tensors, **dict(zip(names, values, strict=True))}, **case.options)

    values = [t.requires_grad_() for n, t in tensors.items() if n in names and t is not None]
    assert torch.autograd.gradcheck(reference, values, fast_mode=True)


def test_the_rule_can_fail(device: str):
    """The negative control of the rule itself: in fp32 one part in a thousand does not pass, nor does NaN."""
    case = CASES[0]
    tensors = make_inputs(case, case.shapes[1], torch.float32, device)
    for fault in (1.001, float("nan")):
        wrong = replace(
            case, fused=lambda *args, fault=fault, **kwargs: case.reference(*args, **kwargs) * fault
        )
        with pytest.raises(AssertionError, match="output 0: error"):
            assert_accurate(wrong, tensors)
