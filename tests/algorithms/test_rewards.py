import pytest
import torch
from burnish.algorithms._rewards import judge, load_reward
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
        (lambda **_: None, "reward f raised TypeError: 'NoneType' object is not iterable"),
    ],
)
def test_what_a_function_does_wrong_is_named(function, message):
    with pytest.raises(InputError) as error:
        judge({"f": function}, [1.0], *ARGUMENTS)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("source", "name", "message"),
    [
        (None, "f", "no file"),
        ("def f(: pass", "f", "cannot be imported: "),
        ("import no_such_module", "f", "cannot be imported: No module named 'no_such_module'"),
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
