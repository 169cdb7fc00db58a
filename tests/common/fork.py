"""A function in a process of its own, which may neither take long nor fill the memory."""

import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any


def in_a_fork(function: Callable[[], Any], seconds: int = 60, gigabytes: float = 2) -> Any:
    """A function's answer as JSON, or its exception as text; None where the process died. seconds: of the processor."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + int(gigabytes * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
        try:
            found = function()
        except BaseException as error:
            found = f"{type(error).__name__}: {error}"
        os.write(write_end, json.dumps(found).encode())
        os._exit(0)

    os.close(write_end)
    with open(read_end, encoding="utf-8") as pipe:
        text = pipe.read()
    os.waitpid(pid, 0)
    return json.loads(text) if text else None
