"""Every Case, in the order of the tables: read by the tests, the static proof and the benchmark.

Adding kernels/x.py is adding bench/cases_x.py beside it, and its line here.
"""

from . import (
    cases_attention,
    cases_decode,
    cases_divergence,
    cases_glu,
    cases_logprob,
    cases_lora,
    cases_moe,
    cases_nf4,
    cases_norm,
    cases_rope,
    cases_sample,
    cases_topk,
)
from .case import Case

CASES: tuple[Case, ...] = (
    *cases_norm.CASES,
    *cases_rope.CASES,
    *cases_glu.CASES,
    *cases_attention.CASES,
    *cases_decode.CASES,
    *cases_logprob.CASES,
    *cases_divergence.CASES,
    *cases_topk.CASES,
    *cases_sample.CASES,
    *cases_moe.CASES,
    *cases_lora.CASES,
    *cases_nf4.CASES,
)
