"""The picture in packed.py, and what is refused."""

import pytest
import torch
from burnish.model import pack


def test_the_picture():
    packed = pack([[10, 11, 12, 13], [20, 21, 22], [30, 31]], [-1, 0, 0])
    assert packed.tokens.tolist() == [10, 11, 12, 13, 20, 21, 22, 30, 31]
    assert packed.positions.tolist() == [0, 1, 2, 3, 4, 5, 6, 4, 5]
    assert packed.predictors.tolist() == [-1, 0, 1, 2, 3, 4, 5, 3, 7]
    assert packed.cu_seqlens.tolist() == [0, 4, 7, 9]
    assert packed.parents is not None and packed.parents.tolist() == [-1, 0, 0]
    assert packed.num_segments == 3
    assert {packed.tokens.dtype, packed.positions.dtype, packed.predictors.dtype} == {torch.int64}
    assert packed.cu_seqlens.dtype == packed.parents.dtype == torch.int32


def test_without_children_there_are_no_parents():
    assert pack([[1], [2, 3]]).parents is None
    assert pack([[1], [2, 3]], [-1, -1]).parents is None
    assert pack([[1], [2, 3]]).predictors.tolist() == [-1, -1, 1]


def test_several_groups_and_empty_segments():
    packed = pack([[1, 2], [], [3], [], [4], [5, 6]], [-1, 0, 0, -1, -1, 4])
    assert packed.cu_seqlens.tolist() == [0, 2, 2, 3, 3, 4, 6]
    assert packed.positions.tolist() == [0, 1, 2, 0, 1, 2]
    assert packed.predictors.tolist() == [-1, 0, 1, -1, 3, 4]
    assert pack([]).cu_seqlens.tolist() == [0]


@pytest.mark.parametrize(
    "sequences, parents, message",
    [
        ([[1], [2]], [-1], "expected one for each of the 2"),
        ([[1], [2], [3]], [-1, 0, 1], r"parents\[2\]: expected -1 or 0"),  # a grandchild
        ([[1], [2], [3]], [-1, -1, 0], r"parents\[2\]: expected -1 or 1"),  # not directly before
        ([[1], [2]], [0, -1], r"parents\[0\]"),  # its own parent
        ([[1], [2]], [1, -1], r"parents\[0\]"),  # a parent behind its child
        ([[], [2]], [-1, 0], "segment 0 is empty"),
    ],
)
def test_wrong_parents_are_refused(sequences, parents, message):
    with pytest.raises(ValueError, match=message):
        pack(sequences, parents)
