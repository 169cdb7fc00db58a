"""Negative controls: faults planted in what bounds a folder's numbers, caught by the named check."""

import json
import re
import struct
from typing import Any

import pytest
import torch
from burnish.model import ModelConfig
from burnish.model.adapter import add_lora
from burnish.model.adapters import expressions
from burnish.model.adapters.expressions import Expression
from burnish.model.checkpoint import load_model, save_model
from burnish.model.errors import InputError
from burnish.model.files import gguf_header
from burnish.model.text import token_ids
from burnish.model.transformer import Transformer
from faults import check_of, control, faults_of
from planted import plant
from safetensors.torch import load_file, save_file

TINY = ModelConfig(
    vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
)
NAMES = [
    f"model.layers.{i}.{part}"
    for i in range(3)
    for part in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")
]


# ---- the checks


def saved(tmp_path) -> Any:
    model = Transformer(TINY, seed=3)
    save_model(model, tmp_path / "tiny")
    add_lora(model, 2, base="tiny")
    save_model(model, tmp_path / "adapter")
    return tmp_path


def edit(file, key: str, value: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))


def refused(tmp_path, file: str, key: str, value: Any, expected: str) -> None:
    at = saved(tmp_path) / file
    edit(at, key, value)
    with pytest.raises(InputError, match=expected):
        load_model(at.parent)


@control
def layers(tmp_path):
    refused(tmp_path, "tiny/config.json", "num_hidden_layers", 50, "num_hidden_layers: expected at most 2")


@control
def a_size(tmp_path):
    refused(tmp_path, "tiny/config.json", "hidden_size", 18, "hidden_size: expected 16, by ")


@control
def a_rank(tmp_path):
    refused(tmp_path, "adapter/adapter_config.json", "r", 3, "r says 3")


@control
def a_token_id(tmp_path):
    refused(tmp_path, "tiny/config.json", "eos_token_id", 2**31, "eos_token_id: expected a token id")


@control
def a_type(tmp_path):
    at = saved(tmp_path) / "adapter"
    file = at / "adapter_model.safetensors"
    save_file({name: tensor.to(torch.int8) for name, tensor in load_file(file).items()}, file)
    with pytest.raises(InputError, match="expected floating point, got I8"):
        load_model(at)


@control
def metadata(tmp_path):
    at = saved(tmp_path) / "adapter"
    file = at / "adapter_model.safetensors"
    save_file(load_file(file), file, metadata={"base_4bit": "8"})
    with pytest.raises(InputError, match="base_4bit: expected nf4"):
        load_model(at)


@control
def special_files(tmp_path):
    at = saved(tmp_path) / "tiny"
    (at / "model.safetensors").unlink()
    (at / "model.safetensors").mkdir()
    with pytest.raises(InputError, match="not a regular file"):
        load_model(at)


@control
def a_place(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError):
        save_model(Transformer(TINY), tmp_path / "file" / "a" / "b")
    with pytest.raises(InputError, match="cannot be written"):
        save_model(Transformer(TINY), tmp_path / "new" / ("n" * 300))
    assert [*tmp_path.iterdir()] == [tmp_path / "file"]


@control
def expressions_as_re(tmp_path):
    for text in (
        r"(?!.*v_proj).*\.(q|v)_proj",
        r"(?:[a-z]+\.)*\d+\.(?:\w*\.?)*q_proj",
        r"(?:.*\b)*x?mlp\b.*",
    ):
        found = Expression(text)
        assert found.pattern is None
        assert [found.matches(n) for n in NAMES] == [re.fullmatch(text, n) is not None for n in NAMES]


@control
def expressions_with_an_end(tmp_path):
    with pytest.raises(InputError, match="matches quickly"):
        Expression("(?=.*(?=.*(?=.*(?=.*!))))", steps=expressions.Steps(5000)).matches(NAMES[0])


@control
def few_ways_alone_go_to_re(tmp_path):
    assert Expression("(a|b)+!").pattern is None and Expression(".*.*.*!").pattern is None


@control
def gguf_counts(tmp_path):
    file = tmp_path / "f.gguf"
    for count, keys, rest in (
        (2**60, 0, b""),
        (0, 1, b"\1" + bytes(7) + b"a" + struct.pack("<IIQ", 9, 0, 2**60)),
    ):
        file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, count, keys) + rest + bytes(24))
        with pytest.raises(InputError, match=r"expected as many .* as its"):
            gguf_header.check_header(file)


@control
def gguf_values(tmp_path):
    count = gguf_header.MOST_VALUES + 1
    array = b"\1" + bytes(7) + b"a" + struct.pack("<IIQ", 9, 0, count) + bytes(count)
    (tmp_path / "f.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + array)
    with pytest.raises(InputError, match="expected at most"):
        gguf_header.check_header(tmp_path / "f.gguf")


@control
def ends(tmp_path):
    at = saved(tmp_path) / "tiny"
    edit(at / "config.json", "eos_token_id", 10**9)
    with pytest.raises(InputError, match="eos_token_id: expected a token that ends a text"):
        token_ids.read_stop_ids(at, lambda token: None)


# ---- planted faults

FAULTS = faults_of(__file__)


@pytest.mark.parametrize("check", dict.fromkeys(map(check_of, FAULTS)), ids=lambda check: check.__name__)
def test_the_checks_pass_without_a_fault(check, tmp_path):
    check(tmp_path)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.id)
def test_a_planted_fault_is_caught(fault, tmp_path, monkeypatch):
    plant(fault, monkeypatch)
    with pytest.raises((AssertionError, InputError, pytest.fail.Exception)):
        check_of(fault)(tmp_path)
