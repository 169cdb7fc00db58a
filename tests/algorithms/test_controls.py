"""Negative controls: faults planted in a copy of an algorithm's source, each of which the named check must catch.

The checks are those of the tests beside this file in their smallest form. A faithful copy must pass them all.
"""

import asyncio
import dataclasses
import importlib
import inspect
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from burnish.algorithms.data.examples import Prompt
from burnish.algorithms.data.groups import Group, Groups
from burnish.algorithms.run.batch import make_batches
from burnish.algorithms.run.calls import Call, results
from burnish.algorithms.run.flags import SamplingFlags
from burnish.model.checkpoint import load_model, load_scalar_model, save_model
from burnish.model.generate import generate
from burnish.model.packed import pack
from burnish.model.text.tokenizer import Tokenizer
from burnish.model.transformer import Transformer
from planted import copy_of

ALGORITHMS = Path(__file__).parents[2] / "algorithms"
CHOSEN = torch.tensor([1.0, -0.5, 0.3], dtype=torch.float64)
REJECTED = torch.tensor([-0.5, 0.8, 0.1], dtype=torch.float64)


class Place(NamedTuple):
    """What a check may use beside the module."""

    model: Path
    data: Path
    output: Path


def algorithm(name: str) -> ModuleType:
    return importlib.import_module(f"burnish.algorithms.{name}")


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def same(found: float, expected: float, bound: float = 1e-5) -> None:
    assert abs(found - expected) <= bound, f"expected {expected}, got {found}"


# ---- preferences


def config(module: ModuleType, place: Place, **changes: Any) -> Any:
    common = {"steps": 2, "batch_size": 6, "learning_rate": 1e-2, "warmup_steps": 0, "device": "cpu"}
    return module.Config(**{**place._asdict(), **common, **changes})


def pair_losses_have_their_values(module: ModuleType, place: Place) -> None:
    """-log sigmoid and its relatives, written out."""
    sigmoid = lambda x: 1 / (1 + math.exp(-x))
    pairs = list(zip(CHOSEN.tolist(), REJECTED.tolist(), strict=True))
    odds = lambda x: math.exp(x) / (1 - math.exp(x))
    formulas: dict[str, Callable[[float, float], float]] = {
        "dpo": lambda a, b: -math.log(sigmoid(0.5 * (a - b))),
        "cdpo": lambda a, b: -0.8 * math.log(sigmoid(0.5 * (a - b))) - 0.2 * math.log(sigmoid(0.5 * (b - a))),
        "robust": lambda a, b: (
            (-0.8 * math.log(sigmoid(0.5 * (a - b))) + 0.2 * math.log(sigmoid(0.5 * (b - a)))) / 0.6
        ),
        "hinge": lambda a, b: max(0.0, 1 - 0.5 * (a - b)),
        "ipo": lambda a, b: (a - b - 1) ** 2,
        "apo_zero": lambda a, b: 1 - sigmoid(0.5 * a) + sigmoid(0.5 * b),
        "apo_down": lambda a, b: sigmoid(0.5 * a) + 1 - sigmoid(0.5 * (a - b)),
        "simpo": lambda a, b: -math.log(sigmoid(0.5 * (a - b) - 0.3)),
        "orpo": lambda a, b: -0.5 * math.log(sigmoid(math.log(odds(a - 2) / odds(b - 2)))),
    }
    more = {"cdpo": {"label_smoothing": 0.2}, "robust": {"label_smoothing": 0.2}, "simpo": {"gamma": 0.3}}
    for name, formula in formulas.items():
        shift = 2 if name == "orpo" else 0  # log-probabilities are negative
        loss = getattr(module, f"{name}_loss")(
            CHOSEN - shift, REJECTED - shift, 4, beta=0.5, **more.get(name, {})
        )
        same(loss.item(), sum(formula(*pair) for pair in pairs) / 4, 1e-9)


def reward_losses_have_their_values(module: ModuleType, place: Place) -> None:
    pairs = list(zip(CHOSEN.tolist(), REJECTED.tolist(), strict=True))
    loss = module.bradley_terry_loss(CHOSEN, REJECTED, 0.4, 4)
    same(loss.item(), sum(math.log(1 + math.exp(b + 0.4 - a)) for a, b in pairs) / 4, 1e-9)
    same(module.centering_loss(CHOSEN, REJECTED, 4).item(), sum((a + b) ** 2 for a, b in pairs) / 4, 1e-9)


def kto_has_its_value(module: ModuleType, place: Place) -> None:
    sigmoid = lambda x: 1 / (1 + math.exp(-x))
    wanted = torch.tensor([True, False, True])
    loss = module.kto_loss(CHOSEN, wanted, 0.2, 4, 0.5, 2.0, 3.0)
    expected = 2 * (1 - sigmoid(0.4)) + 3 * (1 - sigmoid(0.35)) + 2 * (1 - sigmoid(0.05))
    same(loss.item(), expected / 4, 1e-6)


def the_first_scores_are_zero(module: ModuleType, place: Place) -> None:
    module.train(config(module, place, steps=1, seed=3))
    (first,) = metrics_of(place.output)
    same(first["chosen"], 0)
    same(first["rejected"], 0)
    if "kl" in first:
        same(first["kl"], 0)


def micro_batches_change_nothing(module: ModuleType, place: Place) -> None:
    found = []
    for tokens in (10**6, 1):
        output = place.output / str(tokens)
        module.train(config(module, place, micro_batch_tokens=tokens, output=output))
        found.append(metrics_of(output))
    for one, other in zip(*found, strict=True):
        for name in ("loss", "grad_norm", "chosen"):
            same(one[name], other[name], 1e-4)


def the_reference_stays(module: ModuleType, place: Place) -> None:
    """After an epoch the margin grows with the model; against a reference that moves along it would be 0 again."""
    module.train(config(module, place, batch_size=64, steps=6))
    assert metrics_of(place.output)[-1]["margin"] > 0.05, "expected a margin"


def chosen_scores_average_zero(module: ModuleType, place: Place) -> None:
    cfg = config(module, place)
    model = load_scalar_model(module.train(cfg))
    pairs = module.load_pairs(place.data, Tokenizer.load(place.model), config(module, place, max_length=64))
    scores = module.over_completions(model, pairs, lambda batch: batch.scores(model), 10**6)
    same(scores[:, 0].mean().item(), 0)


def pairs_lie_as_they_should(module: ModuleType, place: Place) -> None:
    """The prompt is seen by both, only masked tokens are trained, the last token is each completion's own."""
    completion = lambda *tokens: module.Completion(list(tokens), [token != 9 for token in tokens])
    pairs = [
        module.Family([1, 2], [completion(3, 9, 4), completion(5)]),
        module.Family([6], [completion(7, 8), completion(7)]),
    ]
    (one,) = module.make_batches(pairs, 100, "cpu")
    assert one.packed.parents is not None, "expected parents"
    assert one.packed.parents.tolist() == [-1, 0, 0, -1, 3, 3], "expected both under their prompt"
    assert one.packed.tokens[one.last].tolist() == [4, 5, 8, 7], "expected the last tokens"
    assert one.packed.tokens[one.rows].tolist() == [3, 4, 5, 7, 8, 7], "expected the trained tokens"
    assert one.sums(torch.arange(6.0)).tolist() == [1, 2, 7, 5], "expected sums over completions"


def rows_are_read_as_they_should(module: ModuleType, place: Place) -> None:
    """In two conversations that part early, the assistant's turns alone are trained; the last token ends a turn."""
    tokenizer = Tokenizer.load(Path(__file__).parents[1] / "data" / "tokenizer")
    talks = {
        name: f"\n\nHuman: a\n\nAssistant: same\n\nHuman: b\n\nAssistant: {name} 1\n\nHuman: c\n\nAssistant: {name} 2"
        for name in ("chosen", "rejected")
    }
    (pair,), _ = module.preferences([talks], tokenizer, max_length=200)
    assert tokenizer.decode(pair.prompt).count("same") == 1, "expected the shared turns in the prompt"
    for name, one in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        trained = [token for token, wanted in zip(one.tokens, one.mask, strict=True) if wanted]
        found = tokenizer.decode(trained, False)
        assert found == f"{name} 1<|im_end|>{name} 2<|im_end|>", f"expected {name}'s turns, got {found}"
        assert one.mask[-1], "expected to end with the turn"
    text = {"prompt": "p", "chosen": "a", "rejected": "b"}
    (pair,), _ = module.preferences([text], tokenizer, max_length=20)
    assert pair.chosen.tokens[-1] == tokenizer.eos_id, "expected an end token"
    judged, _ = module.judged_completions([text], tokenizer, max_length=20)
    assert [one.label for one in judged] == [True, False], "expected chosen to be wanted"


# ---- policies

OF_TOKENS = "values in of_tokens)\n                            "
FIRST = "[: len(batch.positions)]\n"


def rl_config(module: ModuleType, place: Place, **changes: Any) -> Any:
    """A run of one step, with a reward that differs from sample to sample."""
    folder = place.output.parent
    rows = [{"prompt": row["prompt"]} for row in map(json.loads, place.data.read_text().splitlines())]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:8]))
    (folder / "rewards.py").write_text(
        "def odd(completion_ids, **_):\n    return [float(sum(i % 2 for i in ids)) for ids in completion_ids]\n"
    )
    common = {"model": place.model, "data": folder / "prompts.jsonl", "output": place.output, "device": "cpu"}
    common |= {"reward": (f"{folder}/rewards.py:odd",), "max_new_tokens": 6, "learning_rate": 1e-2}
    if hasattr(module, "value_loss"):
        common |= {"epochs_per_rollout": 1, "minibatches": 1}
    return module.Config(**{**common, "steps": 1, "prompts_per_step": 8, "group_size": 2, **changes})


def rl_micro_batches_change_nothing(module: ModuleType, place: Place) -> None:
    found = []
    for tokens in (10**6, 40):
        output = place.output / str(tokens)
        module.train(rl_config(module, place, micro_batch_tokens=tokens, output=output))
        found.append(metrics_of(output)[0])
    for name in {"loss", "policy_loss", "value_loss", "grad_norm", "value_grad_norm"} & set(found[0]):
        same(found[0][name], found[1][name], 1e-4)


def rewards_and_values_of_tokens(module: ModuleType, place: Place) -> None:
    """PPO's score stands on the last token, k1 on each; half of the larger square; the controller's direction."""
    k1, lengths = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.0, 0.0]]), torch.tensor([3, 1])
    found = module.token_rewards(torch.tensor([1.0, 2.0]), k1, lengths, 0.5)
    for a, b in zip(found.flatten().tolist(), [-0.05, -0.1, 0.85, 1.8, 0, 0], strict=True):
        same(a, b)
    value, old, returns = torch.tensor([1.0, 0.1, -1.0]), torch.zeros(3), torch.ones(3)
    same(module.value_loss(value, old, returns, 2, 0.2).item(), (0.64 + 0.81 + 4.0) / 4)
    same(module.adapted(0.1, 6.6, 6.0, 100, 1000), 0.1 * 1.01)


def returns_are_those_before_whitening(module: ModuleType, place: Place) -> None:
    """With gamma = lambda = 1 every token's return is the score, and the advantages have mean 0 and variance 1."""
    cfg = rl_config(module, place, gae_lambda=1.0)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    reward = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, -2.0]])
    advantage, returns = module.ADVANTAGES[cfg.advantage](cfg, reward, torch.randn(2, 3) * mask, mask)
    for a, b in zip(returns[mask].tolist(), [1.0, 1.0, -2.0, -2.0, -2.0], strict=True):
        same(a, b)
    same(advantage[mask].mean().item(), 0)
    same(advantage[mask].var(correction=0).item(), 1, 1e-4)


def ppo_starts_on_policy(module: ModuleType, place: Place) -> None:
    module.train(rl_config(module, place, missing_end_penalty=0.7, temperature=1.4))
    (line,) = metrics_of(place.output)
    same(line["first_ratio"], 1)
    same(line["kl"], 0)
    same(line["mismatch"], 0, 1e-4)
    assert 0 <= line["ended"] < 1, "expected samples without an end"
    same(line["reward"], line["score"] - 0.7 * (1 - line["ended"]), 1e-4)


def the_policy_leaves_its_reference(module: ModuleType, place: Place) -> None:
    module.train(rl_config(module, place, steps=2, kl_coefficient=0.05))
    first, second = metrics_of(place.output)
    same(first["kl"], 0)
    assert second["kl"] > 1e-4, f"expected a distance from the start, got {second['kl']}"


def the_score_is_read_at_the_end(module: ModuleType, place: Place) -> None:
    """Of a reward model, of rows of their own."""
    scorer, folder = load_scalar_model(place.model, seed=3), place.output.parent / "scorer"
    save_model(scorer, folder, Tokenizer.load(place.model))
    seen, measure = [], module.measure
    module.measure = lambda cfg, groups, models: seen.append(groups) or measure(cfg, groups, models)
    module.train(rl_config(module, place, reward=(), reward_model=folder))
    rows = [group.prompt + one.tokens for group in seen[0] for one in group.samples]
    scores = [scorer.values(pack([row]), torch.tensor([len(row) - 1])).item() for row in rows]
    same(metrics_of(place.output)[0]["score"], sum(scores) / len(scores))


def a_stopped_run_goes_on(module: ModuleType, place: Place) -> None:
    """With all that it had: what the third step logs is what it would have logged."""
    make = rl_config if module.__name__.endswith("ppo") else distill_config
    flags = {"kl_target": 0.01, "kl_horizon": 10} if make is rl_config else {}
    whole = make(module, place, steps=3, save_every=2, output=place.output / "whole", **flags)
    module.train(whole)
    cut = dataclasses.replace(whole, steps=2, output=place.output / "cut")
    module.train(cut)
    module.train(dataclasses.replace(cut, steps=3, resume=True))
    one, other = metrics_of(whole.output)[2], metrics_of(cut.output)[2]
    for name in one:
        if "second" not in name and isinstance(one[name], float):
            same(one[name], other[name], 0)


def a_stopped_run_of_it_goes_on(module: ModuleType, place: Place) -> None:
    """Of distillation, within the module's Run."""
    distill = algorithm("distill")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distill, "Run", module.Run)
        a_stopped_run_goes_on(distill, place)


def grpo_starts_on_policy(module: ModuleType, place: Place) -> None:
    """The sum of A n / N, which with the paper's denominator is 0; then two updates on one rollout."""
    flags = {"aggregation": "sequence_mean", "kl_coefficient": 0.1, "temperature": 1.4}
    module.train(rl_config(module, place, **flags))
    (line,) = metrics_of(place.output)
    for name, expected in (("loss", 0), ("kl", 0), ("ratio", 1), ("mismatch", 0)):
        same(line[name], expected)
    assert line["grad_norm"] > 1e-3, "expected a gradient"
    module.train(rl_config(module, place, updates_per_rollout=2, output=place.output / "two"))
    ratio = metrics_of(place.output / "two")[0]["ratio"]
    assert abs(ratio - 1) > 1e-4, f"expected a ratio off 1 in a second update, got {ratio}"


def unjudged_samples_leave_the_denominator(module: ModuleType, place: Place) -> None:
    seen, objective = [], module.objective
    module.objective = lambda cfg, terms: seen.append(terms) or objective(cfg, terms)
    module.train(rl_config(module, place, mask_truncated=True, temperature=1.3, prompts_per_step=8, steps=6))
    assert seen, "expected samples that ended"
    for terms in seen:
        assert terms.lengths.sum() == len(terms.logprob), "expected whole samples"
        assert (terms.denominator >= len(terms.logprob)).all(), "expected the step's tokens"
    line = metrics_of(place.output)[0]
    counted = seen[0].denominator[0].item()
    assert counted < line["tokens"], f"expected fewer than all {line['tokens']} tokens, got {counted}"


def policy_losses_have_their_values(module: ModuleType, place: Place) -> None:
    """By hand, for each side of the clip and each sign of the advantage; gradients where the loss stops one."""
    ratio, advantage = torch.tensor([0.5, 0.5, 1.5, 1.5]), torch.tensor([1.0, -1.0, 1.0, -1.0])
    logprob, zero = ratio.log().requires_grad_(), torch.zeros(4)
    grad = lambda loss: torch.autograd.grad(loss, logprob)[0].tolist()

    def agree(loss: torch.Tensor, value: float, gradient: list[float]) -> None:
        same(loss.item(), value)
        for found, expected in zip(grad(loss), gradient, strict=True):
            same(found, expected)

    clip = (0.2, 0.28)
    agree(
        module.clipped_loss(logprob, zero, advantage, 2, *clip)[0],
        -(0.5 - 0.8 + 1.28 - 1.5) / 2,
        [-0.25, 0, 0, 0.75],
    )
    dual = module.clipped_loss(logprob, zero, advantage, 1, *clip, 1.3)[0]
    agree(dual, -(0.5 - 0.8 + 1.28 - 1.3), [-0.5, 0, 0, 0])
    weighed = sum(
        w * a * x for w, a, x in zip([0.5, 0.5, 1.4, 1.4], advantage.tolist(), logprob.tolist(), strict=True)
    )
    cispo = module.cispo_loss(logprob, zero, advantage, 1, clip_high=0.4)[0]
    agree(cispo, -weighed, [-0.5, 0.5, -1.4, 1.4])
    mean = (0.5 * 1.5) ** 0.5
    gspo = module.gspo_loss(logprob, zero, torch.ones(4), torch.tensor([2, 2]), 4, 0.6, 1.0)[0]
    agree(gspo, -(0.5 + 0.5 + 1.5 + 1.5) / 4, [-0.125, -0.125, -0.375, -0.375])
    mixed = module.gspo_loss(logprob[1:3], zero[:2], torch.ones(2), torch.tensor([2]), 2, 0.6, 1.0)[0]
    same(mixed.item(), -mean)
    far = module.clipped_loss(torch.tensor([0.0]), torch.tensor([-1e4]), torch.tensor([-1.0]), 1.0)[0]
    assert far.isfinite(), "expected a bounded weight"
    old = torch.tensor([0.5, 2.5]).log()
    assert module.truncated_weights(old, zero[:2], 2.0).tolist() == [0.5, 2], "expected weights of 0.5 and 2"
    assert module.masked_weights(old, zero[:2], 2.0).tolist() == [0.5, 0], "expected weights of 0.5 and 0"


def kl_losses_have_their_values(module: ModuleType, place: Place) -> None:
    """By hand, with a reference that finds all tokens sure."""
    ratio = torch.tensor([0.5, 0.5, 1.5, 1.5])
    logprob, zero = ratio.log().requires_grad_(), torch.zeros(4)

    def agree(loss: torch.Tensor, value: float, gradient: list[float]) -> None:
        same(loss.item(), value)
        for found, expected in zip(torch.autograd.grad(loss, logprob)[0].tolist(), gradient, strict=True):
            same(found, expected)

    d = [math.log(x) for x in ratio.tolist()]
    k3 = [math.exp(-x) + x - 1 for x in d]
    agree(module.k2_loss(logprob, zero, 1)[0], sum(x * x for x in d) / 2, d)
    agree(module.k3_loss(logprob, zero, 1)[0], sum(k3), [1 - math.exp(-x) for x in d])
    same(
        module.rho_k3_loss(logprob, zero, zero, 2)[0].item(),
        sum(r * k for r, k in zip(ratio.tolist(), k3, strict=True)) / 2,
    )


def advantages_have_their_values(module: ModuleType, place: Place) -> None:
    rewards = torch.tensor([[0.0, 1.0, 1.0, 1.0], [3.0, 3.0, 3.0, 3.0]])
    for function, expected in (
        (lambda r: module.group_advantages(r, 0.0)[:1], [-1.5, 0.5, 0.5, 0.5]),
        (lambda r: module.group_advantages(r)[1:], [0, 0, 0, 0]),
        (lambda r: module.mean_advantages(r)[:1], [-0.75, 0.25, 0.25, 0.25]),
        (lambda r: module.rloo_advantages(r)[:1], [-1, 1 / 3, 1 / 3, 1 / 3]),
    ):
        for a, b in zip(function(rewards)[0].tolist(), expected, strict=True):
            same(a, b)
    mask = torch.tensor([[True, True, False, True, False]])
    r, v = torch.tensor([[0.1, 0.2, 9.0, 1.0, 9.0]]), torch.tensor([[0.3, -0.2, 9.0, 0.5, 9.0]])
    d = [0.1 + 0.9 * -0.2 - 0.3, 0.2 + 0.9 * 0.5 + 0.2, 1.0 - 0.5]
    expected = [d[0] + 0.72 * d[1] + 0.72**2 * d[2], d[1] + 0.72 * d[2], 0, d[2], 0]
    for a, b in zip(module.gae(r, v, mask, 0.9, 0.8)[0].tolist(), expected, strict=True):
        same(a, b)
    whitened, scaled = module.whiten(r, mask), module.scale(r, mask)
    same(whitened[mask].mean().item(), 0)
    same(whitened[mask].var(correction=0).item(), 1, 1e-4)
    same((scaled[mask] / r[mask]).std().item(), 0)
    same(scaled[mask].var(correction=0).item(), 1, 1e-4)
    assert not whitened[~mask].any() and not scaled[~mask].any(), "expected nothing off the mask"


def denominators_have_their_values(module: ModuleType, place: Place) -> None:
    lengths, values = torch.tensor([1, 4]), torch.tensor([10.0, 1.0, 2.0, 3.0, 6.0])
    for denominators, expected in (
        (module.token_mean(lengths), 22 / 5),
        (module.sequence_mean(lengths), (10 + 3) / 2),
        (module.constant_length(lengths, 8), 22 / 16),
    ):
        same((values / denominators.repeat_interleave(lengths)).sum().item(), expected)


def the_sampler_is_the_scorer(module: ModuleType, place: Place) -> None:
    """Under truncation and a temperature, over all sampled tokens; values and scores stand where they should."""
    model, tokenizer = load_model(place.model), Tokenizer.load(place.model)
    prompts = [Prompt(tokenizer.encode(text), text, {}) for text in ("1+2+3=", "4+5+6=")]
    drawn = generate(
        model,
        [prompt.tokens for prompt in prompts],
        samples_per_prompt=4,
        max_new_tokens=6,
        temperature=0.7,
        top_k=9,
        stop_ids=tokenizer.stop_ids,
    )
    groups = Groups(Group(prompts[i], drawn[4 * i : 4 * i + 4], torch.zeros(4)) for i in range(2))
    lengths, tokens = groups.lengths, [token for sample in drawn for token in sample.tokens]
    whole = module.make_split_batches(groups, torch.ones(8, dtype=torch.bool), 10**6, "cpu")
    assert len(whole) == 1, "expected one micro-batch"
    assert whole[0].packed.tokens[whole[0].rows].tolist() == tokens, "expected every sampled token"
    parents = whole[0].packed.parents
    assert parents is not None, "expected parents"
    assert parents.tolist() == [-1, 0, 0, 0, 0, -1, 5, 5, 5, 5], "expected samples under their prompts"
    real = torch.arange(int(lengths.max())) < lengths[:, None]
    sampled = module.over_tokens(model, whole, lambda batch, _: batch.sampled_logprob, real)
    cut = module.make_split_batches(groups, torch.ones(8, dtype=torch.bool), 14, "cpu")
    assert len(cut) > 2, "expected several micro-batches"
    for batches in (whole, cut):
        found = module.over_tokens(model, batches, lambda batch, policy: batch.score(policy, 0.7)[0], real)
        off = (found - sampled).abs().max().item()
        assert off < 1e-5, f"expected the sampler's log-probabilities, got one {off} away"
    scorer = load_scalar_model(place.model, seed=3)
    score, value = (
        module.over_tokens(scorer, whole, function, real)
        for function in (module.Batch.token_scores, module.Batch.values)
    )
    row = pack([prompts[0].tokens + drawn[0].tokens])
    at = torch.arange(len(prompts[0].tokens), row.tokens.numel())
    n = len(drawn[0].tokens)
    assert (score[0, :n] - scorer.values(row, at)).abs().max() < 1e-5, (
        "expected scores of what ends with a token"
    )
    assert (value[0, :n] - scorer.values(row, at - 1)).abs().max() < 1e-5, (
        "expected values of what stands before it"
    )


# ---- supervised fine-tuning and distillation


def distill_config(module: ModuleType, place: Place, **changes: Any) -> Any:
    folder = place.output.parent
    rows = [json.loads(line) for line in place.data.read_text().splitlines()]
    texts = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    common = {"model": place.model, "data": folder / "texts.jsonl", "output": place.output, "device": "cpu"}
    if hasattr(module, "divergence_loss"):
        common |= {"teacher": teacher_of(place)}
    flags = {"steps": 1, "batch_size": 5, "learning_rate": 1e-2, "warmup_steps": 0, "schedule": "constant"}
    return module.Config(**{**common, **flags, **changes})


def teacher_of(place: Place) -> Path:
    folder = place.output.parent / "teacher"
    if not folder.exists():
        config = dataclasses.replace(load_model(place.model).config, initializer_range=0.3)
        save_model(Transformer(config, seed=7), folder, Tokenizer.load(place.model))
    return folder


def one_step_is_one_sum(module: ModuleType, place: Place) -> None:
    """However it is cut up, on its rows or on the student's own samples."""
    own = {"student_samples": 1.0, "max_new_tokens": 6} if hasattr(module, "divergence_loss") else {}
    for i, flags in enumerate([{}, own]):
        found = []
        for tokens in (10**6, 20):
            output = place.output / f"{i}-{tokens}"
            module.train(distill_config(module, place, micro_batch_tokens=tokens, output=output, **flags))
            found.append(metrics_of(output)[0])
        for name in ("loss", "grad_norm"):
            same(found[0][name], found[1][name], 1e-4)


def sft_losses_have_their_values(module: ModuleType, place: Place) -> None:
    logprob = torch.tensor([-0.5, -1.0, -2.0], requires_grad=True)
    same(module.sft_loss(logprob, 4).item(), 3.5 / 4)
    (gradient,) = torch.autograd.grad(module.dft_loss(logprob, 4), logprob)
    for found, x in zip(gradient.tolist(), (-0.5, -1.0, -2.0), strict=True):
        same(found, -math.exp(x) / 4)


def the_divergence_is_that_of_the_models(module: ModuleType, place: Place) -> None:
    """Of their whole distributions over each token of the completions, written out."""
    student, teacher, tokenizer = (
        load_model(place.model),
        load_model(teacher_of(place)),
        Tokenizer.load(place.model),
    )
    for i, (beta, temperature, squared) in enumerate(
        [(0.0, 1.0, False), (1.0, 2.0, True), (0.3, 2.0, False)]
    ):
        output = place.output / str(i)
        cfg = distill_config(
            module,
            place,
            beta=beta,
            temperature=temperature,
            temperature_squared=squared,
            batch_size=12,
            output=output,
        )
        module.train(cfg)
        total, count = 0.0, 0
        for row in map(json.loads, cfg.data.read_text().splitlines()):
            given = tokenizer.encode(row["prompt"])
            tokens = given + tokenizer.encode(row["completion"], continues=True) + [tokenizer.eos_id]
            packed = pack([tokens])
            log_s, log_t = (
                (model.logits(model(packed))[len(given) - 1 : -1] / temperature).log_softmax(-1)
                for model in (student, teacher)
            )
            if beta in (0, 1):
                one, other = (log_t, log_s) if beta == 0 else (log_s, log_t)
                found = one.exp() * (one - other)
            else:
                log_m = (beta * log_t.exp() + (1 - beta) * log_s.exp()).log()
                found = beta * log_t.exp() * (log_t - log_m) + (1 - beta) * log_s.exp() * (log_s - log_m)
            total, count = total + found.sum().item(), count + len(log_s)
        same(metrics_of(output)[0]["loss"], total / count * (temperature**2 if squared else 1), 1e-5)


def the_gradient_points_to_the_teacher(module: ModuleType, place: Place) -> None:
    logprob, teacher = torch.tensor([-1.0, -3.0], requires_grad=True), torch.tensor([-2.0, -1.0])
    loss = module.policy_gradient_loss(logprob, teacher, 4)
    same(loss.item(), (1.0 - 2.0) / 4)
    for found, expected in zip(torch.autograd.grad(loss, logprob)[0].tolist(), (0.25, -0.5), strict=True):
        same(found, expected)
    same(module.sequence_loss(logprob, 4).item(), 1.0)


def the_share_of_own_samples_is_kept(module: ModuleType, place: Place) -> None:
    module.train(distill_config(module, place, student_samples=0.5, max_new_tokens=1, batch_size=1, steps=20))
    share = sum(line["student_samples"] for line in metrics_of(place.output)) / 20
    assert 0.2 < share < 0.8, f"expected about half of the steps on own samples, got {share}"


def lessons_are_what_they_should_be(module: ModuleType, place: Place) -> None:
    """Answers behind their prompts, trained to the end token; trained tokens beside what was stored for them."""
    model, tokenizer = load_model(place.model), Tokenizer.load(place.model)
    prompts = [tokenizer.encode("1+2+3="), tokenizer.encode("4+5=")]
    lessons, ended = module.answered(model, tokenizer, prompts, SamplingFlags(max_new_tokens=30), seed=0)
    assert ended > 0, "expected an end"
    for lesson, prompt in zip(lessons, prompts, strict=True):
        assert lesson.prefix == prompt, "expected the prompt"
        assert all(lesson.mask[len(prompt) :]), "expected all of the answer, and its end, to be trained"
    ids = torch.arange(6).view(3, 2).int()
    stored = [
        module.Lesson([1, 2, 3], [False, True, True], ids[:2], -ids[:2].float()),
        module.Lesson([4, 5], [False, True], ids[2:], -ids[2:].float()),
    ]
    file = place.output.with_suffix(".safetensors")
    module.write_lessons(file, stored, tokenizer, 1.0)
    back = module.read_lessons(file, tokenizer, 1.0)
    (one,) = make_batches(back, 100, "cpu")
    assert one.packed.tokens[one.rows].tolist() == [2, 3, 5], "expected the trained tokens"
    assert one.teacher_ids.tolist() == ids.tolist(), "expected what was stored"
    assert one.teacher_logprobs.tolist() == (-ids).tolist(), "expected what was stored"


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
        late = "call 1: expected to return within 0.15 s (--reward-timeout), it did not"
        assert found == late, f"expected its time to be over, got {found}"
    found = ended([lambda: [3, 4]])
    assert "expected 1 numbers" in found, f"expected the wrong count to be named, got {found}"


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


class Fault(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    check: Callable[[ModuleType, Place], None]


PREFERENCE, PAIRS, BATCH = "objectives.preference", "data.pairs", "run.batch"
VALUES = {
    PREFERENCE: pair_losses_have_their_values,
    "reward": reward_losses_have_their_values,
    "kto": kto_has_its_value,
}
LAID, READ = pairs_lie_as_they_should, rows_are_read_as_they_should
CUT, START = micro_batches_change_nothing, the_first_scores_are_zero
FAULTS = [
    *(
        Fault(name, file, old, new, VALUES[file])
        for name, file, old, new in [
            (
                "sign of h",
                PREFERENCE,
                "F.logsigmoid(beta * (chosen - rej",
                "F.logsigmoid(-beta * (chosen - rej",
            ),
            ("beta dropped", PREFERENCE, "F.logsigmoid(beta * (chosen", "F.logsigmoid((chosen"),
            ("mean of a micro-batch", PREFERENCE, ".sum() / num_pairs", ".mean()"),
            (
                "labels the other way",
                PREFERENCE,
                "((1 - label_smoothing) * F.logs",
                "(label_smoothing * F.logs",
            ),
            ("biased", PREFERENCE, " / (1 - 2 * label_smoothing)", ""),
            ("IPO's target", PREFERENCE, "1 / (2 * beta)", "1 / beta"),
            ("hinge at 0", PREFERENCE, "relu(1 - beta", "relu(-beta"),
            (
                "APO's rejected",
                PREFERENCE,
                "+ torch.sigmoid(beta * rejected)",
                "- torch.sigmoid(beta * rejected)",
            ),
            ("APO's chosen", PREFERENCE, "(torch.sigmoid(beta * chosen) + 1", "(1"),
            ("SimPO's margin", PREFERENCE, " - gamma)", ")"),
            ("odds are not p", PREFERENCE, "score - torch.log(-torch.expm1(score))", "score"),
            ("margin dropped", "reward", "chosen - rejected - margin", "chosen - rejected"),
            ("difference centred", "reward", "(chosen + rejected)", "(chosen - rejected)"),
            ("KL's sign", "kto", "log_ratio - kl, kl - log_ratio", "log_ratio + kl, kl - log_ratio"),
            ("weights swapped", "kto", "wanted, wanted_weight, unwanted", "~wanted, wanted_weight, unwanted"),
        ]
    ),
    Fault("step's denominator", "dpo", "rejected, len(rows), **", "rejected, len(batch.members), **", CUT),
    Fault("step's denominator", "reward", "margin, len(rows))", "margin, len(batch.members))", CUT),
    Fault("step's denominator", "kto", "kl, len(rows), cfg", "kl, len(batch.members), cfg", CUT),
    Fault("another's reference", "dpo", "in members], reference[members]", "in members], reference", START),
    Fault("another's reference", "kto", "in members], reference[members]", "in members], reference", START),
    Fault(
        "reference moves", "dpo", "ref = ref", "ref = logprob.detach().cpu() + 0 * ref", the_reference_stays
    ),
    Fault("shifted up", "reward", "model.bias -=", "model.bias +=", chosen_scores_average_zero),
    Fault("rejected at 0", "reward", "[:, 0].mean()", "[:, 1].mean()", chosen_scores_average_zero),
    *(
        Fault(name, BATCH, old, new, LAID)
        for name, old, new in [
            ("prompt not seen", "parents.append(parent)", "parents.append(-1)"),
            ("score before the end", "last.append(len(trained) - 1)", "last.append(len(trained) - 2)"),
            ("mask ignored", "extend(completion.mask)", "extend([True] * len(completion.mask))"),
        ]
    ),
    *(
        Fault(name, PAIRS, old, new, READ)
        for name, old, new in [
            ("users' turns trained", "mask[len(prompt) : end])", "[True] * (end - len(prompt)))"),
            ("past the end", "if trained) + 1", "if trained) + 2"),
            ("last turn alone", "turns=talk.trained,", "turns=talk.trained[-1:],"),
            ("rejected is wanted", "Judged(prompt, rejected, False)", "Judged(prompt, rejected, True)"),
        ]
    ),
    *(
        Fault(name, file, old, new, check)
        for file, check, cases in [
            (
                "ppo",
                rewards_and_values_of_tokens,
                [
                    (
                        "score one early",
                        "lengths[:, None] - 1, score",
                        "(lengths[:, None] - 2).clamp(0), score",
                    ),
                    ("KL paid out", "(-kl_coefficient * k1)", "(kl_coefficient * k1)"),
                    ("not half", "(2 * denominator)", "denominator"),
                    ("smaller square", "torch.max((value", "torch.min((value"),
                    ("adapted away", "kl / target - 1", "1 - kl / target"),
                ],
            ),
            (
                "ppo",
                returns_are_those_before_whitening,
                [("whitened returns", "advantage + value  #", "whiten(advantage, mask) + value  #")],
            ),
            (
                "ppo",
                ppo_starts_on_policy,
                [
                    (
                        "reference at another temperature",
                        "models.reference, batches, scored,",
                        "models.reference, batches, lambda b, m: torch.stack(b.score(m, 1.0)),",
                    ),
                    (
                        "trained at another temperature",
                        "batch.score(policy.model, cfg.temperature)",
                        "batch.score(policy.model, 1.0)",
                    ),
                    ("ended ones pay", "* ~groups.ended", "* groups.ended"),
                    ("paid for no end", "rollout.score - cfg", "rollout.score + cfg"),
                ],
            ),
            (
                "ppo",
                rl_micro_batches_change_nothing,
                [
                    ("minibatch's denominator", "A, N, *clips", "A, len(A), *clips"),
                    ("critic's denominator", "R, N, cfg.value_clip", "R, len(R), cfg.value_clip"),
                    ("another's advantage", "values in of_tokens)\n", f"{OF_TOKENS}A = of_tokens[1]{FIRST}"),
                    (
                        "another's value",
                        "values in of_tokens)\n",
                        f"{OF_TOKENS}old_value = of_tokens[2]{FIRST}",
                    ),
                ],
            ),
            ("ppo", the_policy_leaves_its_reference, [("reference moves", "frozen_copy(model)", "model")]),
            (
                "ppo",
                the_score_is_read_at_the_end,
                [
                    (
                        "read one early",
                        "lengths[:, None] - 1).squeeze",
                        "(lengths[:, None] - 2).clamp(0)).squeeze",
                    )
                ],
            ),
            (
                "ppo",
                a_stopped_run_goes_on,
                [
                    (
                        "critic not kept",
                        ", critic=critic) as run:\n",
                        ") as run:\n        critic and critic.start()\n",
                    ),
                    (
                        "beta not kept",
                        'values.setdefault("kl_coefficient", ',
                        'values.__setitem__("kl_coefficient", ',
                    ),
                    ("rows from the start", "in run.next(", "in run.values.update(draws=0) or run.next("),
                ],
            ),
            (
                "grpo",
                grpo_starts_on_policy,
                [
                    ("tokens weigh alike", "lengths, _: sequence_mean(", "lengths, _: token_mean("),
                    (
                        "reference at another temperature",
                        "logprobs(reference, cfg.temperature)",
                        "logprobs(reference, 1.0)",
                    ),
                    (
                        "trained at another temperature",
                        "batch.score(model, cfg.temperature)",
                        "batch.score(model, 1.0)",
                    ),
                    (
                        "always on policy",
                        "logprob, old_logprobs[i], batch",
                        "logprob, logprob.detach(), batch",
                    ),
                ],
            ),
            (
                "grpo",
                rl_micro_batches_change_nothing,
                [("mean of a micro-batch", "batch.per_token(denominator)", "float(len(logprob))")],
            ),
            ("grpo", the_policy_leaves_its_reference, [("reference moves", "frozen_copy(model)", "model")]),
            (
                "grpo",
                unjudged_samples_leave_the_denominator,
                [
                    (
                        "all tokens count",
                        "denominator[counts] = DENOMINATORS[cfg.aggregation](groups.lengths[counts],",
                        "denominator = DENOMINATORS[cfg.aggregation](groups.lengths,",
                    )
                ],
            ),
            (
                "objectives.policy",
                policy_losses_have_their_values,
                [
                    ("the larger term", "torch.min(bounded * adv", "torch.max(bounded * adv"),
                    (
                        "no lower clip",
                        "ratio.clamp(1 - clip_low, 1 + clip_high)  # PPO",
                        "ratio.clamp(max=1 + clip_high)  # PPO",
                    ),
                    ("no dual clip", "bounded = ratio.clamp(max=dual_clip)", "bounded = ratio"),
                    ("unbounded weights", "log_ratio.clamp(-20, 20).exp()", "log_ratio.exp()"),
                    (
                        "weight has a gradient",
                        "ratio = bounded_exp((logprob - old_logprob).detach())",
                        "ratio = bounded_exp(logprob - old_logprob)",
                    ),
                    ("no upper clip", "weight = ratio.clamp(max=1 + clip_high)", "weight = ratio"),
                    ("sum for mean", '"mean", **per', '"sum", **per'),
                    ("no cap", "sampled_logprob).clamp(max=cap)", "sampled_logprob)"),
                    ("kept beyond the cap", "weight > cap", "weight < 0"),
                ],
            ),
            (
                "objectives.kl",
                kl_losses_have_their_values,
                [
                    ("not half", ".square() / 2", ".square()"),
                    ("k3 mirrored", "(-log_ratio).exp() + log_ratio", "log_ratio.exp() - log_ratio"),
                    ("rho dropped", "bounded_exp(logprob - old_logprob) * _k3", "1.0 * _k3"),
                ],
            ),
            (
                "run.calls",
                calls_are_awaited_and_timed,
                [
                    ("not awaited", "    if waiting:", "    if False:"),
                    ("no limit", "signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)", "pass"),
                    ("no limit on async ones", "wait([future], seconds).done", "wait([future]).done"),
                    ("any count", "if len(entries) != call.count:", "if False:"),
                ],
            ),
            (
                "data.functions",
                functions_are_called_as_documented,
                [
                    ("edits are seen", "copy.deepcopy(value)", "value"),
                    ("None is 0", "        return math.nan\n", "        return 0.0\n"),
                    ("the last call alone", ".setdefault(name, []).append(number)", "[name] = [number]"),
                    ("all arguments", "is None or _takes_all(", "is None or not _takes_all("),
                    (
                        "unhashable answers",
                        "for entry in value)\n    raise ValueError",
                        "for entry in value)\n    return value",
                    ),
                ],
            ),
            (
                "objectives.advantages",
                advantages_have_their_values,
                [
                    ("ddof 0", "(judged - 1).clamp(min=1)).sqrt()", "judged).sqrt()"),
                    (
                        "no baseline",
                        "centred = rewards - rewards.nanmean(dim=1, keepdim=True)",
                        "centred = rewards",
                    ),
                    ("mean over all", "_centred(rewards) * judged / ", "_centred(rewards) * (judged - 1) / "),
                    ("no lambda", "gamma * lam * advantage", "gamma * advantage"),
                    ("no discount", "+ gamma * value", "+ value"),
                    ("tool's values read", "torch.where(mask[:, t], values[:, t], value)", "values[:, t]"),
                    ("padding whitened in", "real = values[mask]", "real = values"),
                    ("padding scaled in", "values[mask].var", "values.var"),
                ],
            ),
            (
                "objectives.denominators",
                denominators_have_their_values,
                [
                    (
                        "mean of a sequence",
                        "lengths.sum().float().expand(lengths.shape[0])",
                        "lengths.float()",
                    ),
                    ("sum of means", "(lengths * lengths.shape[0])", "lengths"),
                    ("not the cap", "float(lengths.shape[0] * max_length)", "float(lengths.sum())"),
                ],
            ),
            (
                "run.batch",
                the_sampler_is_the_scorer,
                [
                    ("whole vocabulary", '"support": self.support', '"support": None'),
                    (
                        "another temperature",
                        "temperature=temperature, **drawn_from",
                        "temperature=1.0, **drawn_from",
                    ),
                    (
                        "end not trained",
                        "is_trained.nonzero().squeeze(1).to",
                        "is_trained.nonzero().squeeze(1)[:-1].to",
                    ),
                    ("prompt not seen", "parents.append(parent)", "parents.append(-1)"),
                    (
                        "value of the next state",
                        "critic.values(self.packed, self.packed.predictors[self.rows])",
                        "critic.values(self.packed, self.rows)",
                    ),
                    (
                        "score one early",
                        "reward_model.values(self.packed, self.rows)",
                        "reward_model.values(self.packed, self.packed.predictors[self.rows])",
                    ),
                    (
                        "laid in order",
                        "nonzero().squeeze(1)[positions]",
                        "nonzero().squeeze(1)[positions.sort(descending=True).values]",
                    ),
                ],
            ),
            (
                "sft",
                sft_losses_have_their_values,
                [
                    ("mean of a micro-batch", "-logprob.sum() / num_tokens", "-logprob.mean()"),
                    ("weight has a gradient", "logprob.detach().exp()", "logprob.exp()"),
                ],
            ),
            (
                "sft",
                one_step_is_one_sum,
                [("step's denominator", "(logprob, batches.num_trained)\n", "(logprob, len(logprob))\n")],
            ),
            (
                "distill",
                the_divergence_is_that_of_the_models,
                [
                    ("beta ignored", "cfg.beta or 0.0", "0.0"),
                    ("the other KL", "cfg.beta or 0.0", "1 - (cfg.beta or 0.0)"),
                    (
                        "temperature ignored",
                        "teacher_head, beta=cfg.beta or 0.0, temperature=cfg.temperature",
                        "teacher_head, beta=cfg.beta or 0.0",
                    ),
                    (
                        "squared unasked",
                        "cfg.temperature**2 if cfg.temperature_squared else 1.0",
                        "cfg.temperature**2",
                    ),
                    ("not squared", "scale * divergence.sum()", "divergence.sum()"),
                ],
            ),
            (
                "distill",
                one_step_is_one_sum,
                [("step's denominator", "batch, batches.num_trained)\n", "batch, batch.rows.numel())\n")],
            ),
            (
                "distill",
                the_gradient_points_to_the_teacher,
                [
                    (
                        "away from the teacher",
                        "teacher_logprob - logprob.detach()",
                        "logprob.detach() - teacher_logprob",
                    ),
                    ("mean of a micro-batch", "advantage, num_tokens)[0]", "advantage, len(advantage))[0]"),
                    ("mean of a sequence", "-logprob.sum() / num_tokens", "-logprob.mean()"),
                ],
            ),
            (
                "distill",
                the_share_of_own_samples_is_kept,
                [
                    ("never", "random() < cfg.student_samples", "random() < 0"),
                    ("one coin for all", "random.Random(seed)", "random.Random(cfg.seed)"),
                ],
            ),
            (
                "run.loop",
                a_stopped_run_of_it_goes_on,
                [("rows from the start", 'skip=self.values.get("draws", self.start)', "skip=0")],
            ),
            (
                "data.lessons",
                lessons_are_what_they_should_be,
                [
                    (
                        "end not trained",
                        "[True] * len(sample.tokens)",
                        "[True] * (len(sample.tokens) - 1) + [False]",
                    ),
                    (
                        "prompt trained",
                        "[False] * len(prompt) + [True]",
                        "[False] + [True] * (len(prompt) - 1) + [True]",
                    ),
                    ("first token given", "self.mask.index(True)]", "self.mask.index(True) + 1]"),
                    (
                        "another's log-probabilities",
                        "logprobs.split(counts)",
                        "logprobs.flip(0).split(counts)",
                    ),
                ],
            ),
        ]
        for name, old, new in cases
    ),
]


@pytest.fixture
def place(model_folder, pairs, tmp_path) -> Place:
    rows = pairs.read_text().splitlines(keepends=True)[:12]
    pairs.write_text("".join(rows))
    return Place(model_folder, pairs, tmp_path / "out")


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f"{f.file}: {f.name}")
def test_fault_is_caught(fault: Fault, place: Place, tmp_path, monkeypatch):
    module = copy_of(algorithm(fault.file), tmp_path, monkeypatch, fault.old, fault.new)
    with pytest.raises(AssertionError, match="expected"):
        fault.check(module, place)


@pytest.mark.parametrize("file", sorted({f.file for f in FAULTS}))
def test_a_faithful_copy_passes(file: str, place: Place, tmp_path, monkeypatch):
    """Without this, a copy that does not even run would count as a fault caught."""
    module = copy_of(algorithm(file), tmp_path, monkeypatch)
    for i, check in enumerate(dict.fromkeys(f.check for f in FAULTS if f.file == file)):
        check(module, place._replace(output=tmp_path / f"out-{i}"))
