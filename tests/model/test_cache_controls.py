"""Negative controls: faults planted in copies of the cache and of the batch that fills it, each of which must be seen.

The check is what tests/model/test_generate.py asks of samples, in its smallest form: a batch that is smaller than the
work, groups that share a prompt, answers that end at different times. A faithful copy must pass it.
"""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from burnish.model import ModelConfig, Transformer, pack
from burnish.model.generate import generate

MODEL = Path(__file__).parents[2] / "model"
CONFIG = ModelConfig(31, 16, 24, 2, 2, initializer_range=0.5, tie_word_embeddings=True)
PROMPTS = [[4, 9, 1, 30, 7], [3], [12, 13, 14], [9, 9], [8, 7, 6, 5, 4, 3], [21, 2]]
OPTIONS = {"samples_per_prompt": 3, "max_new_tokens": 9, "stop_ids": {1, 2, 3, 4, 5, 6}, "seed": 3}

FAULTS = {
    "a prompt one token short": (
        "cache",
        "rows, self.row_length[rows]",
        "rows, self.row_length[rows] - 1",
    ),
    "a slot that keeps its last sequence's length": (
        "cache",
        "self.length[slots] = 0",
        "self.length[slots] += 0",
    ),
    "positions that ignore the prompt": ("cache", "return self.prompt_length[:slots] + last", "return last"),
    "positions one too far": (
        "cache",
        "return self.prompt_length[:slots] + last",
        "return self.prompt_length[:slots] + last + 1",
    ),
    "a token written over the one before": (
        "cache",
        "+ position[:, None]).flatten()",
        "+ (position[:, None] - 1).clamp(min=0)).flatten()",
    ),
    "stale values where a sequence has moved": (
        "cache",
        "_move((*self.keys, *self.values), slots",
        "_move(self.keys, slots",
    ),
    "stale prompts where they have moved": (
        "cache",
        "_move((*self.prompt_keys, *self.prompt_values)",
        "_move(self.prompt_keys",
    ),
    "a move that leaves the newest tokens behind": (
        "cache",
        "longest = int(lengths[rows].max())",
        "longest = int(lengths[rows].min())",
    ),
    "lengths that do not move": (
        "cache",
        "(self.length, self.prompt_length, self.adapter)",
        "(self.prompt_length, self.adapter)",
    ),
    "a sequence that is sent to another's prompt": (
        "cache",
        "self.prompt[:n] = row[:n]",
        "self.prompt[:n] = row[:n].flip(0)",
    ),
    "a slot freed too early": (
        "batch",
        "(count >= self.request.max_new_tokens)",
        "(count >= self.request.max_new_tokens - 2)",
    ),
    "rows of prompts that are remembered as they were": (
        "batch",
        "{prompts[row]: i for i, row",
        "{prompts[row]: row for i, row",
    ),
    "a group that begins from another prompt": (
        "batch",
        "self.last[: len(rows)] = self.last[rows]",
        "pass",
    ),
    "ids that do not move along": ("batch", "            self.drawn,\n", ""),
    "noise that does not move along": ("batch", "            self.noises,\n", ""),
}


def copy_of(folder: Path, monkeypatch: pytest.MonkeyPatch, file: str = "", old: str = "", new: str = ""):
    """generate.py on copies of batch.py and cache.py, one line of one of them changed."""
    for name in ("cache", "batch", "generate"):
        source = (MODEL / f"{name}.py").read_text()
        if name == file:
            assert source.count(old) == 1, f"{name}.py has `{old}` {source.count(old)} times: plant it anew"
            source = source.replace(old, new)
        path = folder / f"control_{name}.py"
        for copied in ("cache", "batch"):
            source = source.replace(f"from .{copied} import", f"from .control_{copied} import")
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(f"burnish.model.control_{name}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
    return module.generate


@pytest.fixture(scope="module")
def expected():
    """The model, and its samples from one batch that holds them all, scored without a cache."""
    model = Transformer(CONFIG, seed=3)
    samples = generate(model, PROMPTS, **OPTIONS)
    scores = []
    for sample in samples:
        prompt = PROMPTS[sample.prompt_index]
        rows = torch.arange(len(prompt), len(prompt) + len(sample.tokens))
        scores.append(model.score(pack([prompt + sample.tokens]), rows)[0].detach())
    assert len({len(sample.tokens) for sample in samples}) > 4
    return model, [sample.tokens for sample in samples], scores


def check(draw, expected) -> None:
    model, tokens, scores = expected
    samples = draw(model, PROMPTS, batch_size=7, **OPTIONS)
    assert [sample.tokens for sample in samples] == tokens
    for sample, score in zip(samples, scores, strict=True):
        torch.testing.assert_close(sample.logprobs, score, atol=1e-5, rtol=0)


def test_a_faithful_copy_passes(expected, tmp_path, monkeypatch):
    check(copy_of(tmp_path, monkeypatch), expected)


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_caught(name, expected, tmp_path, monkeypatch):
    draw = copy_of(tmp_path, monkeypatch, *FAULTS[name])
    with pytest.raises((AssertionError, IndexError, KeyError, RuntimeError)):
        check(draw, expected)
