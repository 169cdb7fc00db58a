"""The ids that end a text, as a folder names them, and the warnings about ids that end nothing."""

import sys
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path

import torch

from ..errors import InputError, shown
from ..files.config_keys import is_token_id
from ..files.text_files import read_optional


def read_stop_ids(folder: Path, token_of: Callable[[int], str | None]) -> list[int]:
    """The ids of eos_token_id, a number or a list, in generation_config.json, else in config.json.

    token_of: the token of an id, or None. An id that neither the tokenizer nor the head has ends nothing: it is left
    out with a warning. Raises InputError where no other is left. -1 stands for none, as in early Llama folders.
    """
    files = [folder / name for name in ("generation_config.json", "config.json")]
    raw = {file: read_optional(file) for file in files}
    file = next((file for file in files if raw[file].get("eos_token_id") is not None), None)
    if file is None:
        return []
    value = raw[file]["eos_token_id"]
    ids = value if isinstance(value, list) else [value]
    if not all(is_token_id(token) for token in ids):
        raise InputError(
            f"{file}: eos_token_id: expected a token's id or a list of them, got {shown(repr(value))}"
        )

    rows = raw[files[1]].get("vocab_size")
    rows = rows if isinstance(rows, int) else 0
    ids = [token for token in ids if token >= 0]
    known = [token for token in ids if token < rows or token_of(token) is not None]
    if ids and not known:
        raise InputError(
            f"{file}: eos_token_id: expected a token that ends a text, got {shown(repr(value))}, which neither the "
            f"tokenizer has nor the head of {rows} rows"
        )
    if len(known) < len(ids):
        _say(
            f"{file}: eos_token_id: {shown([i for i in ids if i not in known])} is no token and ends nothing"
        )
    return known


def say_what_never_ends(stop_ids: Iterable[int], rows: int, name: str = "the model") -> None:
    """Warn, once a process, where a head of `rows` never draws one of the ids that are to end a text."""
    stops = sorted(token for token in stop_ids if token >= rows)
    if stops:
        _say(f"{name} has no row for the stop ids {stops}, only for ids below {rows}: none ends a generation")


@lru_cache(maxsize=256)
def _say(line: str) -> None:
    first = not torch.distributed.is_available() or not torch.distributed.is_initialized()
    if first or torch.distributed.get_rank() == 0:
        print(f"warning: {line}", file=sys.stderr)
