"""The ids that are tokens, for a head that has rows for other ids, too.

A head's rows are often padded to a round number (Qwen3: 151,936 rows, 151,669 tokens), and a tokenizer's ids may have
holes. An id without a token has no text. It is never drawn, and text that was drawn is scored among the tokens alone.
Text that is given (SFT, preferences, likelihoods) is scored over the whole head, as in other libraries.

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
    """The set of ids that are tokens: all ids below `end`, or `ids` if some of those are missing."""

    end: int
    ids: Tensor | None = None  # (size,) int64, ascending, the last is end - 1

    @classmethod
    def of(cls, ids: Iterable[int]) -> "Vocabulary":
        """Build a vocabulary from ids in any order, which may repeat."""
        ordered = sorted(set(ids))
        end = ordered[-1] + 1 if ordered else 0
        return cls(end, None if len(ordered) == end else torch.tensor(ordered))

    @property
    def size(self) -> int:
        return self.end if self.ids is None else self.ids.numel()

    def to(self, device: torch.device | str) -> "Vocabulary":
        return self if self.ids is None else Vocabulary(self.end, self.ids.to(device))

    def within(self, rows: int) -> "Vocabulary | None":
        """Return the tokens among the first `rows` ids, or None if each of these ids is a token."""
        if self.ids is None:
            return self if self.end < rows else None
        if self.end <= rows:
            return self
        return Vocabulary.of(self.ids[self.ids < rows].tolist()).to(self.ids.device).within(rows)

    def below(self, rows: int) -> "Vocabulary":
        """Return the tokens among the first `rows` ids."""
        if self.end <= rows:
            return self
        return Vocabulary(rows) if self.ids is None else Vocabulary.of(self.ids[self.ids < rows].tolist())

    def select(self, x: Tensor, dim: int = 0) -> Tensor:
        """Return the entries of x that belong to tokens. Along `dim`, x has an entry for each id.

        The result is a view, or a copy if ids are missing.
        """
        return x.narrow(dim, 0, self.end) if self.ids is None else x.index_select(dim, self.ids)

    def ids_of(self, rows: Tensor) -> Tensor:
        """Map row numbers among the tokens to ids, in the same dtype. Negative numbers stay as they are."""
        if self.ids is None:
            return rows
        return torch.where(rows < 0, rows, self.ids[rows.clamp(min=0).long()].to(rows.dtype))

    def rows_of(self, ids: Tensor) -> Tensor:
        """Map ids of at least 0 to row numbers among the tokens, as the inverse of ids_of.

        An id that is not a token becomes a number of at least `size`, which is past the last row.
        """
        if self.ids is None:
            return ids
        return torch.where(self.has(ids), torch.searchsorted(self.ids, ids), self.size)

    def has(self, ids: Tensor) -> Tensor:
        """Return a bool tensor of the same shape: True where an id is a token."""
        return (ids >= 0) & (ids < self.end) if self.ids is None else torch.isin(ids, self.ids)


# ---- ids that end a text


def say_what_never_ends(stop_ids: Iterable[int], rows: int, name: str = "the model") -> None:
    """Warn, once per process, if a head of `rows` rows can never draw some of the stop ids."""
    stops = sorted(token for token in stop_ids if token >= rows)
    if stops:
        warn_once(
            f"{name} has rows only for ids below {rows}, so the stop ids {stops} never end a generation"
        )


@lru_cache(maxsize=256)
def warn_once(line: str) -> None:
    """Print a warning to standard error, once for each text. In a distributed run only rank 0 prints it."""
    first = not torch.distributed.is_available() or not torch.distributed.is_initialized()
    if first or torch.distributed.get_rank() == 0:
        print(f"warning: {line}", file=sys.stderr)
