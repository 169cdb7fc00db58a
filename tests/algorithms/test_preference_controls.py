"""Negative controls: faults planted in copies of dpo, kto, reward and what they share, each caught by the named check.

The checks are those of the tests beside this file in their smallest form. A faithful copy must pass them all.
"""

import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from burnish.model.checkpoint import load_scalar_model
from burnish.model.text.tokenizer import Tokenizer
from controlled import Place, assert_caught, assert_faithful, metrics_of, same
from faults import Fault, control, faults_of

CHOSEN = torch.tensor([1.0, -0.5, 0.3], dtype=torch.float64)
REJECTED = torch.tensor([-0.5, 0.8, 0.1], dtype=torch.float64)


def config(module: ModuleType, place: Place, **changes: Any) -> Any:
    common = {"steps": 2, "batch_size": 6, "learning_rate": 1e-2, "warmup_steps": 0, "device": "cpu"}
    return module.Config(**{**place._asdict(), **common, **changes})


# ---- the checks


@control
def pair_losses_have_their_values(module: ModuleType, place: Place) -> None:
    """-log sigmoid and its relatives, written out."""
    sigmoid = lambda x: 1 / (1 + math.exp(-x))
    pairs = list(zip(CHOSEN.tolist(), REJECTED.tolist(), strict=True))
    odds = lambda x: math.exp(x) / (1 - math.exp(x))

    formulas: dict[str, Callable[[float, float], float]] = {
        "dpo": lambda a, b: -math.log(sigmoid(0.5 * (a - b))),
        "cdpo": lambda a, b: -0.8 * math.log(sigmoid(0.5 * (a - b))) - 0.2 * math.log(sigmoid(0.5 * (b - a))),
        "robust": lambda a, b: (
            (-0.8 * math.log(sigmoid(0.5 * (a - b))) + 0.2 * math.log(sigmoid(0.5 * (b - a)))) / 0.6
        ),
        "hinge": lambda a, b: max(0.0, 1 - 0.5 * (a - b)),
        "ipo": lambda a, b: (a - b - 1) ** 2,
        "apo_zero": lambda a, b: 1 - sigmoid(0.5 * a) + sigmoid(0.5 * b),
        "apo_down": lambda a, b: sigmoid(0.5 * a) + 1 - sigmoid(0.5 * (a - b)),
        "simpo": lambda a, b: -math.log(sigmoid(0.5 * (a - b) - 0.3)),
        "orpo": lambda a, b: -0.5 * math.log(sigmoid(math.log(odds(a - 2) / odds(b - 2)))),
    }

    more = {"cdpo": {"label_smoothing": 0.2}, "robust": {"label_smoothing": 0.2}, "simpo": {"gamma": 0.3}}
    for name, formula in formulas.items():
        shift = 2 if name == "orpo" else 0  # log-probabilities are negative
        loss = getattr(module, f"{name}_loss")(
            CHOSEN - shift, REJECTED - shift, 4, beta=0.5, **more.get(name, {})
        )
        same(loss.item(), sum(formula(*pair) for pair in pairs) / 4, 1e-9)


@control
def reward_losses_have_their_values(module: ModuleType, place: Place) -> None:
    pairs = list(zip(CHOSEN.tolist(), REJECTED.tolist(), strict=True))
    loss = module.bradley_terry_loss(CHOSEN, REJECTED, 0.4, 4)
    same(loss.item(), sum(math.log(1 + math.exp(b + 0.4 - a)) for a, b in pairs) / 4, 1e-9)
    same(module.centering_loss(CHOSEN, REJECTED, 4).item(), sum((a + b) ** 2 for a, b in pairs) / 4, 1e-9)


@control
def kto_has_its_value(module: ModuleType, place: Place) -> None:
    sigmoid = lambda x: 1 / (1 + math.exp(-x))
    wanted = torch.tensor([True, False, True])
    loss = module.kto_loss(CHOSEN, wanted, 0.2, 4, 0.5, 2.0, 3.0)
    expected = 2 * (1 - sigmoid(0.4)) + 3 * (1 - sigmoid(0.35)) + 2 * (1 - sigmoid(0.05))
    same(loss.item(), expected / 4, 1e-6)


@control
def the_first_scores_are_zero(module: ModuleType, place: Place) -> None:
    module.train(config(module, place, steps=1, seed=3))
    (first,) = metrics_of(place.output)
    same(first["chosen"], 0)
    same(first["rejected"], 0)
    if "kl" in first:
        same(first["kl"], 0)


@control
def micro_batches_change_nothing(module: ModuleType, place: Place) -> None:
    found = []
    for tokens in (10**6, 1):
        output = place.output / str(tokens)
        module.train(config(module, place, micro_batch_tokens=tokens, output=output))
        found.append(metrics_of(output))
    for one, other in zip(*found, strict=True):
        for name in ("loss", "grad_norm", "chosen"):
            same(one[name], other[name], 1e-4)


@control
def the_reference_stays(module: ModuleType, place: Place) -> None:
    """After an epoch the margin grows with the model; against a reference that moves along it would be 0 again."""
    module.train(config(module, place, batch_size=64, steps=6))
    assert metrics_of(place.output)[-1]["margin"] > 0.05, "expected a margin"


@control
def chosen_scores_average_zero(module: ModuleType, place: Place) -> None:
    cfg = config(module, place)
    model = load_scalar_model(module.train(cfg))
    pairs = module.load_pairs(config(module, place, max_length=64), Tokenizer.load(place.model))
    scores = module.over_completions(model, pairs, lambda batch: batch.scores(model), 10**6)
    same(scores[:, 0].mean().item(), 0)


@control
def pairs_lie_as_they_should(module: ModuleType, place: Place) -> None:
    """The prompt is seen by both, only masked tokens are trained, the last token is each completion's own."""
    completion = lambda *tokens: module.Completion(list(tokens), [token != 9 for token in tokens])
    pairs = [
        module.Family([1, 2], [completion(3, 9, 4), completion(5)]),
        module.Family([6], [completion(7, 8), completion(7)]),
    ]
    (one,) = module.make_batches(pairs, 100, "cpu")
    assert one.packed.parents is not None, "expected parents"
    assert one.packed.parents.tolist() == [-1, 0, 0, -1, 3, 3], "expected both under their prompt"
    assert one.packed.tokens[one.last].tolist() == [4, 5, 8, 7], "expected the last tokens"
    assert one.packed.tokens[one.rows].tolist() == [3, 4, 5, 7, 8, 7], "expected the trained tokens"
    assert one.sums(torch.arange(6.0)).tolist() == [1, 2, 7, 5], "expected sums over completions"


@control
def rows_are_read_as_they_should(module: ModuleType, place: Place) -> None:
    """Two conversations that part early: the assistant's turns alone are trained, and the last token ends a turn."""
    tokenizer = Tokenizer.load(Path(__file__).parents[1] / "data" / "tokenizer")
    talks = {
        name: f"\n\nHuman: a\n\nAssistant: same\n\nHuman: b\n\nAssistant: {name} 1\n\nHuman: c\n\nAssistant: {name} 2"
        for name in ("chosen", "rejected")
    }
    (pair,), _ = module.preferences([talks], tokenizer, max_length=200)
    assert tokenizer.decode(pair.prompt).count("same") == 1, "expected the shared turns in the prompt"
    for name, one in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        trained = [token for token, wanted in zip(one.tokens, one.mask, strict=True) if wanted]
        found = tokenizer.decode(trained, False)
        assert found == f"{name} 1<|im_end|>{name} 2<|im_end|>", f"expected {name}'s turns, got {found}"
        assert one.mask[-1], "expected to end with the turn"

    # plain text
    text = {"prompt": "p", "chosen": "a", "rejected": "b"}
    (pair,), _ = module.preferences([text], tokenizer, max_length=20)
    assert pair.chosen.tokens[-1] == tokenizer.eos_id, "expected an end token"
    judged, _ = module.judged_completions([text], tokenizer, max_length=20)
    assert [one.label for one in judged] == [True, False], "expected chosen to be wanted"


# ---- planted faults

FAULTS = faults_of(__file__)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.id)
def test_fault_is_caught(fault: Fault, place: Place, monkeypatch):
    assert_caught(fault, place, monkeypatch)


@pytest.mark.parametrize("file", sorted({fault.file for fault in FAULTS}))
def test_a_faithful_copy_passes(file: str, place: Place, monkeypatch):
    assert_faithful(file, FAULTS, place, monkeypatch)
