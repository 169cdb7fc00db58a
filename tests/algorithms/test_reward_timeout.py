"""The time limit of users' functions: whatever goes on in them, a run ends with one sentence."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest
from burnish.algorithms.run.calls import Call, results
from burnish.model.errors import InputError
from judging import coroutine, judge, refused


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


def raises_endlessly(**_):
    raise EndlessError


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
        *(lambda **_: [Endless()] * 2, lambda **_: [Shown()] * 2, raises_endlessly),
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
    message = "reward f: expected to return within 0.1 s (--reward-timeout), but it did not"
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


@pytest.mark.slow
def test_the_process_ends_with_one_sentence_whatever_goes_on():
    """One start of Python for those that never return, each in a process of its own."""
    started = time.monotonic()
    ran = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120)
    assert ran.stdout.split() == ["status", "1"] * 6 + ["status", "0"], ran.stderr
    lines = [line for line in ran.stderr.splitlines() if line]
    late = "expected to return within 0.2 s (--reward-timeout), but it did not"
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

    expected = "it did not: it took 0.3 s; it uses SIGALRM itself, so it cannot be interrupted"
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
