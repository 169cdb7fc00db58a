"""Negative controls: faults planted in a copy of a kernel's source, each of which the accuracy rule must catch.

A fault that survives fails the suite: either the test is blind there, or the line it changes does nothing. Each reruns
only the smallest case that it must break, on the path where it lies: the Triton code (interpreted or on a GPU), or the
CPU path.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import NamedTuple
from unittest.mock import patch

import pytest
import torch
from burnish.bench.case import Case, assert_accurate, make_inputs
from burnish.bench.cases_lora import several
from burnish.bench.cases_moe import with_4bit_experts
from burnish.bench.cases_nf4 import absmax_alone, four_bit, multiplied_out
from burnish.bench.cases_sample import logprob_alone
from burnish.bench.registry import CASES
from burnish.kernels import _chip, _op, lora, nf4

TRITON = _chip.INTERPRET or torch.cuda.is_available()
CAUGHT: tuple[type[Exception], ...] = (AssertionError,)
if _chip.INTERPRET:
    from triton.runtime.errors import InterpreterError

    CAUGHT += (InterpreterError,)  # by the guard, where a fault leads outside of the tensors


WRAPPED = {  # ops on an NF4Weight, for Cases whose inputs are tensors, and what a Case has of an op's outputs
    "nf4_linear": four_bit,
    "dequantize_nf4": multiplied_out,
    "quantize_nf4": absmax_alone,
    "sample_tokens": logprob_alone,
}


class Fault(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    case: str
    shape: int = 1  # index into the case's shapes
    scale: float = 1
    triton: bool = True  # False: it lies in the CPU path


FEATURES = "flash_attention/window, softcap, sinks"
FAULTS = [
    Fault("mean over the padded width", "norm", "1) / N + eps", "1) / BLOCK_N + eps", "rms_norm/hidden"),
    Fault("eps dropped", "norm", "1) / N + eps", "1) / N", "rms_norm/hidden", scale=1e-3),
    Fault("mean not subtracted", "norm", "(dy * w - xhat * mean)", "(dy * w)", "rms_norm/hidden"),
    Fault("dw of x, not xhat", "norm", "return dy * xhat", "return dy * h", "rms_norm/hidden"),
    Fault("few rows' dw of x", "norm", "dw += dy * (h *", "dw += dy * (h + 0 *", "rms_norm/hidden", 0),
    Fault(
        "last tile of rows", "norm", "tl.cdiv(R, BLOCK_R), step", "R // BLOCK_R, step", "rms_norm/hidden", 2
    ),
    Fault("partial sums", "norm", "range(0, P, BLOCK_P)", "range(BLOCK_P, P, BLOCK_P)", "rms_norm/hidden", 2),
    Fault(
        "unit offset dropped",
        "norm",
        "return 1 + w if UNIT_OFFSET else w",
        "return w",
        "rms_norm/unit offset",
    ),
    Fault(
        "residual's gradient",
        "norm",
        "dx += tl.load(dh_ptr + offsets",
        "dx += 0 * tl.load(dh_ptr + offsets",
        "add_rms_norm/hidden",
    ),
    Fault(
        "mean of a wide row",
        "norm",
        "tl.sum(products, 0) / N",
        "tl.sum(products, 0) / BLOCK_N",
        "rms_norm/hidden",
        4,
    ),
    Fault(
        "mean not divided",
        "norm",
        "w / N).view_as(rstd)",
        "w).view_as(rstd)",
        "rms_norm/hidden",
        triton=False,
    ),
    Fault("gradient turned forward", "rope", "        sin = -sin", "        sin = sin", "apply_rope/half"),
    Fault("wrong sign", "rope", "a * cos - b * sin, mask", "a * cos + b * sin, mask", "apply_rope/half"),
    Fault(
        "wrong pairs",
        "rope",
        "tl.join(a * cos - b * sin",
        "tl.join(b * cos - a * sin",
        "apply_rope/interleaved",
    ),
    Fault(
        "positions ignored",
        "rope",
        "row = tl.load(positions_ptr + token, live, other=0)",
        "row += 1",
        "apply_rope/packed",
        0,
    ),
    Fault("rest of a head dropped", "rope", "if 2 * HALF < D:", "if 2 * HALF > D:", "apply_rope/partial", 0),
    Fault("wrong key heads", "rope", "(block - q_blocks) * BLOCK_H", "block * BLOCK_H", "apply_rope/half"),
    Fault(
        "gradient turned forward",
        "rope",
        "_turn(dq, dk, cos, -sin",
        "_turn(dq, dk, cos, sin",
        "apply_rope/half",
        triton=False,
    ),
    Fault("last column", "glu", "(cols < F)", "(cols < F - 1)", "swiglu/elementwise"),
    Fault("slope dropped", "glu", "(1 + g * (1 - p) * slope)", "1", "swiglu/elementwise"),
    Fault("cubic term's slope", "glu", "1 + 3 * cubic", "1 + cubic", "geglu/elementwise"),
    Fault("offset dropped", "glu", "du = dout * g * p", "du = dout * p", "clamped_swiglu/elementwise"),
    Fault(
        "gradient past the clamp",
        "glu",
        "tl.where(gate > limit, 0.0, dg)",
        "dg",
        "clamped_swiglu/elementwise",
        scale=30,
    ),
    Fault(
        "clamp on one side",
        "glu",
        "u < -limit, -limit, u",
        "u < -limit, u, u",
        "clamped_swiglu/elementwise",
        scale=30,
    ),
    Fault(
        "diagonal not seen", "attention", "columns <= queries", "columns < queries", "flash_attention/causal"
    ),
    Fault(
        "sum not rescaled",
        "attention",
        "norm * alpha + tl.sum(p, 1)",
        "norm + tl.sum(p, 1)",
        "flash_attention/causal",
    ),
    Fault("scale dropped from dq", "attention", "(dq * scale)", "dq", "flash_attention/causal"),
    Fault("scale dropped from dk", "attention", "(dk * scale)", "dk", "flash_attention/causal"),
    Fault("delta dropped", "attention", "(dp - delta[:, None])", "dp", "flash_attention/causal"),
    Fault(
        "one head of a group",
        "attention",
        "first_head + step // blocks",
        "first_head",
        "flash_attention/causal",
    ),
    Fault("bottom-right alignment", "attention", "m0 + S - T", "m0", "flash_attention/causal", 2),
    Fault(
        "gradient of lse",
        "attention",
        "delta -= tl.load(dlse_ptr",
        "delta -= 0 * tl.load(dlse_ptr",
        "flash_attention/full",
    ),
    Fault(
        "window one too wide",
        "attention",
        "columns > queries - window",
        "columns >= queries - window",
        FEATURES,
    ),
    Fault("softcap's slope", "attention", "(s / cap) * (s / cap)", "(s / cap)", FEATURES),
    Fault("sink not in the sum", "attention", "norm = tl.exp2(sink - m)", "norm = 0 * m", FEATURES),
    Fault("sink's gradient", "attention", "dsinks = -(", "dsinks = (", FEATURES),
    Fault(
        "first block of a segment", "attention", "+ i < block)", "+ i <= block)", "flash_attention/packed", 0
    ),
    Fault(
        "parent not seen",
        "attention",
        "some = (parent >= 0)",
        "some = (parent > 0)",
        "flash_attention/shared prompt",
        0,
    ),
    Fault(
        "children not counted",
        "attention",
        "segment + 1 + count,",
        "segment + count,",
        "flash_attention/shared prompt",
        0,
    ),
    Fault(
        "a window's last children",
        "attention",
        "n0 + BLOCK_N - 1 + window > keys",
        "n0 + window > keys",
        "flash_attention/shared prompt, window, softcap, sinks",
        0,
    ),
    Fault(
        "not causal",
        "attention",
        "is_causal=mask is None",
        "is_causal=False",
        "flash_attention/causal",
        triton=False,
    ),
    Fault(
        "child's positions",
        "attention",
        "position = before + child_row",
        "position = 0 * before + child_row",
        "flash_attention/shared prompt",
        0,
        triton=False,
    ),
    Fault(
        "sum not rescaled",
        "logprob",
        "tl.exp(shift) * total + tl.sum(p, 1)",
        "total + tl.sum(p, 1)",
        "token_logprobs/dense",
    ),
    Fault("entropy's shift", "logprob", "(weighted + shift * total)", "weighted", "token_logprobs/dense"),
    Fault(
        "target's gradient",
        "logprob",
        "y[:, None], gain, 0.0)",
        "y[:, None], -gain, 0.0)",
        "token_logprobs/dense",
    ),
    Fault(
        "softcap's slope", "logprob", "(1 - s * s)", "(1 - s)", "token_logprobs/bias, softcap, temperatures"
    ),
    Fault(
        "temperature upside down",
        "logprob",
        "u, bias_ptr, cols, N, sharpness,",
        "u, bias_ptr, cols, N, 1 / sharpness,",
        "token_logprobs/bias, softcap, temperatures",
    ),
    Fault(
        "last of a support", "logprob", "stop, BLOCK_K)", "stop - 1, BLOCK_K)", "token_logprobs/support", 0
    ),
    Fault(
        "scaling of an adapter dropped",
        "logprob",
        "low_rank(hidden, lora_a, scaling)",
        "low_rank(hidden, lora_a, 1.0)",
        "token_logprobs/adapter",
        1,
    ),
    Fault(
        "scaling of the teacher's adapter dropped",
        "divergence",
        "teacher_lora_a, teacher_scaling)\n    teacher =",
        "teacher_lora_a, 1.0)\n    teacher =",
        "token_divergence/adapters",
        0,
    ),
    Fault(
        "target of another chunk",
        "logprob",
        "gain * here[:, None]",
        "gain",
        "token_logprobs/chunks",
        2,
        triton=False,
    ),
    Fault(
        "sum not rescaled",
        "divergence",
        "shrink * total + tl.sum(p, 1)",
        "total + tl.sum(p, 1)",
        "token_divergence/forward KL",
    ),
    Fault(
        "difference not rescaled",
        "divergence",
        "apart *= shrink if REVERSE else teacher_shrink",
        "apart *= 1",
        "token_divergence/reverse KL",
    ),
    Fault(
        "teacher's gradient sign",
        "divergence",
        "p - tl.exp(log_q)",
        "p + tl.exp(log_q)",
        "token_divergence/forward KL",
    ),
    Fault("level dropped", "divergence", "p * (level - (t", "p * (0 - (t", "token_divergence/reverse KL"),
    Fault(
        "reference of another tile",
        "divergence",
        "apart += (reference - new_reference) *",
        "apart += 0 *",
        "token_divergence/reverse KL",
    ),
    Fault(
        "level of a mixture dropped",
        "divergence",
        "(r - reference - level)",
        "(r - reference)",
        "token_divergence/JSD",
    ),
    Fault(
        "reference of a mixture dropped",
        "divergence",
        "(of_student - reference)",
        "of_student",
        "token_divergence/JSD",
    ),
    Fault(
        "mixture upside down",
        "divergence",
        "_against_mixture(log_q - log_p, beta)",
        "_against_mixture(log_p - log_q, beta)",
        "token_divergence/JSD",
    ),
    Fault("softcap's slope", "divergence", "(1 - s * s)", "(1 - s)", "token_divergence/features, beta 0.3"),
    Fault(
        "weight of the mixture",
        "divergence",
        "(1 - beta if mixture else 1)",
        "(beta if mixture else 1)",
        "token_divergence/chunks",
        triton=False,
    ),
    Fault(
        "level dropped",
        "divergence",
        ".add_(level)",
        "",
        "token_divergence/features, beta 1.0",
        triton=False,
    ),
    Fault("listed ids in the rest", "topk", '"amin"', '"amax"', "topk_divergence/beta 0.0", triton=False),
    Fault(
        "tail dropped",
        "topk",
        "rest = rest.masked_fill(whole, NOTHING)",
        "rest = rest.masked_fill(~whole, NOTHING)",
        "topk_divergence/beta 1.0",
        triton=False,
    ),
    Fault(
        "padding seen",
        "decode",
        "seen = there[None, :]",
        "seen = (n >= 0)[None, :]",
        "decode_attention/own cache",
    ),
    Fault(
        "prefix ignored",
        "decode",
        "before = tl.cdiv(",
        "before = 0 * tl.cdiv(",
        "decode_attention/shared prefix",
    ),
    Fault(
        "dB not scaled",
        "lora",
        "scaling * tl.dot(tl.trans(dout)",
        "tl.dot(tl.trans(dout)",
        "lora_linear/fused",
    ),
    Fault("dS not scaled", "lora", "(scaling * ds)", "ds", "lora_linear/fused"),
    Fault(
        "bias dropped", "lora", "acc += tl.load(bias_ptr", "acc += 0 * tl.load(bias_ptr", "lora_linear/fused"
    ),
    Fault("adapter dropped", "lora", "+ scaling * acc", "+ 0 * acc", "lora_linear/epilogue"),
    Fault("norm of the base", "lora", "w += scaling * product", "w += 0 * product", "lora_linear/DoRA", 0),
    Fault(
        "another mask",
        "lora",
        "rows.to(tl.uint32) ^ low",
        "rows.to(tl.uint32) ^ high",
        "lora_linear/dropout",
        0,
    ),
    Fault("not divided by 1 - p", "lora", "x * keep_scale", "x", "lora_linear/dropout", 0),
    Fault(
        "last adapter",
        "lora",
        "(mine == e)[:, None], part",
        "(mine <= e)[:, None], part",
        "lora_linear/several adapters",
        0,
    ),
    Fault(
        "dA of other rows",
        "lora",
        "other=-1) == e)",
        "other=-1) >= e)",
        "lora_linear/several adapters",
        0,
    ),
    Fault(
        "dS not scaled", "lora", ".mul_(scaling)  # (M, R)", "  # (M, R)", "lora_linear/dense", triton=False
    ),
    Fault(
        "no mask in dx",
        "lora",
        "dx.add_(_drop(",
        "dx.add_((lambda t, *_: t)(",
        "lora_linear/dropout",
        0,
        triton=False,
    ),
    Fault(
        "one scaling for all layers",
        "lora",
        "scalings[i]",
        "scalings[0]",
        "lora_linears/q, k, v",
        triton=False,
    ),
    Fault(
        "dx of the first layer alone",
        "lora",
        "dx.addmm_(g, W)\n",
        "dx.addmm_(g, W, alpha=0)\n",
        "lora_linears/q, k, v",
        triton=False,
    ),
    Fault(
        "dA of another layer",
        "lora",
        "das = [part.clone() for part in da.split(ranks, -2)]",
        "das = [part.clone() for part in da.split(ranks, -2)]\n        das = [das[0], das[0][[0] * ranks[1]], das[2]]",
        "lora_linears/q, k, v",
        triton=False,
    ),
    Fault(
        "first nibble twice",
        "_four_bit",
        "tl.gather(code, pairs & 15",
        "tl.gather(code, pairs >> 4",
        "nf4_linear/bias",
    ),
    Fault("last share of K", "_four_bit", "(tl.program_id(1) + 1) * steps", "steps", "nf4_linear/bias"),
    Fault(
        "one absmax for a row", "_four_bit", "(starts + 2 * k * BLOCK_K) //", "starts //", "nf4_linear/bias"
    ),
    Fault("absmax of one sign", "nf4", "bits = tl.abs(w).to(", "bits = w.to(", "quantize_nf4/absmax"),
    Fault("sign of dx", "nf4", "dx = dy @ ", "dx = -dy @ ", "nf4_linear/bias", triton=False),
    Fault(
        "offset dropped",
        "_four_bit",
        " * nested + tl.load(offset_ptr)",
        " * nested",
        "dequantize_nf4/absmax quantised",
    ),
    Fault("nibbles swapped", "_four_bit", "pairs >> 4", "pairs & 15", "dequantize_nf4/absmax quantised"),
    Fault(
        "last block",
        "_four_bit",
        ".mul_(absmax[-1])",
        ".mul_(absmax[0])",
        "dequantize_nf4/absmax quantised",
        triton=False,
    ),
    Fault("last choice", "moe", "for k in range(0, K):", "for k in range(0, K - 1):", "moe_mlp/swiglu"),
    Fault(
        "activation not recomputed",
        "moe",
        "a = g * p * u",
        "a = 0 * p * u",
        "moe_mlp/swiglu",
    ),
    Fault("slope of silu", "moe", "u * p * (1 + g * (1 - p))", "u * p", "moe_mlp/swiglu"),
    Fault("weight dropped from dA", "moe", "da = acc * weight", "da = acc", "moe_mlp/swiglu"),
    Fault(
        "gradient past the clamp",
        "moe",
        "tl.where(g > limit, 0.0, da",
        "tl.where(g > limit, da, da",
        "moe_mlp/clamped, biases",
        scale=30,
    ),
    Fault(
        "weights not in the sum",
        "moe",
        "y *= tl.load(weights_ptr",
        "y *= 1 + 0 * tl.load(weights_ptr",
        "moe_mlp/swiglu",
    ),
    Fault(
        "bias of the wrong expert",
        "moe",
        "bias_ptr + expert * N + cols",
        "bias_ptr + cols",
        "moe_mlp/clamped, biases",
    ),
    Fault("bias not in dw", "moe", "dweights += along", "dweights += 0 * along", "moe_mlp/clamped, biases"),
    Fault(
        "db without its weight",
        "moe",
        "wide *= tl.load(weights_ptr",
        "wide *= 1 + 0 * tl.load(weights_ptr",
        "moe_mlp/clamped, biases",
    ),
    Fault(
        "first row of an expert", "moe", "tl.range(start, end", "tl.range(start + 1, end", "moe_mlp/swiglu"
    ),
    Fault("slope of relu2", "moe", "weight * 2 * tl.where(u < 0, 0.0, u)", "weight * 2 * u", "moe_mlp/relu2"),
    Fault(
        "adapter of the gate alone",
        "moe",
        "b_ptrs += F.to(tl.int64) * R",
        "b_ptrs += 0",
        "moe_mlp/adapters",
        shape=0,
    ),
    Fault(
        "adapter not in dx", "moe", "low=ds, up=gate_up_a", "low=None, up=None", "moe_mlp/adapters", shape=0
    ),
    Fault(
        "low rows without weights",
        "moe",
        "_product(wa, down_a",
        "_product(wa * 2, down_a",
        "moe_mlp/adapters",
        shape=0,
    ),
    Fault(
        "adapter of the first expert",
        "moe",
        "expert * R * F + offsets",
        "offsets",
        "moe_mlp/adapters",
        shape=0,
    ),
    Fault(
        "the experts' halves swapped in 4 bits",
        "moe",
        "four_bit[:5], [E, width, C]",
        "four_bit[5:], [E, width, C]",
        "moe_mlp/4-bit experts, adapters",
        shape=0,
    ),
    Fault(
        "adapter without the base",
        "moe",
        "y + F.linear(F.linear(x, a), b)",
        "F.linear(F.linear(x, a), b)",
        "moe_mlp/adapters",
        shape=0,
        triton=False,
    ),
    Fault(
        "gradient past a 4-bit weight",
        "moe",
        "return dy @ multiplied_out",
        "return 2 * dy @ multiplied_out",
        "moe_mlp/4-bit experts, adapters",
        shape=0,
        triton=False,
    ),
    Fault(
        "sum without weights",
        "moe",
        "weights[..., None]).sum(1)",
        "weights[..., None].square()).sum(1)",
        "moe_mlp/swiglu",
        triton=False,
    ),
    Fault(
        "pieces as high as one another",
        "sample",
        "scale)\n    return top, mass",
        "0)\n    return top, mass",
        "sample_tokens/all ids",
        2,
    ),
    Fault(
        "log-probability not scaled",
        "sample",
        "(chosen - highest) * scale",
        "(chosen - highest)",
        "sample_tokens/all ids",
    ),
    Fault(
        "order of negative numbers", "sample", "bits ^ 0xFFFFFFFF, bits", "bits, bits", "sample_tokens/top_p"
    ),
    Fault(
        "what reaches top_p dropped",
        "sample",
        "before >= top_p * total",
        "before + weight >= top_p * total",
        "sample_tokens/top_p",
    ),
    Fault("top_p of nothing", "sample", "elif TOP_P:", "elif P < 0:", "sample_tokens/top_k", 0),
    Fault("min_p ignored", "sample", "weight < min_p", "weight < 0 * min_p", "sample_tokens/top_k", 0),
    Fault(
        "least likely first",
        "sample",
        "tl.sort(keys, descending=True)",
        "tl.sort(keys)",
        "sample_tokens/top_k",
        0,
    ),
    Fault(
        "sum of what was dropped", "sample", "tl.where(k < n, weight, 0.0)", "weight", "sample_tokens/top_p"
    ),
    Fault(
        "first id of a block",
        "sample",
        "rest = (target -",
        "rest = (0 * target -",
        "sample_tokens/all ids",
        2,
        triton=False,
    ),
    Fault(
        "blocks before",
        "sample",
        "(reached - sums).gather",
        "(0 * sums).gather",
        "sample_tokens/all ids",
        2,
        triton=False,
    ),
    Fault(
        "min_p ignored",
        "sample",
        "likely < (min_p or 0.0)",
        "likely < 0.0",
        "sample_tokens/top_k",
        0,
        triton=False,
    ),
    Fault(
        "what reaches top_p dropped",
        "sample",
        "p.cumsum(-1) - p >= top_p",
        "p.cumsum(-1) >= top_p",
        "sample_tokens/top_p",
        triton=False,
    ),
]


def case_of(name: str, module) -> Case:
    case = next(c for c in CASES if c.name == name)
    if case.op == "lora_linear" and case.family in lora.PATHS:
        return replace(case, fused=partial(module._lora_linear, path=case.family))
    if case.op == "nf4_linear" and not hasattr(module, case.op):  # nf4 has the product from _four_bit
        op = _op.register("nf4_linear", module.product, nf4._linear_fake, nf4._save, nf4._differentiate)

        def planted(x, weight, bias):
            with patch.object(nf4, "_nf4", op):
                return nf4.nf4_linear(x, weight, bias)

        return replace(case, fused=four_bit(planted))
    if hasattr(module, "dequantize"):  # nf4 has it from _four_bit
        module.dequantize_nf4 = lambda w, dtype: module.dequantize(
            *w.tensors(), [*w.shape], w.blocksize, dtype
        )
    if case.op == "moe_mlp" and case.family.startswith("4-bit"):
        return replace(case, fused=with_4bit_experts(module.moe_mlp))
    if case.op == "lora_linears":
        return replace(case, fused=several(module.lora_linears))
    return replace(case, fused=WRAPPED.get(case.op, lambda op: op)(getattr(module, case.op)))


@pytest.mark.parametrize(
    "fault", [f for f in FAULTS if f.triton == TRITON], ids=lambda f: f"{f.file}: {f.name}"
)
def test_fault_is_caught(fault: Fault, device: str, copy_of: Callable[..., ModuleType]):
    case = case_of(fault.case, copy_of(fault.file, fault.old, fault.new))
    tensors = make_inputs(case, case.shapes[fault.shape], torch.float32, device, fault.scale)
    with pytest.raises(CAUGHT, match=f"{case.name}: .*(error|differs|expected)|AccessError"):
        assert_accurate(case, tensors)


@pytest.mark.slow
@pytest.mark.parametrize("file", sorted({f.file for f in FAULTS}))
def test_a_faithful_copy_passes(file: str, device: str, copy_of: Callable[..., ModuleType]):
    """Without this, a copy that does not even run would count as a fault caught."""
    module = copy_of(file)
    for name, shape, scale in {
        (f.case, f.shape, f.scale) for f in FAULTS if f.file == file and f.triton == TRITON
    }:
        case = case_of(name, module)
        assert_accurate(case, make_inputs(case, case.shapes[shape], torch.float32, device, scale))
