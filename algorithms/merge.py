"""Fold an adapter into the model that it was trained on: a plain Hugging Face folder, for whatever reads no adapters.

Run:    burnish merge --model ADAPTER --output DIR
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from ..model.adapter import merge_lora
from ..model.checkpoint import load_model, load_scalar_model, read_adapter, save_model
from ..model.errors import InputError
from ..model.folder import is_adapter
from ..model.tokenizer import Tokenizer
from ._command import run_command


@dataclass(frozen=True)
class Config:
    model: Path  # an adapter's folder
    output: Path  # new folder
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the weights that are written


def merge(cfg: Config) -> Path:
    """Returns the new folder. A base that was in 4 bits is multiplied out: what was trained is what is written."""
    if not is_adapter(cfg.model):
        raise InputError(f"--model {cfg.model}: expected an adapter's folder, with an adapter_config.json")
    scores = "score.weight" in read_adapter(cfg.model)[0].tensors
    model = (load_scalar_model if scores else load_model)(cfg.model)
    merge_lora(model)
    save_model(model.to(getattr(torch, cfg.dtype)), cfg.output, Tokenizer.load(cfg.model))
    print(f"written: {cfg.output}")
    return cfg.output


if __name__ == "__main__":
    sys.exit(run_command("merge", sys.modules[__name__], merge, sys.argv[1:]))
