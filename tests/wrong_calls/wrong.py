"""A wrong call of an op, and its answer on the torch path and on the Triton path."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor


@dataclass(frozen=True)
class Wrong:
    """on_torch, on_triton: the pattern of a ValueError, or a check of what comes out; on_triton None: the same.

    A GPU may answer where a CPU raises, for it does not wait to look at numbers: with zeros, NaN, or numbers that
    depend on its own operands alone.
    """

    name: str
    call: Callable[[], Any]
    on_torch: str | Callable[[Any], None]
    on_triton: str | Callable[[Any], None] | None = None

    def check(self, triton: bool) -> None:
        expected = self.on_triton if triton and self.on_triton is not None else self.on_torch
        if callable(expected):
            expected(self.call())
            return
        with pytest.raises(ValueError) as raised:
            self.call()
        message = str(raised.value)
        assert re.search(expected, message), f"{self.name}: expected {expected!r}, got {message!r}"
        assert "\n" not in message and len(message) < 300


def tensors_of(found: Any) -> list[Tensor]:
    return [t for t in (found if isinstance(found, tuple | list) else [found]) if isinstance(t, Tensor)]


def finite(found: Any) -> None:
    assert all(t.isfinite().all() for t in tensors_of(found))


def not_finite(found: Any) -> None:
    """None of the numbers of the first output."""
    assert not tensors_of(found)[0].isfinite().any()


def nan_rows(*rows: int) -> Callable[[Any], None]:
    """These rows are NaN and all others finite, in outputs as long as the first; other outputs are finite."""

    def check(found: Any) -> None:
        outputs = tensors_of(found)
        length = outputs[0].shape[0]
        for t in outputs:
            flat = t.reshape(t.shape[0], -1)
            lost = [i for i in range(length) if flat[i].isnan().all()] if len(flat) == length else []
            assert lost == ([*rows] if len(flat) == length else [])
            kept = [i for i in range(len(flat)) if i not in lost]
            assert flat[kept].isfinite().all()

    return check


def with_gradients(call: Callable[..., Any], given: dict[str, Any]) -> Callable[[], Any]:
    """The first output of `call`, and of its sum the gradient of each float tensor among what it is given."""

    def run() -> list[Tensor]:
        wanted = {
            n: t.detach().requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t
            for n, t in given.items()
        }
        leaves = [t for t in wanted.values() if isinstance(t, Tensor) and t.requires_grad]
        first = tensors_of(call(**wanted))[0]
        return [first.detach(), *torch.autograd.grad(first.sum(), leaves)]

    return run


def equals(*expected: float) -> Callable[[Any], None]:
    """Every number of the first output is one of these; NaN is equal to itself."""

    def check(found: Any) -> None:
        first = tensors_of(found)[0].flatten().tolist()
        wrong = [x for x in first if not any(x == e or (math.isnan(x) and math.isnan(e)) for e in expected)]
        assert not wrong, f"expected {expected}, got {wrong[:5]}"

    return check


def shape(*sizes: int) -> Callable[[Any], None]:
    """The first output has this shape, which is all that an empty one has, or a call on "meta"."""

    def check(found: Any) -> None:
        assert tuple(tensors_of(found)[0].shape) == sizes

    return check


def of_shapes(*shapes: tuple[int, ...]) -> Callable[[Any], None]:
    """The outputs have these shapes."""

    def check(found: Any) -> None:
        assert [tuple(t.shape) for t in tensors_of(found)] == list(shapes)

    return check


def calling(op: Callable[..., Any], arguments: dict[str, Any]) -> Callable[..., Callable[[], Any]]:
    """A function of what is wrong, which makes the call out of right arguments and that."""
    return lambda **changed: lambda: op(**(arguments | changed))


def meta(**tensors: Tensor) -> dict[str, Tensor]:
    return {name: t.to("meta") for name, t in tensors.items()}


def randn(*sizes: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed)).to(dtype)


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)
