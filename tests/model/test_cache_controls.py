"""Negative controls: faults planted in copies of the cache and of the batch that fills it, each of which must be seen.

The check is what tests/model/test_generate.py asks of samples, in its smallest form: a batch that is smaller than the
work, groups that share a prompt, answers that end at different times. A faithful copy must pass it.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from burnish.model import ModelConfig, Transformer, pack
from burnish.model.generate import Sample, SamplingParams, generate
from faults import Fault, check_of, control, faults_of
from planted import copy_of

CONFIG = ModelConfig(31, 16, 24, 2, 2, initializer_range=0.5, tie_word_embeddings=True)
PROMPTS = [[4, 9, 1, 30, 7], [3], [12, 13, 14], [9, 9], [8, 7, 6, 5, 4, 3], [21, 2]]
PARAMS = SamplingParams(samples_per_prompt=3, max_new_tokens=9, stop_ids={1, 2, 3, 4, 5, 6}, seed=3)


def draw_with(folder: Path, monkeypatch, fault: Fault | None = None) -> Callable[..., list[Sample]]:
    """The `generate` of a copy of Batch, which stands on a copy of Cache; the fault is in one of them."""
    cache, batch, generate = (
        copy_of(file, folder, monkeypatch, fault if fault and fault.file == file else None)
        for file in ("model/cache", "model/batch", "model/generate")
    )
    monkeypatch.setattr(batch, "Cache", cache.Cache)
    monkeypatch.setattr(generate, "Batch", batch.Batch)
    return generate.generate


@pytest.fixture(scope="module")
def expected():
    """The model, and its samples from one batch that holds them all, scored without a cache."""
    model = Transformer(CONFIG, seed=3)
    samples = generate(model, PROMPTS, PARAMS)
    scores = []
    for sample in samples:
        prompt = PROMPTS[sample.prompt_index]
        rows = torch.arange(len(prompt), len(prompt) + len(sample.tokens))
        scores.append(model.score(pack([prompt + sample.tokens]), rows)[0].detach())
    assert len({len(sample.tokens) for sample in samples}) > 4
    return model, [sample.tokens for sample in samples], scores


@control
def samples_are_those_of_one_batch(draw, expected) -> None:
    model, tokens, scores = expected
    samples = draw(model, PROMPTS, PARAMS, batch_size=7)
    assert [sample.tokens for sample in samples] == tokens
    for sample, score in zip(samples, scores, strict=True):
        torch.testing.assert_close(sample.logprobs, score, atol=1e-5, rtol=0)


def test_a_faithful_copy_passes(expected, tmp_path, monkeypatch):
    samples_are_those_of_one_batch(draw_with(tmp_path, monkeypatch), expected)


@pytest.mark.parametrize("fault", faults_of(__file__), ids=lambda fault: fault.id)
def test_fault_is_caught(fault, expected, tmp_path, monkeypatch):
    draw = draw_with(tmp_path, monkeypatch, fault)
    with pytest.raises((AssertionError, IndexError, KeyError, RuntimeError)):
        check_of(fault)(draw, expected)
