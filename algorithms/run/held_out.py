"""The evaluation on held-out rows during training: its figures, the best of them, and held_out.json.

    evaluation = Evaluation("pairs", len(pairs), measure)      measure() -> {"loss": Figure(...), "accuracy": ...}
    with Run(cfg, tokenizer, rows=..., evaluation=evaluation, model=learner) as run: ...

A method measures its model as it is at the time of the call. The run says when: before the first step, every
--eval-every steps, and after the last step. --keep-best and --patience read these figures.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ...model.errors import InputError, shown
from ...model.files.replacing import replacing
from ..show.metrics import LOWER
from .flags import EvaluationFlags, TrainingFlags
from .processes import rank

HELD_OUT, BEST = "held_out.json", "best"
HIGHER = ("reward", "score", "accuracy", "margin", "logprob_accuracy", "logprob_margin")
OF_USERS = ("reward/", "metric/")  # beginnings of names that reward functions give; a higher one is better
SHARES = ("accuracy", "logprob_accuracy", "ended")  # printed in percent

Flags = TypeVar("Flags", bound=TrainingFlags)


class Figure(NamedTuple):
    """A mean over held-out items, in the metric's own unit. NaN if there was nothing to take a mean of."""

    mean: float
    error: float  # standard error of the mean; NaN if it is not known
    count: int  # items that the mean is over


Figures = dict[str, Figure]


class Evaluation(NamedTuple):
    """The held-out evaluation of a method.

    measure: a function that returns the figures of the model as it is. It computes no gradient, uses no dropout, and
    leaves the state of training unchanged. Every process calls it, and receives the figures of all items. The first
    call is before training.
    """

    items: str  # the plural name of the items: "pairs"
    count: int
    measure: Callable[[], Figures]


def check_evaluation(cfg: EvaluationFlags) -> None:
    """Raise InputError for a flag of the evaluation that would have no effect without another flag."""
    if cfg.eval_data is None:
        for name in ("eval_every", "keep_best", "patience"):
            if getattr(cfg, name):
                raise InputError(f"--{name.replace('_', '-')}: expected --eval-data FILE beside it, got none")
    elif cfg.keep_best is not None and not cfg.eval_every:
        raise InputError("--keep-best: expected --eval-every N beside it, to have models to choose from")
    elif cfg.patience is not None and cfg.keep_best is None:
        raise InputError(
            "--patience: expected --keep-best METRIC beside it, which tells what a better model is"
        )


def on_held_out(cfg: Flags) -> Flags:
    """Return the flags with --eval-data in place of --data, for the functions that load the rows of --data."""
    assert cfg.eval_data is not None
    return replace(cfg, data=cfg.eval_data, data_weights=())


def higher_is_better(metric: str) -> bool | None:
    """Return whether a higher figure is a better one; None if the metric is neither good nor bad, as a length."""
    if metric in LOWER:
        return False
    return True if metric in HIGHER or metric.startswith(OF_USERS) else None


def check_metric(metric: str, figures: Figures) -> None:
    """Raise InputError unless --keep-best names one of the figures, and one of which it is known what is better."""
    known = [name for name in figures if higher_is_better(name) is not None]
    if metric not in known:
        names = ", ".join(shown(name) for name in known)
        raise InputError(
            f"--keep-best: expected a metric of the evaluation, one of {names}, got {shown(metric)}"
        )


def improved(metric: str, figures: Figures, values: dict[str, Any], done: int) -> bool:
    """Compare an evaluation with the best one so far, and return whether it is better.

    values: the numbers that checkpoints keep, changed in place: best, best_step, and unimproved, the number of
    evaluations since the best one. A number that is not finite is never best, and an equal one is not better.
    done: the steps done so far.
    """
    value = figures[metric].mean if metric in figures else math.nan
    sign = 1 if higher_is_better(metric) else -1
    if math.isfinite(value) and ("best" not in values or sign * value > sign * values["best"]):
        values |= {"best": value, "best_step": done, "unimproved": 0}
        return True
    values["unimproved"] = values.get("unimproved", 0) + 1
    return False


def as_numbers(figures: Figures, prefix: str = "") -> dict[str, float | None]:
    """Return each figure's mean and standard error under one name each, with None for what is not finite.

    Names that reward functions give have no error, because their functions might be named like an error.
    """
    found: dict[str, float] = {}
    for name, figure in figures.items():
        found[prefix + name] = figure.mean
        if "/" not in name:
            found[f"{prefix}{name}_error"] = figure.error
    return {name: value if math.isfinite(value) else None for name, value in found.items()}


# ---- the end of a run


def report_held_out(folder: Path, evaluation: Evaluation, before: Figures, after: Figures) -> None:
    """Print the figures before and after training in one line, and write them to held_out.json in `folder`."""
    found = [_change(name, before.get(name), figure) for name, figure in after.items()]
    print(f"held out: {', '.join(found)}, {evaluation.count} {evaluation.items}")
    if rank():
        return
    numbers = {"before": as_numbers(before), "after": as_numbers(after)}
    results = {when: {**found, evaluation.items: evaluation.count} for when, found in numbers.items()}
    with replacing(folder / HELD_OUT) as beside:
        beside.write_text(json.dumps(results, indent=2) + "\n")


def report_best(folder: Path, cfg: TrainingFlags, values: Mapping[str, Any], is_early: bool) -> None:
    """Print which step had the best model, and whether --patience has ended the run.

    is_early: the run has ended before its last step, which a patience that ends with that step does not cause.
    """
    if is_early and is_over(cfg, values):
        count = f"{values['unimproved']} evaluations in a row"
        print(f"stopped early: {count} without a better {cfg.keep_best} (--patience {cfg.patience})")
    if "best" not in values:
        print(f"best: no evaluation gave a finite {cfg.keep_best}, so {folder / BEST} is not written")
        return
    print(f"best: {cfg.keep_best} {values['best']:.4g} after step {values['best_step']}: {folder / BEST}")


def is_over(cfg: TrainingFlags, values: Mapping[str, Any]) -> bool:
    """Return whether as many evaluations in a row as --patience allows were without a better one."""
    return cfg.patience is not None and values.get("unimproved", 0) >= cfg.patience


def _change(name: str, before: Figure | None, after: Figure) -> str:
    """Return the text of a figure before and after training, such as "accuracy 51.0 -> 74.5 +- 3.1 %"."""
    scale, digits, unit = (100.0, ".1f", " %") if name in SHARES else (1.0, ".4g", "")
    means = [figure.mean for figure in (before, after) if figure is not None]
    texts = " -> ".join("none" if math.isnan(mean) else f"{scale * mean:{digits}}" for mean in means)
    error = "" if math.isnan(after.error) else f" +- {scale * after.error:{'.1f' if unit else '.2g'}}"
    return f"{name} {texts}{error}{unit}"
