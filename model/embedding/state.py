"""The state that `apply` keeps on the model, from which `remove` restores the model.

Pickling a model stores the plain model, which loads without Burnish. For this, each object of this file is pickled as
the value that it replaced. Each of our forwards is named `forward`, so pickle finds the forward of the module's class
instead.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from torch import nn

STATE = "_burnish"  # the attribute of a model that holds its Embedded


class Named(str):
    """The name of our implementation in a model's config. It is pickled as the name that `apply` replaced."""

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
    """The settings that the model had before `apply`, pickled as None because a pickled model is the plain one.

    The name of an implementation is None if `apply` did not change it.
    """

    attention: str | None = None  # the name of the implementation
    experts: str | None = None  # the name of the implementation
    head: Callable[..., Any] | None = None  # our forward of a model with a head
    hook: Any = None  # the handle of trl_head.HandOver
    forwards: list[tuple[nn.Module, Any]] = field(default_factory=list)  # (module, its own forward or None)

    def __reduce__(self) -> Any:
        return copy.copy, (None,)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Embedded":
        values = (copy.deepcopy(getattr(self, f.name), memo) for f in fields(self))
        return Embedded(*values)
