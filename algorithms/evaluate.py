"""Evaluate a model: answers that a verifier judges, the perplexity of given text, or a reward model's judgement.

    pass@k     = mean over prompts of 1 - C(n - c, k) / C(n, k), with c of n samples right: the unbiased estimate
    majority   = share of prompts whose most frequent answer among n samples is right
    perplexity = exp(-sum_t log pi(y_t) / tokens)
    accuracy   = share of pairs whose chosen completion scores above the rejected one; a tie is wrong

With --reward the model answers the file's prompts, once greedily and --samples times at --temperature; a sample is
right where the first reward function gives it at least --right-at. Without, the completions in the file are scored. A
reward model (burnish reward) judges the file's pairs of chosen and rejected.

Source: pass@k: Chen et al. 2021, https://arxiv.org/abs/2107.03374, eq. 1
        majority: Wang et al. 2022, https://arxiv.org/abs/2203.11171
Run:    burnish evaluate --model DIR --data FILE.jsonl --reward FILE.py:function
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from math import exp, isnan
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, NamedTuple

import torch
from tqdm import tqdm

from ..model.checkpoint import has_score, load_model, load_scalar_model
from ..model.errors import InputError
from ..model.files.replacing import replacing
from ..model.generate import Sample, generate
from ..model.scalar import ScalarModel
from ..model.text.tokenizer import Tokenizer
from ..model.transformer import Transformer
from .data.examples import Prompt, rl_prompts, sft_examples
from .data.functions import TrainerState, plain, takes
from .data.groups import as_asked
from .data.pairs import preferences
from .data.rewards import (
    ANSWER,
    NOTHING,
    Rewards,
    answers,
    check_weights,
    judge,
    load_rewards,
)
from .data.row import Row
from .data.rows import read_rows, report_counts
from .data.tokenizer import load_tokenizer
from .run.batch import LazyBatches, longest, over_completions
from .run.calls import brief
from .run.command import run_command
from .run.flags import (
    AnswerFlags,
    Count,
    DeviceFlags,
    Length,
    RowFlags,
    Samples,
    Seed,
    Temperature,
    check_flags,
    make_folder,
    run_folder,
)
from .run.ids import check_model
from .run.optimizer import autocast
from .run.user_files import load_function
from .search.votes import majority_is_right, pass_at_k, standard_error, standard_error_of_ratio

Figures = dict[str, float]  # by name
Record = dict[str, Any]  # a line of samples.jsonl


@dataclass(frozen=True, kw_only=True)
class Config(DeviceFlags, AnswerFlags, RowFlags):
    model: Path  # Hugging Face folder, or an adapter's; a language model or a reward model
    data: Path  # prompts and any columns for the verifier, rows to score, or pairs: .jsonl, .json or .parquet
    reward: tuple[str, ...] = ()  # FILE.py:function or package.module:function; the first says what is right
    answer: str | None = None  # FILE.py:function that gives each completion's answer, for the majority vote
    reward_timeout: float | None = None  # seconds that a call of these functions has; no limit by default
    output: Path = run_folder("evaluate")  # new folder: figures, samples
    limit: Count | None = None  # the first so many prompts or rows
    right_at: float = 1.0  # the least value of the first reward function that counts as right
    samples: Samples = 8  # a prompt, beside the greedy one; 0 for that one alone
    k: tuple[int, ...] = (1, 4, 8)  # of pass@k; those above `samples` are left out
    temperature: Temperature = 1.0  # of sampling
    max_new_tokens: Count = 256  # cap on a completion's length
    batch_size: Count = 64  # samples at a time, which bounds the cache
    train_on: Literal["completion", "all"] = "completion"  # which tokens of a row perplexity is over
    max_length: Length = 1024  # tokens; longer rows are truncated, longer pairs dropped, and counted
    micro_batch_tokens: Count = 8192  # tokens in one forward, for perplexity and pairs
    seed: Seed = 0  # of sampling


def evaluate(cfg: Config) -> Figures:
    """Returns the figures, which it prints and writes as result.json, beside samples.jsonl."""
    # 1. flags that fit, and who judges
    check_flags(cfg)
    if any(k < 1 for k in cfg.k):
        raise InputError(f"--k: expected numbers of at least 1, got {cfg.k}")
    if cfg.answer and not cfg.reward:
        raise InputError("--answer: expected --reward, which says what answer is right, beside it")
    judges_pairs = has_score(cfg.model)
    if judges_pairs and cfg.reward:
        raise InputError(
            f"--reward: {cfg.model} is a reward model, which answers nothing: leave the flag out"
        )
    verifier = load_verifier(cfg)

    # 2. rows, and what the model makes of them
    tokenizer = load_tokenizer(cfg)
    rows = read_rows(cfg.data, cfg.row_template)[: cfg.limit]
    if judges_pairs:
        reward_model = load_scalar_model(cfg.model, device=cfg.device)
        figures, records = evaluate_pairs(cfg, reward_model, tokenizer, rows)
    else:
        model = load_model(cfg.model, device=cfg.device).eval()
        if cfg.reward:
            figures, records = evaluate_answers(cfg, model, tokenizer, rows, verifier)
        else:
            figures, records = evaluate_text(cfg, model, tokenizer, rows)

    # 3. two files, and the figures on the terminal
    written = write(cfg, figures, records)
    print_figures(figures)
    for name in verifier.rewards.functions:
        if isnan(figures[f"reward/{name}"]):
            print(f"reward {brief(name, 100)}: {NOTHING}")
    print(f"\nwritten: {written}")
    return figures


# ---- answers to prompts


class Verifier(NamedTuple):
    """The functions of --reward, the first of which says what is right, and that of --answer, which finds answers."""

    rewards: Rewards
    answer: Callable[..., Any] | None

    def takes(self, column: str) -> bool:
        """Whether one of them reads a column of the rows."""
        functions = [*self.rewards.functions.values(), *([] if self.answer is None else [self.answer])]
        return any(takes(function, column) for function in functions)


def load_verifier(cfg: Config) -> Verifier:
    """Raises InputError for a function that is not there."""
    functions = load_rewards(cfg.reward) if cfg.reward else {}
    over = TrainerState(1, 1, 1.0)  # training is, for functions that change with its progress
    rewards = Rewards(functions, check_weights((), len(functions)), cfg.reward_timeout, over)
    return Verifier(rewards, load_function(cfg.answer, "answer") if cfg.answer else None)


def evaluate_answers(
    cfg: Config, model: Transformer, tokenizer: Tokenizer, rows: Sequence[Row], verifier: Verifier
) -> tuple[Figures, list[Record]]:
    """Returns the figures, and one record a completion."""
    # 1. the prompts
    prompts, counts = rl_prompts(
        rows,
        tokenizer,
        max_length=cfg.max_prompt_length,
        prompt_column=cfg.prompt_column,
        takes=verifier.takes,
    )
    report_counts(cfg.data, counts)
    rewards = verifier.rewards
    rewards.check(prompts[0].columns, verifier.answer)
    longest_prompt = max(len(prompt.tokens) for prompt in prompts)
    check_model(model, tokenizer, prompts, longest_prompt + cfg.max_new_tokens)

    # 2. one greedy answer to each, then the samples
    greedily = replace(cfg, samples=1, temperature=0.0)
    greedy = judged(greedily, model, tokenizer, prompts, verifier)
    figures = with_error("greedy", [100.0 * record["right"] for record in greedy])
    sampled: list[Record] = []
    if cfg.samples:
        rewards.logged = {}  # of the greedy ones
        sampled = judged(cfg, model, tokenizer, prompts, verifier)
        groups = [sampled[i : i + cfg.samples] for i in range(0, len(sampled), cfg.samples)]
        figures |= figures_of_groups(cfg, groups)

    # 3. what the functions gave and logged; lengths
    records = sampled or greedy
    for name in rewards.functions:
        found = [record["rewards"][name] for record in records]
        figures[f"reward/{name}"] = _mean([reward for reward in found if reward is not None])
    figures |= rewards.metrics()
    figures["length"] = _mean([record["length"] for record in records])
    figures["ended"] = _mean([100.0 * record["ended"] for record in records])
    return figures, greedy + sampled


def figures_of_groups(cfg: Config, groups: Sequence[Sequence[Record]]) -> Figures:
    """pass@k, and with --answer the majority vote, of each prompt's samples."""
    figures: Figures = {}
    num_right = [sum(record["right"] for record in group) for group in groups]
    for k in sorted(k for k in set(cfg.k) if k <= cfg.samples):
        figures |= with_error(f"pass@{k}", [100 * pass_at_k(cfg.samples, c, k) for c in num_right])

    if cfg.answer is not None:
        votes = [
            majority_is_right([record["answer"] for record in group], [record["right"] for record in group])
            for group in groups
        ]
        figures |= with_error("majority", [100.0 * vote for vote in votes])
    return figures


def judged(
    cfg: Config, model: Transformer, tokenizer: Tokenizer, prompts: Sequence[Prompt], verifier: Verifier
) -> list[Record]:
    """Sample, verify, and describe: one record a completion, those of prompt 0 first."""
    # 1. samples, and what the functions say of them; the first one's NaN, not judged, is not right
    samples = sample(cfg, model, tokenizer, prompts)
    asked = [prompts[each.prompt_index] for each in samples]
    judging = as_asked(tokenizer, asked, samples)
    judgement = judge(verifier.rewards, judging)
    verifier.rewards.add(judgement.logged)
    verdict = next(iter(judgement.parts.values()))

    # 2. their answers
    extras, found = judgement.extras, [None for _ in samples]
    if verifier.answer is not None:
        found, more = answers(verifier.answer, verifier.rewards, judging)
        if shared := sorted(extras.keys() & more.keys()):
            raise InputError(
                f"{ANSWER}: log_extra: column '{shared[0]}' is that of a reward: expected another"
            )
        extras = extras | more

    # 3. a record of each
    return [
        {
            "prompt": prompt.text,
            "completion": text,
            "greedy": cfg.temperature == 0,
            "right": bool(verdict[i] >= cfg.right_at),
            "answer": found[i],
            "rewards": {
                name: None if part[i].isnan() else part[i].item() for name, part in judgement.parts.items()
            },
            "length": len(each.tokens),
            "ended": each.ended,
            **({"extra": {column: values[i] for column, values in extras.items()}} if extras else {}),
        }
        for i, (prompt, text, each) in enumerate(zip(asked, judging.completions, samples, strict=True))
    ]


def sample(cfg: Config, model: Transformer, tokenizer: Tokenizer, prompts: Sequence[Prompt]) -> list[Sample]:
    """The samples of each prompt, those of prompt 0 first, beside a bar of progress."""
    with tqdm(total=len(prompts) * cfg.samples, unit="sample", dynamic_ncols=True) as bar:
        bar.set_description("samples" if cfg.temperature else "greedy")

        def show(done: int, _: int) -> None:
            bar.update(done - bar.n)

        with autocast(cfg.device):
            return generate(
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


# ---- given text


def evaluate_text(
    cfg: Config, model: Transformer, tokenizer: Tokenizer, rows: Sequence[Row]
) -> tuple[Figures, list[Record]]:
    """Returns the figures, and one record an example."""
    examples, counts = sft_examples(rows, tokenizer, max_length=cfg.max_length, train_on=cfg.train_on)
    report_counts(cfg.data, counts)
    check_model(model, tokenizer, examples, max(map(longest, examples)))

    # 1. -log pi of each row's trained tokens
    records: list[Record] = [{} for _ in examples]
    for batch in tqdm(LazyBatches(examples, cfg.micro_batch_tokens, cfg.device), unit="batch"):
        with torch.no_grad():
            logprob, _ = batch.score(model)  # (tokens,)
        of_each = logprob.double().split(batch.lengths.tolist())
        for i, of_row in zip(batch.members, of_each, strict=True):
            records[i] = {"nats": -of_row.sum().item(), "tokens": of_row.numel()}

    # 2. over all tokens; of such a ratio of sums the rows are the independent draws
    nats, tokens = [record["nats"] for record in records], [record["tokens"] for record in records]
    mean = sum(nats) / sum(tokens)
    figures = {
        "nats": mean,
        "nats_error": standard_error_of_ratio(nats, tokens),
        "perplexity": exp(min(mean, 700)),
        "tokens": sum(tokens),
    }
    return figures, records


def evaluate_pairs(
    cfg: Config, model: ScalarModel, tokenizer: Tokenizer, rows: Sequence[Row]
) -> tuple[Figures, list[Record]]:
    """Returns the figures of a reward model, and one record a pair."""
    pairs, counts = preferences(rows, tokenizer, max_length=cfg.max_length, margins=False)
    report_counts(cfg.data, counts)
    check_model(model, tokenizer, pairs, max(map(longest, pairs)))

    score = lambda batch: batch.scores(model)
    scores = over_completions(model, pairs, score, cfg.micro_batch_tokens).tolist()  # (pairs, 2)
    figures = with_error("accuracy", [100.0 * (chosen > rejected) for chosen, rejected in scores])
    figures |= with_error("margin", [chosen - rejected for chosen, rejected in scores])
    return figures | {"pairs": len(pairs)}, [{"chosen": c, "rejected": r, "right": c > r} for c, r in scores]


# ---- what is written


def with_error(name: str, values: Sequence[float]) -> Figures:
    """Mean, and the standard error of the mean, of one value a prompt or pair."""
    return {name: fmean(values), f"{name}_error": standard_error(values)}


def print_figures(figures: Figures) -> None:
    print()
    errors = {f"{name}_error": name for name in figures if "/" not in name}  # users' names have a slash
    for name, value in figures.items():
        if name not in errors:
            error = None if "/" in name else figures.get(f"{name}_error")
            print(
                f"{brief(name, 100):<24}{value:>12.4g}" + (f"  +- {error:.2g}" if error is not None else "")
            )


def write(cfg: Config, figures: Figures, records: Sequence[Record]) -> Path:
    """Write samples.jsonl and result.json; returns the path of the latter."""
    lines = [json.dumps(plain(record), ensure_ascii=False) + "\n" for record in records]
    make_folder(cfg.output)
    with replacing(cfg.output / "samples.jsonl") as beside:
        # what UTF-8 cannot hold, half of a surrogate pair, is escaped as JSON does it
        beside.write_bytes("".join(lines).encode("utf-8", "backslashreplace"))

    known = {name: None if isnan(value) else value for name, value in figures.items()}
    result = {"figures": known, "config": asdict(cfg)}
    with replacing(cfg.output / "result.json") as beside:
        beside.write_text(json.dumps(result, indent=2, default=str) + "\n")
    return cfg.output / "result.json"


def _mean(values: Sequence[float]) -> float:
    return fmean(values) if values else float("nan")


if __name__ == "__main__":
    sys.exit(run_command("evaluate", sys.modules[__name__], evaluate, sys.argv[1:]))
