"""Sample groups of completions, have them judged, and lay them out for training.

A group is one prompt and its samples. For training it is packed as [prompt][sample 1]...[sample G] with the prompt as
the samples' parent: P + sum(n_i) tokens through the layers instead of G*P + sum(n_i).
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any

import torch
from torch import Tensor

from ...model.errors import InputError
from ...model.generate import Sample, generate
from ...model.packed import Packed, pack
from ...model.scalar import ScalarModel
from ...model.text.tokenizer import Tokenizer
from ...model.transformer import Transformer
from ...model.vocabulary import Vocabulary
from ..run.loop import autocast, report_counts
from ..run.processes import IDLE, gathered, most, parts, rank, sum_over_processes, unsharded, world
from ..run.trainee import ADAPTER_BOUNDS
from .examples import Prompt, rl_prompts
from .rewards import Rewards, Samples, judge, of_all_processes, takes, unjudged
from .rows import read_rows

RL_BOUNDS = {  # for check_flags: of the flags that PPO and GRPO share
    "steps": (1, inf),
    "prompts_per_step": (1, inf),
    "max_prompt_length": (1, inf),
    "max_new_tokens": (1, inf),
    "sampling_batch_size": (1, inf),
    "temperature": (1e-3, 1e3),
    "top_k": (1, inf),
    "top_p": (1e-9, 1),
    "kl_coefficient": (0, inf),
    "reward_timeout": (1e-3, 1e6),
    "micro_batch_tokens": (1, inf),
    "learning_rate": (0, inf),
    "warmup_steps": (0, inf),
    "weight_decay": (0, inf),
    "max_grad_norm": (1e-12, inf),
    "save_every": (0, inf),
    "seed": (0, 2**31 - 1),
    **ADAPTER_BOUNDS,
}


def load_prompts(cfg: Any, tokenizer: Tokenizer, rewards: Rewards) -> list[Prompt]:
    """The prompts of --data, after saying what became of its rows. rewards: who reads their other columns."""
    prompts, counts = rl_prompts(
        read_rows(cfg.data, cfg.row_template),
        tokenizer,
        max_length=cfg.max_prompt_length,
        prompt_column=cfg.prompt_column,
        takes=lambda column: any(takes(function, column) for function in rewards.functions.values()),
    )
    report_counts(cfg.data, counts)
    return prompts


@dataclass(frozen=True)
class Group:
    prompt: Prompt
    samples: list[Sample]
    rewards: Tensor  # (samples,) fp32, the weighted sum; NaN where no reward function judged
    parts: dict[str, Tensor] = field(default_factory=dict)  # each function's own, (samples,)
    extras: dict[str, list[Any]] = field(default_factory=dict)  # by log_extra, one a sample

    @property
    def varied(self) -> bool:
        """Do the rewards differ? Otherwise no sample has an advantage over another."""
        judged = self.rewards[~self.rewards.isnan()]
        return bool((judged != judged[:1]).any())


def sample_groups(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    rewards: Rewards,
    cfg: Any,
    seed: int,
    seconds: dict[str, float],
) -> list[Group]:
    """A group a prompt. Without reward functions, all rewards are 0. What functions log as metrics goes into `rewards`.

    Of several processes each samples and judges for a part of the prompts, as one would, and all are told.
    cfg: of its flags those of sampling are read: group_size, max_new_tokens, sampling_batch_size, temperature, top_k,
        top_p. seconds: sampling_seconds and scoring_seconds are added to.
    """
    with timed(seconds, "sampling_seconds", model.device):
        samples = own_samples(
            model,
            tokenizer,
            [prompt.tokens for prompt in prompts],
            samples_per_prompt=cfg.group_size,
            max_new_tokens=cfg.max_new_tokens,
            temperature=cfg.temperature,
            top_k=cfg.top_k,
            top_p=cfg.top_p,
            seed=seed,
            batch_size=cfg.sampling_batch_size,
        )
    asked = [prompts[sample.prompt_index] for sample in samples]
    judgement = unjudged(rewards, len(samples))
    if rewards.functions and samples:
        with timed(seconds, "scoring_seconds", "cpu"):
            judgement = judge(rewards, as_asked(tokenizer, asked, samples))
    with timed(seconds, "sampling_seconds", model.device):
        samples = samples_of_all(samples, tokenizer.vocabulary)
        judgement = of_all_processes(judgement)
    rewards.add(judgement.logged)
    of = [slice(i * cfg.group_size, (i + 1) * cfg.group_size) for i in range(len(prompts))]
    return [
        Group(
            prompt,
            samples[own],
            judgement.total[own],
            {name: part[own] for name, part in judgement.parts.items()},
            {column: values[own] for column, values in judgement.extras.items()},
        )
        for prompt, own in zip(prompts, of, strict=True)
    ]


def as_asked(tokenizer: Tokenizer, asked: Sequence[Prompt], samples: Sequence[Sample]) -> Samples:
    """What reward functions see of each sample and its prompt."""
    return Samples(
        [prompt.text for prompt in asked],
        [completion(tokenizer, *pair) for pair in zip(asked, samples, strict=True)],
        [sample.tokens for sample in samples],
        {name: [prompt.columns[name] for prompt in asked] for name in asked[0].columns},
    )


def completion_records(tokenizer: Tokenizer, groups: Sequence[Group]) -> list[dict[str, Any]]:
    """A record a sample where a reward function logged something of it by log_extra; otherwise none."""
    return [
        {
            "prompt": group.prompt.text,
            "completion": completion(tokenizer, group.prompt, sample),
            "reward": _or_none(group.rewards[i]),
            "rewards": {name: _or_none(part[i]) for name, part in group.parts.items()},
            "extra": {column: values[i] for column, values in group.extras.items()},
        }
        for group in groups
        if group.extras
        for i, sample in enumerate(group.samples)
    ]


def _or_none(reward: Tensor) -> float | None:
    return None if reward.isnan() else reward.item()


def own_samples(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    samples_per_prompt: int,
    **options: Any,
) -> list[Sample]:
    """The samples of this process's part of the prompts, by `generate`, whose options these are; of all with one.

    Sample i of all has the noise of sample i of one process. No id is drawn that the tokenizer has not.
    Raises InputError where probabilities are not finite.
    """
    first, end = (len(prompts) * place // world() for place in (rank(), rank() + 1))
    with autocast(model.device.type), unsharded(model):  # in the precision that scores
        samples = generate(
            model,
            prompts[first:end],
            samples_per_prompt=samples_per_prompt,
            vocabulary=tokenizer.vocabulary,
            stop_ids=tokenizer.stop_ids,
            first_sample=first * samples_per_prompt,
            **options,
        )
    if not all(sample.logprobs.isfinite().all() for sample in samples):
        raise InputError(
            "sampling: the model's probabilities are not finite: its weights hold NaN or have diverged"
        )
    return [replace(sample, prompt_index=first + sample.prompt_index) for sample in samples]


def samples_of_all(samples: list[Sample], vocabulary: Vocabulary) -> list[Sample]:
    """The samples of all processes, in the order of their prompts; all were drawn from the vocabulary."""
    if world() == 1:
        return samples
    said = {
        "prompts": torch.tensor([sample.prompt_index for sample in samples], dtype=torch.int64),
        "counts": torch.tensor([len(sample.tokens) for sample in samples], dtype=torch.int64),
        "ended": torch.tensor([sample.ended for sample in samples], dtype=torch.bool),
        "tokens": torch.tensor([token for sample in samples for token in sample.tokens], dtype=torch.int64),
        "logprobs": torch.cat([torch.empty(0), *(sample.logprobs for sample in samples)]),
    }
    supports = [sample.support for sample in samples if sample.support is not None]
    if supports:
        said["supports"] = _stack_supports(supports)
    found: list[Sample] = []
    for told in gathered(said):
        counts, indices, ended = (told[name].tolist() for name in ("counts", "prompts", "ended"))
        tokens, logprobs = told["tokens"].split(counts), told["logprobs"].split(counts)
        kept = told["supports"].split(counts) if "supports" in told else [None] * len(counts)
        found += [
            Sample(index, tokens[i].tolist(), logprobs[i], kept[i], ended[i], vocabulary)
            for i, index in enumerate(indices)
        ]
    return found


def sample_varied_groups(
    model: Transformer,
    tokenizer: Tokenizer,
    batches: Iterator[list[Prompt]],
    rewards: Rewards,
    cfg: Any,
    seed: int,
    seconds: dict[str, float],
) -> tuple[list[Group], list[Group], int]:
    """DAPO's dynamic sampling: draw batches of prompts until cfg.prompts_per_step groups have rewards that differ.

    At most cfg.max_draws batches; with one, nothing is left out. seed: of the first, the next ones have those after it.
    Returns the groups to train on, all groups, and how many batches were drawn. The first may be fewer than asked for.
    Source: https://arxiv.org/abs/2503.14476, section 3.2
    """
    groups: list[Group] = []
    varied: list[Group] = []
    draws = 0
    while draws < cfg.max_draws and len(varied) < cfg.prompts_per_step:
        drawn = sample_groups(model, tokenizer, next(batches), rewards, cfg, seed + draws, seconds)
        draws += 1
        groups += drawn
        varied += [group for group in drawn if group.varied]
    return groups if cfg.max_draws == 1 else varied[: cfg.prompts_per_step], groups, draws


def lengths_of(groups: Sequence[Group]) -> Tensor:
    """Sampled tokens of each sample, (samples,) int64."""
    counts = [len(sample.tokens) for group in groups for sample in group.samples]
    return torch.tensor(counts, dtype=torch.int64)


def ended(groups: Sequence[Group]) -> Tensor:
    """Which samples ended by one of the stop tokens, whichever, (samples,) bool."""
    return torch.tensor([sample.ended for group in groups for sample in group.samples], dtype=torch.bool)


def parts_of(groups: Sequence[Group]) -> dict[str, Tensor]:
    """Each reward function's own rewards, (samples,)."""
    return {name: torch.cat([group.parts[name] for group in groups]) for name in groups[0].parts}


def rollout_metrics(groups: Sequence[Group]) -> dict[str, float | Tensor]:
    """Means over the samples: reward, length, ended, and each reward function's own over those that it judged."""
    return {
        "reward": torch.cat([group.rewards for group in groups]).nanmean(),
        "length": lengths_of(groups).float().mean(),
        "ended": ended(groups).float().mean(),
        **{f"reward/{name}": part.nanmean() for name, part in parts_of(groups).items()},
    }


@contextmanager
def timed(seconds: dict[str, float], name: str, device: torch.device | str) -> Iterator[None]:
    """Add the time of the block to seconds[name], with what it started on a GPU."""
    started = _now(device)
    yield
    seconds[name] = seconds.get(name, 0.0) + _now(device) - started


def _now(device: torch.device | str) -> float:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def completion(tokenizer: Tokenizer, prompt: Prompt, sample: Sample) -> str | list[dict[str, str]]:
    """What a reward function sees: text, or one assistant message where the prompt is a conversation."""
    text = tokenizer.decode(sample.tokens)
    return text if isinstance(prompt.text, str) else [{"role": "assistant", "content": text}]


@dataclass(frozen=True)
class MicroBatch:
    """Whole or split groups, packed. tokens is the number of sampled tokens; every (tokens,) tensor follows `rows`."""

    packed: Packed
    rows: Tensor  # (tokens,) int64, into packed.tokens: the samples' tokens
    samples: Tensor  # (sequences,) int64, which of all samples these are
    lengths: Tensor  # (sequences,) int64, their tokens
    positions: Tensor  # (tokens,) int64, into the tokens of all samples in order
    sampled_logprob: Tensor  # (tokens,) fp32, the sampler's own
    support: Tensor | None  # (tokens, K_max) int32, the ids that the sampler kept
    vocabulary: Vocabulary | None  # the ids that it drew from

    def per_token(self, values: Tensor) -> Tensor:
        """A number a sample, (all samples,), as one a token, (tokens,)."""
        return values.to(self.rows.device)[self.samples].repeat_interleave(self.lengths)

    def score(self, policy: Any, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        """(logprob, lse, entropy), each (tokens,), under the distribution that was sampled."""
        drawn_from = {"support": self.support, "vocabulary": self.vocabulary}
        return policy.score(self.packed, self.rows, temperature=temperature, **drawn_from)

    def values(self, critic: ScalarModel) -> Tensor:
        """Of what stands before each token, (tokens,): the state in which it was chosen."""
        return critic.values(self.packed, self.packed.predictors[self.rows])

    def scores(self, reward_model: ScalarModel) -> Tensor:
        """Of what ends with each token, (tokens,)."""
        return reward_model.values(self.packed, self.rows)


def micro_batches(
    groups: Sequence[Group], needed: Tensor, capacity: int, device: torch.device | str
) -> list[MicroBatch]:
    """Pack groups into micro-batches of at most `capacity` tokens; a larger group is split, its prompt repeated.

    needed: (samples,) bool over all groups in order; samples that are not needed are left out.
    Of several processes each has a part of the groups, and as many micro-batches as the others, some without a token.
    """
    needed = needed & _share(groups, needed)
    batches: list[MicroBatch] = []
    sequences: list[list[int]] = []
    parents: list[int] = []
    chosen: list[tuple[int, Sample]] = []
    starts = lengths_of(groups).cumsum(0) - lengths_of(groups)  # (samples,)
    room = capacity

    def close() -> None:
        nonlocal sequences, parents, chosen, room
        if chosen:
            batches.append(_micro_batch(sequences, parents, chosen, starts, device))
        sequences, parents, chosen, room = [], [], [], capacity

    index = -1
    for group in groups:
        parent = -1
        for sample in group.samples:
            index += 1
            if not needed[index]:
                continue
            need = len(sample.tokens) + (len(group.prompt.tokens) if parent == -1 else 0)
            if need > room:
                close()
                parent, need = -1, len(sample.tokens) + len(group.prompt.tokens)
            if parent == -1:
                parent = len(sequences)
                sequences.append(group.prompt.tokens)
                parents.append(-1)
            sequences.append(sample.tokens)
            parents.append(parent)
            chosen.append((index, sample))
            room -= need
    close()
    idle = most(len(batches)) - len(batches)
    return batches + [_micro_batch(IDLE, [-1], [], starts, device) for _ in range(idle)]


def _share(groups: Sequence[Group], needed: Tensor) -> Tensor:
    """Which samples this process trains on, (samples,) bool: groups are whole, and the processes' tokens about even."""
    if world() == 1:
        return torch.ones_like(needed)
    trained = [of.tolist() for of in (lengths_of(groups) * needed).split([len(g.samples) for g in groups])]
    lengths = [
        len(group.prompt.tokens) * any(own) + sum(own) for group, own in zip(groups, trained, strict=True)
    ]
    mine = set(parts(lengths, world())[rank()])
    return torch.tensor(
        [i in mine for i, group in enumerate(groups) for _ in group.samples], dtype=torch.bool
    )


@torch.no_grad()
def over_tokens(
    micros: Sequence[MicroBatch], function: Callable[[MicroBatch], tuple[Tensor, ...]], real: Tensor
) -> tuple[Tensor, ...]:
    """What `function` returns, each (tokens,) of a micro-batch, laid out as `real`: (samples, length), fp32.

    real: which of its places are the samples' tokens. 0 at the others, and for samples in no micro-batch.
    Of several processes each has its own micro-batches, and all are told.
    """
    found: list[list[Tensor]] = []
    for micro in micros:
        with autocast(real.device.type):
            found.append([result.float() for result in function(micro)])
    positions = torch.cat([micro.positions for micro in micros])
    places = real.flatten().nonzero().squeeze(1)[positions]
    laid = [torch.zeros(real.shape, device=real.device) for _ in found[0]]
    for out, results in zip(laid, zip(*found, strict=True), strict=True):
        out.view(-1)[places] = torch.cat(results)
    return tuple(sum_over_processes(out) for out in laid)  # a token is in one process's micro-batches


def _micro_batch(
    sequences: list[list[int]],
    parents: list[int],
    chosen: list[tuple[int, Sample]],
    starts: Tensor,
    device: torch.device | str,
) -> MicroBatch:
    packed = pack(sequences, parents, device)
    segment = torch.tensor(parents).repeat_interleave(torch.tensor([len(s) for s in sequences]))  # (total,)
    supports = [sample.support for _, sample in chosen if sample.support is not None]
    vocabulary = chosen[0][1].vocabulary if chosen else None
    positions = [torch.arange(len(sample.tokens)) + starts[index] for index, sample in chosen]
    return MicroBatch(
        packed=packed,
        rows=(segment != -1).nonzero().squeeze(1).to(device),
        samples=torch.tensor([index for index, _ in chosen], dtype=torch.int64, device=device),
        lengths=torch.tensor([len(sample.tokens) for _, sample in chosen], dtype=torch.int64, device=device),
        positions=torch.cat([starts[:0], *positions]).to(device),
        sampled_logprob=torch.cat([torch.empty(0), *(sample.logprobs for _, sample in chosen)]).to(device),
        support=_stack_supports(supports).to(device) if supports else None,
        vocabulary=None if vocabulary is None else vocabulary.to(device),
    )


def _stack_supports(supports: list[Tensor]) -> Tensor:
    width = max(support.shape[1] for support in supports)
    return torch.cat([torch.nn.functional.pad(s, (0, width - s.shape[1]), value=-1) for s in supports])
