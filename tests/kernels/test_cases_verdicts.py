"""The verdicts of the rule of accuracy: where a wrong output is wrong, by how much, and what is no output at all."""

from dataclasses import replace

import pytest
import torch
from burnish.bench.cases.case import Dims, Verdict, assert_accurate, make_inputs, verdicts
from burnish.bench.cases.registry import CASES

SWIGLU = next(c for c in CASES if c.op == "swiglu")


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
    found = judged("swiglu/elementwise", lambda outputs: outputs[0].float(), device, dtype=torch.bfloat16)
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
    case = SWIGLU

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
        SWIGLU,
        **{
            which: lambda gate, up, factor=factor: factor * (gate * up).sum()
            for which, factor in (("fused", 2), ("eager", 1), ("reference", 1))
        },
    )
    tensors = make_inputs(scalar, scalar.shapes[1], torch.float32, device)
    wrong = verdicts(scalar, tensors)[0]
    assert wrong.wrong is not None and (wrong.wrong.worst, wrong.wrong.box) == ((), ())
    assert wrong.text().splitlines()[1] == "  wrong: 1 of 1"
