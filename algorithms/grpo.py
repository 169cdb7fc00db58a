"""Group relative policy optimization.

    loss = sum_t [-min(rho_t A, clip(rho_t, 1 - lo, 1 + hi) A) + beta k3_t] / N_t

    rho_t = pi(y_t) / pi_old(y_t)        A = (r - mean of the group) / (std of the group + eps)
    k3_t  = exp(-d) + d - 1  with  d = log pi(y_t) - log pi_ref(y_t)

over sampled tokens, the end token included. N_t is the denominator: by default the sampled tokens of the whole
optimizer step (DAPO), not the paper's mean of sequence means, under which a token of a long answer weighs less;
--aggregation and --advantage choose others. k3 in the loss is the paper's; its fixed point is that of the forward KL,
not DPO's. Scoring uses the sampling temperature, and the ids that top-k or top-p kept, so the scored distribution is
the sampled one.

Metrics: reward (mean), reward/<function>, flat_groups (share whose rewards are all equal: they teach nothing), length
(tokens), ended (share that ended by a stop token), entropy (nats), ratio, clip_fraction, kl, mismatch (mean of
|sampler's - trainer's log-probability|), sampling_seconds, update_seconds. entropy, ratio, clip_fraction, kl and
mismatch are over the tokens that the update saw: without a KL term, samples whose advantage is 0 have no gradient and
are not scored.

Source: Shao et al. 2024, https://arxiv.org/abs/2402.03300, eq. 3 and 4
        DAPO: Yu et al. 2025, https://arxiv.org/abs/2503.14476
Run:    burnish grpo --model DIR --data FILE.jsonl --reward FILE.py:function
"""

import sys
import time
from dataclasses import dataclass, field
from math import inf, isfinite
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..model.adapter import frozen_copy
from ..model.errors import InputError
from ..model.moe import routing_metrics
from ..model.tokenizer import Tokenizer
from ._adapter import ADAPTER_BOUNDS, load_trainee
from ._advantages import batch_std_advantages, group_advantages, mean_advantages, rloo_advantages
from ._command import run_command
from ._data import read_rows, rl_prompts
from ._loop import (
    Run,
    Schedule,
    autocast,
    check_flags,
    check_model,
    default_device,
    epochs,
    make_optimizer,
    new_run_folder,
    optimizer_step,
    report_counts,
    scheduled,
)
from ._rewards import load_rewards
from ._rollout import micro_batches, sample_groups
from ._tokens import constant_length, sequence_mean, token_mean


@dataclass(frozen=True)
class Config:
    model: Path  # Hugging Face folder, or an adapter's, to start from; the reference policy, too, where there is one
    data: Path  # prompts, with any further columns for the reward functions: .jsonl, .json or .parquet
    reward: tuple[str, ...]  # FILE.py:function or package.module:function, one or more
    reward_weights: tuple[float, ...] = ()  # one a reward function; all 1 where none are given
    output: Path = field(default_factory=lambda: new_run_folder("grpo"))  # new folder: metrics, model
    chat_template: str | None = None  # a jinja file, or plain, in place of the model's own
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
    updates_per_rollout: int = 1  # optimizer steps on each rollout; from the second on, rho differs from 1
    advantage: Literal["group", "mean", "batch_std", "rloo"] = "group"  # baseline and scale of rewards
    aggregation: Literal["token_mean", "sequence_mean", "constant_length"] = "token_mean"  # what weighs alike
    clip_low: float = 0.2  # rho below 1 - clip_low has no gradient where A < 0
    clip_high: float = 0.2  # rho above 1 + clip_high has none where A > 0; DAPO: 0.28
    kl_coefficient: float = 0.0  # beta, of the KL to the model that training started from
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
    resume: bool = False  # go on from the last checkpoint in --output
    checkpoint_activations: bool = False  # run each layer again in the backward: less memory, more time
    seed: int = 0  # of the order of rows, and of sampling
    device: str = field(default_factory=default_device)


def grpo_loss(
    logprob: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    denominator: Tensor | float,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped policy gradient. logprob, old_logprob, advantage (tokens,), in nats; old_logprob without gradient.

    denominator: scalar or (tokens,), of the whole optimizer step (`_tokens.py`).
    """
    ratio = (logprob - old_logprob).clamp(-20, 20).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -(
        torch.min(ratio * advantage, clipped * advantage) / denominator
    ).sum()  # eq. 3 without its KL term
    is_clipped = (clipped * advantage < ratio * advantage).float()
    return loss, {"ratio": ratio.detach().mean(), "clip_fraction": is_clipped.mean()}


def k3_loss(
    logprob: Tensor, ref_logprob: Tensor, denominator: Tensor | float
) -> tuple[Tensor, dict[str, Tensor]]:
    """KL(pi||ref) estimated by exp(-d) + d - 1 on sampled tokens, d = logprob - ref_logprob, each (tokens,): eq. 4."""
    log_ratio = (logprob - ref_logprob).clamp(-20, 20)
    k3 = (-log_ratio).exp() + log_ratio - 1
    return (k3 / denominator).sum(), {"kl": k3.detach().mean()}


ADVANTAGES = {
    "group": group_advantages,
    "mean": mean_advantages,
    "batch_std": batch_std_advantages,
    "rloo": rloo_advantages,
}


def train(cfg: Config) -> Path:
    """Returns the folder of the trained model."""
    check_flags(
        cfg,
        steps=(1, inf),
        prompts_per_step=(1, inf),
        group_size=(2, inf),
        max_prompt_length=(1, inf),
        max_new_tokens=(1, inf),
        sampling_batch_size=(1, inf),
        temperature=(1e-3, 1e3),
        top_k=(1, inf),
        top_p=(1e-9, 1),
        updates_per_rollout=(1, inf),
        clip_low=(0, 1),
        clip_high=(0, inf),
        kl_coefficient=(0, inf),
        micro_batch_tokens=(1, inf),
        learning_rate=(0, inf),
        warmup_steps=(0, inf),
        weight_decay=(0, inf),
        max_grad_norm=(1e-12, inf),
        **ADAPTER_BOUNDS,
        save_every=(0, inf),
        seed=(0, 2**31 - 1),
    )
    weights = cfg.reward_weights or (1.0,) * len(cfg.reward)
    if len(weights) != len(cfg.reward):
        raise InputError(
            f"--reward-weights: expected {len(cfg.reward)}, one a reward function, got {len(weights)}"
        )
    if not all(isfinite(weight) for weight in weights):
        raise InputError(f"--reward-weights: expected finite numbers, got {weights}")
    rewards = load_rewards(cfg.reward)
    tokenizer = Tokenizer.load(cfg.model, cfg.chat_template)
    prompts, counts = rl_prompts(
        read_rows(cfg.data), tokenizer, max_length=cfg.max_prompt_length, prompt_column=cfg.prompt_column
    )
    report_counts(cfg.data, counts)
    model = load_trainee(cfg)
    check_model(model, tokenizer, max(len(prompt.tokens) for prompt in prompts) + cfg.max_new_tokens)
    model.checkpoint_activations = cfg.checkpoint_activations
    reference = frozen_copy(model) if cfg.kl_coefficient else None
    optimizer = make_optimizer(model, cfg.learning_rate, cfg.weight_decay)
    with Run(cfg, model=model, optimizer=optimizer) as run:
        batches = epochs(len(prompts), cfg.prompts_per_step, cfg.seed, skip=run.start)
        for step in run.steps():
            started = time.perf_counter()
            groups, judged = sample_groups(
                model,
                tokenizer,
                [prompts[i] for i in next(batches)],
                rewards,
                weights,
                group_size=cfg.group_size,
                max_new_tokens=cfg.max_new_tokens,
                batch_size=cfg.sampling_batch_size,
                temperature=cfg.temperature,
                top_k=cfg.top_k,
                top_p=cfg.top_p,
                seed=(cfg.seed << 32) + step,
            )
            sampled = time.perf_counter()
            reward = torch.stack(
                [group.rewards for group in groups]
            )  # (prompts, group), NaN where none judged
            advantage = ADVANTAGES[cfg.advantage](reward).flatten()  # (samples,)
            lengths = torch.tensor([len(sample.tokens) for group in groups for sample in group.samples])
            counted = ~reward.flatten().isnan()  # the others leave numerator and denominator
            denominator = torch.ones_like(advantage)
            denominator[counted] = _denominators(cfg, lengths[counted])
            needed = counted if reference is not None else counted & (advantage != 0)
            micros = micro_batches(groups, needed, advantage, denominator, cfg.micro_batch_tokens, cfg.device)

            sums: dict[str, float] = {}
            old_logprobs: list[Tensor] = []
            rate = scheduled(cfg.learning_rate, step, cfg.steps, cfg.warmup_steps, cfg.schedule)
            num_tokens = sum(micro.rows.numel() for micro in micros)
            for update in range(cfg.updates_per_rollout if micros else 0):
                total_loss = 0.0
                for i, micro in enumerate(micros):
                    score = {"temperature": cfg.temperature, "support": micro.support}
                    with autocast(cfg.device):
                        logprob, _, entropy = model.score(micro.packed, micro.rows, **score)
                    if update == 0:  # the model is still the one that sampled
                        old_logprobs.append(logprob.detach())
                    loss, metrics = grpo_loss(
                        logprob,
                        old_logprobs[i],
                        micro.advantage,
                        micro.denominator,
                        cfg.clip_low,
                        cfg.clip_high,
                    )
                    if reference is not None:
                        with torch.no_grad(), autocast(cfg.device):
                            ref_logprob, _, _ = reference.score(micro.packed, micro.rows, **score)
                        kl_loss, kl_metrics = k3_loss(logprob, ref_logprob, micro.denominator)
                        loss, metrics = loss + cfg.kl_coefficient * kl_loss, metrics | kl_metrics
                    share = micro.rows.numel() / num_tokens
                    (loss + share * model.balance_loss()).backward()  # of experts, where the model has some
                    total_loss += loss.item()
                    metrics["entropy"] = entropy.detach().mean()
                    if update == 0:
                        metrics["mismatch"] = (old_logprobs[i] - micro.sampled_logprob).abs().mean()
                    for name, value in metrics.items():  # means over the last update's tokens
                        part = value.item() * share
                        sums[name] = part if i == 0 else sums[name] + part
                sums["grad_norm"] = optimizer_step(model, optimizer, total_loss, rate, cfg.max_grad_norm)
                sums["loss"] = total_loss
            ended = [sample.ended for group in groups for sample in group.samples]
            run.log(
                {
                    "reward": reward.nanmean(),
                    "length": lengths.float().mean(),
                    **sums,
                    **judged,
                    **routing_metrics(model.routing if micros else ()),
                    "flat_groups": (advantage.view(reward.shape) == 0).all(dim=1).float().mean(),
                    "ended": sum(ended) / len(ended),
                    "learning_rate": rate,
                    "sampling_seconds": sampled - started,
                    "update_seconds": time.perf_counter() - sampled,
                },
                tokens=int(lengths.sum()),
            )
            run.save_step(model, tokenizer)
        return run.save(model, tokenizer)


def _denominators(cfg: Config, lengths: Tensor) -> Tensor:
    if cfg.aggregation == "constant_length":
        return constant_length(lengths, cfg.max_new_tokens)
    return {"token_mean": token_mean, "sequence_mean": sequence_mean}[cfg.aggregation](lengths)


if __name__ == "__main__":
    sys.exit(run_command("grpo", sys.modules[__name__], train, sys.argv[1:]))
