"""Wrong calls of every op, on both paths: one sentence, or an answer that holds no old memory and read nothing outside.

The tables stand in tests/wrong_calls. Under the interpreter every access is checked (tests/conftest.py),
and uninitialised memory is NaN. What is told of a GPU is what the Triton path does.
"""

import pytest
import wrong_attention
import wrong_heads
import wrong_linear
import wrong_rest
from burnish.kernels._launch import INTERPRET
from wrong import Wrong

TABLES = (wrong_attention, wrong_heads, wrong_linear, wrong_rest)
CALLS = [call for table in TABLES for call in table.CALLS]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)
def test_wrong_call(call: Wrong):
    call.check(INTERPRET)


def test_names_are_unique():
    assert len({call.name for call in CALLS}) == len(CALLS)
