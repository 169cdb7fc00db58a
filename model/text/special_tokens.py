"""The special tokens that the files of a model's folder name."""

from pathlib import Path
from typing import Any, NoReturn

from ..errors import InputError, shown

KNOWN = {f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")}


def special_tokens(config: dict[str, Any], file: Path) -> dict[str, str]:
    """Return the special tokens of a config: bos_token, eos_token and the like -> their text.

    A token is a text, or an object with the text as `content`. null stands for no token, and so does "", except that an
    empty eos_token is an error. An unknown name that ends in _token may be a token (image_token) or a setting
    (num_image_token), so a value that is not a token is ignored there.
    Raises InputError if a known token, or an entry in a list of additional tokens, is not a token.
    """
    names = {}
    for name, value in config.items():
        if name.startswith("add_") and name.endswith("_token"):
            if not isinstance(value, bool | None):
                raise InputError(f"{file}: {name}: expected true, false or null, got {shown(value)}")
        elif name.endswith("_token"):
            token = value.get("content") if isinstance(value, dict) else value
            if isinstance(token, str) and token:
                names[name] = token
            elif name in KNOWN and value is not None and (token != "" or name == "eos_token"):
                _refuse(name, value, file)

        elif name in ("additional_special_tokens", "extra_special_tokens") and value is not None:
            if not isinstance(value, dict | list):
                raise InputError(f"{file}: {name}: expected a list of tokens, got {shown(value)}")
            for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
                token = entry.get("content") if isinstance(entry, dict) else entry
                if not isinstance(token, str) or not token:
                    _refuse(f"{name}.{key}", entry, file)
    return names


def _refuse(name: str, value: Any, file: Path) -> NoReturn:
    raise InputError(
        f"{file}: {name}: expected a token's text, or an object with it as content, got {shown(value)}"
    )
