"""The batch of sequences that `generate` fills: the waiting samples, the live sequences and the next ids.

    admit     move waiting samples into free rows; each prompt runs once, for all of its samples
    draw      draw an id for every live sequence, from the hidden state of its last token
    advance   run these ids through the model, and add them to the cache
    leave     remove the ended sequences once they make up an eighth of the batch, and move the others together

The noise for a draw is a hash of (seed, sample, step) and of nothing else. With CUDA_GRAPHS a step on a GPU is two
graphs, `draw` and `advance`. Between them the host reads how many sequences have ended.
"""

from bisect import bisect_right
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import sample_tokens
from ..kernels._chip import autocast_dtype
from .cache import Cache, cache_bytes
from .errors import InputError
from .packed import pack
from .transformer import Transformer
from .vocabulary import Vocabulary, say_what_never_ends

# tokens, about, in one portion of prompts: on a CPU a layer's output then stays in a core's cache
PREFILL_TOKENS = {"cuda": 16_384, "cpu": 512}
LEAVING = 8  # a batch is compacted when one in this many sequences has ended
MEMORY_BUDGET = 4 * 2**30  # bytes of cached keys and values
# TODO: turn on once tests/model/test_cuda_graphs.py has passed on a GPU; no graph was recorded on one yet
CUDA_GRAPHS = False

# (adapter, ids): samples that have both in common share a prompt row of the cache
Prompt = tuple[int, tuple[int, ...]]
# logits (B, V) and noise (B,) -> ids (B,), their log-probabilities, and the ids that truncation kept
Choose = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor | None]]


# ---- what is asked


@dataclass(frozen=True)
class Request:
    """The samples to draw, numbered in the order of the prompts: first all samples of prompt 0."""

    prompts: Sequence[Sequence[int]]
    max_new_tokens: int
    samples_per_prompt: int = 1
    adapters: Sequence[int] | None = None  # the adapter of each prompt, -1 for none
    stop_ids: Collection[int] = frozenset()
    seed: int = 0
    first_sample: int = 0  # the number of samples before these, if they are a part of a larger set

    @property
    def total(self) -> int:
        """The number of samples."""
        return len(self.prompts) * self.samples_per_prompt

    def check(self, vocab_size: int) -> None:
        """Raise ValueError if max_new_tokens is below 1, and InputError if a prompt is empty or has an invalid id."""
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected at least 1, got {self.max_new_tokens}")
        for i, prompt in enumerate(self.prompts):
            if not prompt:
                raise InputError(f"prompt {i}: expected at least one token, got none")
            least, most = min(prompt), max(prompt)
            if not 0 <= least <= most < vocab_size:
                raise InputError(f"prompt {i}: expected token ids below {vocab_size}, got {least} to {most}")


class Chooser(NamedTuple):
    """The function that draws ids from logits and noise, and the largest number of ids that its truncation keeps."""

    choose: Choose
    width: int | None  # the most ids that truncation keeps in a support; None without truncation

    @classmethod
    def of(
        cls,
        model: Transformer,
        vocabulary: Vocabulary | None,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
    ) -> "Chooser":
        """Return a Chooser that calls `sample_tokens` on the vocabulary's ids.

        Raises ValueError for an option out of range.
        """
        choose = partial(sample_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        rows = model.config.vocab_size
        tokens = None if vocabulary is None else vocabulary.within(rows)

        # a call without rows: the op only checks the options, and shows the width of a support
        no_logits = torch.empty(0, rows if tokens is None else tokens.size)
        *_, support = choose(no_logits, torch.empty(0, dtype=torch.float64))
        width = None if support is None else support.shape[1]
        return cls(choose if tokens is None else partial(_among, choose, tokens.to(model.device)), width)


def _among(
    choose: Choose, tokens: Vocabulary, logits: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Draw ids of `tokens` only, from logits (B, V) of the whole head.

    The function runs in each step, so it never waits for the GPU to read a value on the host.
    """
    row, logprob, support = choose(tokens.select(logits, 1), noise)
    return tokens.ids_of(row), logprob, None if support is None else tokens.ids_of(support)


# ---- noise


def _signed(value: int) -> int:
    """Return the low 64 bits of a value as a signed 64-bit integer."""
    return (value + 2**63) % 2**64 - 2**63


_GOLDEN, _FIRST, _SECOND = (_signed(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _mix(x: Tensor) -> Tensor:
    """Apply the output function of splitmix64 to an int64 tensor, whose products wrap around.

    Source: Steele et al. 2014, doi:10.1145/2660193.2660195
    """
    for shift, factor in ((30, _FIRST), (27, _SECOND), (31, 1)):
        x = (x ^ ((x >> shift) & (2 ** (64 - shift) - 1))) * factor  # masked: >> on int64 copies the sign
    return x


def uniform(seed: int, sample: Tensor, step: Tensor) -> Tensor:
    """Return noise in [0, 1), fp64, as a pure function of the seed, the sample and the step.

    sample, step: int64 tensors that broadcast against each other.
    """
    key = _mix(_mix((sample + 1) * _GOLDEN + _signed(seed)) + (step + 1) * _GOLDEN)  # + 1: _mix(0) is 0
    return ((key >> 12) & (2**52 - 1)).double() * 2.0**-52


# ---- the batch


class Finished(NamedTuple):
    """A sequence of n ids that has left the batch."""

    index: int  # of the sample
    tokens: list[int]
    logprobs: Tensor  # (n,) fp32
    support: Tensor | None  # (n, K_max) int32, padded with -1


class Batch:
    """The sequences in flight. Row r of every tensor and slot r of the cache belong to one sequence.

    Live rows, which hold a sequence, come first. Free rows count as done. The tensors keep their addresses, so that a
    CUDA graph can be recorded on them.
    batch_size: the largest number of rows; by default as many as the budget allows. memory_budget: bytes of the cache.
    Raises InputError if the budget is too small for the cache of one sequence.
    """

    def __init__(
        self,
        model: Transformer,
        request: Request,
        chooser: Chooser,
        batch_size: int | None = None,
        memory_budget: int = MEMORY_BUDGET,
    ):
        self.model, self.request, self.choose = model, request, chooser.choose
        adapters = [-1] * len(request.prompts) if request.adapters is None else request.adapters
        self.prompts = [(a, tuple(ids)) for a, ids in zip(adapters, request.prompts, strict=True)]
        self.waiting = range(request.total)
        self.live = 0
        self.prefill_tokens = PREFILL_TOKENS[model.device.type]
        self.graphs = Graphs() if CUDA_GRAPHS and model.device.type == "cuda" else None

        self.cache = self._cache_within(memory_budget, batch_size or request.total)
        self.rows, self.prompt_rows = len(self.cache.slot), len(self.cache.row_length)
        self.row_of: dict[Prompt, int] = {}  # the row of each prompt in the cache, in ascending order
        self.last: Tensor | None = None  # (prompt_rows, C), hidden states at the ends of the prompts
        self.hidden: Tensor | None = None  # (rows, C), hidden states that the next ids are drawn from
        self._allocate(chooser.width)

    def _cache_within(self, budget: int, most_rows: int) -> Cache:
        """Return a cache with as many rows as the budget allows, at most `most_rows`."""
        model, request = self.model, self.request
        distinct, longest = len(set(self.prompts)), max(len(prompt) for prompt in request.prompts)
        dtype = autocast_dtype(model.embed_tokens.weight)

        def shape(rows: int) -> tuple[int, int, int, int]:
            # room for twice the prompts that fill the batch, since the samples do not end together
            prompts = min(distinct, rows, 2 * -(-rows // request.samples_per_prompt))
            return prompts, longest, rows, request.max_new_tokens

        def needed(rows: int) -> int:
            return cache_bytes(model.config, *shape(rows), dtype)

        rows = bisect_right(range(1, min(most_rows, request.total) + 1), budget, key=needed)
        if not rows:
            raise InputError(
                f"memory_budget: expected at least the {needed(1)} bytes that one sequence's cache takes, "
                f"got {budget}"
            )
        return Cache(model.config, *shape(rows), dtype, model.device)

    def _allocate(self, width: int | None) -> None:
        """Allocate the tensors that have an entry for each row.

        width: the largest number of ids that truncation keeps, or None without truncation.
        """
        rows, device, vocab_size = self.rows, self.model.device, self.model.config.vocab_size
        self.index = torch.zeros(rows, dtype=torch.int64, device=device)  # the sample's number
        self.count = torch.zeros(rows, dtype=torch.int64, device=device)  # how many ids were drawn
        self.done = torch.ones(rows, dtype=torch.bool, device=device)
        self.drawn = torch.zeros(rows, dtype=torch.int64, device=device)  # the latest id
        # its position among the ids of its sample
        self.column = torch.zeros(rows, dtype=torch.int64, device=device)

        # one column more than needed: a sequence that is done, but has not left, writes there
        columns = self.request.max_new_tokens + 1
        self.tokens = torch.zeros(rows, columns, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(rows, columns, device=device)
        self.noises = torch.zeros(rows, columns, dtype=torch.float64, device=device)
        self.steps = torch.arange(columns, device=device)

        # only ids that the head has a row for are ever drawn
        say_what_never_ends(self.request.stop_ids, vocab_size)
        stops = sorted(token for token in self.request.stop_ids if 0 <= token < vocab_size)
        self.stops = torch.tensor(stops, dtype=torch.int64, device=device)

        # the number of rows that are done, and the width of the widest support
        self.ended = torch.zeros(2, dtype=torch.int64, device=device)
        self.support = self.supports = None
        if width is not None:
            self.support = torch.full((rows, width), -1, dtype=torch.int32, device=device)  # the latest
            # of all steps; the last dimension grows to the widest support so far
            self.supports = self.support.new_empty(rows, columns, 0)

    def _prompt_of(self, sample: int) -> Prompt:
        return self.prompts[sample // self.request.samples_per_prompt]

    # -- entering

    def admit(self) -> None:
        """Move as many waiting samples into the batch as it has room for.

        A prompt that the cache does not hold yet is run first.
        """
        new: set[Prompt] = set()
        entering: list[tuple[Prompt, int]] = []  # the prompt and the sample's number
        for index in self.waiting[: self.rows - self.live]:
            prompt = self._prompt_of(index)
            if prompt not in self.row_of and prompt not in new:
                if len(self.row_of) + len(new) == self.prompt_rows:
                    break
                new.add(prompt)
            entering.append((prompt, index))
        if not entering:
            return

        portion: list[Prompt] = []
        for prompt in sorted(new, key=lambda prompt: (len(prompt[1]), prompt)):  # similar prompts together
            portion.append(prompt)
            if sum(len(ids) for _, ids in portion) >= self.prefill_tokens:
                self._prefill(portion)
                portion = []
        if portion:
            self._prefill(portion)

        self._enter(sorted(entering, key=lambda sample: self.row_of[sample[0]]))

    def _prefill(self, prompts: list[Prompt]) -> None:
        """Run prompts, and write their keys and values into the first free prompt rows of the cache."""
        rows = range(len(self.row_of), len(self.row_of) + len(prompts))
        self.row_of |= zip(prompts, rows, strict=True)
        adapters = None if self.request.adapters is None else [adapter for adapter, _ in prompts]
        packed = pack([ids for _, ids in prompts], device=self.model.device, adapters=adapters)
        self.cache.open(packed, rows)
        last = self.model.prefill(packed, self.cache)  # (prompts, C)

        if self.last is None:
            self.last = last.new_zeros(self.prompt_rows, last.shape[1])
            self.hidden = last.new_zeros(self.rows, last.shape[1])
        assert self.last is not None
        self.last[rows.start : rows.stop] = last

    def _enter(self, samples: list[tuple[Prompt, int]]) -> None:
        """Start samples in the first free rows of the batch.

        Samples of the same prompt should be adjacent, because decode_attention is then fastest.
        """
        assert self.last is not None and self.hidden is not None
        new = slice(self.live, self.live + len(samples))
        row = torch.tensor([self.row_of[prompt] for prompt, _ in samples], device=self.last.device)
        self.cache.begin(new, row)
        self.hidden[new] = self.last[row]

        request = self.request
        self.index[new] = torch.tensor([index for _, index in samples], device=row.device)
        self.noises[new] = uniform(request.seed, self.index[new, None] + request.first_sample, self.steps)
        self.count[new] = 0
        self.done[new] = False
        self.waiting, self.live = self.waiting[len(samples) :], new.stop

    # -- a step

    def draw(self) -> bool:
        """Draw an id for every live sequence. Return True if enough sequences have ended for `leave` to be called.

        This is the only place where a step reads values on the host.
        """
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
        """Run the ids just drawn through the model."""
        if self.live:
            self._run(self._advance)

    def _run(self, function: Callable[[int], None]) -> int:
        """Call a function with the number of live rows, and return the number of rows that it ran on.

        With CUDA graphs, the number is rounded up to a power of two by adding free rows, so that few graphs are needed.
        """
        if self.graphs is None:
            function(self.live)
            return self.live
        rows = min(self.rows, 1 << (self.live - 1).bit_length())
        self.graphs(function, rows)
        return rows

    def _draw(self, rows: int) -> None:
        """Draw ids for the first `rows` rows.

        A CUDA graph may record this function, so it reads no value on the host, and no shape depends on a value.
        """
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
        done |= (token[:, None] == self.stops).any(1) | (count >= self.request.max_new_tokens)
        self.ended[0] = done.sum()

    def _advance(self, rows: int) -> None:
        """Run the ids of the first `rows` rows through the model. As in `_draw`, no value is read on the host."""
        assert self.hidden is not None
        self.hidden[:rows] = self.model.decode(self.drawn[:rows], self.cache)

    # -- leaving

    def leave(self) -> list[Finished]:
        """Remove the ended sequences from the batch and return them."""
        done = self.done[: self.live]
        finished, stay = self._read(done.nonzero().squeeze(1)), (~done).nonzero().squeeze(1)
        self._keep(stay)
        return finished

    def _read(self, rows: Tensor) -> list[Finished]:
        counts, indices = self.count[rows].tolist(), self.index[rows].tolist()
        longest = max(counts)
        tokens, logprobs = self.tokens[rows, :longest].tolist(), self.logprobs[rows, :longest].cpu()
        supports = None if self.supports is None else self.supports[rows, :longest].cpu()

        finished = []
        for i, (index, n) in enumerate(zip(indices, counts, strict=True)):
            support = None
            if supports is not None:
                kept = int((supports[i, :n] >= 0).sum(-1).max())
                support = supports[i, :n, :kept].clone()
            finished.append(Finished(index, tokens[i][:n], logprobs[i, :n].clone(), support))
        return finished

    def _keep(self, stay: Tensor) -> None:
        """Move the rows in `stay` to the front, and free the others.

        The cache keeps the prompts of the moved rows, and the prompt of the next waiting sample if it was in the cache.
        """
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

        upcoming = self._prompt_of(self.waiting[0]) if self.waiting else None
        rows = self.cache.keep(stay, [self.row_of[upcoming]] if upcoming in self.row_of else [])
        prompts = list(self.row_of)
        self.row_of = {prompts[row]: i for i, row in enumerate(rows)}
        if self.last is not None:
            self.last[: len(rows)] = self.last[rows]


class Graphs:
    """CUDA graphs of functions that take a number of rows, one graph for each function and number.

    The first call with a function and a number runs the function without a graph, because that compiles kernels and
    allocates workspaces. The second call records the graph. The second and all later calls replay the graph.

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
