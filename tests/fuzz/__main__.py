"""Mutate every kind of file that Burnish reads, and say what became of each.

    python tests/fuzz [--readers NAME ...] [--count N] [--seed S] [--jobs N] [--report FILE.jsonl]

It prints a line for each reader and each distinct failure, and its exit status is 1 where there is one. A case depends
on its reader, the seed and its number alone: `--readers rows/text --seed 3` draws again what a whole run drew.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from campaign import FINE, Result, chosen, run_all, warm_up
from inputs import make_inputs
from readers import Reader, readers


def _work(arguments: tuple[list[Reader], Path, Path, int, int, Any]) -> None:
    *rest, queue = arguments
    for result in run_all(*rest):
        queue.put(result)
    queue.put(None)


def results(found: list[Reader], inputs: Path, flags: argparse.Namespace) -> Iterator[Result]:
    """Of all processes, as they come. Every process has readers of its own, the slow ones shared out."""
    context = get_context("fork")
    queue, jobs = context.Queue(), min(flags.jobs, len(found))
    for job in range(jobs):
        own, count = found[job::jobs], 0
        count = sum(len(range(i, flags.count, len(found))) for i in range(job, len(found), jobs))
        work = inputs.with_name(f"work-{job}")
        work.mkdir()
        context.Process(
            target=_work, args=((own, inputs, work, flags.seed, count, queue),), daemon=False
        ).start()
    left = jobs
    while left:
        result = queue.get()
        if result is None:
            left -= 1
        else:
            yield result


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tests/fuzz", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--readers", nargs="*", default=[], metavar="NAME", help="or the first words of names"
    )
    parser.add_argument("--count", type=int, default=1000, metavar="N", help="mutations in all (1000)")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes (2)")
    parser.add_argument("--report", type=Path, metavar="FILE", help="a JSON object for each mutation")
    flags = parser.parse_args()

    torch.set_num_threads(1)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        inputs, warm = Path(folder) / "inputs", Path(folder) / "warm"
        for own in (inputs, warm):
            own.mkdir()
        make_inputs(inputs)
        found = chosen(readers(inputs), flags.readers)
        if not found:
            parser.error(f"no such reader: {' '.join(flags.readers)}")
        warm_up(found, inputs, warm)
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        failures: dict[tuple[str, ...], list[Result]] = defaultdict(list)
        report = open(flags.report or os.devnull, "w")  # noqa: SIM115 (open to the end)
        for result in results(found, inputs, flags):
            counts[result.reader][result.kind] += 1
            report.write(json.dumps(vars(result)) + "\n")
            if not result.fine:
                failures[result.kind, result.reader.partition("/")[0], result.where or result.why].append(
                    result
                )
        report.close()

    for reader in sorted(counts):
        print(f"{reader:34}", ", ".join(f"{n} {kind}" for kind, n in sorted(counts[reader].items())))
    total = sum(counts.values(), Counter())
    print(f"{total.total()} mutations, seed {flags.seed}, {time.monotonic() - started:.0f} s:")
    print(", ".join(f"{total[kind]} {kind}" for kind in (*FINE, *sorted(total.keys() - set(FINE)))))
    for (kind, _, where), several in sorted(failures.items()):
        first = several[0]
        print(f"\n{kind} ({len(several)}): {first.reader} {first.file} number {first.number}: {first.what}")
        print(f"    {where}\n    {first.message[:300]!r}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
