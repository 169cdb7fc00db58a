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
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..model.packed import pack
from .data.examples import sft_examples
from .data.rows import read_rows
from .run.balance import Balance
from .run.command import run_command
from .run.flags import TrainingFlags, load_tokenizer
from .run.loop import (
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
    report_counts,
    scheduled,
)
from .run.processes import IDLE, shard, shares, summed
from .run.trainee import ADAPTER_BOUNDS, load_trainee


@dataclass(frozen=True)
class Config(TrainingFlags):
    model: Path  # Hugging Face folder to start from, or an adapter's, which training goes on with
    data: Path  # rows of messages, prompt and completion, text, Alpaca or ShareGPT: .jsonl, .json or .parquet
    output: Path = field(default_factory=lambda: new_run_folder("sft"))  # new folder: metrics, model
    train_on: Literal["completion", "all"] = "completion"  # which tokens of a row are trained
    loss: Literal["nll", "dft"] = "nll"  # dft weighs tokens by their probability
    max_length: int = 1024  # tokens; longer rows are truncated and counted
    steps: int = 1000  # optimizer steps
    batch_size: int = 32  # rows in one optimizer step
    micro_batch_tokens: int = 8192  # tokens in one forward and backward; gradients add up over micro-batches
    learning_rate: float = 2e-5  # AdamW's, at its peak
    schedule: Schedule = "cosine"
    warmup_steps: int = 20  # of linear rise to learning_rate
    weight_decay: float = 0.0  # of matrices; vectors have none
    max_grad_norm: float = 1.0  # gradients are scaled down to it
    lora_rank: int = 0  # train an adapter of this rank in place of the weights; 0 trains the weights
    lora_alpha: float | None = None  # the adapter's scale is alpha / rank; 2 * rank by default
    lora_dropout: float = 0.0  # share of its inputs that the adapter does not see in training
    base_4bit: bool = False  # hold the frozen weights in 4 bits (NF4): QLoRA
    save_every: int = 0  # steps between checkpoints; 0 saves the model once, at the end
    save_dtype: SaveDtype = "auto"  # of what is written; auto: that of --model, tensor by tensor
    resume: bool = False  # go on from the last checkpoint in --output
    checkpoint_activations: bool = False  # run each layer again in the backward: less memory, more time
    seed: int = 0  # of the order of rows
    device: str = field(default_factory=default_device)


def sft_loss(logprob: Tensor, num_tokens: int) -> Tensor:
    """logprob (tokens,): of the trained tokens, in nats. num_tokens: trained tokens in the whole optimizer step."""
    return -logprob.sum() / num_tokens


def dft_loss(logprob: Tensor, num_tokens: int) -> Tensor:
    """logprob (tokens,), num_tokens: as in `sft_loss`. Each term is scaled by pi(y_t), without gradient: eq. 9."""
    return -(logprob.detach().exp() * logprob).sum() / num_tokens


LOSSES = {"nll": sft_loss, "dft": dft_loss}


def train(cfg: Config) -> Path:
    """Returns the folder of the trained model."""
    check_flags(
        cfg,
        max_length=(2, inf),
        steps=(1, inf),
        batch_size=(1, inf),
        micro_batch_tokens=(1, inf),
        learning_rate=(0, inf),
        warmup_steps=(0, inf),
        weight_decay=(0, inf),
        max_grad_norm=(1e-12, inf),
        **ADAPTER_BOUNDS,
        lora_dropout=(0, 0.99),
        save_every=(0, inf),
        seed=(0, 2**63 - 1),
    )
    tokenizer = load_tokenizer(cfg)
    rows = read_rows(cfg.data, cfg.row_template)
    examples, counts = sft_examples(rows, tokenizer, max_length=cfg.max_length, train_on=cfg.train_on)
    report_counts(cfg.data, counts)
    model = load_trainee(cfg)
    check_model(model, tokenizer, examples, max(len(example.tokens) for example in examples))
    balance = Balance(cfg, model)
    shard(model)
    optimizer = make_optimizer(model, cfg.learning_rate, cfg.weight_decay)
    with Run(cfg, model=model, optimizer=optimizer) as run:
        batches = epochs(len(examples), cfg.batch_size, cfg.seed, skip=run.start)
        for step in run.steps():
            batch = [examples[i] for i in next(batches)]
            num_tokens = sum(sum(example.mask) for example in batch)
            lengths = [len(example.tokens) for example in batch]
            total_loss = 0.0
            for members in shares(lengths, cfg.micro_batch_tokens):
                packed = pack([batch[i].tokens for i in members] or IDLE, device=cfg.device)
                trained = torch.tensor([m for i in members for m in batch[i].mask])  # (total,)
                with autocast(cfg.device):
                    logprob, _, _ = model.score(packed, trained.nonzero().squeeze(1).to(cfg.device))
                loss = LOSSES[cfg.loss](logprob, num_tokens)
                share = sum(lengths[i] for i in members) / sum(lengths)
                (loss + balance.loss(share)).backward()  # of experts, where the model has some
                total_loss += loss.item()
            total_loss = summed({"loss": total_loss})["loss"]
            rate = scheduled(cfg.learning_rate, step, cfg.steps, cfg.warmup_steps, cfg.schedule)
            norm = optimizer_step(model, optimizer, total_loss, rate, cfg.max_grad_norm)
            run.log(
                {"loss": total_loss, "grad_norm": norm, "learning_rate": rate, "trained_tokens": num_tokens}
                | balance.metrics(),
                tokens=sum(lengths),
            )
            run.save_step(model, tokenizer)
        return run.save(model, tokenizer)


if __name__ == "__main__":
    sys.exit(run_command("sft", sys.modules[__name__], train, sys.argv[1:]))
