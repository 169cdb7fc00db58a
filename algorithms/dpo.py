"""Direct preference optimization and its family.

    loss = sum over pairs f(w, l) / N            w, l: the scores of the chosen and the rejected completion

N is the number of pairs in the whole optimizer step. In the table, h = w - l and L(h) = -log sigmoid(beta h). s is the
completion's log pi(y|x), summed over its tokens; s_ref is the same number under the reference. e is --label-smoothing,
the assumed share of wrong labels. length is the completion's number of tokens, and logit p = log(p / (1 - p)). NLL is
the negative log-likelihood of the chosen completions per token, times --nll-weight.

    --loss     score                 f                                                     source
    dpo        s - s_ref             L(h)                                                  2305.18290, eq. 7
    cdpo       s - s_ref             (1 - e) L(h) + e L(-h)                                ericmitchell.ai/cdpo.pdf
    robust     s - s_ref             [(1 - e) L(h) - e L(-h)] / (1 - 2e)                   2403.00409
    hinge      s - s_ref             max(0, 1 - beta h)                                    2309.06657
    ipo        (s - s_ref) / length  (h - 1 / (2 beta))^2                                  2310.12036, eq. 17
    ipo_sum    s - s_ref             (h - 1 / (2 beta))^2                                  2310.12036, eq. 17
    apo_zero   s - s_ref             1 - sigmoid(beta w) + sigmoid(beta l)                 2408.06266, eq. 7
    apo_down   s - s_ref             sigmoid(beta w) + 1 - sigmoid(beta h)                 2408.06266, eq. 8
    cpo        s                     L(h) + NLL                                            2401.08417
    simpo      s / length            -log sigmoid(beta h - gamma)                          2405.14734, eq. 6
    orpo       s / length            -beta log sigmoid(logit e^w - logit e^l) + NLL        2403.07691, eq. 6, 7

The reference is the model that training starts from. Its log-probabilities are computed once, before training, in the
batches of the first epoch; rows that only a later epoch draws follow. Training repeats these sums in the same order.
So at the start s - s_ref is exactly 0, and DPO's loss is log 2.

A pair is one forward pass: both completions continue the same prompt. The first token of each completion is scored from
the last row of the prompt.

Source: Rafailov et al. 2023, https://arxiv.org/abs/2305.18290; the other papers are at https://arxiv.org/abs/NUMBER
Run:    burnish dpo --model DIR --data FILE.jsonl
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
from torch import Tensor

from ..model.errors import InputError
from ..model.transformer import Transformer
from .data.pairs import Preference, load_pairs
from .data.tokenizer import load_tokenizer
from .objectives.preference import (
    apo_down_loss,
    apo_zero_loss,
    cdpo_loss,
    dpo_loss,
    hinge_loss,
    ipo_loss,
    nll_loss,
    orpo_loss,
    pair_metrics,
    robust_loss,
    simpo_loss,
)
from .run.batch import longest, make_batches, over_completions
from .run.checks import check_flags
from .run.claim import in_run_folder
from .run.command import run_command
from .run.flags import Bounds, Data, DropoutFlags, Rate, Schedule, SupervisedFlags, run_folder
from .run.held_out import Evaluation, Figures, on_held_out
from .run.ids import check_model
from .run.learner import Learner
from .run.loop import Run
from .run.order import with_steps
from .run.start import trained_tokens
from .run.trainee import load_trainee
from .search.figures import mean_figure, pair_figures

Loss = Literal[
    "dpo", "cdpo", "robust", "hinge", "ipo", "ipo_sum", "apo_zero", "apo_down", "cpo", "simpo", "orpo"
]
Smoothing = Annotated[float, Bounds(0, 0.499)]


@dataclass(frozen=True, kw_only=True)
class Config(DropoutFlags, SupervisedFlags):
    model: Path  # model to start from, a Hugging Face or adapter folder; also the reference policy
    data: Data  # rows of chosen and rejected, optionally prompt: .jsonl, .json, .parquet or .arrow
    output: Path = run_folder("dpo")
    loss: Loss = "dpo"  # docs/dpo.md has the formula of each
    beta: Annotated[float, Bounds(1e-9)] | None = None  # scale of the scores (default: 0.1, simpo 2)
    label_smoothing: Smoothing | None = None  # for cdpo and robust: the share of wrong labels (default: 0.1)
    gamma: Rate | None = None  # for simpo: the margin between the two scores (default: 1)
    nll_weight: Rate | None = None  # for cpo and orpo: weight of the NLL of chosen (default: 1)
    max_length: int = 1024  # tokens of a prompt with either completion; longer rows are dropped and counted
    batch_size: int = 32  # pairs in one optimizer step
    learning_rate: float = 1e-6
    schedule: Schedule = "linear"


class Variant(NamedTuple):
    """One loss of the table at the head of this file. flags: the flags that the loss reads, with their defaults."""

    loss: Callable[..., Tensor]
    flags: Mapping[str, float]
    reference: bool = True  # the reference's log-probability is subtracted
    per_token: bool = False  # the score is divided by the number of tokens

    def scores(self, logprob: Tensor, ref_logprob: Tensor, lengths: Tensor) -> Tensor:
        """Return the scores of the chosen and the rejected completions, (pairs, 2). All arguments are (pairs, 2), too.

        logprob, ref_logprob: sums over a completion's tokens. lengths: the completion's number of trained tokens.
        """
        score = logprob - ref_logprob if self.reference else logprob
        return score / lengths if self.per_token else score


# the flags that a loss reads, with their defaults
BETA = {"beta": 0.1}
SMOOTHED, WITH_NLL = BETA | {"label_smoothing": 0.1}, BETA | {"nll_weight": 1.0}
VARIANTS = {
    "dpo": Variant(dpo_loss, BETA),
    "cdpo": Variant(cdpo_loss, SMOOTHED),
    "robust": Variant(robust_loss, SMOOTHED),
    "hinge": Variant(hinge_loss, BETA),
    "ipo": Variant(ipo_loss, BETA, per_token=True),
    "ipo_sum": Variant(ipo_loss, BETA),
    "apo_zero": Variant(apo_zero_loss, BETA),
    "apo_down": Variant(apo_down_loss, BETA),
    "cpo": Variant(dpo_loss, WITH_NLL, reference=False),
    "simpo": Variant(simpo_loss, {"beta": 2.0, "gamma": 1.0}, reference=False, per_token=True),
    "orpo": Variant(orpo_loss, WITH_NLL, reference=False, per_token=True),
}


@in_run_folder
def train(cfg: Config) -> Path:
    """Train by preference optimization, and return the folder of the trained model."""
    check_flags(cfg)
    variant, flags = VARIANTS[cfg.loss], _flags(cfg)
    beta, nll_weight = flags["beta"], flags.pop("nll_weight", 0.0)
    tokenizer = load_tokenizer(cfg)
    pairs = load_pairs(cfg, tokenizer)
    held_out = load_pairs(on_held_out(cfg), tokenizer) if cfg.eval_data else []
    cfg = with_steps(cfg, pairs.parts)
    model = load_trainee(cfg)
    check_model(model, tokenizer, [*pairs, *held_out], max(map(longest, pairs)))
    learner = Learner(cfg, model)
    tokens, evaluation = trained_tokens(pairs), _evaluation(cfg, model, held_out, flags, nll_weight)
    run = Run(cfg, tokenizer, rows=pairs.parts, tokens=tokens, evaluation=evaluation, model=learner)

    # 1. the reference: log-probabilities before training
    reference = torch.zeros(len(pairs), 2)
    if variant.reference:
        for members in run.first_batches():
            reference[members] = _logprobs(cfg, model, [pairs[i] for i in members])

    with run:
        for step in run.steps():
            # 2. the step's pairs, packed: each prompt once, then chosen and rejected
            members = run.next()
            rows, ref_logprob = [pairs[i] for i in members], reference[members]
            batches = make_batches(rows, cfg.micro_batch_tokens, cfg.device)
            num_chosen = sum(pair.chosen.num_trained for pair in rows)  # tokens

            # 3. the scores of both completions, the loss, and its gradient
            for batch in batches:
                logprob = batch.completion_logprobs(model).view(-1, 2)  # (completions,) -> (pairs, 2)
                ref = ref_logprob[batch.members].to(cfg.device)
                scores = variant.scores(logprob, ref, batch.lengths.view(-1, 2))
                chosen, rejected = scores.unbind(1)  # (pairs,)
                loss = variant.loss(chosen, rejected, len(rows), **flags)
                if nll_weight:
                    loss = loss + nll_weight * nll_loss(logprob[:, 0], num_chosen)

                metrics = pair_metrics(beta * chosen, beta * rejected, len(rows))
                means = logprob.detach().sum(0) / len(rows)
                metrics |= {"chosen_logprob": means[0].item(), "rejected_logprob": means[1].item()}
                learner.backward(loss, batch.share, metrics)

            # 4. one step of the optimizer
            metrics = learner.step(step)
            run.log(metrics | learner.balance.metrics(), batches.num_tokens)
        return run.save()


def _logprobs(cfg: Config, model: Transformer, pairs: Sequence[Preference]) -> Tensor:
    """Return the log-probabilities of the chosen and the rejected completions, (pairs, 2), without gradients."""
    function = lambda batch: batch.completion_logprobs(model)
    return over_completions(model, pairs, function, cfg.micro_batch_tokens)


def _evaluation(
    cfg: Config, model: Transformer, held_out: list[Preference], flags: dict[str, float], nll_weight: float
) -> Evaluation | None:
    """Return the evaluation: loss, accuracy and margin of its scores, and both of the log-probabilities alone.

    flags: the flags that the loss reads. The reference of the held-out pairs is measured at the first call, which is
    before training.
    """
    variant = VARIANTS[cfg.loss]
    reference: list[Tensor] = []  # of the first call
    lengths = torch.tensor([[c.num_trained for c in pair.completions] for pair in held_out])  # (pairs, 2)

    def measure() -> Figures:
        logprob = _logprobs(cfg, model, held_out)  # (pairs, 2)
        if not reference:
            reference.append(logprob)
        chosen, rejected = variant.scores(logprob, reference[0], lengths).unbind(1)  # (pairs,) each

        # the loss of each pair, as of a step of this pair alone; the NLL term is a mean over all chosen tokens
        losses = torch.vmap(lambda one, other: variant.loss(one, other, 1, **flags))(chosen, rejected)
        if nll_weight:
            losses -= nll_weight * logprob[:, 0] * len(held_out) / lengths[:, 0].sum()
        beta = flags["beta"]
        figures = {"loss": mean_figure(losses), **pair_figures(beta * chosen, beta * rejected)}
        return figures | pair_figures(*logprob.unbind(1), prefix="logprob_")

    return Evaluation("pairs", len(held_out), measure) if held_out else None


def _flags(cfg: Config) -> dict[str, float]:
    """Return the flags that the loss reads, as given or by default. Raises InputError for a flag it does not read."""
    flags = dict(VARIANTS[cfg.loss].flags)
    for name in ("beta", "label_smoothing", "gamma", "nll_weight"):
        value = getattr(cfg, name)
        if value is None:
            continue
        if name not in flags:
            readers = ", ".join(loss for loss, variant in VARIANTS.items() if name in variant.flags)
            raise InputError(f"--{name.replace('_', '-')}: --loss {cfg.loss} does not read it; {readers} do")
        flags[name] = value
    return flags


if __name__ == "__main__":
    sys.exit(run_command("dpo", sys.modules[__name__], train, sys.argv[1:]))
