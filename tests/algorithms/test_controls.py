"""Negative controls: faults planted in a copy of an algorithm's source, each of which the named check must catch.

The checks are those of the tests beside this file in their smallest form. A faithful copy must pass them all.
"""

import importlib.util
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from burnish.model.checkpoint import load_scalar_model
from burnish.model.tokenizer import Tokenizer

ALGORITHMS = Path(__file__).parents[2] / "algorithms"
CHOSEN = torch.tensor([1.0, -0.5, 0.3], dtype=torch.float64)
REJECTED = torch.tensor([-0.5, 0.8, 0.1], dtype=torch.float64)


class Place(NamedTuple):
    """What a check may use beside the module."""

    model: Path
    data: Path
    output: Path


def copy_of(
    file: str, folder: Path, monkeypatch: pytest.MonkeyPatch, old: str = "", new: str = ""
) -> ModuleType:
    """The algorithm's file as a module of its own, with one line changed."""
    source = (ALGORITHMS / f"{file}.py").read_text()
    assert old in source, f"{file}.py no longer has `{old}`: plant this control anew"
    path = folder / f"control_{file}.py"
    path.write_text(source.replace(old, new) if old else source)
    spec = importlib.util.spec_from_file_location(f"burnish.algorithms.control_{file}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def same(found: float, expected: float, bound: float = 1e-5) -> None:
    assert abs(found - expected) <= bound, f"expected {expected}, got {found}"


# ---- preferences


def config(module: ModuleType, place: Place, **changes: Any) -> Any:
    common = {"steps": 2, "batch_size": 6, "learning_rate": 1e-2, "warmup_steps": 0, "device": "cpu"}
    return module.Config(**{**place._asdict(), **common, **changes})


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
        loss = module.VARIANTS[name].loss(CHOSEN - shift, REJECTED - shift, 4, beta=0.5, **more.get(name, {}))
        same(loss.item(), sum(formula(*pair) for pair in pairs) / 4, 1e-9)


def reward_losses_have_their_values(module: ModuleType, place: Place) -> None:
    pairs = list(zip(CHOSEN.tolist(), REJECTED.tolist(), strict=True))
    loss = module.bradley_terry_loss(CHOSEN, REJECTED, 0.4, 4)
    same(loss.item(), sum(math.log(1 + math.exp(b + 0.4 - a)) for a, b in pairs) / 4, 1e-9)
    same(module.centering_loss(CHOSEN, REJECTED, 4).item(), sum((a + b) ** 2 for a, b in pairs) / 4, 1e-9)


def kto_has_its_value(module: ModuleType, place: Place) -> None:
    sigmoid = lambda x: 1 / (1 + math.exp(-x))
    wanted = torch.tensor([True, False, True])
    loss = module.kto_loss(CHOSEN, wanted, 0.2, 4, 0.5, 2.0, 3.0)
    expected = 2 * (1 - sigmoid(0.4)) + 3 * (1 - sigmoid(0.35)) + 2 * (1 - sigmoid(0.05))
    same(loss.item(), expected / 4, 1e-6)


def the_first_scores_are_zero(module: ModuleType, place: Place) -> None:
    module.train(config(module, place, steps=1, seed=3))
    (first,) = metrics_of(place.output)
    same(first["chosen"], 0)
    same(first["rejected"], 0)
    if "kl" in first:
        same(first["kl"], 0)


def micro_batches_change_nothing(module: ModuleType, place: Place) -> None:
    found = []
    for tokens in (10**6, 1):
        output = place.output / str(tokens)
        module.train(config(module, place, micro_batch_tokens=tokens, output=output))
        found.append(metrics_of(output))
    for one, other in zip(*found, strict=True):
        for name in ("loss", "grad_norm", "chosen"):
            same(one[name], other[name], 1e-4)


def the_reference_stays(module: ModuleType, place: Place) -> None:
    """After an epoch the margin grows with the model; against a reference that moves along it would be 0 again."""
    module.train(config(module, place, batch_size=64, steps=6))
    assert metrics_of(place.output)[-1]["margin"] > 0.05, "expected a margin"


def chosen_scores_average_zero(module: ModuleType, place: Place) -> None:
    cfg = config(module, place)
    model = load_scalar_model(module.train(cfg))
    pairs = module.load_pairs(place.data, Tokenizer.load(place.model), 64)
    same(module.completion_scores(model, pairs, 10**6, "cpu")[:, 0].mean().item(), 0)


def pairs_lie_as_they_should(module: ModuleType, place: Place) -> None:
    """The prompt is seen by both, only masked tokens are trained, the last token is each completion's own."""
    completion = lambda *tokens: module.Completion(list(tokens), [token != 9 for token in tokens])
    pairs = [
        module.Preference([1, 2], completion(3, 9, 4), completion(5)),
        module.Preference([6], completion(7, 8), completion(7)),
    ]
    (one,) = module.micro_batches(pairs, 100, "cpu")
    assert one.packed.parents is not None, "expected parents"
    assert one.packed.parents.tolist() == [-1, 0, 0, -1, 3, 3], "expected both under their prompt"
    assert one.packed.tokens[one.last].tolist() == [4, 5, 8, 7], "expected the last tokens"
    assert one.packed.tokens[one.rows].tolist() == [3, 4, 5, 7, 8, 7], "expected the trained tokens"
    assert one.sums(torch.arange(6.0)).tolist() == [1, 2, 7, 5], "expected sums over completions"


def rows_are_read_as_they_should(module: ModuleType, place: Place) -> None:
    """In two conversations that part early, the assistant's turns alone are trained; the last token ends a turn."""
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
    text = {"prompt": "p", "chosen": "a", "rejected": "b"}
    (pair,), _ = module.preferences([text], tokenizer, max_length=20)
    assert pair.chosen.tokens[-1] == tokenizer.eos_id, "expected an end token"
    judged, _ = module.judged_completions([text], tokenizer, max_length=20)
    assert [one.label for one in judged] == [True, False], "expected chosen to be wanted"


class Fault(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    check: Callable[[ModuleType, Place], None]


PREFERENCES = "_preferences"
VALUES = {
    "dpo": pair_losses_have_their_values,
    "reward": reward_losses_have_their_values,
    "kto": kto_has_its_value,
}
LAID, READ = pairs_lie_as_they_should, rows_are_read_as_they_should
CUT, START = micro_batches_change_nothing, the_first_scores_are_zero
FAULTS = [
    *(
        Fault(name, file, old, new, VALUES[file])
        for name, file, old, new in [
            ("sign of h", "dpo", "F.logsigmoid(beta * (chosen - rej", "F.logsigmoid(-beta * (chosen - rej"),
            ("beta dropped", "dpo", "F.logsigmoid(beta * (chosen", "F.logsigmoid((chosen"),
            ("mean of a micro-batch", "dpo", ".sum() / num_pairs", ".mean()"),
            ("labels the other way", "dpo", "((1 - label_smoothing) * F.logs", "(label_smoothing * F.logs"),
            ("biased", "dpo", " / (1 - 2 * label_smoothing)", ""),
            ("IPO's target", "dpo", "1 / (2 * beta)", "1 / beta"),
            ("hinge at 0", "dpo", "relu(1 - beta", "relu(-beta"),
            ("APO's rejected", "dpo", "+ torch.sigmoid(beta * rejected)", "- torch.sigmoid(beta * rejected)"),
            ("APO's chosen", "dpo", "(torch.sigmoid(beta * chosen) + 1", "(1"),
            ("SimPO's margin", "dpo", " - gamma)", ")"),
            ("odds are not p", "dpo", "score - torch.log(-torch.expm1(score))", "score"),
            ("margin dropped", "reward", "chosen - rejected - margin", "chosen - rejected"),
            ("difference centred", "reward", "(chosen + rejected)", "(chosen - rejected)"),
            ("KL's sign", "kto", "log_ratio - kl, kl - log_ratio", "log_ratio + kl, kl - log_ratio"),
            ("weights swapped", "kto", "wanted, wanted_weight, unwanted", "~wanted, wanted_weight, unwanted"),
        ]
    ),
    Fault("step's denominator", "dpo", "rejected, len(batch), **", "rejected, len(micro.members), **", CUT),
    Fault("step's denominator", "reward", "margin, len(batch))", "margin, len(micro.members))", CUT),
    Fault("step's denominator", "kto", "kl, len(batch), cfg", "kl, len(micro.members), cfg", CUT),
    Fault("another's reference", "dpo", "[[members[i] for i in micro.members]]", "[micro.members]", START),
    Fault("another's reference", "kto", "[[members[i] for i in micro.members]]", "[micro.members]", START),
    Fault("reference moves", "dpo", "ref = ref", "ref = total.detach().cpu() + 0 * ref", the_reference_stays),
    Fault("shifted up", "reward", "model.bias -=", "model.bias +=", chosen_scores_average_zero),
    Fault("rejected at 0", "reward", "[:, 0].mean()", "[:, 1].mean()", chosen_scores_average_zero),
    *(
        Fault(name, PREFERENCES, old, new, check)
        for name, old, new, check in [
            ("prompt not seen", "parents.append(parent)", "parents.append(-1)", LAID),
            ("score before the end", "ends.append(len(trained) - 1)", "ends.append(len(trained) - 2)", LAID),
            ("mask ignored", "+= completion.mask", "+= [True] * len(completion.mask)", LAID),
            ("users' turns trained", "mask[len(prompt) : end])", "[True] * (end - len(prompt)))", READ),
            ("past the end", "if trained) + 1", "if trained) + 2", READ),
            ("last turn alone", "last_turn_only=len(turns) == 1", "last_turn_only=True", READ),
            ("rejected is wanted", "Judged(prompt, rejected, False)", "Judged(prompt, rejected, True)", READ),
        ]
    ),
]


@pytest.fixture
def place(model_folder, pairs, tmp_path) -> Place:
    rows = pairs.read_text().splitlines(keepends=True)[:12]
    pairs.write_text("".join(rows))
    return Place(model_folder, pairs, tmp_path / "out")


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f"{f.file}: {f.name}")
def test_fault_is_caught(fault: Fault, place: Place, tmp_path, monkeypatch):
    module = copy_of(fault.file, tmp_path, monkeypatch, fault.old, fault.new)
    with pytest.raises(AssertionError, match="expected"):
        fault.check(module, place)


@pytest.mark.parametrize("file", sorted({f.file for f in FAULTS}))
def test_a_faithful_copy_passes(file: str, place: Place, tmp_path, monkeypatch):
    """Without this, a copy that does not even run would count as a fault caught."""
    module = copy_of(file, tmp_path, monkeypatch)
    for i, check in enumerate(dict.fromkeys(f.check for f in FAULTS if f.file == file)):
        check(module, place._replace(output=tmp_path / f"out-{i}"))
