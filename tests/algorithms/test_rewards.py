"""Users' functions: what they get, what they may return, and one sentence for whatever else they do."""

import asyncio
import contextlib
import functools
import itertools
import json
import numbers
import os
import signal
import subprocess
import sys
import time
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from burnish.algorithms.data import rewards as reward_functions
from burnish.algorithms.data.functions import Samples, TrainerState, plain, takes
from burnish.algorithms.data.rewards import (
    Rewards,
    answers,
    check_weights,
    load_reward,
    load_rewards,
    unjudged,
)
from burnish.algorithms.run.calls import Call, described, results
from burnish.model.errors import InputError

SAMPLES = Samples(["p", "p"], ["a", "bb"], [[1], [2, 3]], {"answer": ["a", "b"]})


def judge(functions, weights=None, samples=SAMPLES, **rest):
    rewards = Rewards(functions, weights or (1.0,) * len(functions), **rest)
    return reward_functions.judge(rewards, samples)


def refused(function, **rest):
    with pytest.raises(InputError) as error:
        judge({"f": function}, **rest)
    message = str(error.value)
    assert message.isprintable() and len(message) < 400
    return message


def test_a_function_from_a_file_gets_the_columns(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def right(prompts, completions, completion_ids, answer, **_):\n"
        "    return [float(c == a) + len(i) for c, a, i in zip(completions, answer, completion_ids)]\n"
    )
    function = load_reward(f"{tmp_path}/mine.py:right")
    found = judge({"right": function}, [0.5])
    assert found.total.tolist() == [1.0, 1.0] and found.parts["right"].tolist() == [2.0, 2.0]
    assert found.total.dtype == found.parts["right"].dtype == torch.float32


def test_none_means_not_judged():
    functions = {"a": lambda **_: [1.0, None], "b": lambda **_: [None, None], "c": lambda **_: [2, None]}
    total, parts, _, _ = judge(functions, [1.0, 1.0, 10.0])
    assert total[0] == 21 and total[1].isnan()
    assert parts["b"].isnan().all() and torch.equal(parts["a"].isnan(), torch.tensor([False, True]))


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
    message = "expected a column 'solution', which it takes; the data has answer"
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
        expected = f"expected '{name}s', as the {name}s of all samples arrive, got '{name}'"
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


class Unhashable(str):
    def __hash__(self):
        raise ValueError


class Scorer:
    def __call__(self, completions, answer):
        return [0.0 for _ in completions]


class AsyncScorer:
    async def __call__(self, completions):
        return [1.0, 2.0]


async def coroutine(completions, level=None):
    return [1.0, 2.0]


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
    """Whatever a reader asks of it, it raises."""

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


EXPECTED = "reward f: expected a list of 2 rewards, one a completion, got "
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
        ([1.0], "reward f: expected 2 rewards, one a completion, got 1"),
        (np.zeros(3), "reward f: expected 2 rewards, one a completion, got 3"),
        ((x for x in range(5)), "reward f: expected 2 rewards, one a completion, got more than 2"),
        ((x for x in range(1)), "reward f: expected 2 rewards, one a completion, got 1"),
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
        "got coroutines in it: await them with asyncio.gather"
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
    function = load_reward(f"{tmp_path}/reward.py:f")
    assert refused(function).endswith("(char 1) (reward.py:6)")
    (tmp_path / "broken.py").write_text("x = 1\n1 / 0\n")
    with pytest.raises(InputError, match=r"ZeroDivisionError: division by zero \(broken.py:2\)"):
        load_reward(f"{tmp_path}/broken.py:f")
    assert described(ValueError("never raised")) == "ValueError: never raised"


def test_an_interrupt_interrupts():
    with pytest.raises(KeyboardInterrupt):
        judge({"f": raises(KeyboardInterrupt())})


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


def test_any_value_can_be_logged():
    nested = []
    for _ in range(5000):
        nested = [nested]
    found = judge({"f": lambda log_extra: log_extra("x", [10**5000, nested]) or [0, 0]}).extras["x"]
    assert found[0] == "a value of int" and json.dumps(found).endswith('"a value of list"' + "]" * 21)
    assert plain([Nothing(), Unhashable("a")]) == ["a value of Nothing", "a"]
    assert type(plain(Unhashable("a"))) is str


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
            "log_extra: expected 2 values as 'x', one a completion, got 1",
        ),
        (
            lambda log_extra: log_extra("x", itertools.count()) or [0, 0],
            "log_extra: expected 2 values as 'x', one a completion, got more than 2",
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
    with pytest.raises(InputError, match="reward g: log_extra: column 'x' is that of reward f"):
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


# ---- the time limit


def spin(**_):
    while True:
        pass


def read(**_):
    return os.read(os.pipe()[0], 1)


def backtrack(**_):
    import re

    return re.match("(a+)+$", "a" * 40 + "b")


def deaf(completions, **_):
    scores = []
    for _ in completions:
        try:
            time.sleep(60)
        except BaseException:
            scores.append(0.0)
            return [0.0, 0.0]


class Endless:
    """Its methods do not return: they are called when results are read, and when they are shown."""

    def item(self):
        spin()

    __repr__ = __str__ = __float__ = item


class Shown:
    __repr__ = Endless.item


class EndlessError(Exception):
    __str__ = Endless.item


async def async_sleep(**_):
    await asyncio.sleep(60)


async def async_block(**_):
    time.sleep(1)
    return [0, 0]


async def async_deaf(**_):
    while True:
        with contextlib.suppress(BaseException):
            await asyncio.sleep(60)


@pytest.mark.parametrize(
    "function",
    [
        *(spin, lambda **_: time.sleep(60), read, backtrack, deaf, async_sleep, async_block, async_deaf),
        *(lambda **_: [Endless()] * 2, lambda **_: [Shown()] * 2, lambda **_: raises(EndlessError())()),
    ],
    ids=[
        "loop",
        "sleep",
        "read",
        "regular expression",
        "deaf",
        "async",
        "async that blocks",
        "async and deaf",
        "a result",
        "what shows it",
        "an exception",
    ],
)
def test_a_function_that_does_not_return_in_time(function):
    started = time.monotonic()
    message = "reward f: expected to return within 0.1 s (--reward-timeout), it did not"
    assert refused(function, timeout=0.1) == message
    assert time.monotonic() - started < 5
    assert judge({"f": coroutine, "g": lambda **_: [0, 0]}, timeout=5.0).total.tolist() == [1.0, 2.0]


def test_the_late_one_of_several_is_named():
    with pytest.raises(InputError, match="reward g: expected to return within"):
        judge({"f": coroutine, "g": async_sleep}, timeout=0.1)


PROGRAM = """'A command.'

import concurrent.futures, itertools, os, re, sys, threading, time
from dataclasses import dataclass
from burnish.algorithms.run import calls
from burnish.algorithms.run.command import run_command


@dataclass
class Config:
    device: str = "cpu"


def pool():  # whose threads Python would wait for
    with concurrent.futures.ThreadPoolExecutor() as pool:
        return list(pool.map(time.sleep, [1000, 1000]))


def deaf():
    while True:
        try:
            time.sleep(1000)
        except BaseException:
            pass


async def blocks():
    time.sleep(1000)


async def backtracks():  # with the interpreter's lock, as what follows
    re.match("(a+)+$", "a" * 60 + "b")


def counts():
    sum(itertools.repeat(1))


class Slow:
    def item(self):
        return sum(itertools.repeat(1))


def slow():
    return [Slow(), 1.0]


def leaves_a_thread():
    threading.Thread(target=time.sleep, args=(1000,)).start()
    return [1, 2]


for function in (pool, deaf, blocks, backtracks, counts, slow, leaves_a_thread):
    calls.PATIENCE = 2.5 if function is pool else 0.5  # a pool needs two interruptions
    if (child := os.fork()) == 0:
        read = lambda value: value.item() if hasattr(value, "item") else value
        call = calls.Call(function.__name__, function, {}, "rewards", 2, read)
        sys.exit(run_command("try", sys.modules["__main__"], lambda _: calls.results([call], 0.2), []))
    print("status", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_the_process_ends_with_one_sentence_whatever_goes_on():
    """One start of Python for those that never return, each in a process of its own."""
    started = time.monotonic()
    ran = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120)
    assert ran.stdout.split() == ["status", "1"] * 6 + ["status", "0"], ran.stderr
    lines = [line for line in ran.stderr.splitlines() if line]
    late = "expected to return within 0.2 s (--reward-timeout), it did not"
    assert lines == [
        f"try: pool: {late}",
        f"deaf: {late}, nor within 0.5 s more",
        f"try: blocks: {late}",
        *(f"{name}: {late}, nor within 0.5 s more" for name in ("backtracks", "counts", "slow")),
    ]
    assert time.monotonic() - started < 60


def test_a_function_that_takes_the_alarm_is_told_how_long_it_took():
    def f():
        signal.setitimer(signal.ITIMER_REAL, 0)
        time.sleep(0.3)
        return [0, 0]

    expected = "it did not: it took 0.3 s, and what uses SIGALRM itself is not interrupted"
    assert refused(f, timeout=0.05).endswith(expected)


def test_someone_elses_alarm_comes_back():
    before, handler = signal.getitimer(signal.ITIMER_REAL), signal.getsignal(signal.SIGALRM)
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    signal.setitimer(signal.ITIMER_REAL, 1000)
    try:
        results([Call("f", lambda: [1], {}, "rewards", 1)], 5.0)
        assert 990 < signal.getitimer(signal.ITIMER_REAL)[0] <= 1000
        assert signal.getsignal(signal.SIGALRM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *before)


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
        (lambda: None, "--answer: expected a list of 2 answers, one a completion, got None"),
        (lambda: ["x"], "--answer: expected 2 answers, one a completion, got 1"),
        (lambda: "xy", "--answer: expected a list of 2 answers, one a completion, got str 'xy'"),
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
        load_reward(f"{path}:{name}")


def test_a_name_that_no_file_can_have_is_refused():
    with pytest.raises(InputError) as error:
        load_reward(f"{'x' * 5000}.py:f")
    assert "no file xxx" in str(error.value) and len(str(error.value)) < 400


def test_a_signature_that_is_none_takes_all():
    function = Scorer()
    function.__signature__ = 5
    assert takes(function, "anything")


def test_a_name_without_a_function_is_refused():
    with pytest.raises(InputError, match=r"expected FILE.py:function or package.module:function"):
        load_reward("reward.py")


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
    assert judge({"f": load_reward(f"{tmp_path}/reward.py:f")}).total.tolist() == [3.0, 3.0]


def test_weights_of_reward_functions():
    assert check_weights((), 2) == (1.0, 1.0) and check_weights((0.5, -2.0), 2) == (0.5, -2.0)
    assert check_weights((), 0) == ()
    with pytest.raises(InputError, match="expected 2, one a reward function, got 1"):
        check_weights((1.0,), 2)
    with pytest.raises(InputError, match="expected finite numbers"):
        check_weights((1.0, float("nan")), 2)


# ---- what a run says at its end


def test_a_run_says_what_taught_nothing(capsys):
    rewards = Rewards({"f": len, "g": len}, (1.0, 1.0))
    nan = torch.nan

    def said(values, *steps, in_groups=True):
        for f, g in steps:
            f, g = torch.tensor(f), torch.tensor(g)
            scores = torch.stack([f, g]).nansum(0).masked_fill(f.isnan() & g.isnan(), nan)
            rewards.count(values, {"f": f, "g": g}, scores.view(2, 2))
        rewards.report(values, in_groups=in_groups)
        return capsys.readouterr().out

    none, flat, apart, varied = [nan] * 4, [0.5] * 4, [0.0, 0.0, 1.0, 1.0], [0.0, nan, 1.0, 2.0]
    nothing = "the rewards taught nothing\n"
    silent = "reward g: None for every sample: it has judged nothing\n"
    assert said({"varied": 0}, (none, none)) == f"every reward was None: {nothing}"
    assert said({"varied": 0}, (apart, none)) == f"{silent}no group's rewards ever differed: {nothing}"
    assert said({"varied": 0}, (flat, apart), (apart, none)) == f"no group's rewards ever differed: {nothing}"
    assert said({"varied": 0}, (none, none), (varied, none)) == silent
    assert said({"varied": 0}, (flat, none), in_groups=False).endswith(f"the run scored 0.5: {nothing}")
    assert said({"varied": 0}, (apart, none), in_groups=False) == silent
    assert said({}, (none, none)) == ""  # a checkpoint of before there were counts
