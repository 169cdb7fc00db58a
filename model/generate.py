"""Sampled continuations of prompts, in a batch that is refilled as sequences end, over one cache.

Each distinct prompt is run once. Its keys and values are held once, for all of its samples. After that, each step runs
one token of every live sequence. Ended sequences leave when they make up an eighth of the batch (batch.py).

    next token: the id at which the cumulative softmax of logits / temperature, on the ids that top_k, top_p and min_p
        keep, passes a uniform number                                                        (kernels/sample.py)

With a vocabulary (vocabulary.py) the softmax is over its ids alone: a row of the head without a token is never drawn.
The uniform number is a hash of (seed, sample, step) and of nothing else. So neither the batch size nor the other
prompts change the ids of a sample. The one exception is a number on the border between two ids, where the rounding of
the logits may decide.
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
    """One continuation of a prompt.

    logprobs: under the distribution that was sampled from; for greedy sampling, at temperature 1.
    """

    prompt_index: int
    tokens: list[int]  # the stop token included
    logprobs: Tensor  # (n,) fp32
    # (n, K_max) int32, the ids that truncation kept at each step, padded with -1; None without truncation
    support: Tensor | None
    ended: bool  # True after a stop token, False after max_new_tokens
    vocabulary: Vocabulary | None = None  # the ids that the tokens were drawn from; None for the whole head


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """The rules by which continuations are sampled.

    temperature: 0 takes the most likely id and ignores top_k, top_p and min_p. `Sample.support` is then None.
    vocabulary: the ids to draw from, usually a tokenizer's; by default all rows of the head. Prompts may hold other
        ids.
    """

    max_new_tokens: int
    samples_per_prompt: int = 1
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    vocabulary: Vocabulary | None = None
    stop_ids: Collection[int] = frozenset()  # a sample ends with the first of these
    seed: int = 0

    def chooser(self, model: Transformer) -> Chooser:
        truncation = {"top_k": self.top_k, "top_p": self.top_p, "min_p": self.min_p}
        return Chooser.of(model, self.vocabulary, temperature=self.temperature, **truncation)


@torch.no_grad()
def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    *,
    batch_size: int | None = None,
    memory_budget: int = MEMORY_BUDGET,
    progress: Callable[[int, int], None] | None = None,
    adapters: Sequence[int] | None = None,
    first_sample: int = 0,
) -> list[Sample]:
    """Sample continuations of prompts. Returns the samples in the order of the prompts, those of prompt 0 first.

    batch_size: the largest number of sequences at a time; by default as many as the memory budget allows.
    memory_budget: bytes for the cache of keys and values. The cache has room for max_new_tokens of each sequence in
        flight, and for each of their prompts once. cache.cache_bytes computes its size.
    progress: called with (ended samples, all samples) when sequences leave the batch.
    adapters: for each prompt, the index of the model's stacked adapter that answers it; -1 for none.
    first_sample: the number of samples before these, if these are a part of a larger set. The ids are then the same as
        in that set.

    Raises InputError for an empty prompt, for an id outside the vocabulary, and for a budget too small for the cache of
    one sequence. Raises ValueError for a number out of range.
    """
    count, stop_ids = params.samples_per_prompt, params.stop_ids
    for name, value in (("samples_per_prompt", count), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    chooser = params.chooser(model)
    request = Request(
        prompts, params.max_new_tokens, count, adapters, stop_ids, seed=params.seed, first_sample=first_sample
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
                prompt, ended = index // count, tokens[-1] in stop_ids
                samples[index] = Sample(prompt, tokens, logprobs, support, ended, params.vocabulary)
            if progress is not None:
                progress(len(samples), request.total)
        batch.advance()
    return [samples[index] for index in range(request.total)]


def stream(model: Transformer, prompt: Sequence[int], params: SamplingParams) -> Iterator[int]:
    """Yield the ids of the single sample that `generate` would return, as they are drawn, including a final stop id.

    Raises ValueError for more than one sample, and the errors of `generate`.
    """
    if params.samples_per_prompt != 1:
        raise ValueError(f"samples_per_prompt: expected 1 in a stream, got {params.samples_per_prompt}")
    chooser = params.chooser(model)
    request = Request([prompt], params.max_new_tokens, stop_ids=params.stop_ids, seed=params.seed)
    request.check(model.config.vocab_size)
    batch = Batch(model, request, chooser)

    with torch.no_grad():
        batch.admit()
    while True:
        with torch.no_grad():  # not around the yield: between two ids the caller's code runs
            ended = batch.draw()
        yield int(batch.drawn[0])
        if ended:
            return
        with torch.no_grad():
            batch.advance()
