"""The workers that run the tests of a GPU: how tests are handed out, and how failed workers are replaced.

A worker gets one test at a time, and answers with the outcome of the test. If a worker dies or does not answer, its
test fails with the worker's last output, and the worker is replaced. A worker is also replaced if the device no longer
answers after its test, as after an illegal access. Otherwise every later test in that process would fail.

Tests run in waves: first one shape of each op in bf16, then one shape of each Case and the shipped tiles, then all
others. WEIGHTS divides the time between the ops: an op of weight 2 gets twice the time of an op of weight 1. Within a
wave, the next test is of the op that has used the smallest part of its share. Tests that remain when the time is over
are listed as not reached.
"""

import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import suppress
from itertools import count
from multiprocessing.connection import Pipe, wait
from pathlib import Path
from typing import Any

from ..record import ROOT
from .verdict import Verdict
from .worker import DETAIL, LOST, End, Test

# relative shares of the time, by kernel file; lower for code that has run on a GPU before
WEIGHTS = {
    "attention": 3,
    "divergence": 2,
    "logprob": 2,
    "lora": 2,
    "nf4": 2,
    "moe": 2,
    "sample": 2,
    "decode": 2,
    "topk": 2,
    "norm": 1,
    "rope": 1,
    "glu": 1,
}
PATIENCE = 90.0  # seconds for one test
START = 180.0  # seconds for a worker's imports and its collection
STARTS = 3  # workers in a row that may fail to start
LAST_WORDS = 3.0  # seconds for a process that is about to end
SAFE = {"PYTHONSAFEPATH": "1"}  # in the repository root, our kernels/ would hide Hugging Face's package
SERVE = "from burnish.bench.runs.worker import serve; serve({})"
TRACE = 1000  # first characters of the interpreter's own trace


# ---- a worker


class Worker:
    """A pytest process and its current test.

    The process leads a session of the operating system, so that its child processes can be killed together with it.
    """

    def __init__(self, log: Path, chip: str | None, arguments: list[str]):
        self.log, self.ready = log, False
        self.test: Test | None = None
        self.pipe, theirs = Pipe()

        environment = os.environ | SAFE | {"TORCHINDUCTOR_COMPILE_THREADS": "1"}  # one for each worker
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-c", SERVE.format(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                cwd=ROOT,
                env=environment,
                start_new_session=True,
            )

        theirs.close()
        self.begin(None, (chip, arguments))

    def begin(self, test: Test | None, message: Any) -> None:
        self.test, self.begun, self.logged = test, time.monotonic(), self.log.stat().st_size
        with suppress(OSError):  # the worker has died: the next read from it notices
            self.pipe.send(message)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.begun

    def output(self) -> str:
        """Return the worker's output since its current test began, or only a fatal error of the Python interpreter."""
        with self.log.open("rb") as log:
            log.seek(self.logged)
            text = log.read().decode(errors="replace")
        start = text.find("Fatal Python error")
        return text[start:][:TRACE] if start >= 0 else text[-DETAIL:]

    def end(self) -> None:
        end_all(self.process)
        self.pipe.close()

    def died(self, asking: bool, end: float) -> str:
        """Return how the process ended, as "signal SIGSEGV" or "status 1".

        asking: abort the process first, so that a hanging process prints where it hangs. The process has a few seconds
        to end, but only until the time `end`.
        """
        if asking:
            self.process.send_signal(signal.SIGABRT)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(max(0.0, min(LAST_WORDS, end - time.monotonic())))
        status = self.process.poll()
        return f"signal {signal.Signals(-status).name}" if status and status < 0 else f"status {status}"


def kill(process: subprocess.Popen[Any]) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def end_all(process: subprocess.Popen[Any]) -> None:
    """Kill a process and all processes of the session that it leads. Wait at most a second until it has ended."""
    kill(process)
    with suppress(subprocess.TimeoutExpired):
        process.wait(1)


# ---- the order of the tests


class Plan:
    """The order of tests: by wave, and within a wave from the op with the least seconds used, divided by its weight."""

    def __init__(self, tests: list[Test]):
        self.waiting: dict[str, list[Test]] = {}
        for test in sorted(tests, key=lambda test: test.wave):
            self.waiting.setdefault(test.op, []).append(test)
        self.spent: dict[str, float] = defaultdict(float)  # seconds of workers, by op

    def take(self, running: list[tuple[str, float]]) -> Test | None:
        """Remove and return the next test. running: (op, seconds so far) of each test that runs now."""
        order = [*WEIGHTS, *self.waiting]
        spent = self.spent.copy()
        for op, seconds in running:
            spent[op] += seconds + 1e-3

        def rank(op: str) -> tuple[float, ...]:
            return min(self.waiting[op][0].wave, 2), spent[op] / WEIGHTS.get(op, 1), order.index(op)

        op = min((op for op, tests in self.waiting.items() if tests), key=rank, default=None)
        return None if op is None else self.waiting[op].pop(0)


# ---- all workers


class Crew:
    """All workers of a run.

    chip: if given, tests compile their kernels for this chip, and run nothing. arguments: the arguments of pytest.
    patience: the time limit of one test in seconds.
    """

    def __init__(
        self, verdict: Verdict, chip: str | None, arguments: list[str], processes: int, patience: float
    ):
        self.verdict, self.chip, self.arguments = verdict, chip, arguments
        self.processes, self.patience = processes, patience
        self.plan: Plan | None = None  # until a worker has collected
        self.workers: list[Worker] = []
        self.failed_starts = 0
        self.end = math.inf

    def run(self, end: float) -> None:
        """Run until every test has ended, or until `end`. Tests that are unfinished at `end` count as not reached."""
        self.end = end
        with tempfile.TemporaryDirectory() as folder:
            logs = (Path(folder) / f"{n}.log" for n in count())
            try:
                while time.monotonic() < end and self.failed_starts < STARTS:
                    while len(self.workers) < self.processes and self.lacks_workers():
                        self.workers.append(Worker(next(logs), self.chip, self.arguments))
                    if not self.workers:
                        break

                    for pipe in wait([w.pipe for w in self.workers], timeout=0.5):
                        self.hear(next(w for w in self.workers if w.pipe is pipe))
                    for worker in list(self.workers):
                        if time.monotonic() < end:  # ending a hanging worker takes time
                            self.watch(worker)
                    self.verdict.write(self.waiting)
            finally:
                self.stop()

    def stop(self) -> None:
        """End the workers. Their unfinished tests count as not reached."""
        for worker in self.workers:  # kill all first: a worker may take long to end
            kill(worker.process)
        for worker in list(self.workers):
            if worker.test is not None:
                self.waiting[worker.test.op].insert(0, worker.test)
            self.dismiss(worker)
        self.verdict.write(self.waiting)

    @property
    def waiting(self) -> dict[str, list[Test]]:
        """Return op -> the tests that no worker has got yet."""
        return {} if self.plan is None else self.plan.waiting

    def lacks_workers(self) -> bool:
        if self.plan is None:
            return True
        return sum(w.test is None for w in self.workers) < sum(map(len, self.waiting.values()))

    def hear(self, worker: Worker) -> None:
        """Read a worker's message. The first message has the collected tests, a later message the outcome of a test.

        If the pipe is closed, the worker has died.
        """
        try:
            message = worker.pipe.recv()
        except (EOFError, OSError):
            self.bury(worker, "its process died", asking=False)
            return

        if not worker.ready:
            worker.ready, self.failed_starts = True, 0
            tests, broken = message
            if self.plan is None:
                self.plan = Plan([Test(*test) for test in tests])
                for name, *end in broken:
                    self.verdict.add(Test(name, "collection", 0), End(*end), 0)
            return

        end = End(*message)
        self.ended(worker, end)
        if end.why.startswith(LOST):
            self.dismiss(worker)

    def watch(self, worker: Worker) -> None:
        """Give an idle worker its next test, and end a worker that takes too long."""
        if worker.test is not None or not worker.ready:
            patience = self.patience if worker.ready else START
            if worker.seconds > patience:
                self.bury(worker, f"did not end within {patience:.0f} s", asking=True)
            return

        assert self.plan is not None
        test = self.plan.take([(w.test.op, w.seconds) for w in self.workers if w.test is not None])
        if test is None:
            self.dismiss(worker)
        else:
            worker.begin(test, test.name)

    def ended(self, worker: Worker, end: End) -> None:
        assert self.plan is not None and worker.test is not None
        self.plan.spent[worker.test.op] += worker.seconds
        self.verdict.add(worker.test, end, worker.seconds)
        worker.test = None

    def bury(self, worker: Worker, why: str, asking: bool) -> None:
        """Record a failure for the test of a dead or hanging worker, or for its start, and remove the worker."""
        how = worker.died(asking, self.end)
        end = End("failed", f"{why}: {how}", worker.output())
        if worker.test is not None:
            self.ended(worker, end)
        else:
            self.failed_starts += 1
            self.verdict.add(Test("a worker's start", "collection", 0), end, worker.seconds)
        self.dismiss(worker)

    def dismiss(self, worker: Worker) -> None:
        self.workers.remove(worker)
        worker.end()
