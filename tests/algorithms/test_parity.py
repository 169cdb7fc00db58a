"""Every loss on the same tensors beside TRL 1.16's own code: its stored values, and where trl is installed, that code.

docs/conventions.md says where trainers differ and which of them a loss here agrees with.
"""

import importlib.util
import json

import pytest
import torch
from burnish.algorithms.dpo import VARIANTS
from burnish.algorithms.kto import kto_loss
from burnish.algorithms.reward import bradley_terry_loss, centering_loss
from burnish.algorithms.sft import dft_loss, sft_loss


@pytest.fixture
def golden(data):
    return json.loads((data / "trl.json").read_text())


def ours(golden) -> dict[str, float]:
    inputs = {
        name: values if name == "lengths" else torch.tensor(values)
        for name, values in golden["inputs"].items()
    }

    lengths = torch.tensor(inputs["lengths"])
    beta = golden["beta"]
    logprob = torch.cat([row[:length] for row, length in zip(inputs["logprob"], lengths, strict=True)])
    total = torch.segment_reduce(logprob, "sum", lengths=lengths)
    given = {"beta": beta, "label_smoothing": golden["label_smoothing"], "gamma": golden["gamma"]}

    found = {}
    for name, variant in VARIANTS.items():
        flags = {flag: value for flag, value in given.items() if flag in variant.flags}
        chosen, rejected = variant.scores(total, inputs["ref_logprob"], lengths).view(2, 4)
        found[name] = variant.loss(chosen, rejected, 4, **flags)

    kl = (inputs["kl_logprob"] - inputs["ref_kl_logprob"]).mean().clamp(min=0)
    found["kto"] = kto_loss(total - inputs["ref_logprob"], inputs["labels"], kl, 8, beta, 1.2, 0.8)
    chosen, rejected = inputs["scores"].view(2, 4)
    found["bradley_terry"] = bradley_terry_loss(chosen, rejected, inputs["margin"], 4)
    found["centered"] = found["bradley_terry"] + 0.05 * centering_loss(chosen, rejected, 4)
    found["sft_nll"], found["sft_dft"] = sft_loss(logprob, sum(lengths)), dft_loss(logprob, sum(lengths))
    return {name: loss.item() for name, loss in found.items()}


# losses of dpo.VARIANTS without a counterpart in TRL: test_dpo.py alone holds their values
NOT_IN_TRL: set[str] = set()


def test_losses_are_those_of_trl(golden):
    found = ours(golden)
    assert set(found) == set(golden["losses"]) | NOT_IN_TRL
    for name, loss in golden["losses"].items():
        assert found[name] == pytest.approx(loss, rel=1e-6, abs=1e-6), name


def test_each_setting_is_felt(golden):
    """A control: with any of the settings or inputs changed, a loss that reads it differs by more than the bound."""
    readers = {
        "beta": set(golden["losses"]) - {"bradley_terry", "centered", "sft_nll", "sft_dft"},
        "label_smoothing": {"cdpo", "robust"},
        "gamma": {"simpo"},
        "ref_logprob": {"dpo", "cdpo", "robust", "hinge", "ipo", "ipo_sum", "apo_zero", "apo_down", "kto"},
        "kl_logprob": {"kto"},
        "margin": {"bradley_terry", "centered"},
    }

    before = ours(golden)
    for name, expected in readers.items():
        place = golden if name in golden else golden["inputs"]
        kept = place[name]
        place[name] = kept + 0.01 if isinstance(kept, float) else [x + 0.1 * i for i, x in enumerate(kept)]
        after = ours(golden)
        place[name] = kept
        felt = {loss for loss in before if abs(after[loss] - before[loss]) > 1e-5}
        assert felt - NOT_IN_TRL == expected, name


def test_the_stored_values_are_what_trl_computes(data, golden):
    pytest.importorskip("trl")
    spec = importlib.util.spec_from_file_location("make_trl_golden", data / "make_trl_golden.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.make_inputs() == golden["inputs"]
    assert module.compute(golden["inputs"]) == pytest.approx(golden["losses"], rel=1e-6)
