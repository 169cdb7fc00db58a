"""What recipes share: a small random model to begin with, and files of rows."""

import json
from collections.abc import Iterable
from pathlib import Path

import tokenizers

from ...model.checkpoint import save_model
from ...model.errors import InputError
from ...model.files.config_json import read_config
from ...model.text.tokenizer import Tokenizer
from ...model.transformer import Transformer


def random_model(folder: Path, tokenizer: tokenizers.Tokenizer, seed: int, **shape: int) -> Path:
    """A Llama with random weights. shape: hidden_size, intermediate_size, num_hidden_layers, num_attention_heads."""
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


def write_rows(path: Path, rows: Iterable[dict[str, str]]) -> Path:
    return write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_text(path: Path, text: str) -> Path:
    """Raises InputError where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error}") from error
    return path


def read_metric(run: Path, name: str) -> list[float]:
    """One value a step of a run."""
    return [json.loads(line)[name] for line in (run / "metrics.jsonl").read_text().splitlines()]
