"""Names of the hub: the sentence that says how to fetch one, and the names that are none."""

import json

import pytest
from burnish.algorithms.__main__ import main
from burnish.model.checkpoint import load_model, load_scalar_model
from burnish.model.errors import InputError
from burnish.model.files.folder import base_of, way_to_fetch
from burnish.model.text.tokenizer import Tokenizer

NAME = "Qwen/Qwen3-0.6B"
FETCH = "; fetch it from the hub with `hf download Qwen/Qwen3-0.6B --local-dir models/Qwen3-0.6B`"
PASS = ", and pass models/Qwen3-0.6B"


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_name_of_the_hub_says_how_to_fetch_it():
    assert way_to_fetch(NAME) == FETCH + PASS
    assert way_to_fetch("owner/rows", "dataset") == (
        "; fetch it from the hub with `hf download owner/rows --repo-type dataset --local-dir data/rows`, "
        "and pass data/rows"
    )
    assert way_to_fetch(NAME, into=NAME) == FETCH.replace("models/Qwen3-0.6B", NAME)


@pytest.mark.parametrize(
    "name",
    ["Qwen3", "/Qwen/Qwen3", "./Qwen", "../Qwen", "a/b/c", "Qwen/", "~/x", "models/x", "runs/x", "a/b c", ""],
)
def test_a_path_is_no_name_of_the_hub(name):
    assert way_to_fetch(name) == ""


def test_what_is_here_is_no_name_of_the_hub(tmp_path):
    (tmp_path / "Qwen").mkdir()
    assert way_to_fetch(NAME) == ""


@pytest.mark.parametrize("read", [Tokenizer.load, load_model, load_scalar_model])
def test_every_reader_of_a_model_says_it(read):
    with pytest.raises(InputError) as refused:
        read(NAME)
    assert str(refused.value).startswith(f"{NAME}: ") and str(refused.value).endswith(FETCH + PASS)


@pytest.mark.parametrize(
    "command", ["sft --data rows.jsonl", "evaluate --data rows.jsonl", "merge --output o", "chat"]
)
def test_every_command_says_it(command, capsys):
    assert main([*command.split(), "--model", NAME]) == 1
    assert capsys.readouterr().err.strip().endswith(FETCH + PASS)


def test_a_base_of_the_hub_is_fetched_to_where_its_name_finds_it(tmp_path):
    (tmp_path / "adapter").mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": NAME}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError) as refused:
        base_of(tmp_path / "adapter")
    assert str(refused.value).endswith(
        f"; fetch it from the hub with `hf download {NAME} --local-dir {NAME}`"
    )
    (tmp_path / NAME).mkdir(parents=True)
    assert base_of(tmp_path / "adapter") == tmp_path / NAME
