"""The frame of a training loop: run folder, processes, steps, metrics, checkpoints and saved models.

    cfg = with_steps(cfg, rows.parts)
    with Run(cfg, tokenizer, rows=rows.parts, model=Learner(cfg, model)) as run:
        for step in run.steps():
            members = run.next()
            ...
            run.log(metrics, tokens)
        return run.save()

A run folder has config.json, metrics.jsonl (one JSON object per step) and models as Hugging Face folders. With
--save-every it also has checkpoint.safetensors, from which --resume continues with bit-identical results.
"""

import contextlib
import itertools
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ...model.checkpoint import save_model
from ...model.errors import InputError
from ...model.files.finite import TooLarge
from ...model.scalar import ScalarModel
from ...model.text.tokenizer import Tokenizer
from ...model.transformer import Transformer
from .balance import check_balance
from .checkpoint import Part, read_checkpoint, write_checkpoint
from .checks import CHECKPOINT, torch_dtype
from .flags import TrainingFlags
from .folder import COMPLETIONS, METRICS, open_metrics
from .learner import Learner
from .order import Rows, epochs, parts_of, rows_per_epoch
from .processes import from_rank_0, rank, reshard, shard


class Run:
    """One training run.

    rows: the rows of --data: their number, or the parts of `Items`. learners: the models to train. The keyword of each
    is the name of the folder in which it is saved. The first is the result of the run. frozen: models that are not
    trained; None entries are skipped.

    Creating a run shards all these models over the processes. Inside `with` the run folder exists, and with --resume
    the learners have the state of the checkpoint.

    start: the number of steps already done, 0 unless --resume. rows_per_epoch: the rows that an epoch draws.
    values: numbers of the method that checkpoints keep.
    """

    def __init__(
        self,
        cfg: TrainingFlags,
        tokenizer: Tokenizer,
        *,
        rows: Rows,
        frozen: Sequence[Transformer | ScalarModel | None] = (),
        **learners: Learner[Any] | None,
    ):
        self.folder = Path(from_rank_0(str(cfg.output)))  # the default name holds the time, which may differ
        self.start = 0
        self.values: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}
        self._cfg, self._tokenizer, self._rows, self._frozen = cfg, tokenizer, rows, frozen
        self.rows_per_epoch = rows_per_epoch(rows)
        self._learners = {name: learner for name, learner in learners.items() if learner is not None}
        models = [learner.model for learner in self._learners.values()]
        check_balance(cfg, models)
        shard(*models, *frozen)
        for learner in self._learners.values():
            learner.start()
        self._bar: tqdm | None = None
        self._order: Iterator[list[int]] | None = None

    def __enter__(self) -> "Run":
        if self._cfg.resume:
            file = self.folder / CHECKPOINT
            self.values = read_checkpoint(file, self._parts())
            self.start = self.values.pop("step")
            _check_progress(file, self._cfg, self.start, self.values)
        self._step, self._clock = self.start, time.perf_counter()
        self._metrics = open_metrics(self.folder, self._cfg, self.start)
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # log() has flushed every line, or raised an error
            self._metrics.close()
        if self._bar is not None:
            self._bar.close()

    def _parts(self) -> dict[str, Part]:
        """Return the parts of a checkpoint by name: each learner's model and optimizer."""
        parts: dict[str, Part] = {}
        for name, learner in self._learners.items():
            optimizer = "optimizer" if name == "model" else f"{name}_optimizer"
            parts |= {name: learner.model, optimizer: learner.optimizer}
        return parts

    # -- steps

    def steps(self) -> Iterator[int]:
        """Yield the remaining steps, from `start` to --steps. Save model and checkpoint every --save-every steps."""
        total = self._cfg.steps
        self._bar = tqdm(
            total=total,
            initial=self.start,
            desc=self.folder.name,
            unit="step",
            dynamic_ncols=True,
            disable=rank() > 0,
        )

        self._clock = time.perf_counter()
        for step in range(self.start, total):
            self._step, self.seconds = step, {}
            torch.manual_seed(  # for dropout: the same when resumed, different on every process
                (self._cfg.seed + step * 0x9E3779B97F4A7C15 + rank() * 0xBF58476D1CE4E5B9) % 2**63
            )
            yield step
            reshard(*self._frozen)  # a forward pass without a backward pass leaves their weights gathered
            self._save_step(step + 1)
            self._bar.update()

    def next(self) -> list[int]:
        """Return the indices of the step's rows among `rows`.

        Each row comes once per epoch, or as often as its weight asks for. The order depends only on --seed.
        """
        if self._order is None:
            self._order = self._batches(skip=self.values.get("draws", self.start))
        return next(self._order)

    def first_batches(self) -> Iterator[list[int]]:
        """Yield batches that hold each row that the run draws, for numbers that are computed once, before training.

        The batches of the first epoch come as `next` draws them, the last one first: of a row that comes twice, the
        batch that training draws first has the last word. Rows that only a later epoch draws follow.
        """
        size = self._cfg.rows_per_step
        drawn = itertools.islice(self._batches(), self._cfg.steps)
        first = list(itertools.islice(drawn, math.ceil(self.rows_per_epoch / size)))
        yield from reversed(first)

        known = set(itertools.chain.from_iterable(first))
        if len(known) < sum(part.rows for part in parts_of(self._rows)):
            later = list(dict.fromkeys(i for batch in drawn for i in batch if i not in known))
            yield from (later[start : start + size] for start in range(0, len(later), size))

    def _batches(self, skip: int = 0) -> Iterator[list[int]]:
        return epochs(self._rows, self._cfg.rows_per_step, self._cfg.seed, skip)

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the time of the block to seconds[name], including the GPU work that it started."""
        started = self._now()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + self._now() - started

    def _now(self) -> float:
        if self._cfg.device.startswith("cuda"):
            torch.cuda.synchronize(self._cfg.device)
        return time.perf_counter()

    # -- output files

    def log(self, metrics: Mapping[str, float | Tensor], tokens: int) -> None:
        """Write one step's metrics, with null for NaN. tokens: tokens of the step, for tokens_per_second."""
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

        try:
            self._metrics.write(json.dumps(line) + "\n")
            self._metrics.flush()
        except OSError as error:
            raise InputError(f"{self.folder / METRICS}: cannot be written: {error}") from error
        if self._bar is not None:
            newest = {name: f"{value:.3g}" for name, value in list(values.items())[:3] if value is not None}
            self._bar.set_postfix(newest, refresh=False)

    def log_completions(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Append the step's records, one JSON object per completion, to completions.jsonl."""
        if not records or rank():
            return
        lines = [json.dumps({"step": self._step, **record}, ensure_ascii=False) + "\n" for record in records]
        try:  # a lone surrogate, which UTF-8 cannot hold, is escaped as in JSON
            with open(self.folder / COMPLETIONS, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write("".join(lines))
        except OSError as error:
            raise InputError(f"{self.folder / COMPLETIONS}: cannot be written: {error}") from error

    def save(self) -> Path:
        """Write each model as a Hugging Face folder in the run folder. Returns the result's folder, written last."""
        folders = [self._save(name, name) for name in reversed(self._learners)]
        return folders[-1]

    def _save_step(self, done: int) -> None:
        """Every --save-every steps, write the result as step-N and replace the checkpoint. done: steps done so far."""
        if self._cfg.save_every and done % self._cfg.save_every == 0:
            self._save(next(iter(self._learners)), f"step-{done}")
            write_checkpoint(self.folder / CHECKPOINT, self._parts(), {"step": done, **self.values})

    def _save(self, name: str, folder_name: str) -> Path:
        """Write one model with its tokenizer, atomically. Returns its folder.

        The dtype is that of --save-dtype. If a number does not fit that dtype, write fp32 with a warning.
        """
        folder, model, tokenizer = self.folder / folder_name, self._learners[name].model, self._tokenizer
        try:
            save_model(model, folder, tokenizer, dtype=torch_dtype(self._cfg.save_dtype), write=rank() == 0)
        except TooLarge as error:  # raised on every process; the trained weights must not be lost
            if rank() == 0:
                print(f"warning: {folder}: written in float32: {error}", file=sys.stderr)
            save_model(model, folder, tokenizer, dtype=torch.float32, write=rank() == 0)
        return folder


def _check_progress(file: Path, config: Any, start: int, values: Mapping[str, float]) -> None:
    """Raise InputError if a checkpoint has more steps than --steps, or more batches drawn than its steps allow."""
    if start > config.steps:
        raise InputError(f"--steps: expected at least {start}, the steps done in {file}, got {config.steps}")
    most = start * getattr(config, "max_draws", 1)
    if values.get("draws", 0) > most:
        raise InputError(f"{file}: draws: expected at most {most} in {start} steps, got {values['draws']}")
