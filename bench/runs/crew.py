"""The workers of a GPU's tests: who is handed which test, who is replaced, and what the verdict hears of it.

A worker is handed one test at a time and answers with its end. One that dies or does not answer is replaced, and its
test named with what the worker said last. One whose device answers no more after a test, as after an illegal access,
names that test and is replaced, too: a context that is lost fails whatever runs in it later.

First comes one shape of each op in bf16, then one of each of its Cases and the tiles that are shipped, then all else.
Of those that wait, the next is of the op that has had the least time for its weight, so that each has its share of the
budget and none eats another's. What is left when the time is over is listed as not reached.
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

# by kernel file; those whose code has run on a GPU before wait longer, and for less
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
START = 180.0  # for a worker's imports and its collection
STARTS = 3  # workers in a row that may fail to start
LAST_WORDS = 3.0  # for a process that is about to end
SAFE = {"PYTHONSAFEPATH": "1"}  # in the root, our kernels/ would hide Hugging Face's
SERVE = "from burnish.bench.runs.worker import serve; serve({})"
TRACE = 1000  # characters of the interpreter's own trace, from its top


# ---- a worker


class Worker:
    """A process of pytest's, and what it is at. Its own session: whatever it starts ends with it."""

    def __init__(self, log: Path, chip: str | None, arguments: list[str]):
        self.log, self.ready = log, False
        self.test: Test | None = None
        self.pipe, theirs = Pipe()

        environment = os.environ | SAFE | {"TORCHINDUCTOR_COMPILE_THREADS": "1"}  # as many as workers
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
        with suppress(OSError):  # it has died since: who listens to it next will see
            self.pipe.send(message)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.begun

    def said(self) -> str:
        """Its words since it began, from the interpreter's last words on where there are any."""
        with self.log.open("rb") as log:
            log.seek(self.logged)
            text = log.read().decode(errors="replace")
        start = text.find("Fatal Python error")
        return text[start:][:TRACE] if start >= 0 else text[-DETAIL:]

    def end(self) -> None:
        end_all(self.process)
        self.pipe.close()

    def died(self, asking: bool, end: float) -> str:
        """The way it ended. asking: it has not, and is told to; one that hangs then prints where, until `end`."""
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
    """End a process that leads a session, and whatever it started; one that the kernel holds is left behind."""
    kill(process)
    with suppress(subprocess.TimeoutExpired):
        process.wait(1)


# ---- their order


class Plan:
    """The order of tests: the waves of one shape first, then an op with the least time for its weight."""

    def __init__(self, tests: list[Test]):
        self.waiting: dict[str, list[Test]] = {}
        for test in sorted(tests, key=lambda test: test.wave):
            self.waiting.setdefault(test.op, []).append(test)
        self.spent: dict[str, float] = defaultdict(float)  # seconds of workers, by op

    def take(self, running: list[tuple[str, float]]) -> Test | None:
        """The next test. running: the op of each test that runs, and its seconds so far."""
        order = [*WEIGHTS, *self.waiting]
        spent = self.spent.copy()
        for op, seconds in running:
            spent[op] += seconds + 1e-3

        def rank(op: str) -> tuple[float, ...]:
            return min(self.waiting[op][0].wave, 2), spent[op] / WEIGHTS.get(op, 1), order.index(op)

        op = min((op for op, tests in self.waiting.items() if tests), key=rank, default=None)
        return None if op is None else self.waiting[op].pop(0)


# ---- all of them


class Crew:
    """The workers. arguments: pytest's; patience: seconds for one test; chip: compile for it, and launch nothing."""

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
        """Until every test has ended, or until `end`; what runs by then was not reached."""
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
                        if time.monotonic() < end:  # one that hangs has its last words first
                            self.watch(worker)
                    self.verdict.write(self.waiting)
            finally:
                self.stop()

    def stop(self) -> None:
        """End the workers; what they are at was not reached."""
        for worker in self.workers:  # all at once: one may take its time
            kill(worker.process)
        for worker in list(self.workers):
            if worker.test is not None:
                self.waiting[worker.test.op].insert(0, worker.test)
            self.dismiss(worker)
        self.verdict.write(self.waiting)

    @property
    def waiting(self) -> dict[str, list[Test]]:
        """Tests that nobody has been handed yet, by op."""
        return {} if self.plan is None else self.plan.waiting

    def lacks_workers(self) -> bool:
        if self.plan is None:
            return True
        return sum(w.test is None for w in self.workers) < sum(map(len, self.waiting.values()))

    def hear(self, worker: Worker) -> None:
        """Take a worker's word: what it has collected, then its test's end; by the pipe's end it is no more."""
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
        """Hand a test to one that waits; bury one that takes too long."""
        if worker.test is not None or not worker.ready:
            patience = self.patience if worker.ready else START
            if worker.seconds > patience:
                self.bury(worker, f"no end after {patience:.0f} s", asking=True)
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
        how = worker.died(asking, self.end)
        end = End("failed", f"{why}: {how}", worker.said())
        if worker.test is not None:
            self.ended(worker, end)
        else:
            self.failed_starts += 1
            self.verdict.add(Test("a worker's start", "collection", 0), end, worker.seconds)
        self.dismiss(worker)

    def dismiss(self, worker: Worker) -> None:
        self.workers.remove(worker)
        worker.end()
