"""The rules of kernels/: the order of a kernel file, ops and their references."""

import ast
import re
from collections.abc import Iterator

from sources import (
    FILES,
    PUBLIC,
    functions,
    is_kernel,
    is_op,
    is_reference,
    marks,
    parse,
    signature,
    stem,
)
from sources import section as section_of

SECTIONS = ["reference", "kernels", "launch", "op"]
OTHER_WORDS = {"autograd": "launch", "public op": "op"}
ONLY_THE_OP_HAS = {"*memory_budget"}  # a reference would ignore it


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
    """A reference has the op's parameters, in order, with their defaults, but for those that it would ignore.

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
