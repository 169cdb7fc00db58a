"""An adapter of the head: scored, sampled from and trained with dropout without being multiplied out."""

import copy
from dataclasses import replace

import pytest
import torch
from burnish.kernels import token_logprobs
from burnish.model import Transformer, linear
from burnish.model.adapter import adapter_disabled, add_lora, frozen_copy, linears, merge_lora
from burnish.model.generate import SamplingParams, generate
from burnish.model.linear import Linear
from tiny import PACKED, ROWS, TINY, logits_of, tiny, trained


@pytest.mark.parametrize(
    "support", [None, torch.tensor([[2, 9], [3, -1], [5, 30], [8, 1]], dtype=torch.int32)]
)
def test_an_adapter_of_the_head_is_scored_without_being_merged(monkeypatch, support):
    model = tiny(targets=("q_proj", "lm_head"))
    torch.nn.init.normal_(model.lm_head.lora.b)
    hidden = model(PACKED)[PACKED.predictors[ROWS]]
    merged = token_logprobs(hidden, model.head, PACKED.tokens[ROWS], support=support)
    wanted = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad([part.sum() for part in merged], wanted, allow_unused=True)

    def never(self):
        raise AssertionError("the head's adapter was multiplied out")

    monkeypatch.setattr(Linear, "merged", never)
    found = model.score(PACKED, ROWS, support=support)
    torch.testing.assert_close(found, merged)
    torch.testing.assert_close(
        torch.autograd.grad([part.sum() for part in found], wanted, allow_unused=True), expected
    )
    assert any(g is not None and g.abs().max() > 0 for g in expected)
    with pytest.raises(AssertionError, match="multiplied out"), adapter_disabled(model):  # the patch is seen
        model.score(PACKED, ROWS)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_of_the_head_is_sampled_from_without_being_merged(monkeypatch, tied, dora):
    """Merging makes a matrix of all words for every token that is drawn."""
    model = Transformer(replace(TINY, initializer_range=0.2, tie_word_embeddings=tied), seed=1)
    add_lora(model, 3, targets=("q_proj", "lm_head"), dora=dora, dropout=0.5)
    trained(model)
    model.eval()
    merged = copy.deepcopy(model)
    merge_lora(merged)
    expected, greedy = (
        logits_of(merged),
        generate(merged, [[1, 2]], SamplingParams(max_new_tokens=6, temperature=0.0)),
    )

    def never(self):
        raise AssertionError("the head's adapter was multiplied out")

    monkeypatch.setattr(Linear, "merged", never)
    torch.testing.assert_close(logits_of(model), expected, atol=1e-5, rtol=1e-5)
    assert (
        generate(model, [[1, 2]], SamplingParams(max_new_tokens=6, temperature=0.0))[0].tokens
        == greedy[0].tokens
    )
    with adapter_disabled(model):
        assert not torch.allclose(logits_of(model), expected, atol=1e-3)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_dropout_on_an_adapter_of_the_head(monkeypatch, tied, dora):
    """It acts in training, is what it is without where nothing is dropped, and leaves the base's half of x whole."""
    model = Transformer(replace(TINY, initializer_range=0.2, tie_word_embeddings=tied), seed=1)
    add_lora(model, 3, targets=("q_proj", "lm_head"), dora=dora, dropout=0.5)
    trained(model)
    quiet = frozen_copy(model)
    with torch.no_grad():
        assert torch.equal(model.score(PACKED, ROWS)[0], quiet.score(PACKED, ROWS)[0])

    model.layers[0].self_attn.q_proj.lora.dropout = model.layers[1].self_attn.q_proj.lora.dropout = 0.0
    one, other = (model.score(PACKED, ROWS)[0] for _ in range(2))
    assert not torch.equal(one, other)

    # where nothing is dropped
    monkeypatch.setattr(linear.F, "dropout", lambda x, p: x)  # nothing is dropped
    wanted = [p for p in model.parameters() if p.requires_grad]
    dropped = model.score(PACKED, ROWS)
    found = torch.autograd.grad(dropped[0].sum(), wanted)
    for module in linears(model).values():
        if module.lora is not None:
            module.lora.dropout = 0.0
    whole = model.score(PACKED, ROWS)
    torch.testing.assert_close(dropped, whole)
    torch.testing.assert_close(found, torch.autograd.grad(whole[0].sum(), wanted))
