"""What every training loop needs around its three lines (loss, backward, step): a run folder, an optimizer, a schedule.

A run folder holds config.json, metrics.jsonl (one JSON object a step), and checkpoints as Hugging Face folders.
"""

import contextlib
import dataclasses
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..model.checkpoint import save_model
from ..model.errors import InputError
from ..model.tokenizer import Tokenizer
from ..model.transformer import Transformer

Schedule = Literal["constant", "linear", "cosine"]


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_flags(config: Any, **bounds: tuple[float, float]) -> None:
    """check_flags(cfg, steps=(1, inf)) raises InputError where a flag is set and outside its bounds, or NaN.

    Also checks what every run has: a device that torch can use, and an output folder that no other run uses.
    """
    for name, (low, high) in bounds.items():
        value = getattr(config, name)
        if value is not None and not low <= value <= high:
            expected = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
            raise InputError(f"--{name.replace('_', '-')}: expected a number {expected}, got {value}")
    if config.device.partition(":")[0] not in ("cpu", "cuda"):
        raise InputError(f"--device: expected cpu or cuda, got {config.device}")
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"--device {config.device}: torch finds no CUDA device; use --device cpu")
    folder = config.output
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"--output {folder}: expected a new or empty folder, found one in use")


def check_model(model: Transformer, tokenizer: Tokenizer, longest: int) -> None:
    """Refuse a tokenizer with more ids than the model; warn of sequences longer than the model was trained on."""
    if tokenizer.vocab_size > model.config.vocab_size:
        raise InputError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model's vocabulary {model.config.vocab_size}: "
            "they do not belong together"
        )
    if longest > model.config.max_position_embeddings:
        limit = model.config.max_position_embeddings
        print(
            f"warning: sequences of up to {longest} tokens; the model was trained on up to {limit}",
            file=sys.stderr,
        )


def new_run_folder(name: str) -> Path:
    """runs/<name>-<date>-<time>: every run gets a folder of its own, so none overwrites another."""
    return Path("runs") / time.strftime(f"{name}-%Y%m%d-%H%M%S")


def report_counts(source: Path, counts: Mapping[str, int]) -> None:
    """Say what became of every row of a file: none is dropped silently."""
    print(f"{source}: " + ", ".join(f"{count} {reason}" for reason, count in counts.items()))


class Run:
    """A run folder with its metrics and progress bar.

    with Run(folder, config) as run:
        for step in run.steps(1000):
            ...
            run.log({"loss": loss}, tokens=num_tokens)
        run.save(model, tokenizer)
    """

    def __init__(self, folder: Path, config: Any):
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            flags = json.dumps(dataclasses.asdict(config), indent=2, default=str)
            (self.folder / "config.json").write_text(flags + "\n")
            self._metrics = open(self.folder / "metrics.jsonl", "w")  # noqa: SIM115 (open as long as the run)
        except OSError as error:
            raise InputError(f"--output {self.folder}: cannot be written: {error}") from error
        self._bar: tqdm | None = None
        self._step, self._clock = 0, time.perf_counter()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        self._metrics.close()
        if self._bar is not None:
            self._bar.close()

    def steps(self, count: int) -> Iterator[int]:
        self._bar = tqdm(total=count, desc=self.folder.name, unit="step", dynamic_ncols=True)
        self._clock = time.perf_counter()
        for self._step in range(count):
            yield self._step
            self._bar.update()

    def log(self, metrics: dict[str, float | Tensor], tokens: int) -> None:
        """Write one step's metrics, null for NaN. tokens: of the step's sequences; tokens_per_second is theirs, too."""
        now = time.perf_counter()
        values = {name: float(value) for name, value in metrics.items()}
        values = {name: None if math.isnan(value) else value for name, value in values.items()}
        seconds, self._clock = now - self._clock, now
        line = {
            "step": self._step,
            **values,
            "tokens": tokens,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
        }
        self._metrics.write(json.dumps(line) + "\n")
        self._metrics.flush()
        if self._bar is not None:
            shown = {name: f"{value:.3g}" for name, value in list(values.items())[:3] if value is not None}
            self._bar.set_postfix(shown, refresh=False)

    def save(self, model: Transformer, tokenizer: Tokenizer, name: str = "model") -> Path:
        """Write model and tokenizer as a Hugging Face folder inside the run folder, complete or not at all."""
        save_model(model, self.folder / name, tokenizer)
        return self.folder / name


def make_optimizer(model: nn.Module, learning_rate: float, weight_decay: float = 0.0) -> torch.optim.AdamW:
    """AdamW whose weight decay spares vectors (norms and biases)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)


def scheduled(peak: float, step: int, steps: int, warmup_steps: int, schedule: Schedule) -> float:
    """Learning rate of `step` (from 0): linear warm-up to `peak`, then constant, or down to 0 at `steps`."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, steps - warmup_steps)
    if schedule == "linear":
        return peak * (1 - done)
    if schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * done))
    return peak


def optimizer_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: float,
    learning_rate: float,
    max_grad_norm: float,
) -> float:
    """Clip, step, and clear the gradients that the micro-batches have added up. Returns the norm before clipping.

    loss is the whole step's. Raises InputError where it or the norm is not finite; the weights are then as before.
    """
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm).item()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise InputError(
            f"loss is {loss}, gradient norm {norm}: training has diverged and stopped before this update. "
            f"Try a learning rate below {learning_rate:g}, or look for broken rows in the data"
        )
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad()
    return norm


def autocast(device: str) -> contextlib.AbstractContextManager:
    """bf16 over fp32 master weights on a GPU; fp32 throughout on a CPU, where bf16 products are slower."""
    return torch.autocast("cuda", torch.bfloat16) if device.startswith("cuda") else contextlib.nullcontext()


def epochs(count: int, batch_size: int, seed: int) -> Iterator[list[int]]:
    """Indices 0..count-1 in batches for ever: each index once an epoch, in a new order each time, from `seed`.

    The last batch of an epoch is smaller where batch_size does not divide count.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator).tolist()
        for start in range(0, count, batch_size):
            yield order[start : start + batch_size]
