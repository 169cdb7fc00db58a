"""The metrics that a method shows first, their units, and how the method is known from its flags.

A held-out metric is named eval_NAME, and its standard error eval_NAME_error. It belongs to the picture of NAME.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

MOST_MAIN = 5
HELD_OUT, ERROR = "eval_", "_error"
LOWER = ("loss", "perplexity", "divergence", "kl")  # of these a lower value is better


class Method(NamedTuple):
    """A training method. flag: a flag that no other method has. metrics: those to show, the first ones first."""

    title: str
    flag: str
    metrics: tuple[str, ...]


METHODS = {
    "sft": Method("Supervised fine-tuning", "train_on", ("loss", "grad_norm", "learning_rate")),
    "reward": Method("Reward model", "centering", ("loss", "accuracy", "margin", "chosen", "rejected")),
    "dpo": Method(
        "Preference optimization", "label_smoothing", ("loss", "accuracy", "margin", "chosen", "rejected")
    ),
    "kto": Method("KTO", "wanted_weight", ("loss", "margin", "kl", "chosen", "rejected")),
    "ppo": Method("PPO", "critic_learning_rate", ("reward", "score", "kl", "length", "entropy")),
    "grpo": Method(
        "GRPO", "mask_truncated", ("reward", "length", "entropy", "kl", "ended", "flat_groups", "grad_norm")
    ),
    "distill": Method(
        "Distillation", "temperature_squared", ("loss", "divergence", "entropy", "length", "grad_norm")
    ),
}
UNKNOWN = Method("Run", "", ("reward", "loss", "accuracy", "kl", "length", "entropy", "grad_norm"))

UNITS = {  # "METHOD.METRIC" counts before "METRIC"
    "sft.loss": "nats a token",
    "divergence": "nats a token",
    "entropy": "nats a token",
    "kl": "nats a completion",
    "grpo.kl": "nats a token",
    "mismatch": "nats a token",
    "chosen_logprob": "nats a completion",
    "rejected_logprob": "nats a completion",
    "length": "tokens",
    "tokens": "tokens",
    "trained_tokens": "tokens",
    "tokens_per_second": "tokens/s",
    "seconds": "s",
    "sampling_seconds": "s",
    "scoring_seconds": "s",
    "update_seconds": "s",
    "accuracy": "share",
    "ended": "share",
    "flat_groups": "share",
    "clip_fraction": "share",
}


def method_of(flags: Mapping[str, Any]) -> str:
    """Return the name of the method whose config.json this is, or "" for another one."""
    return next((name for name, method in METHODS.items() if method.flag in flags), "")


def main_metrics(method: str, names: Collection[str]) -> list[str]:
    """Return the main metrics of a method among `names`, at most five, in their order."""
    return [name for name in METHODS.get(method, UNKNOWN).metrics if name in names][:MOST_MAIN]


def unit(method: str, name: str) -> str:
    """Return the unit of a metric, or "" for a number without one."""
    name = name.removeprefix(HELD_OUT)
    return UNITS.get(f"{method}.{name}", UNITS.get(name, ""))


def held_out_names(names: Iterable[str]) -> list[str]:
    """Return the names of held-out metrics, without their standard errors."""
    found = [name for name in names if name.startswith(HELD_OUT) and name != f"{HELD_OUT}seconds"]
    return [name for name in found if not (name.endswith(ERROR) and name.removesuffix(ERROR) in found)]
