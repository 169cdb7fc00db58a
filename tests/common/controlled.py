"""The negative controls of algorithms/: what a check may use, and how a copy is given to it.

A check takes a copy of a module and a Place, and fails with a message that says what it expected.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
from faults import Fault, check_of
from planted import copy_of


class Place(NamedTuple):
    """The files that a check may use beside the module."""

    model: Path
    data: Path
    output: Path


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def same(found: float, expected: float, bound: float = 1e-5) -> None:
    assert abs(found - expected) <= bound, f"expected {expected}, got {found}"


def assert_a_stopped_run_goes_on(module: ModuleType, make: Callable[..., Any], place: Place, **flags) -> None:
    """Resume after two steps of three: the third logs what it would have logged."""
    whole = make(module, place, steps=3, save_every=2, output=place.output / "whole", **flags)
    module.train(whole)
    cut = dataclasses.replace(whole, steps=2, output=place.output / "cut")
    module.train(cut)
    module.train(dataclasses.replace(cut, steps=3, resume=True))

    one, other = metrics_of(whole.output)[2], metrics_of(cut.output)[2]
    for name in one:
        if "second" not in name and isinstance(one[name], float):
            same(one[name], other[name], 0)


def assert_caught(fault: Fault, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    module = copy_of(fault.file, place.output.parent, monkeypatch, fault)
    with pytest.raises(AssertionError, match="expected"):
        check_of(fault)(module, place)


def assert_faithful(file: str, faults: list[Fault], place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without this, a copy that does not even run would count as a fault caught."""
    module = copy_of(file, place.output.parent, monkeypatch)
    for i, check in enumerate(dict.fromkeys(check_of(fault) for fault in faults if fault.file == file)):
        check(module, place._replace(output=place.output.parent / f"out-{i}"))
