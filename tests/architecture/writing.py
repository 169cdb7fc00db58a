"""The rule of written files: beside their place and renamed, by one helper."""

import ast
from collections.abc import Iterator

from sources import parse

WRITER = "model/files/replacing.py"
BESIDE = ("replacing", "replacing_folder")  # its context managers, which yield the path beside
IN_PLACE = {  # (file, way) -> why it is written where it stands
    ("algorithms/run/folder.py", "append"): "logs grow by a line as long as the run goes on",
    ("algorithms/run/loop.py", "append"): "logs grow by a line as long as the run goes on",
    ("algorithms/run/folder.py", "update"): "a run that resumes cuts off what its logs hold of later steps",
    ("algorithms/run/claim.py", "write"): "the file of a lock, which a renamed one would not keep",
    ("bench/runs/crew.py", "write"): "the log of a process, which others read while it runs",
    ("bench/ops/machine_code.py", "write"): "machine code in a temporary folder, for one tool to read",
    ("model/files/tensors.py", "rename"): "files of a folder that is not in its place yet",
    ("model/files/tensors.py", "write"): "files of a folder that is not in its place yet",
    ("bench/runs/trainers.py", "write"): "rows in a temporary folder, for the trainers that are measured",
}
LIBRARIES = {  # other packages' writers, which take the file as an argument
    "save_file",
    "torch.save",
    "np.save",
    "np.savez",
    "numpy.save",
    "shutil.copy",
    "shutil.copy2",
    "shutil.copyfile",
    "shutil.copytree",
}
DEVICES = ("os.devnull", "/proc/")  # nothing lies there
MODULES = {"io", "os", "gzip", "bz2", "lzma", "codecs"}  # whose open takes the file first, unlike a path's


def files_are_written_beside_their_place(name: str, source: str) -> Iterator[str]:
    """No rename, write_text, write_bytes, call of LIBRARIES or open for writing but in kernels/ and WRITER.

    Inside of `with replacing(file) as beside` what is written to `beside` is no fault.
    """
    if not name.startswith("kernels/") and name != WRITER:
        for line, way, text in writes(source):
            if (name, way) not in IN_PLACE:
                yield f"{name}:{line} {text}: expected {' or '.join(BESIDE)} of {WRITER} ({way})"


def writes(source: str) -> Iterator[tuple[int, str, str]]:
    """(line, way, text) of whatever changes a file in its place; ways are rename, write, append, update."""
    yield from _writes(parse(source), frozenset())


def _writes(node: ast.AST, beside: frozenset[str]) -> Iterator[tuple[int, str, str]]:
    """beside: the names of paths that are yet to be renamed."""
    if isinstance(node, ast.With):
        beside |= {
            item.optional_vars.id
            for item in node.items
            if isinstance(item.optional_vars, ast.Name) and _called(item.context_expr) in BESIDE
        }

    elif isinstance(node, ast.ImportFrom) and node.module in ("os", "shutil"):
        for alias in node.names:
            if alias.name in ("replace", "rename", "renames", "move"):
                yield node.lineno, "rename", f"from {node.module} import {alias.name}"
    elif isinstance(node, ast.Call) and (way := _way(node)):
        text = ast.unparse(node)
        named = {each.id for each in ast.walk(_file(node)) if isinstance(each, ast.Name)}
        if not any(device in text for device in DEVICES) and (way == "rename" or not named & beside):
            yield node.lineno, way, text
    for child in ast.iter_child_nodes(node):
        yield from _writes(child, beside)


def _called(node: ast.AST) -> str:
    """The last name of what a call calls."""
    function = node.func if isinstance(node, ast.Call) else None
    return getattr(function, "attr", getattr(function, "id", ""))


def _file(call: ast.Call) -> ast.AST:
    """The path that a call writes to; of a library's writer the whole call, among whose arguments it is."""
    function = call.func
    if _called(call) in LIBRARIES or ast.unparse(function) in LIBRARIES:
        return call
    if isinstance(function, ast.Attribute) and ast.unparse(function.value) not in MODULES:
        return function.value
    return call.args[0] if call.args else call


def _way(call: ast.Call) -> str | None:
    function = call.func
    owner = ast.unparse(function.value) if isinstance(function, ast.Attribute) else ""
    called = _called(call)

    # a path's replace takes one argument; a text's takes two, a dataclass's and an array's names
    if called == "replace" and owner and owner != "dataclasses":
        return "rename" if owner == "os" or (len(call.args) == 1 and not call.keywords) else None
    if owner and (called in ("rename", "renames") or (called == "move" and owner == "shutil")):
        return "rename"
    if called in LIBRARIES or f"{owner}.{called}" in LIBRARIES:
        return "write"
    if owner and called in ("write_text", "write_bytes"):
        return "write" if len(call.args) < 2 else None  # a path's; a helper's takes the path first
    return _way_of_open(call, owner) if called in ("open", "fdopen") else None


def _way_of_open(call: ast.Call, owner: str) -> str | None:
    named = {keyword.arg: keyword.value for keyword in call.keywords}
    if "closefd" in named:
        return None  # a descriptor that is open
    if owner == "os" and _called(call) == "open":
        return (
            "write" if any(flag in ast.unparse(call) for flag in ("O_WRONLY", "O_RDWR", "O_CREAT")) else None
        )

    takes_a_file = not owner or owner in MODULES
    given = call.args[takes_a_file : takes_a_file + 1]
    mode = named.get("mode", given[0] if given else ast.Constant("r"))
    if not isinstance(mode, ast.Constant):
        return (
            "write" if takes_a_file else None
        )  # nobody sees whether; of a method, nobody sees what it opens
    letters = mode.value if isinstance(mode.value, str) else ""
    ways = {"w": "write", "x": "write", "a": "append", "+": "update"}
    return next(
        (way for letter, way in ways.items() if letter in letters and not set(letters) - set("rwxabtU+")),
        None,
    )
