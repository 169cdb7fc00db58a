"""Proximal policy optimization from a reward model or reward functions, with a KL penalty in the reward.

    policy loss = sum_t min(max(-rho_t A_t, -clip(rho_t, 1 - lo, 1 + hi) A_t), -c A_t where A_t < 0) / N
    value loss  = sum_t 1/2 max((V_t - R_t)^2, (clip(V_t, V_old - v, V_old + v) - R_t)^2) / N
    r_t = -beta k1_t + [t is the last] score        k1_t = log pi_old(y_t) - log pi_ref(y_t)

The losses sum over the N sampled tokens of a minibatch, the end token included. rho_t = pi(y_t) / pi_old(y_t), c is
--dual-clip and v is --value-clip. A is computed by GAE from r and V_old, with value 0 after the last token. R is
A + V_old. After that, A is whitened over the rollout's tokens.

The score is the reward model's score at the last token plus the weighted sum of the reward functions. If no stop token
ended the sample, --missing-end-penalty is subtracted. With k1 in the reward, the optimal policy is
pi_ref e^(score / beta) / Z, the same as for DPO.

The critic is a separate model. It starts from --critic, or else the reward model, or else --model with a new head. Two
choices of --advantage need no critic:

    rloo          the sum of r, minus its mean over the prompt's other samples           2402.14740, eq. 8
    reinforce_pp  the sum of r from t on, whitened over the rollout's tokens             2501.03262

Departures: --whiten-rewards divides by the standard deviation and does not subtract the mean, because subtracting it
would reward length. Dual clip is on by default.

Source: Schulman et al. 2017, https://arxiv.org/abs/1707.06347, eq. 7; GAE, https://arxiv.org/abs/1506.02438
        KL in the reward and its controller: Ziegler et al. 2019, https://arxiv.org/abs/1909.08593, eq. 2 and sec. 2.2
        details: Huang et al. 2024, https://arxiv.org/abs/2403.17031; dual clip: https://arxiv.org/abs/1912.09729, eq. 5
Run:    burnish ppo --model DIR --data FILE.jsonl --reward-model DIR
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..model.adapter import frozen_copy
from ..model.errors import InputError
from ..model.scalar import ScalarModel
from ..model.text.tokenizer import Tokenizer
from ..model.transformer import Transformer
from .data.examples import Prompt
from .data.groups import Groups, Sampler, load_prompts
from .data.rewards import Rewards, load_reward_model, load_rewards, weighted_rewards
from .data.tokenizer import load_tokenizer
from .objectives.advantages import gae, rloo_advantages, scale, whiten
from .objectives.policy import clipped_loss
from .run.batch import Batch, make_split_batches, over_completions, over_tokens
from .run.checks import check_flags
from .run.claim import in_run_folder
from .run.command import run_command
from .run.flags import MOST_SAMPLES, Bounds, Count, Limit, Rate, RolloutFlags, Share, run_folder
from .run.held_out import Evaluation, Figures, on_held_out
from .run.ids import check_model
from .run.learner import Learner
from .run.loop import Run
from .run.order import with_steps
from .run.trainee import load_scalar_trainee, load_trainee
from .search.figures import mean_figure, sampled


@dataclass(frozen=True, kw_only=True)
class Config(RolloutFlags):
    model: Path  # model to start from, a Hugging Face or adapter folder; also the reference policy
    reward_model: Path | None = None  # folder of a reward model with the same tokenizer
    critic: Path | None = None  # folder the critic starts from (default: --reward-model, or else --model)
    output: Path = run_folder("ppo")  # new folder: metrics, model, critic
    prompts_per_step: int = 64
    group_size: int = 1  # samples of one prompt; rloo needs at least two
    missing_end_penalty: Rate = 0.0  # subtracted from the score of a sample without a stop token
    kl_coefficient: float = 0.05  # weight beta of the KL; the initial weight with --kl-target
    kl_target: Annotated[float, Bounds(1e-9)] | None = None  # adapt beta to reach this KL, in nats per sample
    kl_horizon: Count = 10_000  # number of samples over which --kl-target adapts beta
    whiten_rewards: bool = False  # divide r by its standard deviation over the rollout's tokens
    advantage: Literal["gae", "rloo", "reinforce_pp"] = "gae"  # advantage estimator; only gae has a critic
    gamma: Share = 1.0  # discount
    gae_lambda: Share = 0.95  # 0: advantages rely on the critic alone; 1: on the rewards alone
    epochs_per_rollout: Count = 4  # passes over the samples of a rollout
    minibatches: Count = 4  # optimizer steps in an epoch, each on an equal share of the samples
    clip_low: Share = 0.2  # no gradient where advantage < 0 and pi / pi_old < 1 - clip_low
    clip_high: Limit = 0.2  # no gradient where advantage > 0 and pi / pi_old > 1 + clip_high
    dual_clip: Limit = 3.0  # no gradient where advantage < 0 and pi / pi_old exceeds this; inf disables it
    value_clip: Limit = 0.2  # values are clipped to this distance from the rollout's values; inf disables it
    critic_learning_rate: Rate = 1e-5  # peak learning rate of the critic
    seed: int = 0  # random seed for the order of rows, for sampling, and for a new critic's head


# ---- losses and rewards


def value_loss(
    value: Tensor, old_value: Tensor, returns: Tensor, denominator: Tensor | float, clip: float = 0.2
) -> Tensor:
    """Compute the sum of max((V - R)^2, (clip(V) - R)^2) / (2 denominator). clip(V) is V within `clip` of old_value.

    value V, old_value, returns R: (tokens,). Because of the maximum, a step beyond the clip never lowers the loss.
    """
    clipped = value.clamp(old_value - clip, old_value + clip)
    return (torch.max((value - returns).square(), (clipped - returns).square()) / (2 * denominator)).sum()


def token_rewards(score: Tensor, k1: Tensor, lengths: Tensor, kl_coefficient: float) -> Tensor:
    """Return each token's reward, (samples, length): -beta k1, plus the score on a sample's last token.

    score, lengths: (samples,). k1: (samples, length). A score of NaN counts as 0.
    """
    return (-kl_coefficient * k1).scatter_add(1, lengths[:, None] - 1, score.nan_to_num(0.0)[:, None])


def adapted(kl_coefficient: float, kl: float, target: float, samples: int, horizon: int) -> float:
    """Return kl_coefficient (1 + error samples / horizon), the next coefficient by Ziegler et al.'s controller.

    error is the relative error of kl, (kl - target) / target, clipped to [-0.2, 0.2].
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coefficient * (1 + error * samples / horizon)


# ---- advantages


def _gae(cfg: Config, reward: Tensor, value: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return (advantages, returns) of GAE (1506.02438, eq. 16). Only the advantages are whitened."""
    advantage = gae(reward, value, mask, cfg.gamma, cfg.gae_lambda)
    return whiten(advantage, mask), advantage + value  # the returns are those before whitening


def _reinforce_pp(cfg: Config, reward: Tensor, value: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return (advantages, returns) of REINFORCE++ (2501.03262).

    A token's return is the discounted sum of the rewards from that token on. The advantages are the whitened returns.
    """
    advantage = gae(reward, value, mask, cfg.gamma, 1.0)  # all values are 0
    return whiten(advantage, mask), advantage


def _rloo(cfg: Config, reward: Tensor, value: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return (advantages, returns) of RLOO (2402.14740, eq. 8), the same for all tokens of a sample.

    The return is the sample's summed reward.
    """
    total = reward.sum(1).masked_fill(~mask[:, 0], torch.nan)  # (samples,)
    advantage = rloo_advantages(total.view(-1, cfg.group_size)).view(-1, 1)  # (samples, 1)
    return advantage * mask, total[:, None].expand_as(mask)


# reward, value, mask (samples, length) -> advantages and returns, each (samples, length)
ADVANTAGES = {"gae": _gae, "rloo": _rloo, "reinforce_pp": _reinforce_pp}


# ---- a rollout before its first update


class Rollout(NamedTuple):
    """The models' outputs on a rollout: (samples, length) each, 0 on padding. Only score is (samples,)."""

    real: Tensor  # bool, True at tokens
    mask: Tensor  # bool, True at tokens of judged samples
    logprob: Tensor  # fp32, the policy's
    entropy: Tensor
    k1: Tensor  # logprob minus the reference's
    value: Tensor  # the critic's, 0 without a critic
    score: Tensor  # reward functions' plus reward model's, NaN if not judged

    def metrics(self, groups: Groups) -> dict[str, float | Tensor]:
        """Return the means of score, entropy and sampler mismatch over the judged samples and their tokens."""
        sampled_logprob = torch.zeros_like(self.logprob)
        sampled_logprob[self.real] = torch.cat([sample.logprobs for sample in groups.samples]).to(
            self.real.device
        )
        return {
            "score": self.score.nanmean(),
            "entropy": self.entropy[self.mask].mean(),
            "mismatch": (sampled_logprob - self.logprob)[self.mask].abs().mean(),
        }


class Models(NamedTuple):
    """The models of a run. The policy and the critic are trained."""

    policy: Learner[Transformer]
    reference: Transformer
    critic: Learner[ScalarModel] | None
    reward_model: ScalarModel | None

    def in_run(self) -> dict[str, Any]:
        """Return the arguments that name the models to a Run."""
        return {"frozen": [self.reference, self.reward_model], "model": self.policy, "critic": self.critic}


def measure(cfg: Config, groups: Groups, models: Models) -> Rollout:
    """Run policy, reference, critic and reward model on the judged samples of a rollout, and return their outputs.

    Raises InputError if no sample was judged.
    """
    lengths = groups.lengths.to(cfg.device)
    real = torch.arange(int(lengths.max()), device=cfg.device) < lengths[:, None]  # (samples, length)
    judged = ~groups.rewards.isnan()  # (samples,)
    if not judged.any():
        raise InputError("reward: no sample of this rollout was judged: nothing to learn from")
    batches = make_split_batches(groups, judged, cfg.micro_batch_tokens, cfg.device)

    # 1. policy and reference on each token
    scored = lambda batch, policy: torch.stack(batch.score(policy, cfg.temperature))  # (2, tokens)
    logprob, entropy = over_tokens(models.policy.model, batches, scored, real)
    ref_logprob, _ = over_tokens(models.reference, batches, scored, real)

    # 2. the critic on the state before each token
    value = torch.zeros_like(logprob)
    if models.critic is not None:
        value = over_tokens(models.critic.model, batches, Batch.values, real)

    # 3. the reward model on the whole sample, read at its last token
    score = groups.rewards.to(cfg.device)  # (samples,)
    if models.reward_model is not None:
        scores = over_tokens(models.reward_model, batches, Batch.token_scores, real)
        score = score + scores.gather(1, lengths[:, None] - 1).squeeze(1)
    mask = real & judged.to(cfg.device)[:, None]
    return Rollout(real, mask, logprob, entropy, logprob - ref_logprob, value, score)


@in_run_folder
def train(cfg: Config) -> Path:
    """Train by PPO, and return the folder of the trained model."""
    _check(cfg)
    rewards = weighted_rewards(cfg, load_rewards(cfg.reward) if cfg.reward else {})
    tokenizer = load_tokenizer(cfg)
    prompts = load_prompts(cfg, tokenizer, rewards)
    held_out = load_prompts(on_held_out(cfg), tokenizer, rewards) if cfg.eval_data else []
    cfg = with_steps(cfg, prompts.parts)
    policy, _, critic, _ = models = _load_models(cfg, tokenizer, [*prompts, *held_out])

    evaluation = _evaluation(cfg, models, tokenizer, rewards, held_out, lambda: run.values)
    run = Run(cfg, tokenizer, rows=prompts.parts, evaluation=evaluation, **models.in_run())
    with run:
        run.values.setdefault("kl_coefficient", cfg.kl_coefficient)
        run.values |= {} if run.start else {"varied": 0}
        sampler = Sampler(cfg, tokenizer, rewards, run)
        for step in run.steps():
            # 1. judged samples of each prompt, and the models' outputs on them
            rewards.begin(cfg, step, step, run.rows_per_epoch)
            asked = [prompts[i] for i in run.next()]
            seed = (cfg.seed << 32) + step
            groups = sampler.sample(policy.model, asked, seed)
            with run.timed("scoring_seconds"):
                rollout = measure(cfg, groups, models)

            # 2. the reward, the advantage and the return of each token
            beta, mask, lengths = run.values["kl_coefficient"], rollout.mask, groups.lengths.to(cfg.device)
            score = rollout.score - cfg.missing_end_penalty * ~groups.ended.to(cfg.device)  # (samples,)
            reward = token_rewards(score, rollout.k1, lengths, beta)  # (samples, length)
            scaled = scale(reward, mask) if cfg.whiten_rewards else reward
            advantage, returns = ADVANTAGES[cfg.advantage](cfg, scaled, rollout.value, mask)
            rewards.count(run.values, groups.parts, score.view(-1, cfg.group_size))

            # 3. (samples, length) -> (all tokens,); each batch takes its own tokens by index
            tables = (rollout.logprob, advantage, rollout.value, returns)
            of_tokens = [table[rollout.real] for table in tables]

            # 4. in each epoch: shuffle the judged samples, and take one clipped step on each minibatch
            updates: list[dict[str, float]] = []
            clips = (cfg.clip_low, cfg.clip_high, cfg.dual_clip)
            judged = mask.any(1).cpu().nonzero().squeeze(1)
            shuffle = torch.Generator().manual_seed(seed)
            with run.timed("update_seconds"):
                for _ in range(cfg.epochs_per_rollout):
                    order = judged[torch.randperm(len(judged), generator=shuffle)]
                    for minibatch in order.chunk(cfg.minibatches):
                        chosen = torch.zeros(len(score), dtype=torch.bool).index_fill(0, minibatch, True)
                        batches = make_split_batches(groups, chosen, cfg.micro_batch_tokens, cfg.device)
                        N = batches.num_trained
                        for batch in batches:
                            # the clipped loss of the policy
                            old_logprob, A, old_value, R = (values[batch.positions] for values in of_tokens)
                            logprob, _ = batch.score(policy.model, cfg.temperature)  # (tokens,)
                            loss, means = clipped_loss(logprob, old_logprob, A, N, *clips)
                            means["approx_kl"] = (logprob.detach() - old_logprob).square().mean() / 2
                            policy.backward(loss, batch.share, means=means)

                            if critic is not None:  # and the clipped squared error of the critic
                                value = batch.values(critic.model)
                                loss = value_loss(value, old_value, R, N, cfg.value_clip)
                                critic.backward(loss, batch.share)
                        updates.append(_step(policy, critic, step))

            # 5. beta of the next rollout, and the metrics of this one
            kl = rollout.k1[mask].sum().item() / len(judged)
            if cfg.kl_target is not None:
                run.values["kl_coefficient"] = adapted(beta, kl, cfg.kl_target, len(judged), cfg.kl_horizon)
            metrics = groups.metrics() | rewards.metrics() | rollout.metrics(groups)
            metrics |= {"reward": reward[mask].sum() / len(judged), "kl": kl, "kl_coefficient": beta}
            metrics |= {name: sum(u[name] for u in updates) / len(updates) for name in updates[0]}
            metrics |= {"first_ratio": updates[0]["ratio"], "learning_rate": policy.learning_rate(step)}
            if critic is not None:
                error = (returns - rollout.value)[mask].var()
                metrics["explained_variance"] = 1 - error / returns[mask].var()
            run.log(metrics | policy.balance.metrics() | run.seconds, groups.num_tokens)
            run.log_samples(groups.records(tokenizer, cfg.samples, rollout.score))
        trained = run.save()
    rewards.report(run.values, in_groups=cfg.advantage == "rloo")
    return trained


def _evaluation(
    cfg: Config,
    models: Models,
    tokenizer: Tokenizer,
    rewards: Rewards,
    held_out: list[Prompt],
    values: Callable[[], dict[str, Any]],
) -> Evaluation | None:
    """Return the evaluation: one sample of each held-out prompt, with score, kl and reward as defined in training.

    values: a function that returns the run's values, of which kl_coefficient is beta.
    """

    def measure() -> Figures:
        groups, figures = sampled(cfg, models.policy.model, tokenizer, rewards, held_out)
        of_each = lambda model, function: over_completions(
            model, groups, function, cfg.micro_batch_tokens
        ).squeeze(1)

        # 1. functions' rewards plus the reward model's; NaN where no function judged the sample
        score, reward_model = groups.rewards, models.reward_model
        if reward_model is not None:
            score = score + of_each(reward_model, lambda batch: batch.scores(reward_model))

        # 2. k1, summed over the sample's tokens, and the objective
        policy, reference = (
            of_each(model, lambda batch, model=model: batch.sums(batch.score(model, cfg.temperature)[0]))
            for model in (models.policy.model, models.reference)
        )
        kl, judged = policy - reference, ~groups.rewards.isnan()
        beta = values().get("kl_coefficient", cfg.kl_coefficient)
        reward = score - cfg.missing_end_penalty * (~groups.ended).float() - beta * kl
        numbers = {"score": score, "reward": reward, "kl": kl}
        return figures | {name: mean_figure(values[judged]) for name, values in numbers.items()}

    return Evaluation("prompts", len(held_out), measure) if held_out else None


def _check(cfg: Config) -> None:
    least = 2 if cfg.advantage == "rloo" else 1
    check_flags(cfg, group_size=(least, MOST_SAMPLES), dual_clip=(1 + cfg.clip_high, inf))
    if not cfg.reward and cfg.reward_model is None:
        raise InputError("expected --reward-model DIR or --reward FILE.py:function, got neither")
    if cfg.critic is not None and cfg.advantage != "gae":
        raise InputError(f"--critic: --advantage {cfg.advantage} has none: leave the flag out")


def _load_models(cfg: Config, tokenizer: Tokenizer, prompts: Sequence[Prompt]) -> Models:
    """Load the models that the flags name. Raises InputError if a model's embedding lacks an id of the prompts."""
    reward_model = load_reward_model(cfg, tokenizer, prompts) if cfg.reward_model else None
    model = load_trainee(cfg)
    check_model(model, tokenizer, prompts, max(len(p.tokens) for p in prompts) + cfg.max_new_tokens)
    reference: Any = frozen_copy(model)
    policy, critic = Learner(cfg, model, eps=1e-5), None

    if cfg.advantage == "gae":
        value_model = load_scalar_trainee(cfg, cfg.critic or cfg.reward_model or cfg.model)
        check_model(value_model, tokenizer, prompts, 0, "the critic")
        critic = Learner(cfg, value_model, cfg.critic_learning_rate, eps=1e-5)
    return Models(policy, reference, critic, reward_model)


def _step(policy: Learner[Transformer], critic: Learner[ScalarModel] | None, step: int) -> dict[str, float]:
    """Take one optimizer step of the policy and of the critic. Return the step's summed metrics."""
    sums = policy.step(step)
    sums["policy_loss"] = sums.pop("loss")
    if critic is not None:
        of_critic = critic.step(step)
        sums |= {"value_loss": of_critic["loss"], "value_grad_norm": of_critic["grad_norm"]}
    return sums


if __name__ == "__main__":
    sys.exit(run_command("ppo", sys.modules[__name__], train, sys.argv[1:]))
