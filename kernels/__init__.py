"""The public fused ops. This folder imports none of the other folders.

Every op file has the same order: maths, reference, kernels, launch, op.
"""

from ._namesake import gives_way

if not gives_way(__name__):
    from .attention import flash_attention as flash_attention
    from .decode import decode_attention as decode_attention
    from .glu import clamped_swiglu as clamped_swiglu
    from .glu import geglu as geglu
    from .glu import swiglu as swiglu
    from .head.divergence import token_divergence as token_divergence
    from .head.logprob import token_logprobs as token_logprobs
    from .head.topk import topk_divergence as topk_divergence
    from .head.topk import topk_logprobs as topk_logprobs
    from .lora import lora_linear as lora_linear
    from .lora import lora_linears as lora_linears
    from .moe import moe_mlp as moe_mlp
    from .nf4 import dequantize_nf4 as dequantize_nf4
    from .nf4 import nf4_linear as nf4_linear
    from .nf4 import quantize_nf4 as quantize_nf4
    from .norm import add_rms_norm as add_rms_norm
    from .norm import rms_norm as rms_norm
    from .records import NF4Weight as NF4Weight
    from .rope import apply_rope as apply_rope
    from .route import moe_route as moe_route
    from .sample import sample_tokens as sample_tokens
