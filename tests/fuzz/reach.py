"""A watch on what a reader reaches for: programs, the network, pickles, and files of others. Python reports each of its
own calls; what `safetensors` and `tokenizers` open by themselves it does not see.
"""

import os
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from burnish import model

NEVER = (
    "socket.",
    "subprocess.",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "pickle.",
    "urllib.",
)
CHANGES = (
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.mkdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "shutil.rmtree",
)
OURS = (  # folders that anybody reads: Python's and the system's
    *{str(Path(path).resolve()) for path in (sys.prefix, sys.base_prefix, *sysconfig.get_paths().values())},
    *(str(Path(model.__file__ or "").resolve().parents[1]), "/usr", "/dev", "/proc", "/sys"),
)
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def watched(folder: Path) -> Callable[[], str]:
    """The list of what this process reaches for from now on, outside of `folder`: in words, empty until it does."""
    found: list[str] = []
    own = (str(folder.resolve()),)

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(NEVER):
            found.append(event)
        elif event == "open":
            path, _, flags = arguments
            if not _is_below(path, own if (flags or 0) & WRITES else own + OURS):
                found.append(f"open {path!r:.200}")
        elif event in CHANGES and not all(
            _is_below(path, own) for path in arguments if isinstance(path, str | Path)
        ):
            found.append(f"{event} {arguments!r:.200}")

    sys.addaudithook(hear)
    return lambda: next(iter(found), "")


def _is_below(path: Any, folders: tuple[str, ...]) -> bool:
    """Also a descriptor; the null device; and the folder of temporary files, where a file without a name is made."""
    if not isinstance(path, str | bytes | os.PathLike) or os.fspath(path) in (
        os.devnull,
        tempfile.gettempdir(),
    ):
        return True
    try:
        real = os.fsdecode(os.path.realpath(path))
    except (OSError, ValueError):
        return True  # no file has such a name
    return any(real == folder or real.startswith(f"{folder}/") for folder in folders)
