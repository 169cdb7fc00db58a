"""Groups: a prompt and its samples, judged.

    sampler = Sampler(cfg, tokenizer, rewards, run)
    groups = sampler.sample(model, prompts, seed)          a group for each prompt
    groups.rewards, groups.lengths, groups.ended           (samples,) each, over all groups in order

A group is an item of run/batch.py, [prompt][sample 1]...[sample G] with the prompt as the samples' parent: P + sum(n_i)
tokens through the layers instead of G*P + sum(n_i).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ...model.errors import InputError
from ...model.generate import Sample, generate
from ...model.text.tokenizer import Tokenizer
from ...model.transformer import Transformer
from ...model.vocabulary import Vocabulary
from ..run.batch import Completion, stack_supports
from ..run.flags import RolloutFlags
from ..run.loop import Run
from ..run.optimizer import autocast
from ..run.processes import gathered, rank, unsharded, world
from .examples import Prompt, rl_prompts
from .functions import Samples
from .rewards import Judgement, Rewards, judge, of_all_processes, unjudged
from .rows import read_rows, report_counts


def load_prompts(cfg: RolloutFlags, tokenizer: Tokenizer, rewards: Rewards) -> list[Prompt]:
    """The prompts of --data, after saying what became of its rows. rewards: who reads their other columns.

    Raises InputError where a reward function needs a column that there is not.
    """
    prompts, counts = rl_prompts(
        read_rows(cfg.data, cfg.row_template),
        tokenizer,
        max_length=cfg.max_prompt_length,
        prompt_column=cfg.prompt_column,
        takes=rewards.take,
    )
    report_counts(cfg.data, counts)
    rewards.check(prompts[0].columns)
    return prompts


@dataclass(frozen=True)
class Group:
    """A prompt of --data and its samples, an item of run/batch.py: all tokens of the samples are trained."""

    row: Prompt
    samples: list[Sample]
    rewards: Tensor  # (samples,) fp32, the weighted sum; NaN where no reward function judged
    parts: dict[str, Tensor] = field(default_factory=dict)  # each function's own, (samples,)
    extras: dict[str, list[Any]] = field(default_factory=dict)  # by log_extra, one a sample

    @property
    def prompt(self) -> list[int]:
        """The ids that the samples continue."""
        return self.row.tokens

    @property
    def completions(self) -> Sequence[Completion]:
        """The samples as they are trained."""
        return self._completions

    @cached_property
    def _completions(self) -> list[Completion]:
        return [
            Completion(
                sample.tokens,
                [True] * len(sample.tokens),
                sampled_logprob=sample.logprobs,
                support=sample.support,
                vocabulary=sample.vocabulary,
            )
            for sample in self.samples
        ]

    @property
    def varied(self) -> bool:
        """Whether the rewards differ; otherwise no sample has an advantage over another."""
        judged = self.rewards[~self.rewards.isnan()]
        return bool((judged != judged[:1]).any())


class Groups(list[Group]):
    """The groups of a step, the same on every process. "samples" are those of all groups, in order.

    rewards: (samples,) fp32, NaN where no reward function judged. lengths: (samples,) int64, sampled tokens.
    ended: (samples,) bool, by one of the stop tokens, whichever. parts: each reward function's own, (samples,).
    """

    def __init__(self, groups: Iterable[Group]):
        super().__init__(groups)
        self.samples = [sample for group in self for sample in group.samples]
        self.rewards = torch.cat([torch.empty(0), *(group.rewards for group in self)])
        self.lengths = torch.tensor([len(sample.tokens) for sample in self.samples], dtype=torch.int64)
        self.ended = torch.tensor([sample.ended for sample in self.samples], dtype=torch.bool)
        names = self[0].parts if self else {}
        self.parts = {name: torch.cat([group.parts[name] for group in self]) for name in names}

    @property
    def num_tokens(self) -> int:
        """Sampled tokens of all samples."""
        return int(self.lengths.sum())

    def metrics(self) -> dict[str, float | Tensor]:
        """Means over the samples: reward, length, ended, and each function's own over those that it judged."""
        return {
            "reward": self.rewards.nanmean(),
            "length": self.lengths.float().mean(),
            "ended": self.ended.float().mean(),
            **{f"reward/{name}": part.nanmean() for name, part in self.parts.items()},
        }

    def records(self, tokenizer: Tokenizer) -> list[dict[str, Any]]:
        """A record a sample where a reward function logged something of it by log_extra; otherwise none."""
        return [
            {
                "prompt": group.row.text,
                "completion": _answer(tokenizer, group.row, sample),
                "reward": _or_none(group.rewards[i]),
                "rewards": {name: _or_none(part[i]) for name, part in group.parts.items()},
                "extra": {column: values[i] for column, values in group.extras.items()},
            }
            for group in self
            if group.extras
            for i, sample in enumerate(group.samples)
        ]


def _or_none(reward: Tensor) -> float | None:
    return None if reward.isnan() else reward.item()


# ---- sampling and judging


class Sampler:
    """Samples groups as the flags say and has them judged, in the run's sampling_seconds and scoring_seconds.

    Of several processes each samples and judges for a part of the prompts, as one would, and each has all groups.
    """

    def __init__(self, cfg: RolloutFlags, tokenizer: Tokenizer, rewards: Rewards, run: Run):
        self._tokenizer, self._rewards, self._run = tokenizer, rewards, run
        self._group_size, self._prompts_per_step = cfg.group_size, cfg.prompts_per_step
        self._options = {
            "max_new_tokens": cfg.max_new_tokens,
            "temperature": cfg.temperature,
            "top_k": cfg.top_k,
            "top_p": cfg.top_p,
            "batch_size": cfg.sampling_batch_size,
        }

    def sample(self, model: Transformer, prompts: Sequence[Prompt], seed: int) -> Groups:
        """A group a prompt. Without reward functions all rewards are 0. What functions log goes into the rewards'."""
        # 1. the samples of this process's prompts
        size = self._group_size
        with self._run.timed("sampling_seconds"):
            samples = own_samples(
                model,
                self._tokenizer,
                [prompt.tokens for prompt in prompts],
                samples_per_prompt=size,
                seed=seed,
                **self._options,
            )

        # 2. judged
        with self._run.timed("scoring_seconds"):
            judgement = self._judge(prompts, samples)

        # 3. those of all processes
        with self._run.timed("sampling_seconds"):
            samples = samples_of_all(samples, self._tokenizer.vocabulary)
            judgement = of_all_processes(judgement)
        self._rewards.add(judgement.logged)

        # 4. cut into groups
        def group_of(prompt: Prompt, part: slice) -> Group:
            parts = {name: rewards[part] for name, rewards in judgement.parts.items()}
            extras = {column: values[part] for column, values in judgement.extras.items()}
            return Group(prompt, samples[part], judgement.total[part], parts, extras)

        slices = (slice(i * size, (i + 1) * size) for i in range(len(prompts)))
        return Groups(map(group_of, prompts, slices))

    def _judge(self, prompts: Sequence[Prompt], samples: Sequence[Sample]) -> Judgement:
        if not (self._rewards.functions and samples):
            return unjudged(self._rewards, len(samples))
        asked = [prompts[sample.prompt_index] for sample in samples]
        return judge(self._rewards, as_asked(self._tokenizer, asked, samples))

    def sample_varied(
        self, model: Transformer, draw: Callable[[], list[Prompt]], seed: int, max_draws: int
    ) -> tuple[Groups, Groups, int]:
        """DAPO's dynamic sampling: batches of prompts until --prompts-per-step groups have rewards that differ.

        draw: the next batch. max_draws: how many at most; with one, nothing is left out. seed: of the first, the next
        ones have those after it. Returns the groups to train on, perhaps fewer than asked for, all groups, and how many
        batches were drawn.
        Source: https://arxiv.org/abs/2503.14476, section 3.2
        """
        drawn: list[Group] = []
        varied: list[Group] = []
        draws = 0
        while draws < max_draws and len(varied) < self._prompts_per_step:
            groups = self.sample(model, draw(), seed + draws)
            draws += 1
            drawn += groups
            varied += [group for group in groups if group.varied]
        trained = drawn if max_draws == 1 else varied[: self._prompts_per_step]
        return Groups(trained), Groups(drawn), draws


def as_asked(tokenizer: Tokenizer, asked: Sequence[Prompt], samples: Sequence[Sample]) -> Samples:
    """The samples and their prompts as reward functions see them."""
    return Samples(
        [prompt.text for prompt in asked],
        [_answer(tokenizer, prompt, sample) for prompt, sample in zip(asked, samples, strict=True)],
        [sample.tokens for sample in samples],
        {name: [prompt.columns[name] for prompt in asked] for name in asked[0].columns},
    )


def _answer(tokenizer: Tokenizer, prompt: Prompt, sample: Sample) -> str | list[dict[str, str]]:
    """The sample's text, or one assistant message where the prompt is a conversation."""
    text = tokenizer.decode(sample.tokens)
    return text if isinstance(prompt.text, str) else [{"role": "assistant", "content": text}]


# ---- samples of one process and of all


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
    sent = {
        "prompts": torch.tensor([sample.prompt_index for sample in samples], dtype=torch.int64),
        "counts": torch.tensor([len(sample.tokens) for sample in samples], dtype=torch.int64),
        "ended": torch.tensor([sample.ended for sample in samples], dtype=torch.bool),
        "tokens": torch.tensor([token for sample in samples for token in sample.tokens], dtype=torch.int64),
        "logprobs": torch.cat([torch.empty(0), *(sample.logprobs for sample in samples)]),
    }
    supports = [sample.support for sample in samples if sample.support is not None]
    if supports:
        sent["supports"] = stack_supports(supports)

    found: list[Sample] = []
    for tensors in gathered(sent):
        counts, indices, ended = (tensors[name].tolist() for name in ("counts", "prompts", "ended"))
        tokens, logprobs = tensors["tokens"].split(counts), tensors["logprobs"].split(counts)
        kept: Sequence[Tensor | None] = [None for _ in counts]
        if "supports" in tensors:
            kept = tensors["supports"].split(counts)
        found += [
            Sample(index, tokens[i].tolist(), logprobs[i], kept[i], ended[i], vocabulary)
            for i, index in enumerate(indices)
        ]
    return found
