"""Flags of every command: their names, their help, their bounds and their defaults, each once.

A method's Config is one of these classes with its own flags behind it. The comment of a flag is its help, the type says
what it may be. A method that wants another default sets it in one line, `steps: int = 200`: help and bounds stay.
"""

import ast
import dataclasses
import inspect
import io
import json
import os
import re
import textwrap
import time
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_type_hints

import torch

from ...model.errors import InputError, shown
from ...model.files.config_keys import LARGEST
from ...model.files.text_files import read_object
from .processes import check_joined, rank

CHECKPOINT = "checkpoint.safetensors"
MOST = 2**53  # of a count: what counts sum up to still fits
MOST_SAMPLES = 2**16  # of one prompt: each is kept until all are judged
MAY_DIFFER = (  # flags of a resumed run; a longer run is a common wish
    "output",
    "resume",
    "reward_timeout",
    "save_dtype",
    "save_every",
    "steps",
)


class Bounds(NamedTuple):
    """Numbers that a flag may be, the two ends included. switch: inf is one of them, and switches it off."""

    least: float
    most: float = inf
    switch: bool = False


POSITIONAL = "positional"  # the mark of what is given by its place

Count = Annotated[int, Bounds(1)]
Size = Annotated[int, Bounds(0)]  # a count, or none
Length = Annotated[int, Bounds(2)]  # of a sequence: a token, and one that it predicts
Samples = Annotated[int, Bounds(0, MOST_SAMPLES)]
Rate = Annotated[float, Bounds(0)]
Weight = Annotated[float, Bounds(0, 1e9)]
Share = Annotated[float, Bounds(0, 1)]
Part = Annotated[float, Bounds(1e-9, 1)]  # a share, but not none
Temperature = Annotated[float, Bounds(1e-3, 1e3)]
Seconds = Annotated[float, Bounds(1e-3, 1e6)]
Rank = Annotated[int, Bounds(0, 256)]
Alpha = Annotated[float, Bounds(1e-6)]
Limit = Annotated[float, Bounds(0, switch=True)]
Seed = Annotated[int, Bounds(0, 2**63 - 1)]
SamplingSeed = Annotated[int, Bounds(0, 2**31 - 1)]  # shifted by 32 bits, and a step added
Schedule = Literal["constant", "linear", "cosine"]
SaveDtype = Literal["auto", "float32", "bfloat16", "float16"]


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def new_run_folder(name: str) -> Path:
    """runs/<name>-<date>-<time>: every run gets a folder of its own, so none overwrites another."""
    return Path("runs") / time.strftime(f"{name}-%Y%m%d-%H%M%S")


def run_folder(name: str) -> Path:
    """The default of --output for the command `name`, a field of a Config."""
    return field(default_factory=lambda: new_run_folder(name))


# ---- flags


@dataclass(frozen=True, kw_only=True)
class TemplateFlags:
    """Flags of every command that renders conversations."""

    chat_template: str | None = None  # a jinja file, or plain, in place of the model's own
    chat_template_kwargs: str | None = None  # JSON object of its variables: '{"enable_thinking": false}'


@dataclass(frozen=True, kw_only=True)
class RowFlags(TemplateFlags):
    """Flags of every command that reads rows."""

    row_template: Path | None = None  # a jinja file that makes prompt and completion, or messages, of a row


@dataclass(frozen=True, kw_only=True)
class SamplingFlags:
    """Flags of every command that samples completions."""

    max_new_tokens: Count = 256  # cap on a completion's length
    sampling_batch_size: Count | None = None  # samples at a time, which bounds the cache; all by default
    temperature: Temperature = 1.0  # of sampling, and of scoring
    seed: SamplingSeed = 0  # of the order of rows, and of sampling


@dataclass(frozen=True, kw_only=True)
class DeviceFlags:
    """Flags of every command that runs a model."""

    device: str = field(default_factory=default_device)  # cpu, cuda or cuda:N


@dataclass(frozen=True, kw_only=True)
class AnswerFlags:
    """Flags of every command that has a model answer prompts, and functions judge what it says."""

    prompt_column: str | None = None  # the column that holds the prompt, where its name does not say so
    max_prompt_length: Count = 1024  # tokens; longer prompts are dropped and counted
    top_k: Count | None = None  # sample among the k most likely ids only
    top_p: Part | None = None  # sample among the fewest ids with this much probability, at most 1,024
    reward_timeout: Seconds | None = None  # seconds that a call of the functions has; no limit by default


@dataclass(frozen=True, kw_only=True)
class TrainingFlags(DeviceFlags, RowFlags):
    """Flags of every trainer."""

    model: Path  # Hugging Face folder to start from, or an adapter's, which training goes on with
    data: Path  # rows: .jsonl, .json or .parquet
    output: Path  # new folder: metrics, model
    steps: Count = 1000  # optimizer steps
    micro_batch_tokens: Count = 8192  # tokens in one forward and backward; gradients of several add up
    learning_rate: Rate  # AdamW's, at its peak
    schedule: Schedule  # of the learning rate, behind the warm-up
    warmup_steps: Size = 20  # of linear rise to learning_rate
    weight_decay: Rate = 0.0  # of matrices; vectors have none
    max_grad_norm: Annotated[float, Bounds(1e-12, switch=True)] = 1.0  # gradients are scaled down to it
    lora_rank: Rank = 0  # train an adapter of this rank in place of the weights; 0 trains the weights
    lora_alpha: Alpha | None = None  # the adapter's scale is alpha / rank; 2 * rank by default
    base_4bit: bool = False  # hold the frozen weights in 4 bits (NF4): QLoRA
    router_aux_loss_coef: Weight | None = None  # weight of the experts' balance; config.json's by default
    balance: Literal["pooled", "layer"] = "pooled"  # over all layers at once, or the mean of each layer's own
    save_every: Size = 0  # steps between checkpoints; 0 saves the model once, at the end
    save_dtype: SaveDtype = "auto"  # of what is written; auto: that of --model, tensor by tensor
    resume: bool = False  # go on from the last checkpoint in --output
    checkpoint_activations: bool = False  # run each layer again in the backward: less memory, more time
    seed: Seed = 0  # of the order of rows


@dataclass(frozen=True, kw_only=True)
class SupervisedFlags(TrainingFlags):
    """Flags of every trainer whose rows hold what is learned."""

    max_length: Length = 1024  # tokens of a row
    batch_size: Count = 32  # rows in one optimizer step


@dataclass(frozen=True, kw_only=True)
class DropoutFlags:
    """Flags of trainers that sample nothing from what they train."""

    lora_dropout: Annotated[float, Bounds(0, 0.99)] = 0.0  # share of its inputs that the adapter does not see


@dataclass(frozen=True, kw_only=True)
class RolloutFlags(AnswerFlags, SamplingFlags, TrainingFlags):
    """Flags of reinforcement learning: prompts, samples of each, and who judges them."""

    data: Path  # prompts, with any further columns for the reward functions: .jsonl, .json or .parquet
    reward: tuple[str, ...] = ()  # FILE.py:function or package.module:function, any number
    reward_weights: tuple[float, ...] = ()  # one a reward function; all 1 where none are given
    steps: int = 200  # rollouts
    prompts_per_step: Count  # prompts in one rollout
    group_size: Annotated[int, Bounds(1, MOST_SAMPLES)]  # samples of one prompt
    kl_coefficient: Rate  # beta, of the KL to the model that training started from
    micro_batch_tokens: int = 16384
    learning_rate: float = 1e-6
    schedule: Schedule = "constant"
    warmup_steps: int = 0


# ---- bounds and help


def bounds(config: type) -> dict[str, Bounds]:
    """The bounds of a Config's flags, by name: those of the class that names them last."""
    return {
        name: found
        for cls in reversed(config.__mro__)
        if "__annotations__" in vars(cls)
        for name, hint in get_type_hints(cls, include_extras=True).items()
        if name in vars(cls)["__annotations__"]
        for found in _bounds_in(hint)
    }


def _bounds_in(hint: Any) -> Iterator[Bounds]:
    yield from (x for x in getattr(hint, "__metadata__", ()) if isinstance(x, Bounds))
    for part in get_args(hint):
        yield from _bounds_in(part)


def helps(config: type) -> dict[str, str]:
    """The help of a Config's flags, by name: the comment behind a flag, that of a class above it where it has none."""
    found: dict[str, str] = {}
    classes: list[type] = [cls for cls in reversed(config.__mro__) if dataclasses.is_dataclass(cls)]
    for cls in classes:
        try:
            source = textwrap.dedent(inspect.getsource(cls))
        except OSError:  # a Config that stands in no file
            continue

        # a flag may be wrapped over several lines, with its comment on any of them
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        comments = {one.start[0]: one.string.lstrip("# ") for one in tokens if one.type == tokenize.COMMENT}
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
                if text := " ".join(comments[line] for line in lines if line in comments):
                    found[node.target.id] = text
    return found


# ---- checks


def check_flags(config: Any, **narrower: tuple[float, float]) -> None:
    """Raises InputError where a flag is set and outside its bounds, or NaN. narrower: bounds that hang on others.

    Also checks what every run has: a device that torch can use, processes that have joined, and an output folder that
    no other run uses, or with --resume one that holds a checkpoint of a run with the same flags.
    """
    check_joined()
    torch_dtype(getattr(config, "save_dtype", "auto"))
    of_flags = bounds(type(config))
    for name, found in of_flags.items():
        check_number(name, getattr(config, name), found)
    for name, ends in narrower.items():
        check_number(name, getattr(config, name), Bounds(*ends, of_flags[name].switch))

    check_device(config.device)
    folder = config.output
    if getattr(config, "resume", False):  # compositions have no such flag
        _check_resumable(folder, config)
    elif rank() == 0 and _is_used(folder):
        raise InputError(f"--output {folder}: expected a new or empty folder, found one in use")


def check_number(name: str, value: Any, within: Bounds) -> None:
    """Raises InputError where the number of a flag is outside its bounds."""
    if value is None or (within.switch and value == inf):
        return
    most = min(within.most, MOST if isinstance(value, int) else LARGEST)
    if not within.least <= value <= most:
        if most < MOST:
            expected = f"between {within.least:g} and {most:g}"
        else:
            expected = f"at most {most:g}" if value > most else f"at least {within.least:g}"
        got = shown(value)  # an integer may have more digits than Python writes
        raise InputError(f"--{name.replace('_', '-')}: expected a number {expected}, got {got}")


def torch_dtype(name: str, flag: str = "save-dtype") -> torch.dtype | None:
    """None for auto: as the folder has it that the model was read from."""
    if name not in get_args(SaveDtype):
        raise InputError(f"--{flag}: expected one of {', '.join(get_args(SaveDtype))}, got {name!r}")
    return None if name == "auto" else getattr(torch, name)


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
    for name, value in json.loads(as_json(config)).items():
        if name not in MAY_DIFFER and earlier.get(name) != value:
            had = shown(repr(earlier[name])) if name in earlier else "none"
            raise InputError(
                f"--resume: --{name.replace('_', '-')} is {shown(repr(value))}, but the run in {folder} had {had}"
            )


def make_folder(output: Path) -> None:
    """Make the folder of --output. Raises InputError where it cannot be made."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output {output}: cannot be written: {error}") from error


def as_json(config: Any) -> str:
    """The text of a run's config.json."""
    return json.dumps(dataclasses.asdict(config), indent=2, default=str) + "\n"
