"""Quantisation to 4 bits in plain torch: the codes, the rounding, and the dequantisation on a CPU.

    nibble = the place of w / absmax among the midpoints of the sorted code; on a midpoint, the smaller value
    byte = the place of (absmax - offset) / nested_absmax among the midpoints of the nested code, if absmax is quantised

Source: the constants and each rounding are those of https://github.com/bitsandbytes-foundation/bitsandbytes 0.50.2
"""

from dataclasses import replace
from functools import cache
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from ..records import NESTED, NF4Weight, Weight

# bit for bit the values in bitsandbytes' files; the quantiles by their definition differ by up to 2e-7
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
FP4 = tuple(v / 12 for v in (0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3))
# The nibbles sorted by value. FP4 has two zeros: bitsandbytes 0.50.2 picks 0 before 8 on a CPU, and by the sign of the
# weight in its CUDA code
ORDER = {"nf4": tuple(range(16)), "fp4": (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3)}


# ---- codes


@cache
def code_of(quant_type: str, device: torch.device) -> Tensor:
    """Return the code (16,), the values of the 16 nibbles."""
    return torch.tensor(NF4 if quant_type == "nf4" else FP4, device=device)


@cache
def nested_code_on(device: torch.device) -> Tensor:
    """Return the nested code (256,), the sorted values to which an 8-bit absmax is rounded.

    They are 0, 1, and evenly spaced values of both signs in each of seven decades, from 1e-7..1e-6 to 0.1..1. Each
    decade has twice as many values as the decade below it.

    Source: Dettmers 2016, https://arxiv.org/abs/1511.04561, the dynamic tree of 8 bits
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        means = (edges[:-1] + edges[1:]) / 2
        scaled = 10.0 ** (exponent - 6) * means
        values += scaled.tolist() + (-scaled).tolist()
    return torch.tensor(sorted(values), device=device)


@cache
def midpoints_of(quant_type: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the 15 midpoints between the sorted values of a code, and the nibble of each of the 16 intervals."""
    order = torch.tensor(ORDER[quant_type], device=device)
    code = code_of(quant_type, device)[order]
    return (code[:-1] + code[1:]) / 2, order.to(torch.uint8)


# ---- rounding


def round_to_nibbles(weight: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
    """Round a weight to 4 bits. Returns packed (numel / 2,) uint8 and absmax (blocks,)."""
    flat = weight.detach().reshape(-1).float()
    whole = flat.numel() // blocksize * blocksize
    blocks, rest = flat[:whole].view(-1, blocksize), flat[whole:]

    # the format's rounding: a product with the reciprocal, but a quotient in a last block that is cut short
    absmax = blocks.abs().amax(1)
    scaled = (blocks * (1 / absmax.clamp(min=1e-38))[:, None]).flatten()
    if rest.numel():
        most = rest.abs().amax().clamp(min=1e-38)
        absmax, scaled = torch.cat((absmax, most[None])), torch.cat((scaled, rest / most))

    midpoints, order = midpoints_of(quant_type, weight.device)
    nibbles = order[torch.bucketize(scaled.clamp(-1, 1), midpoints, out_int32=True)]
    if nibbles.numel() % 2:  # the last byte is filled with the nibble of 0
        nibbles = torch.cat((nibbles, order[torch.bucketize(torch.zeros_like(scaled[:1]), midpoints)]))
    return (nibbles[::2] << 4) | nibbles[1::2], absmax


def with_nested_absmax(weight: NF4Weight) -> NF4Weight:
    """Return the weight with its absmax quantised to 8 bits."""
    absmax = weight.absmax
    offset = absmax.mean() if absmax.numel() else absmax.new_zeros(())
    centred, nested_code = absmax - offset, nested_code_on(absmax.device)
    padded = F.pad(centred, (0, -centred.numel() % NESTED)).view(-1, NESTED)
    most = padded.abs().amax(1)

    scaled = (padded * (1 / most)[:, None]).nan_to_num(-1).clamp(-1, 1)  # a block of zeros: byte 0
    if not absmax.is_cuda:  # on a CPU, bitsandbytes looks the byte up by 16 bits of the number
        scaled = ((scaled + 1) * 32767.5 + 0.5).int() / 32767.5 - 1
    bytes_ = torch.bucketize(scaled, (nested_code[:-1] + nested_code[1:]) / 2, out_int32=True)

    return replace(
        weight,
        absmax=bytes_.flatten()[: absmax.numel()].to(torch.uint8),
        nested_absmax=most,
        nested_code=nested_code,
        offset=offset,
    )


# ---- dequantisation


def unnested(weight: Weight | NF4Weight) -> Tensor:
    """Return the absmax of a weight in 4 bits as floats (blocks,), dequantised if it was quantised itself."""
    absmax, nested_code = weight.absmax, weight.nested_code
    assert absmax is not None
    if nested_code is None or weight.nested_absmax is None or weight.offset is None:
        return absmax
    nested = weight.nested_absmax.repeat_interleave(NESTED)[: absmax.numel()]
    return nested_code[absmax.int()].mul_(nested).add_(weight.offset)


def dequantize(weight: Weight, dtype: torch.dtype) -> Tensor:
    """Dequantise a weight from 4 bits to `dtype`. A table looks up the two values of each byte at once."""
    assert weight.code is not None
    pairs = torch.cartesian_prod(weight.code, weight.code)  # (256, 2)

    absmax, blocksize, numel = unnested(weight), weight.blocksize, prod(weight.shape)
    values = F.embedding(weight.data.int(), pairs).flatten()
    whole = numel // blocksize * blocksize
    values[:whole].view(-1, blocksize).mul_(absmax[: whole // blocksize, None])
    if whole < numel:
        values[whole:].mul_(absmax[-1])
    return values[:numel].to(dtype).view(weight.shape)
