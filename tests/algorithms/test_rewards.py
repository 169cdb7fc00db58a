import sys

import numpy as np
import pytest
import torch
from burnish.algorithms._rewards import check_weights, judge, load_reward, load_rewards
from burnish.model.errors import InputError

ARGUMENTS = (["p", "p"], ["a", "bb"], [[1], [2, 3]], {"answer": ["a", "b"]})


def test_a_function_from_a_file_gets_the_columns(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def right(prompts, completions, completion_ids, answer, **_):\n"
        "    return [float(c == a) + len(i) for c, a, i in zip(completions, answer, completion_ids)]\n"
    )
    function = load_reward(f"{tmp_path}/mine.py:right")
    total, parts = judge({"right": function}, [0.5], *ARGUMENTS)
    assert total.tolist() == [1.0, 1.0] and parts["right"].tolist() == [2.0, 2.0]


def test_none_means_not_judged():
    functions = {"a": lambda **_: [1.0, None], "b": lambda **_: [None, None], "c": lambda **_: [2, None]}
    total, parts = judge(functions, [1.0, 1.0, 10.0], *ARGUMENTS)
    assert total[0] == 21 and total[1].isnan()
    assert parts["b"].isnan().all() and torch.equal(parts["a"].isnan(), torch.tensor([False, True]))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda **_: [1.0], "reward f: expected 2 rewards, one a completion, got 1"),
        (lambda **_: 1 / 0, "reward f raised ZeroDivisionError: division by zero"),
        (lambda **_: [1.0, "x"], "reward f: expected a finite number or None for completion 1, got 'x'"),
        (
            lambda **_: [float("nan"), 1.0],
            "reward f: expected a finite number or None for completion 0, got nan",
        ),
        (lambda **_: [1.0, 1e39], "reward f: expected a finite number or None for completion 1, got 1e+39"),
        (lambda **_: [1.0, 10**400], "reward f: expected a finite number or None for completion 1, got 1000"),
        (lambda **_: sys.exit(0), "reward f raised SystemExit: 0"),
        (lambda **_: None, "reward f raised TypeError: 'NoneType' object is not iterable"),
    ],
)
def test_what_a_function_does_wrong_is_named(function, message):
    with pytest.raises(InputError) as error:
        judge({"f": function}, [1.0], *ARGUMENTS)
    assert str(error.value).startswith(message)


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
    ],
)
def test_what_cannot_be_loaded_is_named(tmp_path, source, name, message):
    path = tmp_path / "reward.py"
    if source is not None:
        path.write_text(source)
    with pytest.raises(InputError, match=message):
        load_reward(f"{path}:{name}")


def test_a_name_without_a_function_is_refused():
    with pytest.raises(InputError, match=r"expected FILE.py:function or package.module:function"):
        load_reward("reward.py")


def test_numbers_of_numpy_and_torch_are_numbers():
    functions = {"a": lambda **_: np.array([1.5, 2.0], np.float32), "b": lambda **_: torch.tensor([1, 2])}
    assert judge(functions, [1.0, 1.0], *ARGUMENTS)[0].tolist() == [2.5, 4.0]


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

    judge({"vandal": vandal, "witness": witness}, [1.0, 1.0], *ARGUMENTS)
    assert seen == {"completions": ["a", "bb"], "ids": [[1], [2, 3]], "answer": ["a", "b"]}
    assert ARGUMENTS[2] == [[1], [2, 3]]


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
    assert judge({"f": load_reward(f"{tmp_path}/reward.py:f")}, [1.0], *ARGUMENTS)[0].tolist() == [3.0, 3.0]


def test_weights_of_reward_functions():
    assert check_weights((), 2) == (1.0, 1.0) and check_weights((0.5, -2.0), 2) == (0.5, -2.0)
    assert check_weights((), 0) == ()
    with pytest.raises(InputError, match="expected 2, one a reward function, got 1"):
        check_weights((1.0,), 2)
    with pytest.raises(InputError, match="expected finite numbers"):
        check_weights((1.0, float("nan")), 2)
