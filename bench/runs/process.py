"""A process that makes one measurement of `scale` or `embedding`, and prints the figures as JSON.

python -m burnish.bench.runs.process scale MODE
python -m burnish.bench.runs.process embedding LOSS EMBEDDED
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any


def figures_of(
    *words: str, launcher: Sequence[str] = (), environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Return the figures that a new process prints. Raises RuntimeError if the process fails.

    words: "scale" or "embedding", then the arguments of `in_process` in that module. launcher: arguments of Python that
    come before this module, for example to start it by torchrun.
    """
    command = [sys.executable, *launcher, "-m", __name__, *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    command, *words = sys.argv[1:]
    print(json.dumps(import_module(f".{command}", __package__).in_process(*words)))
