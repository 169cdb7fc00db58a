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
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import torch
from campaign import FINE, Result, chosen, results_of, warm_up
from inputs import make_inputs
from readers import Reader, readers


def _cases(reader: Reader, inputs: Path, seed: int, count: int) -> list[Result]:
    """The outcomes of some cases, in a process of the pool with a folder of its own."""
    return list(results_of(reader, inputs, inputs.with_name(f"work-{os.getpid()}"), seed, count))


def results(found: list[Reader], inputs: Path, flags: argparse.Namespace) -> Iterator[Result]:
    """--count cases in all, shared evenly among the readers, as they come."""
    with ProcessPoolExecutor(flags.jobs, mp_context=get_context("fork")) as pool:
        counts = [len(range(i, flags.count, len(found))) for i in range(len(found))]
        tasks = [
            pool.submit(_cases, r, inputs, flags.seed, n) for r, n in zip(found, counts, strict=True) if n
        ]
        for done in as_completed(tasks):
            yield from done.result()


def print_results(counts: dict[str, Counter[str]], classes: Counter[str], failures: list[Result]) -> None:
    for reader in sorted(counts):
        print(f"{reader:34}", ", ".join(f"{n} {kind}" for kind, n in sorted(counts[reader].items())))
    total = sum(counts.values(), Counter())
    print(", ".join(f"{total[kind]} {kind}" for kind in (*FINE, *sorted(total.keys() - set(FINE)))))
    print("differs by class:", ", ".join(f"{n} {name}" for name, n in classes.most_common()))

    alike: dict[tuple[str, ...], list[Result]] = defaultdict(list)
    for result in failures:
        alike[result.kind, result.reader.partition("/")[0], result.where or result.why].append(result)
    for (kind, _, where), several in sorted(alike.items()):
        first = several[0]
        print(f"\n{kind} ({len(several)}): {first.reader} {first.file} number {first.number}: {first.what}")
        print(f"    {where} {first.message[:300]!r}")


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
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    classes: Counter[str] = Counter()
    failures: list[Result] = []
    with (
        tempfile.TemporaryDirectory(prefix="fuzz-") as folder,
        open(flags.report or os.devnull, "w") as report,
    ):
        inputs = Path(folder) / "inputs"
        make_inputs(inputs)
        found = chosen(readers(inputs), flags.readers)
        if not found:
            parser.error(f"no such reader: {' '.join(flags.readers)}")
        warm_up(found, inputs, Path(folder))

        for result in results(found, inputs, flags):
            counts[result.reader][result.kind] += 1
            report.write(json.dumps(vars(result)) + "\n")
            if not result.fine:
                failures.append(result)
            elif result.why:
                classes[result.why] += 1

    print_results(counts, classes, failures)
    mutations, seconds = sum(counts.values(), Counter()).total(), time.monotonic() - started
    print(f"{mutations} mutations, seed {flags.seed}, {len(failures)} failures, {seconds:.0f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
