"""The rules of every folder: floors, methods, reading order, size, paragraphs, docstrings."""

import ast
import re
from collections.abc import Iterator

from sources import (
    FLOORS,
    GROUND,
    Function,
    body,
    comments,
    every_function,
    first_and_last_line,
    functions,
    imports,
    is_kernel,
    is_op,
    is_reference,
    parse,
    section,
    signature,
    stem,
)

OPTIONAL = {"transformers", "peft", "trl", "accelerate", "datasets", "bitsandbytes", "liger_kernel"}

MOST_PARAMETERS = 8
MOST_LINES = 60  # of a function
MOST_LINES_OF = {"train": 80}
MOST_LINES_OF_A_KERNEL = 100
MOST_LINES_OF_A_FILE = 450
LONG_FILES = {"kernels/attention.py": 650, "kernels/lora.py": 650, "kernels/moe.py": 650}
PARAGRAPH = 15  # lines
MOST_INDEX = 3
POSITIONAL = {"inputs", "needs_input_grad", "rest"}
GESTURES = {"said", "told", "mine", "held", "apart", "both", "further"}
NO_PHRASE = {"Of", "Says", "Does", "Is", "As", "With", "Which", "What", "How", "Where", "In"}


# ---- what may import what


def imports_point_down(name: str, source: str) -> Iterator[str]:
    folder = name.split("/")[0]
    for line, (target, *_) in imports(name, source):
        if target in FLOORS and FLOORS.index(target) > FLOORS.index(folder):
            yield f"{name}:{line} imports {target}/"


def floor_0_stands_on_torch_and_triton(name: str, source: str) -> Iterator[str]:
    if name.startswith("kernels/"):
        for line, (target, *rest) in imports(name, source):
            if target == "" and rest[0] not in GROUND:
                yield f"{name}:{line} imports {rest[0]}"


def optional_packages_are_imported_on_demand(name: str, source: str) -> Iterator[str]:
    tree = parse(source)
    later = [node for node in ast.walk(tree) if isinstance(node, Function | ast.Lambda)]
    inside = {n.lineno for function in later for n in ast.walk(function) if isinstance(n, ast.stmt)}
    for line, (target, *rest) in imports(name, source):
        if target == "" and rest[0] in OPTIONAL and line not in inside:
            yield f"{name}:{line} imports {rest[0]} with the file"


# ---- algorithms


def algorithm_files_read_in_one_order(name: str, source: str) -> Iterator[str]:
    """Docstring, Config, losses, the function that runs, __main__: upstairs and in recipes/.

    That function is `train`; where nothing is trained, the one with the file's name, or `main`.
    """
    tree = parse(source)
    defined = {n.name: n.lineno for n in tree.body if isinstance(n, ast.ClassDef | Function)}
    docstring = ast.get_docstring(tree) or ""
    for word in ("Source:", "Run:") if "train" in defined else ("Run:",):
        if word not in docstring:
            yield f"{name}: the docstring has no {word!r}"

    losses = [line for function, line in defined.items() if function.endswith("_loss")]
    runs = next((function for function in ("train", stem(name), "main") if function in defined), "train")
    mains = [n.lineno for n in tree.body if isinstance(n, ast.If) and "__main__" in ast.unparse(n.test)]
    order = [defined.get("Config", 0), *losses, defined.get(runs, 0), *mains]
    if not defined.get("Config") or len(mains) != 1 or order != sorted(order):
        yield f"{name}: expected Config, losses, {runs}, __main__ in this order"
    if mains and tree.body[-1].lineno != mains[0]:
        yield f"{name}: something follows __main__"


def losses_require_their_denominator(name: str, source: str) -> Iterator[str]:
    for node in functions(source):
        if node.name.endswith("_loss"):
            required = [argument for argument, default in signature(node) if not default]
            if not any(re.match(r"\*?(num_|denominator)", argument) for argument in required):
                yield f"{name}:{node.lineno} {node.name}: no required denominator among {required}"


# ---- size


def is_public(name: str, node: Function) -> bool:
    """An op or a reference, whose arguments are the API."""
    return name.startswith("kernels/") and (is_op(node) or is_reference(node))


def functions_take_few_parameters(name: str, source: str) -> Iterator[str]:
    """At most 8, self and cls not counted. Exempt are Triton kernels, public ops and their references."""
    for node in every_function(source):
        if is_kernel(node) or is_public(name, node):
            continue
        a = node.args
        found = [x.arg for x in (*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg) if x is not None]
        count = len(found) - (found[:1] in (["self"], ["cls"]))
        if count > MOST_PARAMETERS:
            yield f"{name}:{node.lineno} {node.name}: {count} parameters, at most {MOST_PARAMETERS}"


def functions_are_short(name: str, source: str) -> Iterator[str]:
    """From `def` to the last line; of a public op and its reference the body alone, without the docstring."""
    for node in every_function(source):
        first, last = node.lineno, node.end_lineno or 0
        if is_public(name, node):
            first, last = first_and_last_line(body(node))
        most = MOST_LINES_OF_A_KERNEL if is_kernel(node) else MOST_LINES_OF.get(node.name, MOST_LINES)
        if (length := last - first + 1) > most:
            yield f"{name}:{node.lineno} {node.name}: {length} lines, at most {most}"


def files_are_short(name: str, source: str) -> Iterator[str]:
    most = LONG_FILES.get(name, MOST_LINES_OF_A_FILE)
    if (length := source.count("\n")) > most:
        yield f"{name}: {length} lines, at most {most}"


# ---- reading


def functions_have_paragraphs(name: str, source: str) -> Iterator[str]:
    """A blank line or a comment of its own at least every 15 lines of a body, Triton kernels' too.

    The docstring does not count, and every other line counts as it stands; but 15 lines that belong to one statement,
    as a long table or call, are no fault, for no blank line belongs into them.
    """
    lines = source.splitlines()
    for node in every_function(source):
        first, last = first_and_last_line(body(node))
        start = first
        for line in range(first, last + 2):
            text = lines[line - 1].strip() if line <= last else ""
            if text and not text.startswith("#"):
                continue
            if line - start > PARAGRAPH and not is_one_statement(node, start, line - 1):
                yield f"{name}:{start} {node.name}: {line - start} lines without a blank one, at most {PARAGRAPH}"
            start = line + 1


def is_one_statement(node: Function, first: int, last: int) -> bool:
    simple = (n for n in ast.walk(node) if isinstance(n, ast.stmt) and not hasattr(n, "body"))
    return any(n.lineno <= first and last <= (n.end_lineno or 0) for n in simple)


def the_formatter_is_not_fought(name: str, source: str) -> Iterator[str]:
    """No `fmt: skip`; `fmt: off` once in a file of kernels/, in a region from under kernels to before the op."""
    off = []
    for line, text in comments(source):
        if re.search(r"fmt:\s*skip", text):
            yield f"{name}:{line} fmt: skip"
        elif re.search(r"fmt:\s*off", text):
            off.append(line)
            place = section(source, line, ["reference", "kernels", "launch", "op"])
            if len(off) > 1 or place != "kernels" or not name.startswith("kernels/"):
                yield f"{name}:{line} fmt: off: expected one region a file of kernels/, under `# ---- kernels`"
        elif re.search(r"fmt:\s*on", text) and section(source, line, ["op"]):
            yield f"{name}:{line} fmt: on: expected it before `# ---- op`"


def gradients_and_inputs_go_by_name(name: str, source: str) -> Iterator[str]:
    """No [None] * n, no index above 3 into inputs, needs_input_grad, rest."""
    for node in ast.walk(parse(source)):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            if is_all_none(node.left) or is_all_none(node.right):
                yield f"{name}:{node.lineno} {ast.unparse(node)}"
        elif isinstance(node, ast.Subscript):
            named = getattr(node.value, "attr", getattr(node.value, "id", None))
            numbers = [n.value for n in ast.walk(node.slice) if isinstance(n, ast.Constant)]
            if named in POSITIONAL and any(isinstance(n, int) and n > MOST_INDEX for n in numbers):
                yield f"{name}:{node.lineno} {ast.unparse(node)}: an index above {MOST_INDEX}"


def is_all_none(node: ast.expr) -> bool:
    """[None], (None, None), but not []."""
    parts = node.elts if isinstance(node, ast.List | ast.Tuple) else []
    return bool(parts) and all(isinstance(part, ast.Constant) and part.value is None for part in parts)


def docstrings_start_with_a_phrase(name: str, source: str) -> Iterator[str]:
    """A verb or a noun phrase, not a clause that hangs on the name."""
    for node in ast.walk(parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | Function):
            word = re.match(r"\W*(\w+)", ast.get_docstring(node) or "")
            if word and word[1] in NO_PHRASE:
                yield f"{name}:{getattr(node, 'lineno', 1)} {getattr(node, 'name', 'the file')}: {word[1]} ..."


def names_are_words(name: str, source: str) -> Iterator[str]:
    """No variable, argument, function, class or import is bound to a gesture instead of the word for what it holds."""
    for node in ast.walk(parse(source)):
        match node:
            case (
                ast.Name(id=identifier, ctx=ast.Store())
                | ast.arg(arg=identifier)
                | ast.FunctionDef(name=identifier)
                | ast.AsyncFunctionDef(name=identifier)
                | ast.ClassDef(name=identifier)
                | ast.alias(asname=identifier)
            ) if identifier in GESTURES:
                yield f"{name}:{node.lineno} {identifier}: expected the word for what it holds"


# ---- precision

ONCE = {  # decided for all ops in one file
    "is_autocast_enabled",
    "get_autocast_dtype",
    "allow_tf32",
    "fp32_precision",
    "get_float32_matmul_precision",
    "set_float32_matmul_precision",
}
DECIDES = "kernels/_chip.py"


def precision_is_decided_once(name: str, source: str) -> Iterator[str]:
    if name != DECIDES:
        for node in ast.walk(parse(source)):
            named = getattr(node, "attr", getattr(node, "id", getattr(node, "value", None)))
            if isinstance(node, ast.alias):
                named = node.name
            if isinstance(named, str) and named.split(".")[-1] in ONCE:
                yield f"{name}:{node.lineno} {named}: precision and autocast_dtype of {DECIDES} decide it for all"
