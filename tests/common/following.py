"""A page of docs/ followed to the letter: its files are written, its changes made, its commands run, in their order.

    `FILE`, a new file:                   and a block of code: the file is written
    `FILE`, after `LINE`:                 and a block: it is inserted behind the line that holds these words
    `FILE`, before `LINE`:                and a block: in front of it
    `FILE`: `OLD` becomes `NEW`.          words are replaced
    an indented block                     commands
    a block of python without a file      a program

A line or words that are not there exactly once are an error, as they would be for a reader.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
BLOCK = r"```\w+\n(?P<block>.*?)^```"
STEP = re.compile(
    rf"^`(?P<written>[\w./-]+)`, a new file:\n\n{BLOCK}"
    rf"|^`(?P<file>[\w./-]+)`, (?P<where>after|before) `(?P<line>[^\n]+)`:\n\n{BLOCK.replace('block', 'inserted')}"
    r"|^`(?P<changed>[\w./-]+)`: `(?P<old>[^`\n]+)` becomes `(?P<new>[^`\n]+)`\.$"
    rf"|^```python\n(?P<program>.*?)^```"
    r"|(?P<commands>(?:^    [^\n]+\n)+)",
    re.MULTILINE | re.DOTALL,
)
PROGRAMS = {
    "burnish": ["-m", "burnish.algorithms"],
    "pytest": ["-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider"],
    "python": [],
}


def copy_of_tree(place: Path) -> Path:
    """A copy of the tree at `place`, without what a build, a run or a test leaves in it."""
    leftovers = {"build", "dist", "runs", "models"}

    def left_out(folder: str, names: list[str]) -> set[str]:
        top = leftovers if Path(folder) == ROOT else set()  # bench/runs is a room
        return {n for n in names if n in top or n[0] == "." or n == "__pycache__" or n.endswith(".egg-info")}

    return shutil.copytree(ROOT, place, ignore=left_out)


def steps(page: str) -> list[dict[str, str]]:
    """The steps of a page in docs/, each with its parts by name."""
    text = (ROOT / "docs" / f"{page}.md").read_text()
    found = [
        {name: part for name, part in match.groupdict().items() if part is not None}
        for match in STEP.finditer(text)
    ]
    assert found, f"docs/{page}.md has no steps"
    return found


def follow(page: str, folder: Path, replaced: Mapping[str, str], *, skip: tuple[str, ...] = ()) -> list[str]:
    """Follow a page in `folder`. Returns the commands that were run.

    replaced: words of commands, such as DIR, and what stands in their place. skip: beginnings of commands that are not
    run.
    """
    ran = []
    for step in steps(page):
        if file := step.get("written"):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(step["block"])
        elif file := step.get("file"):
            insert(folder / file, step["line"], step["inserted"], before=step["where"] == "before")
        elif file := step.get("changed"):
            replace(folder / file, step["old"], step["new"])

        elif program := step.get("program"):
            run(["-c", program], folder, {})
        else:
            for command in step["commands"].splitlines():
                if not command.strip().startswith(skip or ("\0",)):
                    ran.append(command.strip())
                    run_command(ran[-1], folder, replaced)
    return ran


def insert(file: Path, line: str, block: str, *, before: bool) -> None:
    lines = file.read_text().splitlines(keepends=True)
    places = [i for i, text in enumerate(lines) if line in text]
    assert len(places) == 1, f"{file.name}: {line!r} stands in {len(places)} lines"
    at = places[0] if before else places[0] + 1
    file.write_text("".join([*lines[:at], block, *lines[at:]]))


def replace(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert text.count(old) == 1, f"{file.name}: {old!r} stands in {text.count(old)} places"
    file.write_text(text.replace(old, new))


def run_command(command: str, folder: Path, replaced: Mapping[str, str]) -> None:
    words = [replaced.get(word, word) for word in shlex.split(command, comments=True)]
    variables = {}
    while "=" in words[0]:
        name, _, variables[name] = words.pop(0).partition("=")
    run([*PROGRAMS[words[0]], *words[1:]], folder, variables)


def run(arguments: list[str], folder: Path, variables: Mapping[str, str]) -> None:
    """Run Python in `folder`, with the package that stands there, or this tree's."""
    link = folder / "build" / "link"
    path = [str(link)] if link.exists() else [part for part in sys.path if (Path(part) / "burnish").exists()]
    environment = (
        os.environ | {"PYTHONPATH": os.pathsep.join([*path, str(folder)]), "OMP_NUM_THREADS": "1"} | variables
    )
    for name in ("PYTHONSAFEPATH", "PYTEST_XDIST_WORKER"):
        environment.pop(name, None)

    done = subprocess.run(
        [sys.executable, "-P", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, f"{' '.join(arguments)}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
