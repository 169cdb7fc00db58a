"""Reward model from preferences.

    loss = sum over pairs [-log sigmoid(r_w - r_l - margin) + c (r_w + r_l)^2] / N

N is the number of pairs in the whole optimizer step. In the model of Bradley and Terry, r_w - r_l are the log-odds that
the chosen completion beats the rejected one. The score r is a linear head on the last token of a completion, its end
token. The head reads that token by its index. The usual search for the first padding token would stop too early if the
pad token is also the end token.

margin is the row's own number, or 0 if the row has none. The Bradley-Terry loss depends only on differences of scores.
Therefore --centering, c in the formula, keeps the scores near 0 during training. For the same reason the scores are
shifted at the end, so that the scores of chosen completions average 0.

A pair is one forward pass: the chosen and the rejected completion continue the same prompt.

Source: Ouyang et al. 2022, https://arxiv.org/abs/2203.02155, eq. 1
        margin: Touvron et al. 2023, https://arxiv.org/abs/2307.09288, eq. 2
        centering: Eisenstein et al. 2023, https://arxiv.org/abs/2312.09244
        shift: Stiennon et al. 2020, https://arxiv.org/abs/2009.01325, section 3.4
Run:    burnish reward --model DIR --data FILE.jsonl
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.scalar import ScalarModel
from .data.pairs import Preference, load_pairs
from .data.tokenizer import load_tokenizer
from .objectives.preference import pair_metrics
from .run.batch import longest, make_batches, over_completions
from .run.checks import check_flags
from .run.claim import in_run_folder
from .run.command import run_command
from .run.flags import Data, DropoutFlags, Rate, Schedule, SupervisedFlags, run_folder
from .run.held_out import Evaluation, Figures, on_held_out
from .run.ids import check_model
from .run.learner import Learner
from .run.loop import Run
from .run.order import with_steps
from .run.trainee import load_scalar_trainee
from .search.figures import mean_figure, pair_figures

REFERENCES = 128  # number of chosen completions whose mean score becomes 0


@dataclass(frozen=True, kw_only=True)
class Config(DropoutFlags, SupervisedFlags):
    model: Path  # folder to start from: a language model, a reward model, or an adapter of either
    data: Data  # rows of chosen and rejected, optionally prompt and margin: .jsonl, .json, .parquet or .arrow
    output: Path = run_folder("reward")
    centering: Rate = 0.0  # weight c of the term that keeps scores near 0, such as 0.01
    max_length: int = 1024  # tokens of a prompt with either completion; longer rows are dropped and counted
    batch_size: int = 64  # pairs in one optimizer step
    learning_rate: float = 1e-5
    schedule: Schedule = "cosine"
    seed: int = 0  # random seed for the order of rows, and for a new score head


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | float, num_pairs: int) -> Tensor:
    """Compute the Bradley-Terry loss of a micro-batch. chosen, rejected (pairs,): the scores.

    margin: scalar or (pairs,), by how much chosen should exceed rejected. num_pairs: pairs in the whole optimizer step.
    """
    return -F.logsigmoid(chosen - rejected - margin).sum() / num_pairs


def centering_loss(chosen: Tensor, rejected: Tensor, num_pairs: int) -> Tensor:
    """Compute the mean squared sum of a pair's two scores, which keeps the scores near 0.

    Arguments as in `bradley_terry_loss`.
    """
    return (chosen + rejected).square().sum() / num_pairs


@in_run_folder
def train(cfg: Config) -> Path:
    """Train a reward model, and return its folder."""
    check_flags(cfg)
    tokenizer = load_tokenizer(cfg)
    pairs = load_pairs(cfg, tokenizer, margins=True)
    held_out = load_pairs(on_held_out(cfg), tokenizer, margins=True) if cfg.eval_data else []
    cfg = with_steps(cfg, pairs.parts)
    model = load_scalar_trainee(cfg, cfg.model)
    check_model(model, tokenizer, [*pairs, *held_out], max(map(longest, pairs)))
    learner = Learner(cfg, model)
    evaluation = _evaluation(cfg, model, held_out)
    with Run(cfg, tokenizer, rows=pairs.parts, evaluation=evaluation, model=learner) as run:
        for step in run.steps():
            # 1. the step's pairs, packed: each prompt once, then chosen and rejected
            rows = [pairs[i] for i in run.next()]
            batches = make_batches(rows, cfg.micro_batch_tokens, cfg.device)

            # 2. the scores of both completions, the loss, and its gradient
            for batch in batches:
                # (completions,) -> (pairs, 2) -> two of (pairs,)
                chosen, rejected = batch.scores(model).view(-1, 2).unbind(1)
                margin = torch.tensor([rows[i].margin for i in batch.members], device=cfg.device)
                loss = bradley_terry_loss(chosen, rejected, margin, len(rows))
                if cfg.centering:
                    loss = loss + cfg.centering * centering_loss(chosen, rejected, len(rows))
                learner.backward(loss, batch.share, pair_metrics(chosen, rejected, len(rows)))

            # 3. one step of the optimizer
            metrics = learner.step(step)
            run.log(metrics | learner.balance.metrics(), batches.num_tokens)

        # 4. the shift
        model.bias -= _scores(cfg, model, pairs.first(REFERENCES))[:, 0].mean().item()
        return run.save()


def _scores(cfg: Config, model: ScalarModel, pairs: list[Preference]) -> Tensor:
    """Return the scores of the chosen and the rejected completions, (pairs, 2), without gradients."""
    return over_completions(model, pairs, lambda batch: batch.scores(model), cfg.micro_batch_tokens)


def _evaluation(cfg: Config, model: ScalarModel, held_out: list[Preference]) -> Evaluation | None:
    """Return the evaluation: loss, accuracy and margin. The shift at the end changes none of them."""
    margins, shift = torch.tensor([pair.margin for pair in held_out]), model.bias

    def measure() -> Figures:
        bias, model.bias = model.bias, 0.0  # differences of scores would round differently with another shift
        chosen, rejected = _scores(cfg, model, held_out).unbind(1)  # (pairs,) each
        model.bias = bias

        # the loss of each pair, as of a step of this pair alone
        function = lambda one, other, margin: bradley_terry_loss(one, other, margin, 1)
        losses = torch.vmap(function)(chosen, rejected, margins)
        if cfg.centering:  # with the shift that training had
            centring = lambda one, other: centering_loss(one + shift, other + shift, 1)
            losses += cfg.centering * torch.vmap(centring)(chosen, rejected)
        return {"loss": mean_figure(losses), **pair_figures(chosen, rejected)}

    return Evaluation("pairs", len(held_out), measure) if held_out else None


if __name__ == "__main__":
    sys.exit(run_command("reward", sys.modules[__name__], train, sys.argv[1:]))
