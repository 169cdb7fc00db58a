"""Reading of a command line into a Config by tyro: flags in groups, defaults as one would write them, near names.

The flags --model, --data, --output and --config come first in --help. The groups follow, in the order of GROUPS. A
value comes from the command line, else from the file of --config, else from the Config's default.
"""

import dataclasses
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType, NoneType
from typing import Annotated, Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from ...model.errors import shown
from .config_file import Misfit, fitted, read_config_file
from .flags import POSITIONAL, SamplingFlags, TrainingFlags, helps
from .words import did_you_mean, wrapped

FIRST = ("model", "data", "output")  # the first flags in --help
GROUPS = ("objective", "data", "sampling", "optimizer", "adapter", "evaluation", "run")
CONFIG_HELP = "file of flags, YAML or JSON{}; flags beside it override it"
RUNS_OWN = ", such as a run's config.json"  # in the help of the commands that write one
METAVARS = {int: "INT", float: "FLOAT", str: "STR", Path: "PATH"}


def group_of(config: type, name: str) -> str:
    """Return the group of a flag: that of the class which first defines the flag.

    A flag that a method defines itself belongs to its objective. A command without an objective, such as `merge`, lists
    its own flags first, under "".
    """
    first = next(cls for cls in reversed(config.__mro__) if name in vars(cls).get("__annotations__", ()))
    return vars(first).get("group", "objective" if issubclass(config, TrainingFlags) else "")


def parsed(name: str, module: ModuleType, arguments: Sequence[str], summary: str = "") -> Any:
    """Parse command-line arguments to the module's Config.

    name: the command's name in messages. summary: the first line of --help, by default that of the module's docstring.
    Raises InputError for a wrong file of --config. For wrong usage the program ends with status 2.
    """
    import tyro  # not needed for a Config that is made in Python

    config = module.Config
    fields = {field.name: field for field in dataclasses.fields(config)}
    _check_words(name, config, arguments)
    file = _config_file(arguments)
    values = {} if file is None else read_config_file(Path(file), config, name)

    # 1. a dataclass of flags for each group
    texts, hints = helps(config), get_type_hints(config, include_extras=True)
    own = [flag for flag in vars(config).get("__annotations__", ()) if flag not in FIRST]
    first = {flag: i for i, flag in enumerate([*FIRST, *own])}
    members: dict[str, list[Any]] = {"": []}
    for field in sorted(fields.values(), key=lambda field: first.get(field.name, math.inf)):
        positional = POSITIONAL in getattr(hints[field.name], "__metadata__", ())
        top = field.name in FIRST or positional
        group = "" if top else group_of(config, field.name)
        member = _member(field, hints[field.name], texts.get(field.name, ""), positional, values)
        members.setdefault(group, []).append(member)

    help_ = CONFIG_HELP.format(RUNS_OWN if issubclass(config, TrainingFlags | SamplingFlags) else "")
    of_file = Annotated[
        Path | None, tyro.conf.arg(help=help_, metavar="PATH", help_behavior_hint="(default: none)")
    ]
    place = sum(member[0] in FIRST for member in members[""])
    members[""].insert(place, ("config", of_file, dataclasses.field(default=None)))

    # 2. the groups in one dataclass
    top = members.pop("")
    for group in (*GROUPS, *(members.keys() - {*GROUPS})):
        if group in members:
            flags = dataclasses.make_dataclass(group, members[group], frozen=True, kw_only=True)
            top.append((f"{group}_", Annotated[flags, tyro.conf.arg(name=group, help="")]))
    whole: Any = dataclasses.make_dataclass("Flags", top, frozen=True, kw_only=True)

    # 3. the arguments; --no-X is accepted for every switch, and not shown
    summary = wrapped(summary or (module.__doc__ or "").splitlines()[0])
    marks: list[Any] = [tyro.conf.OmitArgPrefixes]
    if {"-h", "--help"} & {*arguments}:
        marks.append(tyro.conf.FlagCreatePairsOff)
    given = vars(tyro.cli(whole, prog=name, args=arguments, description=summary, config=marks))
    for group in members:
        given |= vars(given.pop(f"{group}_"))
    return config(**{flag: given[flag] for flag in fields})


def _member(
    field: Any, hint: Any, text: str, positional: bool, values: Mapping[str, Any]
) -> tuple[str, Any, Any]:
    """Return a flag as make_dataclass takes it: name, annotation and default.

    text: its help. values: those of the file of --config, by name.
    """
    import tyro

    default: dict[str, Any] = {"default": field.default, "default_factory": field.default_factory}
    if field.name in values:
        default = {"default": values[field.name]}

    text, hint_ = _help(text, default)
    several = get_origin(_base(hint)) is tuple
    of_place = f"[{field.name.upper()} ...]" if several else field.name.upper()
    marked = tyro.conf.arg(
        help=text,
        metavar=of_place if positional else _kind(hint),
        help_behavior_hint=hint_,
    )
    annotation = Annotated[hint, marked]
    return (
        field.name,
        tyro.conf.Positional[annotation] if positional else annotation,
        dataclasses.field(**default),
    )


def _kind(hint: Any) -> str | None:
    """Return the word in --help for a flag's values, such as INT, or None for a switch."""
    base = _base(hint)
    if get_origin(base) is tuple:
        return f"{_kind(get_args(base)[0])} ..."
    if get_origin(base) is Literal:
        return f"{{{','.join(map(str, get_args(base)))}}}"
    return METAVARS.get(base)


def _base(hint: Any) -> Any:
    """Return the type behind Annotated and `| None`."""
    if hasattr(hint, "__metadata__"):
        return _base(get_args(hint)[0])
    parts = [part for part in get_args(hint) if part is not NoneType]
    return _base(parts[0]) if NoneType in get_args(hint) and len(parts) == 1 else hint


def _help(text: str, default: Mapping[str, Any]) -> tuple[str, str]:
    """Return a flag's help without its default, and the words about its default, as one would write it.

    The help may end with the default that None stands for: "(default: all)".
    """
    found = re.fullmatch(r"(.*) (\(default: .*\))", text)
    text, words = (found[1], found[2]) if found else (text, "(default: none)")
    value = default["default"]
    if value is dataclasses.MISSING and default["default_factory"] is not dataclasses.MISSING:
        value = str(default["default_factory"]())
        value = re.sub(r"\d{8}-\d{6}-[0-9a-f]{4}", "DATE-TIME-RANDOM", value)
    if value is dataclasses.MISSING or value is None or value == ():
        return text, words
    return text, f"(default: {' '.join(map(_written, value if isinstance(value, tuple) else (value,)))})"


def _written(value: Any) -> str:
    """Return a value as one would write it: 1e-6 for 0.000001, 1 for 1.0, on for True."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return re.sub(r"e([+-])0*(\d)", r"e\1\2", f"{value:g}") if isinstance(value, float) else str(value)


# ---- the command line before tyro


def _words(arguments: Sequence[str]) -> list[str]:
    """Return the words before `--`, behind which every word is a positional argument."""
    words = list(arguments)
    return words[: words.index("--")] if "--" in words else words


def _config_file(arguments: Sequence[str]) -> str | None:
    """Return the file that --config names, or None. The last of several counts, as for every flag."""
    files = [values[0] for flag, values in _flags(arguments) if flag == "--config" and values]
    return files[-1] if files else None


def _check_words(name: str, config: type, arguments: Sequence[str]) -> None:
    """End the program with status 2 and one sentence for an unknown flag, with the nearest one, or a wrong value."""
    hints = get_type_hints(config)
    known = [*hints, *(f"no_{flag}" for flag, hint in hints.items() if hint is bool), "config", "help"]
    for word, values in _flags(arguments):
        flag = word[2:].replace("-", "_")
        if flag not in known and not flag.startswith("tyro_"):
            way_out = did_you_mean(flag.replace("_", "-"), [each.replace("_", "-") for each in known], "--")
            _leave(f"{name}: {word}: no such flag{way_out or ';'} {name} --help lists all flags")

        hint = hints.get(flag, bool)
        optional = NoneType in get_args(hint)
        for value in values if get_origin(_base(hint)) is tuple else values[: hint is not bool]:
            if value.lower() == "nan":  # refused by the bounds
                continue
            try:
                fitted(hint, None if optional and value == "None" else value)
            except Misfit as error:
                _leave(f"{name}: {word}: expected {str(error).removesuffix(' or null')}, got {shown(value)}")


def _flags(arguments: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Return each flag of the command line with the words behind it, up to the next flag."""
    found: list[tuple[str, list[str]]] = []
    for word in _words(arguments):
        if word.startswith("--"):
            flag, separator, value = word.partition("=")
            found.append((flag, [value] * bool(separator)))
        elif found:
            found[-1][1].append(word)
    return found


def _leave(sentence: str) -> NoReturn:
    print(sentence, file=sys.stderr)
    raise SystemExit(2)
