"""Negative controls: faults planted in how users' functions are called, each caught by the named check.

The checks are those of the tests beside this file in their smallest form. A faithful copy must pass them all.
"""

import asyncio
import inspect
import math
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
from burnish.algorithms.run.calls import Call, results
from controlled import Place, assert_caught, assert_faithful
from faults import Fault, control, faults_of

# ---- the checks


@control
def calls_are_awaited_and_timed(module: ModuleType, place: Place) -> None:
    """Two functions of which each waits for the other, then functions that need longer than they have."""
    here: list[int] = []

    async def meet(number: int) -> list[int]:
        here.append(number)
        while len(here) < 2:
            await asyncio.sleep(0.001)
        return [number]

    async def late() -> list[int]:
        await asyncio.sleep(0.3)
        return [0]

    def ended(functions: list[Callable[[], Any]]) -> str | list[Any]:
        calls = [module.Call(f"call {i}", f, {}, "numbers", 1) for i, f in enumerate(functions)]
        try:
            return module.results(calls, 0.15)
        except ValueError as error:
            return str(error)

    found = ended([lambda: [3], lambda: meet(0), lambda: meet(1)])
    for coroutine in filter(inspect.iscoroutine, found):
        coroutine.close()
    assert found == [[3], [0], [1]], f"expected the results of all, got {found}"
    for function in (late, lambda: time.sleep(0.3) or [0]):
        found = ended([lambda: [3], function])
        late = "call 1: expected to return within 0.15 s (--reward-timeout), but it did not"
        assert found == late, f"expected its time to be over, got {found}"
    found = ended([lambda: [3, 4]])
    assert "expected 1 numbers" in found, f"expected the wrong count to be named, got {found}"


@control
def functions_are_called_as_documented(module: ModuleType, place: Place) -> None:
    assert not module.takes(lambda answer: 0, "level"), "expected only what stands in the signature"
    assert module.takes(lambda **_: 0, "level"), "expected **kwargs to take all"
    samples = module.Samples(["p", "q"], ["a", "b"], [[1], [2]], {"answer": ["x", "y"]})

    def edits(answer, completion_ids, log_metric, trainer_state):
        answer.clear()
        completion_ids[0].clear()
        log_metric("step", trainer_state.global_step)
        log_metric("step", 4)
        return [1, None]

    log = module.Log(2)
    arguments = module.arguments_for("f", edits, samples, log.tools("f", module.TrainerState(2, 10)))
    (found,) = results([Call("f", edits, arguments, "rewards", 2, module.read_reward)])
    assert samples.columns["answer"] and samples.completion_ids[0], "expected what it edits to be its own"
    assert found[0] == 1 and math.isnan(found[1]), f"expected 1 and NaN, got {found}"
    assert log.metrics == {"step": [2, 4]}, f"expected both calls, got {log.metrics}"
    try:
        results([Call("f", lambda: ["x", ["y"]], {}, "answers", 2, module.read_answer)])
    except ValueError as error:
        assert "completion 1" in str(error), f"expected the list to be named, got {error}"
    else:
        raise AssertionError("expected a list to be no answer")


# ---- planted faults

FAULTS = faults_of(__file__)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.id)
def test_fault_is_caught(fault: Fault, place: Place, monkeypatch):
    assert_caught(fault, place, monkeypatch)


@pytest.mark.parametrize("file", sorted({fault.file for fault in FAULTS}))
def test_a_faithful_copy_passes(file: str, place: Place, monkeypatch):
    assert_faithful(file, FAULTS, place, monkeypatch)
