"""The memory of `apply`, on the model: all that `remove` needs to take our ops off again.

A pickled model is the plain one, which loads where there is no Burnish: what stands here is pickled as what was there
before. Each of our forwards has the name `forward`, so pickle finds that of its module's class.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from torch import nn

STATE = "_burnish"  # the attribute of a model that holds its Embedded


class Named(str):
    """The name of our implementation in a model's config. Pickled it is the name that was set before."""

    before: str | None

    def __new__(cls, name: str, before: str | None) -> "Named":
        named = super().__new__(cls, name)
        named.before = before
        return named

    def __reduce__(self) -> Any:
        return copy.copy, (self.before,)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Named":
        return self


@dataclass
class Embedded:
    """The model before `apply`. An implementation is None where it was left alone. Pickled it is None."""

    attention: str | None = None  # the implementation
    experts: str | None = None  # the implementation
    head: Callable[..., Any] | None = None  # our forward of the model, which has a head
    hook: Any = None  # the handle of trl_head.HandOver
    forwards: list[tuple[nn.Module, Any]] = field(default_factory=list)  # a module, and what its instance had

    def __reduce__(self) -> Any:
        return copy.copy, (None,)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Embedded":
        values = (copy.deepcopy(getattr(self, f.name), memo) for f in fields(self))
        return Embedded(*values)
