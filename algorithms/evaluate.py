"""Evaluate a model: accuracy under a verifier, perplexity of given text, or accuracy of a reward model.

    pass@k     = mean over prompts of 1 - C(n - c, k) / C(n, k), with c of n samples right; the unbiased estimate
    majority   = share of prompts whose most frequent answer among n samples is right
    perplexity = exp(-sum_t log pi(y_t) / tokens)
    accuracy   = share of pairs whose chosen completion scores above the rejected one; a tie is wrong

With --reward, the model answers the prompts of --data, once greedily and --samples times at --temperature. At
--temperature 0 the greedy answer is the only one, and pass@1 is the share of prompts that it solves. A sample is right
if the first reward function gives it at least --right-at. Without --reward, the perplexity of the completions in --data
is computed. If --model is a reward model (burnish reward), it scores the pairs of chosen and rejected in --data.

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
from typing import Annotated, Any, Literal, NamedTuple

import torch

from ..model.checkpoint import has_score, load_model, load_scalar_model
from ..model.errors import InputError
from ..model.files.replacing import replacing
from ..model.generate import Sample, SamplingParams, generate
from ..model.scalar import ScalarModel
from ..model.text.tokenizer import Tokenizer
from ..model.transformer import Transformer
from .data.examples import Example, Prompt, load_examples
from .data.functions import TrainerState, plain, takes
from .data.groups import as_asked, prompts_with_columns
from .data.pairs import Preference, load_pairs
from .data.rewards import (
    ANSWER,
    NOTHING,
    Rewards,
    answers,
    check_weights,
    judge,
    load_rewards,
)
from .data.tokenizer import load_tokenizer
from .run.batch import LazyBatches, longest, over_completions
from .run.calls import brief
from .run.checks import check_flags, make_folder
from .run.command import run_command
from .run.flags import (
    AnswerFlags,
    Bounds,
    Count,
    Data,
    DeviceFlags,
    Length,
    RowFlags,
    Samples,
    Seed,
    run_folder,
)
from .run.ids import check_model
from .run.optimizer import autocast
from .run.user_files import load_function
from .search.votes import majority_is_right, pass_at_k, standard_error, standard_error_of_ratio
from .show.progress import counted

Figures = dict[str, float]  # name: value
Record = dict[str, Any]  # a line of samples.jsonl


@dataclass(frozen=True, kw_only=True)
class Config(DeviceFlags, AnswerFlags, RowFlags):
    model: Path  # folder of a language model or a reward model, or of an adapter of one
    data: Data  # prompts with columns for the verifier, rows as for sft, or pairs: .jsonl, .parquet, .arrow, ...
    reward: tuple[str, ...] = ()  # FILE.py:function or package.module:function; the first tells what is right
    answer: str | None = None  # FILE.py:function that returns each completion's answer, for the majority vote
    reward_timeout: float | None = (
        None  # time limit in seconds of one call of these functions (default: none)
    )
    output: Path = run_folder("evaluate")  # new folder: figures, samples
    limit: Count | None = None  # use only this many rows from the start of each file of --data
    right_at: float = 1.0  # smallest value of the first reward function that counts as right
    samples: Samples = 8  # samples per prompt, besides the greedy answer; 0 for none
    base_4bit: bool = False  # hold the model's weights in 4 bits (NF4)
    k: tuple[int, ...] = (1, 4, 8)  # the k of pass@k; each k above --samples is left out
    temperature: Annotated[float, Bounds(0, 1e3)] = 1.0  # temperature of sampling; 0: the greedy answer alone
    max_new_tokens: Count = 256  # maximum number of tokens in a completion
    batch_size: Count = 64  # samples generated at a time, which bounds the size of the cache
    train_on: Literal["completion", "all"] = "completion"  # which tokens of a row count for perplexity
    max_length: Length = 1024  # tokens; longer rows are truncated, longer pairs dropped; both are counted
    micro_batch_tokens: Count = 8192  # tokens per forward pass, for perplexity and pairs
    seed: Seed = 0  # random seed for sampling


def evaluate(cfg: Config) -> Figures:
    """Evaluate the model. Print the results, write them as result.json beside samples.jsonl, and return them."""
    # 1. check the flags, and load the verifier
    check_flags(cfg)
    _check_together(cfg)
    judges_pairs = has_score(cfg.model)
    if judges_pairs and cfg.reward:
        raise InputError(
            f"--reward: {cfg.model} is a reward model and generates no answers: leave the flag out"
        )
    verifier = load_verifier(cfg)

    # 2. read the rows, and evaluate the model on them
    tokenizer = load_tokenizer(cfg)
    if judges_pairs:
        pairs = load_pairs(cfg, tokenizer, limit=cfg.limit)
        reward_model = load_scalar_model(cfg.model, device=cfg.device, base_4bit=cfg.base_4bit)
        figures, records = evaluate_pairs(cfg, reward_model, tokenizer, pairs)

    elif cfg.reward:
        check = lambda columns: verifier.rewards.check(columns, verifier.answer)
        prompts = prompts_with_columns(cfg, tokenizer, verifier.takes, check, cfg.limit)
        model = load_model(cfg.model, device=cfg.device, base_4bit=cfg.base_4bit).eval()
        figures, records = evaluate_answers(cfg, model, tokenizer, prompts, verifier)

    else:
        examples = load_examples(cfg, tokenizer, cfg.limit)
        model = load_model(cfg.model, device=cfg.device, base_4bit=cfg.base_4bit).eval()
        figures, records = evaluate_text(cfg, model, tokenizer, examples)

    # 3. write both files, and print the figures
    written = write(cfg, figures, records)
    print_figures(figures)
    for name in verifier.rewards.functions:
        if isnan(figures[f"reward/{name}"]):
            print(f"reward {brief(name, 100)}: {NOTHING}")
    print(f"\nwritten: {written}")
    return figures


def _check_together(cfg: Config) -> None:
    """Raise InputError for a flag that would have no effect beside the others, and for a wrong --k."""
    if any(k < 1 for k in cfg.k):
        raise InputError(f"--k: expected numbers of at least 1, got {cfg.k}")
    for name in ("top_k", "top_p"):
        if cfg.temperature == 0 and getattr(cfg, name) is not None:
            flag = f"--{name.replace('_', '-')}"
            raise InputError(
                f"{flag}: expected --temperature above 0 beside it, got 0, which samples nothing"
            )
    if cfg.answer and not cfg.reward:
        raise InputError("--answer: expected --reward beside it, to judge which answers are right")


# ---- answers to prompts


class Verifier(NamedTuple):
    """The functions of --reward and of --answer. The first reward function decides whether a sample is right."""

    rewards: Rewards
    answer: Callable[..., Any] | None

    def takes(self, column: str) -> bool:
        """Return whether one of the functions takes this column of the rows as an argument."""
        functions = [*self.rewards.functions.values(), *([] if self.answer is None else [self.answer])]
        return any(takes(function, column) for function in functions)


def load_verifier(cfg: Config) -> Verifier:
    """Load the functions of --reward and --answer. Raises InputError if a function is not found."""
    functions = load_rewards(cfg.reward) if cfg.reward else {}
    over = TrainerState(1, 1, 1.0)  # training is complete, for functions that depend on its progress
    rewards = Rewards(functions, check_weights((), len(functions)), cfg.reward_timeout, over)
    return Verifier(rewards, load_function(cfg.answer, "answer") if cfg.answer else None)


def evaluate_answers(
    cfg: Config, model: Transformer, tokenizer: Tokenizer, prompts: Sequence[Prompt], verifier: Verifier
) -> tuple[Figures, list[Record]]:
    """Sample answers to the prompts and judge them.

    Returns the results by name, and one record per completion: a line of samples.jsonl.
    """
    # 1. the longest prompt fits the model
    longest_prompt = max(len(prompt.tokens) for prompt in prompts)
    check_model(model, tokenizer, prompts, longest_prompt + cfg.max_new_tokens)

    # 2. one greedy answer to each prompt, then the samples
    rewards = verifier.rewards
    greedily = replace(cfg, samples=1, temperature=0.0)
    greedy = judged(greedily, model, tokenizer, prompts, verifier)
    figures = with_error("greedy", [100.0 * record["right"] for record in greedy])
    sampled: list[Record] = []
    if cfg.samples and cfg.temperature == 0:
        print(
            "--temperature 0: each sample would be the greedy answer, so none is drawn; pass@1 is of that answer"
        )
        figures |= figures_of_groups(replace(greedily, k=(1,)), [[record] for record in greedy])
    elif cfg.samples:
        rewards.logged = {}  # without the logs of the greedy answers
        sampled = judged(cfg, model, tokenizer, prompts, verifier)
        groups = [sampled[i : i + cfg.samples] for i in range(0, len(sampled), cfg.samples)]
        figures |= figures_of_groups(cfg, groups)

    # 3. mean rewards, logged metrics, and lengths
    records = sampled or greedy
    for name in rewards.functions:
        found = [record["rewards"][name] for record in records]
        figures[f"reward/{name}"] = _mean([reward for reward in found if reward is not None])
    figures |= rewards.metrics()
    figures["length"] = _mean([record["length"] for record in records])
    figures["ended"] = _mean([100.0 * record["ended"] for record in records])
    return figures, greedy + sampled


def figures_of_groups(cfg: Config, groups: Sequence[Sequence[Record]]) -> Figures:
    """Compute pass@k, and with --answer the majority vote. groups: for each prompt, its samples' records."""
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
    """Sample completions and judge them. Return one record per completion, in the order of the prompts."""
    # 1. samples and their rewards; a NaN of the first function, not judged, counts as not right
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
                f"{ANSWER}: log_extra: expected a new column, got '{shared[0]}', which a reward function logs"
            )
        extras = extras | more

    # 3. one record for each sample
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
    """Sample completions in the order of the prompts, and show a progress bar."""
    with counted(len(prompts) * cfg.samples, "samples" if cfg.temperature else "greedy", "sample") as bar:

        def show(done: int, _: int) -> None:
            bar.update(done - bar.n)

        params = SamplingParams(
            samples_per_prompt=cfg.samples,
            max_new_tokens=cfg.max_new_tokens,
            temperature=cfg.temperature,
            top_k=cfg.top_k,
            top_p=cfg.top_p,
            vocabulary=tokenizer.vocabulary,
            stop_ids=tokenizer.stop_ids,
            seed=cfg.seed,
        )

        tokens = [prompt.tokens for prompt in prompts]
        with autocast(cfg.device):
            return generate(model, tokens, params, batch_size=cfg.batch_size, progress=show)


# ---- given text


def evaluate_text(
    cfg: Config, model: Transformer, tokenizer: Tokenizer, examples: Sequence[Example]
) -> tuple[Figures, list[Record]]:
    """Compute nats per token and perplexity of the rows. Return the results by name, and one record per row."""
    check_model(model, tokenizer, examples, max(map(longest, examples)))

    # 1. -log pi of each row's trained tokens
    records: list[Record] = [{} for _ in examples]
    batches = LazyBatches(examples, cfg.micro_batch_tokens, cfg.device)
    with counted(len(batches), "evaluate", "batch") as bar:
        for batch in batches:
            with torch.no_grad():
                logprob, _ = batch.score(model)  # (tokens,)
            of_each = logprob.double().split(batch.lengths.tolist())
            for i, of_row in zip(batch.members, of_each, strict=True):
                records[i] = {"nats": -of_row.sum().item(), "tokens": of_row.numel()}
            bar.update()

    # 2. the mean over all tokens, a ratio of sums in which the rows are the independent draws
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
    cfg: Config, model: ScalarModel, tokenizer: Tokenizer, pairs: Sequence[Preference]
) -> tuple[Figures, list[Record]]:
    """Compute accuracy and margin of a reward model. Return the results by name, and one record per pair."""
    check_model(model, tokenizer, pairs, max(map(longest, pairs)))

    score = lambda batch: batch.scores(model)
    scores = over_completions(model, pairs, score, cfg.micro_batch_tokens).tolist()  # (pairs, 2)
    figures = with_error("accuracy", [100.0 * (chosen > rejected) for chosen, rejected in scores])
    figures |= with_error("margin", [chosen - rejected for chosen, rejected in scores])
    return figures | {"pairs": len(pairs)}, [{"chosen": c, "rejected": r, "right": c > r} for c, r in scores]


# ---- output


def with_error(name: str, values: Sequence[float]) -> Figures:
    """Return the mean of `values` under `name`, and its standard error. values: one number per prompt or pair."""
    return {name: fmean(values), f"{name}_error": standard_error(values)}


def print_figures(figures: Figures) -> None:
    print()
    errors = {f"{name}_error": name for name in figures if "/" not in name}  # user names have a slash
    for name, value in figures.items():
        if name not in errors:
            error = None if "/" in name else figures.get(f"{name}_error")
            print(
                f"{brief(name, 100):<24}{value:>12.4g}" + (f"  +- {error:.2g}" if error is not None else "")
            )


def write(cfg: Config, figures: Figures, records: Sequence[Record]) -> Path:
    """Write samples.jsonl and result.json, and return the path of result.json."""
    lines = [json.dumps(plain(record), ensure_ascii=False) + "\n" for record in records]
    make_folder(cfg.output)
    with replacing(cfg.output / "samples.jsonl") as beside:
        # a lone surrogate, which UTF-8 cannot encode, is escaped as in JSON
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
