"""Supervised fine-tuning.

    loss = -sum_t log pi(y_t | y_<t) / N

over the N trained tokens of the whole optimizer step: completions with their end token (--train-on all: every one).
Sequences are packed end to end and attend only to themselves, so packing changes neither loss nor gradient.
`dft_loss` weighs each token by its own probability, which removes the 1/pi factor that makes rare tokens dominate the
gradient.

Source: Ouyang et al. 2022, https://arxiv.org/abs/2203.02155
        DFT: Wu et al. 2025, https://arxiv.org/abs/2508.05629, eq. 9
Run:    burnish sft --model DIR --data FILE.jsonl
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from .data.examples import load_examples
from .data.tokenizer import load_tokenizer
from .run.batch import longest, make_batches
from .run.command import run_command
from .run.flags import DropoutFlags, Schedule, SupervisedFlags, check_flags, run_folder
from .run.ids import check_model
from .run.learner import Learner
from .run.loop import Run
from .run.trainee import load_trainee


@dataclass(frozen=True, kw_only=True)
class Config(DropoutFlags, SupervisedFlags):
    data: Path  # rows of messages, prompt and completion, text, Alpaca or ShareGPT: .jsonl, .json or .parquet
    output: Path = run_folder("sft")
    train_on: Literal["completion", "all"] = "completion"  # which tokens of a row are trained
    loss: Literal["nll", "dft"] = "nll"  # dft weighs tokens by their probability
    max_length: int = 1024  # tokens; longer rows are truncated and counted
    learning_rate: float = 2e-5
    schedule: Schedule = "cosine"


def sft_loss(logprob: Tensor, num_tokens: int) -> Tensor:
    """logprob (tokens,): of the trained tokens, in nats. num_tokens: trained tokens in the whole optimizer step."""
    return -logprob.sum() / num_tokens


def dft_loss(logprob: Tensor, num_tokens: int) -> Tensor:
    """logprob (tokens,), num_tokens: as in `sft_loss`. Each term is scaled by pi(y_t), without gradient: eq. 9."""
    return -(logprob.detach().exp() * logprob).sum() / num_tokens


LOSSES = {"nll": sft_loss, "dft": dft_loss}


def train(cfg: Config) -> Path:
    """Returns the folder of the trained model."""
    check_flags(cfg)
    tokenizer = load_tokenizer(cfg)
    examples = load_examples(cfg, tokenizer)
    model = load_trainee(cfg)
    check_model(model, tokenizer, examples, max(map(longest, examples)))

    learner = Learner(cfg, model)
    with Run(cfg, tokenizer, model=learner) as run:
        for step in run.steps():
            # 1. the step's rows, packed end to end
            rows = [examples[i] for i in run.next(len(examples), cfg.batch_size)]
            batches = make_batches(rows, cfg.micro_batch_tokens, cfg.device)

            # 2. their tokens' log-probabilities, the loss, and its gradient
            for batch in batches:
                logprob, _ = batch.score(model)  # (tokens,)
                loss = LOSSES[cfg.loss](logprob, batches.num_trained)
                learner.backward(loss, batch.share)

            # 3. one step of AdamW
            metrics = learner.step(step) | {"trained_tokens": batches.num_trained}
            run.log(metrics | learner.balance.metrics(), batches.num_tokens)
        return run.save()


if __name__ == "__main__":
    sys.exit(run_command("sft", sys.modules[__name__], train, sys.argv[1:]))
