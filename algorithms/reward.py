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

from .data.pairs import Preference, load_pairs
from .data.tokenizer import load_tokenizer
from .objectives.preference import pair_metrics
from .run.batch import longest, make_batches, over_completions
from .run.checks import check_flags
from .run.command import run_command
from .run.flags import Data, DropoutFlags, Rate, Schedule, SupervisedFlags, run_folder
from .run.held_out import report_held_out
from .run.ids import check_model
from .run.learner import Learner
from .run.loop import Run
from .run.order import with_steps
from .run.trainee import load_scalar_trainee

REFERENCES = 128  # number of chosen completions whose mean score becomes 0


@dataclass(frozen=True, kw_only=True)
class Config(DropoutFlags, SupervisedFlags):
    model: Path  # folder to start from: a language model, a reward model, or an adapter of either
    data: Data  # rows of chosen and rejected, optionally prompt and margin: .jsonl, .json, .parquet or .arrow
    held_out: Path | None = None  # file of pairs whose accuracy is reported before and after training
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


def train(cfg: Config) -> Path:
    """Train a reward model, and return its folder."""
    check_flags(cfg)
    tokenizer = load_tokenizer(cfg)
    pairs, held_out = (load_pairs(path, tokenizer, cfg, margins=True) for path in (cfg.data, cfg.held_out))
    cfg = with_steps(cfg, pairs.parts)
    model = load_scalar_trainee(cfg, cfg.model)
    check_model(model, tokenizer, [*pairs, *held_out], max(map(longest, pairs)))
    learner = Learner(cfg, model)
    run = Run(cfg, tokenizer, rows=pairs.parts, model=learner)

    def scores(items: list[Preference]) -> Tensor:  # (pairs, 2): chosen, rejected
        return over_completions(model, items, lambda batch: batch.scores(model), cfg.micro_batch_tokens)

    before = scores(held_out)
    with run:
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

            # 3. one step of AdamW
            metrics = learner.step(step)
            run.log(metrics | learner.balance.metrics(), batches.num_tokens)

        # 4. the shift, and the held-out pairs
        model.bias -= scores(pairs.first(REFERENCES))[:, 0].mean().item()
        if held_out:
            report_held_out(run.folder, before=before, after=scores(held_out))
        return run.save()


if __name__ == "__main__":
    sys.exit(run_command("reward", sys.modules[__name__], train, sys.argv[1:]))
