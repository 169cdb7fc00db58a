"""Rows with tools and template variables have the ids of transformers' apply_chat_template."""

import importlib.util
import json
from pathlib import Path

import pytest
from burnish.algorithms.data.examples import rl_prompts, sft_examples
from burnish.model.text import sandbox
from burnish.model.text.tokenizer import Tokenizer

DATA = Path(__file__).parents[1] / "data"
ENTRIES = json.loads((DATA / "chat.json").read_text(encoding="utf-8"))


def maker():
    spec = importlib.util.spec_from_file_location("make_chat_golden", DATA / "make_chat_golden.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


NAMES = [f"{entry['template']} {i}" for i, entry in enumerate(ENTRIES)]


@pytest.mark.parametrize("entry", ENTRIES, ids=NAMES)
def test_rows_have_the_ids_of_transformers(shared_data, monkeypatch, entry):
    made = maker()
    file = made.template_file(entry["template"], shared_data / "chat_templates")
    if file is None:
        pytest.skip(f"the template {entry['template']} comes with trl, which is not installed")
    monkeypatch.setattr(sandbox, "datetime", made.FrozenClock)
    tokenizer = Tokenizer.load(DATA / "tokenizer", file)
    tokenizer.config["bos_token"] = made.BOS
    row = entry["row"]
    if entry["ask"]:
        (found,), _ = rl_prompts([row], tokenizer, max_length=10**6)
    else:
        (found,), _ = sft_examples([row], tokenizer, max_length=10**6, train_on="all")
    assert found.tokens == entry["ids"]
