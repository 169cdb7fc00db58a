"""Everything that needs a GPU (compiled tests, times, tiles) within a time limit.

    burnish bench gpu [--seconds S] [--steps tests bench tune] [--commit COMMIT] [-- ARGUMENT ...]
    burnish bench gpu --rehearse CHIP [...]       without a GPU: the accuracy tests compile, and run nothing

ARGUMENT is for pytest, and selects tests. The default is tests/kernels and the sampling tests with CUDA graphs.

The steps are:

    tests    run the tests with compiled kernels, in worker processes that crew.py manages; print the outcome of
             each test, and write all outcomes to a file as they come
    bench    run the benchmark with its peers (other libraries), beginning with the ops that have no times yet; start
             it again if its process dies; then write the table of lora_linear's paths
    tune     time the candidate tiles

Each step ends at its share of the time. Time that a step does not use is left to the later steps.

Exit status: 0 if every test ended well, 1 if something failed, 3 if nothing failed but some tests were not reached.

The command needs torch, triton, numpy and pytest.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Annotated, Literal

import torch

from ...algorithms.run.flags import POSITIONAL, Count, Seconds
from ...model.errors import InputError
from ..flags import spelled
from ..record import ROOT, clocks, machine, results_file, run_text
from .crew import PATIENCE, SAFE, Crew, end_all
from .verdict import Verdict

Step = Literal["tests", "bench", "tune"]
SHARES: dict[Step, float] = {"tests": 0.5, "bench": 0.35, "tune": 0.15}  # shares of the time
# the order of the benchmark: ops without times, then ops that changed since, then the others
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
GRACE = 20.0  # seconds before a step's end in which nothing new is started
STRAYS = 8  # most starts of the benchmark


@dataclass(frozen=True, kw_only=True)
class Config:
    arguments: Annotated[
        tuple[str, ...], POSITIONAL
    ] = ()  # arguments for pytest, after a --: tests/kernels/test_moe.py -k bf16
    seconds: Seconds = 480.0  # time limit in seconds for all steps together
    steps: tuple[Step, ...] = ()  # the steps to run (default: all)
    processes: Count = 8  # number of processes that run tests
    patience: Seconds = PATIENCE  # time limit in seconds for one test
    rehearse: str | None = None  # compile the accuracy tests for this chip, such as sm_90, without a GPU
    json: Path | None = None  # write the tests' verdict here, not to bench/results/tests-<gpu>-<date>.json
    commit: str | None = None  # commit to record with the results, if git is absent


# ---- steps


def test(cfg: Config, end: float, verdict: Verdict) -> int:
    arguments = list(cfg.arguments) or (REHEARSED if cfg.rehearse else TESTS)
    crew = Crew(verdict, cfg.rehearse, arguments, cfg.processes, cfg.patience)
    crew.run(end)
    verdict.print_all()
    return verdict.status


def run_watched(words: list[str], end: float, written: Path | None = None) -> int | None:
    """Run a Python command, and return its exit status, or None if it was killed.

    The command is killed at the time `end`, or if it has not changed the file `written` for twice PATIENCE.
    """
    print(f"\n$ {shlex.join(['python', *words])}", flush=True)
    begun = time.time()
    command = [sys.executable, *words]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | SAFE, start_new_session=True)

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
    """Run the benchmark, and start it again if it dies. In the last seconds, write the table of lora_linear's paths.

    Returns 0 if both succeeded, otherwise 1.
    """
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
    from ..cases.registry import CASES  # only here, so that a broken import does not end the tests

    return list(dict.fromkeys([*OPS, *(case.op for case in CASES)]))


def tune(end: float, commit: str) -> int:
    budget = max(end - time.monotonic() - GRACE, 0)
    flags = ["--keep", "--budget", f"{budget:.0f}", "--commit", commit]
    return 0 if run_watched(["-m", "burnish.bench", "tune", *flags], end) == 0 else 1


# ---- command


def main(cfg: Config) -> int:
    """Run the steps, each until its share of the time is spent. Return the exit status."""
    begun, today = time.monotonic(), date.today().isoformat()
    steps = chosen_steps(cfg)

    # 1. the facts of the run
    device = "cpu" if cfg.rehearse else "cuda"
    here, commit = machine(device), cfg.commit or run_text("git", "describe", "--always", "--dirty")
    facts = {
        "kind": "tests",
        "machine": here,
        "date": today,
        "commit": commit,
        "command": spelled("python -m burnish.bench gpu", cfg),
        "clocks_before": clocks(device),
    }

    # 2. the steps
    statuses: list[int] = []
    with ended_by_sigterm():
        for step, end in step_ends(steps, begun, cfg.seconds):
            if step == "tests":
                path = cfg.json or (None if cfg.rehearse else results_file(here["device"], today, "tests"))
                statuses.append(test(cfg, end, Verdict(path, facts)))
            elif step == "bench":
                statuses.append(benchmark(end, results_file(here["device"], today), commit))
            else:
                statuses.append(tune(end, commit))
    print(f"\n{time.monotonic() - begun:.0f} s of {cfg.seconds:.0f}", flush=True)
    return 1 if 1 in statuses else max(statuses)


def chosen_steps(cfg: Config) -> Sequence[Step]:
    """Return the steps to run. Raises InputError if a flag is wrong or would be ignored, or if there is no GPU."""
    if cfg.rehearse is not None:
        from ..ops.static import TARGETS  # only here, so that a broken import does not end the tests

        if cfg.rehearse not in TARGETS:
            raise InputError(f"--rehearse: expected one of {', '.join(TARGETS)}, got {cfg.rehearse}")
        if cfg.steps not in ((), ("tests",)):
            raise InputError(f"--rehearse: expected --steps tests, or none, got {' '.join(cfg.steps)}")
        return ("tests",)

    steps = cfg.steps or tuple(SHARES)
    if "tests" not in steps and (cfg.arguments or cfg.json):
        raise InputError(
            "--json, arguments for pytest: expected tests among --steps, because only that step uses them"
        )
    if not torch.cuda.is_available():
        raise InputError("expected a GPU that torch can use; --rehearse sm_90 compiles the tests without one")
    return steps


def step_ends(steps: Sequence[Step], begun: float, seconds: float) -> Iterator[tuple[Step, float]]:
    """Yield (step, deadline). Time that an earlier step does not use is left to the later ones."""
    whole, so_far = sum(SHARES[step] for step in steps), 0.0
    for step in steps:
        so_far += SHARES[step]
        yield step, begun + seconds * so_far / whole


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Make SIGTERM raise SystemExit in the `with` block, so that the block ends the processes that it has started."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
