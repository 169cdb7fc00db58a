"""Runs that are killed before a file operation: each goes on to the same bits, and leaves nothing behind.

`python tests/common/crash_runs.py FOLDER sft dpo grpo ppo distill` does so before every operation of all five.
"""

import pytest
import torch
from crash_runs import MODULES, counts_of_kills, make_tasks

SURVIVED = {"points", "resumed equal", "no checkpoint yet"}


@pytest.fixture
def tasks(tmp_path):
    torch.set_num_threads(1)
    return make_tasks(tmp_path)


def spread(count: int):
    """Return a function from the number of operations to `count` of them, from the first to the last."""
    return lambda operations: sorted({i * (operations - 1) // (count - 1) for i in range(count)})


def assert_survived(found) -> None:
    assert set(found) <= SURVIVED, found
    assert found["resumed equal"] > 0 and found["points"] == sum(found.values()) - found["points"]


@pytest.mark.parametrize("again", [False, True], ids=["first", "again"])
def test_a_few_points_of_sft(tasks, tmp_path, again):
    assert_survived(counts_of_kills(tasks["sft"], tmp_path, again, spread(3)))


@pytest.mark.slow
@pytest.mark.parametrize("again", [False, True], ids=["first", "again"])
@pytest.mark.parametrize("name", MODULES)
def test_points_of_every_trainer(tasks, tmp_path, name, again):
    """Every point of sft, and some of the others: the frame that writes the files is the same."""
    found = counts_of_kills(tasks[name], tmp_path, again, range if name == "sft" else spread(8))
    assert_survived(found)
    assert found["points"] > (100 if name == "sft" else 7)
