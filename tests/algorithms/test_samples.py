"""samples.jsonl: which samples of a step it holds, in every trainer that samples."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from burnish.algorithms import distill, grpo, ppo
from burnish.algorithms.data.examples import Prompt
from burnish.algorithms.data.groups import Group, Groups
from burnish.algorithms.recipes.sums import make_tokenizer
from burnish.model.generate import Sample
from burnish.model.text.tokenizer import Tokenizer

TRAIN = {"steps": 2, "learning_rate": 1e-2, "max_new_tokens": 5, "device": "cpu"}
NAMES = {"step", "prompt", "completion", "reward", "rewards", "length", "ended"}


def records_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def groups(extra: int | None = None) -> Groups:
    """Three groups of two; sample i of all has the tokens i, and one group may have a column of log_extra."""
    found = []
    for member in range(3):
        samples = [
            Sample(0, [2 * member + place], torch.zeros(1), None, place == 0, None) for place in range(2)
        ]
        rewards = torch.tensor([float(2 * member), torch.nan])
        columns = {"note": ["a", "b"]} if member == extra else {}
        prompt = Prompt([1], f"prompt {member}", {})
        found.append(Group(prompt, samples, rewards, {"odd": rewards / 2}, columns))
    return Groups(found)


def prompts_of(records: list[dict[str, Any]]) -> list[str]:
    return [record["prompt"][-1] for record in records]


def test_samples_come_from_as_many_groups_as_possible():
    tokenizer = Tokenizer(make_tokenizer(), eos="<eos>")
    for most, expected in (
        (0, ""),
        (1, "0"),
        (2, "01"),
        (3, "012"),
        (4, "0012"),
        (5, "00112"),
        (99, "001122"),
    ):
        assert "".join(prompts_of(groups().records(tokenizer, most))) == expected

    first, second = groups().records(tokenizer, 9)[2:4]
    assert first | {"completion": ""} == {
        "prompt": "prompt 1",
        "completion": "",
        "reward": 2.0,
        "rewards": {"odd": 1.0},
        "length": 1,
        "ended": True,
    }
    assert second["reward"] is None and second["rewards"] == {"odd": None} and second["ended"] is False

    scores = groups().records(tokenizer, 9, torch.arange(6.0))
    assert [record["reward"] for record in scores] == [0, 1, 2, 3, 4, 5]


def test_a_group_with_logged_columns_is_written_whole_and_in_addition():
    tokenizer = Tokenizer(make_tokenizer(), eos="<eos>")
    found = groups(extra=2).records(tokenizer, 2)
    assert prompts_of(found) == ["0", "1", "2", "2"]
    assert [record.get("extra") for record in found] == [None, None, {"note": "a"}, {"note": "b"}]
    assert prompts_of(groups(extra=2).records(tokenizer, 0)) == ["2", "2"]


@pytest.mark.parametrize("module", [grpo, ppo])
def test_rl_writes_at_most_as_many_as_asked(module, model_folder, prompts, tmp_path):
    (tmp_path / "odd.py").write_text(
        "def odd(completion_ids, **_):\n    return [float(len(ids)) for ids in completion_ids]\n"
    )
    cfg = module.Config(
        model=model_folder,
        data=prompts,
        reward=(f"{tmp_path}/odd.py:odd",),
        output=tmp_path / "run",
        prompts_per_step=4,
        group_size=2,
        samples=5,
        **({"epochs_per_rollout": 1, "minibatches": 1} if module is ppo else {}),
        **TRAIN,
    )

    module.train(cfg)
    records = records_of(cfg.output)
    assert [record["step"] for record in records] == [0] * 5 + [1] * 5
    assert all(record.keys() == NAMES for record in records)
    assert all(record["reward"] == record["rewards"]["odd"] == record["length"] for record in records)

    module.train(dataclasses.replace(cfg, samples=0, output=tmp_path / "none"))
    assert not (tmp_path / "none" / "samples.jsonl").exists()


def test_distillation_writes_the_students_answers(model_folder, demonstrations, tmp_path):
    cfg = distill.Config(
        model=model_folder,
        teacher=model_folder,
        data=demonstrations,
        output=tmp_path / "run",
        student_samples=1.0,
        batch_size=4,
        samples=3,
        **TRAIN,
    )

    distill.train(cfg)
    records = records_of(cfg.output)
    assert [record["step"] for record in records] == [0] * 3 + [1] * 3
    prompts = {json.loads(line)["prompt"] for line in demonstrations.read_text().splitlines()}
    for record in records:
        assert record.keys() == NAMES and record["reward"] is None and record["rewards"] == {}
        assert record["prompt"] in prompts and 1 <= record["length"] <= 5

    distill.train(dataclasses.replace(cfg, student_samples=0.0, output=tmp_path / "rows"))
    assert not (tmp_path / "rows" / "samples.jsonl").exists()
