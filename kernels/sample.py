"""Draw a token from each row of logits: softmax, truncation and the draw in one op. No gradient.

    u = logits / temperature, on the support: all ids, or the top_k most likely, and of these the fewest whose
        probability reaches top_p, less those below min_p times the most likely one's
    token: the first id, in the support's order, at which the cumulative softmax of u passes a number in [0, 1)
    logprob = log softmax(u) there, of the distribution that was sampled

The order is that of the ids without truncation; with it the most likely id comes first, and of equally likely ones the
lower (on a CPU as torch.topk has them). A support is recorded, so it has a bound: top_p and min_p without top_k choose
among the 1,024 most likely ids, where top_p's probabilities are of the whole vocabulary; after top_k they are of what
it left. Temperature 0 is the most likely id, with its log-probability at temperature 1.

    p            0.05 0.4 0.3 0.15 0.1        top_p=0.8: 0.4 + 0.3 + 0.15 is the first sum to reach it
    support      1 2 3 -1 -1                  number 0.6: 0.4 / 0.85 < 0.6 < 0.7 / 0.85, so token 2

Memory, in elements. Without truncation B V is read once, in pieces of 4,096 ids that leave a maximum and a sum each;
the piece in which the cumulative sum passes is read again. With it each row is read once for each byte of a number (2
in bf16, 4 in fp32: a radix select of the width-th largest), once to collect what is as large, and once more to sum all
of it for top_p without top_k. The logits are never written in fp32. Eager code divides, exponentiates and adds up, 6 B
V, and where it truncates sorts the vocabulary.

Nothing of a row depends on another, no grid on more than the shape: a row has the same bits whatever is beside it.

Source: https://flashinfer.ai/2025/03/10/sampling.html for drawing by inverse transform in blocks, and Park et al. 2026,
https://arxiv.org/abs/2602.01518, for selecting without a sort of the vocabulary in one program a row; the rules: Fan et
al. 2018, https://arxiv.org/abs/1805.04833, Holtzman et al. 2019, https://arxiv.org/abs/1904.09751, Nguyen et al. 2024,
https://arxiv.org/abs/2407.01082
"""

# A launch passes numbers where the kernel is annotated tl.constexpr:
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

import math

import torch
import torch.nn.functional as F
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
from ._op import register
from ._triton import tl, triton

TOP_P_WIDTH = 1024  # ids that top_p and min_p choose among without top_k

# ---- reference


def _width(
    V: int, temperature: float, top_k: int | None, top_p: float | None, min_p: float | None
) -> int | None:
    """How many ids a support has room for; None where nothing is truncated."""
    if temperature == 0 or (top_k is None and top_p is None and min_p is None):
        return None
    return min(top_k or TOP_P_WIDTH, V)


def sample_tokens_reference(
    logits: Tensor,
    noise: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))  # (B, V)
    top_k, top_p, min_p = _meant(x.shape[1], top_k, top_p, min_p)
    width = _width(x.shape[1], temperature, top_k, top_p, min_p)
    order = x.sort(dim=-1, descending=True, stable=True).indices  # (B, V)
    if temperature == 0:
        token = order[:, :1]
        return token.squeeze(1), x.log_softmax(-1).gather(1, token).squeeze(1), None
    u = (x - x.amax(-1, keepdim=True)) / temperature
    ids = torch.arange(x.shape[1], device=x.device).expand_as(x) if width is None else order[:, :width]
    kept = u.gather(1, ids)
    dropped = torch.zeros_like(ids, dtype=torch.bool)
    if top_p is not None:
        p = (u.softmax(-1).gather(1, ids) if top_k is None else kept.softmax(-1)).double()
        dropped |= p.cumsum(-1) - p >= top_p  # where the ids before this one suffice
    if min_p is not None:
        dropped |= (kept - kept[:, :1]).exp() < min_p
    logprobs = kept.masked_fill(dropped, -torch.inf).log_softmax(-1)
    reached = logprobs.double().exp().cumsum(-1)
    passes = reached > noise[:, None] * reached[:, -1:]
    chosen = passes.int().argmax(-1, keepdim=True)  # the first
    token, logprob = (values.gather(1, chosen).squeeze(1) for values in (ids, logprobs))
    return token, logprob, None if width is None else ids.masked_fill(dropped, -1).int()


# ---- CPU path

BLOCK = 128  # on a CPU: ids whose probabilities are summed before an id is looked for among them
NARROW = 1024  # ids; fewer are added up one by one
SMALL = 1e-30  # a temperature
LEAST = 2.0**-126  # a temperature above 0: what fp32 resolves


def _sample_cpu(
    logits: Tensor,
    noise: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What to draw from is selected before anything is exponentiated."""
    x = logits.to(torch.promote_types(logits.dtype, torch.float32)).contiguous()
    if temperature == 0:
        top, token = x.max(-1)  # the first
        return token, -(x - top[:, None]).exp_().sum(-1).log(), None
    width = _width(x.shape[1], temperature, top_k, top_p, min_p)
    if width is None:
        if temperature < SMALL:  # a quotient of the logits themselves would overflow
            x = x - x.amax(-1, keepdim=True)
        return *_invert(x if temperature == 1 else x / temperature, noise), None
    most, ids = x.topk(width)  # (B, width), most likely first
    u = (most - most[:, :1]) / temperature
    likely = u.exp()  # beside the most likely
    dropped = likely < (min_p or 0.0)
    if top_p is not None:
        among = likely if top_k is not None else (x - most[:, :1]).div_(temperature).exp_()
        p = (likely / among.sum(-1, keepdim=True)).double()
        dropped |= p.cumsum(-1) - p >= top_p
    chosen, logprob = _invert(u.masked_fill(dropped, -torch.inf), noise)
    return ids.gather(1, chosen[:, None]).squeeze(1), logprob, ids.masked_fill(dropped, -1).int()


def _invert(u: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Where the cumulative softmax of u (B, V) passes the noise (B,), and log softmax there, both (B,).

    Looked for among the sums of blocks first, where u is wide: one pass over it instead of a cumulative sum of it.
    """
    (B, V), blocks = u.shape, cdiv(u.shape[1], BLOCK)
    p = u.softmax(-1)
    if V <= NARROW:
        reached = p.cumsum(-1, dtype=torch.float64)
        total = reached[:, -1:]
        chosen = torch.searchsorted(reached, noise[:, None] * total, right=True).clamp_(max=V - 1)
        return chosen.squeeze(1), (p.gather(1, chosen) / total).log().to(u.dtype).squeeze(1)
    p = (F.pad(p, (0, blocks * BLOCK - V)) if V % BLOCK else p).view(B, blocks, BLOCK)
    sums = p.sum(-1).double()  # (B, blocks)
    reached = sums.cumsum(-1)
    total = reached[:, -1:]
    target = noise[:, None] * total  # (B, 1)
    # the first that passes has a sum above 0; only NaN logits pass nowhere
    block = torch.searchsorted(reached, target, right=True).clamp_(max=blocks - 1)
    inside = p.gather(1, block[:, :, None].expand(B, 1, BLOCK)).squeeze(1).cumsum(-1, dtype=torch.float64)
    # the sums were rounded: as far inside of the block as of its sum, past the ids of probability 0 at its start
    rest = (target - (reached - sums).gather(1, block)).clamp_(min=0)
    rest *= inside[:, -1:] / sums.gather(1, block)
    rest = torch.minimum(rest, torch.nextafter(inside[:, -1:], torch.zeros_like(total)))
    chosen = block * BLOCK + torch.searchsorted(inside, rest, right=True)
    chosen = chosen.clamp_(max=V - 1)  # (B, 1)
    logprob = (p.flatten(1).gather(1, chosen) / total).log()
    return chosen.squeeze(1), logprob.to(u.dtype).squeeze(1)


# ---- kernels


@triton.jit
def _pieces_of(top_ptr, sum_ptr, P, scale, BLOCK_P: tl.constexpr):
    # [BLOCK_P]: each piece's highest logit and sum of exponentials, taken relative to the row's highest, (), too. A row
    # of -inf takes 0 for it: -inf - -inf would be NaN.
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
):  # fmt: skip
    # The piece in which the cumulative sum passes, then the id in it, as far inside as of the piece's sum, which fp32
    # rounded. Sums of one row differ in their last bits by the order of adding: the first that passes must have a
    # probability, and where none does it is the last that has one.
    b, p = tl.program_id(0), tl.arange(0, BLOCK_P)
    top, mass, highest = _pieces_of(top_ptr, sum_ptr, P, scale, BLOCK_P)
    reached = tl.cumsum(mass, 0)
    total = tl.sum(tl.where(p == P - 1, reached, 0.0), 0)
    target = tl.load(noise_ptr + b) * total
    if GREEDY:
        piece = tl.minimum(tl.min(tl.where(top == tl.max(top, 0), p, P - 1), 0), P - 1)
    else:
        passing = tl.min(tl.where((reached > target) & (mass > 0), p, P - 1), 0)
        piece = tl.minimum(passing, tl.max(tl.where(mass > 0, p, 0), 0))
    here = tl.sum(tl.where(p == piece, mass, 0.0), 0)
    target = (target - tl.sum(tl.where(p == piece, reached - mass, 0.0), 0)) / here
    i = piece * PIECE + tl.arange(0, PIECE)
    x = tl.load(logits_ptr + tl.cast(b, tl.int64) * stride + i, i < V, other=float("-inf")).to(tl.float32)
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
    tl.store(logprob_ptr + b, logprob * 0.6931471805599453)


@triton.jit
def _image(x):
    # uint32 in the order of fp32; -0 is 0, and NaN is above all
    bits = tl.where(x == 0, 0.0, x).to(tl.uint32, bitcast=True)
    image = tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    return tl.where(x == x, image, 0xFFC00000)


@triton.jit
def _images(row_ptr, start, V, BLOCK: tl.constexpr):
    i = start + tl.arange(0, BLOCK)
    return i, i < V, _image(tl.load(row_ptr + i, i < V, other=0.0).to(tl.float32))


@triton.jit
def _next_byte(row_ptr, V, least, room, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    # `room` images that agree with `least` in the higher bytes are as large as the one that is looked for, or larger
    digits = tl.arange(0, 256)
    counts = tl.zeros([256], tl.int32)
    for start in range(0, V, BLOCK):
        _, counted, image = _images(row_ptr, start, V, BLOCK)
        if SHIFT < 24:
            counted = counted & ((image ^ least) >> (SHIFT + 8) == 0)
        counts += tl.histogram((image >> SHIFT & 255).to(tl.int32), 256, counted)
    above = tl.cumsum(counts, 0, reverse=True) - counts
    digit = tl.max(tl.where(above + counts >= room, digits, 0), 0)
    return least | (digit.to(tl.uint32) << SHIFT), room - tl.sum(tl.where(digits == digit, above, 0), 0)


@triton.jit
def _sample_select(logits_ptr, keys_ptr, stride, V, width, BLOCK: tl.constexpr, BYTES: tl.constexpr):
    # The width-th largest image, a byte at a time from the highest. Then everything above it, and of what equals it as
    # many as there is room for, the lowest ids first: a key is (image, id reversed), as an int64 in their order.
    row_ptr = logits_ptr + tl.cast(tl.program_id(0), tl.int64) * stride
    keys_ptr += tl.cast(tl.program_id(0), tl.int64) * width
    least, room = tl.full((), 0, tl.uint32), width
    for byte in tl.static_range(BYTES):
        least, room = _next_byte(row_ptr, V, least, room, 24 - 8 * byte, BLOCK)
    if BYTES < 4:  # the bits that only a wider number would have
        least |= tl.where(least >= 0x80000000, 0, (1 << 32 - 8 * BYTES) - 1).to(tl.uint32)
    larger, equal = 0, 0  # so far
    for start in range(0, V, BLOCK):
        i, inside, image = _images(row_ptr, start, V, BLOCK)
        is_larger, is_equal = inside & (image > least), inside & (image == least)
        both = is_larger.to(tl.int32) + (is_equal.to(tl.int32) << 16)  # two counts in one sum
        before = tl.cumsum(both, 0) - both
        equal_before = equal + (before >> 16)
        slot = larger + (before & 0xFFFF) + tl.minimum(equal_before, room)
        key = (image ^ 0x80000000).to(tl.int32, bitcast=True).to(tl.int64) << 32 | i.to(tl.int64) ^ 0xFFFFFFFF
        tl.store(keys_ptr + slot, key, is_larger | (is_equal & (equal_before < room)))
        sums = tl.sum(both, 0)
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
def _weights(keys_ptr, start, width, highest, scale, BLOCK_K: tl.constexpr):
    # [BLOCK_K], of the candidates from `start` on
    k = start + tl.arange(0, BLOCK_K)
    key = tl.load(keys_ptr + k, k < width, other=0)
    weight = tl.where(k < width, tl.exp2((_value(key) - highest) * scale), 0.0)
    return k, key, weight.to(tl.float64)


@triton.jit
def _sample_kept(
    keys_ptr, noise_ptr, top_ptr, sum_ptr, token_ptr, logprob_ptr, support_ptr, P, width, scale, top_p, min_p,
    TOP_P: tl.constexpr, MIN_P: tl.constexpr, WHOLE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Both rules keep a first part of the candidates: n of them.
    b = tl.program_id(0)
    keys_ptr += tl.cast(b, tl.int64) * width
    support_ptr += tl.cast(b, tl.int64) * width
    highest = _value(tl.load(keys_ptr))
    highest = tl.where(highest > float("-inf"), highest, 0.0)
    total = tl.full((), 0, tl.float64)
    if WHOLE:
        total = tl.sum(_pieces_of(top_ptr, sum_ptr, P, scale, BLOCK_P)[1], 0)
    elif TOP_P:
        for start in range(0, width, BLOCK_K):
            k, key, weight = _weights(keys_ptr, start, width, highest, scale, BLOCK_K)
            total += tl.sum(weight, 0)
    n = width
    if TOP_P or MIN_P:
        reached = tl.full((), 0, tl.float64)
        for start in range(0, width, BLOCK_K):
            k, key, weight = _weights(keys_ptr, start, width, highest, scale, BLOCK_K)
            if MIN_P:
                n = tl.minimum(n, tl.min(tl.where(weight < min_p, k, n), 0))
            if TOP_P:
                before = reached + tl.cumsum(weight, 0) - weight
                n = tl.minimum(n, tl.min(tl.where(before >= top_p * total, k, n), 0))
                reached += tl.sum(weight, 0)
        n = tl.maximum(n, 1)
    total = tl.full((), 0, tl.float64)
    for start in range(0, width, BLOCK_K):
        k, key, weight = _weights(keys_ptr, start, width, highest, scale, BLOCK_K)
        total += tl.sum(tl.where(k < n, weight, 0.0), 0)
    target = tl.load(noise_ptr + b) * total
    reached = tl.full((), 0, tl.float64)
    passing, last = n - 1, 0  # as in _sample_whole
    for start in range(0, width, BLOCK_K):
        k, key, weight = _weights(keys_ptr, start, width, highest, scale, BLOCK_K)
        likely = (k < n) & (weight > 0)
        passes = (reached + tl.cumsum(weight, 0) > target) & likely
        passing = tl.minimum(passing, tl.min(tl.where(passes, k, passing), 0))
        last = tl.maximum(last, tl.max(tl.where(likely, k, 0), 0))
        reached += tl.sum(weight, 0)
        tl.store(support_ptr + k, tl.where(k < n, _id(key), -1), k < width)
    chosen = tl.load(keys_ptr + tl.minimum(passing, last))
    tl.store(token_ptr + b, _id(chosen).to(tl.int64))
    logprob = (_value(chosen) - highest) * scale - tl.log2(total.to(tl.float32))
    tl.store(logprob_ptr + b, logprob * 0.6931471805599453)


# ---- autograd

LOG2E = 1.4426950408889634
PIECE = 4096  # logits
SELECT = 4096  # logits at a time
KEPT = 1024  # candidates at a time
SORTED = 32 if INTERPRET else 1024  # keys that one program sorts; torch sorts more
# of a number's image, what its dtype resolves
BYTES = {torch.float32: 4, torch.float16: 3, torch.bfloat16: 2}


def _sample(
    logits: Tensor,
    noise: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The support is (B, 0) where there is none. No grid and no tile depends on another row."""
    B, V = logits.shape
    width = _width(V, temperature, top_k, top_p, min_p)
    token, logprob, support = _sample_fake(logits, noise, temperature, top_k, top_p, min_p)
    if not B:
        return token, logprob, support
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    scale = LOG2E / (temperature or 1.0)
    pieces = cdiv(V, PIECE)
    block_p = next_power_of_2(pieces)
    whole = top_p is not None and top_k is None
    top = sums = None
    if width is None or whole:
        top, sums = (logprob.new_empty(B, pieces) for _ in range(2))
        _sample_pieces[B, pieces](logits, top, sums, logits.stride(0), V, scale, PIECE=PIECE, num_warps=8)
    if width is None:
        _sample_whole[B,](
            logits, noise, top, sums, token, logprob, logits.stride(0), V, pieces, scale,
            GREEDY=temperature == 0, PIECE=PIECE, BLOCK_P=block_p, num_warps=8,
        )  # fmt: skip
        return token, logprob, support
    keys = token.new_empty(B, width)
    _sample_select[B,](
        logits, keys, logits.stride(0), V, width, BLOCK=SELECT, BYTES=BYTES[logits.dtype], num_warps=8
    )
    block_k = next_power_of_2(width)
    if block_k <= SORTED:
        _sample_sort[B,](keys, width, BLOCK_K=block_k, num_warps=4)
    else:
        keys = keys.sort(dim=-1, descending=True).values
    _sample_kept[B,](
        keys, noise, top, sums, token, logprob, support, pieces, width, scale, top_p or 1.0, min_p or 0.0,
        TOP_P=top_p is not None, MIN_P=min_p is not None, WHOLE=whole, BLOCK_P=block_p,
        BLOCK_K=min(block_k, KEPT), num_warps=4,
    )  # fmt: skip
    return token, logprob, support


def _sample_fake(logits, noise, temperature, top_k, top_p, min_p) -> tuple[Tensor, Tensor, Tensor]:
    B, V = logits.shape
    width = _width(V, temperature, top_k, top_p, min_p)
    return (
        noise.new_empty(B, dtype=torch.int64),
        noise.new_empty(B, dtype=torch.float32),
        noise.new_empty(B, width or 0, dtype=torch.int32),
    )


_sample_op = register("sample_tokens", _sample, _sample_fake)


# ---- public op


def _meant(
    V: int, top_k: int | None, top_p: float | None, min_p: float | None
) -> tuple[int | None, float | None, float | None]:
    """None for what truncates nothing."""
    return None if top_k is None or top_k >= V else top_k, None if top_p == 1 else top_p, min_p or None


def sample_tokens(
    logits: Tensor,
    noise: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A token for each row, its log-probability, and the ids that it was drawn from.

    logits: (B, V), V at least 1. An id at -inf is never drawn. A row with NaN or +inf, or of -inf alone, gives some id
        of the vocabulary and NaN.
    noise: (B,) fp64 in [0, 1): the same number draws the same token. On a GPU, where looking would stall the device,
        another gives some id.
    temperature: finite. 0 is the most likely id, the lowest where several are, at temperature 1 and without a support.
    top_k: keep as many ids; V and more keep all.    top_p: in (0, 1].    min_p: in [0, 1].

    Returns token (B,) int64; logprob (B,) in nats, fp32 (fp64 for fp64); support (B, width) int32, most likely first,
        padded with -1, width the smaller of V and top_k (1,024 without top_k), or None where nothing is truncated.
    Of equally likely ids the lower comes first, and is kept, on a GPU; on a CPU torch.topk chooses among them. On a GPU
        a row has the same bits whatever else is in the batch.
    Raises ValueError for shapes, dtypes, devices and numbers other than these, NotImplementedError where a gradient is
        asked.
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
    how = temperature, *_meant(logits.shape[1], most, top_p, min_p)
    if not use_triton(logits):
        return _sample_cpu(logits, noise, *how)
    check_dtype("logits", logits)
    token, logprob, support = _sample_op(logits, noise.contiguous(), *how)
    return token, logprob, None if _width(logits.shape[1], *how) is None else support
