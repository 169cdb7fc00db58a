"""Groups for reinforcement learning: a prompt with its sampled completions and their rewards.

    sampler = Sampler(cfg, tokenizer, rewards, run)
    groups = sampler.sample(model, prompts, seed)          one group per prompt
    groups.rewards, groups.lengths, groups.ended           (samples,) each, over all groups in order

A group is packed as [prompt][sample 1]...[sample G], and the samples share the prompt (run/batch.py). With P prompt
tokens and n_i tokens in sample i, the layers process P + sum(n_i) tokens instead of G*P + sum(n_i).
"""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ...model.errors import InputError
from ...model.generate import Sample, SamplingParams, generate
from ...model.text.tokenizer import Tokenizer
from ...model.transformer import Transformer
from ...model.vocabulary import Vocabulary
from ..run.batch import Completion, stack_supports
from ..run.data_files import data_sources
from ..run.flags import RolloutFlags
from ..run.loop import Run
from ..run.optimizer import autocast
from ..run.processes import gathered, rank, unsharded, world
from .examples import Prompt, rl_prompts
from .functions import Samples
from .items import Items, load_items
from .rewards import Judgement, Rewards, judge, of_all_processes, unjudged
from .row import Row
from .rows import Tally


def load_prompts(cfg: RolloutFlags, tokenizer: Tokenizer, rewards: Rewards) -> Items[Prompt]:
    """Load the prompts of --data, and print how many rows were used and dropped.

    rewards: the reward functions, which read the other columns of the rows. Raises InputError if a reward function
    needs a column that an argument of --data lacks.
    """
    return prompts_with_columns(cfg, tokenizer, rewards.take, rewards.check)


def prompts_with_columns(
    cfg: Any,
    tokenizer: Tokenizer,
    takes: Callable[[str], bool],
    check: Callable[[Iterable[str]], None],
    limit: int | None = None,
) -> Items[Prompt]:
    """Load the prompts of --data. All have the same columns; a column that an argument of --data lacks is None.

    takes: takes(name) is whether a function reads the column `name`. check: a function of an argument's columns that
    raises InputError if one is missing. limit: use only this many rows from the start of each argument.
    """

    def convert(rows: list[Row]) -> tuple[list[Prompt], Tally]:
        options = {"max_length": cfg.max_prompt_length, "prompt_column": cfg.prompt_column}
        return rl_prompts(rows[:limit], tokenizer, takes=takes, **options)

    prompts = load_items(cfg, tokenizer, convert)
    columns = dict.fromkeys(name for prompt in prompts for name in prompt.columns)
    starts = accumulate((part.rows for part in prompts.parts), initial=0)
    for source, start in zip(data_sources(cfg.data), starts, strict=False):
        try:
            check(prompts[start].columns)
        except InputError as error:
            raise InputError(f"{source.name}: {error}" if len(prompts.parts) > 1 else str(error)) from error
    return Items(
        (replace(one, columns={name: one.columns.get(name) for name in columns}) for one in prompts),
        prompts.parts,
    )


@dataclass(frozen=True)
class Group:
    """A prompt of --data with its samples and rewards, as an `Item` of run/batch.py. All sampled tokens are trained."""

    row: Prompt
    samples: list[Sample]
    rewards: Tensor  # (samples,) fp32, the weighted sum; NaN if no reward function judged the sample
    parts: dict[str, Tensor] = field(default_factory=dict)  # the rewards of each function, (samples,)
    extras: dict[str, list[Any]] = field(default_factory=dict)  # columns from log_extra, one value per sample

    @property
    def prompt(self) -> list[int]:
        """The token ids of the prompt that the samples continue."""
        return self.row.tokens

    @property
    def completions(self) -> Sequence[Completion]:
        """The samples as `Completion` objects, ready to be packed for training."""
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
        """True if the rewards of the group differ. If not, no sample has an advantage over another."""
        judged = self.rewards[~self.rewards.isnan()]
        return bool((judged != judged[:1]).any())


class Groups(list[Group]):
    """The groups of one step, the same on every process. Its tensors follow the samples of all groups in order.

    rewards: (samples,) fp32, NaN if no reward function judged the sample. parts: the rewards of each function,
    (samples,). lengths: (samples,) int64, sampled tokens. ended: (samples,) bool, True if any stop token ended it.
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
        """The number of sampled tokens in all samples."""
        return int(self.lengths.sum())

    def metrics(self) -> dict[str, float | Tensor]:
        """Return means over the samples: reward, length, ended, and reward/<name> for each reward function.

        Samples that were not judged are left out of the mean rewards.
        """
        return {
            "reward": self.rewards.nanmean(),
            "length": self.lengths.float().mean(),
            "ended": self.ended.float().mean(),
            **{f"reward/{name}": part.nanmean() for name, part in self.parts.items()},
        }

    def records(self, tokenizer: Tokenizer, most: int, rewards: Tensor | None = None) -> list[dict[str, Any]]:
        """Return one JSON object per sample, a line of samples.jsonl, for at most `most` samples.

        They come from as many groups as possible: the first sample of each group, then the second of each. In addition
        there is every sample of a group for which a reward function called log_extra, with its columns as `extra`.
        rewards (samples,): each sample's reward, if it is not the sum of the reward functions.
        """
        order = [(member, place) for member, group in enumerate(self) for place in range(len(group.samples))]
        chosen = set(sorted(order, key=lambda each: each[::-1])[:most])
        totals = self.rewards if rewards is None else rewards.cpu()
        found: list[dict[str, Any]] = []
        for reward, (member, place) in zip(totals, order, strict=True):
            if self[member].extras or (member, place) in chosen:
                found.append(_record(tokenizer, self[member], place, reward))
        return found


def _record(tokenizer: Tokenizer, group: Group, i: int, reward: Tensor) -> dict[str, Any]:
    """Return the JSON object of the i-th sample of a group. reward: its total, a scalar."""
    sample, extra = group.samples[i], {column: values[i] for column, values in group.extras.items()}
    return {
        "prompt": group.row.text,
        "completion": _answer(tokenizer, group.row, sample),
        "reward": _or_none(reward),
        "rewards": {name: _or_none(part[i]) for name, part in group.parts.items()},
        "length": len(sample.tokens),
        "ended": sample.ended,
        **({"extra": extra} if extra else {}),
    }


def _or_none(reward: Tensor) -> float | None:
    return None if reward.isnan() else reward.item()


# ---- sampling and judging


class Sampler:
    """Sampling of groups and scoring by the reward functions, under the flags of a run.

    The time taken is added to the run's sampling_seconds and scoring_seconds, if a run is given. Each process samples
    and judges its part of the prompts, and then receives the groups of all processes. The samples equal those of a
    single process.
    """

    def __init__(self, cfg: RolloutFlags, tokenizer: Tokenizer, rewards: Rewards, run: Run | None = None):
        self._tokenizer, self._rewards = tokenizer, rewards
        self._timed = contextlib.nullcontext if run is None else run.timed
        self._prompts_per_step, self._batch_size = cfg.prompts_per_step, cfg.sampling_batch_size
        self._params = SamplingParams(
            max_new_tokens=cfg.max_new_tokens,
            samples_per_prompt=cfg.group_size,
            temperature=cfg.temperature,
            top_k=cfg.top_k,
            top_p=cfg.top_p,
        )

    def sample(self, model: Transformer, prompts: Sequence[Prompt], seed: int) -> Groups:
        """Sample and judge one group per prompt. Without reward functions all rewards are 0.

        Numbers that reward functions log are added to the `Rewards` object.
        """
        # 1. sample for this process's part of the prompts
        params, tokens = replace(self._params, seed=seed), [prompt.tokens for prompt in prompts]
        with self._timed("sampling_seconds"):
            samples = own_samples(model, self._tokenizer, tokens, params, batch_size=self._batch_size)

        # 2. judge the samples
        with self._timed("scoring_seconds"):
            judgement = self._judge(prompts, samples)

        # 3. gather the samples and rewards of all processes
        with self._timed("sampling_seconds"):
            samples = samples_of_all(samples, self._tokenizer.vocabulary)
            judgement = of_all_processes(judgement)
        self._rewards.add(judgement.logged)

        # 4. cut them into groups
        def group_of(prompt: Prompt, part: slice) -> Group:
            parts = {name: rewards[part] for name, rewards in judgement.parts.items()}
            extras = {column: values[part] for column, values in judgement.extras.items()}
            return Group(prompt, samples[part], judgement.total[part], parts, extras)

        size = params.samples_per_prompt
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
        """Sample batches of prompts until --prompts-per-step groups have rewards that differ (DAPO's dynamic sampling).

        draw: a function that returns the next batch of prompts. max_draws: the maximum number of batches to draw; with
        1, groups with equal rewards are kept too. seed: the seed of the first batch; each later batch adds 1.
        Returns (groups to train on, all groups, number of batches drawn). The groups to train on may be fewer than
        --prompts-per-step.
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
    """Return the samples and their prompts in the form that reward functions receive.

    asked: the prompt of each sample, in the order of the samples.
    """
    return Samples(
        [prompt.text for prompt in asked],
        [_answer(tokenizer, prompt, sample) for prompt, sample in zip(asked, samples, strict=True)],
        [sample.tokens for sample in samples],
        {name: [prompt.columns[name] for prompt in asked] for name in asked[0].columns},
    )


def _answer(tokenizer: Tokenizer, prompt: Prompt, sample: Sample) -> str | list[dict[str, str]]:
    """Return the sample as text, or as a list of one assistant message if the prompt is a conversation."""
    text = tokenizer.decode(sample.tokens)
    return text if isinstance(prompt.text, str) else [{"role": "assistant", "content": text}]


# ---- samples of one process and of all processes


def own_samples(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    **options: Any,
) -> list[Sample]:
    """Sample completions for this process's part of the prompts. options: keyword arguments of `generate`.

    The noise of a sample depends on its number among all samples, so any number of processes draws the same. Only
    ids that the tokenizer has are drawn. Raises InputError if the model's probabilities are not finite.
    """
    first, end = (len(prompts) * place // world() for place in (rank(), rank() + 1))
    with autocast(model.device.type), unsharded(model):  # in the same precision as scoring
        known = replace(params, vocabulary=tokenizer.vocabulary, stop_ids=tokenizer.stop_ids)
        first_sample = first * params.samples_per_prompt
        samples = generate(model, prompts[first:end], known, first_sample=first_sample, **options)

    if not all(sample.logprobs.isfinite().all() for sample in samples):
        raise InputError(
            "sampling: expected finite probabilities: the model's weights hold NaN, or training has diverged"
        )
    return [replace(sample, prompt_index=first + sample.prompt_index) for sample in samples]


def samples_of_all(samples: list[Sample], vocabulary: Vocabulary) -> list[Sample]:
    """Gather the samples of all processes, in the order of their prompts.

    vocabulary: the ids that the samples were drawn from.
    """
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
