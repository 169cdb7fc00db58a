"""Memory of each process in a training step of one or several processes: predicted by model/memory.py, and measured.

    burnish bench scale [--processes 2]

One process and several processes over gloo are measured, each in new processes. The model is a Llama of 8 layers, width
512 and 16,384 words, in fp32 on a CPU, on one thread. A step trains four rows of 512 tokens in micro-batches of two,
with checkpoint_activations. Held: weights and AdamW's moments, counted in the tensors. Growth: the peak of resident
memory in the second step beyond the memory before it. Growth includes gradients, gathered weights, activations and one
layer at work. It also includes a part that the calculator leaves out: the buffers of messages. Of several processes the
largest figure is reported.
"""

import gc
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from ...algorithms.run.flags import Bounds
from ...algorithms.run.optimizer import make_optimizer
from ...algorithms.run.processes import gathered, processes, rank, shard, summed, world
from ...model.adapter import add_lora, linears, quantize_base
from ...model.adapters.config import LoraConfig
from ...model.config import ModelConfig
from ...model.memory import Training, training_memory
from ...model.packed import pack
from ...model.transformer import Transformer
from .process import figures_of
from .trainers import resident

SHAPE = ModelConfig(16_384, 512, 1408, 8, 8, 8)
ROWS, LENGTH, ROWS_AT_ONCE = 4, 512, 2
MODES = {
    "full": (None, False),
    "LoRA 16": (LoraConfig(16, 32), False),
    "QLoRA 16": (LoraConfig(16, 32), True),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    processes: Annotated[int, Bounds(1, ROWS)] = (
        2  # number of processes of the second run, after a run of one; each needs a row
    )


def step(mode: str) -> dict[str, float]:
    """Run two training steps, and return the second step's memory in bytes and its loss.

    The first step, on few tokens, creates the optimizer's state. Each figure of memory is the largest of all processes.
    """
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
        """Run forward, backward and optimizer step. Return this process's part of the loss."""
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

    # the second step, measured
    run(8)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = resident("VmRSS")
    loss = run(LENGTH)
    growth = resident("VmHWM") - before

    # the bytes held, and the largest figures of all processes
    four_bit = [x for layer in linears(model).values() if layer.four_bit for x in layer.four_bit.tensors()]
    moments = [x for state in optimizer.state.values() for name, x in state.items() if name != "step"]
    found = {
        "held": float(_bytes([*model.parameters(), *four_bit, *moments])),
        "growth": float(growth),
    }
    everywhere = gathered({name: torch.tensor(value) for name, value in found.items()})
    return {name: max(float(one[name]) for one in everywhere) for name in found} | summed({"loss": loss})


def counted(mode: str, several: int) -> dict[str, int]:
    """Return the held bytes and the growth that model/memory.py predicts for the second step."""
    lora, base_4bit = MODES[mode]
    tokens = min(ROWS_AT_ONCE, -(-ROWS // several)) * LENGTH
    training = Training(lora, base_4bit, tokens, processes=several, on_gpu=False)
    memory = training_memory(SHAPE, training)
    return {
        "held": memory.weights + memory.adapter + memory.optimizer,
        "growth": memory.gradients + memory.gathered + memory.activations + memory.working,
    }


def _bytes(tensors: Iterable[Any]) -> int:
    local = (x.to_local() if hasattr(x, "to_local") else x for x in tensors)
    return sum(x.nbytes for x in local if isinstance(x, Tensor))


def in_process(mode: str) -> dict[str, float]:
    with processes("sft", "cpu"):
        return step(mode)


def measure(most: int) -> dict[tuple[str, int], dict[str, float]]:
    """Return (mode, number of processes) -> figures, for one process and for `most` processes."""
    # return freed memory to the system at once, because the peak could hide in memory that stayed resident
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    found = {}
    for mode in MODES:
        for several in sorted({1, most}):
            torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(several)]
            found[mode, several] = figures_of("scale", mode, launcher=torchrun, environment=environment)
    return found


def table(measured: dict[tuple[str, int], dict[str, float]]) -> str:
    lines = ["| | processes | held, counted | held | growth, counted | growth | loss |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|")
    for (mode, several), row in measured.items():
        expected = counted(mode, several)
        pairs = [(expected[name], row[name]) for name in ("held", "growth")]
        cells = [f"{x / 1e6:.1f} MB" for pair in pairs for x in pair]
        lines.append(f"| {mode} | {several} | {' | '.join(cells)} | {row['loss']:.6f} |")
    return "\n".join(lines)


def main(cfg: Config) -> int:
    print(table(measure(cfg.processes)))
    return 0
