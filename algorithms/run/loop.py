"""The frame of a training loop: run folder, processes, steps, metrics, checkpoints and saved models.

    cfg = with_steps(cfg, rows.parts)
    with Run(cfg, tokenizer, rows=rows.parts, model=Learner(cfg, model)) as run:
        for step in run.steps():
            members = run.next()
            ...
            run.log(metrics, tokens)
        return run.save()

A run folder has config.json, metrics.jsonl (one JSON object per step) and models as Hugging Face folders. With
--eval-data it has held_out.json, and with --keep-best the best model so far in best/. With --save-every it also has
checkpoint.safetensors, from which --resume continues with bit-identical results.
"""

import contextlib
import itertools
import json
import math
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...model.checkpoint import save_model
from ...model.errors import InputError
from ...model.files.finite import TooLarge
from ...model.scalar import ScalarModel
from ...model.text.tokenizer import Tokenizer
from ...model.transformer import Transformer
from ..show.display import Display
from .balance import check_balance
from .checkpoint import Part, read_checkpoint, write_checkpoint
from .checks import CHECKPOINT, torch_dtype
from .flags import TrainingFlags
from .folder import METRICS, SAMPLES, flush_logs, keep_newest, open_metrics, steps_of
from .held_out import (
    BEST,
    Evaluation,
    Figures,
    as_numbers,
    check_metric,
    improved,
    is_over,
    report_best,
    report_held_out,
)
from .inputs import Inputs
from .learner import Learner
from .optimizer import scheduled
from .order import Rows, epochs, parts_of, rows_per_epoch
from .processes import from_rank_0, rank, reshard, shard
from .start import report_start
from .stopping import Terminated, defer, is_asked


class Run:
    """One training run.

    rows: the rows of --data: their number, or the parts of `Items`. tokens: the mean trained tokens of a row, printed
    at the start. learners: the models to train. The keyword of each is the name of the folder in which it is saved. The
    first is the result of the run. frozen: models that are not trained; None entries are skipped. evaluation: the
    evaluation on held-out rows, if the run has --eval-data.

    Creating a run shards all these models over the processes. Inside `with` the run folder exists, and with --resume
    the learners have the state of the checkpoint. The first evaluation is before the checkpoint is read, so it is of
    the untrained models in a resumed run, too.

    start: the number of steps already done, 0 unless --resume. rows_per_epoch: the rows that an epoch draws.
    values: numbers of the method that checkpoints keep.
    """

    def __init__(
        self,
        cfg: TrainingFlags,
        tokenizer: Tokenizer,
        *,
        rows: Rows,
        tokens: float = 0.0,
        frozen: Sequence[Transformer | ScalarModel | None] = (),
        evaluation: Evaluation | None = None,
        **learners: Learner[Any] | None,
    ):
        self.folder = Path(from_rank_0(str(cfg.output)))  # the default name holds the time, which may differ
        self.start = 0
        self.values: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}
        self._cfg, self._tokenizer, self._frozen = cfg, tokenizer, frozen
        self._rows, self._tokens = rows, tokens
        self._inputs = Inputs(cfg)  # now, because a reference may take hours before the first step
        self.rows_per_epoch = rows_per_epoch(rows)
        self._learners = {name: learner for name, learner in learners.items() if learner is not None}
        models = [learner.model for learner in self._learners.values()]
        check_balance(cfg, models)
        shard(*models, *frozen)
        for learner in self._learners.values():
            learner.start()

        self._display: Display | None = None  # on the first process
        self._order: Iterator[list[int]] | None = None
        self._evaluation = evaluation
        self._before: Figures = {}
        self._after: Figures | None = None

    def __enter__(self) -> "Run":
        self._begin()
        if self._cfg.resume:
            file = self.folder / CHECKPOINT
            self.values = read_checkpoint(file, self._parts())
            self.start = self.values.pop("step")
            _check_progress(file, self._cfg, self.start, self.values)
            print(f"continues after step {self.start:,} of {self._cfg.steps:,}")
            _report_rate(self.folder, self._cfg, self.rows_per_epoch, self.start)
        if self._cfg.save_every and rank() == 0:
            self._inputs.digests()  # now, while the files are in the page cache

        self._step = self._done = self.start
        self._clock = time.perf_counter()
        self._metrics = open_metrics(self.folder, self._cfg, self.start)
        keep_newest(self.folder, self._cfg.keep, self.start)
        if rank() == 0:
            self._display = Display(self._cfg, self.folder, self.start)
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        with contextlib.suppress(OSError):  # log() has flushed every line, or raised an error
            self._metrics.close()
        if self._display is not None:
            self._display.close(error)

    def _begin(self) -> None:
        """Print what will happen, and evaluate the untrained models."""
        models = {name: learner.model for name, learner in self._learners.items()}
        report_start(self._cfg, self.rows_per_epoch, self._tokens, models, self._evaluation)
        if self._evaluation is not None:
            self._before = self._measured(self._evaluation)
            if self._cfg.keep_best is not None:
                check_metric(self._cfg.keep_best, self._before)

    def _parts(self) -> dict[str, Part]:
        """Return the parts of a checkpoint by name: each learner's model and optimizer."""
        parts: dict[str, Part] = {}
        for name, learner in self._learners.items():
            optimizer = "optimizer" if name == "model" else f"{name}_optimizer"
            parts |= {name: learner.model, optimizer: learner.optimizer}
        return parts

    # -- steps

    def steps(self) -> Iterator[int]:
        """Yield the remaining steps, from `start` to --steps. Save model and checkpoint every --save-every steps.

        With --patience the steps end earlier, if evaluations no longer improve. After a SIGTERM, save the checkpoint of
        the step under way and raise Terminated.
        """
        if self._display is not None:
            self._display.begin()

        defer()  # from now on a SIGTERM waits for the end of a step
        self._clock = time.perf_counter()
        for step in range(self.start, self._cfg.steps):
            if is_over(self._cfg, self.values):
                break
            self._step, self.seconds = step, {}
            torch.manual_seed(  # for dropout: the same when resumed, different on every process
                (self._cfg.seed + step * 0x9E3779B97F4A7C15 + rank() * 0xBF58476D1CE4E5B9) % 2**63
            )
            yield step

            self._done = step + 1
            reshard(*self._frozen)  # a forward pass without a backward pass leaves their weights gathered
            stops = is_asked()
            self._save_step(step + 1, stops)
            if stops:
                self._report_stop(step + 1)
                raise Terminated(saved=True)

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
        """Write one step's metrics, null for what is not finite, and the evaluation that is due after this step.

        tokens: tokens of the step, for tokens_per_second. It is called after the optimizer's step.
        """
        now = time.perf_counter()
        values = {name: float(value) for name, value in metrics.items()}
        values = {name: value if math.isfinite(value) else None for name, value in values.items()}
        seconds = now - self._clock
        line = {
            "step": self._step,
            **values,
            "tokens": tokens,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            **self._evaluated(),
        }
        self._clock = time.perf_counter()  # the evaluation is in no step's seconds

        try:
            self._metrics.write(json.dumps(line) + "\n")
            self._metrics.flush()
        except OSError as error:
            raise InputError(f"{self.folder / METRICS}: cannot be written: {error}") from error
        if self._display is not None:
            self._display.log(line)

    def log_samples(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Append the step's records, one JSON object per sample, to samples.jsonl."""
        if not records or rank():
            return
        lines = [json.dumps({"step": self._step, **record}, ensure_ascii=False) + "\n" for record in records]
        try:  # a lone surrogate, which UTF-8 cannot hold, is escaped as in JSON
            with open(self.folder / SAMPLES, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write("".join(lines))
        except OSError as error:
            raise InputError(f"{self.folder / SAMPLES}: cannot be written: {error}") from error

    # -- held-out rows

    def _measured(self, evaluation: Evaluation) -> Figures:
        """Return the figures of the models as they are. The step's own `seconds` stay as they are."""
        seconds, self.seconds = self.seconds, {}
        figures = evaluation.measure()
        self.seconds = seconds
        reshard(*self._frozen, *(learner.model for learner in self._learners.values()))
        return figures

    def _evaluated(self) -> dict[str, float | None]:
        """Evaluate after this step if it is due, and keep the model if it is the best.

        Returns the figures for the step's line of metrics.jsonl, with the seconds that they took; {} if none are due.
        """
        cfg, done = self._cfg, self._step + 1
        is_due = done == cfg.steps or (cfg.eval_every and done % cfg.eval_every == 0)
        if self._evaluation is None or not is_due:
            return {}
        started = self._now()
        self._after = self._measured(self._evaluation)
        seconds = self._now() - started
        if cfg.keep_best is not None and improved(cfg.keep_best, self._after, self.values, done):
            self._save(next(iter(self._learners)), BEST)
        return as_numbers(self._after, "eval_") | {"eval_seconds": seconds}

    # -- models

    def save(self) -> Path:
        """Write each model as a Hugging Face folder in the run folder. Returns the result's folder, written last.

        Before, report the evaluation. Its last figures are those of the last step, or are taken now if a resumed run
        had no step left.
        """
        if self._evaluation is not None:
            after = self._measured(self._evaluation) if self._after is None else self._after
            report_held_out(self.folder, self._evaluation, self._before, after)
            if self._cfg.keep_best is not None:
                is_early = self._done < self._cfg.steps
                report_best(self.folder, self._cfg, self.values, is_early)
        folders = [self._save(name, name) for name in reversed(self._learners)]
        return folders[-1]

    def _save_step(self, done: int, stops: bool) -> None:
        """Every --save-every steps, write the result as step-N and replace the checkpoint. done: steps done so far.

        stops: whether the run ends after this step, so that the checkpoint is replaced in any case.
        """
        saves = bool(self._cfg.save_every) and done % self._cfg.save_every == 0
        if saves:
            self._save(next(iter(self._learners)), f"step-{done}")
        if saves or stops:
            flush_logs(self.folder)
            inputs = self._inputs.digests() if rank() == 0 else None
            values = {"step": done, **self.values}
            write_checkpoint(self.folder / CHECKPOINT, self._parts(), values, inputs)
        if saves:
            keep_newest(self.folder, self._cfg.keep, done)

    def _report_stop(self, done: int) -> None:
        if rank() == 0:
            print(
                f"\nSIGTERM: stopped after {done} of {self._cfg.steps} steps; to go on, repeat the command with "
                f"--output {shlex.quote(str(self.folder))} --resume",
                file=sys.stderr,
            )

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


def _report_rate(folder: Path, cfg: TrainingFlags, rows: int, start: int) -> None:
    """Print the learning rates before and after, if another --steps changes those of the remaining steps."""
    steps, peak = steps_of(folder, cfg, rows), cfg.learning_rate
    if rank() or cfg.schedule == "constant" or steps in (None, cfg.steps) or start in (0, cfg.steps):
        return
    rate = lambda step, total: scheduled(peak, step, total, cfg.warmup_steps, cfg.schedule)
    before, after = rate(start - 1, steps), rate(start, cfg.steps)
    if after == rate(start, steps):  # still in the warm-up
        return
    print(
        f"{cfg.steps} steps in place of {steps}: the learning rate, which decays until the last step, goes from "
        f"{before:.3g} in step {start - 1} to {after:.3g} in step {start}"
    )


def _check_progress(file: Path, config: Any, start: int, values: Mapping[str, float]) -> None:
    """Raise InputError if a checkpoint has more steps than --steps, or more batches drawn than its steps allow."""
    if start > config.steps:
        given = "" if config.epochs is None else f", which --epochs {config.epochs:g} takes"
        raise InputError(
            f"--steps: expected at least {start}, the steps done in {file}, got {config.steps}{given}"
        )
    most = start * getattr(config, "max_draws", 1)
    if values.get("draws", 0) > most:
        raise InputError(f"{file}: draws: expected at most {most} in {start} steps, got {values['draws']}")
