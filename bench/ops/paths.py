"""The table of lora_linear's fastest path at each shape, made from bench/results and written to kernels/_lora_paths.py.

    burnish bench lora_linear --peers --keep     on a GPU: times the three paths and the baseline in one run
    burnish bench paths [--check]                writes the table from the newest such results of each device

A path is an implementation of lora_linear: "cublas", "epilogue" or "fused". "cublas" makes the same calls as the
baseline, F.linear + addmm. The other two have their own kernels. One of them is chosen if it passes the accuracy rule
and is clearly faster. Its p80 must lie below the p20 of "cublas" and below the p20 of the baseline, for the forward
pass and for forward and backward together. Otherwise "cublas" is chosen. So no measured shape is slower than the
baseline.
"""

import json
import sys
from dataclasses import dataclass
from typing import Any

from ...kernels.lora import PATHS
from ...model.files.text_files import read_object
from .. import record

MODULE = record.ROOT / "kernels" / "_lora_paths.py"
CASE, BASELINE = "lora_linear/dense", "eager"
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
HEAD = (
    '"""The fastest path of lora_linear where it was measured. Written by `python -m burnish.bench paths`.\n'
)
NOTHING = "\nNothing has been measured yet: every device takes F.linear, then addmm.\n"

Key = tuple[str, str, int, int, int, int]  # device, dtype, M, N, K, R
Times = dict[str, dict[str, list[float]]]  # contestant -> pass -> p20, p50, p80 in microseconds


def provider(path: str) -> str:
    """Return the name of a path in the rows of the benchmark."""
    return f"burnish, {path}"


def measured() -> dict[str, tuple[str, dict[Key, Times]]]:
    """Return device -> (source, times by shape) for accurate contestants.

    The times are those of the device's newest file with times of the paths. The source names this file.
    """
    found: dict[str, tuple[str, str, dict[Key, Times]]] = {}
    for path in sorted(record.RESULTS.glob("*.json")):
        result = read_object(path)
        if "kind" in result:  # whole runs
            continue
        with record.reading(path):
            device = result["machine"]["device"]
            shapes = {} if "driver" not in result["machine"] else _shapes(device, result["rows"])
            if shapes and (device not in found or result["date"] >= found[device][0]):
                where = f"{path.relative_to(record.ROOT)}, commit {result['commit']}, {result['date']}"
                found[device] = (result["date"], where, shapes)
    return {device: (where, shapes) for device, (_, where, shapes) in sorted(found.items())}


def _shapes(device: str, rows: list[dict[str, Any]]) -> dict[Key, Times]:
    """Return the times at each shape where both the baseline and "cublas" have accurate times."""
    shapes: dict[Key, Times] = {}
    for row in rows:
        if row["case"] == CASE and row["accurate"]:
            d = row["dims"]
            key = (device, DTYPES[row["dtype"]], d["T"], d["F"], d["C"], d["R"])
            shapes.setdefault(key, {}).setdefault(row["provider"], {})[row["pass"]] = _quantiles(row)
    return {key: times for key, times in shapes.items() if {BASELINE, provider("cublas")} <= times.keys()}


def _quantiles(row: dict[str, Any]) -> list[float]:
    p20, p50, p80 = (float(value) for value in record.best(row))
    return [p20, p50, p80]


def choose(times: Times) -> str:
    """Return the fastest path among the paths that are clearly faster than both baselines, or else "cublas".

    The baselines are "cublas" and F.linear + addmm.
    """
    rivals = (times[BASELINE], times[provider("cublas")])
    better = [
        path
        for path in PATHS
        if (own := times.get(provider(path))) and all(_faster(own, rival) for rival in rivals)
    ]
    return min(better, key=lambda path: times[provider(path)][record.PASSES[1]][1], default="cublas")


def _faster(own: dict[str, list[float]], rival: dict[str, list[float]]) -> bool:
    return all(own[which][2] < rival[which][0] for which in record.PASSES)


def module() -> str:
    """Return the text of kernels/_lora_paths.py."""
    found = measured()
    sources = "".join(
        f"    {json.dumps(device)}: {json.dumps(where)},\n" for device, (where, _) in found.items()
    )
    paths = "".join(
        f"    ({', '.join(map(json.dumps, key))}): {json.dumps(choose(times))},\n"
        for _, shapes in found.values()
        for key, times in sorted(shapes.items())
    )
    return (
        f'{HEAD if found else HEAD + NOTHING}"""\n\n'
        f"SOURCES: dict[str, str] = {_braced(sources)}  # device -> the results that it was read from\n\n"
        "# (device, dtype, M, N, K, R) -> path; M stands for up to twice as many rows\n"
        f"PATHS: dict[tuple[str, str, int, int, int, int], str] = {_braced(paths)}\n"
    )


def _braced(lines: str) -> str:
    return f"{{\n{lines}}}" if lines else "{}"


def table() -> str:
    """Return the table of docs/lora.md in Markdown: the times of forward and backward, and the chosen path."""
    contestants = [BASELINE, *map(provider, PATHS)]
    timed = ["`F.linear` + `addmm`", *(f"`{path}`" for path in PATHS)]
    head = ["dtype", "M", "N", "K", "R", *timed, "taken"]

    parts = []
    for device, (where, shapes) in measured().items():
        rows = [
            [*map(str, key[1:]), *(_cell(times.get(name)) for name in contestants), f"`{choose(times)}`"]
            for key, times in sorted(shapes.items())
        ]
        parts.append(f"{device}, from `{where}`. Forward and backward, p50 in microseconds.\n\n")
        parts.append(record.markdown(head, rows))
    return "".join(parts) or "No device has been measured yet: all take `cublas`.\n"


def _cell(times: dict[str, Any] | None) -> str:
    return "not accurate" if times is None else f"{times[record.PASSES[1]][1]:.4g}"


@dataclass(frozen=True, kw_only=True)
class Config:
    check: bool = False  # write nothing; exit status 1 if the table is stale


def main(cfg: Config) -> int:
    """Write the table. With --check, write nothing, and return 1 if the table is stale."""
    if cfg.check:
        stale = MODULE.read_text() != module()
        if stale:
            print(f"stale: {MODULE.relative_to(record.ROOT)}", file=sys.stderr)
        return int(stale)

    record.write_whole(MODULE, module())
    return 0
