"""The registry covers the public ops, and its formulas are what the tensors say."""

import pytest
import torch
from burnish import kernels
from burnish.bench.cases import registry
from burnish.bench.cases.case import Case, Dims, label, leaves, make_inputs, run
from burnish.bench.cases.registry import CASES
from torch.fx.experimental import _config as meta


def test_every_public_op_has_a_case():
    ops = {n for n, value in vars(kernels).items() if callable(value) and not isinstance(value, type)}
    assert ops - {"moe_route", "gives_way"} == {
        c.op for c in CASES
    }  # that one is plain torch, its own reference


def test_cases_stand_under_the_name_of_their_kernel_file():
    for name, file in vars(registry).items():
        if name.startswith("cases_"):
            homes = {getattr(kernels, case.op).__module__.split(".")[-1] for case in file.CASES}
            assert homes == {name.removeprefix("cases_")}


def test_names_are_unique():
    assert len({c.name for c in CASES}) == len(CASES)


@pytest.mark.parametrize(
    "case, dims",
    [pytest.param(c, d, id=f"{c.name}-{label(d)}") for c in CASES for d in c.bench.get("cuda", ())[:1]],
)
def test_bytes_are_each_operand_once(case: Case, dims: Dims):
    """On tensors without storage: forward reads inputs and writes outputs, backward at least rewrites the gradients."""
    tensors = make_inputs(case, dims, torch.bfloat16, "meta")
    op = case.eager if case.reads_values else case.reference
    with meta.patch(meta_nonzero_assume_all_nonzero=True):  # a loop over experts asks which rows are theirs
        outputs = run(op, case, tensors)
    moved = sum(t.nbytes for t in (*tensors.values(), *outputs.values()) if t is not None)
    if case.op == "quantize_nf4":  # whose Case returns absmax alone
        moved += dims["C"] * dims["F"] // 2
    forward, backward = case.work(dims, 2)
    assert forward.bytes == pytest.approx(moved, rel=0.02)
    assert backward.bytes >= sum(
        t.nbytes for n, t in tensors.items() if n in leaves(case, tensors) and t is not None
    )


def test_scales_touch_what_they_should():
    case = next(c for c in CASES if c.name == "rms_norm/hidden")
    torch.manual_seed(0)
    plain = make_inputs(case, case.shapes[1], torch.float32, "cpu")
    for scale, x_factor, weight_factor in ((30, 30, 1), (1e-3, 1e-3, 1e-3)):
        torch.manual_seed(0)
        scaled = make_inputs(case, case.shapes[1], torch.float32, "cpu", scale)
        for name, factor in (("x", x_factor), ("weight", weight_factor)):
            a, b = plain[name], scaled[name]
            assert a is not None and b is not None and torch.equal(a * factor, b)
