"""The recipe: every stage runs and is reported (short), and reaches what it must (slow)."""

import dataclasses
import json
import re

import pytest
from burnish.algorithms.recipes import r1
from burnish.algorithms.recipes.sums import (
    RIGHT_STEP,
    accuracy,
    demonstration_row,
    form,
    make_tokenizer,
    prompt_row,
    split_problems,
)
from burnish.model.errors import InputError

STAGES = [
    "base",
    "R1-Zero",
    "R1: cold start",
    "R1: cold start, RL",
    "R1: base, SFT on right samples",
    "R1",
    "student base",
    "student, distilled",
    "student, RL alone",
]


def test_problems_are_split_without_overlap():
    training, held_out = split_problems(3)
    assert len(training) == 800 and len(held_out) == 200 and not set(training) & set(held_out)


def test_clean_demonstrations_are_right_and_noisy_ones_seldom(monkeypatch):
    import random

    problems = split_problems(0)[0]
    for noise, share in ((None, 1.0), (random.Random(0), RIGHT_STEP**2)):
        rows = [demonstration_row(problem, noise) for problem in problems * 5]
        completions = [row["completion"] for row in rows]
        answers = [prompt_row(problem)["answer"] for problem in problems * 5]
        right = accuracy(completions, answers)
        assert all(form(completions)) and sum(right) / len(right) == pytest.approx(share, abs=0.03)


def test_a_right_answer_without_the_form_is_wrong():
    completions = [
        "<think>87</think><answer>7</answer>",
        "<answer>7</answer>",
        "7",
        "<think>87</think><answer>8</answer>",
    ]
    assert accuracy(completions, ["7"] * 4) == [1, 0, 0, 0] and form(completions) == [1, 0, 0, 1]


def test_the_tokenizer_reads_back_what_it_wrote():
    tokenizer, row = make_tokenizer(), demonstration_row((3, 5, 9))
    text = row["prompt"] + row["completion"]
    assert text == "3+5+9=<think>87</think><answer>7</answer>"
    ids = tokenizer.encode(text).ids
    assert len(ids) == 13 and tokenizer.decode(ids) == text


@pytest.fixture
def short(tmp_path):
    return r1.Config(
        output=tmp_path / "r1",
        demonstrations=64,
        base_steps=2,
        cold_start_steps=2,
        rl_steps=2,
        sft_steps=2,
        distill_steps=2,
        evaluation_samples=2,
        device="cpu",
    )


@pytest.mark.slow
def test_every_stage_runs_and_is_reported(short, capsys, monkeypatch):
    # two steps teach nothing: let any completion pass for a right one, so that there are samples to distil
    monkeypatch.setattr(r1, "accuracy", lambda completions, answer: [1.0] * len(completions))
    report = r1.train(dataclasses.replace(short, seeds=2))
    page, printed = report.read_text(), capsys.readouterr().out

    for stage in STAGES:
        assert stage in page and stage in printed
    assert "first-rl" not in page and page.count("</span>R1: cold start, RL") == 1, (
        "the legend has the table's names"
    )
    assert "<svg" in page and not re.search(r"<script|(src|href)=\"http", page)
    names = ["figures.json", "report.html", "seed-0", "seed-1"]
    assert sorted(path.name for path in short.output.iterdir()) == names

    figures = json.loads((short.output / "figures.json").read_text())
    assert list(figures["scores"]) == STAGES and figures["scores"]["R1"]["published"] == 79.8
    assert [len(curves["zero"]) for curves in figures["curves"]] == [2, 2]

    for stage in (
        "base",
        "zero",
        "cold-start",
        "first-rl",
        "second-sft",
        "r1",
        "student-base",
        "distilled",
        "student-rl",
    ):
        folder = short.output / "seed-1" / stage
        assert (folder / "model" / "model.safetensors").is_file() and (
            folder / "metrics.jsonl"
        ).stat().st_size

    with pytest.raises(InputError, match="expected a new or empty folder, found one in use"):
        r1.train(short)


@pytest.mark.slow
def test_the_recipe_reaches_what_it_must(tmp_path, monkeypatch):
    tables = []
    monkeypatch.setattr(r1, "print_table", lambda heading, table, *_: tables.append(table))
    r1.train(r1.Config(output=tmp_path / "r1", device="cpu"))
    scores = {stage: score.pass_at_1 for stage, score in tables[0].items()}
    assert scores["base"] <= 25 and tables[0]["base"].greedy <= 25
    assert scores["R1-Zero"] >= 80 and scores["R1"] >= 90
    assert scores["student, distilled"] >= 90
