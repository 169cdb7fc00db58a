"""The flags that commands share: names, help texts, bounds and defaults, each defined once.

A method's Config derives from these classes and adds its own flags. The comment after a flag is its help text, and its
type gives the allowed values. A method sets another default in one line, `steps: int = 200`; help and bounds stay.
The class that first defines a flag gives its group in --help.
"""

import ast
import dataclasses
import inspect
import io
import secrets
import textwrap
import time
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, get_args, get_type_hints

import torch

from ...model.errors import InputError, shown
from ...model.files.config_keys import LARGEST

MOST = 2**53  # the largest count; sums of counts still fit 64 bits
MOST_SAMPLES = 2**16  # the most samples of one prompt; all are kept until they are judged


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
Often = Annotated[float, Bounds(1e-6, 1000)]  # how often a row comes in an epoch
Share = Annotated[float, Bounds(0, 1)]
Part = Annotated[float, Bounds(1e-9, 1)]  # a share above 0
Temperature = Annotated[float, Bounds(1e-3, 1e3)]
Seconds = Annotated[float, Bounds(1e-3, 1e6)]
Rank = Annotated[int, Bounds(0, 256)]
Alpha = Annotated[float, Bounds(1e-6)]
Limit = Annotated[float, Bounds(0, switch=True)]
Seed = Annotated[int, Bounds(0, 2**63 - 1)]
SamplingSeed = Annotated[int, Bounds(0, 2**31 - 1)]  # shifted left by 32 bits to make room for the step
Epochs = Annotated[float, Bounds(1e-6, 1e6)]
OptimizerName = Literal["adamw", "muon", "adamw8bit"]
Schedule = Literal["constant", "linear", "cosine"]
Data = Path | tuple[Path, ...]  # one argument or several: files, globs, folders of datasets.save_to_disk
SaveDtype = Literal["auto", "float32", "bfloat16", "float16"]


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def new_run_folder(name: str) -> Path:
    """Return the path runs/<name>-<date>-<time>-<random>, a new folder for each run, also in the same second."""
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def run_folder(name: str) -> Path:
    """Return the dataclass field for --output of the command `name`. Its default is a new folder in runs/."""
    return field(default_factory=lambda: new_run_folder(name))


# ---- flags


@dataclass(frozen=True, kw_only=True)
class TemplateFlags:
    """Flags of every command that renders conversations."""

    group: ClassVar = "data"

    chat_template: str | None = None  # jinja file to use instead of the model's chat template, or 'plain'
    chat_template_kwargs: str | None = (
        None  # JSON of variables for the template: '{"enable_thinking": false}'
    )


@dataclass(frozen=True, kw_only=True)
class RowFlags(TemplateFlags):
    """Flags of every command that reads rows."""

    group: ClassVar = "data"

    row_template: Path | None = None  # jinja file that turns a row into prompt and completion, or messages


@dataclass(frozen=True, kw_only=True)
class SamplingFlags:
    """Flags of every command that samples completions."""

    group: ClassVar = "sampling"

    max_new_tokens: Count = 256  # maximum number of tokens in a completion
    sampling_batch_size: Count | None = None  # samples generated at a time (default: as many as fit)
    temperature: Temperature = 1.0  # temperature of sampling, and of the model's log-probabilities
    seed: SamplingSeed = 0  # random seed for the order of rows and for sampling


@dataclass(frozen=True, kw_only=True)
class DeviceFlags:
    """Flags of every command that runs a model."""

    group: ClassVar = "run"

    device: str = field(default_factory=default_device)  # device to run on: cpu, cuda or cuda:N


@dataclass(frozen=True, kw_only=True)
class AnswerFlags:
    """Flags of every command in which a model answers prompts and functions judge the answers."""

    group: ClassVar = "sampling"

    prompt_column: str | None = None  # column of the prompt, if it has an unusual name
    max_prompt_length: Count = 1024  # maximum number of prompt tokens; longer prompts are dropped
    top_k: Count | None = None  # sample only from the k most likely tokens
    top_p: Part | None = (
        None  # sample from the fewest tokens with this total probability; at most 1024 tokens
    )
    reward_timeout: Seconds | None = None  # time limit of a function call, in seconds (default: no limit)


@dataclass(frozen=True, kw_only=True)
class OptimizerFlags:
    """Flags of the optimizer and its learning rate, of every trainer."""

    group: ClassVar = "optimizer"

    steps: Count = 1000  # number of optimizer steps
    epochs: Epochs | None = None  # passes over the rows, in place of --steps
    optimizer: OptimizerName = "adamw"  # optimizer; docs/optimizers.md compares them
    learning_rate: Rate  # peak learning rate
    schedule: Schedule  # learning-rate schedule after the warm-up
    warmup_steps: Size = 20  # steps of linear warm-up to the learning rate
    weight_decay: Rate = 0.0  # weight decay on matrices; vectors are not decayed
    max_grad_norm: Annotated[float, Bounds(1e-12, switch=True)] = (
        1.0  # clip gradients to this norm; inf: no clip
    )
    micro_batch_tokens: Count = 8192  # tokens per forward and backward pass; a step may take several
    checkpoint_activations: bool = False  # recompute layers in the backward pass: less memory, more time
    router_aux_loss_coef: Weight | None = None  # weight of the balance loss (default: from config.json)
    balance: Literal["pooled", "layer"] = "pooled"  # compute the balance loss over all layers, or per layer


@dataclass(frozen=True, kw_only=True)
class AdapterFlags:
    """Flags of a LoRA adapter and of frozen weights, of every trainer."""

    group: ClassVar = "adapter"

    lora_rank: Rank = 0  # train a LoRA adapter of this rank; 0 trains the weights themselves
    lora_alpha: Alpha | None = None  # LoRA's alpha; the adapter's scale is alpha / rank (default: 2 * rank)
    lora_targets: tuple[str, ...] = ()  # names of layers, all-linear or a regex (default: the usual seven)
    lora_dora: bool = False  # DoRA: also train the length of each row of a layer's weight
    lora_rslora: bool = False  # rsLoRA: the adapter's scale is alpha / sqrt(rank)
    base_4bit: bool = False  # keep the frozen weights in 4 bits (NF4), as in QLoRA


@dataclass(frozen=True, kw_only=True)
class EvaluationFlags:
    """Flags of the evaluation on held-out rows during training, of every trainer."""

    group: ClassVar = "evaluation"

    eval_data: Data | None = None  # files of held-out rows, in the form of --data
    eval_every: Size = 0  # steps between evaluations; 0 evaluates before the first and after the last step
    keep_best: str | None = None  # metric of the evaluation by which the best model is kept in best/
    patience: Count | None = (
        None  # stop after this many evaluations in a row that --keep-best did not improve
    )


@dataclass(frozen=True, kw_only=True)
class RunFlags(DeviceFlags):
    """Flags of the run folder: its files, checkpoints and models, of every trainer."""

    group: ClassVar = "run"

    output: Path  # new folder for metrics, checkpoints and the trained model
    resume: bool = False  # continue from the last checkpoint in --output
    save_every: Size = 0  # steps between checkpoints; 0 saves only the final model
    keep: Count | None = None  # number of the newest step-N folders to keep (default: all)
    save_dtype: SaveDtype = "auto"  # dtype of the saved weights; auto keeps each tensor's dtype in --model
    log_every: Count | None = (
        None  # steps between reports and, without a terminal, printed lines (default: 1/50 of the steps)
    )
    log_to: Literal["tensorboard"] | None = (
        None  # also write the metrics for this program, into the run folder
    )
    seed: Seed = 0  # random seed for the order of rows, new weights and dropout


@dataclass(frozen=True, kw_only=True)
class TrainingFlags(OptimizerFlags, AdapterFlags, EvaluationFlags, RunFlags, RowFlags):
    """Flags of every trainer."""

    group: ClassVar = "data"

    model: Path  # Hugging Face folder of the model, or of an adapter to continue training
    data: Data  # files of rows: .jsonl, .json, .parquet or .arrow
    data_weights: tuple[Often, ...] = ()  # how often the rows of each file come in an epoch (default: all 1)

    @property
    def rows_per_step(self) -> int:
        """The number of rows that a step draws from --data."""
        raise NotImplementedError  # SupervisedFlags and RolloutFlags have it


@dataclass(frozen=True, kw_only=True)
class SupervisedFlags(TrainingFlags):
    """Flags of every trainer whose rows contain the completions to learn from."""

    group: ClassVar = "data"

    max_length: Length = 1024  # maximum number of tokens in a row
    batch_size: Count = 32  # rows per optimizer step

    @property
    def rows_per_step(self) -> int:
        return self.batch_size


@dataclass(frozen=True, kw_only=True)
class DropoutFlags:
    """Flags of trainers that do not sample from the model in training."""

    group: ClassVar = "adapter"

    lora_dropout: Annotated[float, Bounds(0, 0.99)] = 0.0  # dropout probability on the adapter's inputs


@dataclass(frozen=True, kw_only=True)
class RewardFlags:
    """Flags of what reinforcement learning maximises."""

    group: ClassVar = "objective"

    reward: tuple[str, ...] = ()  # reward functions, each FILE.py:function or package.module:function
    reward_weights: tuple[float, ...] = ()  # one weight per reward function (default: all 1)
    kl_coefficient: Rate  # weight (beta) of the KL divergence from the initial model


@dataclass(frozen=True, kw_only=True)
class RolloutFlags(RewardFlags, AnswerFlags, SamplingFlags, TrainingFlags):
    """Flags of reinforcement learning: prompts, samples per prompt, and reward functions."""

    group: ClassVar = "sampling"

    data: Data  # prompts with columns for the reward functions: .jsonl, .json, .parquet or .arrow
    steps: int = 200  # number of rollouts
    prompts_per_step: Count  # prompts per rollout
    group_size: Annotated[int, Bounds(1, MOST_SAMPLES)]  # samples per prompt
    micro_batch_tokens: int = 16384
    samples: Size = 8  # samples of a step that are written to samples.jsonl
    learning_rate: float = 1e-6
    schedule: Schedule = "constant"
    warmup_steps: int = 0

    @property
    def rows_per_step(self) -> int:
        return self.prompts_per_step


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


def check_number(name: str, value: Any, within: Bounds) -> None:
    """Raise InputError if the number of a flag, or one of several, is outside its bounds."""
    if isinstance(value, tuple):
        for each in value:
            check_number(name, each, within)
        return
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
