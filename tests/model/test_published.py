"""Folders in the layout of the hub with tiny weights (tests/data/make_published.py): loaded, or refused by name."""

import json
from pathlib import Path

import pytest
import torch
from burnish.model import InputError, pack
from burnish.model.checkpoint import load_model, save_model
from burnish.model.text.tokenizer import Tokenizer
from make_published import IDS, LOADED, PUBLISHED, REFUSED, ROWS, make


@pytest.fixture
def golden(data):
    return json.loads((data / "published.json").read_text())["golden"]


def logits_of(folder: Path) -> torch.Tensor:
    """Logits (3, V) of the rows that published.json holds."""
    model = load_model(folder)
    packed = pack([IDS])
    with torch.no_grad():
        return model.logits(model(packed))[[1, len(IDS) // 2, -1]]


@pytest.mark.parametrize("name", LOADED)
def test_a_published_folder_computes_what_transformers_does(name, golden, tmp_path):
    folder = make(name, tmp_path / name)
    torch.testing.assert_close(logits_of(folder), torch.tensor(golden[name]), atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", LOADED)
def test_a_published_folder_is_written_again_as_it_was(name, golden, tmp_path):
    """The same numbers, in the dtype that the hub has."""
    folder = make(name, tmp_path / name)
    save_model(load_model(folder), tmp_path / "saved", Tokenizer.load(folder))
    torch.testing.assert_close(logits_of(tmp_path / "saved"), torch.tensor(golden[name]), atol=2e-5, rtol=0)
    was, now = (json.loads((at / "config.json").read_text()) for at in (folder, tmp_path / "saved"))
    assert now["dtype"] == was.get("torch_dtype", "bfloat16")


@pytest.mark.parametrize("name", REFUSED)
def test_a_format_that_is_not_read_is_named_in_one_sentence(name, tmp_path):
    folder = make(name, tmp_path / name)
    with pytest.raises(InputError) as error:
        load_model(folder)
    text = str(error.value)
    assert REFUSED[name] in text.lower() and text.startswith(str(folder)), text
    assert len(text) - len(str(folder)) < 250 and "\n" not in text, text


@pytest.mark.parametrize("name", REFUSED)
def test_a_format_is_named_where_config_json_does_not_say_it(name, tmp_path):
    """A converter lost quantization_config: the tensors show what they are."""
    folder = make(name, tmp_path / name)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError) as error:
        load_model(folder)
    assert REFUSED[name].split("-")[0] in str(error.value).lower(), error.value


def test_the_list_holds_every_kind_of_layout():
    """Dense and with experts, in shards and in one file, quantised in each way that is named."""
    kinds = {config["model_type"] for config, *_ in PUBLISHED.values()}
    assert kinds == {"gemma3_text", "gpt_oss", "deepseek_v3", "qwen3_moe", "qwen2_moe", "llama"}
    assert any(config.get("num_nextn_predict_layers") for config, *_ in PUBLISHED.values())
    assert any(beyond for *_, beyond in PUBLISHED.values())
    assert all(config["vocab_size"] == ROWS for config, *_ in PUBLISHED.values())
