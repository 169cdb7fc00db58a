"""The tables of measured times: each case beside eager torch and its fastest accurate peer."""

from typing import Any

from ..cases.case import label
from ..record import PASSES, best, markdown
from .sources import of_machines, whence

Providers = dict[str, dict[str, Any]]  # name -> row
NO_RESULTS = "No results yet.\n"


def groups(result: dict[str, Any]) -> dict[tuple[str, str, str], Providers]:
    """Group the rows of a result: (case, shape, pass) -> provider -> row.

    Cases are in the order of the run, and within a case small shapes come first.
    """
    grouped: dict[tuple[str, str, str], Providers] = {}
    cases = list(dict.fromkeys(row["case"] for row in result["rows"]))
    for row in sorted(result["rows"], key=lambda r: (cases.index(r["case"]), r["pass"], r["floor_us"])):
        grouped.setdefault((row["case"], label(row["dims"]), row["pass"]), {})[row["provider"]] = row
    return grouped


def accurate_peers(providers: Providers) -> Providers:
    """Return the rows of the peers that pass the accuracy rule. Only these peers are compared with our op."""
    return {n: r for n, r in providers.items() if not n.startswith(("burnish", "eager")) and r["accurate"]}


def inaccurate_peers(providers: Providers) -> Providers:
    """Return the rows of the peers that were timed although they fail the accuracy rule."""
    return {
        n: r for n, r in providers.items() if not n.startswith(("burnish", "eager")) and not r["accurate"]
    }


def speed() -> str:
    """Return the table of every case, shape and pass in the newest results of each machine."""
    return "\n".join(part for part in of_machines(_speed) if part) or NO_RESULTS


def _speed(path: str, result: dict[str, Any]) -> list[str]:
    rows = [_speed_row(*key, providers) for key, providers in groups(result).items()]
    head = (
        *("case", "shape", "pass", "burnish", "eager", "fastest peer", "speed-up over eager", "of roofline"),
        "MB ours / eager",
    )

    # contestants without a cell in the table
    absent = [f"{what}: {why}" for what, why in result["absent"].items()]
    note = f"Not measured: {'; '.join(absent)}.\n" if absent else ""
    off = [
        f"{name} at `{case}` {shape}, {which}: {best(row)[1]:.4g}"
        for (case, shape, which), providers in groups(result).items()
        for name, row in inaccurate_peers(providers).items()
    ]
    note += (
        f"\nTimed, but outside the accuracy rule and therefore not compared (microseconds): {'; '.join(off)}.\n"
        if off
        else ""
    )
    return [_facts(path, result), markdown(head, rows), note]


def _facts(path: str, result: dict[str, Any]) -> str:
    """Return the sentences about the machine, its ceilings, the command, and the clock."""
    m, c = result["machine"], result["ceilings"]
    on_gpu = "driver" in m
    kind = f"driver {m['driver']}" if on_gpu else f"{m['threads']} thread{'s' * (m['threads'] > 1)}"
    bandwidth, rate = c["bandwidth_bytes_per_s"] / 1e12, c["rate_per_s"] / 1e12
    return (
        f"{m['device']}, torch {m['torch']}, Triton {m['triton']}, {kind}; "
        f"a copy reached {bandwidth:.3g} TB/s, a {c['dtype']} product {rate:.3g} TFLOP/s. "
        f"{whence(path, result)}. "
        f"Times are p50 [p20, p80] in microseconds, {'device' if on_gpu else 'host'} clock.\n"
    )


def _speed_row(case: str, shape: str, which: str, providers: Providers) -> list[str]:
    ours, eager = providers["burnish"], providers.get("eager")  # eager may have run out of memory
    peers = accurate_peers(providers)
    rival = min(peers, key=lambda n: best(peers[n])[1], default=None)
    p20, p50, p80 = best(ours)
    return [
        f"`{case}`",
        shape,
        which,
        f"{p50:.4g} [{p20:.4g}, {p80:.4g}]",
        f"{best(eager)[1]:.4g}" if eager else "out of memory",
        f"{best(peers[rival])[1]:.4g} ({rival})" if rival else "",
        f"{best(eager)[1] / p50:.2f}x" if eager else "",
        f"{ours['share']:.0%}",
        f"{ours['memory_bytes'] / 1e6:.4g}" + (f" / {eager['memory_bytes'] / 1e6:.4g}" if eager else ""),
    ]


def headlines() -> str:
    """Return the table of the largest shape of each case, beside its fastest peer. `speed` makes the full table."""
    return "\n".join(of_machines(_headlines)) or NO_RESULTS


def _headlines(path: str, result: dict[str, Any]) -> list[str]:
    largest: dict[str, dict[str, tuple[str, Providers]]] = {}
    for (case, shape, which), providers in groups(result).items():  # small shapes first
        largest.setdefault(case, {})[which] = (shape, providers)

    rows = []
    for case, passes in largest.items():
        cells = [cell for which in PASSES for cell in headline(passes.get(which))]
        rows.append([f"`{case}`", passes["forward"][0], *cells])
    head = ["case", "shape", *(name for which in PASSES for name in (which, "fastest peer, time over ours"))]
    source = f"{result['machine']['device']}, {result['date']}, from `{path}`:\n"
    return [source, markdown(head, rows)]


def headline(measured: tuple[str, Providers] | None) -> tuple[str, str]:
    """Return our time with its share of the roofline, and the fastest peer's time as a multiple of ours."""
    if measured is None:
        return "", ""
    _, providers = measured
    peers = {name: best(row)[1] for name, row in accurate_peers(providers).items()}
    rival = min(peers, key=lambda name: peers[name], default=None)
    ours = best(providers["burnish"])[1]

    time = f"{ours / 1e3:.3g} ms" if ours >= 1e3 else f"{ours:.3g} us"
    return (
        f"{time}, {providers['burnish']['share']:.0%}",
        f"{peers[rival] / ours:.2f}x {rival}" if rival else "",
    )
