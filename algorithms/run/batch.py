"""Packing of prompts and completions into micro-batches: the `Batch` that every trainer scores and trains on.

    items       prompt [p p p p]   completions [a a a] [b b]            a group of samples, a pair, a labelled answer
                prompt []          completions [x x y y y]              a row of SFT, a lesson
    packed      p p p p a a a b b                                       the prompt once, shared by its completions
    rows                4 5 6 7 8                                       the trained tokens, from the masks
    lengths             3     2                                         trained tokens of each completion
    last                    6   8                                       the last token of each, trained or not

Each quantity per trained token (log-probability, value, advantage) is a tensor (tokens,) in the order of `rows`.
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
    """The tokens that follow a prompt. `mask` marks the n trained tokens; tensors have one row per trained token."""

    tokens: list[int]
    mask: list[bool]
    sampled_logprob: Tensor | None = None  # (n,) fp32, log-probability at sampling
    support: Tensor | None = None  # (n, K) int32, the ids left by top-k or top-p, padded with -1
    teacher_ids: Tensor | None = None  # (n, K) int32, a teacher's most likely ids
    teacher_logprobs: Tensor | None = None  # (n, K) fp32
    vocabulary: Vocabulary | None = None  # the ids that could be sampled; None for all of the head

    @property
    def num_trained(self) -> int:
        return self.mask.count(True)


class Item(Protocol):
    """The interface of an item that can be packed: a prompt and its completions."""

    @property
    def prompt(self) -> list[int]: ...  # may be empty

    @property
    def completions(self) -> Sequence[Completion]: ...


class Family(NamedTuple):
    """The simplest `Item`: a prompt with its completions, and nothing else."""

    prompt: list[int]
    completions: Sequence[Completion]


def num_tokens(item: Item) -> int:
    """Return the number of tokens of an item when packed: its prompt once, and all completions."""
    return len(item.prompt) + sum(len(completion.tokens) for completion in item.completions)


def longest(item: Item) -> int:
    """Return the number of tokens of the prompt with its longest completion."""
    return len(item.prompt) + max(len(completion.tokens) for completion in item.completions)


@dataclass(frozen=True)
class Batch:
    """A micro-batch: items packed for one forward and backward pass.

    Tensors (tokens, ...) have one row per trained token.
    """

    packed: Packed
    members: list[int]  # the index of each item among the items of the step
    completions: Tensor  # (completions,) int64, the index of each among all completions of the step
    rows: Tensor  # (tokens,) int64, the place of each trained token in packed.tokens
    lengths: Tensor  # (completions,) int64, the number of trained tokens of each
    last: Tensor  # (completions,) int64, the place of each completion's last token in packed.tokens
    positions: Tensor  # (tokens,) int64, the index of each among all trained tokens of the step
    share: float  # share of the step's tokens
    sampled_logprob: Tensor  # (tokens,) fp32, empty if nothing was sampled
    support: Tensor | None  # (tokens, K_max) int32
    teacher_ids: Tensor | None  # (tokens, K) int32
    teacher_logprobs: Tensor | None  # (tokens, K) fp32
    vocabulary: Vocabulary | None

    def before_head(self, model: Transformer, vocabulary: Vocabulary | None = None) -> tuple[Tensor, Head]:
        """Return the two factors of each trained token's logits: hidden states (tokens, C), and the head of V rows.

        vocabulary: the ids whose rows the head has, all by default.
        """
        with autocast(self.rows.device.type):
            return model.before_head(self.packed, self.rows, vocabulary)

    def score(self, policy: Transformer, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Return (logprob, entropy) of each trained token, (tokens,) each, under the distribution of the sampler.

        Logits are divided by `temperature`, and normalised over the ids that could be sampled: `support` if
        top-k or top-p was used, otherwise `vocabulary`.
        """
        drawn_from = {"support": self.support, "vocabulary": self.vocabulary}
        with autocast(self.rows.device.type):
            logprob, _, entropy = policy.score(self.packed, self.rows, temperature=temperature, **drawn_from)
        return logprob, entropy

    def completion_logprobs(self, policy: Transformer) -> Tensor:
        """Return the log-probability of each completion, (completions,): the sum over its trained tokens."""
        logprob, _ = self.score(policy)
        return self.sums(logprob)

    def values(self, critic: ScalarModel) -> Tensor:
        """Return the critic's value of the state before each trained token, (tokens,)."""
        with autocast(self.rows.device.type):
            return critic.values(self.packed, self.packed.predictors[self.rows])

    def token_scores(self, reward_model: ScalarModel) -> Tensor:
        """Return the reward model's score of the text up to and including each trained token, (tokens,)."""
        with autocast(self.rows.device.type):
            return reward_model.values(self.packed, self.rows)

    def scores(self, reward_model: ScalarModel) -> Tensor:
        """Return the reward model's score of each whole completion, (completions,)."""
        with autocast(self.rows.device.type):
            return reward_model.values(self.packed, self.last)

    def sums(self, values: Tensor) -> Tensor:
        """Sum values (tokens,) over the trained tokens of each completion. Returns (completions,)."""
        return torch.segment_reduce(values, "sum", lengths=self.lengths, unsafe=True)

    def per_token(self, values: Tensor) -> Tensor:
        """Expand one number per completion of the step, (all completions,), to one per trained token, (tokens,)."""
        return values.to(self.rows.device)[self.completions].repeat_interleave(self.lengths)


class Batches(list[Batch]):
    """This process's micro-batches of one step. All processes have equally many, so the last micro-batch may be empty.

    num_completions, num_trained, num_tokens: the number of completions, trained tokens and all tokens of the whole
    step, over all processes.
    """

    def __init__(self, batches: Iterable[Batch], num_completions: int, num_trained: int, num_tokens: int):
        super().__init__(batches)
        self.num_completions, self.num_trained, self.num_tokens = num_completions, num_trained, num_tokens

    def joined(self, values: Sequence[Tensor]) -> Tensor:
        """Gather one number per completion from all micro-batches and processes.

        values: one (completions,) tensor per micro-batch. Returns (all completions,) fp32 on the CPU, in the order of
        the step.
        """
        found = torch.zeros(self.num_completions)
        for batch, numbers in zip(self, values, strict=True):
            found[batch.completions.cpu()] = numbers.float().cpu()
        return sum_over_processes(found)

    @torch.no_grad()
    def logprobs(self, policy: Transformer, temperature: float = 1.0) -> list[Tensor]:
        """Return the log-probabilities of each micro-batch's trained tokens, (tokens,) each, without gradients."""
        found = [batch.score(policy, temperature)[0] for batch in self]
        reshard(policy)
        return found


# ---- cutting into micro-batches


class _Part(NamedTuple):
    """An item with some or all of its completions.

    member: the index of the item in the step. numbers: the indices of the completions in the step.
    """

    member: int
    numbers: list[int]


class LazyBatches:
    """An iterable of the micro-batches of `make_batches`, each packed only when it is reached.

    This class is for a whole file, whose micro-batches together might not fit on a device.
    """

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
    """Pack items into micro-batches of about `capacity` tokens. No item is split."""
    lazy = LazyBatches(items, capacity, device)
    counts = lazy.step.counts
    return Batches(lazy, len(counts), sum(counts), sum(lazy.sizes))


def make_split_batches(
    items: Sequence[Item], needed: Tensor, capacity: int, device: torch.device | str
) -> Batches:
    """Pack items into micro-batches of at most `capacity` tokens. An item may be split; its prompt is then repeated.

    A completion is never split; a completion longer than `capacity` has its own micro-batch. needed: (all completions,)
    bool; the other completions are left out. `Batch.share` is the micro-batch's part of the needed completions'
    trained tokens.
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

            # 1. put a completion beside its prompt in this micro-batch, or both into the next one
            need = len(completion.tokens) + (len(item.prompt) if parent is None else 0)
            if need > room and cuts[-1]:
                cuts.append([])
                parent, need, room = None, len(completion.tokens) + len(item.prompt), capacity

            # 2. subtract its tokens from the room
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
    """Return a mask of the completions that this process trains, (all completions,) bool.

    No item is split between processes, and each process gets about the same number of tokens.
    """
    if world() == 1:
        return torch.ones_like(needed)

    # count the tokens of each item that are packed
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
    """The items of one step. Their completions are numbered over the whole step."""

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
        """Pack parts of items into a batch. Without parts, the batch holds one token that is not trained."""
        sequences: list[list[int]] = []
        parents: list[int] = []
        trained = bytearray()  # a tensor is made much faster from bytes than from a list of bools
        last: list[int] = []
        numbers: list[int] = []

        # the prompt of each part, if it has one, then its completions
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
        """Concatenate each tensor field of the completions. Without completions, the tensors are empty."""
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
    """Concatenate the ids that top-k or top-p kept: (n, K) int32 each -> (sum of n, largest K), padded with -1."""
    width = max(support.shape[1] for support in supports)
    return torch.cat([torch.nn.functional.pad(s, (0, width - s.shape[1]), value=-1) for s in supports])


# ---- scores without gradients


@torch.no_grad()
def over_completions(
    model: Transformer | ScalarModel,
    items: Sequence[Item],
    function: Callable[[Batch], Tensor],
    capacity: int,
) -> Tensor:
    """Compute a number for each completion of all items. Returns (items, completions per item) fp32 on the CPU.

    function: returns the numbers of a batch, (completions,). All items have the same number of completions. Dropout is
    off. Every process receives the numbers of all items.
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
    """Compute numbers for each trained token of a step, in a padded layout. Returns (..., completions, length) fp32.

    function: returns the numbers of a batch, (..., tokens). real: (completions, length) bool, the places of the trained
    tokens. Other places, and completions in no batch, are 0. Every process receives the numbers of all tokens.
    """
    values = torch.cat([function(batch, model).float() for batch in batches], -1)  # (..., own tokens)
    positions = torch.cat([batch.positions for batch in batches])
    places = real.flatten().nonzero().squeeze(1)[positions]
    found = torch.zeros(*values.shape[:-1], real.numel(), device=real.device)
    found[..., places] = values
    reshard(model)
    return sum_over_processes(found).unflatten(-1, real.shape)  # (..., completions, length)
