"""Numbers in a file that are not finite: refused by file and name, or of no effect. What was loaded so would be
blamed on the learning rate."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from burnish.model import InputError, ModelConfig, Transformer, pack
from burnish.model.checkpoint import (
    SCORE_BIAS,
    _check_metadata,
    load_model,
    load_scalar_model,
    read_adapter,
    save_model,
)
from burnish.model.files import finite
from burnish.model.files.config_json import read_config
from burnish.model.scalar import ScalarModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

DATA = Path(__file__).parents[1] / "data"
HF = sorted((DATA / "tiny-hf").iterdir())
NAN, INF = float("nan"), float("inf")
ODD = [NAN, INF, -INF, 1e300, 10**400]
PACKED = pack([[1, 5, 9, 4, 7], [2, 3]])
TINY = ModelConfig(
    vocab_size=31, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2
)


def numbers(value: Any, *path: str) -> Iterator[tuple[str, ...]]:
    """The places of a parsed file at which there are numbers."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from numbers(inner, *path, key)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path


def with_number(raw: dict[str, Any], path: tuple[str, ...], number: float) -> dict[str, Any]:
    raw = json.loads(json.dumps(raw))
    inner = raw
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = number
    return raw


@pytest.mark.parametrize("folder", HF, ids=lambda folder: folder.name)
@torch.no_grad()
def test_a_number_of_config_json(folder: Path):
    raw = json.loads((folder / "config.json").read_text())
    unbroken = read_config(raw)
    for path in numbers(raw):
        for number in ODD:
            try:
                config = read_config(with_number(raw, path, number), "F")
            except InputError as error:
                assert re.match(rf"F: .*({path[-1]}|num_experts): expected ", str(error)), (
                    path,
                    number,
                    error,
                )
                continue

            if config == unbroken:
                continue
            model = Transformer(config)
            assert model.logits(model(PACKED)).isfinite().all(), (path, number)


# ---- weights


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(Transformer(TINY, seed=3), tmp_path / "model")
    return tmp_path / "model"


def breaking(file: Path, name: str, number: float, dtype: torch.dtype | None = None) -> str:
    """Put a number into a tensor of a safetensors file. Returns what a message begins with."""
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    tensors[name] = tensors[name].to(dtype or tensors[name].dtype)
    tensors[name].view(-1)[-1] = number
    save_file(tensors, file, metadata=metadata)
    return f"{file}: {name}: "


def weights():
    """Each dtype, name and number, quick in one combination with others."""
    dtypes, numbers = (torch.float32, torch.bfloat16, torch.float16), (NAN, INF, -INF)
    names = "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight"
    for i, j, k in product(range(3), repeat=3):
        yield pytest.param(names[i], numbers[j], dtypes[k], marks=[] if i == j == k else pytest.mark.slow)


@pytest.mark.parametrize("name, number, dtype", [*weights()])
def test_a_weight(folder: Path, name: str, number: float, dtype: torch.dtype):
    where = breaking(folder / "model.safetensors", name, number, dtype)
    for wanted in (torch.float32, torch.float16):
        with pytest.raises(InputError) as caught:
            load_model(folder, wanted)
        assert str(caught.value).startswith(f"{where}expected finite numbers, got NaN or infinity in 1 of ")


def test_a_dtype_that_is_too_narrow(folder: Path):
    where = breaking(folder / "model.safetensors", "model.norm.weight", 70_000.0)
    load_model(folder)
    load_model(folder, torch.bfloat16)
    with pytest.raises(
        InputError, match="the most that float16 holds, got 70000: take bfloat16 or float32"
    ) as caught:
        load_model(folder, torch.float16)
    assert str(caught.value).startswith(where)


def test_a_sum_that_is_too_large_is_no_fault(folder: Path):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"] = torch.full((31, 64), 6e4, dtype=torch.float16)
    save_file(tensors, folder / "model.safetensors")
    for dtype in (torch.float32, torch.float16):
        load_model(folder, dtype)


@pytest.mark.parametrize("part", ["quant_map", "nested_absmax", "nested_quant_map"])
def test_a_part_of_a_weight_in_4_bits(part: str, folder: Path):
    save_model(load_model(folder, base_4bit=True), folder.with_name("4bit"))
    where = breaking(
        folder.with_name("4bit") / "model.safetensors", f"model.layers.0.mlp.up_proj.weight.{part}", NAN
    )
    with pytest.raises(InputError) as caught:
        load_model(folder.with_name("4bit"))
    assert str(caught.value).startswith(where)


@pytest.mark.parametrize("number", [NAN, -INF])
def test_a_score(number: float, tmp_path: Path):
    save_model(ScalarModel(TINY), tmp_path / "reward")
    where = breaking(tmp_path / "reward" / "model.safetensors", "score.weight", number)
    with pytest.raises(InputError) as caught:
        load_scalar_model(tmp_path / "reward")
    assert str(caught.value).startswith(where)


# ---- adapters


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return shutil.copytree(DATA / "tiny-peft" / "qwen3-lora", tmp_path / "adapter")


@pytest.mark.parametrize("number, dtype", [(NAN, None), (INF, torch.float16), (1e300, torch.float64)])
def test_a_weight_of_an_adapter(adapter: Path, number: float, dtype: torch.dtype | None):
    file = adapter / "adapter_model.safetensors"
    where = breaking(file, next(iter(load_file(file))), number, dtype)
    with pytest.raises(InputError) as caught:
        read_adapter(adapter)
    assert str(caught.value).startswith(where)


@pytest.mark.parametrize("number", ODD)
@pytest.mark.parametrize(
    "key", ["r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "layers_to_transform"]
)
def test_a_number_of_adapter_config_json(adapter: Path, key: str, number: float):
    file = adapter / "adapter_config.json"
    value = {
        "rank_pattern": {"q_proj": number},
        "alpha_pattern": {"q_proj": number},
        "layers_to_transform": [number],
    }
    if key == "layers_to_transform" and number == 10**400:
        pytest.skip("an integer, of a layer that there is not")
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value.get(key, number)}))
    with pytest.raises(InputError, match=f"^{file}: {key}: expected "):
        read_adapter(adapter)


@pytest.mark.parametrize("text", ["nan", "-inf", "1e300", "x", ""])
def test_the_bias_of_an_adapter(text: str):
    with pytest.raises(InputError, match="score_bias: expected a number, got"):
        _check_metadata({SCORE_BIAS: text}, "adapter_model.safetensors")


# ---- planted faults


def passes_over(check: Callable[..., None], *arguments: Any, **patches: Any) -> None:
    with patch.multiple(finite, **patches), pytest.raises(BaseException, match="DID NOT RAISE"):
        check(*arguments)


def test_a_check_that_never_looks_is_found(folder: Path):
    passes_over(
        test_a_weight, folder, "model.norm.weight", NAN, torch.float32, _is_finite=lambda tensor: True
    )
