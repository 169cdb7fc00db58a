"""What becomes of one reader on one folder: it runs in a fork, with limits on its time and its memory.

accepted     it returned a digest of what it read
clean        InputError: one line of at most 600 printable characters
long         InputError of another form
traceback    any other exception, which a user would see as one
hang         no end within the time, of the processor or of the clock
memory       more than the limit, held or asked for
crash        a signal
noise        something that no code of ours prints stood on standard error, a panic's text for instance
left         a refused reader left a file behind that is not whole
"""

import faulthandler
import json
import os
import re
import resource
import select
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from burnish.model.errors import InputError

LONGEST = 600  # characters of a message
OURS = re.compile(
    r"^(warning: .*|\(beyond the .*|burnish.*|.*\d+%\|.*|.*\d+step.*|.*\d+/\d+ \[.*|)$"
)  # and a progress bar's


@dataclass(frozen=True)
class Limits:
    seconds: int = 10
    bytes: int = 2 << 30


@dataclass
class Outcome:
    kind: str
    digest: str = ""
    message: str = ""
    where: str = ""  # an exception, and our line that it came through
    grown: int = field(default=0, compare=False)  # bytes

    @property
    def finite(self) -> bool:
        return not self.digest.endswith("not finite")


def outcome_of(read: Callable[[Path], str], folder: Path, limits: Limits = Limits()) -> Outcome:
    """read: what returns a digest of what it read in `folder`. Its standard streams are the null device."""
    result, pipe = os.pipe()
    noise = os.memfd_create("stderr")
    pid = os.fork()
    if pid == 0:
        try:
            os.close(result)
            _in_fork(read, folder, limits, pipe, noise)
        finally:
            os._exit(0)
    os.close(pipe)
    found = _wait(pid, result, limits)
    if found.kind in ("accepted", "clean"):
        found = _disturbed(noise, folder, found)
    os.close(noise)
    return found


def _in_fork(read: Callable[[Path], str], folder: Path, limits: Limits, pipe: int, noise: int) -> None:
    faulthandler.disable()  # a test run's would write past our standard error
    null = os.open(os.devnull, os.O_RDWR)
    for stream, target in ((0, null), (1, null), (2, noise)):
        os.dup2(target, stream)
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CPU, (limits.seconds, limits.seconds + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + 2 * limits.bytes,) * 2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = _attempt(read, folder)
    found.grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    if found.grown > limits.bytes:
        found.kind = "memory"
    os.write(pipe, json.dumps(vars(found)).encode())


def _attempt(read: Callable[[Path], str], folder: Path) -> Outcome:
    try:
        return Outcome("accepted", digest=read(folder))
    except InputError as error:
        text = str(error)
        right = text.isprintable() and 0 < len(text) <= LONGEST
        return Outcome("clean" if right else "long", message=text[: 2 * LONGEST], where=_place(error))
    except BaseException as error:
        text = f"{type(error).__name__}: {error}"
        asked = isinstance(error, MemoryError) or re.search(r"(can't|cannot|Unable to) allocate", text)
        return Outcome("memory" if asked else "traceback", message=text[: 2 * LONGEST], where=_place(error))


def _place(error: BaseException) -> str:
    """The innermost line of ours that it came through."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/burnish/" in frame.filename] or frames
    file, line = ours[-1].filename.rpartition("/burnish/")[2], ours[-1].lineno
    return f"{file}:{line} {ours[-1].name}: {type(error).__name__}"


def _wait(pid: int, result: int, limits: Limits) -> Outcome:
    """The limit on the clock is twice that of the processor: machines are shared."""
    pieces, end = [], time.monotonic() + 2 * limits.seconds
    with os.fdopen(result, "rb", buffering=0) as pipe:
        while (left := end - time.monotonic()) > 0:
            if not select.select([pipe], [], [], left)[0]:
                break
            if not (piece := pipe.read(1 << 16)):
                break
            pieces.append(piece)
        else:
            left = 0
    if left <= 0 or time.monotonic() >= end:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if pieces:
        return Outcome(**json.loads(b"".join(pieces)))
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    if number in (signal.SIGXCPU, signal.SIGKILL):
        return Outcome("hang", message=f"no end within {limits.seconds} s")
    return Outcome("crash", message=f"signal {number}, status {status}")


def _disturbed(noise: int, folder: Path, found: Outcome) -> Outcome:
    """Whether it printed what is none of ours, or left something behind."""
    os.lseek(noise, 0, os.SEEK_SET)
    text = os.read(noise, 1 << 20).decode(errors="replace")
    odd = [line for line in re.split(r"[\n\r]", text) if not OURS.match(line.strip())]
    if odd:
        return Outcome("noise", message=odd[0][: 2 * LONGEST], where=found.where)
    left = [entry for entry in folder.rglob(".*") if entry.name.endswith((".partial", ".earlier"))]
    if left:
        return Outcome("left", message=str(left[0]), where=found.where)
    return found
