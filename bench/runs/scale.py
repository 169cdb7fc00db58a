"""What each of several processes holds while it trains: by the calculator, and measured.

    python -m burnish.bench scale

One and two processes over gloo, each run in processes of its own: a Llama of 8 layers, width 512 and 16,384 words, in
fp32 on a CPU, one thread; four rows of 512 tokens in micro-batches of two, with checkpoint_activations. Held: weights
and AdamW's moments, counted in the tensors. Growth: the peak of resident memory in the second step over what was
resident before it: gradients, what is gathered, activations, and what the calculator leaves out, one layer at work and
the messages' buffers. Of two processes the larger figure is told.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...algorithms.run.optimizer import make_optimizer
from ...algorithms.run.processes import gathered, processes, rank, shard, summed, world
from ...algorithms.run.streams import run_program
from ...model.adapter import add_lora, linears, quantize_base
from ...model.adapters.config import LoraConfig
from ...model.config import ModelConfig
from ...model.memory import training_memory
from ...model.packed import pack
from ...model.transformer import Transformer
from .trainers import resident

SHAPE = ModelConfig(16_384, 512, 1408, 8, 8, 8)
ROWS, LENGTH, ROWS_AT_ONCE = 4, 512, 2
MODES = {
    "full": (None, False),
    "LoRA 16": (LoraConfig(16, 32), False),
    "QLoRA 16": (LoraConfig(16, 32), True),
}
PROCESSES = (1, 2)


def step(mode: str) -> dict[str, float]:
    """In each process: the second step, after one on few tokens. Bytes, of the process that has most."""
    torch.set_num_threads(1)
    lora, base_4bit = MODES[mode]
    model = Transformer(SHAPE, seed=0)
    model.checkpoint_activations = True
    if base_4bit:
        quantize_base(model)
    if lora is not None:
        add_lora(model, lora.rank, lora.alpha)
    shard(model)
    optimizer = make_optimizer(model, 1e-4)
    ids = torch.randint(SHAPE.vocab_size, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))

    def run(length: int) -> float:
        """Forward, backward and optimizer step; this process's part of the loss."""
        total = 0.0
        for rows in ids[rank() :: world(), :length].split(ROWS_AT_ONCE):
            starts = torch.arange(rows.shape[0])[:, None] * length
            scored = (starts + torch.arange(1, length)).flatten()
            logprob, _, _ = model.score(pack(rows.tolist()), scored)
            loss = -logprob.sum() / (ROWS * (length - 1))
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        return total

    run(8)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = resident("VmRSS")
    loss = run(LENGTH)
    growth = resident("VmHWM") - before
    four_bit = [x for layer in linears(model).values() if layer.four_bit for x in layer.four_bit.tensors()]
    moments = [x for state in optimizer.state.values() for name, x in state.items() if name != "step"]
    found = {
        "held": float(_bytes([*model.parameters(), *four_bit, *moments])),
        "growth": float(growth),
    }
    said = gathered({name: torch.tensor(value) for name, value in found.items()})
    return {name: max(float(one[name]) for one in said) for name in found} | summed({"loss": loss})


def counted(mode: str, several: int) -> dict[str, int]:
    """The calculator's figures for the same."""
    lora, base_4bit = MODES[mode]
    memory = training_memory(SHAPE, lora, base_4bit, ROWS_AT_ONCE * LENGTH, torch.float32, several)
    return {
        "held": memory.weights + memory.adapter + memory.optimizer,
        "growth": memory.gradients + memory.gathered + memory.activations,
    }


def _bytes(tensors: Iterable[Any]) -> int:
    local = (x.to_local() if hasattr(x, "to_local") else x for x in tensors)
    return sum(x.nbytes for x in local if isinstance(x, Tensor))


def measure() -> dict[tuple[str, int], dict[str, float]]:
    """By mode and number of processes."""
    found = {}
    for mode in MODES:
        for several in PROCESSES:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            command += ["--nproc-per-node", str(several), "-m", "burnish.bench.runs.scale", "--worker", mode]
            # what is freed goes back to the system at once, or the peak would hide in what was resident before
            environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)}:\n{done.stderr}")
            found[mode, several] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(measured: dict[tuple[str, int], dict[str, float]]) -> str:
    lines = ["| | processes | held, counted | held | growth, counted | growth | loss |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|")
    for (mode, several), row in measured.items():
        said = counted(mode, several)
        pairs = [(said[name], row[name]) for name in ("held", "growth")]
        cells = [f"{x / 1e6:.1f} MB" for pair in pairs for x in pair]
        lines.append(f"| {mode} | {several} | {' | '.join(cells)} | {row['loss']:.6f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--worker", choices=MODES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        with processes("sft", "cpu"):
            print(json.dumps(step(options.worker)))
    else:
        print(table(measure()))


if __name__ == "__main__":
    sys.exit(run_program("python -m burnish.bench scale", main))
