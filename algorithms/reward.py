"""Reward model from preferences.

    loss = sum over pairs [-log sigmoid(r_w - r_l - margin) + c (r_w + r_l)^2] / N

over the N pairs of the whole optimizer step: the model of Bradley and Terry, in which r_w - r_l are the log-odds that
the chosen completion beats the rejected one. r is a linear head on the last token of a completion, its end token: the
token itself is looked up, not the one before the first padding, which a pad token equal to eos would move.
margin is the row's own number, where it has one; c holds the scores near 0, which the loss alone leaves free: it knows
only differences. For the same reason the scores are shifted at the end, so that those of chosen completions average 0.

A pair is one forward pass: chosen and rejected continue the same prompt.

Metrics: loss, accuracy (share of pairs with r_w > r_l), margin (mean of r_w - r_l), chosen, rejected (mean scores,
before the final shift), grad_norm (before clipping), learning_rate; with experts, docs/moe.md's.

Source: Ouyang et al. 2022, https://arxiv.org/abs/2203.02155, eq. 1
        margin: Touvron et al. 2023, https://arxiv.org/abs/2307.09288, eq. 2
        centering: Eisenstein et al. 2023, https://arxiv.org/abs/2312.09244
        shift: Stiennon et al. 2020, https://arxiv.org/abs/2009.01325, section 3.4
Run:    burnish reward --model DIR --data FILE.jsonl
"""

import sys
from dataclasses import dataclass, field
from math import inf
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .data.pairs import (
    Preference,
    completion_scores,
    load_pairs,
    longest,
    micro_batches,
    num_tokens,
    pair_metrics,
    report_held_out,
)
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
    scheduled,
)
from .run.processes import shard, summed
from .run.trainee import ADAPTER_BOUNDS, load_scalar_trainee

REFERENCES = 128  # chosen completions whose mean score becomes 0


@dataclass(frozen=True)
class Config(TrainingFlags):
    model: Path  # Hugging Face folder, or an adapter's, to start from: a language model, or an earlier reward model
    data: Path  # rows of chosen and rejected, perhaps prompt and margin: .jsonl, .json or .parquet
    held_out: Path | None = None  # such rows, to report the accuracy on before and after
    output: Path = field(default_factory=lambda: new_run_folder("reward"))  # new folder: metrics, model
    centering: float = 0.0  # c: 0.01 keeps scores near 0 while training
    max_length: int = 1024  # tokens of a prompt with either completion; longer rows are dropped and counted
    steps: int = 1000  # optimizer steps
    batch_size: int = 64  # pairs in one optimizer step
    micro_batch_tokens: int = 8192  # tokens in one forward and backward; gradients add up over micro-batches
    learning_rate: float = 1e-5  # AdamW's, at its peak
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
    seed: int = 0  # of the order of rows, and of a fresh head
    device: str = field(default_factory=default_device)


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | float, num_pairs: int) -> Tensor:
    """chosen, rejected (pairs,): scores. margin: scalar or (pairs,), by how much the first should exceed the second.

    num_pairs: of the whole optimizer step.
    """
    return -F.logsigmoid(chosen - rejected - margin).sum() / num_pairs


def centering_loss(chosen: Tensor, rejected: Tensor, num_pairs: int) -> Tensor:
    """Square of the sum of a pair's scores: least where they lie on either side of 0. Arguments as above."""
    return (chosen + rejected).square().sum() / num_pairs


def train(cfg: Config) -> Path:
    """Returns the folder of the trained model."""
    check_flags(
        cfg,
        centering=(0, inf),
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
    pairs, held_out = (load_pairs(path, tokenizer, cfg, margins=True) for path in (cfg.data, cfg.held_out))
    model = load_scalar_trainee(cfg, cfg.model)
    check_model(model, tokenizer, [*pairs, *held_out], max(map(longest, pairs)))
    balance = Balance(cfg, model)
    shard(model)
    optimizer = make_optimizer(model, cfg.learning_rate, cfg.weight_decay)

    def scores(pairs: list[Preference]) -> Tensor:  # of chosen and rejected, (pairs, 2)
        return completion_scores(model, pairs, cfg.micro_batch_tokens, cfg.device)

    before = scores(held_out)
    with Run(cfg, model=model, optimizer=optimizer) as run:
        batches = epochs(len(pairs), cfg.batch_size, cfg.seed, skip=run.start)
        for step in run.steps():
            batch = [pairs[i] for i in next(batches)]
            sums: dict[str, float] = {}
            for micro in micro_batches(batch, cfg.micro_batch_tokens, cfg.device):
                with autocast(cfg.device):
                    values = model.values(micro.packed, micro.last)
                chosen, rejected = values.view(-1, 2).unbind(1)  # (pairs,)
                margin = torch.tensor([batch[i].margin for i in micro.members], device=cfg.device)
                loss = bradley_terry_loss(chosen, rejected, margin, len(batch))
                if cfg.centering:
                    loss = loss + cfg.centering * centering_loss(chosen, rejected, len(batch))
                (loss + balance.loss(micro.share)).backward()  # of experts, where the model has some
                added = {"loss": loss.item(), **pair_metrics(chosen, rejected, len(batch))}
                sums = {name: sums.get(name, 0.0) + value for name, value in added.items()}
            sums = summed(sums)
            rate = scheduled(cfg.learning_rate, step, cfg.steps, cfg.warmup_steps, cfg.schedule)
            norm = optimizer_step(model, optimizer, sums["loss"], rate, cfg.max_grad_norm)
            run.log(
                {**sums, "grad_norm": norm, "learning_rate": rate, **balance.metrics()},
                tokens=sum(num_tokens(pair) for pair in batch),
            )
            run.save_step(model, tokenizer)
        model.bias -= scores(pairs[:REFERENCES])[:, 0].mean().item()
        if held_out:
            report_held_out(run.folder, before=before, after=scores(held_out))
        return run.save(model, tokenizer)


if __name__ == "__main__":
    sys.exit(run_command("reward", sys.modules[__name__], train, sys.argv[1:]))
