"""The ids that end a text, according to a model's folder."""

from collections.abc import Callable
from pathlib import Path

from ..errors import InputError, shown
from ..files.config_keys import is_token_id
from ..files.text_files import read_optional
from ..vocabulary import warn_once


def read_stop_ids(folder: Path, token_of: Callable[[int], str | None]) -> list[int]:
    """Return the ids of eos_token_id, a number or a list, from generation_config.json or else from config.json.

    token_of: returns the token of an id, or None.
    An id that is in neither the tokenizer nor the head is left out with a warning. If this leaves no id, InputError is
    raised. -1 stands for no id, as in early Llama folders.
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
            f"{file}: eos_token_id: expected a token that ends a text, got {shown(repr(value))}, which is neither in "
            f"the tokenizer nor in the head of {rows} rows"
        )
    if len(known) < len(ids):
        warn_once(
            f"{file}: eos_token_id: {shown([i for i in ids if i not in known])} is not a token and is ignored"
        )
    return known
