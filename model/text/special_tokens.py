"""The special tokens that a model's folder names."""

from pathlib import Path
from typing import Any, NoReturn

from ..errors import InputError, shown

KNOWN = {f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")}


def special_tokens(config: dict[str, Any], file: Path) -> dict[str, str]:
    """bos_token, eos_token and the like -> their text, from a text or an object with `content`.

    null is no token; nor is "", except as eos_token, where it is refused. Raises InputError where a known token is
    neither a text nor an object, or an entry in a list of further ones is not. An unknown name that ends so may be a
    setting: image_token is a token, num_image_token a number.
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
