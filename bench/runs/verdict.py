"""The outcomes of the tests on a GPU, by op: passed, skipped, failed or not reached. They are written to a file."""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..record import write_whole
from .worker import End, Test

KINDS = ("passed", "skipped", "failed", "not_reached")


def number(tests: int | list[Any]) -> int:
    return tests if isinstance(tests, int) else len(tests)


@dataclass
class Verdict:
    """The outcomes of tests by op. path: the file for the outcomes. facts: facts about the run, written to it, too."""

    path: Path | None
    facts: dict[str, Any]
    begun: float = field(default_factory=time.monotonic)
    ops: dict[str, dict[str, Any]] = field(default_factory=dict)

    def of(self, op: str) -> dict[str, Any]:
        empty = {"passed": 0, "skipped": 0, "failed": [], "not_reached": [], "seconds": 0.0}
        return self.ops.setdefault(op, empty)

    def add(self, test: Test, end: End, seconds: float) -> None:
        found = self.of(test.op)
        found["seconds"] = round(found["seconds"] + seconds, 2)
        if end.outcome == "failed":
            row = {"test": test.name, "why": end.why, "seconds": round(seconds, 2), "detail": end.detail}
            found["failed"].append(row)
        else:
            found[end.outcome] += 1

        clock = time.monotonic() - self.begun
        print(f"{clock:6.1f} s  {end.outcome:7}  {seconds:5.1f} s  {test.name}", flush=True)
        if end.outcome == "failed":
            print(f"          {end.why}", flush=True)

    def write(self, waiting: dict[str, list[Test]]) -> None:
        """Write the outcomes to the file. waiting: op -> the tests that were not reached yet."""
        for op, tests in waiting.items():
            self.of(op)["not_reached"] = [test.name for test in tests]
        if self.path:
            seconds = round(time.monotonic() - self.begun, 1)
            report = self.facts | {"seconds": seconds, "status": self.status, "ops": self.ops}
            write_whole(self.path, json.dumps(report, indent=1) + "\n")

    def total(self, what: str) -> int:
        return sum(number(found[what]) for found in self.ops.values())

    @property
    def status(self) -> int:
        if self.total("failed"):
            return 1
        return 3 if self.total("not_reached") or not self.total("passed") else 0

    def print_all(self) -> None:
        print(f"\n{'op':18}" + "".join(f"{kind:>13}" for kind in KINDS) + f"{'seconds':>11}")
        for op, found in self.ops.items():
            counts = "".join(f"{number(found[kind]):13}" for kind in KINDS)
            print(f"{op:18}{counts}{found['seconds']:11.1f}")

        for found in self.ops.values():
            for row in found["failed"]:
                print(f"FAILED {row['test']}: {row['why']}")
        totals = ", ".join(f"{self.total(kind)} {kind}" for kind in KINDS)
        print(f"tests: {totals.replace('_', ' ')}", flush=True)
