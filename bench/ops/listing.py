"""The text of `burnish bench --list`: the ops and their shapes, or the arguments that a user's function gets."""

import inspect
import textwrap
from collections.abc import Sequence

import torch

from ... import kernels
from ..cases.case import Case, label
from ..cases.shapes import describe, letters, letters_text
from .chosen import chosen
from .peers import PEERS

MEANINGS = {  # of the letters of a shape
    "B": "batch",
    "T": "tokens",
    "S": "keys of a sequence",
    "H": "query heads",
    "G": "key/value heads",
    "D": "head dimension",
    "C": "hidden size",
    "F": "feed-forward size",
    "V": "vocabulary",
    "E": "experts",
    "K": "experts of a token",
    "R": "LoRA rank",
    "P": "tokens of the prompt",
    "rotary": "rotated dimensions of a head",
    "teacher": "hidden size of the teacher",
}
_LINEAR = {"C": "input features", "F": "output features", "E": "adapters"}
OWN_MEANINGS = {  # of single ops
    "rms_norm": {"H": "heads"},
    "flash_attention": {"R": "tokens of a completion"},
    "token_logprobs": {"K": "support: ids that sampling kept"},
    "topk_divergence": {"K": "ids of the teacher"},
    "lora_linear": _LINEAR,
    "lora_linears": _LINEAR | {"F": "features of q", "G": "features of k, and of v"},
    "nf4_linear": _LINEAR,
    "dequantize_nf4": _LINEAR,
    "quantize_nf4": _LINEAR,
}


def listing(cases: Sequence[Case], names: Sequence[str], device: str) -> str:
    """Return the text of --list: one line for each Case with an example shape, or the details of the named ops."""
    if not names:
        return overview(cases, device)
    found = chosen(cases, names)
    ops = dict.fromkeys(case.op for case in found)
    of_op = lambda op: [details(case) for case in found if case.op == op]
    return "\n\n".join(part for op in ops for part in (documentation(op), *of_op(op)))


def documentation(op: str) -> str:
    """Return the op's signature and its docstring."""
    function = getattr(kernels, op)
    signature = inspect.signature(function)
    plain = [
        parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()
    ]
    head = f"burnish.kernels.{op}{inspect.Signature(plain)}"
    return f"{head}\n\n{textwrap.indent(inspect.getdoc(function) or '', '    ')}"


def overview(cases: Sequence[Case], device: str) -> str:
    rows = [("op/family", "letters", "a shape")]
    for case in cases:
        shape = (case.bench.get(device) or case.shapes[-1:])[0]
        rows.append((case.name, letters_text(case), label(shape)))
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    lines = [f"{a:{widths[0]}}  {b:{widths[1]}}  {c}" for a, b, c in rows]
    hint = (
        "burnish bench --list OP explains the letters, and shows the arguments that your function gets, and what it "
        "must return."
    )
    return "\n".join([*lines, "", hint])


def details(case: Case) -> str:
    """Return the text about a Case: its letters, arguments and outputs at a test shape, timed shapes and peers."""
    shape = case.shapes[min(1, len(case.shapes) - 1)]
    meanings = MEANINGS | OWN_MEANINGS.get(case.op, {})
    shapes = [f"  {device}: {label(dims)}" for device, timed in case.bench.items() for dims in timed]
    parts = [
        f"{case.name}  letters: {letters_text(case)}",
        "; ".join(f"{letter}: {meanings[letter]}" for letter in letters(case)),
        f"your function is called with these arguments and options by name, here at {label(shape)}:",
        describe(case, shape, torch.float32).text(),
        f"work: {case.formula}",
        *(["timed by default at", *shapes] if shapes else ["timed only with --shape"]),
    ]
    if case.op in PEERS:
        parts.append(f"--peers: {'; '.join(PEERS[case.op])}")
    return "\n".join(parts)
