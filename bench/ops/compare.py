"""A comparison of two benchmark files, for example of two commits: the times that changed beyond noise.

The two runs did not alternate, so each time is compared in two ways: directly, and relative to eager torch of the same
run, whose code is the same in both runs. A time is marked if in both comparisons the intervals of the two medians do
not overlap. If a file lacks times of eager, the direct comparison decides alone.
"""

from math import inf
from pathlib import Path
from typing import Any, NamedTuple

from ...model.errors import InputError
from ...model.files.text_files import read_object
from ..cases.case import label
from ..record import reading
from .contest import AGAINST, OURS, PEER, interval

Key = tuple[str, str, str, str, str]  # case, shape, dtype, pass, provider
COLUMNS = ("case", "shape", "dtype", "pass", "provider", "us before", "after", "ratio", "beside eager", "")


class Change(NamedTuple):
    """One contestant's time in the second file relative to its time in the first.

    low, high: the lowest and the highest ratio, if each median may lie anywhere in its confidence interval.
    """

    key: Key
    before: float  # microseconds
    after: float
    ratio: float
    low: float
    high: float
    beside_eager: tuple[float, float, float] | None  # (ratio, low, high) relative to eager
    own: bool = True  # our op or a user's function; False for a peer

    @property
    def times(self) -> float:
        """Return the ratio for --fail-above: relative to eager if both files have eager's times, else direct."""
        return self.beside_eager[0] if self.beside_eager else self.ratio

    @property
    def mark(self) -> str:
        """Return "slower" or "faster" if the change is beyond noise, otherwise ""."""
        spans = [(self.low, self.high), *([self.beside_eager[1:]] if self.beside_eager else [])]
        if all(low > 1 for low, _ in spans):
            return "slower"
        return "faster" if all(high < 1 for _, high in spans) else ""


def compare(first: Path, second: Path, fail_above: float | None) -> int:
    """Print the changes between two benchmark files, and return the exit status.

    With `fail_above` the status is 1 if our op or a user's function is slower by more than that ratio. It is also 1 if
    the second file has red (failed) or wrong entries. Otherwise it is 0.
    """
    results = [read_object(path) for path in (first, second)]
    tables = []
    for path, result in zip((first, second), results, strict=True):
        with reading(path):
            tables.append({key(row): checked(row) for row in result["rows"]})
            print(f"{path}: {result['machine']['device']}, commit {result['commit']}, {result['date']}")
            for red in complaints(result):
                print(f"  not timed: {red}")
    forward_only = [result.get("asked", {}).get("forward_only", False) for result in results]
    if forward_only[0] != forward_only[1]:
        raise InputError(f"--compare: expected --forward-only in both or in neither of {first} and {second}")
    if results[0]["machine"] != results[1]["machine"]:
        print("the machines or their versions differ, which changes the ratios, too")

    with reading(f"{first}, {second}"):
        changes = changes_of(*tables)
    if not changes:
        raise InputError(f"--compare: {first} and {second} have no case, shape, dtype and provider in common")
    print_changes(changes)
    for path, rows, other in ((first, *tables), (second, *tables[::-1])):
        if alone := rows.keys() - other.keys():
            print(f"only in {path}: {len(alone)} of its {len(rows)} rows")
    return verdict(changes, fail_above, complaints(results[1]))


def complaints(result: dict[str, Any]) -> list[str]:
    """Return the red (failed) entries of a benchmark file, and its wrong user functions with shapes and reasons."""
    wrong = result.get("wrong", ())
    places = [f"{row['case']} {label(row['dims'])}: {row['provider']}" for row in wrong]
    return [*result["red"], *(f"{at}: {row['why']}" for at, row in zip(places, wrong, strict=True))]


def key(row: dict[str, Any]) -> Key:
    return (row["case"], label(row["dims"]), row["dtype"], row["pass"], row["provider"])


def checked(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of a benchmark file unchanged. Raises ValueError if its times are missing or not above 0."""
    percentiles = [row[clock] for clock in ("device_us", "eager_us") if row[clock] is not None]
    rounds = [each for each in row.get("rounds_us", {}).values() if each]
    if not percentiles or not all(len(each) == 3 for each in percentiles):
        raise ValueError("expected p20, p50 and p80 of a row")
    if not all(0 < x < inf for each in (*percentiles, *rounds) for x in each):
        raise ValueError("expected times above 0")
    return row


def verdict(changes: list[Change], fail_above: float | None, red: list[str]) -> int:
    marks = [change.mark for change in changes]
    print(
        f"{len(changes)} compared: {marks.count('slower')} slower, {marks.count('faster')} faster beyond noise"
    )
    if fail_above is None:
        return 0

    above = [c for c in changes if c.own and c.times > fail_above and c.mark != "faster"]
    failed = [c for c in above if c.mark == "slower"]
    for change in above:
        what = f"{' '.join(change.key)}: {change.times:.2f}x"
        if change.mark == "slower":
            print(f"FAILED: {what}, expected at most {fail_above:g}x")
        else:
            print(
                f"UNCLEAR: {what}, within the noise: run both again with more --rounds, or on a quieter machine"
            )
    if red:
        print(f"FAILED: {len(red)} red or wrong entries in the second file")
    return 1 if failed or red else 0


# ---- figures


def changes_of(first: dict[Key, dict[str, Any]], second: dict[Key, dict[str, Any]]) -> list[Change]:
    """Return the changes of all accurate contestants except eager, in the order of the second file."""
    return [
        change_of(name, first, second)
        for name, row in second.items()
        if name in first and name[-1] != "eager" and row["accurate"] and first[name]["accurate"]
    ]


def change_of(name: Key, first: dict[Key, dict[str, Any]], second: dict[Key, dict[str, Any]]) -> Change:
    """Return the change of one contestant, on the device's clock if both files have it, otherwise on the host's."""
    old, new = first[name], second[name]
    clock = "device_us" if old["device_us"] and new["device_us"] else "eager_us"
    before, after = old[clock][1], new[clock][1]
    low, high = span(rounds(old, clock), rounds(new, clock))

    beside = None
    eager = (*name[:-1], "eager")
    if eager in first and eager in second and first[eager][clock] and second[eager][clock]:
        middle = (after / second[eager][clock][1]) / (before / first[eager][clock][1])
        over = (beside_eager(old, first[eager], clock), beside_eager(new, second[eager], clock))
        beside = (middle, *span(*over))
    own = new.get("kind", OURS if name[-1] == "burnish" else PEER) in (OURS, AGAINST)
    return Change(name, before, after, after / before, low, high, beside, own)


def rounds(row: dict[str, Any], clock: str) -> list[float]:
    """Return the median time of each round. For a file without rounds, return p20, p50 and p80 instead."""
    of_clock = row.get("rounds_us", {}).get(clock.removesuffix("_us"))
    return of_clock or row[clock]


def beside_eager(row: dict[str, Any], eager: dict[str, Any], clock: str) -> list[float]:
    """Return a contestant's times divided by eager's, round by round."""
    return [a / b for a, b in zip(rounds(row, clock), rounds(eager, clock), strict=True)]


def span(before: list[float], after: list[float]) -> tuple[float, float]:
    """Return the lowest and the highest ratio, if each median may lie anywhere in its confidence interval."""
    (low_before, high_before), (low, high) = interval(before), interval(after)
    return low / high_before, high / low_before


def print_changes(changes: list[Change]) -> None:
    lines: list[tuple[str, ...]] = [COLUMNS]
    for c in changes:
        beside = "" if c.beside_eager is None else spread(c.beside_eager)
        times = f"{c.before:.1f}", f"{c.after:.1f}", spread((c.ratio, c.low, c.high))
        lines.append((*c.key, *times, beside, c.mark))

    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    for line in lines:
        print("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip())


def spread(values: tuple[float, float, float]) -> str:
    return "{:.2f}x [{:.2f}, {:.2f}]".format(*values)
