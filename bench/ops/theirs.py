"""A user's function in the benchmark. Its file is executed, and the function is checked before it is timed.

The function is called like the op, with the op's arguments by name. Its conditions are:

- It satisfies the accuracy rule.
- It writes to none of its inputs. A kernel that works in place saves memory and time that other contestants spend.
- It is right twice, the second time on other numbers in the same tensors. A kernel that remembers a result is fast, but
  wrong.
- Two of its calls may be under way at once, like the calls of two layers.
- It is right again after it was timed.
"""

import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...algorithms.run.calls import PASSES, described
from ...algorithms.run.user_files import load_function
from ...model.errors import InputError
from ..cases.case import Case, Tensors, as_leaf, leaves, make_upstream, run, verdicts
from ..cases.shapes import Description
from .contest import AGAINST, Contestant

ALONE = "--forward-only compares the forward pass alone"
NO_GPU = "Triton finds no GPU; with TRITON_INTERPRET=1 and --check-only it runs on the CPU"


def against(specifications: tuple[str, ...]) -> list[Contestant]:
    """Return a contestant for each function of --against, under a name such as mine.py:rms_norm.

    Raises InputError if a function is given twice.
    """
    for specification in specifications:
        if specifications.count(specification) > 1:
            raise InputError(f"--against {specification}: expected each function once, got it twice")
    short = [Path(s.rpartition(":")[0]).name + ":" + s.rpartition(":")[2] for s in specifications]
    names = [s if short.count(name) > 1 else name for s, name in zip(specifications, short, strict=True)]
    functions = [load_function(s, "against") for s in specifications]
    return [Contestant(name, f, AGAINST) for name, f in zip(names, functions, strict=True)]


class OnClones:
    """A wrapper that calls an op on clones of its inputs.

    written: the names of the inputs whose clones the op has changed.
    """

    def __init__(self, op: Callable[..., Any]):
        self.op = op
        self.pairs: list[tuple[str, Tensor, Tensor]] = []  # name, input, its clone

    def __call__(self, **operands: Any) -> Any:
        cloned = {n: x.clone() if isinstance(x, Tensor) else x for n, x in operands.items()}
        self.pairs = [(n, x, cloned[n]) for n, x in operands.items() if isinstance(x, Tensor)]
        return self.op(**cloned)

    @property
    def written(self) -> list[str]:
        return [name for name, given, clone in self.pairs if not same(given, clone)]


def same(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors hold the same bits. A NaN therefore equals itself."""
    flat = [t.detach().contiguous().view(-1).view(torch.uint8) for t in (a, b)]
    return torch.equal(*flat)


def changed(tensors: Tensors, before: Tensors) -> list[str]:
    """Return the names of the tensors that differ from their values in `before`."""
    pairs = ((name, t, before[name]) for name, t in tensors.items())
    return [name for name, t, b in pairs if t is not None and b is not None and not same(t, b)]


def copied(tensors: Tensors) -> Tensors:
    return {name: None if t is None else t.detach().clone() for name, t in tensors.items()}


def restore(tensors: Tensors, values: Tensors) -> None:
    """Copy other values into the tensors, in a way that autograd does not track."""
    for name, t in tensors.items():
        if t is not None and (value := values[name]) is not None:
            t.data.copy_(value)


# ---- the check


def why_not(op: Callable[..., Any], case: Case, draws: list[Tensors], described_as: Description) -> str:
    """Return why a user's function may not take part, in at most four lines, or "" if it computes the same as the op.

    draws: two input sets of one shape. The second set is copied into the tensors of the first, to find a function that
    remembers results by address. If no input of the Case has a gradient, only the forward pass is compared.
    """
    first, second = draws
    if why := misfit(op, case, first):
        return why
    clones = OnClones(op)
    wrong = _attempted(lambda: first_wrong(clones, case, [first], described_as))
    if clones.written:
        return writes(clones.written)
    separate = [copied(tensors) for tensors in draws]  # before the second is written over the first
    remembered = lambda: remembers(op, case, first, second, described_as)
    return wrong or _attempted(remembered) or _attempted(lambda: overlaps(op, case, separate, described_as))


def _attempted(step: Callable[[], str]) -> str:
    """Return the text that a check returns. If the user's function raises an error, return the error as text."""
    try:
        return step()
    except PASSES:
        raise
    except BaseException as error:  # a user's file may raise anything
        return raises(error)


def raises(error: BaseException) -> str:
    hint = f": {NO_GPU}" if "active drivers" in str(error) else ""
    return f"raises {described(error)}{hint}"


def misfit(op: Callable[..., Any], case: Case, tensors: Tensors) -> str:
    """Return why a function cannot be called with the op's arguments. Return "" if it can, or if Python cannot tell."""
    names = [*tensors, *case.options]
    try:
        signature = inspect.signature(op)
    except (TypeError, ValueError):
        return ""
    try:
        signature.bind(**dict.fromkeys(names))
    except TypeError:
        return f"expected a function that takes ({', '.join(names)}) by name, got {signature}"
    return ""


def first_wrong(op: Callable[..., Any], case: Case, draws: list[Tensors], described_as: Description) -> str:
    """Return a text about the first output or gradient that breaks the accuracy rule, and where it is wrong.

    The function runs on draws[0]. Outputs come before gradients. If all are accurate, the text is "".
    """
    found = [v for v in verdicts(replace(case, fused=op), draws[0]) if v.wrong is not None]
    found.sort(
        key=lambda v: v.name.startswith("gradient")
    )  # outputs first: a wrong output explains wrong gradients
    if not found:
        return ""
    text = found[0].text(described_as.axes(found[0].name))
    others = f" (and {len(found) - 1} more of its outputs and gradients)" if found[1:] else ""
    lacks = found[0].name.startswith("gradient") and not found[0].allowed >= 0  # nothing was compared
    return f"{text}{others}" + (f"; {ALONE}" if lacks else "")


def writes(names: list[str]) -> str:
    return f"writes to its input {names[0]}: expected inputs that stay as they are"


def remembers(
    op: Callable[..., Any], case: Case, tensors: Tensors, others: Tensors, described_as: Description
) -> str:
    """Call a function twice on the same tensors with different numbers. Return an error of the second call, or ""."""
    if any(t is not None and t.shape != getattr(others[n], "shape", None) for n, t in tensors.items()):
        return ""  # the draws have different lengths

    # the same tensor objects as in a timed call, and a write that their version counters do not count
    names = leaves(case, tensors)
    tensors = {n: as_leaf(t) if n in names and t is not None else t for n, t in tensors.items()}
    run(op, case, tensors, make_upstream(case, tensors))
    restore(tensors, others)
    wrong = first_wrong(op, case, [tensors], described_as)
    if names := changed(tensors, others):
        return writes(names)
    return f"right on its first inputs, wrong on others at the same addresses: {wrong}" if wrong else ""


def overlaps(op: Callable[..., Any], case: Case, draws: list[Tensors], described_as: Description) -> str:
    """Return what is wrong with a call's results if another call runs before its backward pass, or "" if nothing is."""
    first, second = draws
    names = leaves(case, second)
    others = {n: as_leaf(t) if n in names and t is not None else t for n, t in second.items()}

    def followed(**operands: Any) -> Any:
        outputs = op(**operands)
        op(**{**operands, **others})
        return outputs

    wrong = first_wrong(followed, case, [first], described_as)
    return f"a later call changes what an earlier one returned or saved: {wrong}" if wrong else ""
