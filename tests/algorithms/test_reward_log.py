"""Figures that users' functions log, and what a run says of their rewards at its end."""

import itertools
import json

import numpy as np
import pytest
import torch
from burnish.algorithms.data import rewards as reward_functions
from burnish.algorithms.data.functions import TrainerState
from burnish.algorithms.data.rewards import Rewards, unjudged
from burnish.model.errors import InputError
from judging import SAMPLES, Scorer, judge, refused

# ---- what functions log


def test_metrics_are_means_over_the_calls_of_a_step():
    def f(log_metric, completions):
        log_metric("length", 2)
        log_metric("length", np.float32(4))
        log_metric("broken", float("nan"))
        return [0, 0]

    rewards = Rewards(
        {"f": f, "g": lambda log_metric: log_metric("length", torch.tensor(9)) or [0, 0]}, (1.0, 1.0)
    )
    rewards.add(reward_functions.judge(rewards, SAMPLES).logged)
    rewards.add({"length": [1.0]})
    found = rewards.metrics()
    assert found["metric/length"] == 4.0 and np.isnan(found["metric/broken"])
    cfg = type("Config", (), {"prompts_per_step": 4, "steps": 9, "save_every": 2})
    rewards.begin(cfg, 3, 5, 10)
    assert rewards.metrics() == {} and rewards.state == TrainerState(3, 9, 5 / 3, 3, save_steps=2)


def test_extras_are_one_value_a_completion():
    def f(log_extra):
        log_extra("parsed", (1, None))
        for value in np.arange(2.0):  # TRL's goes on, too
            log_extra("piecewise", [value])
        log_extra("odd", [{"a": {float("inf")}}, Scorer])
        return [0, 0]

    extras = judge({"f": f}).extras
    assert extras["parsed"] == [1, None] and extras["piecewise"] == [0.0, 1.0]
    assert extras["odd"] == [{"a": ["inf"]}, str(Scorer)] and json.dumps(extras)


def test_what_a_function_sets_for_all_of_torch_is_put_back():
    def f(trainer_state):
        torch.set_grad_enabled(False)
        torch.set_default_dtype(torch.float64)
        trainer_state.global_step += 1
        return [trainer_state.global_step, 0]

    assert judge({"f": f, "g": f}).total.tolist() == [2.0, 0.0]  # the state, too, is each function's own
    assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda log_extra: log_extra("x", [1]) or [0, 0],
            "log_extra: expected 2 values as 'x', one per completion, got 1",
        ),
        (
            lambda log_extra: log_extra("x", itertools.count()) or [0, 0],
            "log_extra: expected 2 values as 'x', one per completion, got more than 2",
        ),
        (
            lambda log_metric: log_metric("a\x1b[31m", 1),
            "log_metric: expected a name of 1 to 100 printable characters, got 'a\\x1b[31m'",
        ),
        (
            lambda log_extra: log_extra("a" * 101, []),
            f"log_extra: expected a name of 1 to 100 printable characters, got '{'a' * 56}...",
        ),
        (lambda log_extra: log_extra("x", "ab"), "log_extra: expected a list as 'x', got 'ab'"),
        (lambda log_extra: log_extra("x", 1), "log_extra: expected a list as 'x', got 1"),
        (
            lambda log_extra: log_extra(1, []),
            "log_extra: expected a name of 1 to 100 printable characters, got 1",
        ),
        (lambda log_metric: log_metric("x", "high"), "log_metric: expected a number as 'x', got 'high'"),
        (
            lambda log_metric: log_metric(None, 1),
            "log_metric: expected a name of 1 to 100 printable characters, got None",
        ),
    ],
)
def test_wrong_use_of_the_log_is_named(function, message):
    assert refused(function) == f"reward f: {message}"


def test_two_functions_do_not_share_a_column():
    f = lambda log_extra: log_extra("x", [1, 2]) or [0, 0]
    with pytest.raises(
        InputError, match="reward g: log_extra: expected a new column, got 'x', which reward f logs"
    ):
        judge({"f": f, "g": f})


def test_what_several_processes_log_comes_together(monkeypatch):
    """Sums over calls, and None where a process has not logged a column, or has nothing to judge."""
    rewards = Rewards({"f": lambda **_: []}, (1.0,))
    parts = [
        judge({"f": lambda log_metric: log_metric("a", 1) or [1.0, 2.0]}),
        judge(
            {
                "f": lambda log_metric, log_extra: (
                    log_metric("a", 4) or log_extra("x", ["u", "v"]) or [3.0, None]
                )
            }
        ),
        unjudged(rewards, 0),
        judge({"f": lambda log_metric: log_metric("a", 4) or log_metric("b", 7) or [5.0, 6.0]}),
    ]

    sent = []
    monkeypatch.setattr(reward_functions, "world", lambda: 2)
    monkeypatch.setattr(reward_functions, "gathered", lambda tensors: sent.append(tensors) or [tensors])
    for part in parts:
        reward_functions.of_all_processes(part)
    monkeypatch.setattr(reward_functions, "gathered", lambda tensors: sent)
    whole = reward_functions.of_all_processes(parts[1])

    torch.testing.assert_close(whole.total, torch.tensor([1, 2, 3, torch.nan, 5, 6]), equal_nan=True)
    torch.testing.assert_close(whole.parts["f"], whole.total, equal_nan=True)
    rewards.add(whole.logged)
    assert rewards.metrics() == {"metric/a": 3.0, "metric/b": 7.0}
    assert whole.extras == {"x": [None, None, "u", "v", None, None]}


# ---- what a run says at its end


def test_a_run_says_what_taught_nothing(capsys):
    rewards = Rewards({"f": len, "g": len}, (1.0, 1.0))
    nan = torch.nan

    def printed(values, *steps, in_groups=True):
        for f, g in steps:
            f, g = torch.tensor(f), torch.tensor(g)
            scores = torch.stack([f, g]).nansum(0).masked_fill(f.isnan() & g.isnan(), nan)
            rewards.count(values, {"f": f, "g": g}, scores.view(2, 2))
        rewards.report(values, in_groups=in_groups)
        return capsys.readouterr().out

    none, flat, split, varied = [nan] * 4, [0.5] * 4, [0.0, 0.0, 1.0, 1.0], [0.0, nan, 1.0, 2.0]
    nothing = "the rewards taught nothing\n"
    silent = "reward g: None for every sample: it has judged nothing\n"
    assert printed({"varied": 0}, (none, none)) == f"every reward was None: {nothing}"
    assert printed({"varied": 0}, (split, none)) == f"{silent}no group's rewards ever differed: {nothing}"
    assert (
        printed({"varied": 0}, (flat, split), (split, none)) == f"no group's rewards ever differed: {nothing}"
    )
    assert printed({"varied": 0}, (none, none), (varied, none)) == silent
    assert printed({"varied": 0}, (flat, none), in_groups=False).endswith(f"the run scored 0.5: {nothing}")
    assert printed({"varied": 0}, (split, none), in_groups=False) == silent
    assert printed({}, (none, none)) == ""  # a checkpoint of before there were counts
