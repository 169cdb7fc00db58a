"""The files of the four folders and of tests/, and what the rules ask a source: its imports, functions, comments."""

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FLOORS = ["kernels", "model", "algorithms", "bench"]  # a file imports its own folder and those before it

FILES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for folder in FLOORS
    for pattern in ("*.py", "*/*.py")  # one level of rooms
    for path in sorted((ROOT / folder).glob(pattern))
}
TESTS = {path.relative_to(ROOT).as_posix(): path.read_text() for path in sorted(ROOT.glob("tests/**/*.py"))}
KERNELS = {name: source for name, source in FILES.items() if name.startswith("kernels/")}
ALGORITHMS = {  # what runs: methods and their like upstairs, recipes
    name: source
    for name, source in FILES.items()
    if re.fullmatch(r"algorithms/(recipes/)?[^_/]\w*\.py", name)
    and ("\ndef train(" in source or '\nif __name__ == "__main__"' in source)
}
GROUND = {"torch", "triton", *sys.stdlib_module_names}  # all that floor 0 stands on


parse = cache(ast.parse)  # of 350 files, for 25 rules

# ---- names


def stem(name: str) -> str:
    """A file's name without folder, room and ending."""
    return name.rpartition("/")[2].removesuffix(".py")


@cache
def exported(folder: str) -> set[str]:
    """Names that a folder's __init__.py takes from its files; of kernels/ the public ops and types."""
    return {
        alias.name
        for node in ast.walk(parse(FILES[f"{folder}/__init__.py"]))
        if isinstance(node, ast.ImportFrom) and node.module != "_namesake"
        for alias in node.names
    }


PUBLIC = exported("kernels")


# ---- imports


def imports(name: str, source: str) -> Iterator[tuple[int, list[str]]]:
    """(line, path) of each import: ["kernels", "head", "blocks", "scaled"] of ours, ["", "numpy"] of other packages.

    import_module and __import__ of a name that stands there import, too.
    """
    package = name.split("/")[:-1]
    for node in ast.walk(parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, _from_the_root(alias.name.split("."))

        elif isinstance(node, ast.ImportFrom):
            parts = node.module.split(".") if node.module else []
            for alias in node.names:
                if node.level == 0:
                    yield node.lineno, _from_the_root([*parts, alias.name])
                else:
                    yield node.lineno, [*package[: len(package) - node.level + 1], *parts, alias.name]
        elif isinstance(node, ast.Call) and (module := _imported_by_name(node)):
            level = len(module) - len(module.lstrip("."))
            parts = module.lstrip(".").split(".")
            above = package[: len(package) - level + 1]
            yield node.lineno, [*above, *parts] if level else _from_the_root(parts)


def _imported_by_name(call: ast.Call) -> str:
    """The module that a call imports; empty where it imports none, or one that is only known when it runs."""
    function, name = call.func, call.args[0] if call.args else None
    called = getattr(function, "attr", getattr(function, "id", ""))
    is_import = called in ("import_module", "__import__")
    return name.value if is_import and isinstance(name, ast.Constant) and isinstance(name.value, str) else ""


def _from_the_root(path: list[str]) -> list[str]:
    return path[1:] if path[0] == "burnish" and len(path) > 1 else ["", path[0]]


# ---- functions


Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(source: str) -> list[Function]:
    return [node for node in parse(source).body if isinstance(node, Function)]


def every_function(source: str) -> list[Function]:
    """Methods and nested functions, too."""
    return [node for node in ast.walk(parse(source)) if isinstance(node, Function)]


def is_kernel(node: Function) -> bool:
    return any(
        ast.unparse(d).split("(")[0] in {"triton.jit", "jit", "gluon.jit"} for d in node.decorator_list
    )


def is_op(node: Function) -> bool:
    """A public op, not its reference."""
    return node.name in PUBLIC


def is_reference(node: Function) -> bool:
    return node.name.endswith("_reference")


def signature(node: Function) -> list[tuple[str, str]]:
    """Names and defaults, in order, keyword-only arguments marked."""
    a = node.args
    plain = [*a.posonlyargs, *a.args]
    text = lambda d: "" if d is None else ast.unparse(d)
    required = len(plain) - len(a.defaults)
    defaults = [""] * required + [text(d) for d in a.defaults]
    keyword = zip(a.kwonlyargs, a.kw_defaults, strict=True)
    return [(x.arg, d) for x, d in zip(plain, defaults, strict=True)] + [
        (f"*{x.arg}", text(d)) for x, d in keyword
    ]


def body(node: Function) -> list[ast.stmt]:
    """The statements behind the docstring."""
    return node.body[1:] if ast.get_docstring(node) is not None else node.body


def first_and_last_line(statements: list[ast.stmt]) -> tuple[int, int]:
    """(1, 0) of no statement."""
    if not statements:
        return 1, 0
    decorators = getattr(statements[0], "decorator_list", [])
    return min(s.lineno for s in (statements[0], *decorators)), statements[-1].end_lineno or 0


# ---- comments


@cache
def comments(source: str) -> list[tuple[int, str]]:
    """(line, text) of each, without what looks like one inside a string."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return [(token.start[0], token.string) for token in tokens if token.type == tokenize.COMMENT]


def marks(source: str) -> list[tuple[int, str]]:
    """(line, name) of the section marks: `# ---- name`."""
    found = ((line, re.fullmatch(r"# ---- (.*)", text)) for line, text in comments(source))
    return [(line, match[1]) for line, match in found if match]


def section(source: str, line: int, names: list[str]) -> str | None:
    """The section among those named in which a line stands."""
    before = [name for start, name in marks(source) if start < line and name in names]
    return before[-1] if before else None
