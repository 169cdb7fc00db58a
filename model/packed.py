"""Concatenated token sequences without padding, the input of the transformer.

    segment     0: p p p p      1: a a a      2: b b        parents = [-1, 0, 0]
    position       0 1 2 3         4 5 6         4 5        a child's positions continue its parent's
    predictor     -1 0 1 2         3 4 5         3 7        the row whose hidden state scores this token

A segment whose parent is not -1 continues that parent. Its tokens see the parent's tokens, and its first token is
scored from the parent's last row. G completions of one prompt thus take P + G*C tokens instead of G*(P + C). A child
cannot be a parent. A parent comes directly before its children, and children never see each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packed:
    """Token sequences packed without padding, made by `pack`. `total` is the number of tokens."""

    tokens: Tensor  # (total,) int64
    positions: Tensor  # (total,) int64, logical positions; a child's begin at its parent's length
    cu_seqlens: Tensor  # (segments + 1,) int32, the start of each segment, and the total
    parents: Tensor | None  # (segments,) int32, -1 for a segment without a parent; None if none has one
    predictors: Tensor  # (total,) int64, the row that scores each token; -1 if there is none
    adapter: Tensor | None = None  # (total,) int32, the index of each token's adapter, -1 for none

    @property
    def num_segments(self) -> int:
        return self.cu_seqlens.numel() - 1


def pack(
    sequences: Sequence[Sequence[int]],
    parents: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
    adapters: Sequence[int] | None = None,
) -> Packed:
    """Concatenate `sequences`, each a list of token ids, into a Packed.

    parents: for each sequence, the index of the sequence that it continues, or -1.
    adapters: for each sequence, the index of its adapter among the model's stacked adapters, or -1. A child has the
        adapter of its parent.

    Raises ValueError if a parent is itself a child, is empty, or does not come directly before its children, and for
    lists of different lengths.
    """
    if parents is None:
        parents = [-1] * len(sequences)
    if len(parents) != len(sequences):
        raise ValueError(
            f"parents: expected one for each of the {len(sequences)} sequences, got {len(parents)}"
        )

    tokens: list[int] = []
    positions: list[int] = []
    predictors: list[int] = []
    starts = [0]
    latest_root = -1  # the only segment that the next segment may continue
    for i, (sequence, parent) in enumerate(zip(sequences, parents, strict=True)):
        # the segment's first position, and the row that scores its first token
        first_position, first_predictor = 0, -1
        if parent == -1:
            latest_root = i
        elif parent != latest_root:
            raise ValueError(
                f"parents[{i}]: expected -1 or {latest_root}, the last segment without a parent, got {parent}"
            )
        elif not sequences[parent]:
            raise ValueError(f"parents[{i}]: segment {parent} is empty: its last row cannot score a child")
        else:
            first_position, first_predictor = len(sequences[parent]), starts[parent + 1] - 1

        start, length = starts[-1], len(sequence)
        tokens += sequence
        positions += range(first_position, first_position + length)
        predictors += [first_predictor, *range(start, start + length - 1)][:length]
        starts.append(start + length)

    adapter = None if adapters is None else _adapter_of_tokens(sequences, parents, adapters).to(device)
    has_parents = any(parent != -1 for parent in parents)
    return Packed(
        tokens=torch.tensor(tokens, dtype=torch.int64, device=device),
        positions=torch.tensor(positions, dtype=torch.int64, device=device),
        cu_seqlens=torch.tensor(starts, dtype=torch.int32, device=device),
        parents=torch.tensor(parents, dtype=torch.int32, device=device) if has_parents else None,
        predictors=torch.tensor(predictors, dtype=torch.int64, device=device),
        adapter=adapter,
    )


def _adapter_of_tokens(
    sequences: Sequence[Sequence[int]], parents: Sequence[int], adapters: Sequence[int]
) -> Tensor:
    """Return the adapter index of each token, (total,) int32.

    Raises ValueError if a child segment and its parent have different adapters, or if an adapter is missing.
    """
    if len(adapters) != len(sequences):
        raise ValueError(
            f"adapters: expected one for each of {len(sequences)} sequences, got {len(adapters)}"
        )
    if any(parent != -1 and adapters[i] != adapters[parent] for i, parent in enumerate(parents)):
        raise ValueError("adapters: expected the same adapter for a child and its parent, got two")
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    return torch.tensor(adapters, dtype=torch.int32).repeat_interleave(lengths)
