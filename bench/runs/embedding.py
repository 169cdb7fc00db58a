"""Memory of one training step of a transformers model, before and after embed.apply puts our ops inside.

    burnish bench embedding [--rounds 3] [--json FILE] [--keep]

Each measurement is a process of its own: forward and backward of a Llama of 2 layers, width 256 and 32,768 words, on 4
rows of 512 tokens, in fp32, on one thread. Growth is the peak of resident memory beyond the memory before the step. It
includes the gradients that remain. "labels" is the loss that the model's own forward computes. "TRL" is the head that
TRL's trainers put on the model, called as its SFT trainer calls it. `counted` gives the bytes that follow from the
shapes.

The command needs transformers and trl in the same Python as Burnish: `make test-embed` makes such an environment.
"""

import importlib
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ...algorithms.run.flags import Count
from ...kernels.head.inputs import CPU_BUDGET
from ..record import machine, markdown
from .figures import write_figures
from .process import figures_of
from .trainers import SHAPE, resident

ROWS, LENGTH, VOCABULARY = 4, 512, 32_768
LAYERS = 2
LOSSES = ("labels", "TRL")


@dataclass(frozen=True, kw_only=True)
class Config:
    rounds: Count = 3  # measurements of each, in turn; the median is reported
    json: Path | None = None  # write the figures to this file
    keep: bool = False  # keep the figures in bench/results, under their usual name


def counted(embedded: bool, trained: int) -> dict[str, int]:
    """Return the bytes of one step that follow from the shapes: the head's peak without gradients, and all gradients.

    Without our ops, the head holds three tensors as large as the logits. For the loss "labels", these are the logits,
    their log-softmax (which is saved), and its gradient. TRL works in tiles of 4096 tokens by 32,768 words. Here one
    tile holds all logits, and a CPU needs two more while it computes statistics. With our ops, the head's peak is its
    memory budget.
    """
    logits = 4 * VOCABULARY * ROWS * LENGTH
    return {"head": CPU_BUDGET if embedded else 3 * logits, "gradients": 4 * trained}


def step(loss: str, embedded: bool) -> dict[str, float]:
    """Return the figures of one step in this process. A first step, not measured, loads imports and workspaces."""
    transformers = importlib.import_module("transformers")
    from ...model import embed

    # 1. the model
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SHAPE | {"vocab_size": VOCABULARY, "num_hidden_layers": LAYERS})
    model: Any = transformers.LlamaForCausalLM(config).train()
    if loss == "TRL":
        utils = importlib.import_module("trl.trainer.utils")
        utils.add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    if embedded:
        embed.apply(model)

    # 2. its step
    ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH))
    more = {"fused_lm_head": True} if loss == "TRL" else {}

    def run(ids: torch.Tensor) -> float:
        out = model(ids, labels=ids, use_cache=False, **more)
        out.loss.backward()
        return out.loss.item()

    # 3. measured
    run(ids[:1, :8])  # imports, workspaces
    model.zero_grad()
    before, clock = resident("VmRSS"), time.process_time()
    value = run(ids)
    return {
        "loss": value,
        "growth_bytes": resident("VmHWM") - before,
        "cpu_seconds": time.process_time() - clock,
        **counted(embedded, sum(p.numel() for p in model.parameters())),
    }


def in_process(loss: str, embedded: str) -> dict[str, float]:
    return step(loss, embedded == "1")


def measure(rounds: int) -> list[dict[str, Any]]:
    """Measure every loss, with and without our ops. Return a row for each, with the medians over the rounds."""
    runs: dict[tuple[str, bool], list[dict[str, float]]] = {}
    for _ in range(rounds):
        for loss in LOSSES:
            for embedded in (False, True):
                found = figures_of("embedding", loss, str(int(embedded)))
                runs.setdefault((loss, embedded), []).append(found)
    medians = lambda group: {name: median(run[name] for run in group) for name in group[0]}
    return [{"head_of": key[0], "embedded": key[1], **medians(group)} for key, group in runs.items()]


def main(cfg: Config) -> int:
    torch.set_num_threads(1)
    rows = measure(cfg.rounds)
    print(table(rows))
    packages = ("torch", "transformers", "trl")
    facts = machine("cpu") | {name: version(name) for name in packages}
    write_figures("embedding", cfg, machine=facts, rounds=cfg.rounds, rows=rows)
    return 0


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a table in Markdown, for the terminal and for docs/embedding.md."""
    cells = []
    for row in rows:
        sizes = (row["head"], row["head"] + row["gradients"], row["growth_bytes"])
        megabytes = [f"{size / 1e6:,.0f} MB" for size in sizes]
        seconds = f"{row['cpu_seconds']:.1f}"
        applied = "yes" if row["embedded"] else "no"
        cells.append([row["head_of"], applied, *megabytes, seconds, f"{row['loss']:.6f}"])
    head = ("loss", "embedded", "head, counted", "with gradients", "measured", "CPU seconds", "value")
    return markdown(head, cells)
