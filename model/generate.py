"""Sample continuations of prompts: a batch that shrinks as sequences end and fills up again, over one cache.

Each distinct prompt is run once and its keys and values are held once, for all of its samples. From then on a step runs
one token of every live sequence. Sequences that have ended leave when they are an eighth of the batch (batch.py).

    next token: the id at which the cumulative softmax of logits / temperature, on the ids that top_k, top_p and min_p
        keep, passes a uniform number                                                        (kernels/sample.py)

With a vocabulary (vocabulary.py) the softmax is over its ids alone: rows of the head that no token has are never drawn.
The number is a hash of (seed, sample, step) and of nothing else: neither the batch size nor the other prompts change
what a sample draws. (Rounding in the logits may, where the number falls on the border between two ids.)
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .batch import MEMORY_BUDGET, Batch, Chooser, Request
from .transformer import Transformer
from .vocabulary import Vocabulary


@dataclass(frozen=True)
class Sample:
    """One continuation. logprobs are of the distribution that was sampled; greedy ones are at temperature 1."""

    prompt_index: int
    tokens: list[int]  # the stop token included
    logprobs: Tensor  # (n,) fp32
    # (n, K_max) int32, the ids that truncation kept, padded with -1; None without truncation
    support: Tensor | None
    ended: bool  # by a stop token, not by max_new_tokens
    vocabulary: Vocabulary | None = None  # the ids that it was drawn from; None for the whole head


@torch.no_grad()
def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    samples_per_prompt: int = 1,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    vocabulary: Vocabulary | None = None,
    stop_ids: Collection[int] = frozenset(),
    seed: int = 0,
    batch_size: int | None = None,
    memory_budget: int = MEMORY_BUDGET,
    progress: Callable[[int, int], None] | None = None,
    adapters: Sequence[int] | None = None,
    first_sample: int = 0,
) -> list[Sample]:
    """Samples in the order of the prompts, those of prompt 0 first.

    temperature: 0 takes the most likely id, whatever top_k, top_p and min_p say, and records no support.
    vocabulary: the ids to draw from, a tokenizer's; all rows of the head by default. Prompts may hold other ids.
    batch_size: sequences at a time, at most; as many as the budget allows by default.
    memory_budget: bytes of the cache, which has room for max_new_tokens of each sequence at a time and, once, for each
        prompt that these go on from; cache.cache_bytes is the sum.
    progress: called with (samples ended, samples in all) when some leave the batch.
    adapters: for each prompt, which of the model's stacked adapters answers it, -1 for none.
    first_sample: where these are a part of more samples, how many stand before: they are then drawn as among those.
    Raises InputError for an empty prompt, for an id outside the vocabulary and for a budget below one sequence's cache,
        ValueError for a number out of range.
    """
    for name, value in (("samples_per_prompt", samples_per_prompt), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    chooser = Chooser.of(model, vocabulary, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    request = Request(
        prompts, max_new_tokens, samples_per_prompt, adapters, stop_ids, seed=seed, first_sample=first_sample
    )
    request.check(model.config.vocab_size)
    if not request.total:
        return []

    batch = Batch(model, request, chooser, batch_size, memory_budget)
    samples: dict[int, Sample] = {}
    while len(samples) < request.total:
        batch.admit()
        if batch.draw():
            for index, tokens, logprobs, support in batch.leave():
                prompt, ended = index // samples_per_prompt, tokens[-1] in stop_ids
                samples[index] = Sample(prompt, tokens, logprobs, support, ended, vocabulary)
            if progress is not None:
                progress(len(samples), request.total)
        batch.advance()
    return [samples[index] for index in range(request.total)]


def stream(
    model: Transformer,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    vocabulary: Vocabulary | None = None,
    stop_ids: Collection[int] = frozenset(),
    seed: int = 0,
) -> Iterator[int]:
    """The ids of the one sample that `generate` would return, as they are drawn, a stop id at the end included."""
    chooser = Chooser.of(model, vocabulary, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    request = Request([prompt], max_new_tokens, stop_ids=stop_ids, seed=seed)
    request.check(model.config.vocab_size)
    batch = Batch(model, request, chooser)

    with torch.no_grad():
        batch.admit()
    while True:
        with torch.no_grad():  # not around the yield: what runs between two ids is not ours
            ended = batch.draw()
        yield int(batch.drawn[0])
        if ended:
            return
        with torch.no_grad():
            batch.advance()
