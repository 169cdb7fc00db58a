"""The frame of a training loop: run folder, processes, steps, metrics, checkpoints and saved models.

    with Run(cfg, tokenizer, model=Learner(cfg, model)) as run:
        for step in run.steps():
            members = run.next(len(rows), cfg.batch_size)
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
import os
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
from ...model.files.replacing import replacing
from ...model.files.text_files import check_regular, parse_json
from ...model.scalar import ScalarModel
from ...model.text.tokenizer import Tokenizer
from ...model.transformer import Transformer
from .balance import check_balance
from .checkpoint import Part, read_checkpoint, write_checkpoint
from .flags import CHECKPOINT, TrainingFlags, as_json, torch_dtype
from .learner import Learner
from .optimizer import epochs
from .processes import from_rank_0, rank, reshard, shard

METRICS, COMPLETIONS = "metrics.jsonl", "completions.jsonl"


class Run:
    """One training run.

    learners: the models to train. The keyword of each is the name of the folder in which it is saved. The first is the
    result of the run. frozen: models that are not trained; None entries are skipped.

    Creating a run shards all these models over the processes. Inside `with` the run folder exists, and with --resume
    the learners have the state of the checkpoint.

    start: the number of steps already done, 0 unless --resume. values: numbers of the method that checkpoints keep.
    """

    def __init__(
        self,
        cfg: TrainingFlags,
        tokenizer: Tokenizer,
        frozen: Sequence[Transformer | ScalarModel | None] = (),
        **learners: Learner[Any] | None,
    ):
        self.folder = Path(from_rank_0(str(cfg.output)))  # the default name holds the time, which may differ
        self.start = 0
        self.values: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}
        self._cfg, self._tokenizer, self._frozen = cfg, tokenizer, frozen
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
        self._metrics = self._opened()
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

    def _opened(self) -> Any:
        """Open metrics.jsonl for appending, after removing all lines of steps since the checkpoint."""
        if rank():
            return open(os.devnull, "a")
        metrics, completions = self.folder / METRICS, self.folder / COMPLETIONS
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            ends = [
                _end_of_steps(file, self.start, a_line_a_step=file == metrics)
                for file in (metrics, completions)
            ]

            # change files only after both have been read
            with replacing(self.folder / "config.json") as beside:
                beside.write_text(as_json(self._cfg))
            _cut(metrics, ends[0])
            _cut(completions, ends[1])
            return open(metrics, "a")
        except OSError as error:
            raise InputError(f"--output {self.folder}: cannot be written: {error}") from error

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

    def next(self, count: int, size: int) -> list[int]:
        """Return the indices of the next batch: `size` of `count` rows.

        Each row comes once per epoch, in an order that depends only on --seed.
        """
        if self._order is None:
            self._order = epochs(count, size, self._cfg.seed, skip=self.values.get("draws", self.start))
        return next(self._order)

    def first_epoch(self, count: int, size: int) -> Iterator[list[int]]:
        """Return the batches that `next` draws first, up to one epoch or --steps batches."""
        steps = min(self._cfg.steps, math.ceil(count / size))
        return itertools.islice(epochs(count, size, self._cfg.seed), steps)

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


# ---- files of an earlier run


def _check_progress(file: Path, config: Any, start: int, values: Mapping[str, float]) -> None:
    """Raise InputError if a checkpoint has more steps than --steps, or more batches drawn than its steps allow."""
    if start > config.steps:
        raise InputError(f"--steps: expected at least {start}, the steps done in {file}, got {config.steps}")
    most = start * getattr(config, "max_draws", 1)
    if values.get("draws", 0) > most:
        raise InputError(f"{file}: draws: expected at most {most} in {start} steps, got {values['draws']}")


def _end_of_steps(file: Path, step: int, a_line_a_step: bool) -> int:
    """Return the number of bytes up to the first line of `step` or a later step; 0 if the file does not exist.

    Broken lines before that place are kept, because only people read them again. A last line that a crash has cut off
    is not counted. a_line_a_step: the file has one line per step. The number of a broken line then gives its step. In
    other files a broken line raises InputError.
    """
    if not os.path.lexists(file):
        return 0
    check_regular(file)
    end = unread = count = 0
    with open(file, "rb") as lines:
        for i, line in enumerate(lines):
            found = _step_of(line)
            if found is None and not line.endswith(b"\n"):  # cut off by a crash
                break

            if found is None and not a_line_a_step:
                got = line[:60].decode("utf-8", "replace")
                raise InputError(f"{file} line {i + 1}: expected an object with its step, got {got!r}")
            if (i if found is None else found) >= step:
                break
            end, count, unread = end + len(line), count + 1, unread + (found is None)

    if a_line_a_step and (unread or count != step):
        print(
            f"warning: {file}: only {count - unread} of the first {step} steps can be read; the file is continued",
            file=sys.stderr,
        )
    return end


def _step_of(line: bytes) -> int | None:
    try:
        record = parse_json(line.decode("utf-8", "replace"), "")
    except InputError:
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return step if isinstance(step, int) and step >= 0 else None


def _cut(file: Path, end: int) -> None:
    """Truncate a file, if it exists, to its first `end` bytes. Add a newline if the last line lacks it."""
    if not os.path.lexists(file):
        return
    os.truncate(file, end)
    with open(file, "rb+") as opened:
        opened.seek(max(end - 1, 0))
        if opened.read(1) not in (b"", b"\n"):
            opened.write(b"\n")
