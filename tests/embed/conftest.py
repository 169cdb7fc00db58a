"""Small transformers models, and what both sides of a comparison run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor


@pytest.fixture
def load(data: Path) -> Callable[..., Any]:
    """load("llama") is the transformers model of tests/data/tiny-hf/llama in fp32; more are keys of its config."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")

    def load(name: str, **more: Any) -> Any:
        folder = data / "tiny-hf" / name
        config = transformers.AutoConfig.from_pretrained(folder, **more)
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=torch.float32
        ).eval()

    return load


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 96, (3, 13), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def padding(ids: Tensor) -> dict[str, Tensor]:
    """Attention masks (B, T), by where the padding is."""
    left = torch.ones_like(ids)
    left[1, :4], left[2, :9] = 0, 0
    return {"none": torch.ones_like(ids), "left": left, "right": left.flip(1)}
