"""A prompt and what continues it, packed into micro-batches: the one `Batch` that every trainer scores and trains on.

    items       prompt [p p p p]   completions [a a a] [b b]            a group of samples, a pair, one judged answer
                prompt []          completions [x x y y y]              a row of SFT, a lesson
    packed      p p p p a a a b b                                       the prompt once, as the completions' parent
    rows                4 5 6 7 8                                       the tokens that are trained: those in the masks
    lengths             3     2                                         of each completion, in the order of `rows`
    last                    6   8                                       the last token of each, trained or not

Whatever a number a trained token is, a logprob, a value, an advantage, is a tensor (tokens,) in the order of `rows`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ...model.head import Head
from ...model.packed import Packed, pack
from ...model.scalar import ScalarModel
from ...model.transformer import Transformer
from ...model.vocabulary import Vocabulary
from .optimizer import autocast
from .processes import IDLE, most, parts, rank, reshard, shares, sum_over_processes, world


@dataclass(frozen=True)
class Completion:
    """A text behind a prompt. mask: which tokens are trained, n of them. The other fields are of these, in order."""

    tokens: list[int]
    mask: list[bool]
    sampled_logprob: Tensor | None = None  # (n,) fp32, the sampler's own
    support: Tensor | None = None  # (n, K) int32, the ids that the sampler kept, padded with -1
    teacher_ids: Tensor | None = None  # (n, K) int32, a teacher's most likely ids
    teacher_logprobs: Tensor | None = None  # (n, K) fp32
    vocabulary: Vocabulary | None = None  # the ids that a sampler drew from; None for the whole head

    @property
    def num_trained(self) -> int:
        return self.mask.count(True)


class Item(Protocol):
    """A prompt and its completions, as a batch takes them."""

    @property
    def prompt(self) -> list[int]: ...  # may be empty

    @property
    def completions(self) -> Sequence[Completion]: ...


class Family(NamedTuple):
    """A prompt and what continues it."""

    prompt: list[int]
    completions: Sequence[Completion]


def num_tokens(item: Item) -> int:
    """Tokens of an item as it is packed, with the prompt once."""
    return len(item.prompt) + sum(len(completion.tokens) for completion in item.completions)


def longest(item: Item) -> int:
    """Tokens of the prompt with its longest completion."""
    return len(item.prompt) + max(len(completion.tokens) for completion in item.completions)


@dataclass(frozen=True)
class Batch:
    """Items packed for one forward and backward. n tokens are trained; every (tokens,) tensor follows `rows`."""

    packed: Packed
    members: list[int]  # the index of each item among those of the step
    completions: Tensor  # (completions,) int64, which of all the step's completions these are
    rows: Tensor  # (tokens,) int64, into packed.tokens
    lengths: Tensor  # (completions,) int64, how many trained tokens each has
    last: Tensor  # (completions,) int64, the row of each one's last token
    positions: Tensor  # (tokens,) int64, into the trained tokens of all the step's completions
    share: float  # of the step's tokens
    sampled_logprob: Tensor  # (tokens,) fp32, empty where nothing was sampled
    support: Tensor | None  # (tokens, K_max) int32
    teacher_ids: Tensor | None  # (tokens, K) int32
    teacher_logprobs: Tensor | None  # (tokens, K) fp32
    vocabulary: Vocabulary | None

    def before_head(self, model: Transformer, vocabulary: Vocabulary | None = None) -> tuple[Tensor, Head]:
        """The operands of the logits that score each token: hidden states (tokens, C), and the head of V rows.

        vocabulary: the ids whose rows these are, all by default.
        """
        with autocast(self.rows.device.type):
            return model.before_head(self.packed, self.rows, vocabulary)

    def score(self, policy: Transformer, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """(logprob, entropy), each (tokens,), under the distribution that was sampled."""
        drawn_from = {"support": self.support, "vocabulary": self.vocabulary}
        with autocast(self.rows.device.type):
            logprob, _, entropy = policy.score(self.packed, self.rows, temperature=temperature, **drawn_from)
        return logprob, entropy

    def completion_logprobs(self, policy: Transformer) -> Tensor:
        """log pi of each whole completion, (completions,): the sum over its trained tokens."""
        logprob, _ = self.score(policy)
        return self.sums(logprob)

    def values(self, critic: ScalarModel) -> Tensor:
        """The critic's value before each token, (tokens,): of the state in which it was chosen."""
        with autocast(self.rows.device.type):
            return critic.values(self.packed, self.packed.predictors[self.rows])

    def token_scores(self, reward_model: ScalarModel) -> Tensor:
        """The score of what ends with each token, (tokens,)."""
        with autocast(self.rows.device.type):
            return reward_model.values(self.packed, self.rows)

    def scores(self, reward_model: ScalarModel) -> Tensor:
        """The score of each whole completion, (completions,)."""
        with autocast(self.rows.device.type):
            return reward_model.values(self.packed, self.last)

    def sums(self, values: Tensor) -> Tensor:
        """values (tokens,) -> their sum over each completion, (completions,)."""
        return torch.segment_reduce(values, "sum", lengths=self.lengths, unsafe=True)

    def per_token(self, values: Tensor) -> Tensor:
        """A number for each of the step's completions, (all completions,), as one for each token, (tokens,)."""
        return values.to(self.rows.device)[self.completions].repeat_interleave(self.lengths)


class Batches(list[Batch]):
    """The micro-batches of one step that are this process's, the last perhaps without an item: as many as every other
    process has. num_completions, num_trained, num_tokens: of the whole step, on all processes, the completions, their
    trained tokens, and all tokens.
    """

    def __init__(self, batches: Iterable[Batch], num_completions: int, num_trained: int, num_tokens: int):
        super().__init__(batches)
        self.num_completions, self.num_trained, self.num_tokens = num_completions, num_trained, num_tokens

    def joined(self, values: Sequence[Tensor]) -> Tensor:
        """Numbers of each micro-batch's completions, (completions,) each -> those of the step's on all processes, in
        order, (all completions,) fp32 on the CPU.
        """
        found = torch.zeros(self.num_completions)
        for batch, numbers in zip(self, values, strict=True):
            found[batch.completions.cpu()] = numbers.float().cpu()
        return sum_over_processes(found)

    @torch.no_grad()
    def logprobs(self, policy: Transformer, temperature: float = 1.0) -> list[Tensor]:
        """Log-probabilities of each batch's tokens, (tokens,), by a policy that only looks on."""
        found = [batch.score(policy, temperature)[0] for batch in self]
        reshard(policy)
        return found


# ---- cutting


class _Part(NamedTuple):
    """An item, or some of its completions. numbers: which of all the step's completions they are."""

    member: int
    numbers: list[int]


class LazyBatches:
    """The micro-batches of `make_batches`, each packed as its turn comes: for a whole file, which may fill a device."""

    def __init__(self, items: Sequence[Item], capacity: int, device: torch.device | str):
        self.step = _Step(items, device)
        self.sizes = [num_tokens(item) for item in items]
        self._members = shares(self.sizes, capacity)

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[Batch]:
        sizes, total = self.sizes, sum(self.sizes)
        for members in self._members:
            cut = [_Part(i, self.step.numbers_of(i)) for i in members]
            yield self.step.batch(cut, sum(sizes[i] for i in members) / total)


def make_batches(items: Sequence[Item], capacity: int, device: torch.device | str) -> Batches:
    """Items in micro-batches of about `capacity` tokens, none of them split."""
    lazy = LazyBatches(items, capacity, device)
    counts = lazy.step.counts
    return Batches(lazy, len(counts), sum(counts), sum(lazy.sizes))


def make_split_batches(
    items: Sequence[Item], needed: Tensor, capacity: int, device: torch.device | str
) -> Batches:
    """Items in micro-batches of at most `capacity` tokens; an item is split where a micro-batch ends, its prompt
    repeated, but a completion never is.

    needed: (all completions,) bool; the others are left out, and count for nothing. The share of a batch is that of
    the needed completions' trained tokens.
    """
    step = _Step(items, device)
    num_trained = int((torch.tensor(step.counts) * needed).sum())
    needed = needed & _own_items(items, needed)
    cuts: list[list[_Part]] = [[]]
    room = capacity
    for member, item in enumerate(items):
        parent: _Part | None = None
        for number, completion in zip(step.numbers_of(member), item.completions, strict=True):
            if not needed[number]:
                continue

            # 1. a completion goes on from its prompt in the same micro-batch, or both open the next one
            need = len(completion.tokens) + (len(item.prompt) if parent is None else 0)
            if need > room and cuts[-1]:
                cuts.append([])
                parent, need, room = None, len(completion.tokens) + len(item.prompt), capacity

            # 2. what it takes is gone
            if parent is None:
                parent = _Part(member, [])
                cuts[-1].append(parent)
            parent.numbers.append(number)
            room -= need
    cuts = [cut for cut in cuts if cut]
    cuts += [[] for _ in range(most(len(cuts)) - len(cuts))]
    trained = [sum(step.counts[number] for part in cut for number in part.numbers) for cut in cuts]
    batches = [step.batch(cut, n / num_trained) for cut, n in zip(cuts, trained, strict=True)]
    return Batches(batches, len(step.counts), num_trained, sum(num_tokens(item) for item in items))


def _own_items(items: Sequence[Item], needed: Tensor) -> Tensor:
    """A mask of the completions that this process trains, (all completions,): items whole, tokens about even."""
    if world() == 1:
        return torch.ones_like(needed)

    # the tokens of each item that are to be packed
    lengths: list[int] = []
    start = 0
    for item in items:
        end = start + len(item.completions)
        trained = [
            len(completion.tokens)
            for completion, is_needed in zip(item.completions, needed[start:end].tolist(), strict=True)
            if is_needed
        ]
        lengths.append(len(item.prompt) * bool(trained) + sum(trained))
        start = end

    here = set(parts(lengths, world())[rank()])
    return torch.tensor(
        [i in here for i, item in enumerate(items) for _ in item.completions], dtype=torch.bool
    )


# ---- packing


class _Step:
    """The items of one step, with their completions numbered through."""

    def __init__(self, items: Sequence[Item], device: torch.device | str):
        self._items, self._device = items, device
        self._completions = [completion for item in items for completion in item.completions]
        self.counts = [completion.num_trained for completion in self._completions]
        self._starts = (torch.tensor([0, *self.counts]).cumsum(0)).tolist()  # of trained tokens
        self._first: list[int] = []  # the number of each item's first completion
        count = 0
        for item in items:
            self._first.append(count)
            count += len(item.completions)

    def numbers_of(self, member: int) -> list[int]:
        first = self._first[member]
        return list(range(first, first + len(self._items[member].completions)))

    def batch(self, cut: Sequence[_Part], share: float) -> Batch:
        """The batch of these parts; without any, one token of which nothing is trained."""
        sequences: list[list[int]] = []
        parents: list[int] = []
        trained = bytearray()  # a tensor of bytes is made at once, one of a list's bools entry by entry
        last: list[int] = []
        numbers: list[int] = []

        # the prompt of each part, if there is one, and its completions behind it
        for part in cut:
            prompt, parent = self._items[part.member].prompt, -1
            if prompt:
                parent = len(sequences)
                sequences.append(prompt)
                parents.append(-1)
                trained.extend([False] * len(prompt))
            for number in part.numbers:
                completion = self._completions[number]
                sequences.append(completion.tokens)
                parents.append(parent)
                trained.extend(completion.mask)
                last.append(len(trained) - 1)
                numbers.append(number)

        is_trained = torch.frombuffer(trained or bytearray(1), dtype=torch.bool)  # (total,)
        chosen = [self._completions[number] for number in numbers]
        positions = [torch.arange(self._starts[n], self._starts[n + 1]) for n in numbers]
        return Batch(
            packed=pack(sequences or IDLE, parents or None, self._device),
            members=[part.member for part in cut],
            completions=self._indices(numbers),
            rows=is_trained.nonzero().squeeze(1).to(self._device),
            lengths=self._indices([self.counts[number] for number in numbers]),
            last=self._indices(last),
            positions=torch.cat([torch.arange(0), *positions]).to(self._device),
            share=share,
            **self._of_tokens(chosen),
        )

    def _indices(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)

    def _of_tokens(self, chosen: Sequence[Completion]) -> dict[str, Any]:
        """The fields of completions, of their trained tokens end to end; no rows where there is no completion."""
        any_one = self._completions[0]

        def joined(name: str) -> Tensor | None:
            like = getattr(any_one, name)
            if like is None:
                return None
            return torch.cat([like[:0], *(getattr(c, name) for c in chosen)]).to(self._device)

        supports = [c.support for c in chosen if c.support is not None]
        sampled, vocabulary = joined("sampled_logprob"), any_one.vocabulary
        return {
            "sampled_logprob": torch.empty(0) if sampled is None else sampled,
            "support": stack_supports(supports).to(self._device) if supports else None,
            "teacher_ids": joined("teacher_ids"),
            "teacher_logprobs": joined("teacher_logprobs"),
            "vocabulary": None if vocabulary is None else vocabulary.to(self._device),
        }


def stack_supports(supports: Sequence[Tensor]) -> Tensor:
    """Each (n, K) int32 of any K, as (sum of n, the largest K), padded with -1."""
    width = max(support.shape[1] for support in supports)
    return torch.cat([torch.nn.functional.pad(s, (0, width - s.shape[1]), value=-1) for s in supports])


# ---- without a gradient


@torch.no_grad()
def over_completions(
    model: Transformer | ScalarModel,
    items: Sequence[Item],
    function: Callable[[Batch], Tensor],
    capacity: int,
) -> Tensor:
    """function(batch), (completions,) of each batch, as (items, completions of each) fp32 on the CPU.

    All items have the same number of completions. Dropout is off. Every process has all items' numbers.
    """
    training = model.training
    model.eval()
    found = torch.zeros(len(items), len(items[0].completions) if items else 0)
    for batch in LazyBatches(items, capacity, model.device):
        found.view(-1)[batch.completions.cpu()] = function(batch).float().cpu()
    model.train(training)
    reshard(model)
    return sum_over_processes(found)


@torch.no_grad()
def over_tokens(
    model: Transformer | ScalarModel,
    batches: Sequence[Batch],
    function: Callable[[Batch, Any], Tensor],
    real: Tensor,
) -> Tensor:
    """function(batch, model), (..., tokens) of each batch, laid out as `real`: (..., completions, length) fp32.

    real: which of its places are trained tokens. 0 at the others, and for completions in no batch. A token is in one
    process's batches, and every process has all tokens' numbers.
    """
    values = torch.cat([function(batch, model).float() for batch in batches], -1)  # (..., these tokens)
    positions = torch.cat([batch.positions for batch in batches])
    places = real.flatten().nonzero().squeeze(1)[positions]
    found = torch.zeros(*values.shape[:-1], real.numel(), device=real.device)
    found[..., places] = values
    reshard(model)
    return sum_over_processes(found).unflatten(-1, real.shape)  # (..., completions, length)
