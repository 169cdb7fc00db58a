"""An adapter's side of the conformance suite: what a file imports that puts a trainer to `burnish bench conformance`.

An adapter is a function without arguments that returns a `Trainer`: callables on a toy model and on plain tensors, each
of which may be missing; docs/conformance.md has a complete one.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torch import Tensor

EOS, PAD, VOCABULARY = 0, 1, 24  # two ids of the toy model, and how many it has
Row = dict[str, str]  # prompt and completion, or prompt, chosen and rejected: words with blanks between them


@dataclass(frozen=True)
class Toy:
    """Hugging Face folders of a small llama, and of a LoRA adapter on it (PEFT's format) that changes what it says.

    Words are "w2" to "w23", their ids the numbers; <eos> is 0 and <pad> 1. pad: the token to pad with, perhaps <eos>.
    """

    folder: Path
    adapter: Path
    pad: str = "<pad>"


@dataclass(frozen=True)
class Batch:
    """One optimizer step."""

    rows: list[Row]
    rows_at_once: int  # in one forward and backward; the last may be fewer
    packed: bool = False  # several rows in one sequence
    ranks: int = 1  # data-parallel processes, over which the rows are spread
    max_length: int = 64  # tokens; rows are cut there


@dataclass(frozen=True)
class Step:
    loss: float
    gradient: Tensor  # of all trained parameters before clipping, flat, in any order that does not change


@dataclass(frozen=True)
class KL:
    """A KL term of a loss. loss(logprob, ref_logprob): (tokens,) of the policy's own samples to their mean, scalar."""

    loss: Callable[[Tensor, Tensor], Tensor]
    gradient: Literal["KL(pi || ref)", "KL(ref || pi)"]  # which KL's it is in expectation


@dataclass(frozen=True)
class Trainer:
    """A trainer's callables, any of which may be missing.

    sft(toy, batch): supervised fine-tuning on completions with their end token, from toy.folder; one step.
    dpo(toy, pairs, rows_at_once, steps, learning_rate, lora): each step on all pairs; lora: None trains the weights,
        "fresh" a new adapter on toy.folder, "loaded" goes on with toy.adapter.
    score(toy, prompts, completions, side): log-probabilities of each completion's ids, a tensor a completion. All run
        in one batch, padded on the left or on the right; a trainer without padding has padding_sides ().
    rollout(toy, prompt, count, temperature, top_k): `count` samples of one token, (count,) int64, and the
        log-probabilities with which the policy's update would score them, (count,).
    policy_loss(logprob, old_logprob, advantage, mask, num_tokens): the clipped loss over mask's tokens; (B, T) but for
        advantage (B,). num_tokens: of the whole optimizer step, of which these may be a part.
    kl: the KL terms that a loss may have, by name.
    shaped_rewards(score, logprob, ref_logprob, mask, beta): PPO's rewards of tokens, (B, T), from scores (B,).
    advantages(rewards, mask): PPO's with gamma = lambda = 1 and values of 0, before whitening; (B, T).
    absent: for a callable that is None, why, where there is more to say than that the adapter does not have it.
    """

    name: str
    version: str
    sft: Callable[[Toy, Batch], Step] | None = None
    dpo: Callable[[Toy, list[Row], int, int, float, str | None], list[Step]] | None = None
    score: Callable[[Toy, list[list[int]], list[list[int]], str | None], list[Tensor]] | None = None
    padding_sides: tuple[str, ...] = ()
    rollout: Callable[[Toy, list[int], int, float, int | None], tuple[Tensor, Tensor]] | None = None
    policy_loss: Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor] | None = None
    kl: dict[str, KL] | None = None
    shaped_rewards: Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor] | None = None
    advantages: Callable[[Tensor, Tensor], Tensor] | None = None
    absent: dict[str, str] = field(default_factory=dict)


class NotApplicable(Exception):
    """Raised by an adapter's callable for one kind of input that its trainer does not have, with the reason."""


def ids_of(words: str) -> list[int]:
    return [int(word[1:]) for word in words.split()]
