"""A folder that is saved: whole or as it was, never half-written, never over what is no model."""

from pathlib import Path

import pytest
import torch
from burnish.model import InputError, ModelConfig, Transformer
from burnish.model.checkpoint import load_model, save_model
from burnish.model.files import replacing as replacing_file
from tiny import TINY


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt(), RuntimeError("bug")])
@pytest.mark.parametrize("replacing", [False, True])
def test_an_interrupted_save_leaves_what_was_there(tmp_path, monkeypatch, error, replacing):
    target = tmp_path / "model"
    if replacing:
        save_model(Transformer(TINY, seed=1), target)
    before = {file.name: file.read_bytes() for file in target.glob("*")}

    def interrupted(tensors, file, metadata):
        Path(file).write_bytes(b"half")
        raise error

    monkeypatch.setattr("burnish.model.files.tensors.save_file", interrupted)
    with pytest.raises(InputError if isinstance(error, OSError) else type(error)):
        save_model(Transformer(TINY, seed=2), target)
    assert {file.name: file.read_bytes() for file in target.glob("*")} == before
    assert [entry.name for entry in tmp_path.iterdir()] == (["model"] if replacing else [])


def test_a_failed_rename_puts_the_earlier_model_back(tmp_path, monkeypatch):
    """Two steps, as on a file system that cannot exchange folders."""
    monkeypatch.setattr(replacing_file, "_exchange", lambda one, other: False)
    target = tmp_path / "model"
    save_model(Transformer(TINY, seed=1), target)
    rename = Path.rename

    def failing(self, to):
        if self.suffix == ".partial":
            raise OSError("no")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(InputError, match="model: cannot be written: no"):
        save_model(Transformer(TINY, seed=2), target)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
    assert torch.equal(load_model(target).head, Transformer(TINY, seed=1).head)


def test_a_model_replaces_a_model_and_nothing_else(tmp_path):
    save_model(Transformer(TINY, seed=1), tmp_path / "model")
    (tmp_path / "model" / "stale.safetensors").write_bytes(b"")
    save_model(Transformer(TINY, seed=2), tmp_path / "model")
    assert torch.equal(load_model(tmp_path / "model").head, Transformer(TINY, seed=2).head)
    written = {"config.json", "generation_config.json", "model.safetensors"}
    assert {file.name for file in (tmp_path / "model").iterdir()} == written
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents" / "thesis.txt").write_text("years of work")
    for other in (tmp_path / "documents", tmp_path / "documents" / "thesis.txt"):
        with pytest.raises(InputError, match="found something else: not replaced"):
            save_model(Transformer(TINY), other)
    assert (tmp_path / "documents" / "thesis.txt").read_text() == "years of work"


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/model: cannot be written"):
        save_model(Transformer(TINY), tmp_path / "file" / "model")


def test_the_saved_folder_has_ordinary_permissions(tmp_path):
    (tmp_path / "plain").mkdir()
    save_model(Transformer(TINY), tmp_path / "model")
    assert (tmp_path / "model").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_folder_with_anything_but_a_model_is_not_replaced(tmp_path):
    """A config.json alone does not make a folder ours: what else lies there would be lost."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    model = Transformer(ModelConfig(8, 8, 8, 1, 1))
    with pytest.raises(InputError):
        save_model(model, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years"
