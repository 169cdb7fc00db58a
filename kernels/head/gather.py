"""Products of each token's hidden state with a few rows of a head, those of the ids that the token lists.

The ids of a token are its recorded support, which a truncating sampler kept. The products are their logits.

    v = ids_tk        z_tk = hidden_t . W_v        dhidden_t = sum_k dz_tk W_v        dW_v = sum_tk dz_tk hidden_t

50 ids cost 50 products per token, whatever the size of the vocabulary.

Memory, in elements: rows of W are read in place, tokens K_max C for the forward and again for dhidden. dW reads as many
elements of hidden, and is written once, in the order of the sorted ids.
"""

# Triton's launches are opaque to pyright
# pyright: reportArgumentType=false, reportCallIssue=false

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._chip import cdiv, next_power_of_2, use_triton
from .._op import like_saved, make_op
from .._triton import tl, triton
from ..plain.logprob import Scores, score
from .blocks import slices
from .inputs import HeadInputs, low_rank, scaled

# ---- kernels

# fmt: off


@triton.jit
def _gathered_fwd(h_ptr, w_ptr, ids_ptr, z_ptr, K, C, V, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr):
    # an id outside the vocabulary gives NaN, and padding gives 0
    row = tl.program_id(0).to(tl.int64)
    ks = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    ids = tl.load(ids_ptr + row * K + ks, ks < K, other=-1).to(tl.int64)  # [BLOCK_K]
    z = tl.zeros([BLOCK_K], tl.float32)
    for block in range(0, C, BLOCK_C):
        cols = block + tl.arange(0, BLOCK_C)
        h = tl.load(h_ptr + row * C + cols, cols < C, other=0.0).to(tl.float32)  # [BLOCK_C]
        mask = ((ids >= 0) & (ids < V))[:, None] & (cols < C)[None, :]
        w = tl.load(w_ptr + ids[:, None] * C + cols[None, :], mask, other=0.0).to(tl.float32)  # [K, C]
        z += tl.sum(w * h[None, :], 1)
    tl.store(z_ptr + row * K + ks, tl.where(ids < V, z, float("nan")), ks < K)


@triton.jit
def _gathered_dhidden(dz_ptr, w_ptr, ids_ptr, dh_ptr, K, C, V, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    dh = tl.zeros([BLOCK_C], tl.float32)
    for block in range(0, K, BLOCK_K):
        ks = block + tl.arange(0, BLOCK_K)
        ids = tl.load(ids_ptr + row * K + ks, ks < K, other=-1).to(tl.int64)  # [BLOCK_K]
        dz = tl.load(dz_ptr + row * K + ks, ids >= 0, other=0.0)
        mask = ((ids >= 0) & (ids < V))[:, None] & (cols < C)[None, :]
        w = tl.load(w_ptr + ids[:, None] * C + cols[None, :], mask, other=0.0).to(tl.float32)  # [K, C]
        dh += tl.sum(w * dz[:, None], 0)
    tl.store(dh_ptr + row * C + cols, dh, cols < C)


@triton.jit
def _gathered_dweight(
    dz_ptr, h_ptr, pair_ptr, bound_ptr, dw_ptr, K, C, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr
):
    # after sorting, an id's (token, k) pairs are neighbours; they are summed in their order, without atomics
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    stop = tl.load(bound_ptr + row + 1)
    dw = tl.zeros([BLOCK_C], tl.float32)
    for block in range(tl.load(bound_ptr + row), stop, BLOCK_K):
        pairs = block + tl.arange(0, BLOCK_K)
        pair = tl.load(pair_ptr + pairs, pairs < stop, other=0)  # [BLOCK_K]
        dz = tl.load(dz_ptr + pair, pairs < stop, other=0.0)
        mask = (pairs < stop)[:, None] & (cols < C)[None, :]
        h = tl.load(h_ptr + (pair // K)[:, None] * C + cols[None, :], mask, other=0.0).to(tl.float32)
        dw += tl.sum(h * dz[:, None], 0)
    tl.store(dw_ptr + row * C + cols, dw, cols < C)

# fmt: on


# ---- launch


class _Saved(NamedTuple):
    hidden: Tensor
    weight: Tensor
    ids: Tensor
    memory_budget: int


class _Gradients(NamedTuple):
    hidden: Tensor | None
    weight: Tensor | None


def _forward(hidden: Tensor, weight: Tensor, ids: Tensor, memory_budget: int) -> Tensor:
    """Return z (tokens, K_max), the products of each row with the rows of weight that its ids name.

    Padding (-1) gives 0. On the Triton path an id outside the vocabulary gives NaN, and passes no gradient to weight.
    """
    (tokens, K), C = ids.shape, hidden.shape[1]
    z = _shapes(hidden, weight, ids, memory_budget)
    if use_triton(hidden):
        grid, V = (tokens, cdiv(K, 16)), weight.shape[0]
        if tokens:
            _gathered_fwd[grid](hidden, weight, ids, z, K, C, V, BLOCK_K=16, BLOCK_C=128)
        return z

    for rows in _row_blocks(ids, C, z.itemsize, memory_budget):
        w = weight[ids[rows].clamp(min=0)].to(z.dtype)  # (rows, K_max, C)
        z[rows] = (w @ hidden[rows, :, None].to(z.dtype))[:, :, 0].masked_fill_(ids[rows] < 0, 0)
    return z


def _shapes(hidden, weight, ids, memory_budget):
    return hidden.new_empty(ids.shape, dtype=torch.promote_types(hidden.dtype, torch.float32))


def _row_blocks(ids: Tensor, C: int, itemsize: int, memory_budget: int) -> list[slice]:
    return slices(ids.shape[0], max(1, memory_budget // (2 * itemsize * ids.shape[1] * C)))


def _save(outputs, hidden, weight, ids, memory_budget):
    return _Saved(hidden, weight, ids, memory_budget)


def _backward(saved: _Saved, needs: Any, dz: Tensor) -> _Gradients:
    hidden, weight = saved.hidden, saved.weight
    dhidden = hidden.new_empty(hidden.shape) if needs.hidden else None
    dweight = weight.new_empty(weight.shape) if needs.weight else None
    (_backward_triton if use_triton(hidden) else _backward_cpu)(saved, dz.contiguous(), dhidden, dweight)
    return _Gradients(dhidden, dweight)


def _backward_triton(saved: _Saved, dz: Tensor, dhidden: Tensor | None, dweight: Tensor | None) -> None:
    """Write the gradients into dhidden and dweight. A gradient that is None is skipped."""
    hidden, weight, ids, _ = saved
    (tokens, K), (V, C) = ids.shape, weight.shape
    tile = {"BLOCK_K": 8, "BLOCK_C": min(1024, next_power_of_2(C)), "num_warps": 8}
    columns = cdiv(C, tile["BLOCK_C"])
    if dhidden is not None and tokens:
        _gathered_dhidden[(tokens, columns)](dz, weight, ids, dhidden, K, C, V, **tile)

    # the (token, k) pairs in the order of their ids; the pairs of id v are those from bounds[v] to bounds[v + 1]
    if dweight is not None:
        named, pairs = torch.where(ids < 0, V, ids).flatten().sort(stable=True)
        bounds = torch.searchsorted(named, torch.arange(V + 1, device=ids.device, dtype=ids.dtype))
        _gathered_dweight[(V, columns)](dz, hidden, pairs, bounds, dweight, K, C, **tile)


def _backward_cpu(saved: _Saved, dz: Tensor, dhidden: Tensor | None, dweight: Tensor | None) -> None:
    """Write the gradients into dhidden and dweight. A gradient that is None is skipped."""
    hidden, weight, ids, memory_budget = saved
    total = None if dweight is None else torch.zeros_like(dweight, dtype=dz.dtype)
    for rows in _row_blocks(ids, weight.shape[1], dz.itemsize, memory_budget):
        names, d = ids[rows].clamp(min=0), dz[rows].masked_fill(ids[rows] < 0, 0)
        if dhidden is not None:
            dhidden[rows] = (d[:, None] @ weight[names].to(dz.dtype))[:, 0].to(hidden.dtype)
        if total is not None:
            pairs = d[:, :, None] * hidden[rows, None].to(dz.dtype)  # (rows, K_max, C)
            total.index_add_(0, names.flatten(), pairs.flatten(0, 1))
    if dweight is not None:
        dweight.copy_(total)


_products = make_op("gathered_products", _forward, _shapes, _save, _backward, like_saved)


def score_support(
    inputs: HeadInputs,
    temperature: float | Tensor,
    targets: Tensor,
    support: Tensor,
    ignore_index: int,
    memory_budget: int,
) -> Scores:
    """Return logprob, lse and entropy, (tokens,) each, under a softmax over the ids of support (tokens, K_max) only.

    On CUDA, a target that is not in its row's support has logprob NaN.
    """
    hidden, weight, bias, lora_a, lora_b, scaling, softcap = inputs
    ids = support.contiguous()
    z = _products(hidden.contiguous(), weight.contiguous(), ids, memory_budget)  # (tokens, K_max)
    if lora_a is not None and lora_b is not None:
        low = low_rank(hidden, lora_a, scaling)
        z = z + _products(low.contiguous(), lora_b.contiguous(), ids, memory_budget)
    bias = None if bias is None else bias.to(z.dtype)[ids.clamp(0, weight.shape[0] - 1)]
    u = scaled(z, bias, temperature, softcap)

    trained = targets != ignore_index
    is_target = ids == targets[:, None]
    logprob, lse, entropy = score(u, is_target.int().argmax(-1), trained, ids >= 0)
    return torch.where(is_target.any(-1) | ~trained, logprob, torch.nan), lse, entropy
