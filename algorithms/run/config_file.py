"""Reading of the file of --config: a mapping from flags to values in YAML, or in JSON, such as a run's config.json.

    learning_rate: 1e-6            # or learning-rate
    reward: [reward.py:right]      # flags that take several values take a list
    lora_alpha: null               # as None on the command line

The type of a flag decides how its value is read, so that YAML 1.1 changes none: `1e-6`, text to YAML, is a number for
--learning-rate, and `no` stays text for --prompt-column. YAML is read as a tree of texts, so that no tag builds an
object.
"""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from ...model.errors import InputError, shown
from ...model.files.text_files import parse_json, read_text
from .flags import bounds, check_number
from .words import did_you_mean

MOST_BYTES = 2**16  # of the file; a run's config.json has about 2,000
SWITCHES = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
YAML = "tag:yaml.org,2002:"
SCALARS = {f"{YAML}{kind}" for kind in ("str", "int", "float", "bool", "null", "timestamp", "merge", "value")}


class Misfit(Exception):
    """A value that does not fit its flag. The message is what was expected."""


def read_config_file(file: Path, config: type, command: str) -> dict[str, Any]:
    """Return the values of a file of flags, by the names of the Config's fields.

    command: the name of the command in messages. Raises InputError, which names file and key, for anything but flags of
    the Config with values of their types and within their bounds.
    """
    where = f"--config {file}"
    try:
        text = read_text(file, MOST_BYTES).removeprefix("\ufeff")
    except InputError as error:
        raise InputError(f"--config {error}") from None
    pairs = _json_pairs(text, where) if file.suffix == ".json" else _yaml_pairs(text, where)

    hints, within = get_type_hints(config, include_extras=True), bounds(config)
    fields = [field.name for field in dataclasses.fields(config)]
    values: dict[str, Any] = {}
    for key, value in pairs:
        name = key.replace("-", "_")
        if name not in fields:
            sentence = f"{where}: {shown(key)}: expected a flag of {command}, got another key"
            raise InputError(f"{sentence}{did_you_mean(name, fields)}")
        if name in values:
            raise InputError(f"{where}: {key}: expected once, got it twice")

        try:
            values[name] = fitted(hints[name], value)
        except Misfit as error:
            raise InputError(f"{where}: {key}: expected {error}, got {_got(value)}") from None
        if name in within and isinstance(values[name], int | float):
            try:
                check_number(name, values[name], within[name])
            except InputError as error:
                raise InputError(f"{where}: {error}") from None
    return values


def fitted(hint: Any, value: Any) -> Any:
    """Return the value of a flag with the annotation `hint`. value: None, bool, int, float, str, or a list of these.

    A text is read as on the command line. One value stands for a list of one. Raises Misfit.
    """
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return fitted(parts[0], value)
    if origin in (Union, UnionType):
        return _fitted_to_one(parts, value)
    if origin is tuple:
        return tuple(fitted(parts[0], each) for each in (value if isinstance(value, list) else [value]))
    if origin is Literal:
        for choice in parts:
            if value == choice and isinstance(value, str):
                return choice
        raise Misfit(f"one of {', '.join(map(str, parts))}")
    return READERS[hint](value)


def _fitted_to_one(parts: tuple[Any, ...], value: Any) -> Any:
    """Return the value by the first of several types that fits. null fits None alone."""
    if value is None and NoneType in parts:
        return None
    expected: list[str] = []
    for part in parts:
        try:
            if part is not NoneType:
                return fitted(part, value)
        except Misfit as error:
            expected.append(str(error))
    raise Misfit(" or ".join([*dict.fromkeys(expected), *(["null"] if NoneType in parts else [])]))


def _switch(value: Any) -> bool:
    found = SWITCHES.get(value.lower()) if isinstance(value, str) else value
    if not isinstance(found, bool):
        raise Misfit("true or false")
    return found


def _integer(value: Any) -> int:
    try:
        if isinstance(value, str | int) and not isinstance(value, bool):
            return int(value)
    except ValueError:
        pass
    raise Misfit("a whole number")


def _number(value: Any) -> float:
    try:
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            value = (
                value.lower().replace(".inf", "inf") if isinstance(value, str) else value
            )  # as YAML writes it
            return _not_nan(float(value))
    except (ValueError, OverflowError):
        pass
    raise Misfit("a number")


def _not_nan(number: float) -> float:
    if math.isnan(number):
        raise ValueError
    return number


def _text(value: Any) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise Misfit("text")
    return value


def _path(value: Any) -> Path:
    if not isinstance(value, str) or "\0" in value:
        raise Misfit("a path")
    return Path(value)


READERS = {bool: _switch, int: _integer, float: _number, str: _text, Path: _path}


def _got(value: Any) -> str:
    if isinstance(value, Nested):
        return value.kind
    return "null" if value is None else shown(value if isinstance(value, str) and value else repr(value))


# ---- pairs of key and value


class Nested(NamedTuple):
    """A value that no flag takes, such as a mapping. kind: its name in messages."""

    kind: str


def _json_pairs(text: str, where: str) -> Iterator[tuple[str, Any]]:
    found = parse_json(text, where)
    if not isinstance(found, dict):
        raise InputError(f"{where}: expected an object of flags, got {_kind_of_json(found)}")
    for key, value in found.items():
        if isinstance(value, list):
            value = [Nested("a list") if isinstance(each, list | dict) else each for each in value]
        yield key, Nested("an object") if isinstance(value, dict) else value


def _kind_of_json(value: Any) -> str:
    return "a list" if isinstance(value, list) else shown(repr(value))


def _yaml_pairs(text: str, where: str) -> Iterator[tuple[str, Any]]:
    """Yield keys and values of YAML. A scalar is its text, and None if it is null. Aliases are never multiplied out."""
    import yaml

    try:
        root = yaml.compose(text, yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise InputError(f"{where}: not YAML: {line}{error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{where}: not YAML: {error}") from None
    except RecursionError:
        raise InputError(f"{where}: not YAML: lists and mappings nested too deeply") from None

    if not isinstance(root, yaml.MappingNode):
        got = "nothing" if root is None else "a list" if isinstance(root, yaml.SequenceNode) else "one value"
        raise InputError(f"{where}: expected a mapping of flags, such as `steps: 100`, got {got}")
    for key, value in root.value:
        line = f"{where}: line {key.start_mark.line + 1}"
        if not isinstance(key, yaml.ScalarNode):
            raise InputError(f"{line}: expected a flag's name as key, got a list or a mapping")
        if isinstance(value, yaml.SequenceNode) and value.tag == f"{YAML}seq":
            yield key.value, [_yaml_scalar(each) for each in value.value]
        else:
            yield key.value, _yaml_scalar(value)


def _yaml_scalar(node: Any) -> Any:
    """Return the text of a scalar, None for null, and Nested for anything else."""
    kinds = {f"{YAML}map": "a mapping", f"{YAML}seq": "a list"}
    if node.tag not in SCALARS:
        return Nested(kinds.get(node.tag, f"the tag {shown(node.tag.replace(YAML, '!!'))}"))
    return None if node.tag == f"{YAML}null" else node.value
