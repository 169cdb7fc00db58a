"""The outcome of one reader on one folder: it runs in a fork, with limits on its time and its memory.

accepted     it returned a digest of what it read
clean        InputError: one line of at most 600 printable characters
long         InputError of another form
traceback    any other exception, which a user would see as one
hang         no end within the time of the processor, or asleep for four times as long
memory       more than the limit, held or asked for, also where the refusal became a message
crash        a signal
noise        a control character was printed, or something that no code of ours prints, a panic's text for instance
reach        it began a program, used the network, unpickled, or opened a file that is none of its own
left         a file stood there afterwards that is not whole
"""

import ctypes
import faulthandler
import json
import os
import re
import resource
import select
import signal
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from burnish.model.errors import InputError
from reach import watched

LIBC = ctypes.CDLL(None)
LONGEST = 600  # characters of a message
AWAKE = 0.05  # of its seconds: what uses less of the processor while twice as many pass is asleep
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
    LIBC.malloc_trim(0)  # or what the fork takes has been this process's, and adds nothing to what it holds
    result, pipe = os.pipe()
    streams = os.memfd_create("stdout"), os.memfd_create("stderr")
    earlier = set(folder.iterdir())

    pid = os.fork()
    if pid == 0:
        try:
            os.close(result)
            _in_fork(read, folder, limits, pipe, streams)
        finally:
            os._exit(0)

    os.close(pipe)
    found = _wait(pid, result, limits)
    if found.kind in ("accepted", "clean"):
        found = _disturbed(streams, found) or _left(folder, earlier, found) or found
    for stream in streams:
        os.close(stream)
    return found


def _in_fork(
    read: Callable[[Path], str], folder: Path, limits: Limits, pipe: int, streams: tuple[int, int]
) -> None:
    faulthandler.disable()  # a test run's would write past our standard error
    null = os.open(os.devnull, os.O_RDWR)
    for stream, target in ((0, null), *enumerate(streams, 1)):
        os.dup2(target, stream)

    # limits, above what the process has mapped
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CPU, (limits.seconds, limits.seconds + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + 2 * limits.bytes,) * 2)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    reached = watched(folder)
    found = _attempt(read, folder)
    if reached():
        found.kind, found.message = "reach", reached()
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
        kind = "memory" if _asked_for_too_much(error) else "clean" if right else "long"
        return Outcome(kind, message=text[: 2 * LONGEST], where=_place(error))
    except BaseException as error:
        text = f"{type(error).__name__}: {error}"
        kind = "memory" if _asked_for_too_much(error) else "traceback"
        return Outcome(kind, message=text[: 2 * LONGEST], where=_place(error))


def _asked_for_too_much(error: BaseException | None) -> bool:
    """Also where a message has been made of it: another machine would have had the memory."""
    while error is not None:
        if isinstance(error, MemoryError) or re.search(r"(can't|cannot|Unable to) allocate", str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _place(error: BaseException) -> str:
    """The innermost line of ours that it came through."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/burnish/" in frame.filename] or frames
    file, line = ours[-1].filename.rpartition("/burnish/")[2], ours[-1].lineno
    return f"{file}:{line} {ours[-1].name}: {type(error).__name__}"


def _wait(pid: int, result: int, limits: Limits) -> Outcome:
    """The kernel ends what uses its processor time up; here ends what sleeps. Waiting for a busy machine is neither."""
    pieces, used, asleep = [], 0.0, 0
    with os.fdopen(result, "rb", buffering=0) as pipe:
        while True:
            if select.select([pipe], [], [], 2 * limits.seconds)[0]:
                if not (piece := pipe.read(1 << 16)):
                    break
                pieces.append(piece)
                continue
            now = _processor_time(pid)
            asleep = asleep + 1 if now - used < AWAKE * limits.seconds else 0
            used = now
            if asleep == 2:  # once may be a machine that stood still
                os.kill(pid, signal.SIGKILL)
                break

    _, status = os.waitpid(pid, 0)
    if pieces:
        return Outcome(**json.loads(b"".join(pieces)))
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    if number in (signal.SIGXCPU, signal.SIGKILL):
        why = f"asleep for {4 * limits.seconds} s" if asleep == 2 else f"no end within {limits.seconds} s"
        return Outcome("hang", message=why)
    return Outcome("crash", message=f"signal {number}, status {status}")


def _processor_time(pid: int) -> float:
    """Seconds, of its user's and the kernel's."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _disturbed(streams: tuple[int, int], found: Outcome) -> Outcome | None:
    """Whether it printed what no program prints to a terminal, or on standard error what is none of ours."""
    for stream, may_stand in zip(streams, (re.compile(".*"), OURS), strict=True):
        os.lseek(stream, 0, os.SEEK_SET)
        for line in re.split(r"[\n\r]+", os.read(stream, 1 << 20).decode(errors="replace")):
            if not line.isprintable() or not may_stand.match(line.strip()):
                return Outcome("noise", message=line[: 2 * LONGEST], where=found.where)
    return None


def _left(folder: Path, earlier: set[Path], found: Outcome) -> Outcome | None:
    """Whether something lies there that is not whole, or anything new although the file was refused."""
    left = [entry for entry in folder.rglob(".*") if entry.name.endswith((".partial", ".earlier"))]
    if found.kind == "clean":
        left += set(folder.iterdir()) - earlier
    return Outcome("left", message=str(left[0]), where=found.where) if left else None
