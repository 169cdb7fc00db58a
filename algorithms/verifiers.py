"""Verifiers of short answers, in the form of reward functions: 1.0 for a right completion, 0.0 for a wrong one.

    burnish grpo     --reward burnish.algorithms.verifiers:gsm8k ...
    burnish evaluate --reward burnish.algorithms.verifiers:last_number --answer burnish.algorithms.verifiers:number ...

The `answer` column of the data holds the reference solution. The reference answer is the last number behind the
solution's last "####", or the last number of the whole solution if it has no "####". For the majority vote, a function
named by --answer returns the answer of each completion, or None.

Source: GSM8K's answer format: Cobbe et al. 2021, https://arxiv.org/abs/2110.14168
"""

import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation

from ..model.text.tokenizer import Message

NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?|-?\$?\.\d+")
MARKED = re.compile(r"####\s*(" + NUMBER.pattern + ")")
Completion = str | list[Message]


def gsm8k(completions: Sequence[Completion], answer: Sequence[str], **_: object) -> list[float]:
    """Return 1.0 for each completion whose number behind the last "####" equals the reference answer, else 0.0."""
    return _right([_marked(_text(completion)) for completion in completions], answer)


def last_number(completions: Sequence[Completion], answer: Sequence[str], **_: object) -> list[float]:
    """Return 1.0 for each completion whose last number, at any place, equals the reference answer, else 0.0."""
    return _right([_last(_text(completion)) for completion in completions], answer)


def number(completions: Sequence[Completion], **_: object) -> list[str | None]:
    """Return each completion's answer: the number behind its last "####", otherwise its last number, or None."""
    texts = [_text(completion) for completion in completions]
    numbers = [_last(text) if (marked := _marked(text)) is None else marked for text in texts]
    return [None if value is None else str(value) for value in numbers]


def _right(given: Sequence[Decimal | None], answers: Sequence[str]) -> list[float]:
    wanted = [_last(str(answer).rpartition("####")[2]) for answer in answers]
    return [float(one is not None and one == other) for one, other in zip(given, wanted, strict=True)]


def _text(completion: Completion) -> str:
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def _marked(text: str) -> Decimal | None:
    found = MARKED.findall(text)
    return _decimal(found[-1]) if found else None


def _last(text: str) -> Decimal | None:
    found = NUMBER.findall(text)
    return _decimal(found[-1]) if found else None


def _decimal(digits: str) -> Decimal | None:
    try:
        value = Decimal(digits.replace(",", "").replace("$", ""))
    except InvalidOperation:
        return None
    return value.normalize() + 0  # 18.0 becomes 18, and -0 becomes 0
