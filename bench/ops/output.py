"""Progress lines of the benchmark, and its figures as a table and as CSV."""

import csv
import io
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ..cases.case import label

RESTLESS = 3.0  # p80 over p20: a larger ratio means that something else ran
COLUMNS = ("provider", "device us", "host us", "time over ours", "share", "memory MB", "compile s")


@contextmanager
def waiting(what: str) -> Iterator[Callable[[str], None]]:
    """Print that a step has begun, and count its seconds on a terminal. Yields a function that prints the result."""
    begun, done = time.monotonic(), threading.Event()
    terminal = sys.stdout.isatty()
    print(f"{what} ...", end="", flush=True)

    def tick() -> None:
        while not done.wait(1.0):
            print(f"\r{what} ... {time.monotonic() - begun:.0f} s", end="", flush=True)

    def say(end: str) -> None:
        done.set()
        if clock.is_alive():
            clock.join()
        clear = "\r\x1b[K" + what + ":" if terminal else ""
        print(f"{clear} {end}", flush=True)

    clock = threading.Thread(target=tick, daemon=True)
    if terminal:
        clock.start()
    try:
        yield say
    finally:
        if not done.is_set():
            say("ended")


# ---- the table


def print_rows(rows: Sequence[dict[str, Any]], device: str) -> None:
    """Print the contestants of one pass, one line each."""
    first = rows[0]
    print(f"  {first['pass']}: floor {first['floor_us']:.1f} us, bound by {first['binds']}")
    table = [COLUMNS, *(cells(row, device) for row in rows)]
    on_device = any(row["device_us"] for row in rows)
    shown = [i for i, name in enumerate(COLUMNS) if name != "device us" or on_device]
    widths = [max(len(line[i]) for line in table) for i in shown]
    for line, row in zip(table, [None, *rows], strict=True):
        text = "  ".join(line[i].ljust(w) for i, w in zip(shown, widths, strict=True)).rstrip()
        print(f"    {text}")
        for note in [row["note"], "" if row["accurate"] else "outside the accuracy rule"] if row else ():
            if note:
                print(f"      {note}")
    if (worst := max(map(unrest, rows))) > RESTLESS:
        print(f"    noisy: a p80 is {worst:.0f}x its p20; a quieter machine or more --rounds would help")


def cells(row: dict[str, Any], device: str) -> tuple[str, ...]:
    ours = "burnish (plain torch on a CPU, no Triton)" if device == "cpu" else "burnish"
    return (
        ours if row["provider"] == "burnish" else row["provider"],
        spread(row["device_us"], 1),
        spread(row["eager_us"], 1),
        f"{spread(row['ratio'], 2, 'x', middle=0)} {row['ratio'].word}" if row["ratio"] else "",
        f"{row['share']:.1%}" if row["share"] else "",
        f"{row['memory_bytes'] / 1e6:.1f}",
        f"{row['compile_s']:.1f}",
    )


def unrest(row: dict[str, Any]) -> float:
    """Return how much a contestant's time varies: p80 over p20."""
    low, _, high = row["device_us"] or row["eager_us"]
    return high / low


def spread(values: Sequence[float] | None, digits: int, unit: str = "", *, middle: int = 1) -> str:
    """Return a figure with its bounds as text: "35.1 [34.0, 36.2]". middle: the index of the figure in `values`."""
    if not values:
        return ""
    low, high = (value for i, value in enumerate(values) if i != middle)
    return f"{values[middle]:.{digits}f}{unit} [{low:.{digits}f}, {high:.{digits}f}]"


# ---- CSV

FIELDS = (
    *("case", "shape", "dtype", "pass", "provider", "accurate"),
    *(f"{clock}_us_{p}" for clock in ("device", "eager") for p in ("p20", "p50", "p80")),
    *("time_over_ours", "time_over_ours_low", "time_over_ours_high", "floor_us", "share"),
    *("memory_bytes", "compile_s", "device", "torch", "date", "commit", "note"),
)


def as_csv(report: dict[str, Any]) -> str:
    """Return the report as CSV: a line for each row, then a line for each contestant that was not timed.

    A contestant that was only checked, or was wrong, has no figures.
    """
    machine = report["machine"]
    where = (machine["device"], machine["torch"], report["date"], report["commit"])
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(FIELDS)
    for row in report["rows"]:
        over = row["ratio"] or ("", "", "")
        times = [x for clock in ("device_us", "eager_us") for x in row[clock] or ("", "", "")]
        name = (row["case"], label(row["dims"]), row["dtype"], row["pass"], row["provider"], row["accurate"])
        sums = (row["floor_us"], row["share"], row["memory_bytes"], row["compile_s"])
        writer.writerow([*name, *times, *over, *sums, *where, row["note"]])

    for row in (*report["right"], *report["wrong"]):
        why = row.get("why", "")
        name = (row["case"], label(row["dims"]), row["dtype"], "", row["provider"], not why)
        blank = [""] * (len(FIELDS) - len(name) - len(where) - 1)
        writer.writerow([*name, *blank, *where, why])
    return out.getvalue()
