"""A model small enough to train in a test, on the task of `r1`, as files like those a user has; tokenizers."""

import json
import re
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
from burnish.algorithms import sft
from burnish.algorithms.recipes.sums import (
    VOCABULARY,
    demonstration_row,
    make_tokenizer,
    prompt_row,
    split_problems,
)
from burnish.algorithms.run import batch
from burnish.model.checkpoint import save_model
from burnish.model.config import ModelConfig
from burnish.model.text.tokenizer import Tokenizer
from burnish.model.transformer import Transformer
from controlled import Place
from tokenizers import Tokenizer as Backend
from twins import IDS, Twins, twins_of


@pytest.fixture
def most_packed(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """The largest number of micro-batches so far that were there at the same time."""
    alive, counts, pack = weakref.WeakSet(), [0], batch.pack

    def counting(*given):
        packed = pack(*given)
        alive.add(packed)
        counts.append(len(alive))
        return packed

    monkeypatch.setattr(batch, "pack", counting)
    return lambda: max(counts)


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    config = ModelConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
        eos_token_id=0,
    )
    save_model(
        Transformer(config, seed=0), tmp_path / "random-model", Tokenizer(make_tokenizer(), eos="<eos>")
    )
    return tmp_path / "random-model"


@pytest.fixture
def demonstrations(tmp_path: Path) -> Path:
    """64 clean rows of prompt and completion."""
    return write_rows(
        tmp_path / "demonstrations.jsonl",
        [demonstration_row(problem) for problem in split_problems(0)[0][:64]],
    )


@pytest.fixture
def form_model(model_folder: Path, demonstrations: Path, tmp_path: Path) -> Path:
    """A model that has seen the demonstrations' form but does not hold to it."""
    return sft.train(
        sft.Config(
            model=model_folder,
            data=demonstrations,
            output=tmp_path / "sft",
            steps=60,
            batch_size=16,
            learning_rate=1e-2,
            device="cpu",
        )
    )


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_rows(
        tmp_path / "prompts.jsonl", [prompt_row(problem) for problem in split_problems(0)[0][:32]]
    )


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """64 rows of a right completion, and of one with a plus for its digits that every fourth time is twice as long."""
    rows = []
    for i, problem in enumerate(split_problems(0)[0][:64]):
        row = demonstration_row(problem)
        wrong = re.sub(r"\d", "+", row["completion"]) * (2 if i % 4 == 0 else 1)
        rows.append({"prompt": row["prompt"], "chosen": row["completion"], "rejected": wrong})
    return write_rows(tmp_path / "pairs.jsonl", rows)


@pytest.fixture
def place(model_folder: Path, pairs: Path, tmp_path: Path) -> Place:
    """A model, 12 pairs and a folder for the output: what the checks of planted faults use."""
    rows = pairs.read_text().splitlines(keepends=True)[:12]
    pairs.write_text("".join(rows))
    return Place(model_folder, pairs, tmp_path / "out")


@pytest.fixture(params=IDS)
def twins(request: pytest.FixtureRequest, tmp_path: Path) -> Twins:
    return twins_of(request.param, tmp_path, seed=1)


@pytest.fixture
def holes(tmp_path: Path) -> Twins:
    return twins_of("holes", tmp_path, seed=1)


@pytest.fixture(scope="module")
def folder() -> Path:
    """The tokenizer of tests/data: its template is ChatML, <|im_end|> ends a turn."""
    return Path(__file__).parents[1] / "data" / "tokenizer"


@pytest.fixture(scope="module")
def chat(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def base(folder: Path) -> Tokenizer:
    """The same without a template; <|im_start|> stands for a bos that begins every text."""
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    return Tokenizer(backend, bos="<|im_start|>", eos="<|endoftext|>", config={"add_bos_token": True})


@pytest.fixture(scope="module")
def make(folder: Path) -> Callable[..., Tokenizer]:
    """make(template, **names): the same with another template."""
    backend = (folder / "tokenizer.json").read_text()
    return lambda template, **names: Tokenizer(
        Backend.from_str(backend), **{"eos": "<|im_end|>", "chat_template": template, **names}
    )


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
