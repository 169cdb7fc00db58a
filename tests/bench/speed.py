"""The Cases through pytest-benchmark, for its statistics, saved runs, comparisons, histograms and CSV.

    pytest tests/bench/speed.py --benchmark-autosave
    pytest tests/bench/speed.py -k "rms_norm and burnish" --benchmark-compare
    pytest tests/bench/speed.py --benchmark-group-by=param:case --benchmark-histogram=speed
    pytest-benchmark compare --csv=speed.csv

Host time with the device synchronised, forward and backward: a row for each case, shape and contestant, by their names.
A peer that is not installed, or has no such feature, is skipped with the reason. What breaks the accuracy rule fails,
and is not timed.
"""

from dataclasses import replace

import pytest
import torch
from burnish.bench.cases.case import assert_accurate, label, make_inputs
from burnish.bench.cases.registry import CASES
from burnish.bench.ops.clocks import sync
from burnish.bench.ops.contest import call, prepare
from burnish.bench.ops.peers import PEERS, Unsuitable
from burnish.bench.ops.speed import DTYPES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = DTYPES["bf16" if DEVICE == "cuda" else "fp32"]
BY_NAME = {case.name: case for case in CASES}
SHAPES = {(case.name, label(dims)): dims for case in CASES for dims in case.bench.get(DEVICE, ())}
ROWS = [
    pytest.param(case, shape, contestant, id=f"{case}-{shape}-{contestant}")
    for case, shape in SHAPES
    for contestant in ("burnish", "eager", *PEERS.get(BY_NAME[case].op, ()))
]


def op_of(case, contestant):
    if contestant in ("burnish", "eager"):
        return case.fused if contestant == "burnish" else case.eager
    try:
        return PEERS[case.op][contestant](case)
    except (ImportError, Unsuitable) as reason:
        pytest.skip(f"{contestant}: {reason}")


@pytest.mark.parametrize("case, shape, contestant", ROWS)
def test_speed(benchmark, case, shape, contestant):
    dims, found = SHAPES[case, shape], BY_NAME[case]
    op = op_of(found, contestant)
    torch.manual_seed(0)
    assert_accurate(replace(found, fused=op), make_inputs(found, found.check(dims), DTYPE, DEVICE))

    inputs = prepare(found, dims, DTYPE, DEVICE)
    forward, backward = found.work(dims, DTYPE.itemsize)
    benchmark.group = f"{case} {shape}"
    benchmark.extra_info.update(bytes=forward.bytes + backward.bytes, flops=forward.flops + backward.flops)

    def once():
        call(op, found, inputs, backward=True)
        sync(DEVICE)

    benchmark.pedantic(once, rounds=5, warmup_rounds=1)
