"""What every training loop needs around its three lines (loss, backward, step): a run folder, an optimizer, a schedule.

A run folder holds config.json, metrics.jsonl (one JSON object a step), models as Hugging Face folders, and, where
--save-every asks for it, checkpoint.safetensors, from which --resume goes on to the same bits.
"""

import contextlib
import dataclasses
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ...model.checkpoint import save_model
from ...model.errors import InputError, shown
from ...model.files.config_keys import LARGEST
from ...model.files.finite import TooLarge
from ...model.files.text_files import check_regular, parse_json, read_object
from ...model.linear import whole
from ...model.scalar import ScalarModel
from ...model.text.token_ids import say_what_never_ends
from ...model.text.tokenizer import Tokenizer
from ...model.transformer import Transformer
from ..data.ids import Item, check_ids
from ..data.rows import Tally
from .calls import brief
from .checkpoint import Part, read_checkpoint, write_checkpoint
from .processes import check_joined, from_rank_0, rank

CHECKPOINT = "checkpoint.safetensors"
METRICS, COMPLETIONS = "metrics.jsonl", "completions.jsonl"
NAMED = 30  # columns that a line names
LIMITS = {"max_grad_norm", "clip_high", "dual_clip", "value_clip", "mismatch_cap"}  # inf switches them off
MOST = 2**53  # of a count: what counts sum up to still fits
MOST_SAMPLES = 2**16  # of one prompt: each is held until all are judged
MAY_DIFFER = (
    "output",
    "resume",
    "reward_timeout",
    "save_dtype",
    "save_every",
    "steps",
)  # flags of a resumed run; a longer run is a common wish
Schedule = Literal["constant", "linear", "cosine"]
SaveDtype = Literal["auto", "float32", "bfloat16", "float16"]


def torch_dtype(name: str, flag: str = "save-dtype") -> torch.dtype | None:
    """None for auto: as the folder has it that the model was read from."""
    if name not in get_args(SaveDtype):
        raise InputError(f"--{flag}: expected one of {', '.join(get_args(SaveDtype))}, got {name!r}")
    return None if name == "auto" else getattr(torch, name)


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_flags(config: Any, **bounds: tuple[float, float]) -> None:
    """check_flags(cfg, steps=(1, inf)) raises InputError where a flag is set and outside its bounds, or NaN.

    Also checks what every run has: a device that torch can use, processes that have joined, and an output folder that
    no other run uses, or with --resume one that holds a checkpoint of a run with the same flags.
    """
    check_joined()
    torch_dtype(getattr(config, "save_dtype", "auto"))
    if hasattr(config, "router_aux_loss_coef"):
        bounds |= {"router_aux_loss_coef": (0, 1e9)}
    for name, (low, high) in bounds.items():
        value = getattr(config, name)
        if value != math.inf or name not in LIMITS:
            high = min(high, MOST if isinstance(value, int) else LARGEST)
        if value is not None and not low <= value <= high:
            if high < MOST:
                expected = f"between {low:g} and {high:g}"
            else:
                expected = f"at most {high:g}" if value > high else f"at least {low:g}"
            got = shown(value)  # an integer may have more digits than Python writes
            raise InputError(f"--{name.replace('_', '-')}: expected a number {expected}, got {got}")
    check_device(config.device)
    folder = config.output
    if getattr(config, "resume", False):  # compositions have no such flag
        _check_resumable(folder, config)
    elif rank() == 0 and _is_used(folder):
        raise InputError(f"--output {folder}: expected a new or empty folder, found one in use")


def check_device(device: str) -> None:
    """Raises InputError where --device is none that torch can use here."""
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", device):
        raise InputError(f"--device: expected cpu, cuda or cuda:N, got {shown(device)}")
    if device != "cpu" and int(device[5:] or 0) >= (found := torch.cuda.device_count()):
        raise InputError(f"--device {device}: torch finds {found} CUDA devices; use --device cpu")


def _is_used(folder: Path) -> bool:
    try:
        return os.path.lexists(folder) and not (os.path.isdir(folder) and not os.listdir(folder))
    except OSError as error:
        raise InputError(f"--output {folder}: cannot be read: {error.strerror}") from error


def _check_resumable(folder: Path, config: Any) -> None:
    if not os.path.isfile(folder / CHECKPOINT):  # False also for a name that no file can have
        raise InputError(f"--resume: {folder} holds no {CHECKPOINT}: name the run to go on with by --output")
    for entry in sorted(folder.iterdir()):
        if entry.is_symlink():  # what it leads to would be cut, and written over
            raise InputError(
                f"--resume: {entry}: expected the run's own file, got a link: put the file itself there"
            )
    try:
        earlier = read_object(folder / "config.json")
    except InputError as error:
        raise InputError(f"--resume: {error}") from error
    for name, value in json.loads(_flags(config)).items():
        if name not in MAY_DIFFER and earlier.get(name) != value:
            had = shown(repr(earlier[name])) if name in earlier else "none"
            raise InputError(
                f"--resume: --{name.replace('_', '-')} is {shown(repr(value))}, but the run in {folder} had {had}"
            )


def _flags(config: Any) -> str:
    return json.dumps(dataclasses.asdict(config), indent=2, default=str) + "\n"


def check_model(
    model: Transformer | ScalarModel,
    tokenizer: Tokenizer,
    items: Iterable[Item],
    longest: int,
    name: str = "the model",
) -> None:
    """Refuse items with ids that the model, called `name`, has no row for; no such id is drawn from then on.

    Says so where a stop token is one, and where sequences are longer than the model was trained on.
    """
    rows = model.config.vocab_size
    check_ids(items, tokenizer, rows, name)
    tokenizer.keep_below(rows)
    say_what_never_ends(tokenizer.stop_ids, rows, name)
    if longest > model.config.max_position_embeddings and rank() == 0:
        limit = model.config.max_position_embeddings
        print(
            f"warning: sequences of up to {longest} tokens; the model was trained on up to {limit}",
            file=sys.stderr,
        )


def check_tokenizer(folder: Path, tokenizer: Tokenizer, flag: str) -> None:
    """Refuse a second model, named by --flag, whose ids mean other tokens than those of --model."""
    if Tokenizer.load(folder).backend.get_vocab() != tokenizer.backend.get_vocab():
        raise InputError(
            f"--{flag} {folder}: its tokenizer is not that of --model: it would score other tokens"
        )


def new_run_folder(name: str) -> Path:
    """runs/<name>-<date>-<time>: every run gets a folder of its own, so none overwrites another."""
    return Path("runs") / time.strftime(f"{name}-%Y%m%d-%H%M%S")


def report_counts(source: Path, counts: Mapping[str, int]) -> None:
    """Say what became of every row of a file, and which columns nothing used: none is dropped silently."""
    print(f"{source}: " + ", ".join(f"{count} {reason}" for reason, count in counts.items()))
    if isinstance(counts, Tally) and counts.unused:
        names = [brief(name, 60) for name in counts.unused]
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        print(f"{source}: columns not used: {', '.join(names[:NAMED])}{more}")


class Run:
    """A run folder with its metrics and progress bar, and the checkpoints of what the run trains.

    with Run(config, model=model, optimizer=optimizer) as run:
        batches = epochs(len(rows), config.batch_size, config.seed, skip=run.start)
        for step in run.steps():
            ...
            run.log({"loss": loss}, tokens=num_tokens)
            run.save_step(model, tokenizer)
        run.save(model, tokenizer)

    start: steps done before, 0 unless --resume; the parts, modules and optimizers, then have the state of that step.
    values: numbers that a checkpoint keeps beside them, for an algorithm's own use.
    """

    def __init__(self, config: Any, **parts: Part):
        self.folder = Path(from_rank_0(str(config.output)))  # by default its name tells the time
        self.start = 0
        self.values: dict[str, Any] = {}
        self._config, self._parts = config, parts
        if config.resume:
            self.values = read_checkpoint(self.folder / CHECKPOINT, parts)
            self.start = self.values.pop("step")
            _check_progress(self.folder / CHECKPOINT, config, self.start, self.values)
        self._bar: tqdm | None = None
        self._step, self._clock = self.start, time.perf_counter()
        if rank():
            self._metrics = open(os.devnull, "a")  # noqa: SIM115 (open as long as the run)
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            metrics, completions = self.folder / METRICS, self.folder / COMPLETIONS
            ends = [  # of what was logged before the checkpoint; all else is done again
                _end_of_steps(file, self.start, a_line_a_step=file == metrics)
                for file in (metrics, completions)
            ]
            _replace(self.folder / "config.json", _flags(config))
            _cut(metrics, ends[0])
            _cut(completions, ends[1])
            self._metrics = open(metrics, "a")  # noqa: SIM115
        except OSError as error:
            raise InputError(f"--output {self.folder}: cannot be written: {error}") from error

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # log() has flushed every line, or said why not
            self._metrics.close()
        if self._bar is not None:
            self._bar.close()

    def steps(self) -> Iterator[int]:
        """The steps that are left: from `start` to the config's number of steps."""
        total = self._config.steps
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
            self._step = step
            torch.manual_seed(  # dropout's, resumed or not; another one on every process
                (self._config.seed + step * 0x9E3779B97F4A7C15 + rank() * 0xBF58476D1CE4E5B9) % 2**63
            )
            yield step
            self._bar.update()

    def log(self, metrics: Mapping[str, float | Tensor], tokens: int) -> None:
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
        try:
            self._metrics.write(json.dumps(line) + "\n")
            self._metrics.flush()
        except OSError as error:
            raise InputError(f"{self.folder / METRICS}: cannot be written: {error}") from error
        if self._bar is not None:
            newest = {name: f"{value:.3g}" for name, value in list(values.items())[:3] if value is not None}
            self._bar.set_postfix(newest, refresh=False)

    def log_completions(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Add the step's records to completions.jsonl, where there are any."""
        if not records or rank():
            return
        lines = [json.dumps({"step": self._step, **record}, ensure_ascii=False) + "\n" for record in records]
        try:  # what UTF-8 cannot hold, half of a surrogate pair, is escaped as JSON does it
            with open(self.folder / COMPLETIONS, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write("".join(lines))
        except OSError as error:
            raise InputError(f"{self.folder / COMPLETIONS}: cannot be written: {error}") from error

    def save(self, model: Transformer | ScalarModel, tokenizer: Tokenizer, name: str = "model") -> Path:
        """Write model and tokenizer as a Hugging Face folder inside the run folder, complete or not at all.

        In the dtype that --save-dtype says, or in fp32, with a warning, where a number does not fit it.
        """
        folder, dtype = self.folder / name, torch_dtype(getattr(self._config, "save_dtype", "auto"))
        try:
            save_model(model, folder, tokenizer, dtype=dtype, write=rank() == 0)
        except TooLarge as error:  # on every process: what was trained is not lost for that
            if rank() == 0:
                print(f"warning: {folder}: written in float32: {error}", file=sys.stderr)
            save_model(model, folder, tokenizer, dtype=torch.float32, write=rank() == 0)
        return folder

    def save_step(self, model: Transformer | ScalarModel, tokenizer: Tokenizer) -> None:
        """Every --save-every steps: the model as step-N, and the checkpoint, which replaces the one before."""
        done = self._step + 1
        if self._config.save_every and done % self._config.save_every == 0:
            self.save(model, tokenizer, f"step-{done}")
            write_checkpoint(self.folder / CHECKPOINT, self._parts, {"step": done, **self.values})


def _check_progress(file: Path, config: Any, start: int, values: Mapping[str, float]) -> None:
    """Raises InputError where a checkpoint has done more than the run is to do, or has drawn more than it could."""
    if start > config.steps:
        raise InputError(f"--steps: expected at least {start}, which {file} has done, got {config.steps}")
    most = start * getattr(config, "max_draws", 1)
    if values.get("draws", 0) > most:
        raise InputError(f"{file}: draws: expected at most {most} in {start} steps, got {values['draws']}")


def _end_of_steps(file: Path, step: int, a_line_a_step: bool) -> int:
    """How many bytes of a file of records are of the steps before `step`; 0 without the file.

    The lines stay as they are, broken bytes in them included: nothing but people reads them again. A line that does
    not tell its step is that of its place where there is a line a step. Raises InputError naming it where there is not.
    """
    if not os.path.lexists(file):
        return 0
    check_regular(file)
    end = unread = count = 0
    with open(file, "rb") as lines:
        for i, line in enumerate(lines):
            found = _step_of(line)
            if found is None and not line.endswith(b"\n"):  # a crash has torn it
                break
            if found is None and not a_line_a_step:
                got = line[:60].decode("utf-8", "replace")
                raise InputError(f"{file} line {i + 1}: expected an object with its step, got {got!r}")
            if (i if found is None else found) >= step:
                break
            end, count, unread = end + len(line), count + 1, unread + (found is None)
    if a_line_a_step and (unread or count != step):
        print(
            f"warning: {file}: {count - unread} of the first {step} steps can be read; it goes on as it is",
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
    """Leave the first `end` bytes of a file, if there is one, and the end of a line behind them."""
    if not os.path.lexists(file):
        return
    os.truncate(file, end)
    with open(file, "rb+") as opened:
        opened.seek(max(end - 1, 0))
        if opened.read(1) not in (b"", b"\n"):
            opened.write(b"\n")


def _replace(file: Path, text: str) -> None:
    """Write a file whole: a crash leaves the earlier one."""
    beside = file.with_name(f".{file.name}.partial")
    try:
        beside.write_text(text)
        beside.replace(file)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def make_optimizer(
    model: nn.Module, learning_rate: float, weight_decay: float = 0.0, eps: float = 1e-8
) -> torch.optim.AdamW:
    """AdamW whose weight decay spares vectors (norms and biases)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), eps=eps, fused=True)


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
    norm = whole(nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)).item()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        cause = f"Try a learning rate below {learning_rate:g}, or look for broken rows in the data"
        if not optimizer.state:  # weights were finite when they were read
            cause = (
                "No update came before it, so the learning rate is not why: look for broken rows in the data"
            )
        raise InputError(
            f"loss is {loss}, gradient norm {norm}: training has diverged and stopped before this update. {cause}"
        )
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad()
    return norm


def autocast(device: str) -> contextlib.AbstractContextManager:
    """bf16 over fp32 master weights on a GPU; fp32 throughout on a CPU, where bf16 products are slower."""
    return torch.autocast("cuda", torch.bfloat16) if device.startswith("cuda") else contextlib.nullcontext()


def epochs(count: int, batch_size: int, seed: int, skip: int = 0) -> Iterator[list[int]]:
    """Indices 0..count-1 in batches for ever: each index once an epoch, in a new order each time, from `seed`.

    The last batch of an epoch is smaller where batch_size does not divide count. skip: batches left out at the start,
    which a resumed run has had.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator).tolist()
        for start in range(0, count, batch_size):
            if skip:
                skip -= 1
                continue
            yield order[start : start + batch_size]
