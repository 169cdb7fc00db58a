"""Reward functions of a user's files, a reward model, and what they judge a step's samples to be worth.

    rewards = weighted_rewards(cfg, load_rewards(cfg.reward))
    judgement = judge(rewards, samples)        each function's own numbers, and their weighted sum

functions.py says how a function is called.
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

# of a list of rewards, None for what it does not judge, or of an awaitable of one
RewardFunction = Callable[..., Any]


@dataclass
class Rewards:
    """Reward functions with their weights, and what a step of training adds to them."""

    functions: dict[str, RewardFunction]
    weights: tuple[float, ...]
    timeout: float | None = None  # seconds a call
    state: TrainerState = field(default_factory=TrainerState)
    logged: dict[str, list[float]] = field(default_factory=dict)  # by log_metric, of all processes

    def labelled(self) -> list[tuple[str, RewardFunction]]:
        """The functions with what messages call them."""
        return [(f"reward {brief(name, 100)}", function) for name, function in self.functions.items()]

    def check(self, columns: Iterable[str], answer: Callable[..., Any] | None = None) -> None:
        """Raises InputError where a function, or that of --answer, needs what is no column of the data."""
        for label, function in self.labelled() + ([(ANSWER, answer)] if answer else []):
            arguments_for(label, function, Samples([], [], [], {name: [] for name in columns}), {})

    def take(self, column: str) -> bool:
        """Whether any of the functions takes a column of that name."""
        return any(takes(function, column) for function in self.functions.values())

    def begin(self, cfg: Any, step: int, draws: int, num_prompts: int) -> None:
        """Begin a step, of which nothing is logged yet. draws: batches of prompts before it."""
        batches = math.ceil(num_prompts / cfg.prompts_per_step)  # in an epoch
        epoch, num_epochs = draws / batches, math.ceil(cfg.steps / batches)
        self.state = TrainerState(step, cfg.steps, epoch, num_epochs, save_steps=cfg.save_every)
        self.logged = {}

    def add(self, logged: Mapping[str, list[float]]) -> None:
        """Add what a call has logged by log_metric to the step's."""
        for name, values in logged.items():
            self.logged.setdefault(name, []).extend(values)

    def metrics(self) -> dict[str, float]:
        """The step's metric/<name>: means over the calls of log_metric, those that are not finite left out."""
        return {f"metric/{name}": _mean(values) for name, values in self.logged.items()}

    def count(self, values: dict[str, float], parts: Mapping[str, Tensor], scores: Tensor) -> None:
        """Add a step to the counts of a run, which its checkpoints keep; one that began without "varied" has none.

        parts: each function's own, (samples,). scores: (groups, samples of each), NaN where a sample is left out.
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
        """Print at the end of a run which functions never judged, and where the rewards never differed.

        in_groups: a sample is compared with those of its group, otherwise with all. among: which samples counted.
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
    """Mean of the finite ones; NaN without any, or where it is beyond fp64."""
    finite = [value for value in values if math.isfinite(value)]
    mean = sum(finite) / len(finite) if finite else math.nan
    return mean if math.isfinite(mean) else math.nan


class Judgement(NamedTuple):
    """The worth of samples, and what the functions have logged of them."""

    total: Tensor  # (samples,) fp32, the weighted sum; NaN where no reward function judged
    parts: dict[str, Tensor]  # each function's own, (samples,)
    logged: dict[str, list[float]]  # by log_metric
    extras: dict[str, list[Any]]  # by log_extra, one a completion


# ---- functions from files


def load_rewards(specifications: Sequence[str]) -> dict[str, RewardFunction]:
    """Functions by name, or by whole specification where two functions share one."""
    if not specifications:
        raise InputError("--reward: expected at least one FILE.py:function, got none")
    names = [specification.rpartition(":")[2] for specification in specifications]
    return {
        name if names.count(name) == 1 else specification: load_function(specification)
        for name, specification in zip(names, specifications, strict=True)
    }


def check_weights(weights: Sequence[float], count: int) -> tuple[float, ...]:
    """The weights of `count` reward functions, all 1 where none are given."""
    if weights and len(weights) != count:
        raise InputError(f"--reward-weights: expected {count}, one a reward function, got {len(weights)}")
    if not all(math.isfinite(weight) for weight in weights):
        raise InputError(f"--reward-weights: expected finite numbers, got {weights}")
    return tuple(weights) or (1.0,) * count


def weighted_rewards(cfg: Any, functions: dict[str, RewardFunction]) -> Rewards:
    """The functions as the flags have them: --reward-weights, --reward-timeout."""
    return Rewards(functions, check_weights(cfg.reward_weights, len(functions)), cfg.reward_timeout)


def load_reward_model(cfg: Any, tokenizer: Tokenizer, prompts: Sequence[Item]) -> ScalarModel:
    """The model of --reward-model, frozen; no id is drawn from then on that it has no row for.

    Raises InputError where it has no score head, another tokenizer than the policy's, or no row for a prompt's id.
    """
    folder = cfg.reward_model
    if not has_score(folder):
        raise InputError(
            f"--reward-model {folder}: expected a reward model (burnish reward), got a model without a score"
        )
    check_tokenizer(folder, tokenizer, "reward-model")
    dtype = torch.bfloat16 if cfg.device.startswith("cuda") else torch.float32
    model = load_scalar_model(folder, dtype, host(cfg.device)).requires_grad_(False).eval()
    check_model(model, tokenizer, prompts, 0, f"--reward-model {folder}")
    return model


def overlong_punishment(max_length: int, buffer: int) -> RewardFunction:
    """DAPO's soft punishment of long answers, a reward function: 0 up to max_length - buffer tokens, then down to -1.

    Source: https://arxiv.org/abs/2503.14476, eq. 13
    """

    def punishment(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [max(-1.0, min(0.0, (max_length - buffer - len(ids)) / buffer)) for ids in completion_ids]

    return punishment


# ---- judging


def judge(rewards: Rewards, samples: Samples) -> Judgement:
    """Returns each function's rewards, NaN for None, and their weighted sum.

    A sample's sum is over the functions that judged it, NaN where none did. Raises InputError naming the function that
    raised, was not done in time, or returned anything else than one finite number or None a completion.
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
    """The judgement of no function, or of no sample: all rewards are 0."""
    return Judgement(torch.zeros(count), {name: torch.zeros(count) for name in rewards.functions}, {}, {})


def of_all_processes(judgement: Judgement) -> Judgement:
    """The judgement of the samples of all, in their order. None stands where a process has not logged a column."""
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
    """Each completion's answer, which --answer's function gives, None for none; and what it logs by log_extra.

    Answers are compared, so they are text, numbers, or tuples of these. Raises InputError as `judge` does.
    """
    log = Log(len(samples.completions))
    arguments = arguments_for(ANSWER, function, samples, log.tools(ANSWER, rewards.state))
    expected = "text, a number, a tuple or None"
    call = Call(ANSWER, function, arguments, "answers", log.count, read_answer, expected)
    (found,) = results([call], rewards.timeout)
    log.check()
    rewards.add(log.metrics)

    # NaN equals nothing, itself included, so it is no answer
    return [None if isinstance(value, float) and math.isnan(value) else value for value in found], log.extras
