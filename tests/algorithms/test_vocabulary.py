"""Ids that no token has: never drawn, and not among what a drawn token is scored.

The models of tests/common/twins.py have such ids, with logits above all others.
"""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from burnish.algorithms.recipes.sums import make_tokenizer
from burnish.model.adapter import add_lora
from burnish.model.batch import Chooser
from burnish.model.checkpoint import load_model
from burnish.model.generate import Sample, SamplingParams, generate, stream
from burnish.model.packed import pack
from burnish.model.text.tokenizer import Tokenizer
from burnish.model.transformer import Transformer
from burnish.model.vocabulary import Vocabulary
from twins import CONFIG, IDS, ROWS, tokenizer_of

# ---- the set


def test_a_vocabulary_is_a_set_and_no_count():
    whole, holes = Vocabulary.of([2, 0, 1, 1]), Vocabulary.of([5, 0, 3])
    assert (whole.end, whole.size, whole.ids) == (3, 3, None)
    assert holes.ids is not None
    assert (holes.end, holes.size, holes.ids.tolist()) == (6, 3, [0, 3, 5])
    assert whole.within(3) is None and whole.within(2) is None and whole.within(4) is whole
    assert holes.within(6) is holes
    shorter = holes.within(5)
    assert shorter is not None and shorter.ids is not None and shorter.ids.tolist() == [0, 3]
    assert Vocabulary.of([0, 1, 9]).within(2) is None

    x = torch.arange(12).view(2, 6)
    assert whole.select(x, 1).tolist() == [[0, 1, 2], [6, 7, 8]]
    assert holes.select(x, 1).tolist() == [[0, 3, 5], [6, 9, 11]]

    rows = torch.tensor([2, -1, 0], dtype=torch.int32)
    assert holes.ids_of(rows).tolist() == [5, -1, 0] and holes.ids_of(rows).dtype == torch.int32
    assert holes.rows_of(torch.tensor([3, 4, 5, 9])).tolist() == [1, 3, 2, 3]
    assert whole.ids_of(rows) is rows and whole.rows_of(rows) is rows
    assert holes.has(torch.tensor([-1, 0, 1, 5, 6])).tolist() == [False, True, False, True, False]
    assert whole.has(torch.tensor([-1, 0, 2, 3])).tolist() == [False, True, True, False]


def test_the_ids_are_the_tokenizers_added_ones_included():
    holes = tokenizer_of(IDS["holes"]).vocabulary
    assert holes.ids is not None and holes.ids.tolist() == IDS["holes"] and holes.end == 20
    backend = make_tokenizer()
    backend.add_special_tokens(["<extra>"])
    assert backend.get_vocab_size(with_added_tokens=False) == 17
    assert Tokenizer(backend, eos="<eos>").vocabulary.end == 18


# ---- drawn, and scored


PROMPTS = ["1+2+3=", "4+", "7"]
WAYS = [
    {"temperature": 0},
    {},
    {"temperature": 1.5},
    {"top_k": 5},
    {"top_k": 20},  # of 17
    {"top_p": 0.8, "temperature": 1.3},
    {"min_p": 0.2},
]


def draw(folder: Path, **how: Any) -> list[Sample]:
    """Six samples a prompt, from the tokenizer's ids unless told otherwise."""
    model, tokenizer = load_model(folder), Tokenizer.load(folder)
    how = {"samples_per_prompt": 6, "max_new_tokens": 6, "vocabulary": tokenizer.vocabulary, **how}
    return generate(model, [tokenizer.encode(text) for text in PROMPTS], SamplingParams(**how))


@pytest.mark.parametrize("how", WAYS, ids=str)
def test_what_is_drawn_is_what_the_twin_draws(twins, how):
    """Ids, log-probabilities, supports; the scorer agrees, the stream is the sample."""
    model, tokenizer = load_model(twins.other), Tokenizer.load(twins.other)
    found = draw(twins.other, **how)

    for ours, twin in zip(found, draw(twins.dense, **how), strict=True):
        assert ours.tokens == [twins.ids[token] for token in twin.tokens]
        torch.testing.assert_close(ours.logprobs, twin.logprobs, atol=1e-5, rtol=0)
        if twin.support is not None:
            ids = torch.tensor([*twins.ids, -1])[twin.support.long()]
            assert torch.equal(ours.support.long(), ids)

        prompt = tokenizer.encode(PROMPTS[ours.prompt_index])
        rows = torch.arange(len(prompt), len(prompt) + len(ours.tokens))
        scored = model.score(
            pack([prompt + ours.tokens]),
            rows,
            temperature=how.get("temperature", 1.0) or 1.0,
            support=ours.support,
            vocabulary=ours.vocabulary,
        )[0]
        assert (scored - ours.logprobs).abs().max() < 1e-4

    prompt = tokenizer.encode(PROMPTS[0])
    options = {"max_new_tokens": 6, "vocabulary": tokenizer.vocabulary, **how}
    assert list(stream(model, prompt, SamplingParams(**options))) == found[0].tokens


def test_without_a_vocabulary_missing_ids_are_drawn(twins):
    """The control of the test above: these models want nothing else."""
    for sample in draw(twins.other, vocabulary=None):
        assert not set(sample.tokens) & set(twins.ids)


def test_a_prompt_may_hold_a_missing_id(twins):
    model, vocabulary = load_model(twins.other), Tokenizer.load(twins.other).vocabulary
    (sample,) = generate(model, [[0, 23, 5]], SamplingParams(max_new_tokens=6, vocabulary=vocabulary))
    assert set(sample.tokens) <= set(twins.ids)


def test_a_vocabulary_of_the_whole_head_is_nothing(twins):
    """The same op on the same weight, without a copy."""
    model, tokens = load_model(twins.dense), Tokenizer.load(twins.dense).vocabulary
    packed, rows = pack([[1, 2, 3]]), torch.tensor([1, 2])
    choose, width = Chooser.of(model, tokens, top_k=5)
    assert choose.func.__name__ == "sample_tokens" and width == 5
    whole = model.before_head(packed, rows)[1].weight
    assert model.before_head(packed, rows, tokens)[1].weight is whole
    for found, expected in zip(
        model.score(packed, rows, vocabulary=tokens), model.score(packed, rows), strict=True
    ):
        assert torch.equal(found, expected)


def test_a_missing_row_has_a_gradient_from_given_text_alone(twins):
    model, tokens = load_model(twins.other), Tokenizer.load(twins.other).vocabulary
    missing = sorted(set(range(ROWS)) - set(twins.ids))
    packed, rows = pack([[0, *twins.ids[5:9]]]), torch.arange(1, 5)
    logprob, lse, entropy = model.score(packed, rows, vocabulary=tokens)
    (logprob + 0.3 * lse + 0.2 * entropy).sum().backward()
    assert not model.head.grad[missing].any() and model.head.grad[twins.ids].any(1).all()
    weights = [p for p in model.parameters() if p is not model.embed_tokens.weight or p is model.head]
    log_p = model.logits(model(packed)[:-1]).log_softmax(-1)
    given, plain = (-model.score(packed, rows)[0].mean(), -log_p.gather(1, packed.tokens[rows, None]).mean())
    torch.testing.assert_close(given, plain, atol=1e-5, rtol=1e-6)
    gradients = (torch.autograd.grad(loss, weights) for loss in (given, plain))
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    (gradient,) = torch.autograd.grad(-model.score(packed, rows)[0].mean(), model.head)
    assert gradient[missing].any(1).all()


def test_an_adapter_of_the_head_has_rows_for_tokens_alone():
    model, tokens = Transformer(dataclasses.replace(CONFIG, vocab_size=ROWS)), Vocabulary.of(IDS["holes"])
    add_lora(model, 2, targets=("lm_head",))
    assert model.lm_head is not None and model.lm_head.lora is not None
    torch.nn.init.normal_(model.lm_head.lora.b)
    packed, rows = pack([[0, 5, 13, 19]]), torch.arange(1, 4)
    logprob, _, _ = model.score(packed, rows, vocabulary=tokens)
    log_p = tokens.select(model.logits(model(packed)[:-1]), 1).log_softmax(-1)
    expected = log_p.gather(1, torch.tensor([[3], [10], [16]])).squeeze(1)
    torch.testing.assert_close(logprob, expected, atol=1e-5, rtol=0)


def test_a_target_that_is_no_token_is_refused(holes):
    model, tokens = load_model(holes.other), Tokenizer.load(holes.other).vocabulary
    with pytest.raises(ValueError, match="targets: row 0 is 17, outside a vocabulary of 17"):
        model.score(pack([[0, 3]]), torch.tensor([1]), vocabulary=tokens)
