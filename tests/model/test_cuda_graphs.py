"""A step recorded as CUDA graphs samples what it samples without them. Imports no more than the kernels' tests do."""

import pytest
import torch
from burnish.model import ModelConfig, Transformer, batch
from burnish.model.generate import SamplingParams, generate

TINY = ModelConfig(
    *(31, 16, 24, 2, 2),  # V, C, F, layers, H
    initializer_range=0.5,
    tie_word_embeddings=True,
)
PROMPTS = [[4, 9, 1, 30, 7], [3], [12, 13, 14], [9, 9]]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
def test_cuda_graphs_change_nothing(monkeypatch):
    params = SamplingParams(samples_per_prompt=3, max_new_tokens=20, stop_ids={1, 2, 3, 4}, top_k=20)
    model = Transformer(TINY, seed=3).to("cuda")
    reference = generate(model, PROMPTS, params)
    monkeypatch.setattr(batch, "CUDA_GRAPHS", True)
    for batch_size in (None, 7):
        for a, b in zip(generate(model, PROMPTS, params, batch_size=batch_size), reference, strict=True):
            assert a.tokens == b.tokens and torch.equal(a.support, b.support)
            torch.testing.assert_close(a.logprobs, b.logprobs, atol=1e-4, rtol=0)
