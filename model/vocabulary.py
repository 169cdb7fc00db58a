"""The ids that are tokens, where a head has rows for more.

A head's rows are often padded to a round number (Qwen3: 151,936 rows, 151,669 tokens), and a tokenizer's ids may have
holes. A missing id has no text: it is never drawn, and what was drawn is scored among the tokens alone. Text that is
given (SFT, preferences, likelihoods) is scored over the whole head, as elsewhere.

    row   0 1 2 3        of a head that holds the tokens alone
    id    0 1 3 4        of the whole head, where 2 is missing
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """All ids below `end`, or `ids` where some below are missing."""

    end: int
    ids: Tensor | None = None  # (size,) int64, ascending, the last is end - 1

    @classmethod
    def of(cls, ids: Iterable[int]) -> "Vocabulary":
        """Collect ids in any order, each as often as it likes."""
        ordered = sorted(set(ids))
        end = ordered[-1] + 1 if ordered else 0
        return cls(end, None if len(ordered) == end else torch.tensor(ordered))

    @property
    def size(self) -> int:
        return self.end if self.ids is None else self.ids.numel()

    def to(self, device: torch.device | str) -> "Vocabulary":
        return self if self.ids is None else Vocabulary(self.end, self.ids.to(device))

    def within(self, rows: int) -> "Vocabulary | None":
        """The tokens among the first `rows` ids; None where all of these are."""
        if self.ids is None:
            return self if self.end < rows else None
        if self.end <= rows:
            return self
        return Vocabulary.of(self.ids[self.ids < rows].tolist()).to(self.ids.device).within(rows)

    def below(self, rows: int) -> "Vocabulary":
        """The tokens among the first `rows` ids."""
        if self.end <= rows:
            return self
        return Vocabulary(rows) if self.ids is None else Vocabulary.of(self.ids[self.ids < rows].tolist())

    def select(self, x: Tensor, dim: int = 0) -> Tensor:
        """The tokens' part of x, which has a place for each id along dim: a view, or with holes a copy."""
        return x.narrow(dim, 0, self.end) if self.ids is None else x.index_select(dim, self.ids)

    def ids_of(self, rows: Tensor) -> Tensor:
        """Rows among the tokens to ids, in the same dtype; what is below 0 stays."""
        if self.ids is None:
            return rows
        return torch.where(rows < 0, rows, self.ids[rows.clamp(min=0).long()].to(rows.dtype))

    def rows_of(self, ids: Tensor) -> Tensor:
        """The inverse of ids_of for ids of at least 0; for an id that is missing `size`, which is no row."""
        if self.ids is None:
            return ids
        return torch.where(self.has(ids), torch.searchsorted(self.ids, ids), self.size)

    def has(self, ids: Tensor) -> Tensor:
        """Tell which ids are tokens, bool of the same shape."""
        return (ids >= 0) & (ids < self.end) if self.ids is None else torch.isin(ids, self.ids)


# ---- ids that end a text


def say_what_never_ends(stop_ids: Iterable[int], rows: int, name: str = "the model") -> None:
    """Warn, once a process, where a head of `rows` never draws one of the ids that are to end a text."""
    stops = sorted(token for token in stop_ids if token >= rows)
    if stops:
        warn_once(
            f"{name} has no row for the stop ids {stops}, only for ids below {rows}: none ends a generation"
        )


@lru_cache(maxsize=256)
def warn_once(line: str) -> None:
    """Print a warning, on one of several processes, once for each line."""
    first = not torch.distributed.is_available() or not torch.distributed.is_initialized()
    if first or torch.distributed.get_rank() == 0:
        print(f"warning: {line}", file=sys.stderr)
