"""Checks of the invariants that all trainers of language models share.

A check calls one function of a `Trainer`, which a user's file returns (bench/conformance.py), and asserts one
statement. Expected values come from a plain log-softmax of each sequence alone, computed by Burnish's model.
tests/model compares the logits of this model with transformers'.
"""

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer as WordTokenizer
from tokenizers import models, pre_tokenizers
from torch import Tensor

from ...model.adapter import adapters, add_lora
from ...model.checkpoint import load_model, save_model
from ...model.config import ModelConfig
from ...model.packed import pack
from ...model.text.tokenizer import Tokenizer
from ...model.transformer import Transformer
from ..conformance import EOS, KL, PAD, VOCABULARY, Batch, Row, Step, Toy, Trainer, ids_of


class Check(NamedTuple):
    """A check: the name of the `Trainer` field that it calls, the statement, and the function that asserts it."""

    needs: str  # name of the field of `Trainer`
    statement: str
    run: Callable[..., None]  # (callable, toy, trainer); AssertionError where the statement does not hold


CHECKS: dict[str, Check] = {}


def check(needs: str, statement: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def add(function: Callable[..., None]) -> Callable[..., None]:
        CHECKS[function.__name__.replace("_", " ")] = Check(needs, statement, function)
        return function

    return add


# ---- the toy and the truth


def make_toy(folder: Path) -> Toy:
    config = ModelConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=False,
        max_position_embeddings=128,
        initializer_range=0.3,
        eos_token_id=EOS,
    )

    words = {"<eos>": EOS, "<pad>": PAD} | {f"w{i}": i for i in range(2, VOCABULARY)}
    backend = WordTokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<eos>", "<pad>"])
    tokenizer = Tokenizer(backend, eos="<eos>", pad="<pad>")
    save_model(Transformer(config, seed=0), folder / "model", tokenizer)

    model = load_model(folder / "model")
    add_lora(model, 2, seed=1, base=str((folder / "model").resolve()))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for lora in adapters(model).values():
            lora.b.normal_(std=0.2, generator=generator)
    save_model(model, folder / "adapter", tokenizer)
    return Toy(folder / "model", folder / "adapter")


def make_rows(lengths: list[tuple[int, ...]], *columns: str) -> list[Row]:
    """Return rows of random words. `lengths` has a tuple for each row, with the number of words of each column."""
    draw = random.Random(0)
    # answers begin with a blank, which does not change the ids
    blank = lambda column: "" if column == "prompt" else " "
    word = lambda: f"w{draw.randrange(2, VOCABULARY)}"
    return [
        {c: blank(c) + " ".join(word() for _ in range(n)) for c, n in zip(columns, numbers, strict=True)}
        for numbers in lengths
    ]


ROWS = make_rows([(3, 2), (5, 9), (2, 1), (4, 6), (7, 3), (3, 12)], "prompt", "completion")
PAIRS = make_rows([(3, 2, 5), (5, 7, 1), (2, 4, 4), (4, 1, 6), (3, 8, 2)], "prompt", "chosen", "rejected")


def distributions(toy: Toy, ids: list[int], temperature: float = 1.0) -> Tensor:
    """Return the log-probabilities of the next token after each prefix of the ids, (len(ids), V)."""
    model = load_model(toy.folder)
    with torch.no_grad():
        return (model.logits(model(pack([ids]))).float() / temperature).log_softmax(-1)


def logprobs(toy: Toy, prompt: list[int], completion: list[int]) -> Tensor:
    rows = distributions(toy, prompt + completion)[len(prompt) - 1 : -1]
    return rows.gather(1, torch.tensor(completion)[:, None]).squeeze(1)


def nll(toy: Toy, sequences: list[tuple[list[int], list[int]]]) -> float:
    """Return the mean of -log p over all tokens of all completions. sequences: (prompt ids, completion ids)."""
    terms = torch.cat([logprobs(toy, *sequence) for sequence in sequences])
    return -terms.mean().item()


def with_end(row: Row) -> tuple[list[int], list[int]]:
    return ids_of(row["prompt"]), [*ids_of(row["completion"]), EOS]


def same(found: float | Tensor, expected: float | Tensor, what: str, rtol: float = 1e-5) -> None:
    """Assert that two values agree: they differ by at most 1e-6 plus rtol times the largest expected magnitude."""
    found, expected = torch.as_tensor(found), torch.as_tensor(expected)
    assert found.shape == expected.shape, f"{what}: shape {tuple(found.shape)}, not {tuple(expected.shape)}"
    difference = (found - expected).abs().max().item()
    bound = 1e-6 + rtol * expected.abs().max().item()
    assert difference <= bound, f"{what}: off by {difference:.2g} (largest {expected.abs().max().item():.2g})"


def same_step(found: Step, expected: Step, what: str) -> None:
    same(found.loss, expected.loss, f"{what}, loss")
    same(found.gradient, expected.gradient, f"{what}, gradient")


# ---- whole steps: denominator, accumulation, sharding, packing, masking, end token


@check("sft", "The loss is the sum over all trained tokens of the step, divided by their number.")
def denominator(sft, toy: Toy, _) -> None:
    for at_once in (len(ROWS), 1):
        loss = sft(toy, Batch(ROWS, at_once)).loss
        same(loss, nll(toy, [with_end(row) for row in ROWS]), f"{at_once} rows at once")


@check("sft", "Loss and gradient are the same for all rows at once, one by one, or in uneven parts.")
def accumulation(sft, toy: Toy, _) -> None:
    whole = sft(toy, Batch(ROWS, len(ROWS)))
    for at_once in (1, 4):
        same_step(sft(toy, Batch(ROWS, at_once)), whole, f"{at_once} of {len(ROWS)} rows at once")


@check("sft", "Loss and gradient are the same if the rows are spread over two data-parallel ranks.")
def sharding(sft, toy: Toy, _) -> None:
    same_step(sft(toy, Batch(ROWS, 3, ranks=2)), sft(toy, Batch(ROWS, 6)), "two ranks")


@check("sft", "Loss and gradient are the same if the rows are packed into one sequence.")
def packing(sft, toy: Toy, _) -> None:
    same_step(sft(toy, Batch(ROWS, 6, packed=True)), sft(toy, Batch(ROWS, 6)), "packed")


@check(
    "sft", "A row that is truncated before its completion counts neither in the sum nor in the denominator."
)
def masked_rows(sft, toy: Toy, _) -> None:
    long = make_rows([(40, 3)], "prompt", "completion")
    found = sft(toy, Batch(ROWS + long, len(ROWS) + 1, max_length=32))
    same_step(found, sft(toy, Batch(ROWS, len(ROWS), max_length=32)), "with a row that is cut")


@check("sft", "The end token is trained once, and padding is not, even if they are the same token.")
def end_token(sft, toy: Toy, _) -> None:
    expected = nll(toy, [with_end(row) for row in ROWS])
    for pad in ("<pad>", "<eos>"):
        loss = sft(Toy(toy.folder, toy.adapter, pad), Batch(ROWS, len(ROWS))).loss
        same(loss, expected, f"padded with {pad}")


@check("sft", "A truncated completion gets no end token.")
def truncation(sft, toy: Toy, _) -> None:
    cut = [(prompt, completion[: 12 - len(prompt)]) for prompt, completion in map(with_end, ROWS)]
    same(sft(toy, Batch(ROWS, len(ROWS), max_length=12)).loss, nll(toy, cut), "cut at 12 tokens")


@check("score", "A completion scores the same alone and beside longer ones, whichever side is padded.")
def padding_side(score, toy: Toy, trainer: Trainer) -> None:
    prompts, completions = map(list, zip(*map(with_end, ROWS), strict=True))
    for side in trainer.padding_sides or (None,):
        together = score(toy, prompts, completions, side)
        for found, prompt, completion in zip(together, prompts, completions, strict=True):
            same(found, logprobs(toy, prompt, completion), f"padding: {side}")


# ---- preferences: first step, accumulation, reference


@check("dpo", "DPO's first loss is ln 2, and its gradient is not 0.")
def preference_start(dpo, toy: Toy, _) -> None:
    (step,) = dpo(toy, PAIRS, len(PAIRS), 1, 0.0, None)
    same(step.loss, math.log(2), "first loss", 1e-6)
    assert step.gradient.abs().max() > 1e-4, "the gradient is 0"


@check(
    "dpo",
    "Loss and gradient are the same for all pairs at once, one by one, or in uneven parts, also after an update.",
)
def preference_accumulation(dpo, toy: Toy, _) -> None:
    whole = dpo(toy, PAIRS, len(PAIRS), 2, 1e-2, None)
    for at_once in (1, 3):
        parts = dpo(toy, PAIRS, at_once, 2, 1e-2, None)
        same_step(parts[0], whole[0], f"{at_once} of {len(PAIRS)} pairs at once")
        # Adam divides by |g|: if |g| is near eps, rounding of the first gradient changes the weight
        same(parts[1].loss, whole[1].loss, f"{at_once} of {len(PAIRS)} pairs at once, second loss", 1e-3)


def reference_is_the_start(dpo, toy: Toy, lora: str) -> None:
    first, second = dpo(toy, PAIRS, len(PAIRS), 2, 1e-2, lora)
    same(first.loss, math.log(2), "first loss", 1e-6)
    assert second.loss < first.loss - 1e-4, (
        f"second loss {second.loss:.6f}: the reference moves with the policy"
    )


@check(
    "dpo", "With a fresh LoRA adapter the reference is the model without the adapter, and does not change."
)
def reference_fresh_adapter(dpo, toy: Toy, _) -> None:
    reference_is_the_start(dpo, toy, "fresh")


@check("dpo", "With a loaded LoRA adapter the reference is the model with that adapter, and does not change.")
def reference_loaded_adapter(dpo, toy: Toy, _) -> None:
    reference_is_the_start(dpo, toy, "loaded")


# ---- sampler and scorer


def frequencies(ids: Tensor) -> Tensor:
    return torch.bincount(ids, minlength=VOCABULARY).float() / ids.numel()


@check("rollout", "Samples come from the distribution that scores them, at the same temperature.")
def sampler_temperature(rollout, toy: Toy, _) -> None:
    prompt = [3, 4, 5]
    ids, scored = rollout(toy, prompt, 4000, 2.0, None)
    truth = distributions(toy, prompt, 2.0)[-1]
    same(scored, truth[ids], "log-probabilities at temperature 2", 1e-4)
    distance = (frequencies(ids) - truth.exp()).abs().sum().item() / 2  # total variation
    assert distance < 0.08, f"the samples are {distance:.2f} (total variation) from the scoring distribution"


@check("rollout", "Under top-k the scores are normalised over the kept ids: their probabilities add up to 1.")
def sampler_support(rollout, toy: Toy, _) -> None:
    ids, scored = rollout(toy, [3, 4, 5], 500, 1.0, 3)
    by_id = dict(zip(ids.tolist(), scored.tolist(), strict=True))
    assert len(by_id) == 3, f"{len(by_id)} ids were drawn"
    total = sum(math.exp(value) for value in by_id.values())
    assert abs(total - 1) < 1e-4, f"the probabilities of the 3 ids kept add up to {total:.3f}"


# ---- policy losses


def policy_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return random arguments of a policy loss: logprob (B, T), old_logprob (B, T), advantage (B,) and mask (B, T)."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(7) < torch.tensor([5, 2, 7, 1])[:, None]
    logprob = -torch.randn(4, 7, generator=generator).abs()
    old = logprob + 0.3 * torch.randn(4, 7, generator=generator)
    return logprob * mask, old * mask, torch.randn(4, generator=generator), mask


def value_and_gradient(function: Callable[[Tensor], Tensor], logprob: Tensor) -> tuple[Tensor, Tensor]:
    logprob = logprob.clone().requires_grad_()
    value = function(logprob)
    (gradient,) = torch.autograd.grad(value, logprob)
    return value.detach(), gradient


@check(
    "policy_loss",
    "On policy the loss is -sum A n / N (n tokens of a sample, N in all), and the gradient of a token is -A / N.",
)
def policy_start(policy_loss, *_) -> None:
    logprob, _, advantage, mask = policy_inputs()
    n = int(mask.sum())
    loss = lambda x: policy_loss(x, logprob, advantage, mask, n)
    value, gradient = value_and_gradient(loss, logprob)
    same(value, -(advantage * mask.sum(1)).sum() / n, "loss")
    same(gradient, -(advantage[:, None] * mask) / n, "gradient")


@check("policy_loss", "The losses of a step's micro-batches add up to the loss of the step.")
def policy_accumulation(policy_loss, *_) -> None:
    logprob, old, advantage, mask = policy_inputs()
    n = int(mask.sum())
    whole = policy_loss(logprob, old, advantage, mask, n)
    for cuts in ([1, 1, 1, 1], [3, 1]):
        parts = [t.split(cuts) for t in (logprob, old, advantage, mask)]
        total = sum(policy_loss(*part, n) for part in zip(*parts, strict=True))
        same(total, whole, f"parts of {cuts} samples")


@check("policy_loss", "Values at masked places change nothing, and a batch that is fully masked gives 0.")
def policy_mask(policy_loss, *_) -> None:
    logprob, old, advantage, mask = policy_inputs()
    n = int(mask.sum())
    clean = value_and_gradient(lambda x: policy_loss(x, old, advantage, mask, n), logprob)
    soiled = logprob.masked_fill(~mask, -3.0)
    found = value_and_gradient(lambda x: policy_loss(x, old, advantage, mask, n), soiled)
    same(found[0], clean[0], "loss")
    same(found[1], clean[1], "gradient")

    nothing = torch.zeros_like(mask)
    value, gradient = value_and_gradient(lambda x: policy_loss(x, old, advantage, nothing, 0), logprob)
    same(value, 0.0, "all masked, loss")
    same(gradient, torch.zeros_like(gradient), "all masked, gradient")


@check("policy_loss", "A log-ratio of 200 or -200 gives a finite loss and a finite gradient.")
def bounded_weights(policy_loss, *_) -> None:
    logprob, _, advantage, mask = policy_inputs()
    for sign in (1.0, -1.0):
        loss = lambda x, sign=sign: policy_loss(x, logprob - 200 * sign, -advantage.abs(), mask, 15)
        value, gradient = value_and_gradient(loss, logprob)
        assert value.isfinite() and gradient.isfinite().all(), f"log-ratio {200 * sign:.0f}: loss {value:.3g}"


# ---- KL


def policies() -> tuple[Tensor, Tensor]:
    """Return a policy's logits over 6 outcomes, which require a gradient, and a reference's log-probabilities."""
    generator = torch.Generator().manual_seed(3)
    theta = torch.randn(6, generator=generator).requires_grad_()
    return theta, torch.randn(6, generator=generator).log_softmax(0)


def kl_gradient(theta: Tensor, ref: Tensor, which: str) -> Tensor:
    log_p = theta.log_softmax(0)
    p_to_ref = (log_p.exp() * (log_p - ref)).sum()
    ref_to_p = (ref.exp() * (ref - log_p)).sum()
    (gradient,) = torch.autograd.grad(p_to_ref if which == "KL(pi || ref)" else ref_to_p, theta)
    return gradient


@check(
    "kl",
    "The expected gradient of a KL term over the policy's samples is the gradient of the KL that it names.",
)
def kl_term(terms: dict[str, KL], *_) -> None:
    for name, term in terms.items():
        theta, ref = policies()
        log_p = theta.log_softmax(0)
        p = log_p.detach().exp()
        expected = sum(p[y] * term.loss(log_p[y : y + 1], ref[y : y + 1]) for y in range(6))
        (gradient,) = torch.autograd.grad(torch.as_tensor(expected), theta)
        same(gradient, kl_gradient(theta, ref, term.gradient), f"{name}, gradient of {term.gradient}")


@check("shaped_rewards", "The KL penalty in PPO's rewards has exactly the policy gradient of KL(pi || ref).")
def kl_in_the_reward(shaped_rewards, *_) -> None:
    theta, ref = policies()
    log_p = theta.log_softmax(0)
    mask, beta = torch.ones(6, 1, dtype=torch.bool), 0.3
    reward = shaped_rewards(torch.zeros(6), log_p.detach()[:, None], ref[:, None], mask, beta).squeeze(1)
    expected = (log_p.detach().exp() * reward * log_p).sum()  # E[r grad log pi]
    (gradient,) = torch.autograd.grad(expected, theta)
    same(gradient, -beta * kl_gradient(theta, ref, "KL(pi || ref)"), "policy gradient")


@check("shaped_rewards", "The score of a completion is the reward of its last token, and of no other token.")
def score_placement(shaped_rewards, *_) -> None:
    logprob, _, score, mask = policy_inputs()
    reward = shaped_rewards(score, logprob, logprob, mask, 0.3)
    expected = torch.zeros_like(logprob)
    expected[torch.arange(4), mask.sum(1) - 1] = score
    same(reward, expected, "rewards without a KL")


@check(
    "advantages", "With gamma = lambda = 1 the return of every token is the score, and that of padding is 0."
)
def returns_are_the_score(advantages, *_) -> None:
    _, _, score, mask = policy_inputs()
    rewards = torch.zeros(mask.shape)
    rewards[torch.arange(4), mask.sum(1) - 1] = score
    same(advantages(rewards, mask), score[:, None] * mask, "returns")
