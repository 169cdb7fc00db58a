"""Helpers that make sections of documents from files of figures. A message about a wrong file names the file."""

import re
from collections.abc import Callable
from typing import Any

from ...model.files.text_files import read_object
from .. import record
from ..record import newest_results, newest_run, reading

NO_RUN = "No run is kept in `bench/results` yet.\n"


def of_run(kind: str) -> Callable[[Callable[[str, dict[str, Any]], str]], Callable[[], str]]:
    """Return a decorator that calls a function of (path, result) with the newest run of a kind, to make a section."""

    def section(make: Callable[[str, dict[str, Any]], str]) -> Callable[[], str]:
        def made() -> str:
            if (run := newest_run(kind)) is None:
                return NO_RUN
            with reading(run[0]):
                return make(*run)

        return made

    return section


def of_kept(name: str) -> Callable[[Callable[[dict[str, Any]], str]], Callable[[], str]]:
    """Return a decorator that calls a function with the contents of a file in bench/, to make a section."""

    def section(make: Callable[[dict[str, Any]], str]) -> Callable[[], str]:
        def made() -> str:
            file = record.ROOT / "bench" / name
            accepted = read_object(file)
            with reading(file):
                return make(accepted)

        return made

    return section


def of_machines(make: Callable[[str, dict[str, Any]], list[str]]) -> list[str]:
    """Call make(path, result) for the newest results of each machine. Return all returned parts in one list."""
    parts = []
    for path, result in newest_results().items():
        with reading(path):
            parts += make(path, result)
    return parts


def command_of(result: dict[str, Any]) -> str:
    """Return the command of a run as it is spelled today, without the flags that say where its figures are written."""
    command = re.sub(r"python -m burnish\.bench(\.| )", "burnish bench ", result["command"])
    return re.sub(r" --(json|keep)\b", "", command)


def whence(path: str, result: dict[str, Any]) -> str:
    """Return the command of a result, with its commit, date and file, as text."""
    return f"`{command_of(result)}` at commit {result['commit']}, {result['date']}, from `{path}`"
