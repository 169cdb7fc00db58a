"""The report of an earlier benchmark process, and the conditions under which a run may continue it."""

import hashlib
from pathlib import Path
from typing import Any

from ...model.files.text_files import read_object
from .. import record

OUT_OF_TIME = "out of time"


def fingerprint() -> str:
    """Return a hash of the source code of kernels/ and bench/, without _lora_paths.py, which a run may rewrite."""
    files = [*(record.ROOT / "kernels").rglob("*.py"), *(record.ROOT / "bench").rglob("*.py")]
    sources = (path.read_bytes() for path in sorted(files) if path.name != "_lora_paths.py")
    return hashlib.sha256(b"".join(sources)).hexdigest()[:16]


def asked(cfg: Any) -> dict[str, Any]:
    """Return the flags that must be the same in all runs that share one report.

    A function of --against is represented by the hash of its file.
    """
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
    """Return the report that an earlier process wrote, or `fresh` if there is no report to continue.

    A report is continued only if its machine, date, code, flags and dtype are those of `fresh`. If the earlier process
    died at a shape, that shape is recorded as red (failed). Raises InputError if the file is no report.
    """
    if not path.exists():
        return fresh
    with record.reading(path):
        report = read_object(path)
        _ = report["rows"], report["red"]  # another kind of file is not overwritten
        same = ("machine", "date", "code", "asked", "dtype")
        found, expected = ({**r, "dtype": r.get("ceilings", {}).get("dtype")} for r in (report, fresh))
        others = [name for name in same if found.get(name) != expected[name]]
        if others or "begun" not in report:
            print(f"{path}: has another {', '.join(others) or 'program'}, so it is begun anew")
            return fresh
        if running := report.pop("running", None):
            report["red"].append(f"{running}: the process died")
        report["absent"] = {what: why for what, why in report["absent"].items() if why != OUT_OF_TIME}
    return report
