"""The report of an earlier process, and whether a run may go on from it."""

import hashlib
from pathlib import Path
from typing import Any

from ...model.files.text_files import read_object
from .. import record

OUT_OF_TIME = "out of time"


def fingerprint() -> str:
    """A hash of what is timed and what times it, but for the table that is written from the times."""
    files = [*(record.ROOT / "kernels").rglob("*.py"), *(record.ROOT / "bench").rglob("*.py")]
    sources = (path.read_bytes() for path in sorted(files) if path.name != "_lora_paths.py")
    return hashlib.sha256(b"".join(sources)).hexdigest()[:16]


def asked(cfg: Any) -> dict[str, Any]:
    """The flags that a report may not mix: who takes part, with the files of a user's functions, and what they do."""
    files = {given: given.rpartition(":")[0] for given in cfg.against}
    sources = {
        given: Path(file).read_bytes() if file.endswith(".py") else b"" for given, file in files.items()
    }
    hashes = {given: hashlib.sha256(source).hexdigest()[:16] for given, source in sources.items()}
    return {
        "peers": cfg.peers,
        "rounds": cfg.rounds,
        "against": hashes,
        "forward_only": cfg.forward_only,
        "check_only": cfg.check_only,
    }


def kept_report(path: Path, fresh: dict[str, Any]) -> dict[str, Any]:
    """The report that an earlier process wrote of the same day, code, machine and contestants; without one the fresh.

    Red is the shape that it died at.
    """
    if not path.exists():
        return fresh
    with record.reading(path):
        report = read_object(path)
        _ = report["rows"], report["red"]  # a file of something else is not written over
        same = ("machine", "date", "code", "asked", "dtype")
        found, expected = ({**r, "dtype": r.get("ceilings", {}).get("dtype")} for r in (report, fresh))
        others = [name for name in same if found.get(name) != expected[name]]
        if others or "begun" not in report:
            print(f"{path}: of another {', '.join(others) or 'program'}: begun anew")
            return fresh
        if running := report.pop("running", None):
            report["red"].append(f"{running}: the process died")
        report["absent"] = {what: why for what, why in report["absent"].items() if why != OUT_OF_TIME}
    return report
