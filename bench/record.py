"""The files in bench/results, which hold the figures of runs, and facts about the machines that they ran on.

A file of the benchmark of the ops is <machine>-<date>.json. Other runs (trainers, rollouts, a recipe) write
<kind>-<date>.json.
"""

import json
import platform
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import torch

from ..kernels._triton import triton
from ..model.errors import InputError
from ..model.files.replacing import replacing
from ..model.files.text_files import read_object

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
PASSES = ("forward", "forward+backward")
PATIENCE = 10.0  # seconds for git, or for a driver that may hang


def write_whole(path: Path, text: str) -> None:
    """Write a file, and create its folders. An interrupted write leaves the old file intact.

    If the path is a link, the file behind it is written. Raises InputError if the file cannot be written.
    """
    path = path.resolve()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error
    with replacing(path) as beside:
        beside.write_text(text)


def results_file(device: str, day: str, kind: str = "") -> Path:
    """Return the path <kind>-<machine>-<date>.json in bench/results. The benchmark of the ops has no kind."""
    name = "-".join(device.lower().replace("(r)", "").split())
    return RESULTS / f"{kind + '-' if kind else ''}{name}-{day}.json"


def keep(kind: str, command: str, *files: Path, kept: bool = True, **figures: Any) -> None:
    """Write the figures of a run, with date and commit, to `files` and, if `kept`, to bench/results."""
    today = date.today().isoformat()
    commit = run_text("git", "rev-parse", "--short", "HEAD")
    result = {"kind": kind, "date": today, "commit": commit, "command": command, **figures}
    for path in ([RESULTS / f"{kind}-{today}.json"] if kept else []) + list(files):
        write_whole(path, json.dumps(result, indent=1) + "\n")
        print(f"written: {path}")


@contextmanager
def reading(path: Path | str) -> Iterator[None]:
    """Turn an error of the `with` block, which reads figures from a file, into an InputError that names the file."""
    try:
        yield
    except InputError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, StopIteration) as error:
        found = f"no {error}" if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"
        raise InputError(f"{path}: expected figures as the benchmark keeps them, got {found}") from error


def kept_part(file: Path, name: str) -> dict[str, list[dict[str, Any]]]:
    """Return the entry `name` of a JSON file in bench/: key -> list of objects. Return {} if there is no such file."""
    if not file.exists():
        return {}
    with reading(file):
        part: dict[str, list[dict[str, Any]]] = read_object(file)[name]
        if not all(isinstance(entry, dict) for entries in part.values() for entry in entries):
            raise ValueError(f"{name}: something that is no object")
    return part


def newest_run(kind: str) -> tuple[str, dict[str, Any]] | None:
    """Return the newest run of a kind in bench/results as (path below the root, contents), or None if there is none."""
    path = max(RESULTS.glob(f"{kind}-*.json"), default=None)
    return None if path is None else (str(path.relative_to(ROOT)), read_object(path))


def newest_results() -> dict[str, dict[str, Any]]:
    """Return path below the root -> contents, for the newest benchmark file of each machine. GPUs come first."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for path in sorted(RESULTS.glob("*.json")):
        result = read_object(path)
        if "kind" in result:  # a whole run, which has its own table
            continue
        with reading(path):
            device = result["machine"]["device"]
            if device not in found or result["date"] >= found[device][1]["date"]:
                found[device] = (str(path.relative_to(ROOT)), result)
    ordered = sorted(found.values(), key=lambda entry: "driver" not in entry[1]["machine"])
    return dict(ordered)


def best(row: dict[str, Any]) -> list[float]:
    """Return the percentiles of a row's time on the device, or of its time on the host if the device was not timed."""
    return row["device_us"] or row["eager_us"]


def markdown(head: Sequence[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


# ---- the machine


def machine(device: str) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    if device == "cuda":
        facts |= {"device": torch.cuda.get_device_name(), "driver": query("driver_version")}
    else:
        facts |= {"device": cpu_name(), "threads": torch.get_num_threads()}
    return facts


def query(fields: str) -> str:
    """Return the values that nvidia-smi reports for the fields. The query changes no setting of the GPU."""
    return run_text("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader")


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def run_text(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, timeout=PATIENCE)
        return done.stdout.strip()
    except (OSError, subprocess.CalledProcessError, subprocess.TimeoutExpired):
        return "unknown"


def clocks(device: str) -> str:
    return query("clocks.sm,clocks.mem,temperature.gpu,power.draw") if device == "cuda" else ""
