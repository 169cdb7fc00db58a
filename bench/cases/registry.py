"""All Cases, in the order of the published tables. The tests, the static proof and the benchmark use this list.

The static proof compiles every kernel without a GPU.

A new kernels/x.py gets a file bench/cases/x.py, and a line in this list.
"""

from . import attention, decode, divergence, glu, logprob, lora, moe, nf4, norm, rope, sample, topk
from .case import Case

CASES: tuple[Case, ...] = (
    *norm.CASES,
    *rope.CASES,
    *glu.CASES,
    *attention.CASES,
    *decode.CASES,
    *logprob.CASES,
    *divergence.CASES,
    *topk.CASES,
    *sample.CASES,
    *moe.CASES,
    *lora.CASES,
    *nf4.CASES,
)
