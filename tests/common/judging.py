"""Users' reward functions, judged on two samples."""

import pytest
from burnish.algorithms.data import rewards as reward_functions
from burnish.algorithms.data.functions import Samples
from burnish.algorithms.data.rewards import Rewards
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


class Scorer:
    def __call__(self, completions, answer):
        return [0.0 for _ in completions]


class AsyncScorer:
    async def __call__(self, completions):
        return [1.0, 2.0]


async def coroutine(completions, level=None):
    return [1.0, 2.0]
