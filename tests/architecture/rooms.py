"""The rules of rooms: for each folder one list of which of its files imports which, and no circles.

Patterns are fnmatch's, on names without folder and ending: "head/*" is a room, "./*" what stands upstairs,
"../model/*" another folder, "!embed" all but that file. A row allows the files on its left what stands on its right;
all rows that fit a file count together.
"""

import ast
from collections import defaultdict
from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import cache
from graphlib import CycleError, TopologicalSorter

from sources import FILES, FLOORS, GROUND, exported, imports, parse

ROOMS = {
    "kernels": ("head", "plain"),
    "model": ("files", "text", "adapters", "embedding"),
    "algorithms": ("objectives", "data", "run", "show", "search", "recipes"),
    "bench": ("cases", "ops", "runs", "publish"),
}
OPS = "norm rope glu attention decode sample nf4 lora low_rank route moe head/[!_]*"
READERS = "checkpoint weights convert adapter_tensors"  # between what computes and what lies on disk
ARROWS = {
    "kernels": {
        "__init__": "*",
        "*": "records tiles _[!_]*",  # _op, _chip, _triton, and tables that nobody looks up
        OPS: "plain/*",
        "head/*": "head/blocks head/inputs",
        "head/logprob": "head/gather",  # of a recorded support, a few columns
        "lora moe plain/moe": "nf4",  # products with a weight in 4 bits
        "lora": "low_rank",
        "moe": "route",
        "plain/*": "plain/*",
        "head/divergence": "head/mixture",
        "plain/logprob plain/divergence": "head/blocks head/inputs",
    },
    "model": {
        "__init__": "./*",
        "./* !embed": "./* !checkpoint !weights !convert adapters/* ../kernels/*",  # computes
        READERS: "./* files/* text/*",
        "embed": "embedding/* errors",  # a door
        "files/*": "files/* errors config rope adapters/config",
        "files/bnb": "../kernels/*",  # the same 4 bits
        "text/*": "text/* files/* errors vocabulary",
        "adapters/*": "adapters/* errors ../kernels/*",
        "embedding/*": "embedding/* errors ../kernels/*",
    },
    "algorithms": {
        "__main__": "run/streams run/command run/words show/versions",
        "__init__": "show/versions",
        "./[!_]*": "run/* show/* data/* objectives/* search/* ../*",  # a method, or evaluate, teach, chat, merge
        "recipes/*": "recipes/* ./[!_]* run/* show/* data/* objectives/* search/* ../*",
        "search/*": "search/* run/* data/* objectives/* ../*",
        "data/*": "data/* run/* ../*",
        "run/*": "run/* show/* ../*",
        "show/*": "show/* ../*",
        "objectives/*": "objectives/*",
    },
    "bench": {
        "__main__": "command ../*",
        "command": "cases/registry",  # names, for a mistyped command
        "./*": "./* ../*",
        "cases/*": "cases/* ../kernels/*",
        "ops/*": "ops/* cases/* ./* ../*",
        "runs/*": "runs/* ops/* cases/* ./* ../*",
        "publish/*": "publish/* runs/* ops/* cases/* ./* ../*",
    },
}


def fits(file: str, patterns: list[str]) -> bool:
    names = (file,) if "/" in file else (file, f"./{file}")
    matches = lambda pattern: any(fnmatchcase(name, pattern) for name in names)
    excluded = any(matches(pattern[1:]) for pattern in patterns if pattern.startswith("!"))
    return not excluded and any(matches(pattern) for pattern in patterns)


def split(name: str) -> tuple[str, str]:
    """("kernels", "head/blocks") of "kernels/head/blocks.py"."""
    folder, _, file = name.removesuffix(".py").partition("/")
    return folder, file


def room(file: str) -> str:
    """The room of a file; of one upstairs the file itself."""
    return file.rpartition("/")[0] or file


def arrows(name: str, source: str) -> Iterator[tuple[int, str]]:
    """(line, file) of what a file imports: "_chip", "head/blocks"; from another folder "../kernels/head/blocks"."""
    folder, _ = split(name)
    for line, (target, *rest) in imports(name, source):
        if target not in FLOORS:
            continue
        if rest and rest[0] in ROOMS[target]:
            file = "/".join([*rest, "__init__"][:2])  # the room itself, from which every file of it is had
        else:
            file = rest[0] if rest and rest[0] not in exported(target) else "__init__"
        yield line, file if target == folder else f"../{target}/{file}"


def allowed(name: str) -> list[list[str]]:
    """The right sides of the rows that fit a file."""
    folder, file = split(name)
    return [targets.split() for row, targets in ARROWS[folder].items() if fits(file, row.split())]


def rooms_import_what_they_may(name: str, source: str) -> Iterator[str]:
    """The list ARROWS, by relative imports alone: a copy of kernels/ has another name."""
    rows = allowed(name)
    for line, target in arrows(name, source):
        if not any(fits(target, row) for row in rows):
            expected = ", ".join(" ".join(row) for row in rows) or "nothing"
            yield f"{name}:{line} imports {target}, expected one of {expected}"
    for node in ast.walk(parse(source)):
        absolute = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            absolute = [node.module or ""]
        if any(module.split(".")[0] == "burnish" for module in absolute):
            yield f"{name}:{getattr(node, 'lineno', 1)} imports burnish, expected a relative import"


def algorithms_never_import_one_another(name: str, source: str) -> Iterator[str]:
    """Recipes alone import what stands upstairs in algorithms/."""
    folder, file = split(name)
    if folder == "algorithms" and room(file) != "recipes":
        for line, target in arrows(name, source):
            if "/" not in target:
                yield f"{name}:{line} imports {target}, which stands upstairs"


def objectives_stand_on_torch(name: str, source: str) -> Iterator[str]:
    """Pure functions of tensors and numbers: no other package."""
    if name.startswith("algorithms/objectives/"):
        for line, (target, *rest) in imports(name, source):
            if target == "" and rest[0] not in GROUND - {"triton"}:
                yield f"{name}:{line} imports {rest[0]}"


# ---- circles


@cache
def targets(name: str, source: str) -> frozenset[str]:
    """The files of its folder and of others that a file imports; to import itself, as __main__ may, is no arrow."""
    return frozenset(target for _, target in arrows(name, source)) - {split(name)[1]}


def files_import_in_no_circle(name: str, source: str) -> Iterator[str]:
    if chain := circle(FILES | {name: source}, name):
        yield f"{name} imports itself: {' -> '.join(chain)}"


def circle(files: dict[str, str], name: str) -> list[str]:
    """The shortest chain of imports inside a folder from a file back to itself; none where there is none."""
    folder, start = split(name)
    chains = [[start]]
    seen = set()
    for chain in chains:  # grows meanwhile
        file = f"{folder}/{chain[-1]}.py"
        for target in sorted(targets(file, files[file]) if file in files else ()):
            if target == start:
                return [*chain, start]
            if target not in seen:
                seen.add(target)
                chains.append([*chain, target])
    return []


def circle_of_rooms(files: dict[str, str]) -> list[str]:
    """The rooms, and files upstairs, of a circle; of arrows that ARROWS forbids its own rule speaks."""
    graph = defaultdict(set)
    for name, source in files.items():
        start = room(split(name)[1])
        for target in targets(name, source):
            if room(target) != start and any(fits(target, row) for row in allowed(name)):
                graph[start].add(room(target))
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []
