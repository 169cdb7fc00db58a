"""Parts that recipes share: a small random model, the stages of one seed, medians over seeds, and files."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Self, TypeVar

import tokenizers
import torch

from ...model.checkpoint import load_model, save_model
from ...model.errors import InputError
from ...model.files.config_json import read_config
from ...model.files.replacing import reason, replacing
from ...model.generate import Sample, SamplingParams, generate
from ...model.text.tokenizer import Tokenizer
from ...model.transformer import Transformer
from ..run.flags import Count, default_device
from ..show.ending import brief_endings


@dataclass(frozen=True, kw_only=True)
class RecipeFlags:
    """Flags of a recipe that runs once for each seed."""

    output: Path  # new folder: stages, report.html
    seeds: Count = 1  # number of repetitions with different seeds; the figures are medians
    device: str = field(default_factory=default_device)  # cpu, cuda or cuda:N


# ---- models and samples


def random_model(folder: Path, tokenizer: tokenizers.Tokenizer, seed: int, **shape: int) -> Path:
    """Save a Llama with random weights and return its folder.

    shape: hidden_size, intermediate_size, num_hidden_layers, num_attention_heads.
    """
    ours = Tokenizer(tokenizer, eos="<eos>")
    fixed = {
        "model_type": "llama",
        "vocab_size": ours.vocabulary.end,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "bos_token_id": None,
        "eos_token_id": 0,
        "initializer_range": 0.1,
    }
    config = read_config(fixed | shape, str(folder))
    save_model(Transformer(config, seed=seed), folder, ours)
    return folder


def sample(
    folder: Path, tokenizer: Tokenizer, prompts: Sequence[list[int]], device: str, **options: Any
) -> list[Sample]:
    """Sample completions from the model in `folder`, or from the adapter on its base.

    options: fields of SamplingParams.
    """
    model = load_model(folder, device=device)
    known = {"vocabulary": tokenizer.vocabulary, "stop_ids": tokenizer.stop_ids}
    return generate(model, prompts, SamplingParams(**known, **options))


# ---- stages


class Stages:
    """The stages of a recipe for one seed. Each stage has a folder with its config.json, metrics.jsonl and model.

    scores: a dataclass of numbers for each measured stage. transcripts: some of its samples as lines of text.
    """

    def __init__(self, cfg: Any, folder: Path, seed: int):
        self.cfg, self.folder, self.seed = cfg, folder, seed
        self.scores: dict[str, Any] = {}
        self.transcripts: dict[str, list[str]] = {}

    def run(self) -> Self:
        """Train and measure all stages."""
        raise NotImplementedError

    def stage(self, method: Any, name: str, model: Path, **flags: Any) -> Path:
        """Train `model` by a method's module, such as `sft`. Return the folder of the trained model."""
        shared = {"output": self.folder / name, "seed": self.seed, "device": self.cfg.device}
        with brief_endings():
            return method.train(method.Config(model=model, **shared, **flags))

    def write(self, name: str, rows: Iterable[Mapping[str, str]]) -> Path:
        return write_rows(self.folder / "data" / f"{name}.jsonl", rows)


Recipe = TypeVar("Recipe", bound=Stages)


def run_seeds(recipe: Callable[[Any, Path, int], Recipe], cfg: Any) -> list[Recipe]:
    """Run the recipe for each seed in a separate folder, and return the recipes."""
    torch.set_num_threads(1)  # a second thread slows down models as small as these
    return [recipe(cfg, cfg.output / f"seed-{seed}", seed).run() for seed in range(cfg.seeds)]


def median_scores(recipes: Sequence[Stages]) -> dict[str, Any]:
    """Return each stage's score, in which every number is the median over the recipes."""
    table = {}
    for stage, score in recipes[0].scores.items():
        numbers = zip(*(vars(recipe.scores[stage]).values() for recipe in recipes), strict=True)
        table[stage] = type(score)(*map(median, numbers))
    return table


def print_table(
    heading: str, table: Mapping[str, Any], seeds: int, print_row: Callable[[str, Any], None]
) -> None:
    print(f"\n{heading}{f', medians of {seeds} seeds' if seeds > 1 else ''}:\n")
    for stage, score in table.items():
        print_row(stage, score)


def numbers_of(score: Any, form: str) -> str:
    """Format a score as one line, such as "gold   3.10   proxy   2.95" for the form "6.2f"."""
    return "   ".join(f"{name.replace('_at_', '@')} {value:{form}}" for name, value in vars(score).items())


# ---- files


def write_rows(path: Path, rows: Iterable[Mapping[str, str]]) -> Path:
    return write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_text(path: Path, text: str) -> Path:
    """Create the folders of `path`, write the text atomically, and return `path`. Raises InputError on failure."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {reason(error)}") from error
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")
    return path


def read_metric(run: Path, name: str) -> list[float]:
    """Return the values of one metric of a run, one per step."""
    return [json.loads(line)[name] for line in (run / "metrics.jsonl").read_text().splitlines()]
