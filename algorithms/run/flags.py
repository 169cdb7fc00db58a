"""The flags that commands share: names, help texts, bounds and defaults, each defined once.

A method's Config derives from these classes and adds its own flags. The comment after a flag is its help text, and its
type gives the allowed values. A method sets another default in one line, `steps: int = 200`; help and bounds stay.
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
MOST = 2**53  # the largest count; sums of counts still fit 64 bits
MOST_SAMPLES = 2**16  # the most samples of one prompt; all are kept until they are judged
MAY_DIFFER = (  # flags that --resume may change, such as --steps for a longer run
    "output",
    "resume",
    "reward_timeout",
    "save_dtype",
    "save_every",
    "steps",
)


class Bounds(NamedTuple):
    """The range of numbers for a flag, both ends included. switch: inf is allowed too, and switches the flag off."""

    least: float
    most: float = inf
    switch: bool = False


POSITIONAL = "positional"  # marks an argument that is given without its name

Count = Annotated[int, Bounds(1)]
Size = Annotated[int, Bounds(0)]  # a count that may be 0
Length = Annotated[int, Bounds(2)]  # tokens of a sequence: at least one token and one that it predicts
Samples = Annotated[int, Bounds(0, MOST_SAMPLES)]
Rate = Annotated[float, Bounds(0)]
Weight = Annotated[float, Bounds(0, 1e9)]
Share = Annotated[float, Bounds(0, 1)]
Part = Annotated[float, Bounds(1e-9, 1)]  # a share above 0
Temperature = Annotated[float, Bounds(1e-3, 1e3)]
Seconds = Annotated[float, Bounds(1e-3, 1e6)]
Rank = Annotated[int, Bounds(0, 256)]
Alpha = Annotated[float, Bounds(1e-6)]
Limit = Annotated[float, Bounds(0, switch=True)]
Seed = Annotated[int, Bounds(0, 2**63 - 1)]
SamplingSeed = Annotated[int, Bounds(0, 2**31 - 1)]  # shifted left by 32 bits to make room for the step
Schedule = Literal["constant", "linear", "cosine"]
SaveDtype = Literal["auto", "float32", "bfloat16", "float16"]


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def new_run_folder(name: str) -> Path:
    """Return the path runs/<name>-<date>-<time>, a new folder for each run, so that no run overwrites another."""
    return Path("runs") / time.strftime(f"{name}-%Y%m%d-%H%M%S")


def run_folder(name: str) -> Path:
    """Return the dataclass field for --output of the command `name`. Its default is a new folder in runs/."""
    return field(default_factory=lambda: new_run_folder(name))


# ---- flags


@dataclass(frozen=True, kw_only=True)
class TemplateFlags:
    """Flags of every command that renders conversations."""

    chat_template: str | None = None  # jinja file to use instead of the model's chat template, or 'plain'
    chat_template_kwargs: str | None = (
        None  # JSON of variables for the template: '{"enable_thinking": false}'
    )


@dataclass(frozen=True, kw_only=True)
class RowFlags(TemplateFlags):
    """Flags of every command that reads rows."""

    row_template: Path | None = None  # jinja file that turns a row into prompt and completion, or messages


@dataclass(frozen=True, kw_only=True)
class SamplingFlags:
    """Flags of every command that samples completions."""

    max_new_tokens: Count = 256  # maximum number of tokens in a completion
    sampling_batch_size: Count | None = None  # samples generated at a time; by default as many as fit
    temperature: Temperature = 1.0  # temperature of sampling, and of the model's log-probabilities
    seed: SamplingSeed = 0  # random seed for the order of rows and for sampling


@dataclass(frozen=True, kw_only=True)
class DeviceFlags:
    """Flags of every command that runs a model."""

    device: str = field(default_factory=default_device)  # device to run on: cpu, cuda or cuda:N


@dataclass(frozen=True, kw_only=True)
class AnswerFlags:
    """Flags of every command in which a model answers prompts and functions judge the answers."""

    prompt_column: str | None = None  # column of the prompt, if it has an unusual name
    max_prompt_length: Count = 1024  # maximum number of prompt tokens; longer prompts are dropped
    top_k: Count | None = None  # sample only from the k most likely tokens
    top_p: Part | None = (
        None  # sample from the fewest tokens with this total probability; at most 1,024 tokens
    )
    reward_timeout: Seconds | None = None  # time limit of a function call, in seconds; no limit by default


@dataclass(frozen=True, kw_only=True)
class TrainingFlags(DeviceFlags, RowFlags):
    """Flags of every trainer."""

    model: Path  # Hugging Face folder of the model, or of an adapter to continue training
    data: Path  # file of rows: .jsonl, .json or .parquet
    output: Path  # new folder for metrics, checkpoints and the trained model
    steps: Count = 1000  # number of optimizer steps
    micro_batch_tokens: Count = 8192  # tokens per forward and backward pass; a step may take several
    learning_rate: Rate  # AdamW's peak learning rate
    schedule: Schedule  # learning-rate schedule after the warm-up
    warmup_steps: Size = 20  # steps of linear warm-up to the learning rate
    weight_decay: Rate = 0.0  # AdamW's weight decay on matrices; vectors are not decayed
    max_grad_norm: Annotated[float, Bounds(1e-12, switch=True)] = (
        1.0  # clip gradients to this norm; inf: no clip
    )
    lora_rank: Rank = 0  # train a LoRA adapter of this rank; 0 trains the weights themselves
    lora_alpha: Alpha | None = None  # LoRA's alpha; the adapter's scale is alpha / rank; 2 * rank by default
    base_4bit: bool = False  # keep the frozen weights in 4 bits (NF4), as in QLoRA
    router_aux_loss_coef: Weight | None = None  # weight of the balance loss; by default from config.json
    balance: Literal["pooled", "layer"] = "pooled"  # compute the balance loss over all layers, or per layer
    save_every: Size = 0  # steps between checkpoints; 0 saves only the final model
    save_dtype: SaveDtype = "auto"  # dtype of the saved weights; auto keeps each tensor's dtype in --model
    resume: bool = False  # continue from the last checkpoint in --output
    checkpoint_activations: bool = False  # recompute layers in the backward pass: less memory, more time
    seed: Seed = 0  # random seed for the order of rows, new weights and dropout


@dataclass(frozen=True, kw_only=True)
class SupervisedFlags(TrainingFlags):
    """Flags of every trainer whose rows contain the completions to learn from."""

    max_length: Length = 1024  # maximum number of tokens in a row
    batch_size: Count = 32  # rows per optimizer step


@dataclass(frozen=True, kw_only=True)
class DropoutFlags:
    """Flags of trainers that do not sample from the model in training."""

    lora_dropout: Annotated[float, Bounds(0, 0.99)] = 0.0  # dropout probability on the adapter's inputs


@dataclass(frozen=True, kw_only=True)
class RolloutFlags(AnswerFlags, SamplingFlags, TrainingFlags):
    """Flags of reinforcement learning: prompts, samples per prompt, and reward functions."""

    data: Path  # file of prompts, with columns for the reward functions: .jsonl, .json or .parquet
    reward: tuple[str, ...] = ()  # reward functions, each FILE.py:function or package.module:function
    reward_weights: tuple[float, ...] = ()  # one weight per reward function; all 1 by default
    steps: int = 200  # number of rollouts
    prompts_per_step: Count  # prompts per rollout
    group_size: Annotated[int, Bounds(1, MOST_SAMPLES)]  # samples per prompt
    kl_coefficient: Rate  # weight (beta) of the KL divergence from the initial model
    micro_batch_tokens: int = 16384
    learning_rate: float = 1e-6
    schedule: Schedule = "constant"
    warmup_steps: int = 0


# ---- bounds and help


def bounds(config: type) -> dict[str, Bounds]:
    """Return the bounds of a Config's flags, by name. A subclass's bounds replace those of its base classes."""
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
    """Return the help texts of a Config's flags, by name.

    A help text is the comment after a flag. A flag without a comment has the help text of a base class.
    """
    found: dict[str, str] = {}
    classes: list[type] = [cls for cls in reversed(config.__mro__) if dataclasses.is_dataclass(cls)]
    for cls in classes:
        try:
            source = textwrap.dedent(inspect.getsource(cls))
        except OSError:  # a Config without a source file
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
    """Raise InputError if a flag is out of its bounds or NaN. narrower: bounds by name that depend on other flags.

    Also checks that torch can use the device, that all processes have joined, and that the output folder is not in use.
    With --resume the folder must hold a checkpoint of a run with the same flags.
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
    """Raise InputError if the number of a flag is outside its bounds."""
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
    """Return the dtype of a name in SaveDtype, or None for "auto", which keeps each tensor's dtype in the model folder.

    flag: the flag to name in the InputError for any other name.
    """
    if name not in get_args(SaveDtype):
        raise InputError(f"--{flag}: expected one of {', '.join(get_args(SaveDtype))}, got {name!r}")
    return None if name == "auto" else getattr(torch, name)


def check_device(device: str) -> None:
    """Raise InputError if --device is not a device that torch can use here."""
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
        raise InputError(f"--resume: {folder} holds no {CHECKPOINT}: give the folder of the run by --output")
    for entry in sorted(folder.iterdir()):
        if entry.is_symlink():  # the target of the link would be truncated and overwritten
            raise InputError(
                f"--resume: {entry}: expected the run's own file, got a link: replace it by the file itself"
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
    """Create the folder of --output. Raises InputError if it cannot be created."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output {output}: cannot be written: {error}") from error


def as_json(config: Any) -> str:
    """Return the text of a run's config.json."""
    return json.dumps(dataclasses.asdict(config), indent=2, default=str) + "\n"
