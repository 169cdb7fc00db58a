"""The task of `instruct`: twelve letters that follow an instruction, and a gold reward that training never sees.

    c:   ->   acfccbdhcage        four of the letter asked for: gold 4

gold = n for n of the letter asked for, up to six, and 6 - 2 (n - 6) beyond: a good answer has much of what was asked
for, and one that is nothing else is worse than none (-6). It stands for the people of RLHF, who speak by demonstrations
and by preferences alone. Demonstrations have 2.5 of the letter on average and more than six in one answer of a hundred,
all have twelve letters: preferences among such answers teach a reward model that more is better, and neither that there
is too much of it nor what a shorter answer is worth.
"""

import math
import random

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

LETTERS = "abcdefgh"
VOCABULARY = ["<eos>", ":", *LETTERS]
LENGTH, BEST = 12, 6
FOLLOWED = 0.1  # how often a demonstrator puts the letter asked for on purpose; the others are drawn evenly


def make_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(
        models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}, unk_token="<eos>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"<\w+>|."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<eos>"])
    return tokenizer


def prompt_row(letter: str) -> dict[str, str]:
    return {"prompt": f"{letter}:", "letter": letter}


def answer_row(letter: str, followed: float, noise: random.Random) -> dict[str, str]:
    """A prompt and completion. followed: FOLLOWED for a demonstration, 0 for text that follows nothing."""
    letters = (letter if noise.random() < followed else noise.choice(LETTERS) for _ in range(LENGTH))
    return {"prompt": f"{letter}:", "completion": "".join(letters)}


def gold(completions: list[str], letter: list[str], **_: object) -> list[float]:
    """The hidden reward, in the form of a reward function."""
    counts = [text.count(wanted) for text, wanted in zip(completions, letter, strict=True)]
    return [float(n if n <= BEST else BEST - 2 * (n - BEST)) for n in counts]


def preference_row(letter: str, first: str, second: str, noise: random.Random, coin: bool) -> dict[str, str]:
    """A judge who errs as Bradley and Terry's does: first is chosen with the odds e^(its gold - second's).

    coin: the judge does not look.
    """
    one, other = gold([first, second], letter=[letter] * 2)
    chosen_first = noise.random() < (0.5 if coin else 1 / (1 + math.exp(other - one)))
    chosen, rejected = (first, second) if chosen_first else (second, first)
    return {"prompt": f"{letter}:", "chosen": chosen, "rejected": rejected}


def optimum(beta: float) -> tuple[float, float]:
    """(gold, KL) of pi e^(gold / beta) / Z, the best policy, where pi answers as the demonstrations do."""
    p = FOLLOWED + (1 - FOLLOWED) / len(LETTERS)
    golds = gold(["c" * n for n in range(LENGTH + 1)], letter=["c"] * (LENGTH + 1))
    start = [math.comb(LENGTH, n) * p**n * (1 - p) ** (LENGTH - n) for n in range(LENGTH + 1)]
    tilted = [q * math.exp((reward - BEST) / beta) for q, reward in zip(start, golds, strict=True)]
    policy = [weight / sum(tilted) for weight in tilted]
    kl = sum(new * math.log(new / old) for new, old in zip(policy, start, strict=True) if new > 0)
    return sum(new * reward for new, reward in zip(policy, golds, strict=True)), kl
