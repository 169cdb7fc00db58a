"""Flags of `burnish bench`, read by argparse for machines without tyro, such as a GPU machine with torch and triton.

A Config is a dataclass like those of algorithms/. The comment of a field is its help text, and the type gives the
allowed values. A field that is marked with POSITIONAL is a positional argument.
"""

import argparse
import dataclasses
import shlex
from collections.abc import Sequence
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from ..algorithms.run.flags import POSITIONAL, bounds, check_number, helps


class Kind(NamedTuple):
    """The type of a flag: the function that reads one word, whether it takes several words, and the allowed values."""

    read: Any  # a function of the word
    many: bool = False
    choices: tuple[Any, ...] | None = None


def kind(hint: Any) -> Kind:
    """Return the Kind of a field's annotation, such as `int`, `int | None`, `Literal[...]` or `tuple[int, ...]`."""
    origin, parts = get_origin(hint), [part for part in get_args(hint) if part not in (NoneType, Ellipsis)]
    if origin is tuple:
        return kind(parts[0])._replace(many=True)
    if origin is Literal:
        return Kind(type(parts[0]), choices=tuple(parts))
    if origin in (Union, UnionType):
        (hint,) = parts
        return kind(hint)
    return Kind(hint)


def parse(name: str, config: type, words: Sequence[str], description: str) -> Any:
    """Return the Config that a command line describes. Exit with status 2 if the command line is invalid."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=name, description=description, formatter_class=plain)
    texts, marked = helps(config), get_type_hints(config, include_extras=True)
    hints = get_type_hints(config)

    for field in dataclasses.fields(config):
        found, text = kind(hints[field.name]), texts.get(field.name, "")
        if all(field.default is not each for each in (dataclasses.MISSING, None, False, ())):
            text = f"{text} (default: {field.default})"
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING

        # a flag that is not given is not set, and keeps its default
        options: dict[str, Any] = {"help": text.replace("%", "%%"), "default": argparse.SUPPRESS}
        if found.read is bool:
            options |= {"action": "store_true"}
        else:
            options |= {"type": found.read, "choices": found.choices, "nargs": "+" if found.many else None}
            options |= {"metavar": None if found.choices else found.read.__name__.upper()}

        if POSITIONAL in getattr(marked[field.name], "__metadata__", ()):
            options |= {"nargs": "*" if found.many else None, "metavar": field.name.upper()}
            parser.add_argument(field.name, **options)
        else:
            parser.add_argument(flag(field.name), required=required, **options)

    given = vars(parser.parse_args(words))
    return config(
        **{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    )


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def check(cfg: Any) -> None:
    """Raise InputError if a number in a Config is outside the bounds that its field declares."""
    for name, found in bounds(type(cfg)).items():
        check_number(name, getattr(cfg, name), found)


def spelled(command: str, cfg: Any) -> str:
    """Return the command line that gives a Config: positional arguments, then all flags that are not at their default.

    A positional argument may look like a flag, for example an argument that is passed on to pytest. Then all positional
    arguments come last, after a `--`.
    """
    marked = get_type_hints(type(cfg), include_extras=True)
    places, flags = [], []
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        if value == field.default:
            continue
        words = [str(each) for each in value] if isinstance(value, tuple) else [str(value)]
        if POSITIONAL in getattr(marked[field.name], "__metadata__", ()):
            places += words
        else:
            flags += [flag(field.name), *([] if value is True else words)]
    if any(place.startswith("-") for place in places):
        flags, places = [], [*flags, "--", *places]
    return shlex.join([*command.split(), *places, *flags])
