"""Group relative policy optimization, and its family.

    loss = sum_t [policy_t + beta kl_t] / N_t        A = (r - mean of the group) / (std of the group + eps)

    --loss   policy_t                                            rho_t = pi(y_t) / pi_old(y_t)
    grpo     -min(rho_t A, clip(rho_t, 1 - lo, 1 + hi) A)        2402.03300, eq. 3; hi > lo: DAPO, 2503.14476
    gspo     the same with s = exp(mean_t log rho_t) for rho_t   2507.18071, eq. 5
    cispo    -sg(min(rho_t, 1 + hi)) A log pi(y_t)               2506.13585, eq. 4

The sum is over the sampled tokens, the end token included. A group is the samples of one prompt, and r is the reward of
a sample. lo and hi are --clip-low and --clip-high, and sg stops the gradient. The tables below name the function behind
each flag; objectives/ holds these functions with their formulas.

Departures from the paper, and additions:
    N_t     By default the sampled tokens of the whole optimizer step, as in DAPO. The paper averages within each
            sequence first (--aggregation sequence_mean). There a token of a long answer weighs less.
    kl_t    k3, as in the paper, but beta is 0 by default. As a loss, k3 has the fixed point of the
            forward KL, which is not DPO's. --kl-estimator k2 and rho_k3 have the gradient of the reverse KL.
    pi      Scored at the sampling temperature, over the ids that top-k or top-p kept. So the scored distribution is the
            sampled one. --mismatch-weights corrects the remaining difference.
    DAPO    --max-draws replaces groups whose rewards are all equal (dynamic sampling). --mask-truncated
            leaves out answers that did not end. --overlong-buffer lowers the reward of answers near the limit.

Source: Shao et al. 2024, https://arxiv.org/abs/2402.03300, eq. 3 and 4; the other papers are at arxiv.org/abs/NUMBER
Run:    burnish grpo --model DIR --data FILE.jsonl --reward FILE.py:function
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..model.adapter import frozen_copy
from ..model.errors import InputError
from ..model.text.tokenizer import Tokenizer
from ..model.transformer import Transformer
from .data.examples import Prompt
from .data.groups import Sampler, load_prompts
from .data.rewards import Rewards, load_rewards, overlong_punishment, weighted_rewards
from .data.tokenizer import load_tokenizer
from .objectives.advantages import batch_std_advantages, group_advantages, mean_advantages, rloo_advantages
from .objectives.denominators import constant_length, sequence_mean, token_mean
from .objectives.kl import k2_loss, k3_loss, rho_k3_loss
from .objectives.policy import cispo_loss, clipped_loss, gspo_loss, masked_weights, truncated_weights
from .run.batch import make_split_batches
from .run.checks import check_flags
from .run.claim import in_run_folder
from .run.command import run_command
from .run.flags import MOST_SAMPLES, Bounds, Count, Limit, RolloutFlags, Share, Size, run_folder
from .run.held_out import Evaluation, on_held_out
from .run.ids import check_model
from .run.learner import Learner
from .run.loop import Run
from .run.order import with_steps
from .run.trainee import load_trainee
from .search.figures import sampled


@dataclass(frozen=True, kw_only=True)
class Config(RolloutFlags):
    model: Path  # model to start from, a Hugging Face or adapter folder; also the reference policy of the KL
    reward: tuple[str, ...] = field()  # reward functions, each FILE.py:function or package.module:function
    output: Path = run_folder("grpo")
    prompts_per_step: int = 16
    group_size: Annotated[int, Bounds(2, MOST_SAMPLES)] = 8
    max_draws: Count = 1  # maximum batches sampled per step to replace groups of equal rewards; 1 keeps them
    mask_truncated: bool = False  # truncated samples count in no loss, denominator or group mean
    overlong_buffer: Size = 0  # over this many tokens before --max-new-tokens, the reward falls linearly by 1
    updates_per_rollout: Count = 1  # optimizer steps on each rollout; in the first, rho = pi / pi_old is 1
    advantage: Literal["group", "mean", "batch_std", "rloo"] = "group"  # how rewards become advantages
    aggregation: Literal["token_mean", "sequence_mean", "constant_length"] = (
        "token_mean"  # average the loss over all tokens, within each sequence first, or by a constant length
    )
    loss: Literal["grpo", "gspo", "cispo"] = "grpo"  # policy loss; the formulas are in algorithms/grpo.py
    clip_low: Share | None = (
        None  # no gradient where advantage < 0 and pi / pi_old < 1 - clip_low (default: 0.2, gspo 3e-4)
    )
    clip_high: Limit | None = (
        None  # clip pi / pi_old at 1 + clip_high; DAPO's is 0.28 (default: 0.2, gspo 4e-4, cispo 4)
    )
    kl_coefficient: float = 0.0
    kl_estimator: Literal["k3", "k2", "rho_k3"] = (
        "k3"  # estimator of the KL divergence from the initial model
    )
    mismatch_weights: Literal["none", "truncated", "masked"] = (
        "none"  # multiply advantages by pi_old / pi_sampler, to correct for the sampler's numerical error
    )
    mismatch_cap: Limit = 2.0  # larger mismatch weights are reduced to this (truncated) or set to 0 (masked)


# ---- objectives, by the flag that selects one


class Terms(NamedTuple):
    """Inputs of the losses for one micro-batch: (tokens,) fp32 each, except lengths, (samples,) int64."""

    logprob: Tensor  # with gradient
    old_logprob: Tensor
    sampled_logprob: Tensor
    ref_logprob: Tensor | None  # None without --kl-coefficient
    advantage: Tensor
    denominator: Tensor
    lengths: Tensor


Loss = Callable[..., tuple[Tensor, dict[str, Tensor]]]  # returns a scalar, and means over the tokens

LOSSES: dict[str, Loss] = {
    "grpo": lambda t, **clips: clipped_loss(t.logprob, t.old_logprob, t.advantage, t.denominator, **clips),
    "gspo": lambda t, **clips: gspo_loss(
        t.logprob, t.old_logprob, t.advantage, t.lengths, t.denominator, **clips
    ),
    "cispo": lambda t, **clips: cispo_loss(t.logprob, t.old_logprob, t.advantage, t.denominator, **clips),
}
KL: dict[str, Loss] = {
    "k3": lambda t: k3_loss(t.logprob, t.ref_logprob, t.denominator),
    "k2": lambda t: k2_loss(t.logprob, t.ref_logprob, t.denominator),
    "rho_k3": lambda t: rho_k3_loss(t.logprob, t.old_logprob, t.ref_logprob, t.denominator),
}
ADVANTAGES = {  # rewards (prompts, group) -> (prompts, group)
    "group": group_advantages,
    "mean": mean_advantages,
    "batch_std": batch_std_advantages,
    "rloo": rloo_advantages,
}
DENOMINATORS: dict[str, Callable[[Tensor, int], Tensor]] = {  # lengths (samples,), maximum -> (samples,)
    "token_mean": lambda lengths, _: token_mean(lengths),
    "sequence_mean": lambda lengths, _: sequence_mean(lengths),
    "constant_length": constant_length,
}
MISMATCH_WEIGHTS = {"truncated": truncated_weights, "masked": masked_weights}


def objective(cfg: Config, terms: Terms) -> tuple[Tensor, dict[str, Tensor]]:
    """Return (loss, means) of a micro-batch: sum_t [policy_t + beta kl_t] / N_t, and metrics averaged over tokens."""
    means = {"mismatch": (terms.old_logprob - terms.sampled_logprob).abs().mean()}
    if cfg.mismatch_weights != "none":
        weigh = MISMATCH_WEIGHTS[cfg.mismatch_weights]
        weight = weigh(terms.old_logprob, terms.sampled_logprob, cfg.mismatch_cap)  # (tokens,)
        terms = terms._replace(advantage=terms.advantage * weight)
        means["weight"] = weight.mean()

    set_clips = {"clip_low": cfg.clip_low, "clip_high": cfg.clip_high}  # each loss has its own defaults
    clips = {name: clip for name, clip in set_clips.items() if clip is not None}
    loss, policy_means = LOSSES[cfg.loss](terms, **clips)
    means |= policy_means
    if cfg.kl_coefficient:
        kl_loss, kl_means = KL[cfg.kl_estimator](terms)
        loss, means = loss + cfg.kl_coefficient * kl_loss, means | kl_means
    return loss, means


@in_run_folder
def train(cfg: Config) -> Path:
    """Train by GRPO, and return the folder of the trained model."""
    check_flags(cfg, overlong_buffer=(0, cfg.max_new_tokens))
    if cfg.loss == "cispo" and cfg.clip_low is not None:
        raise InputError("--clip-low: --loss cispo has no lower bound: leave the flag out")
    rewards = _load_rewards(cfg)
    tokenizer = load_tokenizer(cfg)
    prompts = load_prompts(cfg, tokenizer, rewards)
    held_out = load_prompts(on_held_out(cfg), tokenizer, rewards) if cfg.eval_data else []
    cfg = with_steps(cfg, prompts.parts)
    model = load_trainee(cfg)
    check_model(
        model, tokenizer, [*prompts, *held_out], max(len(p.tokens) for p in prompts) + cfg.max_new_tokens
    )
    reference: Any = frozen_copy(model) if cfg.kl_coefficient else None

    learner, evaluation = Learner(cfg, model), _evaluation(cfg, model, tokenizer, rewards, held_out)
    with Run(
        cfg, tokenizer, rows=prompts.parts, frozen=[reference], evaluation=evaluation, model=learner
    ) as run:
        run.values = {"draws": run.start} | (run.values if run.start else {"varied": 0})
        sampler = Sampler(cfg, tokenizer, rewards, run)
        draw = lambda: [prompts[i] for i in run.next()]
        for step in run.steps():
            # 1. a judged group of samples for each prompt; with --max-draws only groups whose rewards differ
            rewards.begin(cfg, step, run.values["draws"], run.rows_per_epoch)
            seed = (cfg.seed << 32) + run.values["draws"]
            groups, drawn, draws = sampler.sample_varied(model, draw, seed, cfg.max_draws)
            run.values["draws"] += draws

            # 2. advantages within the groups; samples left out or not judged count in no mean or denominator
            left_out = ~groups.ended if cfg.mask_truncated else torch.zeros_like(groups.ended)
            reward = groups.rewards.masked_fill(left_out, torch.nan).view(-1, cfg.group_size)
            advantage = ADVANTAGES[cfg.advantage](reward).flatten()  # (prompts, group) -> (samples,)
            counts = ~reward.isnan().flatten()  # (samples,)
            denominator = torch.ones_like(advantage)
            denominator[counts] = DENOMINATORS[cfg.aggregation](groups.lengths[counts], cfg.max_new_tokens)
            rewards.count(run.values, drawn.parts, reward)

            # 3. packed: each prompt once, then its samples; without a KL term only samples with a gradient
            needed = counts if reference is not None else counts & (advantage != 0)
            batches = make_split_batches(groups, needed, cfg.micro_batch_tokens, cfg.device)
            with run.timed("scoring_seconds"):
                ref_logprobs = [] if reference is None else batches.logprobs(reference, cfg.temperature)

            # 4. one step for each update; at the first, the model is still the one that sampled
            old_logprobs: list[Tensor] = []
            metrics: dict[str, float] = {}
            with run.timed("update_seconds"):
                for update in range(cfg.updates_per_rollout if batches else 0):
                    for i, batch in enumerate(batches):
                        logprob, entropy = batch.score(model, cfg.temperature)  # (tokens,)
                        if update == 0:
                            old_logprobs.append(logprob.detach())
                        ref_logprob = None if reference is None else ref_logprobs[i]
                        A, N = batch.per_token(advantage), batch.per_token(denominator)
                        terms = Terms(
                            logprob, old_logprobs[i], batch.sampled_logprob, ref_logprob, A, N, batch.lengths
                        )

                        loss, means = objective(cfg, terms)
                        means["entropy"] = entropy.detach().mean()
                        learner.backward(loss, batch.share, means=means)
                    metrics = learner.step(step)

            # 5. the step's metrics
            metrics |= {
                "flat_groups": sum(not group.varied for group in drawn) / len(drawn),
                "draws": draws,
                "groups": len(groups),
                "learning_rate": learner.learning_rate(step),
            }
            metrics |= learner.balance.metrics() | run.seconds
            run.log({**drawn.metrics(), **rewards.metrics(), **metrics}, drawn.num_tokens)
            run.log_samples(drawn.records(tokenizer, cfg.samples))
        trained = run.save()

    among = " among samples that ended" * cfg.mask_truncated
    rewards.report(run.values, in_groups=True, among=among)
    return trained


def _evaluation(
    cfg: Config, model: Transformer, tokenizer: Tokenizer, rewards: Rewards, held_out: list[Prompt]
) -> Evaluation | None:
    """Return the evaluation: rewards, length and ended of one sample of each held-out prompt."""
    measure = lambda: sampled(cfg, model, tokenizer, rewards, held_out)[1]
    return Evaluation("prompts", len(held_out), measure) if held_out else None


def _load_rewards(cfg: Config) -> Rewards:
    """Load the functions of --reward. With --overlong-buffer, add a function that punishes long answers."""
    rewards = weighted_rewards(cfg, load_rewards(cfg.reward))
    if cfg.overlong_buffer:  # no Python function has a hyphen in its name
        punishment = overlong_punishment(cfg.max_new_tokens, cfg.overlong_buffer)
        rewards.functions["overlong-punishment"], rewards.weights = punishment, (*rewards.weights, 1.0)
    return rewards


if __name__ == "__main__":
    sys.exit(run_command("grpo", sys.modules[__name__], train, sys.argv[1:]))
