"""Sample continuations of prompts: a batch that shrinks as sequences end and fills up again, over one cache.

Each distinct prompt is run once when its samples enter the batch, and its keys and values are copied to them. From then
on a step runs one token of every live sequence. Sequences that have ended leave when they are an eighth of the batch.

    u = logits / temperature, on the support: all ids, or the top_k most likely, and of these the fewest whose
        probability reaches top_p, less those below min_p times the most likely one's
    next token: the id at which the cumulative softmax of u passes a uniform number

That number is a hash of (seed, sample, step) and of nothing else: neither the batch size nor the other prompts change
what a sample draws. (Rounding in the logits may, where the number falls on the border between two ids.)
"""

from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .cache import Cache
from .errors import InputError
from .packed import pack
from .transformer import Transformer

TOP_P_WIDTH = (
    1024  # a support is recorded, so it has a bound: top_p and min_p without top_k choose among this many ids
)
PREFILL_TOKENS = 16_384  # prompts are run in portions of about this many tokens
LEAVING = 8  # a batch is compacted when one in this many sequences has ended


@dataclass(frozen=True)
class Sample:
    """One continuation. logprobs are of the distribution that was sampled; greedy ones are at temperature 1."""

    prompt_index: int
    tokens: list[int]  # the stop token included
    logprobs: Tensor  # (n,) fp32
    support: (
        Tensor | None
    )  # (n, K_max) int32, the ids that truncation kept, padded with -1; None without truncation
    ended: bool  # by a stop token, not by max_new_tokens


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
    stop_ids: Collection[int] = frozenset(),
    seed: int = 0,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    adapters: Sequence[int] | None = None,
    first_sample: int = 0,
) -> list[Sample]:
    """Samples in the order of the prompts, those of prompt 0 first.

    temperature: 0 takes the most likely id, whatever top_k, top_p and min_p say, and records no support.
    batch_size: sequences at a time, all by default; the cache has room for batch_size * (longest prompt +
        max_new_tokens) tokens.
    progress: called with (samples ended, samples in all) when some leave the batch.
    adapters: for each prompt, which of the model's stacked adapters answers it, -1 for none.
    first_sample: where these are a part of more samples, how many stand before: they are then drawn as among those.
    Raises InputError for an empty prompt and for an id outside the vocabulary, ValueError for a number out of range.
    """
    for name, value, least in (
        ("samples_per_prompt", samples_per_prompt, 1),
        ("max_new_tokens", max_new_tokens, 1),
        ("batch_size", batch_size, 1),
        ("top_k", top_k, 1),
        ("temperature", temperature, 0),
    ):
        if value is not None and value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected a number in (0, 1], got {top_p}")
    if min_p is not None and not 0 <= min_p <= 1:
        raise ValueError(f"min_p: expected a number in [0, 1], got {min_p}")
    vocabulary = model.config.vocab_size
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise InputError(f"prompt {i}: expected at least one token, got none")
        if not 0 <= min(prompt) <= max(prompt) < vocabulary:
            raise InputError(
                f"prompt {i}: expected token ids below {vocabulary}, got {min(prompt)} to {max(prompt)}"
            )
    total = len(prompts) * samples_per_prompt
    if not total:
        return []
    rows = min(batch_size or total, total)
    draw = _Draw(temperature, top_k, None if top_p == 1 else top_p, vocabulary, min_p or None)
    truncates = draw.width is not None
    batch = _Batch(
        model, prompts, adapters, samples_per_prompt, max_new_tokens, rows, truncates, seed, first_sample
    )
    stops = torch.tensor(sorted(stop_ids), dtype=torch.int64, device=model.device)
    samples: dict[int, Sample] = {}
    while len(samples) < total:
        batch.admit()
        token, logprob, support = draw(model.logits(batch.hidden), batch.noise())
        if batch.record(token, logprob, support, stops):
            for index, tokens, logprobs, supports in batch.leave():
                ended = tokens[-1] in stop_ids
                samples[index] = Sample(index // samples_per_prompt, tokens, logprobs, supports, ended)
            if progress is not None:
                progress(len(samples), total)
        batch.advance()
    return [samples[index] for index in range(total)]


# ---- drawing


class _Draw:
    """logits (B, V) and noise (B,) in [0, 1) to ids (B,), log-probabilities (B,), and support (B, width) or None."""

    def __init__(
        self,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        vocabulary: int,
        min_p: float | None = None,
    ):
        self.temperature, self.top_k, self.top_p, self.min_p = temperature, top_k, top_p, min_p
        truncates = temperature > 0 and any(rule is not None for rule in (top_k, top_p, min_p))
        self.width = min(top_k or TOP_P_WIDTH, vocabulary) if truncates else None

    def __call__(self, logits: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        if self.temperature == 0:
            logprob, token = logits.log_softmax(-1).max(-1)
            return token, logprob, None
        u, ids = logits / self.temperature, None
        if self.width is not None:
            whole = u
            u, ids = u.topk(self.width)  # (B, width), most likely first
            if self.top_p is not None:
                p = (u - (whole if self.top_k is None else u).logsumexp(-1, keepdim=True)).exp()
                dropped = p.cumsum(-1) - p >= self.top_p  # where the ids before this one suffice
                u, ids = u.masked_fill(dropped, -torch.inf), ids.masked_fill(dropped, -1)
            if self.min_p is not None:
                dropped = (u - u[:, :1]).exp() < self.min_p
                u, ids = u.masked_fill(dropped, -torch.inf), ids.masked_fill(dropped, -1)
        log_p = u.log_softmax(-1)
        reached = log_p.exp().cumsum(-1, dtype=torch.float64)
        chosen = torch.searchsorted(reached, noise[:, None] * reached[:, -1:], right=True)  # (B, 1)
        chosen = chosen.clamp_(max=u.shape[1] - 1)  # only NaN logits come here
        token = chosen if ids is None else ids.gather(1, chosen)
        return token.squeeze(1), log_p.gather(1, chosen).squeeze(1), ids


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
    """Sequences in flight. Row r of every tensor and slot r of the cache are one sequence; live rows come first."""

    def __init__(
        self,
        model: Transformer,
        prompts: Sequence[Sequence[int]],
        adapters: Sequence[int] | None,
        samples_per_prompt: int,
        max_new_tokens: int,
        rows: int,
        truncates: bool,
        seed: int,
        first_sample: int,
    ):
        self.model, self.prompts, self.adapters = model, prompts, adapters
        self.seed, self.first_sample = seed, first_sample
        self.rows, self.live, self.max_new_tokens = rows, 0, max_new_tokens
        self.waiting = deque(  # (prompt, its samples that enter together)
            (prompt, range(first, min(first + rows, (prompt + 1) * samples_per_prompt)))
            for prompt in range(len(prompts))
            for first in range(prompt * samples_per_prompt, (prompt + 1) * samples_per_prompt, rows)
        )
        device, weight = model.device, model.embed_tokens.weight
        dtype = weight.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        capacity = max(len(prompt) for prompt in prompts) + max_new_tokens
        self.cache = Cache(model.config, rows, capacity, dtype, device)
        self.hidden = weight.new_empty(0, weight.shape[1])  # (live, C), what the next ids are drawn from
        self.index = torch.zeros(rows, dtype=torch.int64, device=device)  # of the sample
        self.count = torch.zeros(rows, dtype=torch.int64, device=device)  # ids drawn
        self.done = torch.zeros(rows, dtype=torch.bool, device=device)
        # one column more than needed: a sequence that is done, but has not left, writes there
        self.tokens = torch.zeros(rows, max_new_tokens + 1, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(rows, max_new_tokens + 1, device=device)
        self.noises = torch.zeros(rows, max_new_tokens + 1, dtype=torch.float64, device=device)
        self.steps = torch.arange(max_new_tokens + 1, device=device)
        self.supports = None
        if truncates:  # as wide as the widest support so far
            self.supports = torch.empty(rows, max_new_tokens + 1, 0, dtype=torch.int32, device=device)

    def admit(self) -> None:
        """Run the prompts of as many waiting samples as there is room for."""
        while self.waiting and len(self.waiting[0][1]) <= self.rows - self.live:
            segments: dict[tuple[int, tuple[int, ...]], int] = {}  # (adapter, ids)
            slots: list[list[int]] = []
            entering: list[int] = []
            tokens = 0
            while self.waiting and tokens < PREFILL_TOKENS:
                prompt, samples = self.waiting[0]
                first = self.live + len(entering)
                if first + len(samples) > self.rows:
                    break
                self.waiting.popleft()
                key = (-1 if self.adapters is None else self.adapters[prompt], tuple(self.prompts[prompt]))
                if key not in segments:
                    segments[key] = len(slots)
                    slots.append([])
                    tokens += len(key[1])
                slots[segments[key]] += range(first, first + len(samples))
                entering += samples
            self._prefill(list(segments), slots, entering)

    def _prefill(
        self, segments: list[tuple[int, tuple[int, ...]]], slots: list[list[int]], entering: list[int]
    ) -> None:
        adapters = None if self.adapters is None else [adapter for adapter, _ in segments]
        packed = pack([ids for _, ids in segments], device=self.model.device, adapters=adapters)
        self.cache.open(packed, slots)
        last = self.model(packed, self.cache)[packed.cu_seqlens[1:].long() - 1]  # (segments, C)
        segment = {slot: i for i, copies in enumerate(slots) for slot in copies}
        new = slice(self.live, self.live + len(entering))
        rows = torch.tensor([segment[slot] for slot in range(new.start, new.stop)], device=last.device)
        self.hidden = torch.cat([self.hidden.to(last.dtype), last[rows]])
        self.index[new] = torch.tensor(entering, device=last.device)
        self.noises[new] = uniform(self.seed, self.index[new, None] + self.first_sample, self.steps)
        self.count[new] = 0
        self.done[new] = False
        self.live = new.stop

    def noise(self) -> Tensor:
        """(live,) for the ids that are drawn next."""
        return self.noises[: self.live].gather(1, self.count[: self.live, None]).squeeze(1)

    def record(self, token: Tensor, logprob: Tensor, support: Tensor | None, stops: Tensor) -> bool:
        """Store what was drawn. True when enough sequences are done to let them leave: the step's one host read."""
        live, rows = slice(self.live), self.cache.slot[: self.live]
        column = self.count[live].clone()  # (live,)
        self.drawn = token
        self.tokens[rows, column] = token
        self.logprobs[rows, column] = logprob.float()
        done = self.done[live]
        self.count[live] += ~done
        done |= (token[:, None] == stops).any(1) | (self.count[live] >= self.max_new_tokens)
        if self.supports is None or support is None:
            return int(done.sum()) * LEAVING >= self.live
        leaving, kept = torch.stack([done.sum(), (support >= 0).sum(1).max()]).tolist()
        if kept > self.supports.shape[2]:
            self.supports = F.pad(self.supports, (0, 2 * kept - self.supports.shape[2]), value=-1)
        self.supports[rows, column] = -1
        self.supports[rows, column, :kept] = support[:, :kept].int()
        return leaving * LEAVING >= self.live

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
            self.tokens,
            self.logprobs,
            self.noises,
            self.supports,
        ):
            if state is not None:
                state[: self.live] = state[stay]
        self.drawn = self.drawn[stay]
        self.cache.keep(stay)
        return left

    def advance(self) -> None:
        """Run the ids just drawn."""
        if self.live:
            self.hidden = self.model.decode(self.drawn, self.cache)
        else:
            self.hidden = self.hidden[:0]
