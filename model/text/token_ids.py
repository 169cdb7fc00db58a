"""The ids that end a text, as a folder names them."""

from collections.abc import Callable
from pathlib import Path

from ..errors import InputError, shown
from ..files.config_keys import is_token_id
from ..files.text_files import read_optional
from ..vocabulary import warn_once


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
        warn_once(
            f"{file}: eos_token_id: {shown([i for i in ids if i not in known])} is no token and ends nothing"
        )
    return known
