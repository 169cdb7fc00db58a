"""A frozen linear layer and the low-rank adapter that is trained beside it.

    out = gain (x W^T + scaling S B^T) + bias        S = drop(x) A^T        gain = 1, or with DoRA m / |W + scaling B A|

    g = gain dout                       dS = scaling g B        dB = scaling g^T S        dA = dS^T drop(x)
    dx = g W + drop(dS A)               dm = sum over rows of dout (x W^T + scaling S B^T) / |W + scaling B A|
    dbias = sum over rows of dout       W has no gradient, nor, as DoRA has it, the norm in the gain

drop(x) = x / (1 - p) where a hash of (seed, row, column) says so, else 0: computed again in the backward, so that no
mask is kept. Saved are x, S and two vectors of DoRA; a base in 4 bits is multiplied out again for dx. With several
adapters, row i has the A and B that `adapter` names.

Memory, in elements, x (M, K), out (M, N): the base's product reads MK + NK and writes MN. Beside it, forward, the
adapter reads MK, reads and writes MN; backward it reads MN and MK twice, and reads and writes MK. Fused into the base's
product it would read and write nothing: at rank 16 and M = K = N = 4096 that is at most 15 % of the product's time.

Source: LoRA, Hu et al. 2021, https://arxiv.org/abs/2106.09685, equation 3; DoRA, Liu et al. 2024,
        https://arxiv.org/abs/2402.09353, equations 5 and 11; the hash: lowbias32 of
        https://github.com/skeeto/hash-prospector
"""

# A launch passes numbers where the kernel is annotated tl.constexpr:
# pyright: reportArgumentType=false, reportCallIssue=false

import torch
import torch.nn.functional as F
from torch import Tensor

from ._four_bit import NF4Weight, dequantize
from ._launch import check_shape, register

# ---- reference


def lora_linear_reference(
    x: Tensor,
    weight: Tensor | NF4Weight,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    *,
    bias: Tensor | None = None,
    magnitude: Tensor | None = None,
    adapter: Tensor | None = None,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    W = weight if isinstance(weight, Tensor) else _multiplied_out(weight, x.dtype)
    rows = x.reshape(-1, x.shape[-1])
    dropped = _drop(rows, dropout, _seed(seed, x)) if dropout else rows
    if adapter is None:
        low = dropped @ lora_a.T @ lora_b.T
    else:
        index = adapter.reshape(-1).long()
        a, b = lora_a[index.clamp(min=0)], lora_b[index.clamp(min=0)]  # (rows, R, K), (rows, N, R)
        low = (b @ (a @ dropped[:, :, None]))[:, :, 0].masked_fill((index < 0)[:, None], 0)
    out = rows @ W.T + scaling * low
    if magnitude is not None:
        out = out * (magnitude / (W + scaling * (lora_b @ lora_a)).detach().norm(dim=1))
    return (out if bias is None else out + bias).to(x.dtype).view(*x.shape[:-1], W.shape[0])


def _multiplied_out(weight: NF4Weight, dtype: torch.dtype) -> Tensor:
    return dequantize(*weight.tensors(), list(weight.shape), weight.blocksize, dtype)


def _seed(seed: int | Tensor | None, x: Tensor) -> Tensor:
    if seed is None:
        raise ValueError("seed: expected an int or a 0-d int64 tensor, for dropout above 0")
    return seed if isinstance(seed, Tensor) else torch.tensor(seed, dtype=torch.int64, device=x.device)


def _mix(h: Tensor) -> Tensor:
    """A permutation of 32 bits that looks random, in int32, whose products wrap and whose shifts keep the sign."""
    h = h ^ ((h >> 16) & 0xFFFF)
    h = h * 0x7FEB352D
    h = h ^ ((h >> 15) & 0x1FFFF)
    h = h * (0x846CA68B - (1 << 32))
    return h ^ ((h >> 16) & 0xFFFF)


def _drop(x: Tensor, dropout: float, seed: Tensor) -> Tensor:
    """(M, K): the elements whose hash is not below `dropout`, divided by 1 - dropout."""
    low, high = _mix(seed.int()), _mix((seed >> 32).int() ^ 0x2545F491)
    rows = _mix(torch.arange(x.shape[0], dtype=torch.int32, device=x.device) ^ low)
    columns = _mix(torch.arange(x.shape[1], dtype=torch.int32, device=x.device) ^ high)
    kept = ((_mix(rows[:, None] ^ columns) >> 8) & 0xFFFFFF) >= _threshold(dropout)
    return torch.where(kept, x * (1 / (1 - dropout)), 0)


def _threshold(dropout: float) -> int:
    return round(dropout * (1 << 24))


# ---- kernels


# ---- autograd


def _stacked(S: Tensor, adapter: Tensor | None, adapters: int) -> Tensor:
    """(M, R) -> (M, adapters R), zero but in the place of each row's adapter."""
    if adapter is None:
        return S
    mine = adapter[:, None] == torch.arange(adapters, device=S.device)  # (M, adapters)
    return (S[:, None] * mine[:, :, None]).flatten(1)


def _picked(S: Tensor, adapter: Tensor | None, adapters: int) -> Tensor:
    """(M, adapters R) -> (M, R), the place of each row's adapter; zero where it has none."""
    if adapter is None:
        return S
    index = adapter.long().clamp(min=0)[:, None, None].expand(-1, 1, S.shape[1] // adapters)
    own = S.view(len(S), adapters, -1).gather(1, index)[:, 0]
    return own.masked_fill((adapter < 0)[:, None], 0)


def _forward(
    x: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    code: Tensor | None,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    offset: Tensor | None,
    blocksize: int,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    magnitude: Tensor | None,
    adapter: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """x: (M, K). Returns out (M, N), S (M, R), and the norm (N,) of DoRA, empty without it."""
    W = _dense(x, weight, absmax, code, nested_absmax, nested_code, offset, blocksize, lora_b)
    A, B = _flat(lora_a, lora_b)
    adapters = lora_a.shape[0] if adapter is not None else 1
    dropped = x if seed is None else _drop(x, dropout, seed)
    S = _picked(dropped @ A.T, adapter, adapters)
    out = F.linear(x, W, bias if magnitude is None else None)
    out.addmm_(_stacked(S, adapter, adapters), B.T, alpha=scaling)
    norm = x.new_empty(0, dtype=torch.promote_types(x.dtype, torch.float32))
    if magnitude is not None:
        norm = _norm(W, A, B, scaling)
        out.mul_((magnitude / norm).to(out.dtype))
        if bias is not None:
            out.add_(bias)
    return out, S, norm


def _forward_fake(
    x, weight, absmax, code, nested_absmax, nested_code, offset, blocksize, lora_a, lora_b, bias, magnitude,
    adapter, seed, scaling, dropout,
):  # fmt: skip
    N, R = lora_b.shape[-2:]
    norm = x.new_empty(0 if magnitude is None else N, dtype=torch.promote_types(x.dtype, torch.float32))
    return x.new_empty(x.shape[0], N), x.new_empty(x.shape[0], R), norm


def _dense(x, weight, absmax, code, nested_absmax, nested_code, offset, blocksize, lora_b) -> Tensor:
    if absmax is None:
        return weight
    shape = [lora_b.shape[-2], x.shape[1]]
    return dequantize(
        weight, absmax, code, nested_absmax, nested_code, offset, shape, blocksize, x.dtype
    )  # fmt: skip


def _flat(lora_a: Tensor, lora_b: Tensor) -> tuple[Tensor, Tensor]:
    """Stacked adapters end to end: (adapters R, K) and (N, adapters R)."""
    if lora_a.ndim == 2:
        return lora_a, lora_b
    return lora_a.flatten(0, 1), lora_b.transpose(0, 1).flatten(1)


def _norm(W: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """(N,) |W + scaling B A|, at least in fp32."""
    wide = torch.promote_types(W.dtype, torch.float32)
    return torch.addmm(W.to(wide), B.to(wide), A.to(wide), alpha=scaling).norm(dim=1)


def _backward(
    dout: Tensor,
    x: Tensor,
    S: Tensor,
    norm: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    code: Tensor | None,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    offset: Tensor | None,
    blocksize: int,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor | None,
    adapter: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout: float,
    with_dx: bool,
    with_dlora: bool,
    with_dbias: bool,
    with_dmagnitude: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, dlora_a, dlora_b, dbias, dmagnitude, each empty where it is not asked for."""
    A, B = _flat(lora_a, lora_b)
    adapters = lora_a.shape[0] if adapter is not None else 1
    wide = norm.dtype
    dx, da, db, dbias, dm = (x.new_empty(0, dtype=t) for t in (x.dtype, x.dtype, x.dtype, x.dtype, wide))
    W = None
    if with_dx or with_dmagnitude:
        W = _dense(x, weight, absmax, code, nested_absmax, nested_code, offset, blocksize, lora_b)
    g = dout
    if with_dbias:
        dbias = dout.sum(0)
    if magnitude is not None:
        if with_dmagnitude:
            assert W is not None
            before = F.linear(x, W).addmm_(_stacked(S, adapter, adapters), B.T, alpha=scaling)
            dm = (dout.to(wide) * before).sum(0) / norm
        g = dout * (magnitude / norm).to(dout.dtype)
    dS = _stacked(_picked(g @ B, adapter, adapters).mul_(scaling), adapter, adapters)  # (M, adapters R)
    if with_dlora:
        dropped = x if seed is None else _drop(x, dropout, seed)
        da = (dS.T @ dropped).view(lora_a.shape)
        db = g.T @ _stacked(S, adapter, adapters)  # (N, adapters R)
        db = db.mul_(scaling)
        if lora_b.ndim == 3:
            db = db.view(db.shape[0], adapters, -1).transpose(0, 1).contiguous()
    if with_dx:
        assert W is not None
        dx = g @ W
        if seed is None:
            dx.addmm_(dS, A)
        else:
            dx.add_(_drop(dS @ A, dropout, seed))
    return dx, da, db, dbias, dm


def _backward_fake(
    dout, x, S, norm, weight, absmax, code, nested_absmax, nested_code, offset, blocksize, lora_a, lora_b, magnitude,
    adapter, seed, scaling, dropout, with_dx, with_dlora, with_dbias, with_dmagnitude,
):  # fmt: skip
    N = lora_b.shape[-2]
    return (
        x.new_empty(x.shape if with_dx else 0),
        lora_a.new_empty(lora_a.shape if with_dlora else 0),
        lora_b.new_empty(lora_b.shape if with_dlora else 0),
        x.new_empty(N if with_dbias else 0),
        norm.new_empty(N if with_dmagnitude else 0),
    )


def _save(ctx, inputs, output):
    x, *four_bit, lora_a, lora_b, _bias, magnitude, adapter, seed, scaling, dropout = inputs
    _out, S, norm = output
    *tensors, blocksize = four_bit
    ctx.save_for_backward(x, S, norm, *tensors, lora_a, lora_b, magnitude, adapter, seed)
    ctx.numbers = blocksize, scaling, dropout
    ctx.mark_non_differentiable(S, norm)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dout: Tensor | None, _dS: Tensor | None, _dnorm: Tensor | None):
    if dout is None:
        return (None,) * 16
    *tensors, lora_a, lora_b, magnitude, adapter, seed = ctx.saved_tensors
    blocksize, scaling, dropout = ctx.numbers
    needs = ctx.needs_input_grad
    with_dx, with_da, with_db, with_dbias, with_dm = needs[0], needs[8], needs[9], needs[10], needs[11]
    dx, da, db, dbias, dm = _lora_backward(
        dout.contiguous(), *tensors, blocksize, lora_a, lora_b, magnitude, adapter, seed, scaling, dropout,
        with_dx, with_da or with_db, with_dbias, with_dm,
    )  # fmt: skip
    return (
        dx if with_dx else None,
        *[None] * 7,
        da if with_da else None,
        db if with_db else None,
        dbias if with_dbias else None,
        dm.to(magnitude.dtype) if with_dm else None,
        *[None] * 4,
    )


_lora_backward = register("lora_linear_backward", _backward, _backward_fake)
_lora = register("lora_linear", _forward, _forward_fake, _save, _differentiate)


# ---- public op


def lora_linear(
    x: Tensor,
    weight: Tensor | NF4Weight,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    *,
    bias: Tensor | None = None,
    magnitude: Tensor | None = None,
    adapter: Tensor | None = None,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """x W^T + scaling drop(x) A^T B^T + bias, W frozen. rsLoRA is a scaling: alpha / sqrt(R).

    x: (..., in)    weight: (out, in), a tensor or 4-bit    lora_a: (R, in)    lora_b: (out, R)    bias: (out,)
    magnitude: (out,), DoRA: before the bias, the result is scaled by magnitude / |W + scaling B A| for each output.
    adapter: (...) int, for stacked lora_a (adapters, R, in) and lora_b (adapters, out, R): each row's own, -1 for none.
    dropout: share of x that the adapter does not see; which, follows from `seed`, an int or a 0-d int64 tensor (an int
        would freeze in a CUDA graph).

    Returns (..., out) in x's dtype, which the products are computed in. With lora_b = 0 the result on a CPU has the
    bits of F.linear(x, weight, bias).
    """
    if len(weight.shape) != 2:
        raise ValueError(f"weight: expected shape (out, in), got {tuple(weight.shape)}")
    N, K = weight.shape
    if x.ndim == 0 or x.shape[-1] != K:
        raise ValueError(f"x: expected shape (..., in={K}), got {tuple(x.shape)}")
    if isinstance(weight, Tensor) and weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("weight: it gets no gradient here; pass weight.detach()")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout: expected a share from 0 to below 1, got {dropout}")
    stack = {} if adapter is None else {"adapters": lora_a.shape[0]}
    R = lora_a.shape[-2] if lora_a.ndim > 1 else -1
    check_shape("lora_a", lora_a, **stack, rank=R, **{"in": K})
    check_shape("lora_b", lora_b, **stack, out=N, rank=R)
    for name, vector in (("bias", bias), ("magnitude", magnitude)):
        if vector is not None:
            check_shape(name, vector, out=N)
    if adapter is not None:
        check_shape("adapter", adapter, **{f"x.shape[{i}]": size for i, size in enumerate(x.shape[:-1])})
        if magnitude is not None:
            raise NotImplementedError("magnitude: not with several adapters; call lora_linear for each")
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    held = (weight.to(x.dtype), *[None] * 5, 0)
    if not isinstance(weight, Tensor):
        held = (*weight.tensors(), weight.blocksize)
    packed, absmax, code, nested_absmax, nested_code, offset, blocksize = held
    out, _, _ = _lora(
        x.reshape(-1, K).contiguous(), packed, absmax, code, nested_absmax, nested_code, offset, blocksize,
        lora_a.to(x.dtype).contiguous(), lora_b.to(x.dtype).contiguous(),
        None if bias is None else bias.to(x.dtype), magnitude,
        None if adapter is None else adapter.reshape(-1).contiguous(),
        _seed(seed, x) if dropout else None, float(scaling), float(dropout),
    )  # fmt: skip
    return out.view(*x.shape[:-1], N)
