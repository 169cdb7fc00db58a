"""Proximal policy optimization from a reward model or reward functions, with the KL to the start in the reward.

    policy loss = sum_t min(max(-rho_t A_t, -clip(rho_t, 1 - lo, 1 + hi) A_t), -c A_t where A_t < 0) / N
    value loss  = sum_t 1/2 max((V_t - R_t)^2, (clip(V_t, V_old - v, V_old + v) - R_t)^2) / N
    r_t = -beta k1_t + [t is the last] score        k1_t = log pi_old(y_t) - log pi_ref(y_t)

over the N sampled tokens of a minibatch, the end token included, which the score stands on; rho_t = pi / pi_old. A is
by GAE from r and V_old, the value beyond the end 0; R = A + V_old; A is then whitened over the rollout's tokens. The
score is the reward model's, read at the last token, plus the reward functions', less --missing-end-penalty where no
stop token ended the sample. k1 in the reward has its optimum at pi_ref e^(score / beta) / Z, which is DPO's. The critic
is a model of its own, from --critic, else the reward model, else --model under a fresh head. Two advantages need none:

    rloo          the sum of r, less its mean over the prompt's other samples            2402.14740, eq. 8
    reinforce_pp  the sum of r from t on, whitened over the rollout's tokens             2501.03262

Departures: --whiten-rewards divides by the standard deviation and takes no mean off; dual clip is on by default.

Metrics: docs/ppo.md.

Source: Schulman et al. 2017, https://arxiv.org/abs/1707.06347, eq. 7; GAE, https://arxiv.org/abs/1506.02438
        KL in the reward and its controller: Ziegler et al. 2019, https://arxiv.org/abs/1909.08593, eq. 2 and sec. 2.2
        details: Huang et al. 2024, https://arxiv.org/abs/2403.17031; dual clip: https://arxiv.org/abs/1912.09729, eq. 5
Run:    burnish ppo --model DIR --data FILE.jsonl --reward-model DIR
"""

import sys
import time
from collections import defaultdict
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
    over_tokens,
    parts_of,
    rollout_metrics,
    sample_groups,
    timed,
)
from .data.rewards import load_reward_model, load_rewards, weighted_rewards
from .objectives.advantages import gae, rloo_advantages, scale, whiten
from .objectives.policy import clipped_loss
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
from .run.trainee import load_scalar_trainee, load_trainee


@dataclass(frozen=True)
class Config(TrainingFlags):
    model: Path  # Hugging Face folder, or an adapter's, to start from; the reference policy, too
    data: Path  # prompts, with any further columns for the reward functions: .jsonl, .json or .parquet
    reward_model: Path | None = None  # folder of a reward model with the same tokenizer
    reward: tuple[str, ...] = ()  # FILE.py:function or package.module:function, any number
    reward_weights: tuple[float, ...] = ()  # one a reward function; all 1 where none are given
    reward_timeout: float | None = None  # seconds that a call of the reward functions has; none: no limit
    critic: Path | None = None  # folder the critic starts from; by default the reward model's, or --model's
    output: Path = field(default_factory=lambda: new_run_folder("ppo"))  # new folder: metrics, model, critic
    steps: int = 200  # rollouts
    prompts_per_step: int = 64  # prompts in one rollout
    group_size: int = 1  # samples of one prompt; rloo needs two
    prompt_column: str | None = None  # the column that holds the prompt, where its name does not say so
    max_prompt_length: int = 1024  # tokens; longer prompts are dropped and counted
    max_new_tokens: int = 256  # cap on a completion's length
    sampling_batch_size: int | None = None  # samples at a time, which bounds the cache; all by default
    temperature: float = 1.0  # of sampling, and of scoring
    top_k: int | None = None  # sample among the k most likely ids only
    top_p: float | None = None  # sample among the fewest ids with this much probability, at most 1,024
    missing_end_penalty: float = 0.0  # off the score of a sample that no stop token ended
    kl_coefficient: float = 0.05  # beta, at the start
    kl_target: float | None = None  # beta is adapted to hold kl there
    kl_horizon: int = 10_000  # samples over which it does
    whiten_rewards: bool = False  # divide r by its standard deviation over the rollout's tokens
    advantage: Literal["gae", "rloo", "reinforce_pp"] = "gae"
    gamma: float = 1.0  # discount
    gae_lambda: float = 0.95
    epochs_per_rollout: int = 4
    minibatches: int = 4  # optimizer steps in an epoch, each on its share of the samples
    clip_low: float = 0.2  # rho below 1 - clip_low has no gradient where A < 0
    clip_high: float = 0.2  # rho above 1 + clip_high has none where A > 0
    dual_clip: float = 3.0  # c: rho above it has none where A < 0, either; inf for none
    value_clip: float = 0.2  # a value farther than this from the rollout's has no gradient; inf for none
    micro_batch_tokens: int = 16384  # tokens in one forward and backward; gradients add up over micro-batches
    learning_rate: float = 1e-6  # AdamW's, at its peak
    critic_learning_rate: float = 1e-5
    schedule: Schedule = "constant"
    warmup_steps: int = 0  # of linear rise to learning_rate
    weight_decay: float = 0.0  # of matrices; vectors have none
    max_grad_norm: float = 1.0  # gradients are scaled down to it
    lora_rank: int = 0  # train adapters of this rank in place of the weights; 0 trains the weights
    lora_alpha: float | None = None  # an adapter's scale is alpha / rank; 2 * rank by default
    base_4bit: bool = False  # hold the frozen weights in 4 bits (NF4): QLoRA
    save_every: int = 0  # steps between checkpoints; 0 saves the models once, at the end
    save_dtype: SaveDtype = "auto"  # of what is written; auto: that of --model, tensor by tensor
    resume: bool = False  # go on from the last checkpoint in --output
    checkpoint_activations: bool = False  # run each layer again in the backward: less memory, more time
    seed: int = 0  # of the order of rows, of sampling, and of a fresh head
    device: str = field(default_factory=default_device)


def value_loss(
    value: Tensor, old_value: Tensor, returns: Tensor, denominator: Tensor | float, clip: float = 0.2
) -> Tensor:
    """Half the larger of the squared errors of value and of value clipped around old_value; each (tokens,).

    The larger one: moving away from old_value beyond the clip never looks like a gain.
    """
    clipped = value.clamp(old_value - clip, old_value + clip)
    return (torch.max((value - returns).square(), (clipped - returns).square()) / (2 * denominator)).sum()


def token_rewards(score: Tensor, k1: Tensor, lengths: Tensor, kl_coefficient: float) -> Tensor:
    """-beta k1 on every token and the score on the last. score, lengths (samples,), k1 (samples, length)."""
    return (-kl_coefficient * k1).scatter_add(1, lengths[:, None] - 1, score.nan_to_num(0.0)[:, None])


def adapted(kl_coefficient: float, kl: float, target: float, samples: int, horizon: int) -> float:
    """Ziegler et al.'s controller: proportional to the relative error, clipped to 0.2."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coefficient * (1 + error * samples / horizon)


def train(cfg: Config) -> Path:
    """Returns the folder of the trained model."""
    check_flags(
        cfg,
        **RL_BOUNDS,
        **dict.fromkeys(("gamma", "gae_lambda", "clip_low"), (0, 1)),
        **dict.fromkeys(("kl_horizon", "epochs_per_rollout", "minibatches"), (1, inf)),
        **dict.fromkeys(("missing_end_penalty", "clip_high", "value_clip", "critic_learning_rate"), (0, inf)),
        group_size=(2 if cfg.advantage == "rloo" else 1, MOST_SAMPLES),
        kl_target=(1e-9, inf),
        dual_clip=(1 + cfg.clip_high, inf),
    )
    if not cfg.reward and cfg.reward_model is None:
        raise InputError("expected --reward-model DIR or --reward FILE.py:function, got neither")
    if cfg.critic is not None and cfg.advantage != "gae":
        raise InputError(f"--critic: --advantage {cfg.advantage} has none: leave the flag out")
    rewards = weighted_rewards(cfg, load_rewards(cfg.reward) if cfg.reward else {})
    tokenizer = load_tokenizer(cfg)
    prompts = load_prompts(cfg, tokenizer, rewards)
    rewards.check(prompts[0].columns)
    reward_model = load_reward_model(cfg, tokenizer, prompts) if cfg.reward_model else None
    model = load_trainee(cfg)
    check_model(model, tokenizer, prompts, max(len(p.tokens) for p in prompts) + cfg.max_new_tokens)
    reference, critic, critic_optimizer = frozen_copy(model), None, None
    if cfg.advantage == "gae":
        critic = load_scalar_trainee(cfg, cfg.critic or cfg.reward_model or cfg.model)
        check_model(critic, tokenizer, prompts, 0, "the critic")
    balance = Balance(cfg, model, critic)
    shard(model, reference, reward_model, critic)
    optimizer = make_optimizer(model, cfg.learning_rate, cfg.weight_decay, eps=1e-5)
    parts = {"model": model, "optimizer": optimizer}
    if critic is not None:
        critic_optimizer = make_optimizer(critic, cfg.critic_learning_rate, cfg.weight_decay, eps=1e-5)
        parts |= {"critic": critic, "critic_optimizer": critic_optimizer}
    with Run(cfg, **parts) as run:
        run.values.setdefault("kl_coefficient", cfg.kl_coefficient)
        run.values |= {} if run.start else {"varied": 0}
        batches = epochs(len(prompts), cfg.prompts_per_step, cfg.seed, skip=run.start)
        for step in run.steps():
            started, seconds = time.perf_counter(), {"sampling_seconds": 0.0, "scoring_seconds": 0.0}
            seed, batch = (cfg.seed << 32) + step, [prompts[i] for i in next(batches)]
            rewards.begin(cfg, step, step, len(prompts))
            groups = sample_groups(model, tokenizer, batch, rewards, cfg, seed, seconds)
            lengths = lengths_of(groups).to(cfg.device)
            real = torch.arange(int(lengths.max()), device=cfg.device) < lengths[:, None]  # (samples, length)
            score = torch.cat([group.rewards for group in groups]).to(cfg.device)  # (samples,)
            judged = ~score.isnan()  # the others leave numerator and denominator
            if not judged.any():
                raise InputError("reward: no sample of this rollout was judged: nothing to learn from")
            with timed(seconds, "scoring_seconds", cfg.device):
                micros = micro_batches(groups, judged, cfg.micro_batch_tokens, cfg.device)
                old_logprob, _, entropy = over_tokens(micros, lambda m: m.score(model, cfg.temperature), real)
                ref_logprob, _, _ = over_tokens(micros, lambda m: m.score(reference, cfg.temperature), real)
                (sampled_logprob,) = over_tokens(micros, lambda m: (m.sampled_logprob,), real)
                old_value = torch.zeros_like(old_logprob)
                if critic is not None:
                    (old_value,) = over_tokens(micros, lambda m: (m.values(critic),), real)
                if reward_model is not None:  # read at the last token
                    (scores,) = over_tokens(micros, lambda m: (m.scores(reward_model),), real)
                    score = score + scores.gather(1, lengths[:, None] - 1).squeeze(1)
                reshard(model, reference, reward_model, critic)
            mask, beta = real & judged[:, None], run.values["kl_coefficient"]
            k1 = old_logprob - ref_logprob  # (samples, length), 0 where not real
            penalty = cfg.missing_end_penalty * ~ended(groups).to(cfg.device)
            rewards.count(run.values, parts_of(groups), (score - penalty).view(-1, cfg.group_size))
            reward = token_rewards(score - penalty, k1, lengths, beta)
            advantage, returns = _advantages(cfg, reward, old_value, mask)

            updates: list[dict[str, float]] = []
            done = scheduled(1.0, step, cfg.steps, cfg.warmup_steps, cfg.schedule)  # of both learning rates
            rate, critic_rate = cfg.learning_rate * done, cfg.critic_learning_rate * done
            clips = (cfg.clip_low, cfg.clip_high, cfg.dual_clip)
            shuffle, samples = torch.Generator().manual_seed(seed), judged.cpu().nonzero().squeeze(1)
            for _ in range(cfg.epochs_per_rollout):
                order = samples[torch.randperm(len(samples), generator=shuffle)]
                for minibatch in order.chunk(cfg.minibatches):
                    chosen = torch.zeros(len(lengths), dtype=torch.bool).index_fill(0, minibatch, True)
                    num_tokens = int(lengths.cpu()[minibatch].sum())
                    sums: dict[str, float] = defaultdict(float)
                    for micro in micro_batches(groups, chosen, cfg.micro_batch_tokens, cfg.device):
                        places, share = micro.positions, micro.rows.numel() / num_tokens
                        old, gain = old_logprob[real][places], advantage[real][places]
                        with autocast(cfg.device):
                            logprob, _, _ = micro.score(model, cfg.temperature)
                        loss, metrics = clipped_loss(logprob, old, gain, num_tokens, *clips)
                        (loss + balance.loss(share)).backward()  # of experts, where there are some
                        sums["policy_loss"] += loss.item()
                        metrics["approx_kl"] = (logprob.detach() - old).square().mean() / 2
                        for name, value in metrics.items():
                            sums[name] += value.item() * share if share else 0.0
                        if critic is not None:
                            with autocast(cfg.device):
                                value = micro.values(critic)
                            was, goal = old_value[real][places], returns[real][places]
                            loss = value_loss(value, was, goal, num_tokens, cfg.value_clip)
                            (loss + balance.loss(share, critic)).backward()
                            sums["value_loss"] += loss.item()
                    sums, limit = summed(sums), cfg.max_grad_norm
                    sums["grad_norm"] = optimizer_step(model, optimizer, sums["policy_loss"], rate, limit)
                    if critic is not None and critic_optimizer is not None:
                        steps = (critic, critic_optimizer, sums["value_loss"], critic_rate, limit)
                        sums["value_grad_norm"] = optimizer_step(*steps)
                    updates.append(sums)
            kl = k1[mask].sum().item() / len(samples)
            if cfg.kl_target is not None:
                run.values["kl_coefficient"] = adapted(beta, kl, cfg.kl_target, len(samples), cfg.kl_horizon)
            explained = 1 - (returns - old_value)[mask].var() / returns[mask].var()
            run.log(
                {
                    **rollout_metrics(groups),
                    **rewards.metrics(),
                    "score": score.nanmean(),
                    "reward": reward[mask].sum() / len(samples),
                    "kl": kl,
                    "kl_coefficient": beta,
                    "entropy": entropy[mask].mean(),
                    "mismatch": (sampled_logprob - old_logprob)[mask].abs().mean(),
                    **({} if critic is None else {"explained_variance": explained}),
                    "first_ratio": updates[0]["ratio"],
                    **{name: sum(update[name] for update in updates) / len(updates) for name in updates[0]},
                    **balance.metrics(),
                    "learning_rate": rate,
                    **seconds,
                    "update_seconds": time.perf_counter() - started - sum(seconds.values()),
                },
                tokens=int(lengths.sum()),
            )
            run.log_completions(completion_records(tokenizer, groups))
            run.save_step(model, tokenizer)
        if critic is not None:
            run.save(critic, tokenizer, "critic")
        trained = run.save(model, tokenizer)
    rewards.say_what_taught_nothing(run.values, in_groups=cfg.advantage == "rloo")
    return trained


def _advantages(cfg: Config, reward: Tensor, value: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Advantages and returns, (samples, length)."""
    scaled = scale(reward, mask) if cfg.whiten_rewards else reward
    if cfg.advantage == "rloo":
        total = scaled.sum(1).masked_fill(~mask[:, 0], torch.nan)  # (samples,)
        of_sample = rloo_advantages(total.view(-1, cfg.group_size)).view(-1, 1)
        return of_sample * mask, total[:, None].expand_as(mask)
    advantage = gae(scaled, value, mask, cfg.gamma, cfg.gae_lambda if cfg.advantage == "gae" else 1.0)
    return whiten(advantage, mask), advantage + value  # the returns are those before whitening


if __name__ == "__main__":
    sys.exit(run_command("ppo", sys.modules[__name__], train, sys.argv[1:]))
