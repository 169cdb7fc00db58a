"""Folders and tokenizers that several files of tests/model ask for.

It imports pytest alone: test_cuda_graphs.py runs where safetensors and tokenizers are not installed.
"""

from pathlib import Path

import pytest


@pytest.fixture
def folder(tmp_path) -> Path:
    """The folder of a small model, to be changed."""
    from burnish.model import Transformer
    from burnish.model.checkpoint import save_model
    from folders import SMALL

    save_model(Transformer(SMALL, seed=3), tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture(scope="module")
def backend_json(request):
    return (request.path.parents[1] / "data" / "tokenizer" / "tokenizer.json").read_text()


@pytest.fixture
def make(backend_json):
    """A tokenizer of ours with a template, eos <|im_end|>."""
    from burnish.model.text.tokenizer import Tokenizer
    from tokenizers import Tokenizer as Backend

    return lambda template, **names: Tokenizer(
        Backend.from_str(backend_json), **{"eos": "<|im_end|>", "chat_template": template, **names}
    )
