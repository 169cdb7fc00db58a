"""Evaluate a model: answers that a verifier judges, the perplexity of given text, or a reward model's judgement.

    pass@k     = mean over prompts of 1 - C(n - c, k) / C(n, k), with c of n samples right: the unbiased estimate
    majority   = share of prompts whose most frequent answer among n samples is right
    perplexity = exp(-sum_t log pi(y_t) / tokens)
    accuracy   = share of pairs whose chosen completion scores above the rejected one; a tie is wrong

With --reward the model answers the file's prompts, once greedily and --samples times at --temperature; a sample is
right where the first reward function gives it at least --right-at. Without, the completions in the file are scored. A
reward model (burnish reward) judges the file's pairs of chosen and rejected.

Figures: greedy, pass@k, majority (percent), each with its standard error over prompts; reward/<function> (mean over the
samples); metric/<name> (what functions log, mean over the calls); length (tokens), ended (percent); nats (mean -log pi
a token), its standard error over rows, perplexity; of a reward model accuracy (percent) and margin (mean of chosen's
score less rejected's), each with its standard error over pairs, and how many pairs.

Source: pass@k: Chen et al. 2021, https://arxiv.org/abs/2107.03374, eq. 1
        majority: Wang et al. 2022, https://arxiv.org/abs/2203.11171
Run:    burnish evaluate --model DIR --data FILE.jsonl --reward FILE.py:function
"""

import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import comb, exp, inf, isnan, sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

import torch
from tqdm import tqdm

from ..model.checkpoint import has_score, load_model, load_scalar_model
from ..model.errors import InputError
from ..model.generate import Sample, generate
from ..model.packed import pack
from ..model.scalar import ScalarModel
from ..model.text.tokenizer import Tokenizer
from ..model.transformer import Transformer
from .data.batch import longest, over_completions
from .data.examples import Prompt, best_fit, rl_prompts, sft_examples
from .data.groups import as_asked
from .data.pairs import preferences
from .data.rewards import (
    ANSWER,
    NOTHING,
    Rewards,
    TrainerState,
    answers,
    check_weights,
    judge,
    load_reward,
    load_rewards,
    plain,
    takes,
)
from .data.rows import read_rows
from .run.calls import brief
from .run.command import run_command
from .run.flags import RowFlags, load_tokenizer
from .run.loop import (
    MOST_SAMPLES,
    autocast,
    check_flags,
    check_model,
    default_device,
    new_run_folder,
    report_counts,
)


@dataclass(frozen=True)
class Config(RowFlags):
    model: Path  # Hugging Face folder, or an adapter's; a language model or a reward model
    data: Path  # prompts and any columns for the verifier, rows to score, or pairs: .jsonl, .json or .parquet
    reward: tuple[str, ...] = ()  # FILE.py:function or package.module:function; the first says what is right
    answer: str | None = None  # FILE.py:function that gives each completion's answer, for the majority vote
    reward_timeout: float | None = None  # seconds that a call of these functions has; no limit by default
    output: Path = field(default_factory=lambda: new_run_folder("evaluate"))  # new folder: figures, samples
    limit: int | None = None  # the first so many prompts or rows
    right_at: float = 1.0  # the least value of the first reward function that counts as right
    samples: int = 8  # a prompt, beside the greedy one; 0 for that one alone
    k: tuple[int, ...] = (1, 4, 8)  # of pass@k; those above `samples` are left out
    temperature: float = 1.0
    top_k: int | None = None  # sample among the k most likely ids only
    top_p: float | None = None  # sample among the fewest ids with this much probability, at most 1,024
    prompt_column: str | None = None  # the column that holds the prompt, where its name does not say so
    max_prompt_length: int = 1024  # tokens; longer prompts are dropped and counted
    max_new_tokens: int = 256  # cap on a completion's length
    batch_size: int = 64  # samples at a time, which bounds the cache
    train_on: Literal["completion", "all"] = "completion"  # which tokens of a row perplexity is over
    max_length: int = 1024  # tokens; longer rows are truncated, longer pairs dropped, and counted
    micro_batch_tokens: int = 8192  # tokens in one forward, for perplexity and pairs
    seed: int = 0  # of sampling
    device: str = field(default_factory=default_device)


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Probability that k of the samples, drawn without replacement, hold a right one."""
    return 1 - comb(num_samples - num_right, k) / comb(num_samples, k)


def majority_is_right(answers: Sequence[Any], right: Sequence[bool]) -> bool:
    """Whether the most frequent answer is right, the earliest of equally frequent ones; None is no answer."""
    votes = Counter(answer for answer in answers if answer is not None)
    return bool(votes) and right[answers.index(votes.most_common(1)[0][0])]


def evaluate(cfg: Config) -> dict[str, float]:
    """Returns the figures, which it prints and writes as result.json, beside samples.jsonl."""
    check_flags(
        cfg,
        reward_timeout=(1e-3, 1e6),
        limit=(1, inf),
        samples=(0, MOST_SAMPLES),
        temperature=(1e-3, 1e3),
        top_k=(1, inf),
        top_p=(1e-9, 1),
        max_prompt_length=(1, inf),
        max_new_tokens=(1, inf),
        batch_size=(1, inf),
        max_length=(2, inf),
        micro_batch_tokens=(1, inf),
        seed=(0, 2**63 - 1),
    )
    if any(k < 1 for k in cfg.k):
        raise InputError(f"--k: expected numbers of at least 1, got {cfg.k}")
    if cfg.answer and not cfg.reward:
        raise InputError("--answer: expected --reward, which says what answer is right, beside it")
    judges_pairs = has_score(cfg.model)
    if judges_pairs and cfg.reward:
        raise InputError(
            f"--reward: {cfg.model} is a reward model, which answers nothing: leave the flag out"
        )
    functions = load_rewards(cfg.reward) if cfg.reward else {}
    # a state in which training is over, for functions that change with its progress
    rewards = Rewards(
        functions, check_weights((), len(functions)), cfg.reward_timeout, TrainerState(1, 1, 1.0)
    )
    answer = load_reward(cfg.answer, "answer") if cfg.answer else None
    tokenizer = load_tokenizer(cfg)
    rows = read_rows(cfg.data, cfg.row_template)[: cfg.limit]
    if judges_pairs:
        figures, records = evaluate_pairs(
            cfg, load_scalar_model(cfg.model, device=cfg.device), tokenizer, rows
        )
    elif functions:
        model = load_model(cfg.model, device=cfg.device).eval()
        figures, records = evaluate_answers(cfg, model, tokenizer, rows, rewards, answer)
    else:
        model = load_model(cfg.model, device=cfg.device).eval()
        figures, records = evaluate_text(cfg, model, tokenizer, rows)
    written = write(cfg, figures, records)
    print_figures(figures)
    for name in functions:
        if isnan(figures[f"reward/{name}"]):
            print(f"reward {brief(name, 100)}: {NOTHING}")
    print(f"\nwritten: {written}")
    return figures


def evaluate_answers(
    cfg: Config,
    model: Transformer,
    tokenizer: Tokenizer,
    rows: Sequence[dict[str, Any]],
    rewards: Rewards,
    answer: Callable[..., Any] | None,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Returns the figures, and one record a completion."""
    functions = [*rewards.functions.values(), *([] if answer is None else [answer])]
    prompts, counts = rl_prompts(
        rows,
        tokenizer,
        max_length=cfg.max_prompt_length,
        prompt_column=cfg.prompt_column,
        takes=lambda column: any(takes(function, column) for function in functions),
    )
    report_counts(cfg.data, counts)
    rewards.check(prompts[0].columns, answer)
    most = max(len(prompt.tokens) for prompt in prompts) + cfg.max_new_tokens
    check_model(model, tokenizer, prompts, most)
    once = replace(cfg, samples=1, temperature=0.0)
    greedy = judged(once, model, tokenizer, prompts, rewards, answer)
    figures = with_error("greedy", [100.0 * record["right"] for record in greedy])
    sampled: list[dict[str, Any]] = []
    if cfg.samples:
        rewards.logged = {}  # of the greedy ones
        sampled = judged(cfg, model, tokenizer, prompts, rewards, answer)
        groups = [sampled[i : i + cfg.samples] for i in range(0, len(sampled), cfg.samples)]
        right = [sum(record["right"] for record in group) for group in groups]
        for k in sorted(k for k in set(cfg.k) if k <= cfg.samples):
            figures |= with_error(f"pass@{k}", [100 * pass_at_k(cfg.samples, c, k) for c in right])
        if answer is not None:
            votes = [
                majority_is_right([r["answer"] for r in group], [r["right"] for r in group])
                for group in groups
            ]
            figures |= with_error("majority", [100.0 * vote for vote in votes])
    records = sampled or greedy
    for name in rewards.functions:
        figures[f"reward/{name}"] = _mean(
            [r["rewards"][name] for r in records if r["rewards"][name] is not None]
        )
    figures |= rewards.metrics()
    figures["length"] = _mean([record["length"] for record in records])
    figures["ended"] = _mean([100.0 * record["ended"] for record in records])
    return figures, greedy + sampled


def judged(
    cfg: Config,
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    rewards: Rewards,
    answer: Callable[..., Any] | None,
) -> list[dict[str, Any]]:
    """Sample, verify, and describe: one record a completion, those of prompt 0 first."""
    with tqdm(total=len(prompts) * cfg.samples, unit="sample", dynamic_ncols=True) as bar:
        bar.set_description("samples" if cfg.temperature else "greedy")

        def show(done: int, _: int) -> None:
            bar.update(done - bar.n)

        with autocast(cfg.device):
            samples: list[Sample] = generate(
                model,
                [prompt.tokens for prompt in prompts],
                samples_per_prompt=cfg.samples,
                max_new_tokens=cfg.max_new_tokens,
                temperature=cfg.temperature,
                top_k=cfg.top_k,
                top_p=cfg.top_p,
                vocabulary=tokenizer.vocabulary,
                stop_ids=tokenizer.stop_ids,
                seed=cfg.seed,
                batch_size=cfg.batch_size,
                progress=show,
            )
    asked = [prompts[sample.prompt_index] for sample in samples]
    judging = as_asked(tokenizer, asked, samples)
    judgement = judge(rewards, judging)
    rewards.add(judgement.logged)
    verdict = next(iter(judgement.parts.values()))  # NaN, not judged, is not right
    voted, extras = [None] * len(samples), judgement.extras
    if answer is not None:
        voted, more = answers(answer, rewards, judging)
        if shared := sorted(extras.keys() & more.keys()):
            raise InputError(
                f"{ANSWER}: log_extra: column '{shared[0]}' is that of a reward: expected another"
            )
        extras = extras | more
    return [
        {
            "prompt": prompt.text,
            "completion": text,
            "greedy": cfg.temperature == 0,
            "right": bool(verdict[i] >= cfg.right_at),
            "answer": voted[i],
            "rewards": {
                name: None if part[i].isnan() else part[i].item() for name, part in judgement.parts.items()
            },
            "length": len(sample.tokens),
            "ended": sample.ended,
            **({"extra": {column: values[i] for column, values in extras.items()}} if extras else {}),
        }
        for i, (prompt, text, sample) in enumerate(zip(asked, judging.completions, samples, strict=True))
    ]


def evaluate_text(
    cfg: Config, model: Transformer, tokenizer: Tokenizer, rows: Sequence[dict[str, Any]]
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Returns the figures, and one record an example."""
    examples, counts = sft_examples(rows, tokenizer, max_length=cfg.max_length, train_on=cfg.train_on)
    report_counts(cfg.data, counts)
    check_model(model, tokenizer, examples, max(len(example.tokens) for example in examples))
    records: list[dict[str, Any]] = [{} for _ in examples]
    for members in tqdm(best_fit([len(e.tokens) for e in examples], cfg.micro_batch_tokens), unit="batch"):
        trained = [torch.tensor(examples[i].mask) for i in members]
        scored = torch.cat(trained).nonzero().squeeze(1).to(cfg.device)
        with torch.no_grad(), autocast(cfg.device):
            packed = pack([examples[i].tokens for i in members], device=cfg.device)
            logprob, _, _ = model.score(packed, scored)
        for i, part in zip(members, logprob.double().split([int(m.sum()) for m in trained]), strict=True):
            records[i] = {"nats": -part.sum().item(), "tokens": part.numel()}
    tokens = sum(record["tokens"] for record in records)
    nats = sum(record["nats"] for record in records) / tokens
    # of a ratio of sums, rows being the independent draws
    residuals = [record["nats"] - nats * record["tokens"] for record in records]
    error = stdev(residuals) * sqrt(len(residuals)) / tokens if len(residuals) > 1 else 0.0
    return {"nats": nats, "nats_error": error, "perplexity": exp(min(nats, 700)), "tokens": tokens}, records


def evaluate_pairs(
    cfg: Config, model: ScalarModel, tokenizer: Tokenizer, rows: Sequence[dict[str, Any]]
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Returns the figures of a reward model, and one record a pair."""
    pairs, counts = preferences(rows, tokenizer, max_length=cfg.max_length, margins=False)
    report_counts(cfg.data, counts)
    check_model(model, tokenizer, pairs, max(map(longest, pairs)))
    function = lambda batch: batch.scores(model)
    scores = over_completions(model, pairs, function, cfg.micro_batch_tokens).tolist()  # (pairs, 2)
    figures = with_error("accuracy", [100.0 * (chosen > rejected) for chosen, rejected in scores])
    figures |= with_error("margin", [chosen - rejected for chosen, rejected in scores])
    return figures | {"pairs": len(pairs)}, [{"chosen": c, "rejected": r, "right": c > r} for c, r in scores]


def with_error(name: str, values: Sequence[float]) -> dict[str, float]:
    """Mean, and the standard error of the mean, of one value a prompt or pair."""
    error = stdev(values) / sqrt(len(values)) if len(values) > 1 else 0.0
    return {name: fmean(values), f"{name}_error": error}


def print_figures(figures: dict[str, float]) -> None:
    print()
    errors = {f"{name}_error": name for name in figures if "/" not in name}  # users' names have a slash
    for name, value in figures.items():
        if name not in errors:
            error = None if "/" in name else figures.get(f"{name}_error")
            print(
                f"{brief(name, 100):<24}{value:>12.4g}" + (f"  +- {error:.2g}" if error is not None else "")
            )


def write(cfg: Config, figures: dict[str, float], records: Sequence[dict[str, Any]]) -> Path:
    try:
        cfg.output.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(plain(record), ensure_ascii=False) + "\n" for record in records]
        # what UTF-8 cannot hold, half of a surrogate pair, is escaped as JSON does it
        samples = "".join(lines).encode("utf-8", "backslashreplace")
        (cfg.output / "samples.jsonl").write_bytes(samples)
        known = {name: None if isnan(value) else value for name, value in figures.items()}
        result = {"figures": known, "config": asdict(cfg)}
        (cfg.output / "result.json").write_text(json.dumps(result, indent=2, default=str) + "\n")
    except OSError as error:
        raise InputError(f"--output {cfg.output}: cannot be written: {error}") from error
    return cfg.output / "result.json"


def _mean(values: Sequence[float]) -> float:
    return fmean(values) if values else float("nan")


if __name__ == "__main__":
    sys.exit(run_command("evaluate", sys.modules[__name__], evaluate, sys.argv[1:]))
