"""All that a GPU is asked, within a time, with a verdict whatever happens.

    python -m burnish.bench gpu [--seconds S] [--steps tests bench tune] [--commit COMMIT] [-- ARGUMENT ...]
    python -m burnish.bench gpu --rehearse CHIP [...]       without a GPU: the accuracy tests compile, and run nothing

ARGUMENT: what pytest is to collect, by default tests/kernels and what samples with CUDA graphs.

tests: compiled, in processes of their own. A worker is handed one test at a time and answers
with its end, which is printed, and kept in bench/results. One that dies or does not answer is replaced, and its test
named with what the worker said last. One whose device answers no more after a test, as after an illegal access, names
that test and is replaced, too: a context that is lost fails whatever runs in it later.

First comes one shape of each op in bf16, then one of each of its Cases and the tiles that are shipped, then all else.
Of those that wait, the next is of the op that has had the least time for its weight, so that each has its share of the
budget and none eats another's. What is left when the time is over is listed as not reached.

bench: the benchmark with its peers, ops never timed first, by a process that is started again where it dies; then the
table of lora_linear's paths. tune: the candidate tiles. Each step ends at its share of the time and leaves to the next
what it does not need.

Status: 0 when every test ended well, 1 when something failed, 3 when nothing did and some tests were not reached.
It needs torch, triton, numpy and pytest.
"""

import argparse
import datetime
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from multiprocessing.connection import Pipe, wait
from pathlib import Path
from typing import Any

from ...algorithms.run.streams import run_program
from ..record import ROOT, as_command, clocks, machine, results_file, run_text, write_whole
from .worker import DETAIL, LOST, End, Test

SHARES = {"tests": 0.5, "bench": 0.35, "tune": 0.15}  # of the time, by step
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
# the order of the benchmark: never timed, then changed since, then the others
OPS = [
    "moe_mlp",
    "nf4_linear",
    "sample_tokens",
    "lora_linear",
    "token_divergence",
    "dequantize_nf4",
    "quantize_nf4",
    "lora_linears",
    "flash_attention",
    "token_logprobs",
    "decode_attention",
]
TESTS = ["tests/kernels", "tests/model/test_cuda_graphs.py"]
REHEARSED = ["tests/kernels/test_cases.py", "-k", "accuracy"]
PATIENCE = 90.0  # seconds for one test, or for a shape of the benchmark
START = 180.0  # for a worker's imports and its collection
STARTS = 3  # workers in a row that may fail to start
GRACE = 20.0  # before a step's end: what is begun by then may end by itself
STRAYS = 8  # times that a benchmark is started again
LAST_WORDS = 3.0  # for a process that is about to end
SAFE = {"PYTHONSAFEPATH": "1"}  # in the root, our kernels/ would hide Hugging Face's
SERVE = "from burnish.bench.ops.worker import serve; serve({})"
TRACE = 1000  # characters of the interpreter's own trace, from its top


# ---- the parent


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
        """What it has written since it began, from the interpreter's last words on where there are any."""
        with self.log.open("rb") as log:
            log.seek(self.logged)
            text = log.read().decode(errors="replace")
        start = text.find("Fatal Python error")
        return text[start:][:TRACE] if start >= 0 else text[-DETAIL:]

    def end(self) -> None:
        end_all(self.process)
        self.pipe.close()

    def died(self, asking: bool, end: float) -> str:
        """How. asking: it has not, and is told to; an interpreter that hangs then prints where, until `end`."""
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


class Plan:
    """Which test is next: the waves of one shape first, then an op with the least time for its weight."""

    def __init__(self, tests: list[Test]):
        self.waiting: dict[str, list[Test]] = {}
        for test in sorted(tests, key=lambda test: test.wave):
            self.waiting.setdefault(test.op, []).append(test)
        self.spent: dict[str, float] = defaultdict(float)  # seconds of workers, by op

    def take(self, running: list[tuple[str, float]]) -> Test | None:
        """running: the op of each test that runs, and its seconds so far."""
        order = [*WEIGHTS, *self.waiting]
        spent = self.spent.copy()
        for op, seconds in running:
            spent[op] += seconds + 1e-3

        def rank(op: str) -> tuple[float, ...]:
            return min(self.waiting[op][0].wave, 2), spent[op] / WEIGHTS.get(op, 1), order.index(op)

        op = min((op for op, tests in self.waiting.items() if tests), key=rank, default=None)
        return None if op is None else self.waiting[op].pop(0)


def number(tests: int | list[Any]) -> int:
    return tests if isinstance(tests, int) else len(tests)


@dataclass
class Verdict:
    """What became of the tests, by op; written as it grows."""

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

    def write(self, plan: Plan | None) -> None:
        for op, tests in plan.waiting.items() if plan else ():
            self.of(op)["not_reached"] = [test.name for test in tests]
        if self.path:
            seconds = round(time.monotonic() - self.begun, 1)
            report = self.facts | {"seconds": seconds, "status": self.status, "ops": self.ops}
            write_whole(self.path, json.dumps(report, indent=1) + "\n")

    def total(self, what: str) -> int:
        return sum(number(found[what]) for found in self.ops.values())

    @property
    def status(self) -> int:
        return (
            1 if self.total("failed") else 3 if self.total("not_reached") or not self.total("passed") else 0
        )

    def print_all(self) -> None:
        kinds = ("passed", "skipped", "failed", "not_reached")
        print(f"\n{'op':18}" + "".join(f"{kind:>13}" for kind in kinds) + f"{'seconds':>11}")
        for op, found in self.ops.items():
            counts = "".join(f"{number(found[kind]):13}" for kind in kinds)
            print(f"{op:18}{counts}{found['seconds']:11.1f}")
        for found in self.ops.values():
            for row in found["failed"]:
                print(f"FAILED {row['test']}: {row['why']}")
        print(
            f"tests: {', '.join(f'{self.total(kind)} {kind}'.replace('_', ' ') for kind in kinds)}",
            flush=True,
        )


class Crew:
    """The workers, and what they are handed."""

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
                    self.verdict.write(self.plan)
            finally:
                for worker in self.workers:  # all at once: one may take its time
                    kill(worker.process)
                for worker in list(self.workers):
                    if worker.test is not None and self.plan is not None:
                        self.plan.waiting[worker.test.op].insert(0, worker.test)
                    self.dismiss(worker)
                self.verdict.write(self.plan)

    def lacks_workers(self) -> bool:
        if self.plan is None:
            return True
        return sum(w.test is None for w in self.workers) < sum(map(len, self.plan.waiting.values()))

    def hear(self, worker: Worker) -> None:
        """What a worker has collected, then how its test has ended, or by the pipe's end that it is no more."""
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


# ---- the other steps


def run_watched(words: list[str], end: float, written: Path | None = None) -> int | None:
    """A command's status; None where it was killed, at `end` or because `written` has not changed for too long."""
    print(f"\n$ {shlex.join(['python', *words])}", flush=True)
    begun = time.time()
    process = subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, env=os.environ | SAFE, start_new_session=True
    )
    try:
        while time.monotonic() < end:
            with suppress(subprocess.TimeoutExpired):
                return process.wait(1)
            alive = written.stat().st_mtime if written is not None and written.exists() else 0
            if written is not None and time.time() - max(alive, begun) > 2 * PATIENCE:
                break
        print("killed: out of time", flush=True)
        return None
    finally:
        end_all(process)


def benchmark(end: float, path: Path, commit: str) -> int:
    """The benchmark, by one process after another where they die, then, in the last seconds, the table of paths."""
    status: int | None = None
    last = end - GRACE
    for _ in range(STRAYS):
        left = last - time.monotonic() - GRACE
        if left <= 0:
            break
        flags = ["--peers", "--resume", "--json", str(path), "--budget", f"{left:.0f}", "--commit", commit]
        status = run_watched(["-m", "burnish.bench", *ordered_ops(), *flags], last, path)
        if status in (0, 1):
            break
    paths = run_watched(["-m", "burnish.bench", "paths"], end)
    return 0 if status == paths == 0 else 1


def ordered_ops() -> list[str]:
    from ..cases.registry import CASES

    return list(dict.fromkeys([*OPS, *(case.op for case in CASES)]))


def tune(end: float, commit: str) -> int:
    budget = max(end - time.monotonic() - GRACE, 0)
    flags = ["--json", "--budget", f"{budget:.0f}", "--commit", commit]
    return 0 if run_watched(["-m", "burnish.bench", "tune", *flags], end) == 0 else 1


# ---- command


def step_ends(steps: list[str], begun: float, seconds: float) -> Iterator[tuple[str, float]]:
    """Each step with its end: those before it leave it what they did not need."""
    whole, so_far = sum(SHARES[step] for step in steps), 0.0
    for step in steps:
        so_far += SHARES[step]
        yield step, begun + seconds * so_far / whole


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the command, with a sentence, where something is out of bounds or would be ignored."""
    for name in ("seconds", "patience", "processes"):
        if not 0 < getattr(args, name) < math.inf:
            parser.error(f"--{name}: expected a number above 0, got {getattr(args, name)}")
    if args.rehearse:
        from .static import TARGETS

        if args.rehearse not in TARGETS:
            parser.error(f"--rehearse: expected one of {', '.join(TARGETS)}, got {args.rehearse}")
        if args.steps is not None and args.steps != ["tests"]:
            parser.error(f"--rehearse: expected --steps tests, or none, got {' '.join(args.steps)}")
        args.steps = ["tests"]
    args.steps = args.steps or list(SHARES)
    if "tests" not in args.steps and (args.tests or args.json):
        parser.error("--json, arguments for pytest: expected tests among --steps, which alone take them")


@as_command
def main(argv: list[str] | None = None) -> int:
    begun = time.monotonic()
    parser = argparse.ArgumentParser(
        prog="python -m burnish.bench gpu", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--seconds", type=float, default=480, help="for all steps together")
    parser.add_argument("--steps", nargs="+", choices=list(SHARES), help="by default all")
    parser.add_argument(
        "tests", nargs="*", metavar="argument", help=f"for pytest, instead of {shlex.join(TESTS)}"
    )
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--patience", type=float, default=PATIENCE, metavar="SECONDS", help="for one test")
    parser.add_argument(
        "--rehearse", metavar="CHIP", help="sm_90 for instance: compile only, and tests alone"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="default: bench/results/tests-<machine>-<date>.json"
    )
    parser.add_argument(
        "--commit", default=run_text("git", "describe", "--always", "--dirty"), help="where git is absent"
    )
    args = parser.parse_args(argv)
    check(parser, args)

    import torch

    device = "cpu" if args.rehearse else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("expected a GPU that torch can use; --rehearse sm_90 goes through the tests without one")
    here, today = machine(device), datetime.date.today().isoformat()
    facts = {
        "kind": "tests",
        "machine": here,
        "date": today,
        "commit": args.commit,
        "command": shlex.join(
            ["python", "-m", "burnish.bench", "gpu", *(sys.argv[1:] if argv is None else argv)]
        ),
        "clocks_before": clocks(device),
    }
    statuses = []
    for step, end in step_ends(args.steps, begun, args.seconds):
        if step == "tests":
            path = args.json or (None if args.rehearse else results_file(here["device"], today, "tests"))
            verdict = Verdict(path, facts)
            default = REHEARSED if args.rehearse else TESTS
            crew = Crew(verdict, args.rehearse, args.tests or default, args.processes, args.patience)
            crew.run(end)
            verdict.print_all()
            statuses.append(verdict.status)
        elif step == "bench":
            statuses.append(benchmark(end, results_file(here["device"], today), args.commit))
        else:
            statuses.append(tune(end, args.commit))
    print(f"\n{time.monotonic() - begun:.0f} s of {args.seconds:.0f}", flush=True)
    return 1 if 1 in statuses else max(statuses)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and end what was started
    sys.exit(run_program("python -m burnish.bench gpu", main))
