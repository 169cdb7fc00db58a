"""The task of `r1`: the last digit of a sum of three digits, derived by running sums.

    3+5+9=  ->  <think>87</think><answer>7</answer>        3+5=8, 8+9=17: the last digits, then the answer

There are 1,000 problems, of which a fifth is held out. The base model is pretrained on noisy demonstrations, in which
each running sum is more often one too high than right. So the base model has learned the form and some arithmetic, and
about one in six of its answers is right. Its most likely answer is wrong, so a lower temperature does not help.
"""

import random
import re

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

TAGS = ["<eos>", "<think>", "</think>", "<answer>", "</answer>"]
VOCABULARY = [*TAGS, *"0123456789+="]
RIGHT_STEP = 0.42  # share of right running sums in noisy demonstrations; 0.42^2 = 0.18 of answers are right
CHAIN = re.compile(r"<think>\d\d</think><answer>(\d)</answer>")


def make_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(
        models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}, unk_token="<eos>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"</?\w+>|."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<eos>"])
    return tokenizer


def split_problems(seed: int) -> tuple[list[tuple[int, int, int]], list[tuple[int, int, int]]]:
    """Return 800 training problems and 200 held-out problems, which are disjoint."""
    problems = [(a, b, c) for a in range(10) for b in range(10) for c in range(10)]
    random.Random(seed).shuffle(problems)
    return problems[:800], problems[800:]


def prompt_row(problem: tuple[int, int, int]) -> dict[str, str]:
    a, b, c = problem
    return {"prompt": f"{a}+{b}+{c}=", "answer": str((a + b + c) % 10)}


def demonstration_row(problem: tuple[int, int, int], noise: random.Random | None = None) -> dict[str, str]:
    """Make a prompt and completion. With `noise`, each running sum is one too high with probability 1 - RIGHT_STEP."""
    a, b, c = problem
    first = a + b
    if noise is not None and noise.random() >= RIGHT_STEP:
        first += 1
    second = first + c
    if noise is not None and noise.random() >= RIGHT_STEP:
        second += 1
    chain = f"<think>{first % 10}{second % 10}</think><answer>{second % 10}</answer>"
    return {"prompt": f"{a}+{b}+{c}=", "completion": chain}


def answer_of(completion: str) -> str | None:
    """Return the answer of a completion of the right form, <think>..</think><answer>.</answer>, or None."""
    match = CHAIN.fullmatch(completion)
    return match[1] if match else None


def accuracy(completions: list[str], answer: list[str], **_: object) -> list[float]:
    """Return 1 for each completion whose form and answer are right, else 0."""
    return [
        float(answer_of(completion) == right) for completion, right in zip(completions, answer, strict=True)
    ]


def form(completions: list[str], **_: object) -> list[float]:
    """Return 1 for each completion that has a chain of thought and an answer, right or wrong, else 0."""
    return [float(answer_of(completion) is not None) for completion in completions]
