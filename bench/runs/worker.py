"""A worker process for bench/runs/gpu.py: it collects the tests once, then runs the tests that its parent names.

The worker reports how each test ended. Before pytest starts, the worker imports only the standard library. So a broken
import elsewhere in Burnish fails while pytest collects the tests, and is reported to the parent.
"""

import os
import sys
from contextlib import nullcontext, suppress
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

# files of kernels/ whose code has run on a GPU as it stands
RAN = ("norm", "rope", "glu")
MOST_KEPT = 4 << 30  # bytes that torch may keep between two tests, as other workers need memory, too
DETAIL = 4000  # characters of a failure
LOST = "the device is lost"


class Test(NamedTuple):
    """A test, its op, and its wave: a number by which the tests are ordered."""

    name: str  # pytest's node id
    op: str  # its file in kernels/, or the subject of its test file
    wave: int  # 0 and 1 run before all others


class End(NamedTuple):
    """The outcome of a test, with the reason and the details of a failure."""

    outcome: str  # passed, skipped, failed
    why: str = ""  # one line
    detail: str = ""


def first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def placed(item: Any) -> Test:
    """Return the Test of a pytest item. The op and the wave follow from the item's Case, or else from its file."""
    parameters: dict[str, Any] = item.callspec.params if hasattr(item, "callspec") else {}
    case: Any = parameters.get("case")
    dtype = str(parameters.get("dtype", ""))
    file = item.path.stem.removeprefix("test_")
    first = file.partition("_")[0]  # test_attention_packed.py, for example, belongs to test_attention.py
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
    """Return why the device no longer answers; "" if it answers, or if this process has not used it yet.

    If torch holds much unused memory, it is released.
    """
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
    """A pytest plugin that runs the tests that the parent process names, and sends back how each ended."""

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
    """Collect the tests, then run each test that the parent process names, until the pipe is closed.

    number: the file descriptor of this process's end of the pipe.
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
