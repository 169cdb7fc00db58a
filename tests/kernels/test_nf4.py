"""The meaning of 4 bits, to the bit, beyond the accuracy that test_cases.py holds every op to."""

import json
from itertools import product
from math import prod

import pytest
import torch
import torch.nn.functional as F
from burnish.kernels import NF4Weight, dequantize_nf4, nf4_linear, quantize_nf4
from burnish.kernels._chip import INTERPRET
from burnish.kernels.nf4 import (
    FEW_ROWS,
    dequantize_nf4_reference,
    nf4_linear_reference,
    quantize_nf4_reference,
)
from burnish.kernels.plain.nf4 import FP4, NF4, ORDER
from burnish.kernels.records import BLOCKSIZES, NESTED
from torch.autograd.graph import saved_tensors_hooks

TRITON = INTERPRET or torch.cuda.is_available()
GOLDEN = ["qwen3-nf4", "qwen3-nf4-dq", "qwen3-fp4"]
every_type = pytest.mark.parametrize("quant_type", ["nf4", "fp4"])


def same(a: NF4Weight, b: NF4Weight) -> None:
    for ours, theirs in zip(a.tensors(), b.tensors(), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            assert torch.equal(ours.cpu(), theirs.cpu())


# ---- the format


def load_file(file):
    reader = pytest.importorskip(
        "safetensors.torch", reason="safetensors is not installed"
    )  # make gpu needs none
    return reader.load_file(file)


def golden(folder):
    """name -> the tensors on disk, by the end of their names."""
    found = {}
    for key, tensor in load_file(folder / "model.safetensors").items():
        if key.partition(".weight.")[2]:
            found.setdefault(key.partition(".weight.")[0], {})[key.partition(".weight.")[2]] = tensor
    for name, parts in found.items():
        parts["packed"] = load_file(folder / "model.safetensors")[f"{name}.weight"].flatten()
    return found


@pytest.mark.parametrize("name", GOLDEN)
def test_equals_the_files_of_bitsandbytes(name, data, device):
    """Quantising the weights that they were made from gives their bytes; multiplying out gives their values."""
    plain = load_file(data / "tiny-hf" / "qwen3" / "model.safetensors")
    expected = load_file(data / "tiny-bnb" / name / "expected.safetensors")
    files, checked = golden(data / "tiny-bnb" / name), 0
    for module, parts in files.items():
        quant_type = name.split("-")[1]
        state = json.loads(bytes(parts[f"quant_state.bitsandbytes__{quant_type}"].tolist()))
        ours = quantize_nf4(
            plain[f"{module}.weight"].to(device),
            blocksize=state["blocksize"],
            quant_type=quant_type,
            double_quant="nested_absmax" in parts,
        )

        assert list(ours.shape) == state["shape"] and ours.quant_type == quant_type
        assert torch.equal(ours.packed.cpu(), parts["packed"]) and torch.equal(
            ours.code.cpu(), parts["quant_map"]
        )
        if ours.nested_absmax is None:
            assert torch.equal(ours.absmax.cpu(), parts["absmax"])
        else:
            assert torch.equal(ours.nested_code.cpu(), parts["nested_quant_map"])
            # on a GPU the mean is added up in another order: the offset differs in its last bit, and what follows
            rtol, atol = (0, 0) if device == "cpu" else (1e-5, 1)
            for part, tensor in (("absmax", ours.absmax), ("nested_absmax", ours.nested_absmax)):
                torch.testing.assert_close(tensor.cpu(), parts[part], rtol=rtol, atol=atol)
            torch.testing.assert_close(ours.offset.item(), state["nested_offset"], rtol=1e-6, atol=0)

        if f"{module}.dequant" in expected and device == "cpu":
            assert torch.equal(dequantize_nf4(ours), expected[f"{module}.dequant"])
            checked += 1
    assert len(files) == 21 and (checked == 7 or device != "cpu")


@every_type
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_equals_bitsandbytes(quant_type, dtype):
    functional = pytest.importorskip("bitsandbytes").functional
    for shape, blocksize, double in product(SHAPES, BLOCKSIZES, (False, True)):
        w = with_ties(shape, blocksize, quant_type).to(dtype)
        packed, state = functional.quantize_4bit(
            w, blocksize=blocksize, quant_type=quant_type, compress_statistics=double
        )
        ours = quantize_nf4_reference(w, blocksize=blocksize, quant_type=quant_type, double_quant=double)
        assert torch.equal(ours.packed, packed.flatten()) and torch.equal(ours.code, state.code)
        assert torch.equal(ours.absmax, state.absmax)
        if double:
            assert torch.equal(ours.offset, state.offset)
            assert torch.equal(ours.nested_absmax, state.state2.absmax)
            assert torch.equal(ours.nested_code, state.state2.code)

        absmax = state.absmax
        if double:
            absmax = functional.dequantize_blockwise(absmax, state.state2) + state.offset
        found = dequantize_nf4_reference(ours)
        assert torch.equal(found, multiplied_out(packed, state.code, absmax, blocksize, found))
        # bitsandbytes keeps a byte too many of odd rows; on a CPU it misreads rows shorter than a block
        if shape[-1] % 2 == 0 and shape[-1] >= blocksize:
            assert torch.equal(found, functional.dequantize_4bit(packed, state))


def multiplied_out(packed, code, absmax, blocksize, like) -> torch.Tensor:
    """The numbers that 4 bits stand for: code[index] times its block's absmax."""
    index = torch.stack((packed.flatten() >> 4, packed.flatten() & 15), 1).flatten()[: like.numel()]
    scale = absmax.repeat_interleave(blocksize)[: like.numel()]
    return (code[index.long()] * scale).to(like.dtype).view(like.shape)


SHAPES = ((64, 64), (7, 33), (3, 5, 130), (1, 1), (257, 256), (2, 3, 2048))  # odd, cut short, experts


def with_ties(shape, blocksize, quant_type):
    """Random weights; a block of zeros; in some blocks the code itself, its midpoints and their neighbours, scaled."""
    code = torch.tensor(NF4 if quant_type == "nf4" else FP4)[list(ORDER[quant_type])]
    middle, one = (code[:-1] + code[1:]) / 2, torch.ones(())
    ties = torch.cat((code, middle, torch.nextafter(middle, one), torch.nextafter(middle, -one)))
    w = torch.randn(prod(shape)) * 10 ** torch.randn(1).item()
    for i, start in enumerate(range(0, w.numel() - blocksize, 5 * blocksize)):
        most = (1.0, 0.37, 3.0)[i % 3]
        some = torch.cat((one[None], ties[torch.randperm(len(ties))]))[:blocksize]
        w[start : start + blocksize] = 0
        w[start : start + len(some)] = most * some
    w[64:128] = 0
    return w.view(shape)


@pytest.mark.skipif(not TRITON, reason="the CPU path is the reference")
@every_type
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize(
    "blocksize", [64, *(pytest.param(b, marks=pytest.mark.slow) for b in (32, 256, 4096))]
)
def test_kernels_have_the_bits_of_the_reference(blocksize, double_quant, quant_type, device):
    options = {"blocksize": blocksize, "quant_type": quant_type, "double_quant": double_quant}
    for shape in ((7, 10), (3, 5, 129), (33, 64), (193,), (1,)):
        for dtype in (torch.float32, torch.float16):
            w = torch.randn(shape, device=device).to(dtype)
            w.view(-1)[64:128] = 0  # a block of zeros
            four_bit = quantize_nf4(w, **options)
            if not double_quant or INTERPRET:
                same(four_bit, quantize_nf4_reference(w.cpu(), **options))
            for out in (torch.float32, torch.float16):
                truth = dequantize_nf4_reference(four_bit, out)
                assert torch.equal(dequantize_nf4(four_bit, out), truth)


@every_type
def test_on_a_midpoint_the_smaller_value(quant_type, device):
    """And the next number above it rounds up."""
    code = torch.tensor(NF4 if quant_type == "nf4" else FP4)[list(ORDER[quant_type])]
    middle = (code[:-1] + code[1:]) / 2
    above = torch.nextafter(middle, torch.ones(()))
    w = torch.cat((torch.ones(1), middle, above, torch.zeros(33))).to(device)
    values = dequantize_nf4(quantize_nf4(w, quant_type=quant_type, double_quant=False)).cpu()
    assert torch.equal(values[1:16], code[:-1]) and torch.equal(values[16:31], code[1:])


def test_two_weights_a_byte_the_first_in_the_high_nibble(device):
    four_bit = quantize_nf4(torch.tensor([1.0, -1.0, 0.0], device=device), double_quant=False)
    assert four_bit.packed.tolist() == [0xF0, 0x77] and four_bit.absmax.tolist() == [1.0]


@every_type
def test_every_value_of_the_code_is_itself(quant_type, device):
    w = torch.tensor(NF4 if quant_type == "nf4" else FP4, device=device)
    assert torch.equal(dequantize_nf4(quantize_nf4(3 * w, quant_type=quant_type, double_quant=False)), 3 * w)


def test_storage_is_4_127_bits_a_weight():
    four_bit = quantize_nf4(torch.randn(64, 256))
    tables = 16 * 4 + 256 * 4 + 4
    bits = 8 * (four_bit.nbytes - tables) / four_bit.numel
    assert bits == 4 + 8 / 64 + 32 / (64 * NESTED) and round(bits, 3) == 4.127


def test_weights_of_three_dimensions(device):
    experts = torch.randn(3, 6, 64, device=device)
    whole = dequantize_nf4(quantize_nf4(experts, double_quant=False))
    each = [dequantize_nf4(quantize_nf4(e, double_quant=False)) for e in experts]
    assert whole.shape == experts.shape and torch.equal(whole, torch.stack(each))


def test_quantising_again_changes_nothing(device):
    once = dequantize_nf4(quantize_nf4(torch.randn(40, 64, device=device), double_quant=False))
    assert torch.equal(dequantize_nf4(quantize_nf4(once, double_quant=False)), once)


def test_the_error_of_a_normal_weight_is_that_of_its_code(device):
    """NF4 at blocks of 64 loses about 9 % of a normal weight's root mean square, with absmax in 8 bits as without."""
    w = torch.randn(64, 1024, device=device)
    for double_quant in (False, True):
        error = (dequantize_nf4(quantize_nf4(w, double_quant=double_quant)) - w).square().mean().sqrt().item()
        assert 0.08 < error < 0.1


# ---- the product


@pytest.mark.skipif(not TRITON, reason="the CPU path multiplies W out at any number of rows")
@pytest.mark.parametrize("M", [1, 17, FEW_ROWS + 1])
@pytest.mark.parametrize("N, K, blocksize", [(67, 128, 64), (33, 96, 32), (9, 512, 256), (5, 35, 64)])
def test_any_rows_and_blocks(M, N, K, blocksize, device):
    four_bit = quantize_nf4(torch.randn(N, K, device=device), blocksize=blocksize)
    x, bias = torch.randn(M, K, device=device), torch.randn(N, device=device)
    truth = nf4_linear_reference(x.double(), four_bit, bias.double())
    torch.testing.assert_close(nf4_linear(x, four_bit, bias).double(), truth, rtol=1e-5, atol=1e-4)


@pytest.mark.skipif(not TRITON, reason="the kernel's split of K")
def test_rows_keep_their_bits_in_a_larger_batch(device):
    four_bit = quantize_nf4(torch.randn(70, 256, device=device))
    x = torch.randn(9, 256, device=device)
    assert torch.equal(nf4_linear(x, four_bit)[:4], nf4_linear(x[:4].contiguous(), four_bit))


def test_saves_four_bits_alone(device):
    four_bit = quantize_nf4(torch.randn(32, 64, device=device))
    x = torch.randn(4, 64, device=device, requires_grad=True)
    saved = []
    with saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        nf4_linear(x, four_bit)
    assert set(saved) == {t.data_ptr() for t in four_bit.tensors() if t is not None}


def test_lead_dimensions_and_dtype(device):
    four_bit = quantize_nf4(torch.randn(6, 64, device=device))
    x = torch.randn(2, 3, 64, device=device).half()
    y = nf4_linear(x, four_bit)
    assert y.shape == (2, 3, 6) and y.dtype == torch.float16
    assert dequantize_nf4(four_bit).dtype == torch.float32
    truth = F.linear(x.float(), dequantize_nf4(four_bit))
    torch.testing.assert_close(y.float(), truth, rtol=1e-2, atol=2e-2)


def test_moves_as_one(device):
    four_bit = quantize_nf4(torch.randn(6, 64)).to(device)
    assert all(t is None or t.device.type == device for t in four_bit.tensors())
    assert prod(four_bit.shape) == four_bit.numel


def test_refusals(device):
    w = torch.zeros(4, 64, device=device)
    four_bit = quantize_nf4(w)
    with pytest.raises(ValueError, match=r"blocksize: expected one of \(32, .*, got 48"):
        quantize_nf4(w, blocksize=48)
    with pytest.raises(ValueError, match=r"quant_type: expected one of \('nf4', 'fp4'\), got 'int4'"):
        quantize_nf4(w, quant_type="int4")
    with pytest.raises(ValueError, match=r"weight: expected dtype .*, got torch.float64"):
        quantize_nf4(w.double())

    with pytest.raises(ValueError, match=r"dtype: expected float32, float16 or bfloat16, got torch.int8"):
        dequantize_nf4(four_bit, torch.int8)
    with pytest.raises(ValueError, match=r"x: expected shape \(..., in=64\), got \(3, 32\)"):
        nf4_linear(torch.zeros(3, 32, device=device), four_bit)
    with pytest.raises(ValueError, match=r"bias: expected shape \(out=4\), got \(3,\)"):
        nf4_linear(torch.zeros(3, 64, device=device), four_bit, torch.zeros(3, device=device))
    with pytest.raises(ValueError, match=r"weight: expected shape \(out, in\), got \(2, 2, 64\)"):
        nf4_linear(torch.zeros(3, 64, device=device), quantize_nf4(torch.zeros(2, 2, 64, device=device)))
