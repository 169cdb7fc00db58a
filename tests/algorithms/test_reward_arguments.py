"""Users' functions: where they come from, and what they get."""

import functools

import numpy as np
import pytest
import torch
from burnish.algorithms.data.functions import TrainerState, takes
from burnish.algorithms.data.rewards import Rewards, check_weights, load_rewards
from burnish.algorithms.run.user_files import load_function
from burnish.model.errors import InputError
from judging import SAMPLES, AsyncScorer, Scorer, coroutine, judge, refused


def test_a_function_from_a_file_gets_the_columns(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def right(prompts, completions, completion_ids, answer, **_):\n"
        "    return [float(c == a) + len(i) for c, a, i in zip(completions, answer, completion_ids)]\n"
    )
    function = load_function(f"{tmp_path}/mine.py:right")
    found = judge({"right": function}, [0.5])
    assert found.total.tolist() == [1.0, 1.0] and found.parts["right"].tolist() == [2.0, 2.0]
    assert found.total.dtype == found.parts["right"].dtype == torch.float32


# ---- arguments


def test_all_that_trl_passes_arrives():
    seen = {}
    judge({"f": lambda **given: seen.update(given) or [0, 0]}, state=TrainerState(3, 10, 0.5))
    names = ["answer", "prompts", "completions", "completion_ids", "trainer_state", "log_metric", "log_extra"]
    assert list(seen) == names  # TRL passes environments only where there are some
    state = seen["trainer_state"]
    assert (state.global_step, state.max_steps, state.epoch) == (3, 10, 0.5) and state.is_world_process_zero


def test_a_function_gets_what_its_signature_takes():
    assert judge({"f": lambda answer: [len(a) for a in answer]}).total.tolist() == [1, 1]
    assert judge({"f": lambda environments, completions: [environments is None] * 2}).total.tolist() == [1, 1]
    assert judge({"f": lambda environments="default": [environments == "default"] * 2}).total[0] == 1
    assert judge({"f": lambda: [1, 2]}).total.tolist() == [1, 2]
    columns = {"trainer_state": ["x", "x"], "prompts": ["x", "x"]}  # a column hides nothing of these names
    shadow = lambda prompts, trainer_state: [prompts[0] == "p", trainer_state.global_step]
    assert judge({"f": shadow}, samples=SAMPLES._replace(columns=columns)).total.tolist() == [1, 0]


def test_a_missing_column_is_named_beside_those_there_are():
    message = "expected a column 'solution' for its argument; the data has answer"
    assert refused(lambda completions, solution: [0, 0]) == f"reward f: {message}"
    with pytest.raises(InputError, match=f"reward f: {message}"):
        Rewards({"f": lambda solution: []}, (1.0,)).check(["answer"])
    with pytest.raises(InputError, match=f"--answer: {message}"):
        Rewards({}, ()).check(["answer"], lambda solution: [])
    Rewards({"f": lambda answer, log_metric, trainer_state, environments, **_: []}, (1.0,)).check(["answer"])
    for function in (lambda completions, /: [0, 0], lambda completions, /, **_: [0, 0]):
        assert "by name, got 'completions' by position only" in refused(function)
    for name in ("prompt", "completion"):
        function = eval(f"lambda {name}: [0, 0]")
        expected = f"expected the argument '{name}s', a list for all samples, got '{name}'"
        assert refused(function) == f"reward f: {expected}"
    columns = {"a\x1b[31m" * 200: ["x", "x"]}
    assert len(refused(lambda solution: [], samples=SAMPLES._replace(columns=columns))) < 300


def wrapping(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, client=3.0, **kwargs)

    return wrapper


def test_what_a_decorator_adds_is_no_missing_column():
    assert judge({"f": wrapping(lambda completions, client: [client, 1.0])}).total.tolist() == [3.0, 1.0]
    assert judge({"f": wrapping(lambda completions, client, **_: [client, 1.0])}).total[0] == 3

    @functools.wraps(lambda completions, solution: 0)
    def by_itself(completions, answer):
        return [len(answer), 1.0]

    assert judge({"f": by_itself}).total.tolist() == [2.0, 1.0]


@pytest.mark.parametrize(
    ("function", "taken"),
    [
        (lambda completions, answer: 0, {"completions", "answer"}),
        (lambda completions, *, level=1: 0, {"completions", "level"}),
        (lambda completions, **_: 0, {"completions", "answer", "level"}),
        (lambda completions, /, level=1: 0, {"level"}),
        (lambda *completions: 0, set()),
        (
            functools.partial(lambda completions, answer, level: 0, level=3),
            {"completions", "answer", "level"},
        ),
        (Scorer(), {"completions", "answer"}),
        (AsyncScorer(), {"completions"}),
        (coroutine, {"completions", "level"}),
        (max, {"completions", "answer", "level"}),  # a builtin that does not say what it takes
    ],
)
def test_what_a_function_takes(function, taken):
    assert {name for name in ("completions", "answer", "level") if takes(function, name)} == taken


# ---- functions from files


@pytest.mark.parametrize(
    ("source", "name", "message"),
    [
        (None, "f", "no file"),
        ("def f(: pass", "f", "cannot be imported: SyntaxError"),
        (
            "import no_such_module",
            "f",
            "cannot be imported: ModuleNotFoundError: No module named 'no_such_module'",
        ),
        ("import sys; sys.exit(3)", "f", "cannot be imported: SystemExit: 3"),
        ("1 / 0", "f", "cannot be imported: ZeroDivisionError"),
        ("f = 1", "f", "has no function 'f'"),
        ("raise BaseException('x')", "f", "cannot be imported: BaseException: x"),
        ("def __getattr__(name): raise ValueError(name)", "f", "cannot be imported: ValueError: f"),
    ],
)
def test_what_cannot_be_loaded_is_named(tmp_path, source, name, message):
    path = tmp_path / "reward.py"
    if source is not None:
        path.write_text(source)
    with pytest.raises(InputError, match=message):
        load_function(f"{path}:{name}")


def test_a_name_that_no_file_can_have_is_refused():
    with pytest.raises(InputError) as error:
        load_function(f"{'x' * 5000}.py:f")
    assert "no file xxx" in str(error.value) and len(str(error.value)) < 400


def test_a_signature_that_is_none_takes_all():
    function = Scorer()
    function.__signature__ = 5
    assert takes(function, "anything")


def test_a_name_without_a_function_is_refused():
    with pytest.raises(InputError, match=r"expected FILE.py:function or package.module:function"):
        load_function("reward.py")


def test_numbers_of_numpy_and_torch_are_numbers():
    functions = {"a": lambda **_: np.array([1.5, 2.0], np.float32), "b": lambda **_: torch.tensor([1, 2])}
    assert judge(functions).total.tolist() == [2.5, 4.0]


def test_what_a_function_edits_is_its_own():
    def vandal(completions, completion_ids, answer, **_):
        completion_ids[0].clear()
        completions.clear()
        answer[0] = "edited"
        return [0.0, 0.0]

    seen = {}

    def witness(completions, completion_ids, answer, **_):
        seen.update(completions=completions, ids=completion_ids, answer=answer)
        return [0.0, 0.0]

    judge({"vandal": vandal, "witness": witness})
    assert seen == {"completions": ["a", "bb"], "ids": [[1], [2, 3]], "answer": ["a", "b"]}
    assert SAMPLES.completion_ids == [[1], [2, 3]]


def test_functions_of_one_name_are_kept_apart(tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.py").write_text("def f(**_):\n    return []\n")
    functions = load_rewards([f"{tmp_path}/one.py:f", f"{tmp_path}/two.py:f"])
    assert list(functions) == [f"{tmp_path}/one.py:f", f"{tmp_path}/two.py:f"]
    with pytest.raises(InputError, match="--reward: expected at least one"):
        load_rewards([])


def test_a_file_may_use_dataclasses_and_the_modules_beside_it(tmp_path):
    (tmp_path / "beside_the_reward.py").write_text("VALUE = 3.0\n")
    (tmp_path / "reward.py").write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from beside_the_reward import VALUE\n"
        "@dataclass\nclass Score:\n    value: float = VALUE\n"
        "def f(completions, **_):\n    return [Score().value for _ in completions]\n"
    )
    assert judge({"f": load_function(f"{tmp_path}/reward.py:f")}).total.tolist() == [3.0, 3.0]


def test_weights_of_reward_functions():
    assert check_weights((), 2) == (1.0, 1.0) and check_weights((0.5, -2.0), 2) == (0.5, -2.0)
    assert check_weights((), 0) == ()
    with pytest.raises(InputError, match="expected 2, one per reward function, got 1"):
        check_weights((1.0,), 2)
    with pytest.raises(InputError, match="expected finite numbers"):
        check_weights((1.0, float("nan")), 2)
