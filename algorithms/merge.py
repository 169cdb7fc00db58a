"""Merge an adapter into its base model, and write a plain Hugging Face folder.

Programs without support for adapters can read the result. --model may also be a plain folder. That folder is then
written in another dtype, or its 4-bit weights are dequantised.

Run:    burnish merge --model ADAPTER --output DIR
        burnish merge --model FOLDER --output DIR --dtype bfloat16
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from ..model.adapter import linears, merge_lora
from ..model.checkpoint import has_score, load_model, load_scalar_model, save_model
from ..model.errors import InputError
from ..model.files.folder import base_of, is_adapter
from ..model.text.tokenizer import Tokenizer
from .run.checks import torch_dtype
from .run.command import run_command
from .run.flags import SaveDtype


@dataclass(frozen=True, kw_only=True)
class Config:
    model: Path  # an adapter's folder, or a plain model folder
    output: Path  # new folder
    dtype: SaveDtype = "auto"  # dtype of the written weights; auto: each tensor keeps the base's dtype
    base: Path | None = None  # the adapter's base, if the base that its file names is not found


def merge(cfg: Config) -> Path:
    """Write the merged model and return its folder. A 4-bit base is dequantised, as in training."""
    adapter, dtype = is_adapter(cfg.model), torch_dtype(cfg.dtype, "dtype")
    if not adapter and cfg.base is not None:
        raise InputError(f"--base: expected an adapter's folder as --model, got the whole model {cfg.model}")
    tokenizer = Tokenizer.load(_tokenizers(cfg.model, cfg.base) if adapter else cfg.model)
    model = (load_scalar_model if has_score(cfg.model) else load_model)(cfg.model, base=cfg.base)
    four_bit = any(layer.four_bit is not None for layer in linears(model).values())
    if not adapter and dtype is None and not four_bit:
        raise InputError(
            f"--model {cfg.model}: expected an adapter's folder, with an adapter_config.json, or --dtype"
        )
    merge_lora(model)
    save_model(model, cfg.output, tokenizer, dtype=dtype)
    print(f"written: {cfg.output}")
    return cfg.output


def _tokenizers(adapter: Path, base: Path | None) -> Path:
    """Return the folder with the tokenizer: the adapter's folder if it has tokenizer.json, otherwise the base's."""
    return adapter if (adapter / "tokenizer.json").is_file() else base or base_of(adapter)


if __name__ == "__main__":
    sys.exit(run_command("merge", sys.modules[__name__], merge, sys.argv[1:]))
