"""Properties of every op, read from the registry: accuracy, repeatability, registration, compilation, layouts."""

from dataclasses import replace

import pytest
import torch
from burnish.bench.cases.case import (
    Case,
    Dims,
    Verdict,
    assert_accurate,
    label,
    leaves,
    make_inputs,
    make_upstream,
    run,
    verdicts,
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


# ---- the rule says where


def judged(
    name: str, change, device: str, dims: Dims | None = None, dtype=torch.float32
) -> dict[str, Verdict]:
    """Verdicts of a correct op whose outputs `change` has changed, given the tuple of them."""
    case = next(c for c in CASES if c.name == name)

    def fused(*args, **kwargs):
        outputs = case.reference(*args, **kwargs)
        return change(outputs if isinstance(outputs, tuple) else (outputs,))

    wrong = replace(case, fused=fused)
    tensors = make_inputs(case, dims or case.shapes[1 % len(case.shapes)], dtype, device)
    found = verdicts(wrong, tensors)
    if any(v.wrong for v in found):
        with pytest.raises(AssertionError) as error:
            assert_accurate(wrong, tensors)
        # up to the numbers, which differ with the random upstream gradients
        first = next(v for v in found if v.wrong).text().split(": error")[0]
        assert str(error.value).startswith(f"{case.name}: {first}")
    assert all(len(v.text().splitlines()) <= 3 for v in found)
    return {v.name: v for v in found}


def filled(index, value: float, output: int = 0):
    """A change: one output with a value at an index."""

    def change(outputs):
        t = outputs[output].clone()
        t[index] = value
        outputs = (*outputs[:output], t, *outputs[output + 1 :])
        return outputs if len(outputs) > 1 else t

    return change


def test_all_is_well(device: str):
    found = judged("add_rms_norm/hidden", lambda outputs: outputs, device)
    names = ["output 0", "output 1", "gradient of x", "gradient of residual", "gradient of weight"]
    assert list(found) == names and not any(v.wrong for v in found.values())
    assert all(v.error <= v.allowed for v in found.values())
    assert found["output 0"].text().startswith("output 0: error ")


def test_wrong_past_a_multiple_of_64(device: str):
    dims = {"B": 1, "T": 300, "F": 777}
    columns = (slice(None), slice(None), slice(768, None))
    verdict = judged("swiglu/elementwise", filled(columns, 1e3), device, dims)["output 0"]
    wrong = verdict.wrong
    assert wrong is not None and wrong.reason == f"error {verdict.error:.2e}, allowed {verdict.allowed:.2e}"
    assert (wrong.count, wrong.numel, wrong.nan, wrong.infinite) == (2700, 233_100, 0, 0)
    assert wrong.box == (slice(0, 1), slice(0, 300), slice(768, 777)) and wrong.got == 1e3
    assert wrong.worst[0] == 0 and 768 <= wrong.worst[2] < 777
    assert abs(wrong.got - wrong.truth) == pytest.approx(verdict.error)

    first, second, third = verdict.text().splitlines()
    assert first == f"output 0: {wrong.reason}"
    assert second == "  wrong: 2,700 of 233,100, all in [0, 0:300, 768:777]"
    index = ", ".join(map(str, wrong.worst))
    assert third == f"  worst: 1000, expected {wrong.truth:.6g} +- {verdict.allowed:.2e}, at [{index}]"
    by_letters = verdict.text(("B", "2 F", "9")).splitlines()[1]
    assert by_letters == "  wrong: 2,700 of 233,100, all in B=0 2F=0:300 axis2=768:777"
    assert verdict.text(("B", "T")) == verdict.text()  # letters of another tensor


def test_wrong_at_one_element(device: str):
    wrong = judged("swiglu/elementwise", filled((1, 3, 100), -7.0), device)["output 0"].wrong
    assert wrong is not None and (wrong.count, wrong.worst, wrong.got) == (1, (1, 3, 100), -7.0)
    assert wrong.box == (slice(1, 2), slice(3, 4), slice(100, 101))


def test_nan_in_a_row_and_an_infinity(device: str):
    found = judged("swiglu/elementwise", filled((1, 2), torch.nan), device)
    wrong = found["output 0"].wrong
    assert wrong is not None and wrong.reason.startswith("error nan, allowed ") and wrong.worst == (1, 2, 0)
    assert (wrong.count, wrong.nan, wrong.infinite) == (101, 101, 0) and wrong.got != wrong.got
    assert wrong.box == (slice(1, 2), slice(2, 3), slice(0, 101))
    text = found["output 0"].text().splitlines()
    assert text[1] == "  wrong: 101 of 1,010, all in [1, 2, 0:101], 101 of them NaN"
    wrong = judged("swiglu/elementwise", filled((0, 0, 5), torch.inf), device)["output 0"].wrong
    assert wrong is not None and (wrong.count, wrong.nan, wrong.infinite) == (1, 0, 1)


def test_a_number_where_the_truth_is_infinite(device: str):
    """Rows that see nothing have a log-sum-exp of -inf; sinks aside."""
    dims = {"B": 1, "T": 9, "S": 3, "H": 2, "G": 1, "D": 16}
    case = next(c for c in CASES if c.name == "flash_attention/full")
    sees_nothing = replace(case, options={"return_lse": True})  # causal: the first six rows
    tensors = make_inputs(case, dims, torch.float32, device)
    assert not any(v.wrong for v in verdicts(replace(sees_nothing, fused=case.reference), tensors))

    def fused(*args, **kwargs):
        out, lse = case.reference(*args, **kwargs)
        return out, lse.masked_fill(lse == -torch.inf, -1e30)

    wrong = next(v for v in verdicts(replace(sees_nothing, fused=fused), tensors) if v.name == "output 1")
    assert wrong.wrong is not None and wrong.wrong.reason == "differs where the truth is infinite"
    assert (wrong.wrong.count, wrong.wrong.truth) == (12, -torch.inf)
    assert wrong.wrong.box == (slice(0, 1), slice(0, 6), slice(0, 2))
    assert wrong.text().splitlines()[2] == "  worst: -1e+30, expected -inf, at [0, 0, 0]"


def test_transposed(device: str):
    def transposed(outputs):
        return outputs[0].transpose(0, 1)

    square = judged("swiglu/elementwise", transposed, device, {"B": 3, "T": 3, "F": 5})["output 0"].wrong
    assert square is not None and square.count == 30  # all but the diagonal
    other = judged("swiglu/elementwise", transposed, device)
    assert other["output 0"].text() == "output 0: expected shape (2, 5, 101), got (5, 2, 101)"
    assert other["gradient of up"].text() == "gradient of up: not computed, since an output is wrong"


def test_another_dtype(device: str):
    found = judged("swiglu/elementwise", lambda outputs: outputs[0].float(), device, dtype=HALF)
    assert found["output 0"].text() == "output 0: expected torch.bfloat16, got torch.float32"
    assert found["output 0"].error != found["output 0"].error and found["gradient of up"].wrong is None


NOT_COMPUTED = "not computed, since an output is wrong"


@pytest.mark.parametrize(
    "name, change, expected",
    [
        ("swiglu/elementwise", lambda o: None, {"output 0": "expected a tensor, got None"}),
        ("swiglu/elementwise", lambda o: [o[0]], {"output 0": "expected a tensor, got a list"}),
        ("swiglu/elementwise", lambda o: 1.5, {"output 0": "expected a tensor, got a float"}),
        ("swiglu/elementwise", lambda o: (o[0], o[0]), {"output 1": "expected 1 output, got 2"}),
        ("swiglu/elementwise", lambda o: (), {"output 0": "expected 1 output, got 0"}),
        ("add_rms_norm/hidden", lambda o: (o[0],), {"output 1": "expected 2 outputs, got 1"}),
        ("add_rms_norm/hidden", lambda o: (o[0], None), {"output 1": "expected a tensor, got None"}),
        ("add_rms_norm/hidden", lambda o: (*o, o[0]), {"output 2": "expected 2 outputs, got 3"}),
        *(
            (
                "add_rms_norm/hidden",
                change,
                dict.fromkeys(("output 0", "output 1"), f"expected a tuple of 2 tensors, got {got}"),
            )
            for change, got in ((list, "a list"), (lambda o: o[0], "a tensor"), (lambda o: None, "None"))
        ),
    ],
)
def test_no_outputs_to_compare(name: str, change, expected: dict, device: str):
    found = {n: v.wrong.reason for n, v in judged(name, change, device).items() if v.wrong}
    gradients = [n for n in found if n.startswith("gradient")]
    assert gradients and found == expected | dict.fromkeys(gradients, NOT_COMPUTED)


def test_no_gradient(device: str):
    found = judged("swiglu/elementwise", lambda outputs: outputs[0].detach(), device)
    assert [v.wrong and v.wrong.reason for v in found.values()] == [
        None,
        *["expected a gradient, got none"] * 2,
    ]


class Doubled(torch.autograd.Function):
    """The identity, with a wrong gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dx):
        return 2 * dx


def test_a_gradient_that_is_wrong_alone(device: str):
    case = FIRST["swiglu"]

    def fused(gate, up):
        return case.reference(gate, Doubled.apply(up))

    tensors = make_inputs(case, case.shapes[1], torch.float32, device)
    found = {v.name: v for v in verdicts(replace(case, fused=fused), tensors)}
    assert [n for n, v in found.items() if v.wrong] == ["gradient of up"]
    unused = replace(case, fused=lambda gate, up: case.reference(gate, up.detach()))
    found = {v.name: v.text() for v in verdicts(unused, tensors) if v.wrong}
    assert found == {"gradient of up": "gradient of up: expected a gradient, got none"}


def test_one_number_of_a_tensor_without_axes(device: str):
    """A Case's outputs have axes; a kernel's own may not."""
    scalar = replace(
        FIRST["swiglu"],
        **{
            which: lambda gate, up, factor=factor: factor * (gate * up).sum()
            for which, factor in (("fused", 2), ("eager", 1), ("reference", 1))
        },
    )
    tensors = make_inputs(scalar, scalar.shapes[1], torch.float32, device)
    wrong = verdicts(scalar, tensors)[0]
    assert wrong.wrong is not None and (wrong.wrong.worst, wrong.wrong.box) == ((), ())
    assert wrong.text().splitlines()[1] == "  wrong: 1 of 1"
