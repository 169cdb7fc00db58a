"""Kahneman-Tversky optimization: preferences without pairs.

    loss = sum over completions of v / N        v = lambda_D (1 - sigmoid(beta (r - z)))    if y is wanted
                                                v = lambda_U (1 - sigmoid(beta (z - r)))    if y is unwanted
    r = log pi(y|x) - log pi_ref(y|x)           z = max(0, mean of r over mismatched completions)

N is the number of completions in the whole optimizer step. z estimates KL(pi || pi_ref) and has no gradient. z is one
number for the whole step, so it is computed before the first backward pass. For each row of the step, the mismatched
completion is another row's completion behind this row's prompt. The other row is half the file away, the same one in
each epoch. lambda_D and lambda_U are --wanted-weight and --unwanted-weight.

The reference is the model that training starts from. Its log-probabilities are computed once, as in dpo.py.

Source: Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306, eq. 7 and 8
Run:    burnish kto --model DIR --data FILE.jsonl
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor

from ..model.transformer import Transformer
from .data.pairs import Judged, load_judged
from .data.tokenizer import load_tokenizer
from .run.batch import longest, make_batches, over_completions
from .run.checks import check_flags
from .run.claim import in_run_folder
from .run.command import run_command
from .run.flags import Bounds, Data, DropoutFlags, Rate, Schedule, SupervisedFlags, run_folder
from .run.held_out import Evaluation, Figure, Figures, on_held_out
from .run.ids import check_model
from .run.learner import Learner
from .run.loop import Run
from .run.order import with_steps
from .run.start import trained_tokens
from .run.trainee import load_trainee
from .search.figures import mean_figure, unpaired_figures


@dataclass(frozen=True, kw_only=True)
class Config(DropoutFlags, SupervisedFlags):
    model: Path  # model to start from, a Hugging Face or adapter folder; also the reference policy
    data: (
        Data  # rows of prompt, completion and label, or of chosen and rejected: .jsonl, .parquet, .arrow, ...
    )
    output: Path = run_folder("kto")
    beta: Annotated[float, Bounds(1e-9)] = 0.1  # a smaller beta lets the policy move further from its start
    wanted_weight: Rate = 1.0  # lambda_D; in the paper, wanted rows together weigh 1 to 4/3 of unwanted rows
    unwanted_weight: Rate = 1.0  # lambda_U, the weight of unwanted completions
    max_length: int = 1024  # tokens of a prompt with its completion; longer rows are dropped and counted
    batch_size: int = 32  # completions in one optimizer step; z is a mean over them, so take several
    learning_rate: float = 1e-6
    schedule: Schedule = "linear"


def kto_loss(
    log_ratio: Tensor,
    wanted: Tensor,
    kl: Tensor | float,
    num_completions: int,
    beta: float,
    wanted_weight: float = 1.0,
    unwanted_weight: float = 1.0,
) -> Tensor:
    """Compute the KTO loss of a micro-batch: the sum of its completions' v / num_completions.

    log_ratio (completions,): r, the log-ratio to the reference, summed over tokens. wanted: (completions,) bool. kl: z,
    without gradient. num_completions: completions in the whole optimizer step. wanted_weight, unwanted_weight: lambda_D
    and lambda_U.
    """
    gain = torch.where(wanted, log_ratio - kl, kl - log_ratio)
    weight = torch.where(wanted, wanted_weight, unwanted_weight)
    return (weight * (1 - torch.sigmoid(beta * gain))).sum() / num_completions


@in_run_folder
def train(cfg: Config) -> Path:
    """Train by KTO, and return the folder of the trained model."""
    check_flags(cfg)
    tokenizer = load_tokenizer(cfg)
    judged = load_judged(cfg, tokenizer)
    mismatched = _mismatched(judged)
    held_out = load_judged(on_held_out(cfg), tokenizer) if cfg.eval_data else []
    cfg = with_steps(cfg, judged.parts)
    model = load_trainee(cfg)
    check_model(model, tokenizer, [*judged, *held_out], max(map(longest, judged)))
    learner = Learner(cfg, model)
    tokens, evaluation = trained_tokens(judged), _evaluation(cfg, model, held_out)
    run = Run(cfg, tokenizer, rows=judged.parts, tokens=tokens, evaluation=evaluation, model=learner)

    # 1. the reference: log-probabilities before training
    reference, mismatched_reference = torch.zeros(2, len(judged))
    for members in run.first_batches():
        reference[members] = _logprobs(cfg, model, [judged[i] for i in members])
        mismatched_reference[members] = _logprobs(cfg, model, [mismatched[i] for i in members])

    with run:
        for step in run.steps():
            # 2. the step's completions, packed behind their prompts
            members = run.next()
            rows, ref_logprob = [judged[i] for i in members], reference[members]
            wanted = torch.tensor([one.label for one in rows])
            batches = make_batches(rows, cfg.micro_batch_tokens, cfg.device)

            # 3. z, the same number for the whole step
            drift = _logprobs(cfg, model, [mismatched[i] for i in members]) - mismatched_reference[members]
            kl = drift.mean().clamp(min=0).item()

            # 4. r of each completion, the loss, and its gradient
            log_ratios: list[Tensor] = []
            for batch in batches:
                ref = ref_logprob[batch.members].to(cfg.device)
                log_ratio = batch.completion_logprobs(model) - ref  # (completions,)
                labels = wanted[batch.members].to(cfg.device)
                weights = cfg.wanted_weight, cfg.unwanted_weight
                loss = kto_loss(log_ratio, labels, kl, len(rows), cfg.beta, *weights)
                learner.backward(loss, batch.share)
                log_ratios.append(log_ratio.detach())

            # 5. one step of the optimizer
            metrics = learner.step(step)
            log_ratio = batches.joined(log_ratios)  # (all completions,)
            chosen, rejected = (cfg.beta * log_ratio[side].mean() for side in (wanted, ~wanted))
            metrics = {
                "loss": metrics["loss"],
                "kl": kl,
                "margin": chosen - rejected,
                "chosen": chosen,
                "rejected": rejected,
                **metrics,
            }
            run.log(metrics | learner.balance.metrics(), batches.num_tokens)
        return run.save()


def _logprobs(cfg: Config, model: Transformer, judged: list[Judged]) -> Tensor:
    """Return the log-probability of each completion, (completions,), without gradients."""
    function = lambda batch: batch.completion_logprobs(model)
    return over_completions(model, judged, function, cfg.micro_batch_tokens).squeeze(1)


def _evaluation(cfg: Config, model: Transformer, held_out: list[Judged]) -> Evaluation | None:
    """Return the evaluation: loss and z over all held-out completions, accuracy and margin of beta r.

    The reference of the held-out completions is measured at the first call, which is before training.
    """
    mismatched = _mismatched(held_out)
    wanted = torch.tensor([one.label for one in held_out])
    references: list[Tensor] = []  # of the first call

    def measure() -> Figures:
        logprobs = torch.stack([_logprobs(cfg, model, rows) for rows in (held_out, mismatched)])
        if not references:
            references.append(logprobs)
        log_ratio, drift = logprobs - references[0]  # (completions,) each

        # z of all completions, and v of each, as of a step of this completion alone
        kl = mean_figure(drift)
        z, weights = max(kl.mean, 0.0), (cfg.wanted_weight, cfg.unwanted_weight)
        losses = torch.vmap(lambda r, label: kto_loss(r, label, z, 1, cfg.beta, *weights))(log_ratio, wanted)
        scores = cfg.beta * log_ratio
        return {
            "loss": mean_figure(losses),
            **unpaired_figures(scores[wanted], scores[~wanted]),
            "kl": Figure(z, kl.error, kl.count),
        }

    return Evaluation("completions", len(held_out), measure) if held_out else None


def _mismatched(judged: list[Judged]) -> list[Judged]:
    """Return the rows, each with its completion replaced by that of the row half the file away."""
    half = len(judged) // 2
    return [
        replace(one, completion=judged[(i + half) % len(judged)].completion) for i, one in enumerate(judged)
    ]


if __name__ == "__main__":
    sys.exit(run_command("kto", sys.modules[__name__], train, sys.argv[1:]))
