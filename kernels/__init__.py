"""Fused ops, floor 0. Each file reads in the same order: maths, reference, Triton kernels, autograd, public op."""

from .attention import flash_attention as flash_attention
from .decode import decode_attention as decode_attention
from .glu import clamped_swiglu as clamped_swiglu
from .glu import geglu as geglu
from .glu import swiglu as swiglu
from .logprob import token_logprobs as token_logprobs
from .norm import add_rms_norm as add_rms_norm
from .norm import rms_norm as rms_norm
from .rope import apply_rope as apply_rope
