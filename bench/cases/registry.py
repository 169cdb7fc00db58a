"""Every Case, in the order of the tables: read by the tests, the static proof and the benchmark.

Adding kernels/x.py is adding bench/cases/x.py beside it, and its line here.
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
