"""A linear layer whose weight may be 4-bit, and to which adapters may add.

    y = x W^T + bias                                       W (N, K) a parameter, or frozen in 4 bits
    y = x W^T + scaling dropout(x) A^T B^T + bias          with an adapter: A (R, K), B (N, R)
    y = m / |W + scaling B A| * (...) + bias               with DoRA, m (N,), the norm of each row without gradient

Source: LoRA, Hu et al. 2021, https://arxiv.org/abs/2106.09685; DoRA, https://arxiv.org/abs/2402.09353;
        rsLoRA, https://arxiv.org/abs/2312.03732; QLoRA, https://arxiv.org/abs/2305.14314
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import NF4Weight, dequantize_nf4, lora_linear, lora_linears, nf4_linear
from .adapters.expressions import Expression, Steps
from .errors import InputError

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LoraConfig:
    """One adapter's shape. Module names are those of a Hugging Face model: model.layers.0.self_attn.q_proj."""

    rank: int  # R
    alpha: float
    targets: tuple[str, ...] | str = LINEARS  # ends of module names, or a regular expression of whole names
    parameters: tuple[
        str, ...
    ] = ()  # ends of names of experts' weights, mlp.experts.down_proj: all experts at once
    exclude: tuple[str, ...] | str = ()  # likewise, of modules that have none although `targets` says so
    layers: tuple[int, ...] | None = None  # only in these
    layers_pattern: tuple[str, ...] = ()  # what stands before a layer's number in a name; by default anything
    rank_pattern: dict[str, int] = field(
        default_factory=dict, hash=False
    )  # by regular expression of names' ends
    alpha_pattern: dict[str, float] = field(default_factory=dict, hash=False)
    rslora: bool = False  # scaling alpha / sqrt(R) in place of alpha / R
    dora: bool = False
    dropout: float = 0.0  # share of x that an adapter does not see in training
    modules_to_save: tuple[str, ...] = ()  # ends of names of modules that are trained whole
    tied: bool = False  # on a base with one matrix for embedding and head, what is trained whole is still one
    base: str | None = None  # the model that the adapter belongs to, as it was named

    def targeted(self, module: str) -> bool:
        """Does this linear layer, or do these experts, have an adapter? `exclude` and `layers` are of linear layers.

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

        patterns = {"rank_pattern": self.rank_pattern, "alpha_pattern": self.alpha_pattern}
        return {
            "target_modules": names("target_modules", self.targets),
            "target_parameters": frozenset(self.parameters),
            "exclude_modules": names("exclude_modules", self.exclude),
            "layers": frozenset(self.layers or ()),
            "layers_pattern": [
                Expression(text, "layers_pattern", r"(?:^|.*?\.)", r"\.", steps)
                for text in self.layers_pattern or (r"[^.]*",)
            ],
            # a key is the end of a name: as PEFT has it
            **{
                key: [
                    (Expression(end, key, r"(.*\.)?(", ")$", steps), value) for end, value in pattern.items()
                ]
                for key, pattern in patterns.items()
            },
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
        """Is this module, or one around it, trained whole? The end of a name need not be a word: as PEFT has it."""
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
    """By an expression of whole names, or by names, each of which is the end of one."""
    if isinstance(names, Expression):
        return names.matches(module)
    return any(module[i:] in names for i in (0, *(found.end() for found in re.finditer(r"\.", module))))


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which this process may hold a part: then every process has to call it, in the same order."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


class Lora(nn.Module):
    """The adapter of one linear layer: a (R, K), b (N, R), fp32 whatever the base is; of experts (E, R, K), (E, N, R).

    Stacked, for a batch of several: a (adapters, R, K), b (adapters, N, R) with the scalings multiplied in.
    """

    def __init__(
        self, a: Tensor, b: Tensor, scaling: float, dropout: float = 0.0, magnitude: Tensor | None = None
    ):
        super().__init__()
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)
        self.magnitude = None if magnitude is None else nn.Parameter(magnitude)  # (N,)
        self.scaling, self.dropout = scaling, dropout
        self.enabled = True


class Adaptable(nn.Module):
    """What linear layers and experts share. Where the weight is in 4 bits, `four_bit` holds it and `weight` is None."""

    weight: nn.Parameter  # (N, K); of experts (E, N, K)
    four_bit: NF4Weight | None
    lora: Lora | None
    in_features: int
    out_features: int
    stack: tuple[int, ...] = ()  # (E,) of experts

    @property
    def numel(self) -> int:
        return math.prod(self.stack) * self.in_features * self.out_features

    def dense(self) -> Tensor:
        """The base's weight, multiplied out of 4 bits where it is in them."""
        return self.weight if self.four_bit is None else dequantize_nf4(self.four_bit)

    def merged(self) -> Tensor:
        """The weight that acts as base and adapter do without dropout, in the base's dtype."""
        lora, weight = self.lora, whole(self.dense())
        if lora is None or not lora.enabled:
            return weight
        merged = weight.float() + lora.scaling * (whole(lora.b) @ whole(lora.a))
        if lora.magnitude is not None:
            merged = merged * (whole(lora.magnitude) / merged.detach().norm(dim=1))[:, None]
        return merged.to(weight.dtype)

    def hold(self, four_bit: NF4Weight) -> None:
        """Take this as the weight, frozen."""
        self.weight = None  # pyright: ignore[reportAttributeAccessIssue]
        self.four_bit = four_bit

    def _apply(self, fn: Any, recurse: bool = True) -> "Adaptable":
        """model.to(device) takes the 4-bit weight along; model.to(dtype) leaves it as it is."""
        if self.four_bit is not None:
            self.four_bit = self.four_bit.to(fn(self.four_bit.packed).device)
        return super()._apply(fn, recurse)


class Linear(Adaptable, nn.Linear):  # pyright: ignore[reportIncompatibleVariableOverride]
    """(..., K) to (..., N)."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        nn.Linear.__init__(self, in_features, out_features, bias)
        self.four_bit = None
        self.lora = None

    def forward(self, x: Tensor, adapter: Tensor | None = None) -> Tensor:
        """adapter: (...) int, which of several adapters each row has, -1 for none."""
        lora = self.lora
        if lora is None or not lora.enabled:
            if self.four_bit is None:
                return F.linear(x, self.weight, self.bias)
            return nf4_linear(x, self.four_bit, self.bias)
        dropout = self.dropout
        return lora_linear(
            x,
            self.weight if self.four_bit is None else self.four_bit,
            lora.a,
            lora.b,
            lora.scaling,
            bias=self.bias,
            magnitude=lora.magnitude,
            adapter=adapter,
            dropout=dropout,
            seed=_drawn_seed(x) if dropout else None,
        )

    @property
    def dropout(self) -> float:
        """Of the adapter, now: there is none where no gradient is taken."""
        return self.lora.dropout if self.lora and self.training and torch.is_grad_enabled() else 0.0

    def as_one_product(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (n, K + R) and a weight (N, K + R) whose product is what x (n, K) becomes, dropout included.

        For an op that takes one matrix. Both are copies, and the copy of the weight has a gradient.
        """
        lora, weight = self.lora, whole(self.dense())
        assert lora is not None
        narrow = F.dropout(x, self.dropout) @ whole(lora.a).to(x.dtype).T  # (n, R)
        wide = torch.cat([weight, (lora.scaling * whole(lora.b)).to(weight.dtype)], 1)
        if lora.magnitude is not None:
            norm = (
                (wide[:, : x.shape[1]].float() + lora.scaling * (whole(lora.b) @ whole(lora.a)))
                .detach()
                .norm(dim=1)
            )
            wide = (wide.float() * (whole(lora.magnitude) / norm)[:, None]).to(weight.dtype)
        return torch.cat([x, narrow.to(x.dtype)], 1), wide

    @property
    def form(self) -> tuple[Any, ...] | None:
        """What is alike in layers whose adapters may read x together; None without an adapter."""
        lora, held = self.lora, self.four_bit
        if lora is None or not lora.enabled:
            return None
        kind = None if held is None else (held.blocksize, held.offset is None)
        return kind, self.bias is None, lora.magnitude is None, self.dropout


def linears_of(layers: Sequence[Linear], x: Tensor, adapter: Tensor | None = None) -> list[Tensor]:
    """Each layer's output for the same x (..., K), which their adapters, where all are of one form, read once."""
    form, loras = layers[0].form, [layer.lora for layer in layers if layer.lora is not None]
    if form is None or any(layer.form != form for layer in layers):
        return [layer(x, adapter) for layer in layers]
    dropout = layers[0].dropout
    return lora_linears(
        x,
        [layer.weight if layer.four_bit is None else layer.four_bit for layer in layers],
        [lora.a for lora in loras],
        [lora.b for lora in loras],
        [lora.scaling for lora in loras],
        biases=_all_or_none(layer.bias for layer in layers),
        magnitudes=_all_or_none(lora.magnitude for lora in loras),
        adapter=adapter,
        dropout=dropout,
        seed=_drawn_seed(x) if dropout else None,
    )


def _all_or_none(tensors: Iterable[Tensor | None]) -> list[Tensor] | None:
    return [t for t in tensors if t is not None] or None


def _drawn_seed(x: Tensor) -> Tensor:
    return torch.empty((), dtype=torch.int64, device=x.device).random_()


class ExpertLinear(Adaptable):
    """The same matrix of all experts, (E, N, K); moe_mlp takes it whole."""

    def __init__(self, experts: int, in_features: int, out_features: int):
        super().__init__()
        self.stack, self.in_features, self.out_features = (experts,), in_features, out_features
        self.weight = nn.Parameter(torch.empty(experts, out_features, in_features))
        self.four_bit = None
        self.lora = None

    def operand(self, dtype: torch.dtype) -> Tensor | NF4Weight:
        return self.weight.to(dtype) if self.four_bit is None else self.four_bit

    def adapter(self) -> tuple[Tensor | None, Tensor | None]:
        """A and B, the scaling in B."""
        lora = self.lora
        return (None, None) if lora is None or not lora.enabled else (lora.a, lora.scaling * lora.b)
