"""The task of `instruct`: twelve letters that follow an instruction, and a gold reward that training never sees.

    c:   ->   acfccbdhcage        four times the requested letter: gold 4

With n times the requested letter, gold = n for n <= 6, and gold = 6 - 2 (n - 6) for n > 6. So a good answer has several
of the requested letter. Twelve of it give gold -6, which is worse than none of it (0). The gold reward plays the part
of RLHF's human labellers, whose wishes are seen only through demonstrations and preferences.

Demonstrations have 2.5 of the requested letter on average, and more than six in one of a hundred answers. All have
twelve letters. From preferences between such answers, a reward model learns that more is better. It learns neither that
too many are worse, nor the value of a shorter answer.
"""

import math
import random

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

LETTERS = "abcdefgh"
VOCABULARY = ["<eos>", ":", *LETTERS]
LENGTH, BEST = 12, 6
FOLLOWED = 0.1  # how often a demonstrator chooses the requested letter; otherwise it draws evenly


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
    """Make a prompt and completion. followed: the share of letters that obey the instruction; the rest are random."""
    letters = (letter if noise.random() < followed else noise.choice(LETTERS) for _ in range(LENGTH))
    return {"prompt": f"{letter}:", "completion": "".join(letters)}


def gold(completions: list[str], letter: list[str], **_: object) -> list[float]:
    """Return the hidden reward of each completion, in the form of a reward function."""
    counts = [text.count(wanted) for text, wanted in zip(completions, letter, strict=True)]
    return [float(n if n <= BEST else BEST - 2 * (n - BEST)) for n in counts]


def preference_row(letter: str, first: str, second: str, noise: random.Random, coin: bool) -> dict[str, str]:
    """Return one preference of a noisy judge, who chooses `first` with odds e^(gold of first - gold of second).

    This is the model of Bradley and Terry. With `coin`, the judge chooses at random.
    """
    one, other = gold([first, second], letter=[letter] * 2)
    chosen_first = noise.random() < (0.5 if coin else 1 / (1 + math.exp(other - one)))
    chosen, rejected = (first, second) if chosen_first else (second, first)
    return {"prompt": f"{letter}:", "chosen": chosen, "rejected": rejected}


def optimum(beta: float) -> tuple[float, float]:
    """Return (gold, KL) of the best policy, pi e^(gold / beta) / Z, where pi is the demonstrations' distribution."""
    p = FOLLOWED + (1 - FOLLOWED) / len(LETTERS)
    golds = gold(["c" * n for n in range(LENGTH + 1)], letter=["c"] * (LENGTH + 1))
    start = [math.comb(LENGTH, n) * p**n * (1 - p) ** (LENGTH - n) for n in range(LENGTH + 1)]
    tilted = [q * math.exp((reward - BEST) / beta) for q, reward in zip(start, golds, strict=True)]
    policy = [weight / sum(tilted) for weight in tilted]
    kl = sum(new * math.log(new / old) for new, old in zip(policy, start, strict=True) if new > 0)
    return sum(new * reward for new, reward in zip(policy, golds, strict=True)), kl
