"""The layers of a model that get an adapter, by --lora-targets.

    (none)                  the seven linear layers of a block, and the experts
    all-linear              every linear layer but the head, and the experts
    q_proj down_proj        the layers whose names end so, experts included; lm_head is the head
    '.*[02468]\\..*q_proj'   one regular expression, of whole names

An expression is told from a name by a character that no name has.
"""

import re
from collections.abc import Mapping
from typing import Any

from ...model.adapters.config import LINEARS
from ...model.adapters.expressions import Expression
from ...model.errors import InputError, shown
from ...model.linear import Adaptable
from ...model.placement import EMBEDDING

ALL = "all-linear"
HEAD = "lm_head"
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


def placed(targets: tuple[str, ...], layers: Mapping[str, Adaptable], scores: bool = False) -> dict[str, Any]:
    """Return the fields `targets` and `parameters` of LoraConfig for the values of --lora-targets.

    layers: the model's, by name. scores: whether the model is a critic or a reward model. It has no head, so that
    lm_head is left out where other names remain, as in a policy's critic.

    Raises InputError if a value selects no layer.
    """
    dense = [name for name, layer in layers.items() if not layer.stack and name != HEAD]
    stacks = [name for name, layer in layers.items() if layer.stack]
    if targets in ((), (ALL,)):
        # only names of layers that the model has: PEFT would take other names for older names of the experts
        last_parts = [*dict.fromkeys(name.rpartition(".")[2] for name in dense)]
        of_all = last_parts if targets else [name for name in LINEARS if name in last_parts]
        return {"targets": tuple(of_all), "parameters": EXPERTS if stacks else ()}

    heads = [] if scores else [HEAD]
    if len(targets) == 1 and not re.fullmatch(r"[\w.-]+", targets[0]):
        return _by_expression(targets[0], [*dense, *heads], stacks)
    if scores and len(targets) > 1:
        targets = tuple(name for name in targets if name != HEAD)

    names: dict[str, Any] = {}
    matrices: dict[str, Any] = {}
    for name in targets:
        of_dense = any(_ends(name, layer) for layer in [*dense, *heads])
        of_experts = [matrix for matrix in EXPERTS if stacks and _ends(name, matrix)]
        if not of_dense and not of_experts:
            short = dict.fromkeys(layer.rpartition(".")[2] for layer in [*dense, *stacks])
            raise InputError(
                f"--lora-targets: expected {ALL}, one regular expression, or names of linear layers "
                f"({', '.join(short)}), got {shown(name)}"
            )
        names |= {name: None} if of_dense else {}
        matrices |= dict.fromkeys(of_experts)
    return {"targets": tuple(names), "parameters": tuple(matrices)}


def _by_expression(text: str, dense: list[str], stacks: list[str]) -> dict[str, Any]:
    """Return `targets` and `parameters` for a regular expression.

    PEFT selects a matrix of experts by the end of its name, in all layers. So an expression selects it in all or none.
    """
    expression = Expression(text, "--lora-targets")
    if expression.matches(EMBEDDING):
        raise InputError(
            f"--lora-targets: expected linear layers, got {shown(text)}, which matches {EMBEDDING}"
        )
    parameters: list[str] = []
    for matrix in EXPERTS:
        found = [expression.matches(name) for name in stacks if _ends(matrix, name)]
        if any(found) and not all(found):
            raise InputError(
                f"--lora-targets: expected {matrix} of every layer or of none, got {shown(text)}"
            )
        parameters += [matrix] * any(found)

    if not parameters and not any(map(expression.matches, dense)):
        raise InputError(
            "--lora-targets: expected an expression of whole names of linear layers, such as "
            f"{[*dense, *stacks][0]}, got {shown(text)}"
        )
    return {"targets": text, "parameters": tuple(parameters)}


def _ends(name: str, layer: str) -> bool:
    """Return whether `name` is a layer's name or the end of it, from a dot on."""
    return layer == name or layer.endswith(f".{name}")
