"""What embedding our ops saves: memory of one training step of a transformers model, before and after embed.apply.

    python -m burnish.bench embedding [--rounds 3]

Each measurement is a process of its own: a Llama of 2 layers, width 256 and 32,768 words, 4 rows of 512 tokens, fp32,
one thread, forward and backward. Growth is the peak of resident memory over what the process held before the step, the
gradients that stay included. "labels" is the loss that the model's own forward computes, "TRL" the head that TRL's
trainers put on it, called as its SFT trainer calls it. Beside them stands what the shapes say: `counted`.

Needs transformers and trl beside Burnish in one Python: `make test-embed` makes one.
"""

import argparse
import importlib
import json
import subprocess
import sys
import time
from statistics import median
from typing import Any

import torch

from ...algorithms.run.streams import run_program
from ...kernels.head.inputs import CPU_BUDGET
from .trainers import SHAPE, resident

ROWS, LENGTH, VOCABULARY = 4, 512, 32_768
LAYERS = 2
LOSSES = ("labels", "TRL")


def counted(embedded: bool, trained: int) -> dict[str, int]:
    """Bytes of one step, from the shapes: the most that the head holds beside its gradients, and all gradients.

    labels: the logits, their log-softmax, which is saved, and its gradient. TRL: a tile of 4096 tokens by 32,768 words,
    here all logits, and two more like it while a CPU takes its statistics. Ours: a budget.
    """
    logits = 4 * VOCABULARY * ROWS * LENGTH
    return {"head": CPU_BUDGET if embedded else 3 * logits, "gradients": 4 * trained}


def step(loss: str, embedded: bool) -> dict[str, float]:
    """In this process: one step, after one on few tokens."""
    transformers = importlib.import_module("transformers")
    from ...model import embed

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SHAPE | {"vocab_size": VOCABULARY, "num_hidden_layers": LAYERS})
    model: Any = transformers.LlamaForCausalLM(config).train()
    if loss == "TRL":
        utils = importlib.import_module("trl.trainer.utils")
        utils.add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    if embedded:
        embed.apply(model)
    ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH))
    more = {"fused_lm_head": True} if loss == "TRL" else {}

    def run(ids: torch.Tensor) -> float:
        out = model(ids, labels=ids, use_cache=False, **more)
        out.loss.backward()
        return out.loss.item()

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


def measure(rounds: int) -> dict[tuple[str, bool], dict[str, float]]:
    """Medians over rounds, by loss and whether embedded."""
    runs: dict[tuple[str, bool], list[dict[str, float]]] = {}
    for _ in range(rounds):
        for loss in LOSSES:
            for embedded in (False, True):
                command = [
                    sys.executable,
                    "-m",
                    "burnish.bench.runs.embedding",
                    "--worker",
                    loss,
                    str(int(embedded)),
                ]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    raise RuntimeError(f"{' '.join(command)}:\n{done.stderr}")
                runs.setdefault((loss, embedded), []).append(json.loads(done.stdout.splitlines()[-1]))
    return {
        key: {name: median(run[name] for run in group) for name in group[0]} for key, group in runs.items()
    }


def table(measured: dict[tuple[str, bool], dict[str, float]]) -> str:
    lines = ["| loss | embedded | head, counted | with gradients | measured | CPU seconds | loss |"]
    lines.append("|---|---|---:|---:|---:|---:|---:|")
    for (loss, embedded), row in measured.items():
        mb = [f"{x / 1e6:.0f} MB" for x in (row["head"], row["head"] + row["gradients"], row["growth_bytes"])]
        cells = [loss, "yes" if embedded else "no", *mb, f"{row['cpu_seconds']:.1f}", f"{row['loss']:.6f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="memory of a training step, before and after embed.apply")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", nargs=2, metavar=("LOSS", "EMBEDDED"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        loss, embedded = arguments.worker
        print(json.dumps(step(loss, embedded == "1")))
    else:
        print(table(measure(arguments.rounds)))


if __name__ == "__main__":
    sys.exit(run_program("python -m burnish.bench embedding", main))
