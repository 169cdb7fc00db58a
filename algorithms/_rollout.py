"""Sample groups of completions, have them judged, and lay them out for training.

A group is one prompt and its samples. For training it is packed as [prompt][sample 1]...[sample G] with the prompt as
the samples' parent: P + sum(n_i) tokens through the layers instead of G*P + sum(n_i).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model.errors import InputError
from ..model.generate import Sample, generate
from ..model.packed import Packed, pack
from ..model.tokenizer import Tokenizer
from ..model.transformer import Transformer
from ._data import Prompt
from ._loop import autocast
from ._rewards import RewardFunction, judge


@dataclass(frozen=True)
class Group:
    prompt: Prompt
    samples: list[Sample]
    rewards: Tensor  # (samples,) fp32; NaN where no reward function judged


def sample_groups(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    rewards: dict[str, RewardFunction],
    reward_weights: Sequence[float],
    *,
    group_size: int,
    max_new_tokens: int,
    batch_size: int | None,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
) -> tuple[list[Group], dict[str, float]]:
    """Returns a group a prompt, and the mean of each reward function over the samples that it judged."""
    with autocast(model.device.type):  # in the precision that scores
        samples = generate(
            model,
            [prompt.tokens for prompt in prompts],
            samples_per_prompt=group_size,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            stop_ids=tokenizer.stop_ids,
            seed=seed,
            batch_size=batch_size,
        )
    if not all(sample.logprobs.isfinite().all() for sample in samples):
        raise InputError(
            "sampling: the model's probabilities are not finite: its weights hold NaN or have diverged"
        )
    asked = [prompts[sample.prompt_index] for sample in samples]
    total, parts = judge(
        rewards,
        reward_weights,
        [prompt.text for prompt in asked],
        [completion(tokenizer, prompt, sample) for prompt, sample in zip(asked, samples, strict=True)],
        [sample.tokens for sample in samples],
        {name: [prompt.columns[name] for prompt in asked] for name in prompts[0].columns},
    )
    groups = [
        Group(
            prompt,
            samples[i * group_size : (i + 1) * group_size],
            total[i * group_size : (i + 1) * group_size],
        )
        for i, prompt in enumerate(prompts)
    ]
    return groups, {f"reward/{name}": part.nanmean().item() for name, part in parts.items()}


def completion(tokenizer: Tokenizer, prompt: Prompt, sample: Sample) -> str | list[dict[str, str]]:
    """What a reward function sees: text, or one assistant message where the prompt is a conversation."""
    text = tokenizer.decode(sample.tokens)
    return text if isinstance(prompt.text, str) else [{"role": "assistant", "content": text}]


@dataclass(frozen=True)
class MicroBatch:
    """Whole or split groups, packed. tokens is the number of sampled tokens; every (tokens,) tensor follows `rows`."""

    packed: Packed
    rows: Tensor  # (tokens,) int64, into packed.tokens: the samples' tokens
    advantage: Tensor  # (tokens,) fp32, each sample's repeated for its tokens
    denominator: Tensor  # (tokens,) fp32
    sampled_logprob: Tensor  # (tokens,) fp32, the sampler's own
    support: Tensor | None  # (tokens, K_max) int32, the ids that the sampler kept


def micro_batches(
    groups: Sequence[Group],
    needed: Tensor,
    advantages: Tensor,
    denominators: Tensor,
    capacity: int,
    device: str,
) -> list[MicroBatch]:
    """Pack groups into micro-batches of at most `capacity` tokens; a larger group is split, its prompt repeated.

    needed, advantages, denominators: (samples,) over all groups in order; samples that are not needed are left out.
    """
    batches: list[MicroBatch] = []
    sequences: list[list[int]] = []
    parents: list[int] = []
    chosen: list[tuple[int, Sample]] = []
    room = capacity

    def close() -> None:
        nonlocal sequences, parents, chosen, room
        if chosen:
            batches.append(_micro_batch(sequences, parents, chosen, advantages, denominators, device))
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
    return batches


def _micro_batch(
    sequences: list[list[int]],
    parents: list[int],
    chosen: list[tuple[int, Sample]],
    advantages: Tensor,
    denominators: Tensor,
    device: str,
) -> MicroBatch:
    packed = pack(sequences, parents, device)
    segment = torch.tensor(parents).repeat_interleave(torch.tensor([len(s) for s in sequences]))  # (total,)
    indices = torch.tensor([index for index, _ in chosen])
    lengths = torch.tensor([len(sample.tokens) for _, sample in chosen])
    supports = [sample.support for _, sample in chosen if sample.support is not None]
    return MicroBatch(
        packed=packed,
        rows=(segment != -1).nonzero().squeeze(1).to(device),
        advantage=advantages[indices].repeat_interleave(lengths).to(device),
        denominator=denominators[indices].repeat_interleave(lengths).to(device),
        sampled_logprob=torch.cat([sample.logprobs for _, sample in chosen]).to(device),
        support=_stack_supports(supports).to(device) if supports else None,
    )


def _stack_supports(supports: list[Tensor]) -> Tensor:
    width = max(support.shape[1] for support in supports)
    return torch.cat([torch.nn.functional.pad(s, (0, width - s.shape[1]), value=-1) for s in supports])
