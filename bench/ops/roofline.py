"""Two ceilings of a machine, bandwidth and rate, and the least time that they allow. An op takes at least

    floor = max(bytes / bandwidth, operations / rate)

The static proof (static.py) takes the two ceilings from a chip's datasheet. The benchmark measures them on its machine:
the bandwidth by a large copy (bytes read plus bytes written), the rate by a large square matrix product.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..cases.case import Work
from .clocks import event_seconds, host_seconds


@dataclass(frozen=True)
class Chip:
    name: str
    bandwidth: float  # bytes per second
    rates: dict[str, float]  # dense operations per second by dtype; fp32 outside the matrix units
    processors: int
    registers: int = 65536  # per multiprocessor, 32 bits each
    shared: int = 0  # bytes per multiprocessor
    shared_block: int = 0  # bytes that one block may use
    warps: int = 64
    blocks: int = 32


# Datasheets: NVIDIA A100 80GB SXM, H100 SXM, B200 (HGX); AMD MI300X. RTX 3090 and 5090: NVIDIA's white papers on GA102
# and on RTX Blackwell, products summed in fp32. Limits: the CUDA C++ programming guide.
CHIPS = {
    "sm_80": Chip(
        "A100",
        2.04e12,
        {"bf16": 312e12, "fp16": 312e12, "fp32": 19.5e12},
        108,
        shared=164 << 10,
        shared_block=163 << 10,
    ),
    "sm_86": Chip(  # sm_89 has the same limits, but 24 blocks
        "RTX 3090",
        0.936e12,
        {"bf16": 71e12, "fp16": 71e12, "fp32": 35.6e12},
        82,
        shared=100 << 10,
        shared_block=99 << 10,
        warps=48,
        blocks=16,
    ),
    "sm_90": Chip(
        "H100",
        3.35e12,
        {"bf16": 989e12, "fp16": 989e12, "fp32": 67e12},
        132,
        shared=228 << 10,
        shared_block=227 << 10,
    ),
    "sm_100": Chip(
        "B200",
        8.0e12,
        {"bf16": 2250e12, "fp16": 2250e12, "fp32": 75e12},
        148,
        shared=228 << 10,
        shared_block=227 << 10,
    ),
    "sm_120": Chip(
        "RTX 5090",
        1.792e12,
        {"bf16": 209.5e12, "fp16": 209.5e12, "fp32": 104.8e12},
        170,
        shared=100 << 10,
        shared_block=99 << 10,
        warps=48,
        blocks=24,
    ),
    "gfx942": Chip(
        "MI300X",
        5.3e12,
        {"bf16": 1307e12, "fp16": 1307e12, "fp32": 163e12},
        304,
        shared=64 << 10,
        shared_block=64 << 10,
    ),
}


@dataclass(frozen=True)
class Ceilings:
    bandwidth: float  # bytes per second
    rate: float  # operations per second, in the dtype of the benchmark

    def floor(self, work: Work) -> float:
        """Return the least time of a pass in seconds."""
        return max(work.bytes / self.bandwidth, work.flops / self.rate)

    def binds(self, work: Work) -> str:
        """Return which ceiling sets the floor: "bytes" or "operations"."""
        return "bytes" if work.bytes / self.bandwidth >= work.flops / self.rate else "operations"


def datasheet(chip: Chip, dtype: str) -> Ceilings:
    return Ceilings(chip.bandwidth, chip.rates[dtype])


def measure(device: str, dtype: torch.dtype) -> Ceilings:
    """Measure the ceilings of this machine. Each time is a median of 10.

    The bandwidth is measured by two ways to copy 1 GiB (64 MiB on a CPU), and the faster way counts. The rate is
    measured by a product of two square matrices of size 8192 (1024 on a CPU).
    """
    cuda = device == "cuda"
    source = torch.randn(1 << (28 if cuda else 24), device=device)  # fp32
    target = torch.empty_like(source)
    n = 8192 if cuda else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    copies = (
        lambda: target.copy_(source),
        lambda: torch.neg(source, out=target),
    )  # by the driver, and by a kernel
    copy = min(_median_seconds(work, device) for work in copies)
    product = _median_seconds(lambda: a @ b, device)
    return Ceilings(2 * source.nbytes / copy, 2 * n**3 / product)


def _median_seconds(work: Callable[[], Any], device: str) -> float:
    once = (lambda: event_seconds(work)) if device == "cuda" else (lambda: host_seconds(work, device))
    for _ in range(3):
        once()
    return sorted(once() for _ in range(10))[5]
