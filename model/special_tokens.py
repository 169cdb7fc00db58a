"""The names of special tokens, as a model's folder says them."""

import os
from pathlib import Path
from typing import Any

from .errors import InputError, shown
from .text_files import read_object


def read_optional(file: Path) -> dict[str, Any]:
    """An absent file is an empty one: all but tokenizer.json are optional."""
    return read_object(file) if os.path.lexists(file) else {}


def special_tokens(config: dict[str, Any], file: Path) -> dict[str, str]:
    """bos_token, eos_token and the like, written as a text or as an object with `content`; null is absent.

    Raises InputError where one is neither, and where a list of further ones holds something else.
    """
    names = {}
    for name, value in config.items():
        if name.startswith("add_") and name.endswith("_token"):
            if not isinstance(value, bool | None):
                raise InputError(f"{file}: {name}: expected true, false or null, got {shown(value)}")
        elif name.endswith("_token") and value is not None:
            names[name] = _token(value, name, file)
        elif name in ("additional_special_tokens", "extra_special_tokens") and value is not None:
            entries = (
                value.items()
                if isinstance(value, dict)
                else enumerate(value if isinstance(value, list) else ())
            )
            if not isinstance(value, dict | list):
                raise InputError(f"{file}: {name}: expected a list of tokens, got {shown(value)}")
            for key, token in entries:
                _token(token, f"{name}.{key}", file)
    return names


def _token(value: Any, name: str, file: Path) -> str:
    token = value.get("content") if isinstance(value, dict) else value
    if not isinstance(token, str) or not token:
        raise InputError(
            f"{file}: {name}: expected a token's text, or an object with it as content, got {shown(value)}"
        )
    return token
