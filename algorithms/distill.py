"""Distillation: a student learns the teacher's distribution over each next token, not one token of it.

    divergence        loss = sum_t D(p_T || p_S)_t / N       p = softmax(logits / T)
    policy_gradient   loss = -sum_t rho_t A_t / N            A_t = log p_T(y_t) - log p_S(y_t), y sampled from p_S
    sequence          loss = -sum_t log p_S(y_t) / N         y written by the teacher

    D: beta = 0   KL(p_T || p_S), forward: the student covers all that the teacher may say
       beta = 1   KL(p_S || p_T), reverse: it keeps to what the teacher is likely to say
       between    beta KL(p_T || m) + (1 - beta) KL(p_S || m),  m = beta p_T + (1 - beta) p_S

over the N trained tokens of the whole optimizer step: completions with their end token. 0 and 1 stand for the two KLs
by definition; the limit of the mixture's formula there is 0. --student-samples is the share of steps, GKD's lambda, in
which the student itself answers the prompts, so that it learns where its own mistakes lead. policy_gradient has on
average the gradient of the reverse KL at each state it visits, discount 0: a token does not answer for later ones; rho
is 1, with pi's gradient. --data may be a file of lessons that `burnish teach` wrote, then no teacher is loaded: with
stored top-k log-probabilities D is over those ids and the tail, all other ids taken as one.

Departures: --temperature divides both logits, as in Hinton et al.; their T^2, which holds the size of the gradient, is
a flag of its own. GKD draws lambda once a batch; so do we, from the seed and the step.

Metrics: loss; divergence (nats a token, without T^2); trained_tokens (N); student_samples (1 where the student wrote
this step's completions); length and ended of those: their tokens and the share that a stop token ended; entropy (nats,
the student's; policy_gradient and sequence); grad_norm (before clipping); learning_rate; sampling_seconds; moe.md's.

Source: Hinton et al. 2015, https://arxiv.org/abs/1503.02531, section 2
        GKD: Agarwal et al. 2023, https://arxiv.org/abs/2306.13649, eq. 1 and algorithm 1
        policy gradient: https://thinkingmachines.ai/blog/on-policy-distillation; Kim and Rush 2016, arXiv 1606.07947
Run:    burnish distill --model STUDENT --teacher DIR --data FILE.jsonl
"""

import random
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..model.checkpoint import load_model
from ..model.errors import InputError
from ..model.transformer import Transformer
from ..model.vocabulary import Vocabulary
from .data.groups import timed
from .data.lessons import MicroBatch, answered, load_lessons, micro_batches
from .objectives.policy import clipped_loss
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
    check_tokenizer,
    default_device,
    epochs,
    make_optimizer,
    new_run_folder,
    optimizer_step,
    scheduled,
)
from .run.processes import host, reshard, shard, summed
from .run.trainee import ADAPTER_BOUNDS, load_trainee


@dataclass(frozen=True)
class Config(TrainingFlags):
    model: Path  # the student: Hugging Face folder to start from, or an adapter's
    data: Path  # rows as for SFT, prompts with --student-samples 1, or a teacher's lessons.safetensors
    teacher: Path | None = None  # folder of a model with the same tokenizer; none beside lessons
    output: Path = field(default_factory=lambda: new_run_folder("distill"))  # new folder: metrics, model
    loss: Literal["divergence", "policy_gradient", "sequence"] = "divergence"
    beta: float | None = None  # of divergence: 0 forward KL, which is the default; 1 reverse KL; between: JSD
    temperature: float = 1.0  # of both distributions, and of sampling
    temperature_squared: bool = False  # times T^2, which holds the size of the divergence's gradient
    student_samples: float = (
        0.0  # share of steps on what the student samples; the others on the rows' completions
    )
    max_new_tokens: int = 256  # cap on a sampled completion's length
    sampling_batch_size: int | None = None  # samples at a time, which bounds the cache; all by default
    max_length: int = 1024  # tokens; longer rows are truncated, longer prompts dropped, and counted
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
    base_4bit: bool = False  # hold the frozen weights in 4 bits (NF4): QLoRA
    save_every: int = 0  # steps between checkpoints; 0 saves the model once, at the end
    save_dtype: SaveDtype = "auto"  # of what is written; auto: that of --model, tensor by tensor
    resume: bool = False  # go on from the last checkpoint in --output
    checkpoint_activations: bool = False  # run each layer again in the backward: less memory, more time
    seed: int = 0  # of the order of rows, and of sampling
    device: str = field(default_factory=default_device)


def divergence_loss(divergence: Tensor, num_tokens: int, scale: float = 1.0) -> Tensor:
    """divergence (tokens,): D of each trained token, in nats. scale: T^2 where the gradient's size is to be held.

    num_tokens: trained tokens in the whole optimizer step.
    """
    return scale * divergence.sum() / num_tokens


def policy_gradient_loss(logprob: Tensor, teacher_logprob: Tensor, num_tokens: int) -> Tensor:
    """logprob, teacher_logprob (tokens,): of the student's own samples. The value estimates KL(p_S || p_T) a token."""
    advantage = teacher_logprob - logprob.detach()  # (tokens,)
    return clipped_loss(logprob, logprob.detach(), advantage, num_tokens)[0]


def sequence_loss(logprob: Tensor, num_tokens: int) -> Tensor:
    """logprob (tokens,): the student's, of what the teacher wrote."""
    return -logprob.sum() / num_tokens


def train(cfg: Config) -> Path:
    """Returns the folder of the trained model."""
    check_flags(
        cfg,
        beta=(0, 1),
        temperature=(1e-3, 1e3),
        student_samples=(0, 1),
        max_new_tokens=(1, inf),
        sampling_batch_size=(1, inf),
        max_length=(2, inf),
        steps=(1, inf),
        batch_size=(1, inf),
        micro_batch_tokens=(1, inf),
        learning_rate=(0, inf),
        warmup_steps=(0, inf),
        weight_decay=(0, inf),
        max_grad_norm=(1e-12, inf),
        **ADAPTER_BOUNDS,
        save_every=(0, inf),
        seed=(0, 2**31 - 1),
    )
    _check_choices(cfg)
    tokenizer = load_tokenizer(cfg)
    lessons = load_lessons(
        cfg.data,
        tokenizer,
        row_template=cfg.row_template,
        max_length=cfg.max_length,
        prompts_alone=cfg.student_samples == 1,
        temperature=cfg.temperature if cfg.teacher is None and cfg.loss == "divergence" else None,
    )
    if cfg.teacher is None and cfg.loss == "divergence" and lessons[0].logprobs is None:
        raise InputError(f"--data {cfg.data}: holds no log-probabilities: expected --teacher DIR beside it")
    model = load_trainee(cfg)
    longest = max(len(lesson.tokens) for lesson in lessons) + (
        cfg.max_new_tokens if cfg.student_samples else 0
    )
    check_model(model, tokenizer, lessons, longest)
    teacher = None
    if cfg.teacher is not None:
        check_tokenizer(cfg.teacher, tokenizer, "teacher")
        dtype = torch.bfloat16 if cfg.device.startswith("cuda") else torch.float32
        teacher = load_model(cfg.teacher, dtype, host(cfg.device)).requires_grad_(False).eval()
        check_model(teacher, tokenizer, lessons, longest, f"--teacher {cfg.teacher}")
    balance = Balance(cfg, model)
    shard(model, teacher)
    optimizer = make_optimizer(model, cfg.learning_rate, cfg.weight_decay)
    with Run(cfg, model=model, optimizer=optimizer) as run:
        batches = epochs(len(lessons), cfg.batch_size, cfg.seed, skip=run.start)
        for step in run.steps():
            batch, seed = [lessons[i] for i in next(batches)], (cfg.seed << 32) + step
            seconds, sampled = {"sampling_seconds": 0.0}, {}
            if own := random.Random(seed).random() < cfg.student_samples:
                with timed(seconds, "sampling_seconds", cfg.device):
                    batch, ended = answered(
                        model,
                        tokenizer,
                        [lesson.prompt for lesson in batch],
                        temperature=cfg.temperature,
                        max_new_tokens=cfg.max_new_tokens,
                        batch_size=cfg.sampling_batch_size,
                        seed=seed,
                    )
                sampled = {"length": sum(sum(lesson.mask) for lesson in batch) / len(batch), "ended": ended}
            num_tokens = sum(sum(lesson.mask) for lesson in batch)
            num_all = sum(len(lesson.tokens) for lesson in batch)
            sums: dict[str, float] = defaultdict(float)
            for micro in micro_batches(batch, cfg.micro_batch_tokens, cfg.device):
                with autocast(cfg.device):
                    loss, metrics = _term(cfg, model, teacher, micro, num_tokens)
                share = sum(len(batch[i].tokens) for i in micro.members) / num_all
                (loss + balance.loss(share)).backward()  # of experts, where the model has some
                for name, value in ({"loss": loss} | metrics).items():
                    sums[name] += value.item()
            reshard(teacher)
            sums = summed(sums)
            rate = scheduled(cfg.learning_rate, step, cfg.steps, cfg.warmup_steps, cfg.schedule)
            sums["grad_norm"] = optimizer_step(model, optimizer, sums["loss"], rate, cfg.max_grad_norm)
            facts = {"learning_rate": rate, "trained_tokens": num_tokens, "student_samples": float(own)}
            run.log(sums | facts | sampled | seconds | balance.metrics(), tokens=num_all)
            run.save_step(model, tokenizer)
        return run.save(model, tokenizer)


def _check_choices(cfg: Config) -> None:
    """Refuse flags that go ill together, or would be ignored."""
    stored = cfg.data.suffix == ".safetensors"
    if cfg.loss != "divergence":
        for flag, given in (("beta", cfg.beta is not None), ("temperature-squared", cfg.temperature_squared)):
            if given:
                raise InputError(f"--{flag}: --loss {cfg.loss} has none: leave the flag out")
    if cfg.loss == "policy_gradient" and cfg.student_samples < 1:
        raise InputError(
            "--loss policy_gradient: expected --student-samples 1: it is of the student's own samples"
        )
    if cfg.loss == "sequence" and cfg.student_samples:
        raise InputError(
            "--student-samples: --loss sequence is of what the teacher wrote: leave the flag out"
        )
    if cfg.loss == "sequence" and cfg.temperature != 1:
        raise InputError("--temperature: --loss sequence has none: leave the flag out")
    if cfg.loss == "sequence" and cfg.teacher is not None:
        raise InputError("--teacher: --loss sequence reads what it wrote (burnish teach): leave the flag out")
    if stored and cfg.teacher is None and cfg.student_samples:
        raise InputError("--student-samples: stored lessons say nothing about them: expected --teacher DIR")
    if not stored and cfg.teacher is None and cfg.loss != "sequence":
        raise InputError("expected --teacher DIR, or --data of a file that burnish teach wrote, got neither")


def _term(
    cfg: Config, model: Transformer, teacher: Transformer | None, micro: MicroBatch, num_tokens: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Of one micro-batch: its part of the loss, and of the metrics."""
    targets, T, beta = micro.packed.tokens[micro.rows], cfg.temperature, cfg.beta or 0.0
    vocabulary = micro.vocabulary
    if vocabulary is not None:
        targets = vocabulary.rows_of(targets)
    elif teacher is not None and cfg.loss == "divergence":  # ids that only one has are padding, no tokens
        vocabulary = Vocabulary(min(model.config.vocab_size, teacher.config.vocab_size))
    hidden, head = model.before_head(micro.packed, micro.rows, vocabulary)  # (n, C), of V rows
    theirs = None
    if teacher is not None:
        with torch.no_grad():
            theirs = teacher.before_head(micro.packed, micro.rows, vocabulary)
    if cfg.loss == "divergence":
        if theirs is not None:
            found = head.token_divergence(hidden, *theirs, beta=beta, temperature=T)
        else:
            assert micro.ids is not None and micro.logprobs is not None
            found = head.topk_divergence(hidden, micro.ids, micro.logprobs, beta=beta, temperature=T)
        loss = divergence_loss(found, num_tokens, T**2 if cfg.temperature_squared else 1.0)
        return loss, {"divergence": found.detach().sum() / num_tokens}
    logprob, _, entropy = head.token_logprobs(hidden, targets, temperature=T)
    metrics = {"entropy": entropy.detach().sum() / num_tokens}
    if theirs is None:
        return sequence_loss(logprob, num_tokens), metrics
    teacher_hidden, teacher_head = theirs
    teacher_logprob, _, _ = teacher_head.token_logprobs(teacher_hidden, targets, temperature=T)
    return policy_gradient_loss(logprob, teacher_logprob, num_tokens), metrics


if __name__ == "__main__":
    sys.exit(run_command("distill", sys.modules[__name__], train, sys.argv[1:]))
