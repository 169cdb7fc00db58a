"""Reward functions from users' files, a reward model, and the scoring of a step's samples.

    rewards = weighted_rewards(cfg, load_rewards(cfg.reward))
    judgement = judge(rewards, samples)        the rewards of each function, and their weighted sum

functions.py describes the arguments and results of a function.
"""

import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...model.checkpoint import has_score, load_scalar_model
from ...model.errors import InputError
from ...model.scalar import ScalarModel
from ...model.text.tokenizer import Tokenizer
from ..run.calls import Call, brief, results
from ..run.ids import Item, check_model
from ..run.processes import gathered, host, world
from ..run.user_files import load_function
from .functions import Log, Samples, TrainerState, arguments_for, read_answer, read_reward, takes
from .tokenizer import check_tokenizer

ANSWER = "--answer"
NOTHING = "None for every sample: it has judged nothing"

# returns a list of rewards, with None for a sample that it does not judge, or an awaitable of such a list
RewardFunction = Callable[..., Any]


@dataclass
class Rewards:
    """Reward functions with their weights, their time limit, and the state and logged numbers of a training step."""

    functions: dict[str, RewardFunction]
    weights: tuple[float, ...]
    timeout: float | None = None  # seconds per call
    state: TrainerState = field(default_factory=TrainerState)
    logged: dict[str, list[float]] = field(default_factory=dict)  # from log_metric on all processes

    def labelled(self) -> list[tuple[str, RewardFunction]]:
        """Return (label, function) for each function. Messages name the function by its label."""
        return [(f"reward {brief(name, 100)}", function) for name, function in self.functions.items()]

    def check(self, columns: Iterable[str], answer: Callable[..., Any] | None = None) -> None:
        """Raise InputError if a reward function, or the --answer function, needs a column that the data lacks."""
        for label, function in self.labelled() + ([(ANSWER, answer)] if answer else []):
            arguments_for(label, function, Samples([], [], [], {name: [] for name in columns}), {})

    def take(self, column: str) -> bool:
        """Return whether any of the functions takes an argument with the name of this column."""
        return any(takes(function, column) for function in self.functions.values())

    def begin(self, cfg: Any, step: int, draws: int, prompts_per_epoch: int) -> None:
        """Begin a step: set the trainer state and clear the logged numbers.

        draws: the number of batches of prompts drawn before this step. prompts_per_epoch: prompts that an epoch draws.
        """
        batches = math.ceil(prompts_per_epoch / cfg.prompts_per_step)  # per epoch
        epoch, num_epochs = draws / batches, math.ceil(cfg.steps / batches)
        self.state = TrainerState(step, cfg.steps, epoch, num_epochs, save_steps=cfg.save_every)
        self.logged = {}

    def add(self, logged: Mapping[str, list[float]]) -> None:
        """Add the numbers that one call of a function logged with log_metric to the step's numbers."""
        for name, values in logged.items():
            self.logged.setdefault(name, []).extend(values)

    def metrics(self) -> dict[str, float]:
        """Return metric/<name> for the step: means over the calls of log_metric, without non-finite numbers."""
        return {f"metric/{name}": _mean(values) for name, values in self.logged.items()}

    def count(self, values: dict[str, float], parts: Mapping[str, Tensor], scores: Tensor) -> None:
        """Add a step to the counts of a run from which `report` prints its warnings.

        values: the counts, changed in place and kept in checkpoints. Nothing is counted without the entry "varied", as
        in a checkpoint without counts. parts: the rewards of each function, (samples,). scores: (groups, samples per
        group), NaN for a sample that is left out.
        """
        if "varied" not in values:
            return
        for name, part in parts.items():
            values[f"judged/{name}"] = values.get(f"judged/{name}", 0) + int((~part.isnan()).sum())

        high, low = scores.nan_to_num(-math.inf).amax(1), scores.nan_to_num(math.inf).amin(1)  # (groups,)
        values["varied"] += int((high > low).sum())
        if (high >= low).any():
            values["lowest"] = min(values.get("lowest", math.inf), low.min().item())
            values["highest"] = max(values.get("highest", -math.inf), high.max().item())

    def report(self, values: Mapping[str, float], *, in_groups: bool, among: str = "") -> None:
        """Print a warning at the end of a run if a function never judged a sample, or if rewards never differed.

        in_groups: samples are compared within their group, otherwise with all samples of the run. among: a phrase
        about the samples that counted, for the message.
        """
        if "varied" not in values:
            return
        judged = {name: values.get(f"judged/{name}", 0) for name in self.functions}
        if judged and not any(judged.values()):
            print("every reward was None: the rewards taught nothing")
            return
        for name in (name for name, count in judged.items() if not count):
            print(f"reward {brief(name, 100)}: {NOTHING}")

        if in_groups and not values["varied"]:
            print(f"no group's rewards ever differed{among}: the rewards taught nothing")
        elif not in_groups and values["lowest"] == values["highest"]:
            print(f"every sample of the run scored {values['lowest']:g}: the rewards taught nothing")


def _mean(values: Sequence[float]) -> float:
    """Return the mean of the finite values, or NaN if no value is finite or the mean overflows fp64."""
    finite = [value for value in values if math.isfinite(value)]
    mean = sum(finite) / len(finite) if finite else math.nan
    return mean if math.isfinite(mean) else math.nan


class Judgement(NamedTuple):
    """The rewards of samples, and the numbers and columns that the reward functions logged."""

    total: Tensor  # (samples,) fp32, the weighted sum; NaN if no reward function judged the sample
    parts: dict[str, Tensor]  # the rewards of each function, (samples,)
    logged: dict[str, list[float]]  # numbers from log_metric
    extras: dict[str, list[Any]]  # columns from log_extra, one value per completion


# ---- functions from files


def load_rewards(specifications: Sequence[str]) -> dict[str, RewardFunction]:
    """Load the functions of --reward. Returns them by name, or by the whole specification if two share a name."""
    if not specifications:
        raise InputError("--reward: expected at least one FILE.py:function, got none")
    names = [specification.rpartition(":")[2] for specification in specifications]
    return {
        name if names.count(name) == 1 else specification: load_function(specification)
        for name, specification in zip(names, specifications, strict=True)
    }


def check_weights(weights: Sequence[float], count: int) -> tuple[float, ...]:
    """Return the weights, 1 by default. Raises InputError unless `weights` is empty or has `count` finite numbers."""
    if weights and len(weights) != count:
        raise InputError(f"--reward-weights: expected {count}, one per reward function, got {len(weights)}")
    if not all(math.isfinite(weight) for weight in weights):
        raise InputError(f"--reward-weights: expected finite numbers, got {weights}")
    return tuple(weights) or (1.0,) * count


def weighted_rewards(cfg: Any, functions: dict[str, RewardFunction]) -> Rewards:
    """Return `Rewards` of the functions, with the values of --reward-weights and --reward-timeout."""
    return Rewards(functions, check_weights(cfg.reward_weights, len(functions)), cfg.reward_timeout)


def load_reward_model(cfg: Any, tokenizer: Tokenizer, prompts: Sequence[Item]) -> ScalarModel:
    """Load the model of --reward-model, frozen. The tokenizer is limited to ids that the model's embedding has.

    Raises InputError if the model has no score head, has another tokenizer than the policy, or has no row for an id
    of a prompt.
    """
    folder = cfg.reward_model
    if not has_score(folder):
        raise InputError(
            f"--reward-model {folder}: expected a reward model (burnish reward), got one without a score head"
        )
    check_tokenizer(folder, tokenizer, "reward-model")
    dtype = torch.bfloat16 if cfg.device.startswith("cuda") else torch.float32
    model = load_scalar_model(folder, dtype, host(cfg.device)).requires_grad_(False).eval()
    check_model(model, tokenizer, prompts, 0, f"--reward-model {folder}")
    return model


def overlong_punishment(max_length: int, buffer: int) -> RewardFunction:
    """Return a reward function with DAPO's soft punishment of long answers.

    The reward is 0 up to max_length - buffer tokens, then falls linearly to -1 at max_length.
    Source: https://arxiv.org/abs/2503.14476, eq. 13
    """

    def punishment(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [max(-1.0, min(0.0, (max_length - buffer - len(ids)) / buffer)) for ids in completion_ids]

    return punishment


# ---- judging


def judge(rewards: Rewards, samples: Samples) -> Judgement:
    """Call all reward functions on samples. Returns each function's rewards (NaN for None), and their weighted sum.

    A sample's sum is over the functions that judged the sample, and NaN if no function did. Raises InputError naming a
    function that raised, ran out of time, or did not return one finite number or None per completion.
    """
    log = Log(len(samples.completions))
    calls: list[Call] = []
    for label, function in rewards.labelled():
        arguments = arguments_for(label, function, samples, log.tools(label, rewards.state))
        call = Call(label, function, arguments, "rewards", log.count, read_reward, "a finite number or None")
        calls.append(call)

    found = zip(rewards.functions, results(calls, rewards.timeout), strict=True)
    parts = {name: torch.tensor(values, dtype=torch.float32) for name, values in found}
    log.check()
    weighted = [weight * part for weight, part in zip(rewards.weights, parts.values(), strict=True)]
    stacked = torch.stack(weighted)  # (functions, samples)
    total = stacked.nansum(dim=0).masked_fill(stacked.isnan().all(dim=0), float("nan"))  # (samples,)
    return Judgement(total, parts, log.metrics, log.extras)


def unjudged(rewards: Rewards, count: int) -> Judgement:
    """Return a judgement without calling any function: `count` rewards of 0."""
    return Judgement(torch.zeros(count), {name: torch.zeros(count) for name in rewards.functions}, {}, {})


def of_all_processes(judgement: Judgement) -> Judgement:
    """Gather the judgements of all processes, in the order of the samples.

    A column holds None for the samples of a process that did not log this column.
    """
    if world() == 1:
        return judgement
    logged = json.dumps([judgement.logged, judgement.extras]).encode()
    received = gathered(
        {
            "rewards": torch.stack([judgement.total, *judgement.parts.values()]),
            "logged": torch.frombuffer(bytearray(logged), dtype=torch.uint8),
        }
    )
    total, *parts = torch.cat([tensors["rewards"] for tensors in received], 1)  # each (samples,)
    counts = [tensors["rewards"].shape[1] for tensors in received]
    logs = [json.loads(tensors["logged"].numpy().tobytes()) for tensors in received]

    metrics: dict[str, list[float]] = {}
    columns = dict.fromkeys(column for _, extras in logs for column in extras)
    joined: dict[str, list[Any]] = {column: [] for column in columns}
    for (numbers, extras), count in zip(logs, counts, strict=True):
        for name, values in numbers.items():
            metrics.setdefault(name, []).extend(values)
        for column, values in joined.items():
            values.extend(extras.get(column, itertools.repeat(None, count)))
    return Judgement(total, dict(zip(judgement.parts, parts, strict=True)), metrics, joined)


def answers(
    function: Callable[..., Any], rewards: Rewards, samples: Samples
) -> tuple[list[Any], dict[str, list[Any]]]:
    """Return (answers, columns): the --answer function's answer to each completion, and the columns of log_extra.

    An answer is a text, a number, or a tuple of these, because answers are compared; None means no answer. Raises
    InputError if the function raises, runs out of time, or returns anything else.
    """
    log = Log(len(samples.completions))
    arguments = arguments_for(ANSWER, function, samples, log.tools(ANSWER, rewards.state))
    expected = "text, a number, a tuple or None"
    call = Call(ANSWER, function, arguments, "answers", log.count, read_answer, expected)
    (found,) = results([call], rewards.timeout)
    log.check()
    rewards.add(log.metrics)

    # NaN does not equal even itself, so it counts as no answer
    return [None if isinstance(value, float) and math.isnan(value) else value for value in found], log.extras
