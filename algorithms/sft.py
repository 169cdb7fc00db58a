"""Supervised fine-tuning.

    loss = -sum_t log pi(y_t | y_<t) / N

N is the number of trained tokens in the whole optimizer step. By default the completions are trained, with their end
token. --train-on all trains every token. Sequences are packed end to end, and each attends only to itself. So packing
changes neither the loss nor the gradient.

--loss dft weights each token by its own probability. This removes the factor 1/pi from the gradient, so that rare
tokens do not dominate it.

Source: Ouyang et al. 2022, https://arxiv.org/abs/2203.02155
        DFT: Wu et al. 2025, https://arxiv.org/abs/2508.05629, eq. 9
Run:    burnish sft --model DIR --data FILE.jsonl
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from ..model.transformer import Transformer
from .data.examples import Example, load_examples
from .data.tokenizer import load_tokenizer
from .run.batch import longest, make_batches, over_completions
from .run.checks import check_flags
from .run.claim import in_run_folder
from .run.command import run_command
from .run.flags import Data, DropoutFlags, Schedule, SupervisedFlags, run_folder
from .run.held_out import Evaluation, Figures, on_held_out
from .run.ids import check_model
from .run.learner import Learner
from .run.loop import Run
from .run.order import with_steps
from .run.start import trained_tokens
from .run.trainee import load_trainee
from .search.figures import perplexity_figure, ratio_figure


@dataclass(frozen=True, kw_only=True)
class Config(DropoutFlags, SupervisedFlags):
    data: Data  # rows of messages, prompt and completion, text, Alpaca or ShareGPT: .jsonl, .parquet, .arrow, ...
    output: Path = run_folder("sft")
    train_on: Literal["completion", "all"] = "completion"  # which tokens of a row are trained
    loss: Literal["nll", "dft"] = "nll"  # dft weights each token by its probability
    max_length: int = 1024  # tokens of a row; longer rows are truncated and counted
    learning_rate: float = 2e-5
    schedule: Schedule = "cosine"


def sft_loss(logprob: Tensor, num_tokens: int) -> Tensor:
    """Compute the negative log-likelihood per trained token.

    logprob (tokens,): log-probabilities of the trained tokens, in nats. num_tokens: trained tokens in the whole
    optimizer step.
    """
    return -logprob.sum() / num_tokens


def dft_loss(logprob: Tensor, num_tokens: int) -> Tensor:
    """Compute `sft_loss` with each term scaled by pi(y_t), without gradient (eq. 9). Arguments as in `sft_loss`."""
    return -(logprob.detach().exp() * logprob).sum() / num_tokens


LOSSES = {"nll": sft_loss, "dft": dft_loss}


@in_run_folder
def train(cfg: Config) -> Path:
    """Train by supervised fine-tuning, and return the folder of the trained model."""
    check_flags(cfg)
    tokenizer = load_tokenizer(cfg)
    examples = load_examples(cfg, tokenizer)
    held_out = load_examples(on_held_out(cfg), tokenizer) if cfg.eval_data else []
    cfg = with_steps(cfg, examples.parts)
    model = load_trainee(cfg)
    check_model(model, tokenizer, [*examples, *held_out], max(map(longest, examples)))

    learner = Learner(cfg, model)
    tokens, evaluation = trained_tokens(examples), _evaluation(cfg, model, held_out)
    run = Run(cfg, tokenizer, rows=examples.parts, tokens=tokens, evaluation=evaluation, model=learner)
    with run:
        for step in run.steps():
            # 1. the step's rows, packed end to end
            rows = [examples[i] for i in run.next()]
            batches = make_batches(rows, cfg.micro_batch_tokens, cfg.device)

            # 2. log-probabilities of the trained tokens, the loss, and its gradient
            for batch in batches:
                logprob, _ = batch.score(model)  # (tokens,)
                loss = LOSSES[cfg.loss](logprob, batches.num_trained)
                learner.backward(loss, batch.share)

            # 3. one step of the optimizer
            metrics = learner.step(step) | {"trained_tokens": batches.num_trained}
            run.log(metrics | learner.balance.metrics(), batches.num_tokens)
        return run.save()


def _evaluation(cfg: Config, model: Transformer, held_out: list[Example]) -> Evaluation | None:
    """Return the evaluation: nats a trained token, perplexity, and with --loss dft that loss, too.

    The value of dft_loss, -pi log pi, rises and then falls while pi rises, so it does not tell which model is better.
    """
    counts = [sum(example.mask) for example in held_out]

    def of_each(function: Callable[[Tensor], Tensor]) -> Tensor:  # sums over a row's trained tokens, (rows,)
        on_batch = lambda batch: batch.sums(function(batch.score(model)[0]))
        return over_completions(model, held_out, on_batch, cfg.micro_batch_tokens).squeeze(1)

    def measure() -> Figures:
        loss = ratio_figure(of_each(lambda logprob: -logprob), counts)
        figures = {"loss": loss, "perplexity": perplexity_figure(loss)}
        if cfg.loss == "dft":
            figures["dft_loss"] = ratio_figure(of_each(lambda logprob: -logprob.exp() * logprob), counts)
        return figures

    return Evaluation("rows", len(held_out), measure) if held_out else None


if __name__ == "__main__":
    sys.exit(run_command("sft", sys.modules[__name__], train, sys.argv[1:]))
