"""The registry through pytest-benchmark, for its statistics, saved runs and comparisons.

    pytest tests/bench/speed.py --benchmark-autosave
    pytest tests/bench/speed.py --benchmark-compare --benchmark-group-by=param:case --benchmark-histogram

Host time with the device synchronised, forward and backward, a row for each case, shape and contestant. The first call
of each is its accuracy check: what is wrong fails and is not timed.
"""

from dataclasses import replace

import pytest
import torch
from burnish.bench.cases.case import assert_accurate, label, make_inputs
from burnish.bench.cases.registry import CASES
from burnish.bench.ops.speed import DTYPES, call, prepare, sync

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = DTYPES["bf16" if DEVICE == "cuda" else "fp32"]
ROWS = [pytest.param(c, d, id=f"{c.name}-{label(d)}") for c in CASES for d in c.bench.get(DEVICE, ())]


@pytest.mark.parametrize("contestant", ["burnish", "eager"])
@pytest.mark.parametrize("case, dims", ROWS)
def test_speed(benchmark, case, dims, contestant):
    op = case.fused if contestant == "burnish" else case.eager
    torch.manual_seed(0)
    assert_accurate(replace(case, fused=op), make_inputs(case, case.check(dims), DTYPE, DEVICE))
    inputs = prepare(case, dims, DTYPE, DEVICE)
    forward, backward = case.work(dims, DTYPE.itemsize)
    benchmark.group = f"{case.name} {label(dims)}"
    benchmark.extra_info.update(bytes=forward.bytes + backward.bytes, flops=forward.flops + backward.flops)

    def once():
        call(op, case, inputs, backward=True)
        sync(DEVICE)

    benchmark.pedantic(once, rounds=5, warmup_rounds=1)
