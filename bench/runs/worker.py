"""One process of tests for bench/runs/gpu.py: it collects once, is then told a test at a time, and says how each ended.

Before pytest it imports the standard library alone: what breaks an import breaks the collection, and is told.
"""

import os
import sys
from contextlib import nullcontext, suppress
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

# files of kernels/ whose code has run on a GPU as it stands
RAN = ("norm", "rope", "glu")
MOST_KEPT = 4 << 30  # bytes that torch may keep between two tests: other workers want memory, too
DETAIL = 4000  # characters of a failure
LOST = "the device is lost"


class Test(NamedTuple):
    name: str  # pytest's
    op: str  # its file in kernels/, or what its own file tests
    wave: int  # 0 and 1: before all others


class End(NamedTuple):
    outcome: str  # passed, skipped, failed
    why: str = ""  # a line
    detail: str = ""


def first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def placed(item: Any) -> Test:
    """A test's place in the order, by its Case where it has one."""
    parameters: dict[str, Any] = item.callspec.params if hasattr(item, "callspec") else {}
    case: Any = parameters.get("case")
    dtype = str(parameters.get("dtype", ""))
    file = item.path.stem.removeprefix("test_")
    first = file.partition("_")[0]  # of test_attention_packed.py, beside test_attention.py
    file = first if item.path.with_stem(f"test_{first}").exists() else file
    if not hasattr(case, "fused"):
        return Test(item.nodeid, file, 3)

    from ... import kernels
    from ..cases.registry import CASES

    op = getattr(kernels, case.op).__module__.rpartition(".")[2]
    shape = case.shapes[1 % len(case.shapes)]
    one = item.originalname == "test_accuracy" and "bfloat16" in dtype and parameters["dims"] == shape
    if one and case is next(c for c in CASES if c.op == case.op):
        return Test(item.nodeid, op, 0)
    if one or item.originalname == "test_accuracy_in_shipped_tiles":
        return Test(item.nodeid, op, 2 if op in RAN else 1)
    return Test(item.nodeid, op, 3 if dtype in ("", "torch.bfloat16") else 4)


def lost() -> str:
    """Why the device answers no more; "" where it does, or where nobody has asked it anything."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return ""
    try:
        torch.cuda.synchronize()
        if torch.cuda.memory_reserved() > MOST_KEPT:
            torch.cuda.empty_cache()
    except RuntimeError as error:
        return first_line(str(error))
    return ""


class Plugin:
    """pytest's loop: the parent names a test, and hears its end."""

    def __init__(self, pipe: Connection):
        self.pipe = pipe
        self.broken: list[tuple[str, ...]] = []
        self.end = End("passed")

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.broken.append((report.nodeid, *self._failed(report)))

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and self.end.outcome != "failed":
            self.end = self._failed(report)
        elif report.skipped and self.end.outcome == "passed":
            self.end = End("skipped")

    def pytest_runtestloop(self, session: Any) -> bool:
        items = {item.nodeid: item for item in session.items}
        self.pipe.send(([tuple(placed(item)) for item in items.values()], self.broken))
        while True:
            item, self.end = items[self.pipe.recv()], End("passed")
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
            why = lost()
            self.pipe.send(("failed", f"{LOST}: {why}", self.end.detail) if why else tuple(self.end))
            if why:
                os._exit(0)

    @staticmethod
    def _failed(report: Any) -> End:
        crash = getattr(report.longrepr, "reprcrash", None)
        text = report.longreprtext
        return End("failed", first_line(crash.message if crash else text), text[-DETAIL:])


def serve(number: int) -> None:
    """Collect, then run what is asked for, until the parent goes or ends this process.

    number: the file descriptor of its end of the pipe.
    """
    import pytest

    pipe = Connection(number)
    chip, arguments = pipe.recv()
    context: Any = nullcontext()
    if chip:
        from ..cases import case
        from ..ops import static

        def compiled(tested: Any, tensors: Any, *_: Any, **__: Any) -> None:
            case.run(tested.fused, tested, tensors, case.make_upstream(tested, tensors))

        case.assert_accurate, context = compiled, static.compile_only(chip)

    with context, suppress(EOFError):
        pytest.main(["-q", "-p", "no:cacheprovider", *arguments], plugins=[Plugin(pipe)])
