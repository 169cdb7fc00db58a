"""The configuration of an adapter: the modules that it changes, their ranks and their scalings.

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
    """The configuration of one adapter.

    Module names are those of a Hugging Face model: model.layers.0.self_attn.q_proj.
    """

    rank: int  # R
    alpha: float
    targets: tuple[str, ...] | str = LINEARS  # ends of module names, or a regular expression of whole names
    # ends of names of experts' weights, as in mlp.experts.down_proj, for all experts at once
    parameters: tuple[str, ...] = ()
    exclude: tuple[str, ...] | str = ()  # in the form of `targets`: modules that get no adapter even so
    layers: tuple[int, ...] | None = None  # the only layers with an adapter; None for all
    layers_pattern: tuple[str, ...] = ()  # the part of a name before the layer's number; by default any
    # keys: regular expressions for the ends of module names
    rank_pattern: dict[str, int] = field(default_factory=dict, hash=False)
    alpha_pattern: dict[str, float] = field(default_factory=dict, hash=False)
    rslora: bool = False  # scaling alpha / sqrt(R) in place of alpha / R
    dora: bool = False
    dropout: float = 0.0  # the share of an adapter's inputs that is dropped in training
    modules_to_save: tuple[str, ...] = ()  # ends of names of modules that are trained whole
    tied: bool = False  # keep embedding and head one matrix when it is trained whole on a tied base
    base: str | None = None  # the name of the model that the adapter belongs to

    def targeted(self, module: str) -> bool:
        """Return whether the adapter changes this module, a linear layer or a weight of experts.

        `exclude` and `layers` apply to linear layers only. Raises InputError for a regular expression that is invalid
        or takes too long to match, as `rank_of` and `scaling_of` do.
        """
        if ".experts." in module:
            return _named(self._rules["target_parameters"], module) and not self.whole(module)
        if _named(self._rules["exclude_modules"], module) or self.whole(module):
            return False
        if not _named(self._rules["target_modules"], module):
            return False

        # a module named in full has an adapter whatever its layer, as in PEFT
        in_full = not isinstance(self.targets, str) and module in self._rules["target_modules"]
        return self.layers is None or in_full or self._layer_of(module) in self._rules["layers"]

    @cached_property
    def _rules(self) -> dict[str, Any]:
        """The fields that select modules, by their keys in PEFT's file: sets of names, and compiled expressions.

        All expressions share one budget of matching steps.
        """
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
        """Return the layer number in a module's name, or None.

        The layer number follows a match of `layers_pattern`. The first pattern that matches decides.
        """
        numbers = [(found.start(), int(found[1])) for found in re.finditer(r"(?<=\.)(\d{1,18})\.", module)]
        for pattern in self._rules["layers_pattern"]:
            for start, number in numbers:
                if pattern.ends(module) >> start & 1:
                    return number
        return None

    def whole(self, module: str) -> bool:
        """Return whether this module, or a module around it, is trained whole.

        As in PEFT, a name in modules_to_save may begin in the middle of a word: "head" selects lm_head.
        """
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
        """Raise InputError if an expression is invalid, or takes too long on these modules.

        source: the name used in messages.
        """
        try:
            assert self._rules
            for module in modules:
                if self.targeted(module):
                    self.scaling_of(module)
        except InputError as error:
            raise InputError(f"{source}: {error}") from None


def _named(names: Expression | frozenset[str], module: str) -> bool:
    """Return whether a module's name matches.

    names: an expression that the whole name must match, or a set of endings such as "q_proj".
    """
    if isinstance(names, Expression):
        return names.matches(module)
    return any(module[i:] in names for i in (0, *(found.end() for found in re.finditer(r"\.", module))))
