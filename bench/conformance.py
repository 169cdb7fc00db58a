"""The types with which a user's file connects a trainer to `burnish bench conformance`.

The file has an adapter (not a LoRA adapter): a function without arguments that returns a `Trainer`. The fields of the
`Trainer` are functions that call the trainer under test on a toy model or on plain tensors. Any of these functions may
be missing. docs/conformance.md has a complete adapter.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torch import Tensor

EOS, PAD, VOCABULARY = 0, 1, 24  # two ids of the toy model, and the number of all ids
Row = dict[str, str]  # prompt and completion, or prompt, chosen and rejected: words separated by blanks


@dataclass(frozen=True)
class Toy:
    """Hugging Face folders of a small Llama, and of a LoRA adapter in PEFT's format that changes its outputs.

    The tokenizer's words are "w2" to "w23", and the id of a word is its number. The id of <eos> is 0, and the id of
    <pad> is 1. pad: the token to pad with, which may be <eos>.
    """

    folder: Path
    adapter: Path
    pad: str = "<pad>"


@dataclass(frozen=True)
class Batch:
    """The rows of one optimizer step, and how they are split into micro-batches, sequences and processes."""

    rows: list[Row]
    rows_at_once: int  # rows in one forward and backward; the last part may have fewer
    packed: bool = False  # several rows in one sequence
    ranks: int = 1  # data-parallel processes that share the rows
    max_length: int = 64  # tokens; rows are cut there


@dataclass(frozen=True)
class Step:
    loss: float
    gradient: Tensor  # of all trained parameters before clipping, flat, in any order that does not change


@dataclass(frozen=True)
class KL:
    """A KL term of a loss.

    loss(logprob, ref_logprob) takes two (tokens,) tensors of the policy's samples, and returns the mean of the term.
    """

    loss: Callable[[Tensor, Tensor], Tensor]
    gradient: Literal["KL(pi || ref)", "KL(ref || pi)"]  # the KL whose gradient the term has in expectation


@dataclass(frozen=True)
class Trainer:
    """The functions that the checks call on one trainer. Any of them may be None.

    sft(toy, batch): one step of supervised fine-tuning from toy.folder, on completions with their end token.
    dpo(toy, pairs, rows_at_once, steps, learning_rate, lora): `steps` optimizer steps of DPO, each on all pairs. lora:
        None trains the weights, "fresh" trains a new LoRA adapter on toy.folder, "loaded" continues toy.adapter.
    score(toy, prompts, completions, side): log-probabilities of the ids of each completion, one tensor per completion.
        All completions run in one batch, padded on the given side. A trainer without padding has padding_sides ().
    rollout(toy, prompt, count, temperature, top_k): `count` samples of the token after the prompt, (count,) int64, and
        the log-probabilities with which the policy's update would score these tokens, (count,).
    policy_loss(logprob, old_logprob, advantage, mask, num_tokens): the clipped loss over the tokens in mask. advantage
        is (B,), the other tensors are (B, T). num_tokens is the number of tokens of the whole optimizer step. The
        tensors may hold only a part of these tokens.
    kl: the KL terms that a loss may have, by name.
    shaped_rewards(score, logprob, ref_logprob, mask, beta): PPO's reward of each token, (B, T). score is (B,).
    advantages(rewards, mask): PPO's advantages with gamma = lambda = 1 and values of 0, before whitening, (B, T).
    absent: name of a field that is None -> the reason. Without a reason, the report says that the adapter lacks it.
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
    """An exception that a function of a `Trainer` raises for a kind of input that the trainer does not support.

    The message of the exception is the reason.
    """


def ids_of(words: str) -> list[int]:
    return [int(word[1:]) for word in words.split()]
