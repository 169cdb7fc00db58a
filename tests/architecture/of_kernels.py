"""The rules of kernels/: rooms, the order of a kernel file, ops and their references."""

import ast
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from graphlib import CycleError, TopologicalSorter

from sources import (
    FILES,
    PUBLIC,
    functions,
    imports,
    is_kernel,
    is_op,
    is_reference,
    marks,
    parse,
    signature,
    stem,
)
from sources import section as section_of

ROOMS = ("head", "plain")
OPS = "norm rope glu attention decode sample nf4 lora low_rank route moe head/[!_]*"
ARROWS = {  # which files of kernels/ import which: what the rows that fit a file allow, together
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
}
SECTIONS = ["reference", "kernels", "launch", "op"]
OTHER_WORDS = {"autograd": "launch", "public op": "op"}
ONLY_THE_OP_HAS = {"*memory_budget"}  # a reference would ignore it


# ---- rooms


def arrows(name: str, source: str) -> Iterator[tuple[int, str]]:
    """(line, file) of what a file of kernels/ imports from kernels/, as "_chip" or "head/blocks"."""
    for line, (target, *rest) in imports(name, source):
        if target == "kernels":
            in_a_room = rest[0] in ROOMS and len(rest) > 1
            file = "/".join(rest[:2]) if in_a_room else rest[0] if rest else "__init__"
            yield line, "__init__" if file in PUBLIC else file


def rooms_import_what_they_may(name: str, source: str) -> Iterator[str]:
    """The list ARROWS, by relative imports alone: a copy of the folder has another name."""
    file = name.removeprefix("kernels/").removesuffix(".py")
    fits = lambda file, patterns: any(fnmatch(file, pattern) for pattern in patterns)
    rows = [targets.split() for row, targets in ARROWS.items() if fits(file, row.split())]
    allowed = [target for targets in rows for target in targets]
    for line, target in arrows(name, source):
        if not fits(target, allowed):
            yield f"{name}:{line} imports {target}, expected one of {', '.join(allowed)}"
    for node in ast.walk(parse(source)):
        absolute = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            absolute = [node.module or ""]
        if any(module.split(".")[0] == "burnish" for module in absolute):
            yield f"{name}:{getattr(node, 'lineno', 1)} imports burnish, expected a relative import"


def circle(files: dict[str, str]) -> list[str]:
    """The files of a circle of imports; none where there is none."""
    graph = {
        name.removeprefix("kernels/").removesuffix(".py"): {file for _, file in arrows(name, source)}
        for name, source in files.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


# ---- a kernel file


def has_gradient(source: str) -> bool:
    """Whether a file gives an op a backward: a function so named, or an argument."""
    for node in ast.walk(parse(source)):
        named = getattr(node, "name", "") if isinstance(node, ast.FunctionDef) else getattr(node, "arg", "")
        if isinstance(node, ast.FunctionDef | ast.keyword) and re.search(
            "backward|differentiate", named or ""
        ):
            return True
    return False


def kernel_files_say_what_they_compute(name: str, source: str) -> Iterator[str]:
    docstring = ast.get_docstring(parse(source)) or ""
    if any(is_op(node) for node in functions(source)):
        for what, pattern in {
            "formula": r"\w.* = ",
            "word Memory or Traffic": r"\b(Memory|Traffic)\b",
            "Source:": r"Source:",
        }.items():
            if not re.search(pattern, docstring):
                yield f"{name}: no {what} in the docstring"


def kernel_files_read_in_one_order(name: str, source: str) -> Iterator[str]:
    """Sections reference, kernels, launch, op in this order, those that a file has, and everything in its own."""
    named = [mark for _, mark in marks(source)]
    no_gradient = any(is_op(node) for node in functions(source)) and not has_gradient(source)
    found = [mark for mark in named if mark in SECTIONS]
    if found != [mark for mark in SECTIONS if mark in found]:
        yield f"{name}: expected the sections {SECTIONS}, got {found}"
    for mark in named:
        if mark in OTHER_WORDS:
            yield f"{name}: expected the section mark {OTHER_WORDS[mark]!r}, got {mark!r}"
        elif no_gradient and re.search("autograd|backward|gradient", mark):
            yield f"{name}: the section mark {mark!r} in a file without a gradient"

    plain = name.startswith("kernels/plain/")
    for node in functions(source):
        if is_kernel(node):
            belongs = "kernels"
        elif is_reference(node):
            belongs = "reference"
        elif is_op(node):
            belongs = "op"
        else:
            continue  # a helper stands where it is used
        section = section_of(source, node.lineno, SECTIONS)
        if plain and belongs != "reference":
            yield f"{name}:{node.lineno} {node.name}: kernels/plain/ has no Triton kernel and no op"
        elif not plain and section != belongs:
            yield f"{name}:{node.lineno} {node.name} stands under {section!r}, expected {belongs!r}"


def what_stands_under_op_is_exported(name: str, source: str) -> Iterator[str]:
    for node in functions(source):
        public = not node.name.startswith("_") and section_of(source, node.lineno, SECTIONS) == "op"
        if public and not is_op(node):
            yield f"{name}:{node.lineno} {node.name} stands under 'op', and kernels/__init__.py has it not"


def kernels_name_their_arguments(name: str, source: str) -> Iterator[str]:
    for node in filter(is_kernel, functions(source)):
        if not node.name.startswith("_"):
            yield f"{name}:{node.lineno} {node.name}: a kernel is private"
        for argument in node.args.args:
            constant = argument.annotation is not None and "constexpr" in ast.unparse(argument.annotation)
            if constant and argument.arg != argument.arg.upper():
                yield f"{name}:{node.lineno} {node.name}: constant {argument.arg} is not in upper case"


# ---- ops and references


def every_op_has_its_reference(name: str, source: str) -> Iterator[str]:
    """With the op's parameters, in order, with their defaults, but for those that it would ignore.

    It stands in the op's file, or in the file of that name in kernels/plain/.
    """
    elsewhere = FILES.get(f"kernels/plain/{stem(name)}.py", "")
    references = {node.name: node for text in (elsewhere, source) for node in functions(text)}
    for node in functions(source):
        if is_reference(node):
            if node.name.removesuffix("_reference") not in PUBLIC:
                yield f"{name}:{node.lineno} {node.name} is the reference of no op"
        elif is_op(node):
            reference = references.get(f"{node.name}_reference")
            if reference is None:
                yield f"{name}:{node.lineno} {node.name} has no {node.name}_reference"
                continue
            theirs = signature(reference)
            kept = [pair for pair in signature(node) if pair[0] not in ONLY_THE_OP_HAS or pair in theirs]
            if theirs != kept:
                yield f"{name}:{node.lineno} {node.name} and its reference differ: {kept}, {theirs}"


def references_use_all_they_take(name: str, source: str) -> Iterator[str]:
    """An argument that would be ignored does not exist."""
    for node in filter(is_reference, functions(source)):
        used = {n.id for statement in node.body for n in ast.walk(statement) if isinstance(n, ast.Name)}
        for argument, _ in signature(node):
            if argument.lstrip("*") not in used:
                yield f"{name}:{node.lineno} {node.name} does not use {argument.lstrip('*')}"


def no_op_hides_its_module(name: str, source: str) -> Iterator[str]:
    if stem(name) in {node.name for node in functions(source)}:
        yield f"{name}: {stem(name)}.{stem(name)}: once re-exported, the function hides the module"
