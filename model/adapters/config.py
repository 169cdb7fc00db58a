"""An adapter's shape: which modules have one, of which rank, with which scaling.

Source: LoRA, Hu et al. 2021, https://arxiv.org/abs/2106.09685; rsLoRA, https://arxiv.org/abs/2312.03732; the fields
        are those of PEFT's adapter_config.json
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..errors import InputError
from .expressions import Expression, Steps

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LoraConfig:
    """One adapter's shape. Module names are those of a Hugging Face model: model.layers.0.self_attn.q_proj."""

    rank: int  # R
    alpha: float
    targets: tuple[str, ...] | str = LINEARS  # ends of module names, or a regular expression of whole names
    # ends of names of experts' weights, mlp.experts.down_proj: all experts at once
    parameters: tuple[str, ...] = ()
    exclude: tuple[str, ...] | str = ()  # likewise, of modules that have none although `targets` says so
    layers: tuple[int, ...] | None = None  # only in these
    layers_pattern: tuple[str, ...] = ()  # what stands before a layer's number in a name; by default anything
    # by regular expression of names' ends
    rank_pattern: dict[str, int] = field(default_factory=dict, hash=False)
    alpha_pattern: dict[str, float] = field(default_factory=dict, hash=False)
    rslora: bool = False  # scaling alpha / sqrt(R) in place of alpha / R
    dora: bool = False
    dropout: float = 0.0  # share of x that an adapter does not see in training
    modules_to_save: tuple[str, ...] = ()  # ends of names of modules that are trained whole
    tied: bool = False  # on a base with one matrix for embedding and head, what is trained whole is still one
    base: str | None = None  # the model that the adapter belongs to, as it was named

    def targeted(self, module: str) -> bool:
        """Whether this linear layer, or these experts, have an adapter. `exclude` and `layers` are of linear layers.

        Raises InputError, as `rank_of` and `scaling_of` do, where an expression is none, or takes too long to match.
        """
        if ".experts." in module:
            return _named(self._rules["target_parameters"], module) and not self.whole(module)
        if _named(self._rules["exclude_modules"], module) or self.whole(module):
            return False
        if not _named(self._rules["target_modules"], module):
            return False

        # a name in full is adapted whatever its layer: as PEFT has it
        in_full = not isinstance(self.targets, str) and module in self._rules["target_modules"]
        return self.layers is None or in_full or self._layer_of(module) in self._rules["layers"]

    @cached_property
    def _rules(self) -> dict[str, Any]:
        """Lists of names as sets, and expressions; all of them have one time to match. By the keys of PEFT's file."""
        steps = Steps()

        def names(key: str, value: tuple[str, ...] | str) -> Expression | frozenset[str]:
            return Expression(value, key, steps=steps) if isinstance(value, str) else frozenset(value)

        def ends(key: str, pattern: dict[str, Any]) -> list[tuple[Expression, Any]]:  # as PEFT reads a key
            return [(Expression(end, key, r"(.*\.)?(", ")$", steps), value) for end, value in pattern.items()]

        return {
            "target_modules": names("target_modules", self.targets),
            "target_parameters": frozenset(self.parameters),
            "exclude_modules": names("exclude_modules", self.exclude),
            "layers": frozenset(self.layers or ()),
            "layers_pattern": [
                Expression(text, "layers_pattern", r"(?:^|.*?\.)", r"\.", steps)
                for text in self.layers_pattern or (r"[^.]*",)
            ],
            "rank_pattern": ends("rank_pattern", self.rank_pattern),
            "alpha_pattern": ends("alpha_pattern", self.alpha_pattern),
        }

    def _layer_of(self, module: str) -> int | None:
        """The number behind the first pattern that stands before one."""
        numbers = [(found.start(), int(found[1])) for found in re.finditer(r"(?<=\.)(\d{1,18})\.", module)]
        for pattern in self._rules["layers_pattern"]:
            for start, number in numbers:
                if pattern.ends(module) >> start & 1:
                    return number
        return None

    def whole(self, module: str) -> bool:
        """Whether this module, or one around it, is trained whole. The end of a name need not be a word: as in PEFT."""
        return any(f"{name}." in f"{module}." for name in self.modules_to_save)

    def rank_of(self, module: str) -> int:
        return self._by_pattern("rank_pattern", module, self.rank)

    def scaling_of(self, module: str) -> float:
        rank = self.rank_of(module)
        alpha = self._by_pattern("alpha_pattern", module, self.alpha)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def _by_pattern(self, key: str, module: str, default: Any) -> Any:
        return next((value for end, value in self._rules[key] if end.matches(module)), default)

    def check(self, modules: Iterable[str], source: str) -> None:
        """Raises InputError where an expression is none, or takes too long on these. source: what a message names."""
        try:
            assert self._rules
            for module in modules:
                if self.targeted(module):
                    self.scaling_of(module)
        except InputError as error:
            raise InputError(f"{source}: {error}") from None


def _named(names: Expression | frozenset[str], module: str) -> bool:
    """Whether an expression matches the whole name, or one of `names` is its end."""
    if isinstance(names, Expression):
        return names.matches(module)
    return any(module[i:] in names for i in (0, *(found.end() for found in re.finditer(r"\.", module))))
