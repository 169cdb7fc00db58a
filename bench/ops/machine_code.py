"""Figures from the machine code of a compiled kernel: registers, spills, stack, shared memory and instructions.

Triton's wheel contains NVIDIA's tools, which read a cubin without a GPU. AMD's code is read in the form that the
compiler prints.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...kernels._triton import triton
from .roofline import CHIPS

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Build:
    """The figures of one compiled kernel, read from its machine code."""

    kernel: str
    tile: str  # the constants it was compiled with, its warps and its stages
    registers: int  # per thread
    spills: int  # local loads and stores in the code
    stack: int  # bytes per thread
    shared: int  # bytes per block
    blocks: int  # resident blocks per multiprocessor
    matrix: int  # matrix instructions
    matrix_kind: str
    load_bits: int  # the widest load from global memory
    asynchronous: int  # asynchronous copies to shared memory, TMA included
    instructions: int
    exponentials: int
    overlapped: int  # exponentials that run during a product
    stores: int  # to global memory
    source_stores: int  # stores in the intermediate code: if it has any, the machine code must, too


STORES = re.compile(  # in Triton's intermediate code
    r"tt\.store|tt\.atomic|buffer_store|buffer_atomic|descriptor_store|descriptor_reduce|local_to_global"
)


def read_build(compiled: Any, chip: str) -> Build:
    function, meta = compiled.src.fn, compiled.metadata
    figures = _read_amd(compiled) if chip == "gfx942" else _read_nvidia(compiled.asm["cubin"])

    # constants: True is written as the name alone, False is left out
    constants = {function.params[path[0]].name: value for path, value in compiled.src.constants.items()}
    named = [(p.name, constants[p.name]) for p in function.params if p.is_constexpr]
    tile = [name if value is True else f"{name}={value}" for name, value in named if value is not False]
    tile += [f"warps={meta.num_warps}", f"stages={meta.num_stages}"]

    return Build(
        kernel=function.__name__,
        tile=" ".join(tile),
        shared=meta.shared,
        blocks=_blocks(chip, figures["registers"], meta.num_warps, meta.shared),
        source_stores=len(STORES.findall(compiled.asm["ttgir"])),
        **figures,
    )


def _blocks(chip: str, registers: int, warps: int, shared: int) -> int:
    """Return the number of blocks that can be resident on one multiprocessor.

    NVIDIA's chips allocate registers to a warp in units of 256, and use 1 KB of shared memory for each resident block.
    """
    limits = CHIPS[chip]
    if chip == "gfx942":  # 4 SIMDs of 512 registers by 64 lanes, in units of 8; at most 8 waves on each
        waves = 4 * min(8, 512 // max(8, -(-registers // 8) * 8))
        return min(waves // warps, limits.shared // shared if shared else limits.blocks)

    by_registers = limits.registers // (-(-registers * 32 // 256) * 256) // warps
    by_shared = limits.shared // (shared + 1024) if shared <= limits.shared_block else 0
    return min(by_registers, by_shared, limits.warps // warps, limits.blocks)


def _read_nvidia(cubin: bytes) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _tool("cuobjdump", "--dump-resource-usage", path)
        code = re.findall(r'"opcode":"([^"]+)"(?:,"operands":"([^"]*)")?', _tool("nvdisasm", "-json", path))

    opcodes = [opcode for opcode, _ in code]
    matrix = [o for o in opcodes if re.match(r"HMMA|IMMA|DMMA|HGMMA|QGMMA|UTC\w*MMA", o)]
    loads = [o for o in opcodes if o.startswith("LDG")]

    return {
        "registers": int(re.findall(r"REG:(\d+)", usage)[0]),
        "stack": int(re.findall(r"STACK:(\d+)", usage)[0]),
        "spills": sum(o.startswith(("LDL", "STL")) for o in opcodes),
        "matrix": len(matrix),
        "matrix_kind": matrix[0].split(".")[0] if matrix else "",
        "load_bits": max((_width(o) for o in loads), default=0),
        "asynchronous": sum(o.startswith(("LDGSTS", "UTMALDG", "UBLKCP")) for o in opcodes),
        "instructions": len(opcodes),
        "exponentials": sum(o.startswith("MUFU.EX2") for o in opcodes),
        "overlapped": overlapped(code),
        "stores": sum(o.startswith(("STG", "ST.E", "RED", "ATOM", "UTMASTG", "UTMAREDG")) for o in opcodes),
    }


def overlapped(code: list[tuple[str, str]]) -> int:
    """Count the exponentials that run during a matrix product.

    These are the exponential instructions that stand, in the order of the code, between an asynchronous matrix product
    and the next instruction that waits for all products. Only sm_90 has such products (HGMMA).
    """
    count, running = 0, False
    for opcode, operands in code:
        if opcode.startswith("HGMMA"):
            running = True
        elif opcode.startswith("WARPGROUP.DEPBAR") and operands.endswith(",0x0"):
            running = False
        count += running and opcode.startswith("MUFU.EX2")
    return count


def _width(opcode: str) -> int:
    """Return the bits that a load instruction moves for each thread."""
    parts = set(opcode.split("."))
    named = {"256": 256, "128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}
    return next((bits for part, bits in named.items() if part in parts), 32)


def _read_amd(compiled: Any) -> dict[str, Any]:
    assert compiled.asm["hsaco"].startswith(b"\x7fELF")  # assembled and linked, not only printed
    text = compiled.asm["amdgcn"]

    def field(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s+(\d+)", text)[0])

    opcodes = re.findall(r"^\t([a-z]\w+)", text, re.MULTILINE)
    loads = [o for o in opcodes if re.match(r"(global|buffer)_load_(dword|u|s)", o)]
    words = {"x4": 128, "x3": 96, "x2": 64, "rd": 32}

    return {
        "registers": field("vgpr_count"),
        "stack": field("private_segment_fixed_size"),
        "spills": field("vgpr_spill_count"),
        "matrix": sum(o.startswith("v_mfma") for o in opcodes),
        "matrix_kind": "MFMA" if any(o.startswith("v_mfma") for o in opcodes) else "",
        "load_bits": max((words.get(o[-2:], 16) for o in loads), default=0),
        "asynchronous": sum("lds" in o for o in loads),
        "instructions": len(opcodes),
        "exponentials": sum(o.startswith("v_exp_f32") for o in opcodes),
        "overlapped": 0,  # its products are not asynchronous
        "stores": sum(bool(re.match(r"(global|buffer|flat)_(store|atomic)", o)) for o in opcodes),
    }


def _tool(name: str, *args: Any) -> str:
    return subprocess.run([TOOLS / name, *args], capture_output=True, text=True, check=True).stdout
