"""The entry point of the benchmark without tyro. command.py describes both entry points."""

import sys

from ..algorithms.run.streams import run_program
from .command import main

if __name__ == "__main__":
    sys.exit(run_program("python -m burnish.bench", lambda: main(sys.argv[1:], plain=True)))
