"""Group relative policy optimization, and its family.

    loss = sum_t [policy_t + beta kl_t] / N_t        A = (r - mean of the group) / (std of the group + eps)

    --loss   policy_t                                            rho_t = pi(y_t) / pi_old(y_t)
    grpo     -min(rho_t A, clip(rho_t, 1 - lo, 1 + hi) A)        2402.03300, eq. 3; hi > lo: DAPO, 2503.14476
    gspo     the same with s = exp(mean_t log rho_t) for rho_t   2507.18071, eq. 5
    cispo    -sg(min(rho_t, 1 + hi)) A log pi(y_t)               2506.13585, eq. 4

over sampled tokens, the end token included; `objectives/policy.py` has these losses and the KL estimators. N_t is the
denominator: by default the sampled tokens of the whole optimizer step (DAPO), not the paper's mean of sequence means,
under which a token of a long answer weighs less; --aggregation and --advantage choose others. kl_t is k3 by default, as
in the paper; its fixed point is that of the forward KL, not DPO's; k2 and rho_k3 have the reverse KL's gradient.
Scoring uses the sampling temperature, and the ids that top-k or top-p kept, so the scored distribution is the sampled
one; --mismatch-weights corrects what still differs. With --max-draws, groups whose rewards are all equal are replaced
(DAPO's dynamic sampling); --mask-truncated and --overlong-buffer are its two ways with answers that do not end.

Metrics: reward (mean over all samples drawn), reward/<function>, metric/<name> (log_metric's), length (tokens), ended
(share that ended by a stop token), flat_groups (share whose rewards are all equal: they teach nothing), draws (batches
of prompts), groups (trained on), entropy (nats), ratio, clip_fraction, kl, mismatch (mean of |sampler's - trainer's
log-probability|), weight (mean of --mismatch-weights), loss, grad_norm (before clipping), learning_rate,
sampling_seconds, scoring_seconds (reward functions, reference), update_seconds. entropy to weight are over the tokens
that the update saw: without a KL term, samples whose advantage is 0 have no gradient and are not scored.

Source: Shao et al. 2024, https://arxiv.org/abs/2402.03300, eq. 3 and 4; the other papers are at arxiv.org/abs/NUMBER
Run:    burnish grpo --model DIR --data FILE.jsonl --reward FILE.py:function
"""

import sys
import time
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..model.adapter import frozen_copy
from ..model.errors import InputError
from .data.groups import (
    RL_BOUNDS,
    completion_records,
    ended,
    lengths_of,
    load_prompts,
    micro_batches,
    parts_of,
    rollout_metrics,
    sample_varied_groups,
    timed,
)
from .data.rewards import load_rewards, overlong_punishment, weighted_rewards
from .objectives.advantages import batch_std_advantages, group_advantages, mean_advantages, rloo_advantages
from .objectives.denominators import constant_length, sequence_mean, token_mean
from .objectives.policy import (
    cispo_loss,
    clipped_loss,
    gspo_loss,
    k2_loss,
    k3_loss,
    masked_weights,
    rho_k3_loss,
    truncated_weights,
)
from .run.balance import Balance
from .run.command import run_command
from .run.flags import TrainingFlags, load_tokenizer
from .run.loop import (
    MOST_SAMPLES,
    Run,
    SaveDtype,
    Schedule,
    autocast,
    check_flags,
    check_model,
    default_device,
    epochs,
    make_optimizer,
    new_run_folder,
    optimizer_step,
    scheduled,
)
from .run.processes import reshard, shard, summed
from .run.trainee import load_trainee


@dataclass(frozen=True)
class Config(TrainingFlags):
    model: Path  # Hugging Face folder, or an adapter's, to start from; the reference policy, too, where there is one
    data: Path  # prompts, with any further columns for the reward functions: .jsonl, .json or .parquet
    reward: tuple[str, ...]  # FILE.py:function or package.module:function, one or more
    reward_weights: tuple[float, ...] = ()  # one a reward function; all 1 where none are given
    reward_timeout: float | None = (
        None  # seconds that a call of the reward functions has; no limit by default
    )
    output: Path = field(default_factory=lambda: new_run_folder("grpo"))  # new folder: metrics, model
    steps: int = 200  # rollouts
    prompts_per_step: int = 16  # prompts in one rollout
    group_size: int = 8  # samples of one prompt
    prompt_column: str | None = None  # the column that holds the prompt, where its name does not say so
    max_prompt_length: int = 1024  # tokens; longer prompts are dropped and counted
    max_new_tokens: int = 256  # cap on a completion's length
    sampling_batch_size: int | None = None  # samples at a time, which bounds the cache; all by default
    temperature: float = 1.0  # of sampling, and of scoring
    top_k: int | None = None  # sample among the k most likely ids only
    top_p: float | None = None  # sample among the fewest ids with this much probability, at most 1,024
    max_draws: int = 1  # batches of prompts in search of groups whose rewards differ; 1 takes what comes
    mask_truncated: bool = False  # samples that did not end leave numerator, denominator and the group's mean
    overlong_buffer: int = 0  # the reward falls by up to 1 over this many tokens below max_new_tokens
    updates_per_rollout: int = 1  # optimizer steps on each rollout; from the second on, rho differs from 1
    advantage: Literal["group", "mean", "batch_std", "rloo"] = "group"  # baseline and scale of rewards
    aggregation: Literal["token_mean", "sequence_mean", "constant_length"] = "token_mean"  # what weighs alike
    loss: Literal["grpo", "gspo", "cispo"] = "grpo"
    clip_low: float | None = None  # rho below 1 - clip_low has no gradient where A < 0; 0.2, gspo 3e-4
    clip_high: float | None = (
        None  # rho above 1 + clip_high has none where A > 0; 0.2, gspo 4e-4, cispo 4; DAPO: 0.28
    )
    kl_coefficient: float = 0.0  # beta, of the KL to the model that training started from
    kl_estimator: Literal["k3", "k2", "rho_k3"] = "k3"  # of that KL
    mismatch_weights: Literal["none", "truncated", "masked"] = (
        "none"  # pi_old / pi_sampler on each token's advantage
    )
    mismatch_cap: float = 2.0  # where such a weight is cut off, or its token left out
    micro_batch_tokens: int = 16384  # tokens in one forward and backward; gradients add up over micro-batches
    learning_rate: float = 1e-6  # AdamW's, at its peak
    schedule: Schedule = "constant"
    warmup_steps: int = 0  # of linear rise to learning_rate
    weight_decay: float = 0.0  # of matrices; vectors have none
    max_grad_norm: float = 1.0  # gradients are scaled down to it
    lora_rank: int = 0  # train an adapter of this rank in place of the weights; 0 trains the weights
    lora_alpha: float | None = None  # the adapter's scale is alpha / rank; 2 * rank by default
    base_4bit: bool = False  # hold the frozen weights in 4 bits (NF4): QLoRA
    save_every: int = 0  # steps between checkpoints; 0 saves the model once, at the end
    save_dtype: SaveDtype = "auto"  # of what is written; auto: that of --model, tensor by tensor
    resume: bool = False  # go on from the last checkpoint in --output
    checkpoint_activations: bool = False  # run each layer again in the backward: less memory, more time
    seed: int = 0  # of the order of rows, and of sampling
    device: str = field(default_factory=default_device)


ADVANTAGES = {
    "group": group_advantages,
    "mean": mean_advantages,
    "batch_std": batch_std_advantages,
    "rloo": rloo_advantages,
}
MISMATCH_WEIGHTS = {"truncated": truncated_weights, "masked": masked_weights}


def train(cfg: Config) -> Path:
    """Returns the folder of the trained model."""
    check_flags(
        cfg,
        **RL_BOUNDS,
        group_size=(2, MOST_SAMPLES),
        max_draws=(1, inf),
        overlong_buffer=(0, cfg.max_new_tokens),
        updates_per_rollout=(1, inf),
        clip_low=(0, 1),
        clip_high=(0, inf),
        mismatch_cap=(0, inf),
    )
    if cfg.loss == "cispo" and cfg.clip_low is not None:
        raise InputError("--clip-low: --loss cispo has no lower bound: leave the flag out")
    rewards = weighted_rewards(cfg, load_rewards(cfg.reward))
    if cfg.overlong_buffer:  # no function of Python's has a hyphen in its name
        punishment = overlong_punishment(cfg.max_new_tokens, cfg.overlong_buffer)
        rewards.functions["overlong-punishment"], rewards.weights = punishment, (*rewards.weights, 1.0)
    tokenizer = load_tokenizer(cfg)
    prompts = load_prompts(cfg, tokenizer, rewards)
    rewards.check(prompts[0].columns)
    model = load_trainee(cfg)
    longest = max(len(prompt.tokens) for prompt in prompts) + cfg.max_new_tokens
    check_model(model, tokenizer, prompts, longest)
    balance = Balance(cfg, model)
    reference = frozen_copy(model) if cfg.kl_coefficient else None
    shard(model, reference)
    optimizer = make_optimizer(model, cfg.learning_rate, cfg.weight_decay)
    with Run(cfg, model=model, optimizer=optimizer) as run:
        run.values = {"draws": run.start} | (run.values if run.start else {"varied": 0})
        order = epochs(len(prompts), cfg.prompts_per_step, cfg.seed, skip=run.values["draws"])
        batches = ([prompts[i] for i in batch] for batch in order)
        for step in run.steps():
            started = time.perf_counter()
            seconds = {"sampling_seconds": 0.0, "scoring_seconds": 0.0}
            seed = (cfg.seed << 32) + run.values["draws"]
            rewards.begin(cfg, step, run.values["draws"], len(prompts))
            groups, drawn, draws = sample_varied_groups(
                model, tokenizer, batches, rewards, cfg, seed, seconds
            )
            run.values["draws"] += draws
            reward = torch.cat([torch.empty(0), *(group.rewards for group in groups)])  # (samples,)
            if cfg.mask_truncated:
                reward = reward.masked_fill(~ended(groups), torch.nan)
            counted = ~reward.isnan()  # the others, not judged, leave numerator and denominator
            advantage = ADVANTAGES[cfg.advantage](reward.view(-1, cfg.group_size)).flatten()  # (samples,)
            rewards.count(run.values, parts_of(drawn), reward.view(-1, cfg.group_size))
            denominator = torch.ones_like(advantage)
            denominator[counted] = _denominators(cfg, lengths_of(groups)[counted])
            needed = counted if reference is not None else counted & (advantage != 0)
            micros = micro_batches(groups, needed, cfg.micro_batch_tokens, cfg.device)
            ref_logprobs: list[Tensor] = []
            if reference is not None:
                with timed(seconds, "scoring_seconds", cfg.device), torch.no_grad(), autocast(cfg.device):
                    ref_logprobs = [micro.score(reference, cfg.temperature)[0] for micro in micros]
                    reshard(reference)

            sums: dict[str, float] = {}
            old_logprobs: list[Tensor] = []
            rate = scheduled(cfg.learning_rate, step, cfg.steps, cfg.warmup_steps, cfg.schedule)
            num_tokens = int(lengths_of(groups)[needed].sum())
            for update in range(cfg.updates_per_rollout if micros else 0):
                total_loss = 0.0
                for i, micro in enumerate(micros):
                    with autocast(cfg.device):
                        logprob, _, entropy = micro.score(model, cfg.temperature)
                    if update == 0:  # the model is still the one that sampled
                        old_logprobs.append(logprob.detach())
                    old_logprob, num = old_logprobs[i], micro.per_token(denominator)
                    weighted, weights = micro.per_token(advantage), None
                    if cfg.mismatch_weights != "none":
                        weigh = MISMATCH_WEIGHTS[cfg.mismatch_weights]
                        weights = weigh(old_logprob, micro.sampled_logprob, cfg.mismatch_cap)
                        weighted = weighted * weights
                    loss, metrics = _policy_term(cfg, logprob, old_logprob, weighted, micro.lengths, num)
                    if ref_logprobs:
                        kl_loss, kl = _kl_term(cfg, logprob, old_logprob, ref_logprobs[i], num)
                        loss, metrics = loss + cfg.kl_coefficient * kl_loss, metrics | kl
                    share = micro.rows.numel() / num_tokens
                    (loss + balance.loss(share)).backward()  # of experts, where the model has some
                    total_loss += loss.item()
                    metrics["entropy"] = entropy.detach().mean()
                    if update == 0:
                        metrics["mismatch"] = (old_logprob - micro.sampled_logprob).abs().mean()
                    if weights is not None:
                        metrics["weight"] = weights.mean()
                    for name, value in metrics.items():  # means over the last update's tokens
                        part = value.item() * share if share else 0.0
                        sums[name] = part if i == 0 else sums[name] + part
                sums = summed({**sums, "loss": total_loss})
                sums["grad_norm"] = optimizer_step(model, optimizer, sums["loss"], rate, cfg.max_grad_norm)
            run.log(
                {
                    **rollout_metrics(drawn),
                    **rewards.metrics(),
                    **sums,
                    **balance.metrics(),
                    "flat_groups": sum(not group.varied for group in drawn) / len(drawn),
                    "draws": draws,
                    "groups": len(groups),
                    "learning_rate": rate,
                    **seconds,
                    "update_seconds": time.perf_counter() - started - sum(seconds.values()),
                },
                tokens=int(lengths_of(drawn).sum()),
            )
            run.log_completions(completion_records(tokenizer, drawn))
            run.save_step(model, tokenizer)
        trained = run.save(model, tokenizer)
    among = " among samples that ended" * cfg.mask_truncated
    rewards.say_what_taught_nothing(run.values, in_groups=True, among=among)
    return trained


def _policy_term(
    cfg: Config, logprob: Tensor, old_logprob: Tensor, advantage: Tensor, lengths: Tensor, denominator: Tensor
):
    given = {"clip_low": cfg.clip_low, "clip_high": cfg.clip_high}  # each loss has its own where not set
    clips = {name: value for name, value in given.items() if value is not None}
    if cfg.loss == "gspo":
        return gspo_loss(logprob, old_logprob, advantage, lengths, denominator, **clips)
    loss = {"grpo": clipped_loss, "cispo": cispo_loss}[cfg.loss]
    return loss(logprob, old_logprob, advantage, denominator, **clips)


def _kl_term(cfg: Config, logprob: Tensor, old_logprob: Tensor, ref_logprob: Tensor, denominator: Tensor):
    if cfg.kl_estimator == "rho_k3":
        return rho_k3_loss(logprob, old_logprob, ref_logprob, denominator)
    return {"k2": k2_loss, "k3": k3_loss}[cfg.kl_estimator](logprob, ref_logprob, denominator)


def _denominators(cfg: Config, lengths: Tensor) -> Tensor:
    if cfg.aggregation == "constant_length":
        return constant_length(lengths, cfg.max_new_tokens)
    return {"token_mean": token_mean, "sequence_mean": sequence_mean}[cfg.aggregation](lengths)


if __name__ == "__main__":
    sys.exit(run_command("grpo", sys.modules[__name__], train, sys.argv[1:]))
