"""Token log-probabilities of a linear head, without its logits.

    z = hidden W^T + bias        s = softcap tanh(z / softcap)        u = s / temperature        p = softmax(u)

    lse = log sum_j exp(u_j)     logprob = u_y - lse                  entropy = lse - sum_j p_j u_j

    du_j = g_logprob [j = y] + p_j (g_lse - g_logprob - g_entropy (u_j - lse + entropy))
    dz   = du (1 - (s / softcap)^2) / temperature
    dhidden = dz W        dW = dz^T hidden        dbias = sum over tokens of dz

With a recorded support (the ids that a truncating sampler kept), the sums over j run over that row's support.

Memory, in elements: eager code writes (tokens, V) logits, their softmax and its gradient, and reads them again for
each of the head's products: about 8 tokens V. Here a block of them exists at a time. The vocabulary is walked in
chunks, a row's statistics are merged chunk by chunk, and the backward computes each block again: a fourth product.
A chunk of the vocabulary, unlike a chunk of tokens, owns its rows of dW: they come out of one product, accumulated in
fp32, and no second copy of dW is kept.

Source: the online softmax of Milakov and Gimelshein 2018, https://arxiv.org/abs/1805.02867
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._launch import check_shape

# ---- reference


def token_logprobs_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    support: Tensor | None = None,
    ignore_index: int = -100,
    memory_budget: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(
        hidden.dtype, torch.float32
    )  # fp64 stays fp64: gradients are checked by finite differences
    z = hidden.to(wide) @ weight.to(wide).T  # (tokens, vocabulary)
    if bias is not None:
        z = z + bias.to(wide)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    u = z / (temperature[:, None] if isinstance(temperature, Tensor) else temperature)
    kept = torch.ones_like(u, dtype=torch.bool)
    if support is not None:
        vocabulary = weight.shape[0]
        columns = torch.where(
            support < 0, vocabulary, support
        ).long()  # padding falls into one column too many
        kept = kept.new_zeros(u.shape[0], vocabulary + 1).scatter_(1, columns, True)[:, :vocabulary]
    lse = torch.logsumexp(u.masked_fill(~kept, -torch.inf), -1)
    log_p = torch.where(kept, u - lse[:, None], 0)
    entropy = -(torch.where(kept, log_p.exp(), 0) * log_p).sum(-1)
    trained = targets != ignore_index
    logprob = log_p.gather(1, targets.masked_fill(~trained, 0)[:, None])[:, 0]
    return tuple(torch.where(trained, x, 0) for x in (logprob, lse, entropy))


# ---- blocks of logits


class Head(NamedTuple):
    """What turns a hidden row into scaled logits."""

    weight: Tensor
    bias: Tensor | None
    temperature: float | Tensor
    softcap: float | None

    def temperature_of(self, rows: slice) -> float | Tensor:
        return self.temperature[rows, None] if isinstance(self.temperature, Tensor) else self.temperature

    def scale_(self, z: Tensor, rows: slice, bias: Tensor | None) -> Tensor:
        """Raw products in, u out, in place."""
        if bias is not None:
            z += bias
        if self.softcap is not None:
            z.div_(self.softcap).tanh_().mul_(self.softcap)
        temperature = self.temperature_of(rows)
        return z if isinstance(temperature, float) and temperature == 1 else z.div_(temperature)


class Upstream(NamedTuple):
    """Saved statistics and upstream gradients, each (tokens,); a gradient that nobody asked for is None."""

    lse: Tensor
    entropy: Tensor
    dlogprob: Tensor | None
    dlse: Tensor | None
    dentropy: Tensor | None

    def dlogits_(self, u: Tensor, rows: slice, column: Tensor, hit: Tensor | None, head: Head) -> Tensor:
        """u in, dz out, in place; column (rows,) is where the target stands in this block, if it does."""
        lse, entropy = self.lse[rows, None], self.entropy[rows, None]
        capped = None if head.softcap is None else u * head.temperature_of(rows)
        u -= lse
        slope = None if self.dentropy is None else (u + entropy).mul_(self.dentropy[rows, None])
        p = u.exp_()
        level = torch.zeros_like(lse)
        if self.dlse is not None:
            level = level + self.dlse[rows, None]
        if self.dlogprob is not None:
            level = level - self.dlogprob[rows, None]
        du = p.mul_(level) if slope is None else p.mul_(slope.neg_().add_(level))
        if self.dlogprob is not None:
            gain = self.dlogprob[rows] if hit is None else self.dlogprob[rows] * hit
            du.scatter_add_(1, column[:, None], gain[:, None].to(du.dtype))
        if capped is not None:
            du.mul_(capped.div_(head.softcap).square_().neg_().add_(1))
        temperature = head.temperature_of(rows)
        return du if isinstance(temperature, float) and temperature == 1 else du.div_(temperature)


def _slices(length: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def _blocks(tokens: int, vocabulary: int, elements: int, narrowest: int) -> tuple[list[slice], list[slice]]:
    """Cut (tokens, vocabulary) into blocks of about `elements`: all rows if `narrowest` columns then fit."""
    columns = min(vocabulary, max(narrowest, elements // max(tokens, 1)))
    columns = math.ceil(vocabulary / math.ceil(vocabulary / columns))
    return _slices(tokens, max(1, elements // columns)), _slices(vocabulary, columns)


# ---- the whole vocabulary, on the CPU

CPU_BUDGET = 2**23  # bytes; a block that stays in the last-level cache: larger ones are slower
CPU_NARROWEST = 256  # columns, below which the products slow down


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, softcap, ignore_index, memory_budget):
        head = Head(weight, bias, temperature, softcap)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        (tokens, _), vocabulary = hidden.shape, weight.shape[0]
        elements = memory_budget // (2 * wide.itemsize)  # a block and one temporary of its size
        ctx.blocks = _blocks(tokens, vocabulary, elements, CPU_NARROWEST)
        top = hidden.new_full((tokens,), torch.finfo(wide).min, dtype=wide)
        total, weighted, target_u = (hidden.new_zeros(tokens, dtype=wide) for _ in range(3))
        for columns in ctx.blocks[1]:
            w, b = _columns_of(head, columns, wide)
            for rows in ctx.blocks[0]:
                u = head.scale_(hidden[rows].to(wide) @ w.T, rows, b)  # (rows, columns)
                column, hit = _locate(targets[rows], columns)
                target_u[rows] += u.gather(1, column[:, None])[:, 0] * hit
                new_top = torch.maximum(top[rows], u.amax(-1))
                shift = top[rows] - new_top  # 0 or below
                u -= new_top[:, None]
                p = torch.exp(u)
                shrink = shift.exp()
                weighted[rows] = shrink * (weighted[rows] + shift * total[rows]) + (p * u).sum(-1)
                total[rows] = shrink * total[rows] + p.sum(-1)
                top[rows] = new_top
        lse = top + total.log()
        return _finish(
            ctx, hidden, head, targets, ignore_index, target_u - lse, lse, total.log() - weighted / total
        )

    @staticmethod
    @once_differentiable
    def backward(ctx, *upstream):
        hidden, targets, head, upstream, _ = _restore(ctx, upstream)
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        wide = upstream.lse.dtype
        dhidden = torch.zeros_like(hidden, dtype=wide) if need_hidden else None
        dweight = torch.empty_like(head.weight) if need_weight else None
        dbias = torch.zeros_like(head.bias) if need_bias else None
        for columns in ctx.blocks[1]:
            w, b = _columns_of(head, columns, wide)
            dw = None  # (columns, hidden)
            db = 0
            for rows in ctx.blocks[0]:
                h = hidden[rows].to(wide)
                u = head.scale_(h @ w.T, rows, b)
                dz = upstream.dlogits_(u, rows, *_locate(targets[rows], columns), head)
                if need_hidden:
                    dhidden[rows].addmm_(dz, w)
                if need_weight:
                    dw = dz.T @ h if dw is None else dw.addmm_(dz.T, h)
                if need_bias:
                    db = db + dz.sum(0)
            if need_weight:
                dweight[columns] = dw
            if need_bias:
                dbias[columns] = db
        return (None if dhidden is None else dhidden.to(hidden.dtype)), dweight, dbias, *[None] * 5


def _columns_of(head: Head, columns: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    return head.weight[columns].to(dtype), None if head.bias is None else head.bias[columns].to(dtype)


def _locate(targets: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Where each target stands in a chunk of the vocabulary, and whether it is in that chunk at all."""
    column = targets - columns.start
    return column.clamp(0, columns.stop - columns.start - 1), (targets >= columns.start) & (
        targets < columns.stop
    )


def _finish(ctx, hidden, head, targets, ignore_index, logprob, lse, entropy, support=None):
    """Zero what is ignored, and keep for the backward what it cannot compute again."""
    ctx.trained = targets != ignore_index
    ctx.softcap, ctx.temperature = head.softcap, head.temperature
    ctx.save_for_backward(hidden, targets, head.weight, head.bias, lse, entropy, support)
    ctx.set_materialize_grads(False)  # an output that no loss reads costs nothing in the backward
    narrow = torch.promote_types(hidden.dtype, torch.float32)
    return tuple(torch.where(ctx.trained, x, 0).to(narrow) for x in (logprob, lse, entropy))


def _restore(ctx, gradients):
    hidden, targets, weight, bias, lse, entropy, support = ctx.saved_tensors
    gradients = [None if g is None else torch.where(ctx.trained, g, 0) for g in gradients]
    head = Head(weight, bias, ctx.temperature, ctx.softcap)
    return hidden, targets, head, Upstream(lse, entropy, *gradients), support


# ---- a recorded support, on the CPU


class _Supported(torch.autograd.Function):
    """Rows of W are gathered: a support of 50 ids costs 50 products a token, whatever the vocabulary."""

    @staticmethod
    def forward(
        ctx, hidden, weight, bias, targets, support, temperature, softcap, ignore_index, memory_budget
    ):
        head = Head(weight, bias, temperature, softcap)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        tokens, width = support.shape
        ctx.rows = _slices(tokens, max(1, memory_budget // (2 * wide.itemsize * width * hidden.shape[1])))
        logprob, lse, entropy = (hidden.new_empty(tokens, dtype=wide) for _ in range(3))
        for rows in ctx.rows:
            u, column, _ = _supported_logits(hidden, head, targets, support, rows, wide)
            lse[rows] = torch.logsumexp(u, -1)
            log_p = u - lse[rows, None]
            logprob[rows] = log_p.gather(1, column[:, None])[:, 0]
            entropy[rows] = -torch.where(support[rows] < 0, 0, log_p.exp() * log_p).sum(-1)
        return _finish(ctx, hidden, head, targets, ignore_index, logprob, lse, entropy, support)

    @staticmethod
    @once_differentiable
    def backward(ctx, *upstream):
        hidden, targets, head, upstream, support = _restore(ctx, upstream)
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        wide = upstream.lse.dtype
        dhidden = torch.empty_like(hidden) if need_hidden else None
        dweight = torch.zeros_like(head.weight, dtype=wide) if need_weight else None
        dbias = torch.zeros_like(head.bias, dtype=wide) if need_bias else None
        for rows in ctx.rows:
            u, column, w = _supported_logits(hidden, head, targets, support, rows, wide)
            dz = upstream.dlogits_(u.masked_fill_(support[rows] < 0, 0), rows, column, None, head)
            dz.masked_fill_(support[rows] < 0, 0)
            ids = support[rows].clamp(min=0).flatten()
            if need_hidden:
                dhidden[rows] = (dz[:, None] @ w)[:, 0].to(hidden.dtype)
            if need_weight:
                dw = torch.mul(dz[:, :, None], hidden[rows, None].to(wide), out=w)  # (rows, K_max, hidden)
                dweight.index_add_(0, ids, dw.flatten(0, 1))
            if need_bias:
                dbias.index_add_(0, ids, dz.flatten())
        dweight = None if dweight is None else dweight.to(head.weight.dtype)
        return dhidden, dweight, None if dbias is None else dbias.to(head.bias.dtype), *[None] * 6


def _supported_logits(hidden, head, targets, support, rows, dtype):
    """u (rows, K_max), -inf where padded; the target's column; the gathered weight (rows, K_max, hidden)."""
    ids = support[rows].clamp(min=0)
    w = head.weight[ids].to(dtype)  # (rows, K_max, hidden)
    z = (w @ hidden[rows, :, None].to(dtype))[:, :, 0]
    u = head.scale_(z, rows, None if head.bias is None else head.bias[ids].to(dtype))
    column = (support[rows] == targets[rows, None]).int().argmax(-1)
    return u.masked_fill_(support[rows] < 0, -torch.inf), column, w


# ---- public op


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    support: Tensor | None = None,
    ignore_index: int = -100,
    memory_budget: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Score targets under softmax(softcap(hidden W^T + bias) / temperature), in nats, without the logits in memory.

    hidden: (tokens, hidden)    weight: (vocabulary, hidden)    targets: (tokens,) int    bias: (vocabulary,)
    temperature: above 0, a number or (tokens,); it gets no gradient.
    support: (tokens, K_max) int, distinct ids padded with -1. The sums run over them alone; the target is one.
    ignore_index: a row with this target gives 0, 0, 0 and passes no gradient.
    memory_budget: bytes that logits and their gradients may take at any time.

    Returns logprob, lse, entropy, each (tokens,) in fp32 (fp64 for fp64), each with its own gradient to hidden,
    weight and bias. A weight without requires_grad costs no product for dW.
    Raises ValueError for shapes that disagree and, on the CPU, for a target outside the vocabulary or its support.
    On CUDA, where looking would stall the device, such a row gives NaN.
    """
    if hidden.ndim != 2:
        raise ValueError(f"hidden: expected shape (tokens, hidden), got {tuple(hidden.shape)}")
    tokens = hidden.shape[0]
    if weight.ndim != 2 or weight.shape[0] == 0 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"weight: expected shape (vocabulary, hidden={hidden.shape[1]}), got {tuple(weight.shape)}"
        )
    check_shape("targets", targets, tokens=tokens)
    if bias is not None:
        check_shape("bias", bias, vocabulary=weight.shape[0])
    if isinstance(temperature, Tensor):
        check_shape("temperature", temperature, tokens=tokens)
        if temperature.requires_grad:
            raise ValueError("temperature: it has no gradient here; pass temperature.detach()")
    elif not temperature > 0:
        raise ValueError(f"temperature: expected a number above 0, got {temperature}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap: expected a number above 0, got {softcap}")
    if support is not None and (support.ndim != 2 or support.shape[0] != tokens or support.shape[1] == 0):
        raise ValueError(f"support: expected shape (tokens={tokens}, K_max), got {tuple(support.shape)}")
    for name, x in (("targets", targets), ("support", support)):
        if x is not None and x.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name}: expected int32 or int64, got {x.dtype}")
    if hidden.is_cuda:
        raise NotImplementedError("token_logprobs: not built for CUDA yet; move hidden and weight to the CPU")
    _check_ids(targets, support, weight.shape[0], ignore_index)
    targets = targets.long()
    budget = CPU_BUDGET if memory_budget is None else memory_budget
    if support is not None:
        return _Supported.apply(
            hidden, weight, bias, targets, support, temperature, softcap, ignore_index, budget
        )
    return _Dense.apply(hidden, weight, bias, targets, temperature, softcap, ignore_index, budget)


def _check_ids(targets: Tensor, support: Tensor | None, vocabulary: int, ignore_index: int) -> None:
    trained = targets != ignore_index
    wrong = trained & ((targets < 0) | (targets >= vocabulary))
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(f"targets: row {row} is {int(targets[row])}, outside a vocabulary of {vocabulary}")
    if support is None:
        return
    if (support >= vocabulary).any():
        raise ValueError(f"support: id {int(support.max())} is outside a vocabulary of {vocabulary}")
    missing = trained & ~(support == targets[:, None]).any(-1)
    if missing.any():
        row = int(missing.nonzero()[0])
        raise ValueError(f"support: row {row} does not hold its target {int(targets[row])}")
