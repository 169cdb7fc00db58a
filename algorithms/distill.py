"""Distillation: a student learns the teacher's whole distribution over each next token.

    divergence        loss = sum_t D(p_T || p_S)_t / N       p = softmax(logits / T)
    policy_gradient   loss = -sum_t rho_t A_t / N            A_t = log p_T(y_t) - log p_S(y_t), y sampled from p_S
    sequence          loss = -sum_t log p_S(y_t) / N         y written by the teacher

    D: beta = 0   KL(p_T || p_S), forward: the student covers everything that the teacher may say
       beta = 1   KL(p_S || p_T), reverse: the student keeps to the teacher's likely tokens
       between    beta KL(p_T || m) + (1 - beta) KL(p_S || m),  m = beta p_T + (1 - beta) p_S

N is the number of trained tokens in the whole optimizer step. The completions are trained, with their end token. For
beta 0 and 1, D is a KL by definition, because the mixture's formula tends to 0 at both ends.

--student-samples, GKD's lambda, is the share of steps in which the student itself answers the prompts. In these steps
the student learns from texts with its own mistakes. As in GKD, the choice is drawn once per batch, here from the seed
and the step.

policy_gradient requires the student's own samples. Its expected gradient is that of the reverse KL at each visited
state. The discount is 0: a token gets no credit for later tokens. rho_t has the value 1 and the gradient of log p_S.

--data may be a file of lessons that `burnish teach` wrote. Without --teacher, D is then computed from the stored top-k
log-probabilities. It compares K + 1 outcomes: the K stored ids of a token, and one tail that stands for all other ids.

Departure: --temperature divides the logits of both models, as in Hinton et al. Their factor T^2, which preserves the
size of the gradient, is the separate flag --temperature-squared.

Source: Hinton et al. 2015, https://arxiv.org/abs/1503.02531, section 2
        GKD: Agarwal et al. 2023, https://arxiv.org/abs/2306.13649, eq. 1 and algorithm 1
        policy gradient: https://thinkingmachines.ai/blog/on-policy-distillation; Kim and Rush 2016, arXiv 1606.07947
Run:    burnish distill --model STUDENT --teacher DIR --data FILE.jsonl
"""

import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..model.errors import InputError
from ..model.text.tokenizer import Tokenizer
from ..model.transformer import Transformer
from ..model.vocabulary import Vocabulary
from .data.items import Items
from .data.lessons import Lesson, answered, are_lessons, load_lessons
from .data.tokenizer import check_tokenizer, load_tokenizer
from .objectives.policy import clipped_loss
from .run.batch import Batch, longest, make_batches, over_completions
from .run.checks import check_flags
from .run.claim import in_run_folder
from .run.command import run_command
from .run.data_files import arguments_of
from .run.flags import Data, SamplingFlags, Schedule, Share, Size, SupervisedFlags, run_folder
from .run.held_out import Evaluation, Figure, Figures, on_held_out
from .run.ids import check_model
from .run.learner import Learner
from .run.loop import Run
from .run.order import with_steps
from .run.start import trained_tokens
from .run.trainee import load_frozen, load_trainee
from .search.figures import mean_figure, ratio_figure


@dataclass(frozen=True, kw_only=True)
class Config(SamplingFlags, SupervisedFlags):
    model: Path  # the student: Hugging Face folder or adapter's folder to start from
    data: Data  # rows as for sft; prompts with --student-samples 1; or lessons of burnish teach
    teacher: Path | None = None  # folder of a model with the same tokenizer; optional with lessons
    output: Path = run_folder("distill")
    loss: Literal["divergence", "policy_gradient", "sequence"] = "divergence"  # the loss; see docs/distill.md
    beta: Share | None = None  # for divergence: 0 is forward KL, 1 reverse KL, between is JSD (default: 0)
    temperature: float = 1.0  # temperature of both models' distributions, and of sampling
    temperature_squared: bool = False  # multiply the divergence by T^2, to preserve the gradient's size
    student_samples: Share = 0.0  # share of steps on the student's samples; the rest use the rows' text
    max_length: int = 1024  # tokens; longer rows are truncated, longer prompts dropped; both are counted
    samples: Size = 8  # samples of a step that are written to samples.jsonl
    learning_rate: float = 2e-5
    schedule: Schedule = "cosine"


# ---- losses


def divergence_loss(divergence: Tensor, num_tokens: int, scale: float = 1.0) -> Tensor:
    """Compute scale times the sum of the tokens' divergences, divided by num_tokens.

    divergence (tokens,): the divergence of each trained token, in nats. num_tokens: trained tokens in the whole
    optimizer step. scale: T^2 with --temperature-squared, otherwise 1.
    """
    return scale * divergence.sum() / num_tokens


def policy_gradient_loss(logprob: Tensor, teacher_logprob: Tensor, num_tokens: int) -> Tensor:
    """Compute the policy-gradient loss, whose value estimates KL(p_S || p_T) per token.

    logprob, teacher_logprob (tokens,): both models' log-probabilities of the student's own samples.
    """
    advantage = teacher_logprob - logprob.detach()  # (tokens,)
    return clipped_loss(logprob, logprob.detach(), advantage, num_tokens)[0]


def sequence_loss(logprob: Tensor, num_tokens: int) -> Tensor:
    """Compute the negative log-likelihood of the teacher's text. logprob (tokens,): the student's log-probabilities."""
    return -logprob.sum() / num_tokens


# ---- divergences of a micro-batch's tokens


def teacher_divergence(cfg: Config, student: Transformer, teacher: Transformer, batch: Batch) -> Tensor:
    """Return D(p_T || p_S) of each trained token, (tokens,), from teacher T to student S, over the ids of both."""
    # samples were drawn from a vocabulary; for given text, ids that only one model has are padding
    vocabulary = batch.vocabulary
    if vocabulary is None:
        vocabulary = Vocabulary(min(student.config.vocab_size, teacher.config.vocab_size))

    hidden, head = batch.before_head(student, vocabulary)  # (tokens, C), of V rows
    with torch.no_grad():
        teacher_hidden, teacher_head = batch.before_head(teacher, vocabulary)  # (tokens, C'), of V rows
    return head.token_divergence(
        hidden, teacher_hidden, teacher_head, beta=cfg.beta or 0.0, temperature=cfg.temperature
    )


def lessons_divergence(cfg: Config, student: Transformer, teacher: None, batch: Batch) -> Tensor:
    """Return D(p_T || p_S) of each trained token, (tokens,), with p_T from the lessons.

    The divergence is over the K ids that the lessons hold for each token, and one tail for all other ids.
    """
    assert batch.teacher_ids is not None and batch.teacher_logprobs is not None
    stored = batch.teacher_ids, batch.teacher_logprobs  # (tokens, K) each
    hidden, head = batch.before_head(student)  # (tokens, C), of V rows
    return head.topk_divergence(hidden, *stored, beta=cfg.beta or 0.0, temperature=cfg.temperature)


def log_ratio(cfg: Config, student: Transformer, teacher: Transformer, batch: Batch) -> Tensor:
    """Return log p_S(y_t) - log p_T(y_t) of each trained token, (tokens,): KL(p_S || p_T) for samples of S."""
    return batch.score(student, cfg.temperature)[0] - batch.score(teacher, cfg.temperature)[0]


def negative_logprob(cfg: Config, student: Transformer, teacher: None, batch: Batch) -> Tensor:
    """Return -log p_S(y_t) of each trained token, (tokens,)."""
    return -batch.score(student)[0]


def scale_of(cfg: Config) -> float:
    """Return the factor of the divergence in the loss."""
    return cfg.temperature**2 if cfg.temperature_squared else 1.0


# ---- terms: a micro-batch's part of the step's loss and metrics

Term = tuple[Tensor, dict[str, Tensor]]


def divergence_term(
    cfg: Config, student: Transformer, teacher: Transformer | None, batch: Batch, num_tokens: int
) -> Term:
    """Return (loss, metrics) of a micro-batch: the loss is sum_t D(p_T || p_S)_t / N, from teacher T to student S."""
    divergence = DIVERGENCES["divergence", teacher is not None](cfg, student, teacher, batch)  # (tokens,)
    metrics = {"divergence": divergence.detach().sum() / num_tokens}
    return divergence_loss(divergence, num_tokens, scale_of(cfg)), metrics


def policy_gradient_term(
    cfg: Config, student: Transformer, teacher: Transformer, batch: Batch, num_tokens: int
) -> Term:
    """Return (loss, metrics) of a micro-batch: the loss is -sum_t rho_t A_t / N.

    A_t = log p_T(y_t) - log p_S(y_t), for teacher T and student S. rho_t has the value 1 and the gradient of log p_S.
    """
    logprob, entropy = batch.score(student, cfg.temperature)  # (tokens,) each
    with torch.no_grad():
        teacher_logprob, _ = batch.score(teacher, cfg.temperature)  # (tokens,)
    metrics = {"entropy": entropy.detach().sum() / num_tokens}
    return policy_gradient_loss(logprob, teacher_logprob, num_tokens), metrics


def sequence_term(cfg: Config, student: Transformer, teacher: None, batch: Batch, num_tokens: int) -> Term:
    """Return (loss, metrics) of a micro-batch: the loss is -sum_t log p_S(y_t) / N on the teacher's text."""
    logprob, entropy = batch.score(student)  # (tokens,) each
    return sequence_loss(logprob, num_tokens), {"entropy": entropy.detach().sum() / num_tokens}


# (--loss, whether --teacher is given): what its loss is of each token, and its term
DIVERGENCES: dict[tuple[str, bool], Callable[..., Tensor]] = {
    ("divergence", True): teacher_divergence,
    ("divergence", False): lessons_divergence,
    ("policy_gradient", True): log_ratio,
    ("sequence", False): negative_logprob,
}
TERMS: dict[tuple[str, bool], Callable[..., Term]] = {
    ("divergence", True): divergence_term,
    ("divergence", False): divergence_term,
    ("policy_gradient", True): policy_gradient_term,
    ("sequence", False): sequence_term,
}


@in_run_folder
def train(cfg: Config) -> Path:
    """Train the student, and return its folder."""
    check_flags(cfg)
    _check_choices(cfg)
    tokenizer = load_tokenizer(cfg)
    lessons = _load_lessons(cfg, tokenizer)
    held_out = _load_lessons(on_held_out(cfg), tokenizer, "eval-data") if cfg.eval_data else []
    cfg = with_steps(cfg, lessons.parts)
    student, teacher = _load_models(cfg, tokenizer, [*lessons, *held_out])
    term = TERMS[cfg.loss, teacher is not None]

    learner, tokens = Learner(cfg, student), trained_tokens(lessons)
    evaluation = _evaluation(cfg, tokenizer, student, teacher, held_out)
    with Run(
        cfg,
        tokenizer,
        rows=lessons.parts,
        tokens=tokens,
        frozen=(teacher,),
        evaluation=evaluation,
        model=learner,
    ) as run:
        for step in run.steps():
            # 1. the step's lessons; by chance (--student-samples) the student's answers to their prompts
            chosen = [lessons[i] for i in run.next()]
            seed, sampled, records = (cfg.seed << 32) + step, {}, []
            if random.Random(seed).random() < cfg.student_samples:
                with run.timed("sampling_seconds"):
                    prompts = [lesson.prefix for lesson in chosen]
                    chosen, ended = answered(student, tokenizer, prompts, cfg, seed)
                length, share = sum(sum(lesson.mask) for lesson in chosen), sum(ended) / len(chosen)
                sampled = {"length": length / len(chosen), "ended": share}
                records = _records(tokenizer, chosen[: cfg.samples], ended)

            # 2. the loss against the teacher, and its gradient
            batches = make_batches(chosen, cfg.micro_batch_tokens, cfg.device)
            for batch in batches:
                loss, metrics = term(cfg, student, teacher, batch, batches.num_trained)
                learner.backward(loss, batch.share, metrics)

            # 3. one step of the optimizer
            facts = {"trained_tokens": batches.num_trained, "student_samples": float(bool(sampled))}
            metrics = learner.step(step) | facts | sampled | {"sampling_seconds": 0.0} | run.seconds
            run.log(metrics | learner.balance.metrics(), batches.num_tokens)
            run.log_samples(records)
        return run.save()


def _evaluation(
    cfg: Config,
    tokenizer: Tokenizer,
    student: Transformer,
    teacher: Transformer | None,
    held_out: Sequence[Lesson],
) -> Evaluation | None:
    """Return the evaluation: what the loss is of a held-out token, and of a divergence the divergence itself.

    With --student-samples 1, the held-out rows are prompts. The student then answers each once, always from the same
    noise, and length and ended of the answers are figures, too.
    """
    divergence = DIVERGENCES[cfg.loss, teacher is not None]

    def measure() -> Figures:
        figures: Figures = {}
        lessons = held_out
        if cfg.student_samples == 1:
            prompts = [lesson.prefix for lesson in held_out]
            lessons, ended = answered(student, tokenizer, prompts, cfg, (cfg.seed << 32) + 2**32 - 1)
            lengths = torch.tensor([float(sum(lesson.mask)) for lesson in lessons])
            figures = {"length": mean_figure(lengths), "ended": mean_figure(torch.tensor(ended).double())}

        of_batch = lambda batch: batch.sums(divergence(cfg, student, teacher, batch))
        sums = over_completions(student, lessons, of_batch, cfg.micro_batch_tokens).squeeze(1)
        found = ratio_figure(sums, [sum(lesson.mask) for lesson in lessons])
        if cfg.loss != "divergence":
            return {"loss": found, **figures}
        scale = scale_of(cfg)
        return {
            "loss": Figure(scale * found.mean, scale * found.error, found.count),
            "divergence": found,
            **figures,
        }

    return Evaluation("rows", len(held_out), measure) if held_out else None


def _records(tokenizer: Tokenizer, lessons: Sequence[Lesson], ended: Sequence[bool]) -> list[dict[str, Any]]:
    """Return one JSON object per sample of the student, a line of samples.jsonl. No reward function judges them."""
    return [
        {
            "prompt": tokenizer.decode(lesson.prefix),
            "completion": tokenizer.decode(lesson.tokens[len(lesson.prefix) :]),
            "reward": None,
            "rewards": {},
            "length": sum(lesson.mask),
            "ended": has_ended,
        }
        for lesson, has_ended in zip(lessons, ended, strict=False)
    ]


def _check_choices(cfg: Config) -> None:
    """Raise InputError for flags that contradict each other, and for flags that would be ignored."""
    loss, share, alone = cfg.loss, cfg.student_samples, cfg.teacher is None
    of_rows = not are_lessons(cfg.data)

    refused = {  # message: whether it applies
        f"--beta: --loss {loss} has none: leave the flag out": (
            loss != "divergence" and cfg.beta is not None
        ),
        f"--temperature-squared: --loss {loss} has none: leave the flag out": (
            loss != "divergence" and cfg.temperature_squared
        ),
        "--loss policy_gradient: expected --student-samples 1: it trains on the student's own samples": (
            loss == "policy_gradient" and share < 1
        ),
        "--student-samples: --loss sequence trains on the teacher's text: leave the flag out": (
            loss == "sequence" and share > 0
        ),
        "--temperature: --loss sequence has none: leave the flag out": (
            loss == "sequence" and cfg.temperature != 1
        ),
        "--teacher: --loss sequence reads its text from --data (burnish teach): leave the flag out": (
            loss == "sequence" and not alone
        ),
        "--student-samples: stored lessons do not cover the student's samples: expected --teacher DIR": (
            alone and not of_rows and share > 0
        ),
        "expected --teacher DIR, or as --data a file that burnish teach wrote, got neither": (
            alone and of_rows and loss != "sequence"
        ),
    }

    for message, is_so in refused.items():
        if is_so:
            raise InputError(message)


def _load_lessons(cfg: Config, tokenizer: Tokenizer, flag: str = "data") -> Items[Lesson]:
    """Load the lessons of --data. Raises InputError if the loss needs log-probabilities and the lessons have none.

    flag: the flag that the message names.
    """
    reads_stored = cfg.teacher is None and cfg.loss == "divergence"
    lessons = load_lessons(
        cfg,
        tokenizer,
        prompts_alone=cfg.student_samples == 1,
        temperature=cfg.temperature if reads_stored else None,
    )
    if reads_stored and lessons[0].logprobs is None:
        file = arguments_of(cfg.data)[0]
        raise InputError(f"--{flag} {file}: holds no log-probabilities: expected --teacher DIR beside it")
    return lessons


def _load_models(
    cfg: Config, tokenizer: Tokenizer, lessons: Sequence[Lesson]
) -> tuple[Transformer, Transformer | None]:
    """Return (student, teacher). The teacher is None without --teacher.

    Raises InputError if the tokenizers differ, or if a model has no row for a token id of the lessons.
    """
    student, teacher = load_trainee(cfg), None
    most_tokens = max(map(longest, lessons)) + (cfg.max_new_tokens if cfg.student_samples else 0)
    check_model(student, tokenizer, lessons, most_tokens)
    if cfg.teacher is not None:
        check_tokenizer(cfg.teacher, tokenizer, "teacher")
        teacher = load_frozen(cfg.teacher, cfg.device)
        check_model(teacher, tokenizer, lessons, most_tokens, f"--teacher {cfg.teacher}")
    return student, teacher


if __name__ == "__main__":
    sys.exit(run_command("distill", sys.modules[__name__], train, sys.argv[1:]))
