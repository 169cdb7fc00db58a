"""Sections of documents, made of what is kept: errors in a file become a sentence that names it."""

from collections.abc import Callable
from typing import Any

from ...model.files.text_files import read_object
from .. import record
from ..record import newest_results, newest_run, reading

NO_RUN = "No run is kept in `bench/results` yet.\n"


def of_run(kind: str) -> Callable[[Callable[[str, dict[str, Any]], str]], Callable[[], str]]:
    """A section from the newest run of a kind: make(path, result)."""

    def section(make: Callable[[str, dict[str, Any]], str]) -> Callable[[], str]:
        def made() -> str:
            if (run := newest_run(kind)) is None:
                return NO_RUN
            with reading(run[0]):
                return make(*run)

        return made

    return section


def of_kept(name: str) -> Callable[[Callable[[dict[str, Any]], str]], Callable[[], str]]:
    """A section from a file of bench/."""

    def section(make: Callable[[dict[str, Any]], str]) -> Callable[[], str]:
        def made() -> str:
            file = record.ROOT / "bench" / name
            accepted = read_object(file)
            with reading(file):
                return make(accepted)

        return made

    return section


def of_machines(make: Callable[[str, dict[str, Any]], list[str]]) -> list[str]:
    """The parts that make(path, result) makes of each machine's newest results."""
    parts = []
    for path, result in newest_results().items():
        with reading(path):
            parts += make(path, result)
    return parts


def whence(path: str, result: dict[str, Any]) -> str:
    """The command of a result, its commit, day and file."""
    return f"`{result['command']}` at commit {result['commit']}, {result['date']}, from `{path}`"
