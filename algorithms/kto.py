"""Kahneman-Tversky optimization: preferences without pairs.

    loss = sum over completions of v / N        v = lambda_D (1 - sigmoid(beta (r - z)))    where it is wanted
                                                v = lambda_U (1 - sigmoid(beta (z - r)))    where it is not
    r = log pi(y|x) - log pi_ref(y|x)           z = max(0, mean of r over completions of other prompts)

over the N completions of the whole optimizer step. z estimates KL(pi || pi_ref) and has no gradient; it is one number
for the whole step, so it is computed before the first backward pass. A completion of another prompt is the one that
stands half the file away, the same in each epoch.

The reference is the model that training starts from; its log-probabilities are computed once, as in dpo.py.

Metrics: loss, kl (z), chosen, rejected (means of beta r over wanted and unwanted completions), margin (their
difference), grad_norm (before clipping), learning_rate; with experts, docs/moe.md's. A step without completions of one
kind has null there.

Source: Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306, eq. 7 and 8
Run:    burnish kto --model DIR --data FILE.jsonl
"""

import sys
from dataclasses import dataclass, field, replace
from math import ceil, inf
from pathlib import Path

import torch
from torch import Tensor

from .data.pairs import Judged, completion_logprobs, judged_completions, longest, micro_batches, num_tokens
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
from .run.processes import shard, sum_over_processes, summed
from .run.trainee import ADAPTER_BOUNDS, load_trainee


@dataclass(frozen=True)
class Config(TrainingFlags):
    model: Path  # Hugging Face folder, or an adapter's, to start from; also the reference policy
    data: Path  # rows of prompt, completion and label, or of chosen and rejected: .jsonl, .json or .parquet
    output: Path = field(default_factory=lambda: new_run_folder("kto"))  # new folder: metrics, model
    beta: float = 0.1
    wanted_weight: float = (
        1.0  # lambda_D; the paper balances lambda_D n_D and lambda_U n_U to a ratio of 1 to 4/3
    )
    unwanted_weight: float = 1.0  # lambda_U
    max_length: int = 1024  # tokens of a prompt with its completion; longer rows are dropped and counted
    steps: int = 1000  # optimizer steps
    batch_size: int = 32  # completions in one optimizer step; z needs a few
    micro_batch_tokens: int = 8192  # tokens in one forward and backward; gradients add up over micro-batches
    learning_rate: float = 1e-6  # AdamW's, at its peak
    schedule: Schedule = "linear"
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


def kto_loss(
    log_ratio: Tensor,
    wanted: Tensor,
    kl: Tensor | float,
    num_completions: int,
    beta: float,
    wanted_weight: float = 1.0,
    unwanted_weight: float = 1.0,
) -> Tensor:
    """log_ratio (completions,): r, sums over tokens. wanted (completions,) bool. kl: z, without gradient.

    num_completions: of the whole optimizer step.
    """
    gain = torch.where(wanted, log_ratio - kl, kl - log_ratio)
    weight = torch.where(wanted, wanted_weight, unwanted_weight)
    return (weight * (1 - torch.sigmoid(beta * gain))).sum() / num_completions


def train(cfg: Config) -> Path:
    """Returns the folder of the trained model."""
    check_flags(
        cfg,
        beta=(1e-9, inf),
        wanted_weight=(0, inf),
        unwanted_weight=(0, inf),
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
    judged, counts = judged_completions(
        read_rows(cfg.data, cfg.row_template), tokenizer, max_length=cfg.max_length
    )
    report_counts(cfg.data, counts)
    half = len(judged) // 2
    others = [  # each prompt with a completion of another
        replace(one, completion=judged[(i + half) % len(judged)].completion) for i, one in enumerate(judged)
    ]
    model = load_trainee(cfg)
    check_model(model, tokenizer, judged, max(map(longest, judged)))
    balance = Balance(cfg, model)
    shard(model)
    optimizer = make_optimizer(model, cfg.learning_rate, cfg.weight_decay)

    def logprobs(items: list[Judged]) -> Tensor:  # (completions,)
        return completion_logprobs(model, items, cfg.micro_batch_tokens, cfg.device).squeeze(1)

    reference, other_reference = torch.zeros(2, len(judged))
    first_epoch = epochs(len(judged), cfg.batch_size, cfg.seed)
    for _ in range(min(cfg.steps, ceil(len(judged) / cfg.batch_size))):
        members = next(first_epoch)
        reference[members] = logprobs([judged[i] for i in members])
        other_reference[members] = logprobs([others[i] for i in members])
    with Run(cfg, model=model, optimizer=optimizer) as run:
        batches = epochs(len(judged), cfg.batch_size, cfg.seed, skip=run.start)
        for step in run.steps():
            members = next(batches)
            batch = [judged[i] for i in members]
            drift = logprobs([others[i] for i in members]) - other_reference[members]
            kl = drift.mean().clamp(min=0).item()
            labels = torch.tensor([one.label for one in batch])
            total_loss, log_ratios = 0.0, torch.zeros(len(batch))
            for micro in micro_batches(batch, cfg.micro_batch_tokens, cfg.device):
                with autocast(cfg.device):
                    logprob, _, _ = model.score(micro.packed, micro.rows)  # (tokens,)
                ref = reference[[members[i] for i in micro.members]].to(cfg.device)
                log_ratio = micro.sums(logprob) - ref  # (completions,)
                wanted = labels[micro.members].to(cfg.device)
                loss = kto_loss(
                    log_ratio, wanted, kl, len(batch), cfg.beta, cfg.wanted_weight, cfg.unwanted_weight
                )
                (loss + balance.loss(micro.share)).backward()  # of experts, where the model has some
                total_loss += loss.item()
                log_ratios[micro.members] = log_ratio.detach().cpu()
            total_loss, log_ratios = summed({"loss": total_loss})["loss"], sum_over_processes(log_ratios)
            rate = scheduled(cfg.learning_rate, step, cfg.steps, cfg.warmup_steps, cfg.schedule)
            norm = optimizer_step(model, optimizer, total_loss, rate, cfg.max_grad_norm)
            chosen, rejected = (cfg.beta * log_ratios[side].mean() for side in (labels, ~labels))
            run.log(
                {
                    "loss": total_loss,
                    "kl": kl,
                    "margin": chosen - rejected,
                    "chosen": chosen,
                    "rejected": rejected,
                    "grad_norm": norm,
                    "learning_rate": rate,
                    **balance.metrics(),
                },
                tokens=sum(num_tokens(one) for one in batch),
            )
            run.save_step(model, tokenizer)
        return run.save(model, tokenizer)


if __name__ == "__main__":
    sys.exit(run_command("kto", sys.modules[__name__], train, sys.argv[1:]))
