"""Sample continuations of prompts: a batch that shrinks as sequences end and fills up again, over one cache.

Each distinct prompt is run once and its keys and values are held once, for all of its samples. From then on a step runs
one token of every live sequence. Sequences that have ended leave when they are an eighth of the batch.

    next token: the id at which the cumulative softmax of logits / temperature, on the ids that top_k, top_p and min_p
        keep, passes a uniform number                                                        (kernels/sample.py)

With a vocabulary (vocabulary.py) the softmax is over its ids alone: rows of the head that no token has are never drawn.
The number is a hash of (seed, sample, step) and of nothing else: neither the batch size nor the other prompts change
what a sample draws. (Rounding in the logits may, where the number falls on the border between two ids.)

With CUDA_GRAPHS a step on a GPU is two graphs, drawing and running what was drawn. Between them the host reads how
many have ended.
"""

from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import sample_tokens
from ..kernels._chip import autocast_dtype
from .cache import Cache, cache_bytes
from .errors import InputError
from .packed import pack
from .text.token_ids import say_what_never_ends
from .transformer import Transformer
from .vocabulary import Vocabulary

# prompts are run in portions of about this many tokens: on a CPU what a layer makes of them stays in a core's cache
PREFILL_TOKENS = {"cuda": 16_384, "cpu": 512}
LEAVING = 8  # a batch is compacted when one in this many sequences has ended
MEMORY_BUDGET = 4 * 2**30  # bytes of cached keys and values
# TODO: on once tests/model/test_cuda_graphs.py has passed on a GPU, where no graph was recorded yet
CUDA_GRAPHS = False

# sample_tokens, but for its options
Choose = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor | None]]
# (adapter, ids): what two samples must have in common to share a cache's row
Prompt = tuple[int, tuple[int, ...]]


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
    for name, value, least in (("samples_per_prompt", samples_per_prompt, 1), ("batch_size", batch_size, 1)):
        if value is not None and value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    choose, width = _chooser(model, vocabulary, options)
    _check(model, prompts, max_new_tokens)
    total = len(prompts) * samples_per_prompt
    if not total:
        return []
    batch = _Batch(
        *(model, prompts, adapters, samples_per_prompt, max_new_tokens),
        *(batch_size or total, memory_budget, choose, width, stop_ids, seed, first_sample),
    )
    samples: dict[int, Sample] = {}
    while len(samples) < total:
        batch.admit()
        if batch.draw():
            for index, tokens, logprobs, supports in batch.leave():
                ended = tokens[-1] in stop_ids
                samples[index] = Sample(
                    index // samples_per_prompt, tokens, logprobs, supports, ended, vocabulary
                )
            if progress is not None:
                progress(len(samples), total)
        batch.advance()
    return [samples[index] for index in range(total)]


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
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    choose, width = _chooser(model, vocabulary, options)
    _check(model, [prompt], max_new_tokens)
    batch = _Batch(
        *(model, [prompt], None, 1, max_new_tokens),
        *(1, MEMORY_BUDGET, choose, width, stop_ids, seed, 0),
    )
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


def _chooser(
    model: Transformer, vocabulary: Vocabulary | None, options: dict[str, Any]
) -> tuple[Choose, int | None]:
    """sample_tokens among the vocabulary's ids; and how many ids a support has room for, None without one."""
    choose, rows = partial(sample_tokens, **options), model.config.vocab_size
    tokens = None if vocabulary is None else vocabulary.within(rows)
    # no row asks for the options alone: the op refuses those out of range, and knows the width
    *_, support = choose(
        torch.empty(0, rows if tokens is None else tokens.size), torch.empty(0, dtype=torch.float64)
    )
    width = None if support is None else support.shape[1]
    return choose if tokens is None else partial(_choose_among, choose, tokens.to(model.device)), width


def _choose_among(
    choose: Choose, tokens: Vocabulary, logits: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """logits (B, V) of the whole head. Part of a step: it reads no value on the host."""
    row, logprob, support = choose(tokens.select(logits, 1), noise)
    return tokens.ids_of(row), logprob, None if support is None else tokens.ids_of(support)


def _check(model: Transformer, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Raise for what cannot be sampled."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
    vocabulary = model.config.vocab_size
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise InputError(f"prompt {i}: expected at least one token, got none")
        if not 0 <= min(prompt) <= max(prompt) < vocabulary:
            raise InputError(
                f"prompt {i}: expected token ids below {vocabulary}, got {min(prompt)} to {max(prompt)}"
            )


# ---- noise


def _signed(value: int) -> int:
    """The low 64 bits as an int64."""
    return (value + 2**63) % 2**64 - 2**63


_GOLDEN, _FIRST, _SECOND = (_signed(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _mix(x: Tensor) -> Tensor:
    """splitmix64's output function on int64, whose products wrap. Steele et al. 2014, doi:10.1145/2660193.2660195"""
    for shift, factor in ((30, _FIRST), (27, _SECOND), (31, 1)):
        x = (x ^ ((x >> shift) & (2 ** (64 - shift) - 1))) * factor  # masked: >> on int64 copies the sign
    return x


def uniform(seed: int, sample: Tensor, step: Tensor) -> Tensor:
    """Noise in [0, 1), fp64: a pure function of the seed and of two int64 tensors that broadcast."""
    key = _mix(_mix((sample + 1) * _GOLDEN + _signed(seed)) + (step + 1) * _GOLDEN)  # + 1: _mix(0) is 0
    return ((key >> 12) & (2**52 - 1)).double() * 2.0**-52


# ---- the batch


class _Batch:
    """Sequences in flight. Row r of every tensor and slot r of the cache are one sequence; live rows come first.

    Tensors keep their places, so that a graph can be recorded on them. Free rows count as done.
    """

    def __init__(
        self,
        model: Transformer,
        prompts: Sequence[Sequence[int]],
        adapters: Sequence[int] | None,
        samples_per_prompt: int,
        max_new_tokens: int,
        batch_size: int,
        memory_budget: int,
        choose: Choose,
        width: int | None,
        stop_ids: Collection[int],
        seed: int,
        first_sample: int,
    ):
        self.model, self.samples_per_prompt, self.max_new_tokens = model, samples_per_prompt, max_new_tokens
        self.choose, self.seed, self.first_sample = choose, seed, first_sample
        which = [-1] * len(prompts) if adapters is None else adapters
        self.adapted = adapters is not None
        self.prompts = [(adapter, tuple(ids)) for adapter, ids in zip(which, prompts, strict=True)]
        self.held: dict[Prompt, int] = {}  # the row of each prompt in the cache, in order
        self.waiting = range(len(prompts) * samples_per_prompt)
        self.live = 0
        self.prefill_tokens = PREFILL_TOKENS[model.device.type]
        device, dtype = model.device, autocast_dtype(model.embed_tokens.weight)
        distinct, longest = len(set(self.prompts)), max(len(prompt) for prompt in prompts)

        def shape(rows: int) -> tuple[int, int, int, int]:
            # samples of twice as many prompts as fill the batch, for they do not end together
            return min(distinct, rows, 2 * -(-rows // samples_per_prompt)), longest, rows, max_new_tokens

        def needed(rows: int) -> int:
            return cache_bytes(model.config, *shape(rows), dtype)

        rows = bisect_right(range(1, min(batch_size, len(self.waiting)) + 1), memory_budget, key=needed)
        if not rows:
            raise InputError(
                f"memory_budget: expected at least the {needed(1)} bytes that one sequence's cache takes, "
                f"got {memory_budget}"
            )
        self.rows, self.prompt_rows = rows, shape(rows)[0]
        self.cache = Cache(model.config, *shape(rows), dtype, device)
        self.last: Tensor | None = None  # (prompt_rows, C), what a prompt's first ids are drawn from
        self.hidden: Tensor | None = None  # (rows, C), what the next ids are drawn from
        self.index = torch.zeros(rows, dtype=torch.int64, device=device)  # of the sample
        self.count = torch.zeros(rows, dtype=torch.int64, device=device)  # ids drawn
        self.done = torch.ones(rows, dtype=torch.bool, device=device)
        self.drawn = torch.zeros(rows, dtype=torch.int64, device=device)  # the latest id
        # and where it stands among a sample's
        self.column = torch.zeros(rows, dtype=torch.int64, device=device)
        # one column more than needed: a sequence that is done, but has not left, writes there
        self.tokens = torch.zeros(rows, max_new_tokens + 1, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(rows, max_new_tokens + 1, device=device)
        self.noises = torch.zeros(rows, max_new_tokens + 1, dtype=torch.float64, device=device)
        self.steps = torch.arange(max_new_tokens + 1, device=device)
        # no other id is ever drawn
        say_what_never_ends(stop_ids, model.config.vocab_size)
        stops = sorted(token for token in stop_ids if 0 <= token < model.config.vocab_size)
        self.stops = torch.tensor(stops, dtype=torch.int64, device=device)
        # rows that are done; the widest support
        self.ended = torch.zeros(2, dtype=torch.int64, device=device)
        self.support = self.supports = None
        if width is not None:
            self.support = torch.full((rows, width), -1, dtype=torch.int32, device=device)  # the latest
            # as wide as the widest so far
            self.supports = self.support.new_empty(rows, max_new_tokens + 1, 0)
        self.graphs = _Graphs() if CUDA_GRAPHS and device.type == "cuda" else None

    # -- entering

    def admit(self) -> None:
        """Take in as many waiting samples as there is room for, and run their prompts unless the cache has them."""
        new: set[Prompt] = set()
        entering: list[tuple[Prompt, int]] = []  # with the sample's index
        for index in self.waiting[: self.rows - self.live]:
            prompt = self.prompts[index // self.samples_per_prompt]
            if prompt not in self.held and prompt not in new:
                if len(self.held) + len(new) == self.prompt_rows:
                    break
                new.add(prompt)
            entering.append((prompt, index))
        if not entering:
            return
        portion: list[Prompt] = []
        for prompt in sorted(new, key=lambda prompt: (len(prompt[1]), prompt)):  # neighbours are alike
            portion.append(prompt)
            if sum(len(ids) for _, ids in portion) >= self.prefill_tokens:
                self._prefill(portion)
                portion = []
        if portion:
            self._prefill(portion)
        self._enter(sorted(entering, key=lambda sample: self.held[sample[0]]))

    def _prefill(self, prompts: list[Prompt]) -> None:
        """Into the first free rows."""
        rows = range(len(self.held), len(self.held) + len(prompts))
        self.held |= zip(prompts, rows, strict=True)
        adapters = [adapter for adapter, _ in prompts] if self.adapted else None
        packed = pack([ids for _, ids in prompts], device=self.model.device, adapters=adapters)
        self.cache.open(packed, rows)
        last = self.model.prefill(packed, self.cache)  # (prompts, C)
        if self.last is None:
            self.last = last.new_zeros(self.prompt_rows, last.shape[1])
            self.hidden = last.new_zeros(self.rows, last.shape[1])
        assert self.last is not None
        self.last[rows.start : rows.stop] = last

    def _enter(self, samples: list[tuple[Prompt, int]]) -> None:
        """Samples of the same prompt stand together."""
        assert self.last is not None and self.hidden is not None
        new = slice(self.live, self.live + len(samples))
        row = torch.tensor([self.held[prompt] for prompt, _ in samples], device=self.last.device)
        self.cache.begin(new, row)
        self.hidden[new] = self.last[row]
        self.index[new] = torch.tensor([index for _, index in samples], device=row.device)
        self.noises[new] = uniform(self.seed, self.index[new, None] + self.first_sample, self.steps)
        self.count[new] = 0
        self.done[new] = False
        self.waiting, self.live = self.waiting[len(samples) :], new.stop

    # -- a step

    def draw(self) -> bool:
        """Draw an id for every live sequence. True when enough are done to let them leave: the step's one host read."""
        rows = self._run(self._draw)
        done, kept = self.ended.tolist()
        if self.support is not None and self.supports is not None:
            if kept > self.supports.shape[2]:
                self.supports = F.pad(self.supports, (0, 2 * kept - self.supports.shape[2]), value=-1)
            place = self.cache.slot[: self.live], self.column[: self.live]
            self.supports[place] = -1
            self.supports[(*place, slice(kept))] = self.support[: self.live, :kept]
        return (done - (rows - self.live)) * LEAVING >= self.live

    def advance(self) -> None:
        """Run the ids just drawn."""
        if self.live:
            self._run(self._advance)

    def _run(self, function: Callable[[int], None]) -> int:
        """Call it for the live rows; on a GPU for a few free ones, too: a graph for every power of two is enough."""
        if self.graphs is None:
            function(self.live)
            return self.live
        rows = min(self.rows, 1 << (self.live - 1).bit_length())
        self.graphs(function, rows)
        return rows

    def _draw(self, rows: int) -> None:
        """For the first rows: nothing here may look at a value on the host, nor have a shape that depends on one."""
        assert self.hidden is not None
        slot, count, done, column = (x[:rows] for x in (self.cache.slot, self.count, self.done, self.column))
        noise = self.noises[:rows].gather(1, count[:, None]).squeeze(1)
        token, logprob, support = self.choose(self.model.logits(self.hidden[:rows]), noise)
        column.copy_(count)
        self.drawn[:rows] = token
        self.tokens[slot, column] = token
        self.logprobs[slot, column] = logprob.float()
        if self.support is not None and support is not None:
            self.support[:rows] = support
            self.ended[1] = ((support >= 0).sum(1) * ~done).max()
        count += ~done
        done |= (token[:, None] == self.stops).any(1) | (count >= self.max_new_tokens)
        self.ended[0] = done.sum()

    def _advance(self, rows: int) -> None:
        """As _draw."""
        assert self.hidden is not None
        self.hidden[:rows] = self.model.decode(self.drawn[:rows], self.cache)

    # -- leaving

    def leave(self) -> list[tuple[int, list[int], Tensor, Tensor | None]]:
        """Take the sequences that are done out: (sample, tokens, logprobs, support) of each."""
        done = self.done[: self.live]
        out, stay = done.nonzero().squeeze(1), (~done).nonzero().squeeze(1)
        counts, indices = self.count[out].tolist(), self.index[out].tolist()
        longest = max(counts)
        tokens, logprobs = self.tokens[out, :longest].tolist(), self.logprobs[out, :longest].cpu()
        supports = None if self.supports is None else self.supports[out, :longest].cpu()
        left = []
        for i, (index, n) in enumerate(zip(indices, counts, strict=True)):
            support = None
            if supports is not None:
                kept = int((supports[i, :n] >= 0).sum(-1).max())
                support = supports[i, :n, :kept].clone()
            left.append((index, tokens[i][:n], logprobs[i, :n].clone(), support))
        self.live = stay.numel()
        for state in (
            self.index,
            self.count,
            self.done,
            self.drawn,
            self.tokens,
            self.logprobs,
            self.noises,
            self.supports,
        ):
            if state is not None:
                state[: self.live] = state[stay]
        self.done[self.live :] = True
        upcoming = self.prompts[self.waiting[0] // self.samples_per_prompt] if self.waiting else None
        rows = self.cache.keep(stay, [self.held[upcoming]] if upcoming in self.held else [])
        held = list(self.held)
        self.held = {held[row]: i for i, row in enumerate(rows)}
        if self.last is not None:
            self.last[: len(rows)] = self.last[rows]
        return left


class _Graphs:
    """Functions of a number of rows, as CUDA graphs: replayed from the third call with a number on.

    The first call runs as it is, for it compiles kernels and allocates workspaces; the second records.

    Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
    """

    def __init__(self):
        self.recorded: dict[tuple[Callable[[int], None], int], torch.cuda.CUDAGraph | None] = {}

    def __call__(self, function: Callable[[int], None], rows: int) -> None:
        key = function, rows
        if key not in self.recorded:
            self.recorded[key] = None
            return function(rows)
        graph = self.recorded[key]
        if graph is None:
            graph = self.recorded[key] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                function(rows)
        graph.replay()
