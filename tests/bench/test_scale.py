"""The step whose memory docs/scale.md tells, in small: what one process holds is what the calculator counts."""

import pytest
from burnish.bench.runs import process, scale
from burnish.model import ModelConfig


@pytest.mark.parametrize("mode", scale.MODES)
def test_what_is_held_is_what_is_counted(monkeypatch, mode):
    small = ModelConfig(96, 32, 64, 2, 2, 2)
    monkeypatch.setattr(scale, "SHAPE", small)
    monkeypatch.setattr(scale, "LENGTH", 16)
    found = scale.step(mode)
    counted = scale.counted(mode, 1)
    assert found["held"] == counted["held"] and found["growth"] >= 0 and 3 < found["loss"] < 7
    assert scale.counted(mode, 2)["held"] < counted["held"]
    assert scale.table({(mode, 1): found}).count("\n") == 2


def test_a_measurement_is_of_processes_of_their_own():
    with pytest.raises(RuntimeError, match="KeyError: 'no mode'"):
        process.figures_of("scale", "no mode")
