"""The trackers of --log-to: events for TensorBoard, read back, also of a resumed run."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from burnish.algorithms import sft
from burnish.algorithms.run.loop import Run
from burnish.algorithms.show import trackers
from burnish.model.errors import InputError


@pytest.fixture
def cfg(model_folder, demonstrations, tmp_path):
    torch.set_num_threads(1)
    flags = {"steps": 6, "batch_size": 4, "learning_rate": 1e-2, "save_every": 3, "device": "cpu"}
    return sft.Config(model=model_folder, data=demonstrations, output=tmp_path / "run", **flags)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def logged(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_tensorboard_has_every_number_of_every_line_also_after_a_resume(cfg, monkeypatch):
    cfg = dataclasses.replace(cfg, log_to="tensorboard")
    log, stop = Run.log, 5

    def stopping(self, metrics, tokens):
        log(self, metrics, tokens)
        if self._step + 1 == stop:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Run, "log", stopping)
        sft.train(cfg)
    assert [step for step, _ in scalars(cfg.output)["loss"]] == [0, 1, 2, 3, 4]

    sft.train(dataclasses.replace(cfg, resume=True))  # from step 3 on
    found, lines = scalars(cfg.output), logged(cfg.output)
    assert set(found) == set(lines[0]) - {"step"}
    for name, values in found.items():
        expected = [(line["step"], line[name]) for line in lines if line[name] is not None]
        assert [step for step, _ in values] == [step for step, _ in expected], name
        assert [value for _, value in values] == pytest.approx([value for _, value in expected], rel=1e-6)


def test_an_event_is_on_the_disk_as_soon_as_its_line(tmp_path):
    tracker = trackers.TensorBoard(tmp_path, 0)
    tracker.log({"step": 0, "loss": 2.0, "kl": None})
    assert scalars(tmp_path) == {"loss": [(0, 2.0)]}
    tracker.close()


def test_without_its_package_a_tracker_is_refused_before_anything_is_read(cfg, monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    missing = dataclasses.replace(cfg, log_to="tensorboard", data=cfg.data.with_name("nowhere.jsonl"))
    with pytest.raises(InputError, match="--log-to tensorboard: expected tensorboard to be installed"):
        sft.train(missing)
    assert not cfg.output.exists()
