"""The keys of one config.json, each checked as it is read. Every error names the file and the key."""

from typing import Any, NoReturn

from ..errors import InputError, shown
from .architectures import ARCHITECTURES, COMMON, DEFAULTS, INERT, NULLABLE, ONLY

MOST = 2**31 - 1  # of any size: no model has more, and the product of two sizes still fits an int64
MOST_LAYERS = 10_000
LARGEST = 3.4028234663852886e38  # of any number in a computation: the largest in fp32


def is_token_id(value: object) -> bool:
    """Return whether a value is a valid token id. -1 is valid, too: it stands for "no token" in early Llama folders."""
    return type(value) is int and -1 <= value <= MOST


class Keys:
    """The keys of a parsed config.json, `raw`. source: the file's name in errors."""

    def __init__(self, raw: dict[str, Any], source: str):
        self.raw, self.source = {**raw}, source
        self.model_type = raw.get("model_type")
        if not isinstance(self.model_type, str) or self.model_type not in ARCHITECTURES:
            self.refuse("model_type", f"one of {', '.join(ARCHITECTURES)}", self.model_type)
        self.architecture = ARCHITECTURES[self.model_type]
        self.defaults = DEFAULTS | self.architecture.defaults
        for alias, key in self.architecture.aliases.items():
            if alias in raw and self.raw.setdefault(key, raw[alias]) != raw[alias]:
                self.refuse(alias, f"{shown(repr(self.raw[key]))}, as {key} says", raw[alias])

    def refuse(self, key: str, expected: str, got: Any) -> NoReturn:
        raise InputError(f"{self.source}: {key}: expected {expected}, got {shown(repr(got))}")

    def get(self, key: str, kind: type | tuple[type, ...], expected: str, least: float | None = None) -> Any:
        """Return the value of a key, or its default. Only a key that may be null can give None."""
        if key not in self.raw and key not in self.defaults:
            raise InputError(f"{self.source}: {key}: missing, expected {expected}")
        value = self.raw.get(key, self.defaults.get(key))
        if value is None:
            return None if key in NULLABLE else self.refuse(key, expected, value)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            self.refuse(key, expected, value)
        if least is not None and not least <= value <= LARGEST:  # NaN included
            self.refuse(key, expected, value)
        return value

    def has(self, key: str) -> bool:
        """Return whether the architecture has the key, even if the file lacks it."""
        return key in self.architecture.keys

    def size(self, key: str, most: int = MOST) -> Any:
        value = self.get(key, int, "a positive integer", least=1)
        if value is not None and value > most:
            self.refuse(key, f"at most {most}", value)
        return value

    def count(self, key: str) -> Any:
        return self.get(key, int, "an integer >= 0", least=0)

    def number(self, key: str) -> float:
        return float(self.get(key, (int, float), "a number >= 0", least=0))

    def flag(self, key: str) -> bool:
        """Return the bool of a key. It is False if the architecture does not have the key."""
        return key in COMMON | self.architecture.keys and self.get(key, bool, "true or false")

    def refuse_what_is_not_built(self) -> None:
        """Raise InputError for an unsupported value, and for a key that is neither read nor known to have no effect.

        An unknown key may change the numbers, even if it is false.
        """
        a = self.architecture
        read = COMMON | a.keys | a.aliases.keys()
        known = read | INERT.keys() | a.inert.keys()
        only = {key: values for key, values in (ONLY | a.only).items() if key not in read | a.inert.keys()}

        for key, value in self.raw.items():
            if key in only:
                # in Python True equals 1 and False equals 0, but here they differ
                if not any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in only[key]):
                    self.refuse(key, f"{only[key][0]!r}, nothing else is supported", value)
            elif key in a.repeats:
                if value != (once := self.size(a.repeats[key])):
                    self.refuse(key, f"{once!r}, as {a.repeats[key]} says", value)
            elif key not in known and not key.startswith("_") and value is not None:
                raise InputError(
                    f"{self.source}: {shown(key)}: not supported for {self.model_type}, got {shown(repr(value))}; "
                    "remove it if the model computes the same without it"
                )
