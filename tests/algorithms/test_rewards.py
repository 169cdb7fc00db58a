"""Rewards and answers of users' functions: what they may return, and one sentence for whatever else they do."""

import asyncio
import functools
import json
import numbers
import sys
import time
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from burnish.algorithms.data.functions import plain
from burnish.algorithms.data.rewards import Rewards, answers
from burnish.algorithms.run.calls import described
from burnish.algorithms.run.user_files import load_function
from burnish.model.errors import InputError
from judging import SAMPLES, AsyncScorer, coroutine, judge, refused


def test_none_means_not_judged():
    functions = {"a": lambda **_: [1.0, None], "b": lambda **_: [None, None], "c": lambda **_: [2, None]}
    total, parts, _, _ = judge(functions, [1.0, 1.0, 10.0])
    assert total[0] == 21 and total[1].isnan()
    assert parts["b"].isnan().all() and torch.equal(parts["a"].isnan(), torch.tensor([False, True]))


# ---- async functions


@pytest.mark.parametrize(
    "function",
    [coroutine, functools.partial(coroutine, level=2), AsyncScorer(), lambda **_: coroutine([])],
    ids=["function", "partial", "object", "what returns one"],
)
def test_async_functions_are_awaited(function):
    assert judge({"f": function, "g": lambda **_: [1, None]}).total.tolist() == [2.0, 2.0]


def test_async_functions_run_at_the_same_time_on_one_loop():
    """Each waits for the other; a client that is bound to its loop lives from step to step."""
    here, loops = [], []

    async def meet(name):
        loops.append(asyncio.get_running_loop())
        here.append(name)
        while len(set(here)) < 2:
            await asyncio.sleep(0.001)
        return [0, 0]

    functions = {"f": lambda: meet("f"), "g": lambda: meet("g")}
    for _ in range(2):
        here.clear()
        judge(functions, timeout=5.0)
    assert len(loops) == 4 and len(set(loops)) == 1


def test_what_async_functions_do_wrong_is_named():
    async def fails(**_):
        await asyncio.sleep(0)
        raise KeyError("planted")

    async def leaves(**_):
        sys.exit(3)

    async def slow(**_):
        await asyncio.sleep(60)

    async def gives_itself_up(**_):
        raise asyncio.CancelledError

    async def is_thrown_away(**_):
        raise GeneratorExit

    assert refused(fails).startswith("reward f raised KeyError: 'planted' (test_rewards.py:")
    assert refused(leaves).startswith("reward f raised SystemExit: 3")
    assert refused(gives_itself_up).startswith("reward f raised CancelledError")
    assert refused(is_thrown_away).startswith("reward f raised GeneratorExit")
    started = time.monotonic()
    with pytest.raises(InputError, match="reward bad raised KeyError"):  # without waiting for the other
        judge({"slow": slow, "bad": fails})
    assert time.monotonic() - started < 5
    assert judge({"f": coroutine}).total.tolist() == [1.0, 2.0]  # the loop is none the worse


# ---- results


class Odd:
    def __repr__(self):
        raise RuntimeError

    def item(self):
        raise RuntimeError


class Unreal:
    def __float__(self):
        raise ValueError("no float")

    def __repr__(self):
        raise SystemExit(3)


numbers.Real.register(Unreal)


class Nothing:
    """A value that raises, whatever a reader asks of it."""

    def __getattr__(self, name):
        raise AttributeError if name.startswith("__") else SystemExit(9)  # pytest asks for its __name__

    def __repr__(self):
        raise GeneratorExit


class Indexed:
    """A sequence without __iter__."""

    def __len__(self):
        return 2

    def __getitem__(self, i):
        return [1.0, 2.0][i]


async def one_score():
    return 1.0


class Unhashable(str):
    def __hash__(self):
        raise ValueError


EXPECTED = "reward f: expected a list of 2 rewards, one per completion, got "
NUMBER = "reward f: expected a finite number or None for completion "


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, EXPECTED + "None"),
        (0.5, EXPECTED + "float 0.5"),
        ("high\n", EXPECTED + "str 'high\\n'"),
        ({"a": 1, "b": 2}, EXPECTED + "dict {'a': 1, 'b': 2}"),
        ({0.1, 0.2}, EXPECTED + "set {0."),
        (Odd(), EXPECTED + "Odd a value of Odd"),
        (np.zeros((2, 1)), EXPECTED + "an array of shape (2, 1)"),
        (torch.tensor(1.0), EXPECTED + "an array of shape ()"),
        ([1.0], "reward f: expected 2 rewards, one per completion, got 1"),
        (np.zeros(3), "reward f: expected 2 rewards, one per completion, got 3"),
        ((x for x in range(5)), "reward f: expected 2 rewards, one per completion, got more than 2"),
        ((x for x in range(1)), "reward f: expected 2 rewards, one per completion, got 1"),
        ([[1.0], [2.0]], NUMBER + "0, got [1.0]"),
        ([1.0, "x"], NUMBER + "1, got 'x'"),
        ([1.0, Odd()], NUMBER + "1, got a value of Odd"),
        ([1.0, "x" * 999], NUMBER + "1, got '" + "x" * 56 + "..."),
        ([1.0, torch.ones(2, 2)], NUMBER + "1, got tensor([[1., 1.], [1., 1.]])"),
        ([float("nan"), 1.0], NUMBER + "0, got nan"),
        ([1.0, 1e39], NUMBER + "1, got 1e+39"),
        ([1.0, 10**400], NUMBER + "1, got 1000"),
        ([1.0, 10**5000], NUMBER + "1, got a value of int"),
        ([1.0, Unreal()], NUMBER + "1, got a value of Unreal"),
        ([1.0, Decimal("sNaN")], NUMBER + "1, got Decimal('sNaN')"),
        ([1.0, Nothing()], NUMBER + "1, got a value of Nothing"),
        (Nothing(), "reward f raised SystemExit: 9 (test_rewards.py:"),
    ],
)
def test_what_a_function_returns_is_named_for_what_it_is(value, message):
    assert refused(lambda **_: value).startswith(message)


@pytest.mark.filterwarnings("error")
def test_coroutines_in_a_list_are_named_and_let_go():
    assert refused(lambda: [one_score(), one_score()]).endswith(
        "got a list of coroutines: await them with asyncio.gather"
    )


@pytest.mark.parametrize(
    "value",
    [
        (1, 2),
        iter([1, 2]),
        range(1, 3),
        {1: 0, 2: 0}.keys() - {3},
        np.array([1, 2]),
        Indexed(),
        [Decimal(1), Fraction(4, 2)],
    ],
)
def test_what_can_be_listed_is_fine(value):
    if isinstance(value, set):
        value = sorted(value)
    assert judge({"f": lambda: value}).total.tolist() == [1.0, 2.0]


def raises(error):
    def f(**_):
        raise error

    return f


class Wordless(Exception):
    def __str__(self):
        raise RuntimeError


class Nameless(type):
    @property
    def __name__(cls):
        raise RuntimeError


class Unnamed(Exception, metaclass=Nameless):
    pass


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (raises(Unnamed()), "reward f raised Unnamed (test_rewards.py:"),
        (lambda **_: 1 / 0, "reward f raised ZeroDivisionError: division by zero (test_rewards.py:"),
        (lambda **_: json.loads("{"), "reward f raised JSONDecodeError: Expecting property name enclosed"),
        (raises(SystemExit(0)), "reward f raised SystemExit: 0"),
        (
            raises(ValueError("two\nlines \x1b[31m\x00")),
            "reward f raised ValueError: two lines [31m (test_rew",
        ),
        (
            raises(ValueError("x" * 9999)),
            "reward f raised ValueError: " + "x" * 197 + "... (test_rewards.py:",
        ),
        (raises(AssertionError()), "reward f raised AssertionError (test_rewards.py:"),
        (raises(Wordless()), "reward f raised Wordless (test_rewards.py:"),
        (raises(GeneratorExit()), "reward f raised GeneratorExit"),
        (
            lambda **_: (1 / x for x in [1, 0]),
            "reward f raised ZeroDivisionError: division by zero (test_rew",
        ),
    ],
)
def test_what_a_function_raises_is_named(function, message):
    assert refused(function).startswith(message)


def test_an_exception_has_its_place_in_the_users_file(tmp_path):
    (tmp_path / "reward.py").write_text(
        "import json\n\n\ndef f(**_):\n    x = 1\n    return json.loads('{')\n"
    )
    function = load_function(f"{tmp_path}/reward.py:f")
    assert refused(function).endswith("(char 1) (reward.py:6)")
    (tmp_path / "broken.py").write_text("x = 1\n1 / 0\n")
    with pytest.raises(InputError, match=r"ZeroDivisionError: division by zero \(broken.py:2\)"):
        load_function(f"{tmp_path}/broken.py:f")
    assert described(ValueError("never raised")) == "ValueError: never raised"


def test_an_interrupt_interrupts():
    with pytest.raises(KeyboardInterrupt):
        judge({"f": raises(KeyboardInterrupt())})


def test_any_value_can_be_logged():
    nested = []
    for _ in range(5000):
        nested = [nested]
    found = judge({"f": lambda log_extra: log_extra("x", [10**5000, nested]) or [0, 0]}).extras["x"]
    assert found[0] == "a value of int" and json.dumps(found).endswith('"a value of list"' + "]" * 21)
    assert plain([Nothing(), Unhashable("a")]) == ["a value of Nothing", "a"]
    assert type(plain(Unhashable("a"))) is str


# ---- answers


def answered(function):
    return answers(function, Rewards({}, ()), SAMPLES)[0]


def test_answers_are_what_can_be_compared():
    assert answered(lambda answer: answer) == ["a", "b"]
    assert answered(lambda: [(1, "x"), True]) == [(1, "x"), True]
    assert answered(lambda: np.array([1.5, np.nan])) == [1.5, None]  # NaN equals nothing
    assert type(answered(lambda: torch.tensor([1, 2]))[0]) is int
    assert answered(lambda: [(np.int64(1), np.str_("x")), Fraction(1, 2)]) == [(1, "x"), 0.5]
    assert {type(value) for value in answered(lambda: [Unhashable("a"), 10**5000])} == {str, int}

    async def later(completions):
        return completions

    assert answered(later) == ["a", "bb"]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda: None, "--answer: expected a list of 2 answers, one per completion, got None"),
        (lambda: ["x"], "--answer: expected 2 answers, one per completion, got 1"),
        (lambda: "xy", "--answer: expected a list of 2 answers, one per completion, got str 'xy'"),
        (
            lambda: ["x", ["y"]],
            "--answer: expected text, a number, a tuple or None for completion 1, got ['y']",
        ),
        (
            lambda: [("x", []), "y"],
            "--answer: expected text, a number, a tuple or None for completion 0, got ('x', [])",
        ),
        (
            lambda: [functools.reduce(lambda inner, _: (inner,), range(100_000), ()), "y"],
            "--answer: expected text, a number, a tuple or None for completion 0, got a value of tuple",
        ),
        (lambda: 1 / 0, "--answer raised ZeroDivisionError: division by zero (test_rewards.py:"),
    ],
)
def test_what_is_no_answer_is_named(function, message):
    with pytest.raises(InputError) as error:
        answered(function)
    assert str(error.value).startswith(message)
