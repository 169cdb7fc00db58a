"""A frozen linear layer and the low-rank adapter that is trained beside it.

    out = gain (x W^T + scaling S B^T) + bias        S = drop(x) A^T        gain = 1, or with DoRA m / |W + scaling B A|

    g = gain dout                       dS = scaling g B        dB = scaling g^T S        dA = dS^T drop(x)
    dx = g W + drop(dS A)               dm = sum over rows of dout (x W^T + scaling S B^T) / |W + scaling B A|
    dbias = sum over rows of dout       W has no gradient, and DoRA's norm |W + scaling B A| counts as constant

Layers with the same x, such as q, k and v, are computed with one concatenated A: S = drop(x) [A1; A2; A3]^T, and
likewise dA and the dS A of all layers. So the adapters read x once forward and once backward, and write dx once.

drop(x) = x / (1 - p) where a hash of (seed, row, column) keeps the element, else 0. The backward computes the hash
again, so no mask is stored. The op saves x, S and two vectors of DoRA, and dequantises a 4-bit W again for dx. With
several adapters, row i uses the A and B that `adapter` names.

Memory, in elements, for x (M, K) and out (M, N): the product with W reads MK + NK and writes MN. Forward, the adapter
also reads MK, and reads and writes MN. Backward, it reads MN and MK twice, and reads and writes MK. Fusing the adapter
into the product with W would save this: at most 22 % of that product's time for M = K = N = 4096 on an H100.

Source: LoRA, Hu et al. 2021, https://arxiv.org/abs/2106.09685, equation 3; DoRA, Liu et al. 2024,
        https://arxiv.org/abs/2402.09353, equations 5 and 11; the hash: lowbias32 of
        https://github.com/skeeto/hash-prospector
"""

# A launch passes numbers where the kernel is annotated tl.constexpr:
# pyright: reportArgumentType=false, reportCallIssue=false

from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _lora_paths
from ._chip import (
    FLOATS,
    autocast_dtype,
    cdiv,
    check_device,
    check_dtype,
    check_number,
    check_shape,
    device_name,
    precision,
    use_triton,
)
from ._op import like_saved, make_op
from ._triton import tl, triton
from .low_rank import (
    _adapter_product,
    a_gradient,
    add_adapter_dx_,
    launch_ds_and_db,
    launch_expand,
    low_rank_forward,
    most_ranks,
    partial_sums_fit,
    rank_block,
)
from .nf4 import FEW_ROWS, dense_of, operand, product
from .plain import lora as plain
from .records import NF4Weight, Rows, Weight
from .tiles import LORA_FUSED, chip_of, row_of

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
    W = dense_of(Weight.of(weight), x.dtype)
    wide = torch.promote_types(x.dtype, W.dtype)
    rows, W, lora_a, lora_b = (t.to(wide) for t in (x.reshape(-1, x.shape[-1]), W, lora_a, lora_b))
    dropped = plain.drop(rows, dropout, _seed(seed, x)) if dropout else rows

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


def lora_linears_reference(
    x: Tensor,
    weights: Sequence[Tensor | NF4Weight],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scalings: Sequence[float],
    *,
    biases: Sequence[Tensor] | None = None,
    magnitudes: Sequence[Tensor] | None = None,
    adapter: Tensor | None = None,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
) -> list[Tensor]:
    vectors = (given or repeat(None, len(weights)) for given in (biases, magnitudes))
    each = zip(weights, lora_a, lora_b, scalings, *vectors, strict=True)
    shared: Any = {"adapter": adapter, "dropout": dropout, "seed": seed}
    return [
        lora_linear_reference(x, W, a, b, scaling, bias=bias, magnitude=magnitude, **shared)
        for W, a, b, scaling, bias, magnitude in each
    ]


def _seed(seed: int | Tensor | None, x: Tensor) -> Tensor:
    if seed is None:
        raise ValueError("seed: expected an int or a 0-d int64 tensor, for dropout above 0, got none")
    if isinstance(seed, Tensor):
        if seed.ndim or seed.dtype != torch.int64 or seed.device != x.device:
            raise ValueError(
                f"seed: expected a 0-d int64 tensor on {x.device}, got {seed.ndim}-d {seed.dtype} on {seed.device}"
            )
        return seed
    if isinstance(seed, float) or not -(1 << 63) <= seed < 1 << 63:
        raise ValueError(f"seed: expected an int of 64 bits, got {seed}")
    return torch.tensor(seed, dtype=torch.int64, device=x.device)


# ---- kernels

# fmt: off


@triton.jit
def _lora_fwd(
    x_ptr, w_ptr, s_ptr, b_ptr, adapter_ptr, gain_ptr, bias_ptr, out_ptr, M, N, K, R, adapters,
    stride_e, stride_n, stride_r, scaling,
    ADAPTERS: tl.constexpr, GAIN: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP: tl.constexpr,
):
    # out = gain (x W^T + scaling S B^T) + bias. GROUP rows of tiles run together and share a part of W in L2
    blocks_m, blocks_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    band = tl.program_id(0) // (GROUP * blocks_n)
    height = tl.minimum(blocks_m - band * GROUP, GROUP)
    in_band = tl.program_id(0) % (GROUP * blocks_n)
    rows = (band * GROUP + in_band % height).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = (in_band // height).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)

    # the accumulator starts with the adapter's product; add x W^T
    acc = scaling * _adapter_product(
        s_ptr, b_ptr, adapter_ptr, rows, cols, M, N, R, adapters, stride_e, stride_n, stride_r,
        ADAPTERS, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R,
    )
    for k in range(0, K, BLOCK_K):
        inner = k + tl.arange(0, BLOCK_K)
        x_live, w_live = (rows < M)[:, None] & (inner < K)[None, :], (inner < K)[:, None] & (cols < N)[None, :]
        x = tl.load(x_ptr + rows[:, None] * K + inner[None, :], x_live, other=0.0)
        w = tl.load(w_ptr + cols[None, :] * K + inner[:, None], w_live, other=0.0)  # [BLOCK_K, BLOCK_N]
        acc = tl.dot(x, w, acc, input_precision=PRECISION)

    if GAIN:
        acc *= tl.load(gain_ptr + cols, cols < N, other=0.0)[None, :]
    if BIAS:
        acc += tl.load(bias_ptr + cols, cols < N, other=0.0).to(tl.float32)[None, :]
    live = (rows < M)[:, None] & (cols < N)[None, :]
    tl.store(out_ptr + rows[:, None] * N + cols[None, :], acc.to(out_ptr.dtype.element_ty), live)


@triton.jit
def _dora_norm_fwd(
    w_ptr, a_ptr, b_ptr, norm_ptr, N, K, R, scaling, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):
    # the norm |W + scaling B A| of each row; the sum is not written to memory
    cols = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    squares = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for k in range(0, K, BLOCK_K):
        inner = k + tl.arange(0, BLOCK_K)

        # (B A) of the tile
        product = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        for r in range(0, R, BLOCK_R):
            ranks = r + tl.arange(0, BLOCK_R)
            b_live = (cols < N)[:, None] & (ranks < R)[None, :]
            b = tl.load(b_ptr + cols[:, None] * R + ranks[None, :], b_live, other=0.0)
            a_live = (ranks < R)[:, None] & (inner < K)[None, :]
            a = tl.load(a_ptr + ranks[:, None] * K + inner[None, :], a_live, other=0.0)
            product = tl.dot(b, a, product, input_precision=PRECISION)

        live = (cols < N)[:, None] & (inner < K)[None, :]
        w = tl.load(w_ptr + cols[:, None] * K + inner[None, :], live, other=0.0).to(tl.float32)
        w += scaling * product
        squares += w * w
    tl.store(norm_ptr + cols, tl.sqrt(tl.sum(squares, 1)), cols < N)


# fmt: on


# ---- launch

# "cublas": F.linear, then addmm in place, exactly the calls of the baseline. "epilogue": F.linear, then _expand_fwd.
# "fused": _lora_fwd. _lora_paths.py lists the fastest path of each measured shape. All other shapes take "cublas",
# which is never slower than the baseline.
PATHS = ("cublas", "epilogue", "fused")
FORCED_PATH = ""  # the path of every call of lora_linear; only benchmarks and tests set it


class Layer(NamedTuple):
    """A frozen linear layer and its adapter, or a stack of adapters from which each row of x uses one."""

    weight: Weight  # (N, K)
    a: Tensor  # (R, K), or (adapters, R, K)
    b: Tensor  # (N, R), or (adapters, N, R)
    bias: Tensor | None  # (N,)
    magnitude: Tensor | None  # (N,), DoRA's
    scaling: float
    path: str  # one of PATHS, or "" for the fastest measured path

    def without_bias(self) -> "Layer":
        return self if self.bias is None else Layer(*self[:3], None, *self[4:])


def _path(x: Tensor, layer: Layer) -> str:
    return layer.path or _measured_path(x, layer.b.shape)


def _measured_path(x: Tensor, shape: Sequence[int]) -> str:
    """Return the fastest measured path for x (M, K) and a B of shape (..., N, R), or "cublas" if none was measured."""
    device = device_name(x)
    if not device:
        return "cublas"
    (M, K), (N, R) = x.shape, shape[-2:]
    rows = 1 << max(M, 1).bit_length() - 1  # rounded down to a power of two, as in the table
    dtype = str(x.dtype).removeprefix("torch.")
    return _lora_paths.PATHS.get((device, dtype, rows, N, K, R), "cublas")


def _launch_fused(
    x: Tensor, W: Tensor, S: Tensor, layer: Layer, adapter: Tensor | None, gain: Tensor | None
) -> Tensor:
    """Compute gain (x W^T + scaling S B^T) + bias, (M, N), in one kernel. S is drop(x) A^T."""
    (M, K), b, bias = x.shape, layer.b, layer.bias
    N, R = b.shape[-2:]
    out = x.new_empty(M, N)
    if out.numel():
        kind = "fp32" if x.dtype == torch.float32 else "half"
        tile = row_of(LORA_FUSED, kind, chip_of(x))
        launch = _lora_fwd[(cdiv(M, tile.M) * cdiv(N, tile.N),)]
        sizes = M, N, K, R, b.shape[0], b.stride(0), b.stride(-2), b.stride(-1)
        given = adapter is not None, gain is not None, bias is not None
        blocks = {"BLOCK_R": rank_block(R, 16 if kind == "fp32" else 32), "GROUP": 8, **tile.launch()}
        tensors = x, W, S, b, adapter, gain, bias, out
        launch(*tensors, *sizes, layer.scaling, *given, precision(), **blocks)
    return out


def _launch_dora_norm(W: Tensor, layer: Layer) -> Tensor:
    """Compute DoRA's norm |W + scaling B A| of each row, (N,) fp32, in one kernel."""
    (N, K), R = W.shape, layer.a.shape[0]
    norm = W.new_empty(N, dtype=torch.float32)
    if N:
        blocks = 32, 64, rank_block(R, most_ranks(W))
        numbers = N, K, R, layer.scaling, precision()
        launch = _dora_norm_fwd[(cdiv(N, 32),)]
        launch(W, layer.a, layer.b, norm, *numbers, *blocks, num_warps=4, num_stages=2)
    return norm


def _dora_norm(W: Tensor, layer: Layer) -> Tensor:
    """Compute DoRA's norm |W + scaling B A| of each row, (N,), in fp32 or a wider dtype."""
    if use_triton(W):
        return _launch_dora_norm(W, layer)
    wide = torch.promote_types(W.dtype, torch.float32)
    with torch.autocast(W.device.type, enabled=False):
        A, B = layer.a.to(wide), layer.b.to(wide)
        return torch.addmm(W.to(wide), B, A, alpha=layer.scaling).norm(dim=1)


def _layer_forward(
    x: Tensor, S: Tensor, layer: Layer, adapter: Tensor | None, path: str
) -> tuple[Tensor, Tensor | None]:
    """Return the output (M, N) of one layer from x and S = drop(x) A^T, and DoRA's norm (N,), None without DoRA."""
    weight, _, b, bias, magnitude, scaling, _ = layer
    triton_path, norm, gain = use_triton(x), None, None

    # 1. x W^T: a 4-bit W is read as it is for few rows of x; without a gain the bias is added here
    few = weight.absmax is not None and x.shape[0] <= FEW_ROWS
    if few and triton_path and magnitude is None and path != "fused":
        out = product(x, weight, bias)
    else:
        W = dense_of(weight, x.dtype)
        if magnitude is not None:
            norm = _dora_norm(W, layer)
            gain = magnitude / norm
        if triton_path and path == "fused":
            return _launch_fused(x, W, S, layer, adapter, gain), norm
        out = F.linear(x, W, bias.to(x.dtype) if bias is not None and gain is None else None)
    if gain is None:
        bias = None

    # 2. the adapter's product, in place; then the gain, and the bias if it was not added
    if triton_path and not (gain is None and adapter is None and path == "cublas"):
        launch_expand(out, S, b, scaling, Rows(adapter, None, 0.0), gain, bias)
        return out, norm
    out.addmm_(plain.scattered(S, adapter, b.shape[0]), plain.wide_b(b).T, alpha=scaling)
    if gain is not None:
        out.mul_(gain)
    if bias is not None:
        out.add_(bias)
    return out, norm


def _forward(x: Tensor, layers: list[Layer], rows: Rows) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Return each layer's output (M, N), S = drop(x) A^T (M, sum of R), and the norm (N,) of each layer with DoRA."""
    paths, outs, norms = [_path(x, layer) for layer in layers], [], []
    S = low_rank_forward(x, torch.cat([layer.a for layer in layers], -2), rows, paths[0])
    for layer, share, path in zip(layers, _shares(S, layers), paths, strict=True):
        out, norm = _layer_forward(x, share, layer, rows.adapter, path)
        outs.append(out)
        if norm is not None:
            norms.append(norm)
    return outs, S, norms


def _shares(S: Tensor, layers: list[Layer]) -> Iterator[Tensor]:
    """Yield the columns of S (M, sum of R) that belong to each layer, as contiguous tensors."""
    return map(Tensor.contiguous, S.split([layer.b.shape[-1] for layer in layers], 1))


class _Saved(NamedTuple):
    x: Tensor
    S: Tensor
    norm: Tensor
    layer: Layer  # without its bias, which may change before the backward
    rows: Rows
    bias_dtype: torch.dtype | None


class _Gradients(NamedTuple):
    x: Tensor | None
    layer_a: Tensor | None
    layer_b: Tensor | None
    layer_bias: Tensor | None
    layer_magnitude: Tensor | None


class _AllSaved(NamedTuple):
    x: Tensor
    S: Tensor
    norms: list[Tensor]
    layers: list[Layer]  # as in _Saved
    rows: Rows
    bias_dtypes: list[int]  # indices into FLOATS; empty without biases


class _AllGradients(NamedTuple):
    x: Tensor | None
    layers_a: list[Tensor] | None
    layers_b: list[Tensor] | None
    layers_bias: list[Tensor] | None
    layers_magnitude: list[Tensor] | None


def _layer_backward(
    saved: _Saved, needs: Sequence[bool], dout: Tensor, dx: Tensor | None
) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Return dx with this layer's part added, dS (M, R), and the gradients of B, bias and magnitude, if needed."""
    x, S, norm, layer, (adapter, _, _), bias_dtype = saved
    weight, _, b, _, magnitude, scaling, _ = layer
    with_dx, with_dA, with_dB, with_dbias, with_dm = needs
    g = dout = dout.contiguous()
    adapters, B, dB, dbias, dm = b.shape[0], plain.wide_b(b), None, None, None
    W = dense_of(weight, x.dtype) if with_dx or with_dm else weight.data  # else W is not read

    # 1. through DoRA's gain
    if magnitude is not None:
        if with_dm:
            before = F.linear(x, W).addmm_(S, B.T, alpha=scaling)
            dm = ((dout.to(norm.dtype) * before).sum(0) / norm).to(magnitude.dtype)
        g = (dout * (magnitude / norm)).to(dout.dtype)

    # 2. through B: one pass over g, or two products
    one_pass = (with_dA or with_dB) and adapter is None and use_triton(x) and _path(x, layer) != "cublas"
    if one_pass and partial_sums_fit(*dout.shape, S.shape[1]):
        dS, dB = launch_ds_and_db(g, S, b, scaling)
    else:
        dS = plain.gathered(g @ B, adapter, adapters).mul_(scaling)  # (M, R)
        if with_dB:
            dB = (g.T @ plain.scattered(S, adapter, adapters)).mul_(scaling)  # (N, adapters R)
            if b.ndim == 3:
                dB = dB.view(b.shape[1], adapters, -1).transpose(0, 1).contiguous()

    # 3. through W, and the bias
    if with_dx:
        dx = g @ W if dx is None else dx.addmm_(g, W)
    if with_dbias:
        dbias = dout.sum(0, dtype=torch.promote_types(x.dtype, torch.float32)).to(bias_dtype)
    return dx, dS, dB if with_dB else None, dbias, dm


def _backward(saved: _AllSaved, needs: Any, douts: list[Tensor]) -> _AllGradients:
    x, S, norms, layers, rows, bias_dtypes = saved
    dx, dAs, found, norms = None, None, [], iter(norms)

    # 1. each layer: its g W in dx, and dS, which goes on to its A
    dtypes = [FLOATS[place] for place in bias_dtypes] or [None for _ in layers]
    for layer, share, dtype, dout in zip(layers, _shares(S, layers), dtypes, douts, strict=True):
        norm = S if layer.magnitude is None else next(norms)  # without DoRA the norm is not read
        dx, *others = _layer_backward(_Saved(x, share, norm, layer, rows, dtype), needs, dout, dx)
        found.append(others)

    # 2. the concatenated A of all layers, so that x is read once and dx written once
    all_dS, *others = zip(*found, strict=True)
    A, dS = torch.cat([layer.a for layer in layers], -2), torch.cat(all_dS, 1)
    if needs.layers_a:
        dA, ranks = a_gradient(dS, x, A, rows), [layer.a.shape[-2] for layer in layers]
        dAs = [part.clone() for part in dA.split(ranks, -2)]  # outputs of an op must not share memory
    if dx is not None:
        add_adapter_dx_(dx, dS, A, rows)
    wanted = zip(needs[2:], others, strict=True)
    return _AllGradients(dx, dAs, *([*grads] if need else None for need, grads in wanted))


def _shapes(x, layers, rows):
    M, wide = x.shape[0], torch.promote_types(x.dtype, torch.float32)
    outs = [x.new_empty(M, layer.b.shape[-2]) for layer in layers]
    S = x.new_empty(M, sum(layer.b.shape[-1] for layer in layers))
    norms = [x.new_empty(layer.b.shape[-2], dtype=wide) for layer in layers if layer.magnitude is not None]
    return outs, S, norms


def _save(outputs, x, layers, rows):
    dtypes = [FLOATS.index(layer.bias.dtype) for layer in layers if layer.bias is not None]
    return _AllSaved(x, *outputs[1:], [layer.without_bias() for layer in layers], rows, dtypes)


def _with_bias(layer: Layer, dtype: torch.dtype | None, dout: Tensor) -> Layer:
    return layer._replace(bias=dout.new_empty(dout.shape[1], dtype=dtype))


def _like_all_saved(saved, needs, douts):
    layers = [*map(_with_bias, saved.layers, (FLOATS[place] for place in saved.bias_dtypes), douts)]
    return like_saved(saved._replace(layers=layers or saved.layers), needs)


# A single layer has an op of its own, which calls the same functions. As a list of one layer, one row of x with a
# 576 x 576 W takes 1.6 times as long on a CPU, because lists are flattened and rebuilt.


def _one_forward(x: Tensor, layer: Layer, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output (M, N) of one layer, S = drop(x) A^T (M, R), and DoRA's norm (N,), empty without DoRA."""
    path = _path(x, layer)
    S = low_rank_forward(x, layer.a, rows, path)
    out, norm = _layer_forward(x, S, layer, rows.adapter, path)
    return out, S, _no_norm(x) if norm is None else norm


def _no_norm(x: Tensor) -> Tensor:
    return x.new_empty(0, dtype=torch.promote_types(x.dtype, torch.float32))


def _one_shapes(x, layer, rows):
    (out,), S, norms = _shapes(x, [layer], rows)
    return out, S, norms[0] if norms else _no_norm(x)


def _one_save(outputs, x, layer, rows):
    dtype = None if layer.bias is None else layer.bias.dtype
    return _Saved(x, *outputs[1:], layer.without_bias(), rows, dtype)


def _one_backward(saved: _Saved, needs: Any, dout: Tensor) -> _Gradients:
    x, layer, rows = saved.x, saved.layer, saved.rows
    dx, dS, dB, dbias, dm = _layer_backward(saved, needs, dout, None)
    dA = a_gradient(dS, x, layer.a, rows) if needs.layer_a else None
    if dx is not None:
        add_adapter_dx_(dx, dS, layer.a, rows)
    return _Gradients(dx, dA, dB, dbias, dm)


def _like_one_saved(saved, needs, dout):
    return like_saved(saved._replace(layer=_with_bias(saved.layer, saved.bias_dtype, dout)), needs)


_lora_linear = make_op("lora_linear", _one_forward, _one_shapes, _one_save, _one_backward, _like_one_saved)
_lora_linears = make_op("lora_linears", _forward, _shapes, _save, _backward, _like_all_saved)


def _check(x: Tensor, layer: Layer, adapter: Tensor | None, dropout: float) -> None:
    weight, lora_a, lora_b, bias, magnitude, scaling, _ = layer
    dense, in_4_bits = weight.data, weight.absmax is not None
    shape = weight.shape if in_4_bits else dense.shape
    if len(shape) != 2:
        raise ValueError(f"weight: expected shape (out, in), got {tuple(shape)}")
    N, K = shape
    if x.ndim == 0 or x.shape[-1] != K:
        raise ValueError(f"x: expected shape (..., in={K}), got {tuple(x.shape)}")
    if dense.requires_grad and torch.is_grad_enabled():
        raise ValueError("weight: expected requires_grad=False, got True; pass weight.detach()")

    if not 0 <= dropout < 1:
        raise ValueError(f"dropout: expected a share from 0 to below 1, got {dropout}")
    check_number("scaling", scaling)

    stack = {} if adapter is None or not lora_a.ndim else {"adapters": lora_a.shape[0]}
    R = lora_a.shape[-2] if lora_a.ndim > 1 else 1
    check_shape("lora_a", lora_a, **stack, rank=R, **{"in": K})
    check_shape("lora_b", lora_b, **stack, out=N, rank=R)
    if not R or 0 in stack.values():
        raise ValueError(
            f"lora_a: expected at least one adapter of rank 1 or more, got {tuple(lora_a.shape)}"
        )
    if use_triton(x) and R > 256:
        raise NotImplementedError(
            f"lora_a: expected rank 1 to 256, got {R}; merge the adapter into the weight"
        )

    check_device(
        x, weight=dense, lora_a=lora_a, lora_b=lora_b, bias=bias, magnitude=magnitude, adapter=adapter
    )
    check_dtype("x", x)

    if not in_4_bits:
        check_dtype("weight", dense, *FLOATS)
    check_dtype("lora_a", lora_a, *FLOATS)
    check_dtype("lora_b", lora_b, *FLOATS)
    for name, vector in (("bias", bias), ("magnitude", magnitude)):
        if vector is not None:
            check_shape(name, vector, out=N)
            check_dtype(name, vector, *FLOATS)
    if adapter is not None:
        check_shape("adapter", adapter, **{f"x.shape[{i}]": size for i, size in enumerate(x.shape[:-1])})
        check_dtype("adapter", adapter, torch.int64, torch.int32, torch.int16, torch.int8)
        if magnitude is not None:
            raise NotImplementedError("magnitude: expected none with `adapter`; call lora_linear for each")


def _rows(x: Tensor, adapter: Tensor | None, dropout: float, seed: int | Tensor | None) -> Rows:
    flat = None if adapter is None else adapter.reshape(-1).contiguous()
    return Rows(flat, _seed(seed, x) if dropout else None, float(dropout))


def _prepared(layer: Layer, dtype: torch.dtype) -> Layer:
    """Return the layer with contiguous tensors. W, A and B are cast to `dtype`, but a 4-bit W is not."""
    weight, a, b, bias, magnitude, scaling, path = layer
    if weight.absmax is None and (data := operand(weight.data, dtype)) is not weight.data:
        weight = Weight(data)
    return Layer(
        weight,
        operand(a, dtype),
        operand(b, dtype),
        None if bias is None else bias.contiguous(),
        None if magnitude is None else magnitude.contiguous(),
        float(scaling),
        path,
    )


# ---- op


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
    """Compute x W^T + scaling drop(x) A^T B^T + bias with a frozen W. For rsLoRA, scaling is alpha / sqrt(R).

    x: (..., in)    weight: (out, in), a tensor or 4-bit    lora_a: (R, in)    lora_b: (out, R)    bias: (out,)
    magnitude: (out,), for DoRA. Each output is multiplied by magnitude / |W + scaling B A| before the bias is added.
    adapter: (...) int, the adapter of each row, or -1 for none. With it lora_a is stacked as (adapters, R, in), and
        lora_b as (adapters, out, R). A wrong index raises ValueError on a CPU. Elsewhere the host does not check: such
        a row of the result is NaN, and its dx is NaN except where dropout hides x from the adapter.
    dropout: the share of x's elements that are hidden from the adapter.
    seed: an int or a 0-d int64 tensor, which determines the hidden elements. A CUDA graph would freeze an int.
    Returns (..., out) in x's dtype, in which the products are computed. If lora_b is 0, the result on a CPU has the
    bits of F.linear(x, weight, bias).
    Raises ValueError for other shapes and dtypes, a scaling that is not finite, and tensors on several devices.
    """
    layer = Layer(Weight.of(weight), lora_a, lora_b, bias, magnitude, scaling, FORCED_PATH)
    _check(x, layer, adapter, dropout)

    x = operand(x, autocast_dtype(x))
    flat = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    rows = _rows(x, adapter, dropout, seed)
    out, _, _ = _lora_linear(flat, _prepared(layer, x.dtype), rows)
    return out if x.ndim == 2 else out.view(*x.shape[:-1], out.shape[1])


def lora_linears(
    x: Tensor,
    weights: Sequence[Tensor | NF4Weight],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scalings: Sequence[float],
    *,
    biases: Sequence[Tensor] | None = None,
    magnitudes: Sequence[Tensor] | None = None,
    adapter: Tensor | None = None,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
) -> list[Tensor]:
    """Return [lora_linear(x, ...) for each layer], as for q, k and v, or gate and up. The adapters read x once.

    Each sequence among the arguments has one entry for each layer. Ranks may differ. The weights are all tensors, or
    all 4-bit in one format. With dropout, all adapters see the same elements of x.
    """
    count = len(weights)
    for name, given in (("lora_a", lora_a), ("lora_b", lora_b), ("scalings", scalings)):
        if len(given) != count:
            raise ValueError(f"{name}: expected one for each of {count} weights, got {len(given)}")
    for name, given in (("biases", biases), ("magnitudes", magnitudes)):
        if given is not None and (len(given) != count or any(vector is None for vector in given)):
            got = sum(vector is not None for vector in given)
            raise ValueError(f"{name}: expected none, or one for each of {count} weights, got {got}")

    vectors = (given or repeat(None, count) for given in (biases, magnitudes))
    each = zip(weights, lora_a, lora_b, *vectors, scalings, strict=True)
    layers = [Layer(Weight.of(weight), *rest, "") for weight, *rest in each]
    for layer in layers:
        _check(x, layer, adapter, dropout)
        if adapter is not None and layer.a.shape[0] != layers[0].a.shape[0]:
            sizes = [a.shape[0] for a in lora_a]
            raise ValueError(f"lora_a: expected as many stacked adapters in every layer, got {sizes}")
    if len({(layer.weight.blocksize, layer.weight.offset is None) for layer in layers}) != 1:
        raise ValueError(f"weights: expected at least one, all dense or all 4-bit of one format, got {count}")

    x = operand(x, autocast_dtype(x))
    flat = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    rows = _rows(x, adapter, dropout, seed)
    outs, _, _ = _lora_linears(flat, [_prepared(layer, x.dtype) for layer in layers], rows)
    return outs if x.ndim == 2 else [out.view(*x.shape[:-1], out.shape[1]) for out in outs]
