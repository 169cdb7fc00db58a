"""The static proof sees what it must, and the shipped configurations are as accepted."""

import json
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from burnish.bench.ops import machine_code, static
from burnish.bench.ops.roofline import CHIPS
from burnish.bench.ops.slots import OWN
from burnish.bench.ops.static import (
    Job,
    accepted_figures,
    compare,
    compile_job,
    compile_only,
    limits,
    selection,
)
from burnish.bench.publish.proofs import CARDS
from burnish.kernels import _chip, attention, tiles
from burnish.model.errors import InputError

pytestmark = pytest.mark.skipif(_chip.INTERPRET, reason="the interpreter compiles nothing")

QUICK = selection([], everything=False)
MATRIX = OWN | {"sm_86": "HMMA", "sm_120": "HMMA"}
FIRST = {(job.case, job.dims) for job in QUICK}
REST = [
    job
    for job in selection([], everything=True)
    # of the two chips that share sm_80's tiles, but for attention's, the other configurations are `make static`'s
    if job not in QUICK
    and (
        job.chip not in ("sm_86", "sm_120")
        or job.case.startswith("flash_attention/")
        or (job.case, job.dims) in FIRST
    )
]


# the longest compilations are left to `make test-slow`, too
LONGEST = ("moe_mlp/adapters", "lora_linear/several adapters", "token_divergence/features, beta 0.3")
SLOW = [*REST, *(job for job in QUICK if job.case in LONGEST)]
QUICKEST = [job for job in QUICK if job.case not in LONGEST]


@pytest.mark.parametrize(
    "job", [*QUICKEST, *(pytest.param(job, marks=pytest.mark.slow) for job in SLOW)], ids=lambda job: job.key
)
def test_shipped_configuration_is_as_accepted(job: Job):
    accepted = accepted_figures()
    figures = {job.key: [vars(build) for build in compile_job(job)]}
    assert job.key in accepted, f"burnish bench static --all --accept: {static.table(figures)}"
    if json.loads(static.BASELINE.read_text())["triton"] == triton.__version__:
        assert compare(accepted, figures) == []
    assert limits(figures) == []


def test_attention_spills_nowhere():
    """Each chip at D = 64, 128, 256, the three kernels, in the accepted figures, which the test above compares with."""
    found = set()
    for key, builds in accepted_figures().items():
        case, dims, dtype, chip = key.split(" | ")
        if case.startswith("flash_attention/"):
            for b in builds:
                assert b["spills"] == b["stack"] == 0, f"{key}: {b['kernel']} {b['tile']}"
                assert b["matrix_kind"] == {"fp32": ""}.get(dtype, MATRIX[chip]), f"{key}: {b['kernel']}"
                found.add((b["kernel"], dims.split("D=")[1], dtype, chip))
    kernels = "_flash_fwd", "_flash_dq", "_flash_dkdv"
    for chip, dtype in (("sm_90", "fp32"), *((chip, "bf16") for chip in MATRIX)):
        assert {(k, d, dtype, chip) for k in kernels for d in ("64", "128", "256")} <= found


def test_every_chip_is_compiled_for_and_has_its_datasheet_and_its_cards():
    """A chip that one of these lists lacks would pass a proof that never compiled for it."""
    assert set(static.TARGETS) == set(CHIPS) == set(CARDS) == set(MATRIX)


def test_a_table_without_a_row_for_the_chip_says_so():
    with pytest.raises(KeyError, match="expected a row of tiles for fp32 or sm_999, got sm_80, half"):
        tiles.row_of({"sm_80": 1, "half": 2}, "fp32", "sm_999")


@pytest.mark.parametrize("chip", ["sm_120", pytest.param("sm_86", marks=pytest.mark.slow)])
@pytest.mark.parametrize("precision", ["tf32", pytest.param("ieee", marks=pytest.mark.slow)])
def test_attention_in_fp32_fits_the_smallest_cards(
    chip: str, precision: str, monkeypatch: pytest.MonkeyPatch
):
    """At D = 256, whatever torch is told of fp32 products; they are not among the accepted figures."""
    for module in (attention, tiles):
        monkeypatch.setattr(module, "precision", lambda: precision)
    leaves = [torch.randn(1, 256, heads, 256, requires_grad=True) for heads in (2, 1, 1)]
    with compile_only(chip) as launches:
        attention.flash_attention(*leaves).sum().backward()
    found = [machine_code.read_build(compiled, chip) for compiled in launches]
    assert [b.kernel for b in found] == ["_flash_fwd", "_flash_dq", "_flash_dkdv"]
    assert limits({chip: [vars(b) for b in found]}) == []
    assert all(b.spills == 0 for b in found)


@triton.jit
def _hungry(x_ptr, y_ptr, N: tl.constexpr):
    offsets = tl.arange(0, N)
    x = tl.load(x_ptr + offsets)
    tl.store(y_ptr + offsets, x - tl.sum(x, 0))  # the whole of x is held across the sum


@triton.jit
def _masked_out(x_ptr, y_ptr, N: tl.constexpr, BLOCK: tl.constexpr):
    """A store in the source alone, with N=0: the compiler sees that no lane has one."""
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at), mask=at < N)


@triton.jit
def _product(a_ptr, b_ptr, c_ptr, K, BLOCK: tl.constexpr):
    i, k = tl.arange(0, BLOCK)[:, None], tl.arange(0, 64)[None, :]
    c = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, K, 64):
        a = tl.load(a_ptr + i * K + start + k)
        b = tl.load(b_ptr + i * K + start + k)
        c = tl.dot(a, b.T, c)
    tl.store(c_ptr + i * BLOCK + tl.arange(0, BLOCK)[None, :], c)


def build(chip: str, kernel, *args, **options) -> machine_code.Build:
    with compile_only(chip) as launches:
        kernel[(1,)](*args, **options)
    return machine_code.read_build(launches[-1], chip)


def test_a_spill_is_seen():
    x = torch.zeros(16384)
    assert build("sm_90", _hungry, x, x, N=16384, num_warps=1).spills > 100
    assert build("sm_90", _hungry, x, x, N=16384, num_warps=8).spills == 0


@pytest.mark.parametrize("chip", static.TARGETS)
def test_a_kernel_that_lost_its_stores_is_named(chip: str):
    x, key = torch.zeros(64), f"op/case | D=64 | bf16 | {chip}"
    kept = build(chip, _masked_out, x, x, N=64, BLOCK=64)
    assert kept.stores >= 1 and kept.source_stores == 1 and limits({key: [vars(kept)]}) == []
    lost = build(chip, _masked_out, x, x, N=0, BLOCK=64)
    if chip == "gfx942":  # there a masked store is one beyond the buffer's end
        lost = replace(lost, stores=0)
    assert (lost.stores, lost.source_stores) == (0, 1)
    assert "1 stores in its source, none in its code" in limits({key: [vars(lost)]})[0]


@pytest.mark.parametrize("grid", [(1, 65536), (1, 1, 65536), (1 << 31,)], ids=str)
def test_a_grid_that_no_chip_launches_is_refused(grid: tuple[int, ...]):
    x = torch.zeros(64)
    with (
        pytest.raises(
            ValueError, match=r"_masked_out: expected a grid of at most \(2147483647, 65535, 65535\)"
        ),
        compile_only("sm_90"),
    ):
        _masked_out[grid](x, x, N=64, BLOCK=64)
    with compile_only("sm_90") as launches:
        _masked_out[tuple(n - 1 for n in grid)](x, x, N=64, BLOCK=64)
    assert len(launches) == 1


def test_more_shared_memory_than_the_card_has_is_named():
    """A build that fits an A100 does not fit an RTX 30 or 50."""
    a = torch.zeros(128, 1024, dtype=torch.bfloat16)
    options = {"BLOCK": 128, "num_warps": 4, "num_stages": 5}
    for chip, count in (("sm_80", 0), ("sm_86", 1), ("sm_120", 1)):
        found = build(chip, _product, a, a, torch.zeros(128, 128), 1024, **options)
        complaints = limits({f"op/case | D=64 | bf16 | {chip}": [vars(found)]})
        assert len(complaints) == count, (chip, found.shared)
        assert all(f"{found.shared} bytes shared, at most 101376: does not fit" in c for c in complaints)


def test_exponentials_under_a_product_are_counted():
    """The exponentials of dQ on sm_90 run beside the product of dout and v; the plain forward waits for its scores."""
    job = next(job for job in QUICK if job.case == "flash_attention/causal")
    found = {b.kernel: b for b in compile_job(job)}
    assert found["_flash_dq"].overlapped == found["_flash_dq"].exponentials > 0
    assert found["_flash_fwd"].overlapped == 0 < found["_flash_fwd"].exponentials
    product, wait, exponential = (
        ("HGMMA.64x64x16", ""),
        ("WARPGROUP.DEPBAR.LE", "gsb0,0x0"),
        ("MUFU.EX2", "R1,R2"),
    )
    assert machine_code.overlapped([product, exponential, wait, exponential]) == 1
    assert machine_code.overlapped([product, wait, exponential]) == 0
    assert machine_code.overlapped([product, (wait[0], "gsb0,0x1"), exponential]) == 1


@pytest.mark.parametrize(
    "chip, kind",
    [
        ("sm_80", "HMMA"),
        ("sm_86", "HMMA"),
        ("sm_90", "HGMMA"),
        ("sm_100", "UTCHMMA"),
        ("sm_120", "HMMA"),
        ("gfx942", "MFMA"),
    ],
)
def test_matrix_instructions_are_seen(chip: str, kind: str):
    a = torch.zeros(128, 1024, dtype=torch.bfloat16)
    found = build(chip, _product, a, a, torch.zeros(128, 128), 1024, BLOCK=128, num_warps=4)
    assert found.matrix > 0 and found.matrix_kind == kind
    assert found.load_bits == 128 or found.asynchronous > 0
    assert (found.blocks >= 1 and found.shared >= 2 * 128 * 64 * 2) or chip == "gfx942"


GOOD = {  # the figures of one build
    "kernel": "_k",
    "tile": "BLOCK=64 warps=4",
    "registers": 128,
    "spills": 0,
    "stack": 0,
    "shared": 1024,
    "blocks": 4,
    "matrix": 12,
    "matrix_kind": "HGMMA",
    "load_bits": 128,
    "asynchronous": 3,
    "instructions": 500,
    "exponentials": 32,
    "overlapped": 32,
    "stores": 2,
    "source_stores": 2,
}


def test_what_got_worse_is_named():
    key = "op/case | D=64 | bf16 | sm_90"
    assert compare({key: [GOOD]}, {key: [GOOD]}) == []
    assert compare({key: [GOOD]}, {key: [GOOD | {"registers": 100, "blocks": 5}]}) == []

    # figure -> what it became, how it is said
    worse = {
        "spills": (34, "spills 0 -> 34"),
        "matrix": (0, "12 HGMMA -> none"),
        "matrix_kind": ("", "12 HGMMA -> none"),
        "blocks": (2, "blocks 4 -> 2"),
        "load_bits": (32, "load_bits 128 -> 32"),
        "asynchronous": (0, "copies 3 -> 0"),
        "overlapped": (0, "product 32 -> 0"),
    }
    found = GOOD | {name: value for name, (value, _) in worse.items()}
    complaints = "\n".join(compare({key: [GOOD]}, {key: [found]}))
    for part in (key, "BLOCK=64", *(part for _, part in worse.values())):
        assert part in complaints
    assert "not in static.json" in compare({}, {key: [GOOD]})[0]

    # one kernel at two tiles
    wide = GOOD | {"tile": "BLOCK=128 warps=4", "registers": 200, "blocks": 2}
    assert compare({key: [GOOD, wide]}, {key: [GOOD, wide]}) == []
    assert "blocks 2 -> 1" in compare({key: [GOOD, wide]}, {key: [GOOD, wide | {"blocks": 1}]})[0]

    # the limits hold whatever was accepted
    assert limits({key: [GOOD]}) == []
    assert "does not fit" in limits({key: [GOOD | {"blocks": 0}]})[0]
    assert "at most 232448: does not fit" in limits({key: [GOOD | {"shared": 232449}]})[0]
    assert "2 stores in its source" in limits({key: [GOOD | {"stores": 0}]})[0]


def test_the_machine_is_as_it_was_afterwards():
    before = triton.runtime.jit.JITFunction.run, _chip.TARGET
    with pytest.raises(RuntimeError), compile_only("sm_90"):
        assert _chip.use_triton(torch.zeros(1)) and _chip.capability(torch.zeros(1)) == (9, 0)
        raise RuntimeError
    assert (triton.runtime.jit.JITFunction.run, _chip.TARGET) == before
    assert not _chip.use_triton(torch.zeros(1))


def test_what_is_accepted_is_not_compared_with_itself():
    with pytest.raises(InputError, match="--check: expected no --accept beside it"):
        static.main(static.Config(accept=True, check=True))
