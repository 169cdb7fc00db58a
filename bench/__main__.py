"""The door to the benchmark that needs no tyro: see command.py."""

import sys

from ..algorithms.run.streams import run_program
from .command import main

if __name__ == "__main__":
    sys.exit(run_program("python -m burnish.bench", lambda: main(sys.argv[1:], plain=True)))
