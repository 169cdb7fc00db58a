"""Sampling of a token from each row of logits: softmax, truncation and draw in one op. No gradient.

    support: all ids; or the top_k most likely ids, of these the fewest whose probability reaches top_p, and of these
        the ids with at least min_p times the probability of the most likely id
    u = logits / temperature, on the support
    token: the first id, in the support's order, at which the cumulative softmax of u exceeds a number in [0, 1)
    logprob = log softmax(u) of the token, its log-probability in the distribution that was sampled

Without truncation the support is in the order of the ids. With truncation the most likely id comes first, and of
equally likely ids the lower comes first (on a CPU, the order is that of torch.topk). The op returns the support, so its
size is bounded: if top_k is not given, top_p and min_p choose among the 1,024 most likely ids. The probabilities for
top_p are then those in the whole vocabulary; with top_k they are those among the ids that top_k keeps. Temperature 0
gives the most likely id, with its log-probability at temperature 1.

    p            0.05 0.4 0.3 0.15 0.1        top_p=0.8: 0.4 + 0.3 + 0.15 is the first sum to reach it
    support      1 2 3 -1 -1                  number 0.6: 0.4 / 0.85 < 0.6 < 0.7 / 0.85, so token 2

A radix select finds the width-th largest logit, where width is the size of the support. image(x) is a 32-bit number in
the order of the logits. Its bytes, from the highest, are digits d_1 d_2 ... in base 256. They are found one by one,
starting with room = width:

    count(d) = number of images that continue the digits so far with d        above(d) = sum over e > d of count(e)
    d_j = the largest d with above(d) + count(d) >= room                      room <- room - above(d_j)

Candidates are all images above d_1 d_2 ..., and `room` of the images equal to it, those with the lowest ids. The
candidates are sorted. top_p keeps candidate k if the probability of the candidates before it is below top_p, that is
sum_{l < k} p_l < top_p. So it always keeps at least one.

Memory, in elements. Without truncation, B V is read once, in pieces of 4,096 ids. Each piece leaves a maximum and a
sum, and the piece that holds the token is read again. With truncation, each row is read once for each digit (2 in bf16,
3 in fp16, 4 in fp32), once to collect the candidates, and once more to sum it if top_p is used without top_k. The
logits are never written in fp32. Eager code divides, exponentiates and adds up, which moves 6 B V. To truncate it sorts
the vocabulary.

No row depends on another, and grids depend on shapes alone: a row gets the same bits whatever else is in the batch.

Source: https://flashinfer.ai/2025/03/10/sampling.html for drawing by inverse transform in blocks, and Park et al. 2026,
https://arxiv.org/abs/2602.01518, for selecting in one program per row, without sorting the vocabulary; the rules: Fan
et al. 2018, https://arxiv.org/abs/1805.04833, Holtzman et al. 2019, https://arxiv.org/abs/1904.09751, Nguyen et al.
2024, https://arxiv.org/abs/2407.01082
"""

# A launch passes numbers where the kernel is annotated tl.constexpr:
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

import math

import torch
from torch import Tensor

from ._chip import (
    INTERPRET,
    cdiv,
    check_device,
    check_dtype,
    check_shape,
    next_power_of_2,
    readable,
    use_triton,
    whole_number,
)
from ._op import make_op
from ._triton import tl, triton
from .plain.sample import sample_tokens_cpu
from .records import Sampling

# ---- kernels

LN2 = tl.constexpr(0.6931471805599453)

# fmt: off


@triton.jit
def _pieces_of(top_ptr, sum_ptr, P, scale, BLOCK_P: tl.constexpr):
    # Returns each piece's highest logit [BLOCK_P], each piece's sum of exponentials relative to the row's highest logit
    # [BLOCK_P], and that logit (). For a row of -inf it is 0, because -inf - -inf would be NaN.
    p = tl.arange(0, BLOCK_P)
    at = tl.cast(tl.program_id(0), tl.int64) * P + p
    top = tl.load(top_ptr + at, p < P, other=float("-inf"))
    highest = tl.max(top, 0)
    highest = tl.where(highest > float("-inf"), highest, 0.0)
    mass = tl.load(sum_ptr + at, p < P, other=0.0) * tl.exp2((top - highest) * scale)
    return top, mass.to(tl.float64), highest


@triton.jit
def _sample_pieces(logits_ptr, top_ptr, sum_ptr, stride, V, scale, PIECE: tl.constexpr):
    b, piece = tl.program_id(0), tl.program_id(1)
    i = piece * PIECE + tl.arange(0, PIECE)
    x = tl.load(logits_ptr + tl.cast(b, tl.int64) * stride + i, i < V, other=float("-inf")).to(tl.float32)
    top = tl.max(x, 0)
    total = tl.sum(tl.exp2((x - tl.where(top > float("-inf"), top, 0.0)) * scale), 0)
    at = tl.cast(b, tl.int64) * tl.num_programs(1) + piece
    tl.store(top_ptr + at, top)
    tl.store(sum_ptr + at, total)


@triton.jit
def _sample_whole(
    logits_ptr, noise_ptr, top_ptr, sum_ptr, token_ptr, logprob_ptr, stride, V, P, scale,
    GREEDY: tl.constexpr, PIECE: tl.constexpr, BLOCK_P: tl.constexpr,
):
    # Finds the piece in which the cumulative sum exceeds the target, then the id in the piece. The piece's sum was
    # rounded to fp32, so the target inside the piece is a share of its sum. The last bits of sums depend on the order
    # of adding. Therefore the chosen piece and id must have a probability above 0, and if no such one exceeds the
    # target, it is the last one with a probability above 0.
    b, p = tl.program_id(0), tl.arange(0, BLOCK_P)
    top, mass, highest = _pieces_of(top_ptr, sum_ptr, P, scale, BLOCK_P)

    # the piece
    reached = tl.cumsum(mass, 0)
    total = tl.sum(tl.where(p == P - 1, reached, 0.0), 0)
    target = tl.load(noise_ptr + b) * total
    if GREEDY:
        piece = tl.minimum(tl.min(tl.where(top == tl.max(top, 0), p, P - 1), 0), P - 1)
    else:
        passing = tl.min(tl.where((reached > target) & (mass > 0), p, P - 1), 0)
        piece = tl.minimum(passing, tl.max(tl.where(mass > 0, p, 0), 0))

    # the rest of the target, as a share of the piece's mass
    piece_mass = tl.sum(tl.where(p == piece, mass, 0.0), 0)
    target = (target - tl.sum(tl.where(p == piece, reached - mass, 0.0), 0)) / piece_mass
    i = piece * PIECE + tl.arange(0, PIECE)
    x = tl.load(logits_ptr + tl.cast(b, tl.int64) * stride + i, i < V, other=float("-inf")).to(tl.float32)

    # the id
    if GREEDY:
        token = tl.min(tl.where(x == tl.max(x, 0), i, V - 1), 0)
    else:
        q = tl.exp2((x - highest) * scale)
        inside = tl.cumsum(q.to(tl.float64), 0)
        target *= tl.max(inside, 0)
        passing = tl.min(tl.where((inside > target) & (q > 0), i, V - 1), 0)
        token = tl.minimum(passing, tl.max(tl.where(q > 0, i, 0), 0))
    chosen = tl.sum(tl.where(i == token, x, 0.0), 0)
    tl.store(token_ptr + b, token.to(tl.int64))
    logprob = (chosen - highest) * scale - tl.log2(total.to(tl.float32))
    tl.store(logprob_ptr + b, logprob * LN2)


@triton.jit
def _image(x):
    # a uint32 in the order of the fp32 numbers; -0 equals 0, and NaN is above all
    bits = tl.where(x == 0, 0.0, x).to(tl.uint32, bitcast=True)
    image = tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    return tl.where(x == x, image, 0xFFC00000)


@triton.jit
def _images(row_ptr, start, V, BLOCK: tl.constexpr):
    i = start + tl.arange(0, BLOCK)
    return i, i < V, _image(tl.load(row_ptr + i, i < V, other=0.0).to(tl.float32))


@triton.jit
def _next_digit(row_ptr, V, threshold, room, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    # `threshold` has the digits above SHIFT of the wanted image, the room-th largest of the images with these digits.
    # Returns the threshold with the digit at SHIFT added, and the rank among the images that have this digit, too.
    digits = tl.arange(0, 256)
    counts = tl.zeros([256], tl.int32)  # how many images have each digit
    for start in range(0, V, BLOCK):
        _, agrees, image = _images(row_ptr, start, V, BLOCK)
        if SHIFT < 24:
            agrees = agrees & ((image ^ threshold) >> (SHIFT + 8) == 0)
        counts += tl.histogram((image >> SHIFT & 255).to(tl.int32), 256, agrees)

    # the largest digit with at least `room` images at or above it
    above = tl.cumsum(counts, 0, reverse=True) - counts  # how many images have a larger digit
    digit = tl.max(tl.where(above + counts >= room, digits, 0), 0)
    return threshold | (digit.to(tl.uint32) << SHIFT), room - tl.sum(tl.where(digits == digit, above, 0), 0)


@triton.jit
def _sample_select(logits_ptr, keys_ptr, stride, V, width, BLOCK: tl.constexpr, BYTES: tl.constexpr):
    # A candidate's key is an int64, its image above its reversed id, so keys sort as candidates do. The keys of a row
    # are stored in the order of their ids.
    row_ptr = logits_ptr + tl.cast(tl.program_id(0), tl.int64) * stride
    keys_ptr += tl.cast(tl.program_id(0), tl.int64) * width

    # the width-th largest image, digit by digit
    threshold, room = tl.full((), 0, tl.uint32), width
    for byte in tl.static_range(BYTES):
        threshold, room = _next_digit(row_ptr, V, threshold, room, 24 - 8 * byte, BLOCK)
    if BYTES < 4:  # the low bits, which only a wider dtype would have
        threshold |= tl.where(threshold >= 0x80000000, 0, (1 << 32 - 8 * BYTES) - 1).to(tl.uint32)

    # all larger images, and as many equal ones as there is room for, those with the lowest ids
    larger, equal = 0, 0  # counts so far
    for start in range(0, V, BLOCK):
        i, inside, image = _images(row_ptr, start, V, BLOCK)
        is_larger, is_equal = inside & (image > threshold), inside & (image == threshold)
        two_counts = is_larger.to(tl.int32) + (is_equal.to(tl.int32) << 16)  # both in one sum
        before = tl.cumsum(two_counts, 0) - two_counts
        equal_before = equal + (before >> 16)
        slot = larger + (before & 0xFFFF) + tl.minimum(equal_before, room)
        key = (image ^ 0x80000000).to(tl.int32, bitcast=True).to(tl.int64) << 32 | i.to(tl.int64) ^ 0xFFFFFFFF
        tl.store(keys_ptr + slot, key, is_larger | (is_equal & (equal_before < room)))
        sums = tl.sum(two_counts, 0)
        larger += sums & 0xFFFF
        equal += sums >> 16


@triton.jit
def _sample_sort(keys_ptr, width, BLOCK_K: tl.constexpr):
    k = tl.arange(0, BLOCK_K)
    keys_ptr += tl.cast(tl.program_id(0), tl.int64) * width
    keys = tl.load(keys_ptr + k, k < width, other=-0x8000000000000000)
    tl.store(keys_ptr + k, tl.sort(keys, descending=True), k < width)


@triton.jit
def _value(key):
    image = (key >> 32).to(tl.int32).to(tl.uint32, bitcast=True) ^ 0x80000000
    return tl.where(image >= 0x80000000, image ^ 0x80000000, image ^ 0xFFFFFFFF).to(tl.float32, bitcast=True)


@triton.jit
def _id(key):
    return ((key & 0xFFFFFFFF) ^ 0xFFFFFFFF).to(tl.int32)


@triton.jit
def _masses(keys_ptr, start, width, highest, scale, BLOCK_K: tl.constexpr):
    # places, keys and masses of BLOCK_K candidates from `start` on; a mass is exp(u) relative to the most likely id
    k = start + tl.arange(0, BLOCK_K)
    key = tl.load(keys_ptr + k, k < width, other=0)
    mass = tl.where(k < width, tl.exp2((_value(key) - highest) * scale), 0.0)
    return k, key, mass.to(tl.float64)


@triton.jit
def _sample_kept(
    keys_ptr, noise_ptr, top_ptr, sum_ptr, token_ptr, logprob_ptr, support_ptr, P, width, scale, top_p, min_p,
    TOP_P: tl.constexpr, MIN_P: tl.constexpr, WHOLE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):
    # The candidates are sorted, the most likely first. Both rules keep the first n of them.
    b = tl.program_id(0)
    keys_ptr += tl.cast(b, tl.int64) * width
    support_ptr += tl.cast(b, tl.int64) * width
    highest = _value(tl.load(keys_ptr))
    highest = tl.where(highest > float("-inf"), highest, 0.0)

    # the mass of which top_p is a share: that of the vocabulary, or that of all candidates
    total = tl.full((), 0, tl.float64)
    if WHOLE:
        total = tl.sum(_pieces_of(top_ptr, sum_ptr, P, scale, BLOCK_P)[1], 0)
    elif TOP_P:
        for start in range(0, width, BLOCK_K):
            k, key, mass = _masses(keys_ptr, start, width, highest, scale, BLOCK_K)
            total += tl.sum(mass, 0)

    # n is the first candidate that is too unlikely, or before which the mass already reaches top_p
    n = width
    if TOP_P or MIN_P:
        reached = tl.full((), 0, tl.float64)
        for start in range(0, width, BLOCK_K):
            k, key, mass = _masses(keys_ptr, start, width, highest, scale, BLOCK_K)
            if MIN_P:
                n = tl.minimum(n, tl.min(tl.where(mass < min_p, k, n), 0))
            if TOP_P:
                before = reached + tl.cumsum(mass, 0) - mass
                n = tl.minimum(n, tl.min(tl.where(before >= top_p * total, k, n), 0))
                reached += tl.sum(mass, 0)
        n = tl.maximum(n, 1)

    # the mass of the kept candidates
    total = tl.full((), 0, tl.float64)
    for start in range(0, width, BLOCK_K):
        k, key, mass = _masses(keys_ptr, start, width, highest, scale, BLOCK_K)
        total += tl.sum(tl.where(k < n, mass, 0.0), 0)

    # the draw, and the support
    target = tl.load(noise_ptr + b) * total
    reached = tl.full((), 0, tl.float64)
    passing, last = n - 1, 0  # as in _sample_whole
    for start in range(0, width, BLOCK_K):
        k, key, mass = _masses(keys_ptr, start, width, highest, scale, BLOCK_K)
        likely = (k < n) & (mass > 0)
        passes = (reached + tl.cumsum(mass, 0) > target) & likely
        passing = tl.minimum(passing, tl.min(tl.where(passes, k, passing), 0))
        last = tl.maximum(last, tl.max(tl.where(likely, k, 0), 0))
        reached += tl.sum(mass, 0)
        tl.store(support_ptr + k, tl.where(k < n, _id(key), -1), k < width)
    chosen = tl.load(keys_ptr + tl.minimum(passing, last))
    tl.store(token_ptr + b, _id(chosen).to(tl.int64))
    logprob = (_value(chosen) - highest) * scale - tl.log2(total.to(tl.float32))
    tl.store(logprob_ptr + b, logprob * LN2)

# fmt: on


# ---- launch

LOG2E = 1.4426950408889634
PIECE = 4096  # logits in a piece
SELECT = 4096  # logits read at a time
KEPT = 1024  # candidates read at a time
SORTED = 32 if INTERPRET else 1024  # the most keys that one program sorts; torch sorts longer rows
# the bytes of an image in which numbers of a dtype can differ
BYTES = {torch.float32: 4, torch.float16: 3, torch.bfloat16: 2}


def _sample(logits: Tensor, noise: Tensor, rules: Sampling) -> tuple[Tensor, Tensor, Tensor]:
    """Return token (B,), logprob (B,) and support (B, width), where width is 0 without truncation.

    Grids depend on shapes alone, so no row affects another.
    """
    B, V = logits.shape
    temperature, top_k, top_p, min_p = rules
    token, logprob, support = _shapes(logits, noise, rules)
    width = support.shape[1]  # 0: nothing is truncated
    if not B:
        return token, logprob, support
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    stride, scale = logits.stride(0), LOG2E / (temperature or 1.0)

    # the mass of each piece of the vocabulary
    pieces = cdiv(V, PIECE)
    block_p = next_power_of_2(pieces)
    whole = top_p is not None and top_k is None
    top = sums = None
    if whole or not width:
        top, sums = (logprob.new_empty(B, pieces) for _ in range(2))
        _sample_pieces[B, pieces](logits, top, sums, stride, V, scale, PIECE=PIECE, num_warps=8)
    if not width:
        tensors = logits, noise, top, sums, token, logprob
        blocks = {"PIECE": PIECE, "BLOCK_P": block_p, "num_warps": 8}
        _sample_whole[B,](*tensors, stride, V, pieces, scale, GREEDY=temperature == 0, **blocks)
        return token, logprob, support

    # the candidates, the most likely first
    keys = token.new_empty(B, width)
    blocks = {"BLOCK": SELECT, "BYTES": BYTES[logits.dtype], "num_warps": 8}
    _sample_select[B,](logits, keys, stride, V, width, **blocks)
    block_k = next_power_of_2(width)
    if block_k <= SORTED:
        _sample_sort[B,](keys, width, BLOCK_K=block_k, num_warps=4)
    else:
        keys = keys.sort(dim=-1, descending=True).values

    # the draw among those that the rules keep
    tensors = keys, noise, top, sums, token, logprob, support
    kept = {"TOP_P": top_p is not None, "MIN_P": min_p is not None, "WHOLE": whole}
    blocks = {"BLOCK_P": block_p, "BLOCK_K": min(block_k, KEPT), "num_warps": 4}
    _sample_kept[B,](*tensors, pieces, width, scale, top_p or 1.0, min_p or 0.0, **kept, **blocks)
    return token, logprob, support


def _shapes(logits: Tensor, noise: Tensor, rules: Sampling) -> tuple[Tensor, Tensor, Tensor]:
    B, V = logits.shape
    return (
        noise.new_empty(B, dtype=torch.int64),
        noise.new_empty(B, dtype=torch.float32),
        noise.new_empty(B, rules.width(V) or 0, dtype=torch.int32),
    )


_sample_op = make_op("sample_tokens", _sample, _shapes)


# ---- op

LEAST = 2.0**-126  # the least temperature above 0, a normal number in fp32


def sample_tokens(
    logits: Tensor,
    noise: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Draw a token from each row of logits. Return it with its log-probability and the ids among which it was drawn.

    logits: (B, V), V at least 1. An id at -inf is never drawn. A row with NaN or +inf, or with only -inf, gives some id
        of the vocabulary and logprob NaN.
    noise: (B,) fp64 in [0, 1). The same number draws the same token. Another number raises ValueError on a CPU. On a
        GPU, where a check would stall the device, it gives some id.
    temperature: finite, at least 0. At 0 the most likely id is taken, or the lowest of several. Its logprob is that at
        temperature 1, and there is no support.
    top_k: keep this number of most likely ids; V or more keeps all.
    top_p: in (0, 1], keep the fewest most likely ids whose probability reaches top_p.
    min_p: in [0, 1], keep the ids with at least min_p times the highest probability.

    Returns token (B,) int64, logprob (B,) in nats, fp32 (fp64 for fp64), and support (B, width) int32. The support has
        the most likely id first and is padded with -1. width is the smaller of V and top_k (1,024 without top_k). The
        support is None if nothing is truncated.
    On a GPU the lower of equally likely ids comes first and is kept; on a CPU torch.topk chooses. On a GPU a row gets
        the same bits whatever else is in the batch.
    Raises ValueError for other shapes, dtypes, devices and numbers, and NotImplementedError if a gradient is required.
    """
    if logits.dim() != 2 or logits.shape[1] < 1:
        raise ValueError(f"logits: expected (B, V) with V at least 1, got {tuple(logits.shape)}")
    check_dtype("logits", logits, torch.float32, torch.float16, torch.bfloat16, torch.float64)
    check_shape("noise", noise, B=logits.shape[0])
    check_device(logits, noise=noise)
    check_dtype("noise", noise, torch.float64)

    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature: expected a finite number of at least 0, got {temperature}")
    most = whole_number(top_k)
    if top_k is not None and (most is None or most < 1):
        raise ValueError(f"top_k: expected a whole number of at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected a number in (0, 1], got {top_p}")
    if min_p is not None and not 0 <= min_p <= 1:
        raise ValueError(f"min_p: expected a number in [0, 1], got {min_p}")

    if torch.is_grad_enabled() and logits.requires_grad:
        raise NotImplementedError(
            "sample_tokens: has no gradient; call it under torch.no_grad(), train through token_logprobs"
        )
    if readable(logits) and not ((noise >= 0) & (noise < 1)).all():
        raise ValueError("noise: expected numbers in [0, 1), got one outside")

    temperature = max(temperature, LEAST) if temperature else 0.0
    rules = Sampling.of(logits.shape[1], temperature, most, top_p, min_p)
    if not use_triton(logits):
        return sample_tokens_cpu(logits, noise, rules)
    check_dtype("logits", logits)
    token, logprob, support = _sample_op(logits, noise.contiguous(), rules)
    return token, logprob, None if rules.width(logits.shape[1]) is None else support
