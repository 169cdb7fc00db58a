"""The structure of the tree, held by a test: floors, reading order, names.

Each rule is a function from a file's name and source to its faults. Every file must have none; and for every rule there
is a planted source in which it must find one, for a check that cannot fail is a defect.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = ["kernels", "model", "algorithms", "bench"]  # a file imports its own folder and those before it
GROUND = {"torch", "triton", *sys.stdlib_module_names}  # all that floor 0 stands on
COMPOSITIONS = {"r1", "instruct", "chat_demo", "evaluate", "__main__"}  # they alone import algorithm files
MARKS = ["reference", "kernels", "autograd", "public op"]
OPTIONAL = {"transformers", "peft", "trl", "accelerate", "datasets", "bitsandbytes", "liger_kernel"}
MAX_LINES = 300  # of an algorithm file, its docstring included

FILES = {
    f"{folder}/{p.name}": p.read_text() for folder in FLOORS for p in sorted((ROOT / folder).glob("*.py"))
}
KERNELS = {name: source for name, source in FILES.items() if name.startswith("kernels/") and "/_" not in name}
ALGORITHMS = {
    name: source
    for name, source in FILES.items()
    if name.startswith("algorithms/") and "/_" not in name and "\ndef train(" in source
}


# ---- what a source says


def imports(source: str) -> Iterator[tuple[int, str, str]]:
    """(line, folder, module) of each import: "." is the file's own folder, "" stands for other packages."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, *_place(alias.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            parts = node.module.split(".") if node.module else []
            for alias in node.names:
                if node.level == 0:
                    yield node.lineno, *_place([*parts, alias.name])
                elif node.level == 1:
                    yield node.lineno, ".", (parts or [alias.name])[0]
                else:
                    yield node.lineno, *_place(["burnish", *parts, alias.name])


def _place(path: list[str]) -> tuple[str, str]:
    if path[0] != "burnish":
        return "", path[0]
    return (path[1], path[2] if len(path) > 2 else "") if len(path) > 1 else ("", "burnish")


def functions(source: str) -> list[ast.FunctionDef]:
    return [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]


def is_kernel(node: ast.FunctionDef) -> bool:
    return any(
        ast.unparse(d).split("(")[0] in {"triton.jit", "jit", "gluon.jit"} for d in node.decorator_list
    )


def signature(node: ast.FunctionDef) -> list[tuple[str, str]]:
    """Names and defaults, in order, keyword-only arguments marked."""
    a = node.args
    plain = [*a.posonlyargs, *a.args]
    defaults = [None] * (len(plain) - len(a.defaults)) + a.defaults
    named = list(zip(plain, defaults, strict=True))
    keyword = list(zip(a.kwonlyargs, a.kw_defaults, strict=True))
    text = lambda d: "" if d is None else ast.unparse(d)
    return [(x.arg, text(d)) for x, d in named] + [(f"*{x.arg}", text(d)) for x, d in keyword]


# ---- rules


def imports_point_down(name: str, source: str) -> Iterator[str]:
    folder = name.split("/")[0]
    for line, target, _ in imports(source):
        if target in FLOORS and FLOORS.index(target) > FLOORS.index(folder):
            yield f"{name}:{line} imports {target}/"


def floor_0_stands_on_torch_and_triton(name: str, source: str) -> Iterator[str]:
    if name.startswith("kernels/"):
        for line, target, module in imports(source):
            if target == "" and module not in GROUND:
                yield f"{name}:{line} imports {module}"


def optional_packages_are_imported_on_demand(name: str, source: str) -> Iterator[str]:
    tree = ast.parse(source)
    later = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.Lambda)]
    inside = {n.lineno for function in later for n in ast.walk(function) if isinstance(n, ast.stmt)}
    for line, target, module in imports(source):
        if target == "" and module in OPTIONAL and line not in inside:
            yield f"{name}:{line} imports {module} with the file"


def kernel_files_stand_alone(name: str, source: str) -> Iterator[str]:
    if name.startswith("kernels/") and name != "kernels/__init__.py":
        for line, target, module in imports(source):
            if target in {".", "kernels"} and not module.startswith("_"):
                yield f"{name}:{line} imports {module}: only underscored files are shared"


def algorithms_never_import_one_another(name: str, source: str) -> Iterator[str]:
    folder, file = name.split("/")
    if folder == "algorithms" and file.removesuffix(".py") not in COMPOSITIONS:
        for line, target, module in imports(source):
            if target in {".", "algorithms"} and not module.startswith("_"):
                yield f"{name}:{line} imports the algorithm {module}"


def kernel_files_read_in_one_order(name: str, source: str) -> Iterator[str]:
    if "Source:" not in (ast.get_docstring(ast.parse(source)) or ""):
        yield f"{name}: no docstring that names its source"
    marks = [m.group(1) for m in re.finditer(r"^# ---- (.*)$", source, re.MULTILINE) if m.group(1) in MARKS]
    if marks != MARKS:
        yield f"{name}: expected the section marks {MARKS}, got {marks}"
        return
    starts = [source[: source.index(f"\n# ---- {mark}\n")].count("\n") + 1 for mark in MARKS]
    for node in functions(source):
        section = MARKS[max(sum(start < node.lineno for start in starts) - 1, 0)]
        if node.name.endswith("_reference"):
            belongs = "reference"
        elif is_kernel(node):
            belongs = "kernels"
        elif not node.name.startswith("_"):
            belongs = "public op"
        else:
            continue  # a private helper stands where it is used
        if section != belongs:
            yield f"{name}:{node.lineno} {node.name} stands under {section!r}, expected {belongs!r}"


def every_op_has_its_reference(name: str, source: str) -> Iterator[str]:
    found = {node.name: node for node in functions(source) if not node.name.startswith("_")}
    for op, node in found.items():
        reference = found.get(f"{op}_reference")
        if op.endswith("_reference"):
            if op.removesuffix("_reference") not in found:
                yield f"{name}:{node.lineno} {op} is the reference of no op"
        elif reference is None:
            yield f"{name}:{node.lineno} {op} has no {op}_reference"
        elif signature(reference) != signature(node):
            yield f"{name}:{node.lineno} {op} and its reference differ: {signature(node)}, {signature(reference)}"


def no_op_hides_its_module(name: str, source: str) -> Iterator[str]:
    stem = name.split("/")[1].removesuffix(".py")
    if stem in {node.name for node in functions(source)}:
        yield f"{name}: {stem}.{stem}: once re-exported, the function hides the module"


def kernels_name_their_arguments(name: str, source: str) -> Iterator[str]:
    for node in filter(is_kernel, functions(source)):
        if not node.name.startswith("_"):
            yield f"{name}:{node.lineno} {node.name}: a kernel is private"
        for argument in node.args.args:
            constant = argument.annotation is not None and "constexpr" in ast.unparse(argument.annotation)
            if constant and argument.arg != argument.arg.upper():
                yield f"{name}:{node.lineno} {node.name}: constant {argument.arg} is not in upper case"


def algorithm_files_read_in_one_order(name: str, source: str) -> Iterator[str]:
    tree = ast.parse(source)
    docstring = ast.get_docstring(tree) or ""
    for word in ("Source:", "Run:"):
        if word not in docstring:
            yield f"{name}: the docstring has no {word!r}"
    defined = {n.name: n.lineno for n in tree.body if isinstance(n, ast.ClassDef | ast.FunctionDef)}
    losses = [line for function, line in defined.items() if function.endswith("_loss")]
    mains = [n.lineno for n in tree.body if isinstance(n, ast.If) and "__main__" in ast.unparse(n.test)]
    order = [defined.get("Config", 0), *losses, defined["train"], *mains]
    if not defined.get("Config") or len(mains) != 1 or order != sorted(order):
        yield f"{name}: expected Config, losses, train, __main__ in this order"
    if mains and tree.body[-1].lineno != mains[0]:
        yield f"{name}: something follows __main__"
    if (length := source.count("\n")) > MAX_LINES:
        yield f"{name}: {length} lines, at most {MAX_LINES}"


def losses_require_their_denominator(name: str, source: str) -> Iterator[str]:
    for node in functions(source):
        if node.name.endswith("_loss"):
            required = [argument for argument, default in signature(node) if not default]
            if not any(re.match(r"\*?(num_|denominator)", argument) for argument in required):
                yield f"{name}:{node.lineno} {node.name}: no required denominator among {required}"


ONCE = {  # read in kernels/_chip.py alone, where each is decided for all ops
    "is_autocast_enabled",
    "get_autocast_dtype",
    "allow_tf32",
    "fp32_precision",
    "get_float32_matmul_precision",
    "set_float32_matmul_precision",
}


def precision_is_decided_once(name: str, source: str) -> Iterator[str]:
    if name != "kernels/_chip.py":
        for node in ast.walk(ast.parse(source)):
            named = getattr(node, "attr", getattr(node, "id", getattr(node, "value", None)))
            if isinstance(node, ast.alias):
                named = node.name
            if isinstance(named, str) and named.split(".")[-1] in ONCE:
                yield f"{name}:{node.lineno} {named}: _chip.precision and _chip.autocast_dtype decide it for all"


RULES = [
    (imports_point_down, FILES),
    (floor_0_stands_on_torch_and_triton, FILES),
    (optional_packages_are_imported_on_demand, FILES),
    (kernel_files_stand_alone, FILES),
    (algorithms_never_import_one_another, FILES),
    (kernel_files_read_in_one_order, KERNELS),
    (every_op_has_its_reference, KERNELS),
    (no_op_hides_its_module, KERNELS),
    (kernels_name_their_arguments, FILES),
    (precision_is_decided_once, FILES),
    (algorithm_files_read_in_one_order, ALGORITHMS),
    (losses_require_their_denominator, FILES),
]


@pytest.mark.parametrize("rule, files", RULES, ids=[rule.__name__ for rule, _ in RULES])
def test_rule(rule, files):
    assert files
    faults = [fault for name, source in files.items() for fault in rule(name, source)]
    assert not faults, "\n".join(faults)


def test_folders_are_flat():
    nested = [p for folder in FLOORS for p in (ROOT / folder).glob("*/**/*.py")]
    assert not nested, f"setup.py lists four folders and nothing is discovered: {nested}"


def test_the_list_of_ops_is_the_api():
    ops = {
        node.name
        for source in KERNELS.values()
        for node in functions(source)
        if not node.name.startswith("_")
    }
    exported = {
        a.asname
        for n in ast.walk(ast.parse(FILES["kernels/__init__.py"]))
        if isinstance(n, ast.ImportFrom) and n.module != "_namesake"
        for a in n.names
    }
    types = {"NF4Weight"}  # what ops take and return beside tensors
    assert exported == {op for op in ops if not op.endswith("_reference")} | types


# ---- controls

KERNEL = '''"""Maths.

Source: somewhere
"""

# ---- reference


def op_reference(x, eps=1e-6, *, flag=False):
    return x


# ---- kernels


@triton.jit
def _op_fwd(x_ptr, N, BLOCK: tl.constexpr):
    pass


# ---- autograd


# ---- public op


def op(x, eps=1e-6, *, flag=False):
    return x
'''
ALGORITHM = '''"""Maths.

Source: somewhere
Run:    burnish x
"""


class Config:
    pass


def x_loss(logprob, num_tokens):
    return -logprob.sum() / num_tokens


def train(cfg):
    pass


if __name__ == "__main__":
    train(Config())
'''


_SWAPPED = ALGORITHM.replace("def train(cfg)", "def y_loss(num_tokens)").replace("def x_loss", "def train")


@pytest.mark.parametrize("rule, _", RULES, ids=[rule.__name__ for rule, _ in RULES])
def test_a_clean_file_has_no_fault(rule, _):
    name, source = (
        ("algorithms/x.py", ALGORITHM) if "algorithm" in rule.__name__ else ("kernels/x.py", KERNEL)
    )
    assert list(rule(name, source)) == []


@pytest.mark.parametrize(
    "rule, name, source",
    [
        (imports_point_down, "kernels/x.py", "from ..model.packed import Packed"),
        (imports_point_down, "model/x.py", "def f():\n    from burnish.bench import registry"),
        (imports_point_down, "algorithms/x.py", "import burnish.bench.registry"),
        (imports_point_down, "model/x.py", "from .. import algorithms"),
        (floor_0_stands_on_torch_and_triton, "kernels/x.py", "import numpy as np"),
        (optional_packages_are_imported_on_demand, "model/x.py", "if True:\n    from transformers import Trainer"),
        (optional_packages_are_imported_on_demand, "bench/x.py", "def f():\n    pass\nimport trl.trainer"),
        (precision_is_decided_once, "kernels/x.py", "tf32 = torch.backends.cuda.matmul.allow_tf32"),
        (precision_is_decided_once, "model/x.py", "from torch import is_autocast_enabled as enabled"),
        (precision_is_decided_once, "bench/x.py", "getattr(torch, 'get_autocast_dtype')('cpu')"),
        (precision_is_decided_once, "bench/x.py", "torch.backends.fp32_precision = 'tf32'"),
        (kernel_files_stand_alone, "kernels/x.py", "from .norm import rms_norm"),
        (kernel_files_stand_alone, "kernels/x.py", "from burnish.kernels.norm import rms_norm"),
        (algorithms_never_import_one_another, "algorithms/x.py", "from .sft import sft_loss"),
        (algorithms_never_import_one_another, "algorithms/_x.py", "from . import sft"),
        (kernel_files_read_in_one_order, "kernels/x.py", KERNEL.replace("Source:", "From")),
        (kernel_files_read_in_one_order, "kernels/x.py", KERNEL.replace("# ---- autograd\n", "")),
        (kernel_files_read_in_one_order, "kernels/x.py", KERNEL.replace("def op(", "def other_reference(")),
        (kernel_files_read_in_one_order, "kernels/x.py", KERNEL.replace("@triton.jit\ndef _op_fwd", "def op_fwd")),
        (kernel_files_read_in_one_order, "kernels/x.py", KERNEL + "\n\n@triton.jit\ndef _late(N):\n    pass\n"),
        (every_op_has_its_reference, "kernels/x.py", KERNEL.replace("op_reference", "op_truth")),
        (every_op_has_its_reference, "kernels/x.py", KERNEL.replace("def op(x, eps=1e-6", "def op(x, eps=1e-5")),
        (every_op_has_its_reference, "kernels/x.py", KERNEL.replace("def op(x, eps=1e-6, *, ", "def op(x, eps=1e-6, ")),
        (no_op_hides_its_module, "kernels/op.py", KERNEL),
        (kernels_name_their_arguments, "kernels/x.py", KERNEL.replace("BLOCK:", "block:")),
        (kernels_name_their_arguments, "kernels/x.py", KERNEL.replace("_op_fwd", "op_fwd")),
        (algorithm_files_read_in_one_order, "algorithms/x.py", ALGORITHM.replace("Run:", "Try:")),
        (algorithm_files_read_in_one_order, "algorithms/x.py", ALGORITHM.replace("class Config", "class Settings")),
        (algorithm_files_read_in_one_order, "algorithms/x.py", _SWAPPED),
        (algorithm_files_read_in_one_order, "algorithms/x.py", ALGORITHM + "\n\ndef late():\n    pass\n"),
        (algorithm_files_read_in_one_order, "algorithms/x.py", ALGORITHM + "\n" * MAX_LINES),
        (losses_require_their_denominator, "algorithms/x.py", ALGORITHM.replace("num_tokens)", "num_tokens=1)")),
    ],
)  # fmt: skip
def test_a_planted_fault_is_found(rule, name, source):
    assert list(rule(name, source))
