"""`burnish dpo` and `burnish kto`: the losses as formulas, the exact optimum, and what a step may not depend on."""

import dataclasses
import json
import math

import pytest
import torch
from burnish.algorithms import dpo, kto
from burnish.algorithms.__main__ import main
from burnish.algorithms.data.pairs import judged_completions, preferences
from burnish.algorithms.data.rows import read_rows
from burnish.algorithms.dpo import VARIANTS
from burnish.algorithms.kto import kto_loss
from burnish.algorithms.objectives.preference import cdpo_loss, dpo_loss, nll_loss
from burnish.algorithms.run.batch import Completion, make_batches, over_completions
from burnish.algorithms.run.order import epochs
from burnish.model import ModelConfig, Transformer, pack
from burnish.model.checkpoint import load_model
from burnish.model.errors import InputError
from burnish.model.text.tokenizer import Tokenizer

every_loss = pytest.mark.parametrize("name", VARIANTS)


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def loss_of(name, chosen, rejected, num_pairs):
    """A variant's loss with its flags' defaults; the NLL has a weight of its own."""
    flags = {flag: value for flag, value in VARIANTS[name].flags.items() if flag != "nll_weight"}
    return VARIANTS[name].loss(chosen, rejected, num_pairs, **flags)


def completion_logprobs(model, pairs, capacity):
    return over_completions(model, pairs, lambda batch: batch.completion_logprobs(model), capacity)


def log_ratios(count):
    return torch.randn(2, count, dtype=torch.float64)


def per_token_logprobs(count):
    return -torch.rand(2, count, dtype=torch.float64) * 3 - 0.1


@pytest.fixture
def cfg(model_folder, pairs, tmp_path):
    return dpo.Config(
        model=model_folder,
        data=pairs,
        output=tmp_path / "out",
        steps=3,
        batch_size=12,
        learning_rate=1e-2,
        warmup_steps=0,
        device="cpu",  # fp32 throughout
    )


# ---- the losses


def test_values_by_hand():
    chosen, rejected = torch.tensor([1.0]), torch.tensor([-0.5])  # h = 1.5
    sigmoid = lambda x: 1 / (1 + math.exp(-x))
    odds = lambda score: math.exp(score) / (1 - math.exp(score))
    smooth = -0.8 * math.log(sigmoid(0.75)) - 0.2 * math.log(sigmoid(-0.75))
    robust = (-0.8 * math.log(sigmoid(0.75)) + 0.2 * math.log(sigmoid(-0.75))) / 0.6

    for name, flags, expected in [
        ("dpo", {}, -math.log(sigmoid(0.75))),
        ("cdpo", {"label_smoothing": 0.2}, smooth),
        ("robust", {"label_smoothing": 0.2}, robust),
        ("hinge", {}, 0.25),
        ("ipo", {}, 0.25),
        ("apo_zero", {}, 1 - sigmoid(0.5) + sigmoid(-0.25)),
        ("apo_down", {}, sigmoid(0.5) + 1 - sigmoid(0.75)),
        ("simpo", {"gamma": 0.3}, -math.log(sigmoid(0.45))),
    ]:
        loss = VARIANTS[name].loss(chosen, rejected, 1, beta=0.5, **flags)
        assert loss.item() == pytest.approx(expected, rel=1e-6), name

    expected = -0.5 * math.log(sigmoid(math.log(odds(-0.4) / odds(-2.0))))
    orpo = VARIANTS["orpo"].loss(torch.tensor([-0.4]), torch.tensor([-2.0]), 1, beta=0.5)
    assert orpo.item() == pytest.approx(expected, rel=1e-6)

    wanted = torch.tensor([True, False])
    expected = (2 * (1 - sigmoid(0.4)) + 3 * (1 - sigmoid(0.35))) / 2
    found = kto_loss(torch.tensor([1.0, -0.5]), wanted, 0.2, 2, beta=0.5, wanted_weight=2, unwanted_weight=3)
    assert found.item() == pytest.approx(expected)


@every_loss
def test_gradients_by_finite_differences(name):
    chosen, rejected = per_token_logprobs(5) if name == "orpo" else log_ratios(5)
    inputs = (chosen.requires_grad_(), rejected.requires_grad_())
    assert torch.autograd.gradcheck(lambda a, b: loss_of(name, a, b, 5), inputs)


def test_ktos_gradient_by_finite_differences():
    ratio, wanted = log_ratios(5)[0].requires_grad_(), torch.tensor([True, False, True, False, False])
    assert torch.autograd.gradcheck(lambda r: kto_loss(r, wanted, 0.3, 5, 0.5, 1.5, 0.5), ratio)
    assert torch.autograd.gradcheck(lambda r: nll_loss(r, 5), ratio)


def test_dpos_gradient_is_the_papers():
    chosen, rejected = log_ratios(6)
    beta, h = 0.3, chosen - rejected
    to_chosen, to_rejected = torch.autograd.grad(
        dpo_loss(chosen.requires_grad_(), rejected.requires_grad_(), 6, beta), (chosen, rejected)
    )
    expected = -beta * torch.sigmoid(-beta * h) / 6
    torch.testing.assert_close(to_chosen, expected)
    torch.testing.assert_close(to_rejected, -expected)


@every_loss
def test_micro_batches_add_up_and_an_empty_one_is_zero(name):
    loss = lambda a, b, n: loss_of(name, a, b, n)
    chosen, rejected = per_token_logprobs(7)
    parts = loss(chosen[:2], rejected[:2], 7) + loss(chosen[2:], rejected[2:], 7)
    assert parts.item() == pytest.approx(loss(chosen, rejected, 7).item(), abs=1e-12)
    empty = torch.zeros(0, requires_grad=True)
    value = loss(empty, empty, 1)
    value.backward()
    assert value.item() == 0 and empty.grad is not None


@pytest.mark.parametrize("name", ["cdpo", "robust"])
def test_without_smoothing_they_are_dpo(name):
    chosen, rejected = log_ratios(5)
    loss = VARIANTS[name].loss(chosen, rejected, 5, beta=0.2, label_smoothing=0.0)
    assert loss.item() == pytest.approx(dpo_loss(chosen, rejected, 5, 0.2).item(), abs=1e-12)


def test_robust_is_unbiased():
    """Its mean over flipped and true labels is DPO's loss on the true ones; cDPO's is not."""
    chosen, rejected = log_ratios(5)
    expected = {}
    for name in ("robust", "cdpo"):
        loss = lambda a, b: VARIANTS[name].loss(a, b, 5, beta=0.2, label_smoothing=0.3).item()  # noqa: B023
        expected[name] = 0.7 * loss(chosen, rejected) + 0.3 * loss(rejected, chosen)
    truth = dpo_loss(chosen, rejected, 5, 0.2).item()
    assert expected["robust"] == pytest.approx(truth, abs=1e-9) and abs(expected["cdpo"] - truth) > 1e-3


@pytest.mark.parametrize("name, h", [("ipo", 5.0), ("cdpo", math.log(9) / 0.1)])
def test_where_the_bounded_losses_stop(name, h):
    """IPO at h = 1 / (2 beta), cDPO at sigmoid(beta h) = 1 - e: beyond it they pull back, which DPO never does."""
    chosen = torch.tensor([h, h + 0.1], requires_grad=True)
    loss = loss_of(name, chosen, torch.zeros(2), 1)
    (grad,) = torch.autograd.grad(loss, chosen)
    assert abs(grad[0]) < 1e-6 and grad[1] > 1e-6


def test_extreme_scores_stay_finite():
    for name, variant in VARIANTS.items():
        low, high = (-1e4, 0.0) if not variant.reference else (-1e4, 1e4)
        chosen = torch.tensor([low, high], requires_grad=True)
        loss = loss_of(name, chosen, chosen.detach().flip(0), 2)
        (grad,) = torch.autograd.grad(loss, chosen)
        assert loss.isfinite() and grad.isfinite().all(), name


# ---- the exact optimum


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_soft_labels_lead_to_the_known_optimum(seed):
    """16 completions, every pair with the probability that its first is preferred: pi = pi_ref e^(r / beta) / Z."""
    generator = torch.Generator().manual_seed(seed)
    beta, count = 0.5, 16
    rewards = torch.randn(count, generator=generator)
    ref = torch.log_softmax(torch.randn(count, generator=generator), 0)
    optimum = torch.log_softmax(ref + rewards / beta, 0)

    logits = ref.clone().requires_grad_()
    first, second = torch.combinations(torch.arange(count)).unbind(1)
    wrong = torch.sigmoid(rewards[second] - rewards[first])  # how often the second is preferred
    optimizer = torch.optim.Adam([logits], lr=0.05)
    kl = lambda: (optimum.exp() * (optimum - torch.log_softmax(logits, 0))).sum().item()
    start = kl()

    for _ in range(400):
        optimizer.zero_grad()
        ratio = torch.log_softmax(logits, 0) - ref
        cdpo_loss(ratio[first], ratio[second], len(first), beta, wrong).backward()
        optimizer.step()
    assert start > 0.3 and kl() < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_transformer_reaches_it_too(seed):
    """All 16 completions of two of four tokens, under one prompt, scored as `train` scores them."""
    config = ModelConfig(
        vocab_size=4, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    model = Transformer(config, seed=seed)
    with torch.no_grad():  # a reference that is far from uniform
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(10)

    completions = [Completion([a, b], [True, True]) for a in range(4) for b in range(4)]
    packed = pack([[0, 1, 2], *(c.tokens for c in completions)], [-1] + [0] * 16)
    rows = torch.arange(3, 35)
    logprobs = lambda: model.score(packed, rows)[0].view(16, 2).sum(1)

    beta, rewards = 0.5, torch.randn(16, generator=torch.Generator().manual_seed(seed))
    ref = logprobs().detach()
    optimum = torch.log_softmax(ref + rewards / beta, 0)
    kl = lambda: (optimum.exp() * (optimum - logprobs())).sum().item()
    assert ref.exp().sum().item() == pytest.approx(1, abs=1e-5) and (start := kl()) > 0.3

    first, second = torch.combinations(torch.arange(16)).unbind(1)
    wrong = torch.sigmoid(rewards[second] - rewards[first])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(600):
        optimizer.zero_grad()
        ratio = logprobs() - ref
        cdpo_loss(ratio[first], ratio[second], len(first), beta, wrong).backward()
        optimizer.step()
    assert kl() < 1e-3 < start


# ---- packing and scoring


def test_a_shared_prompt_changes_neither_loss_nor_gradient(cfg):
    tokenizer = Tokenizer.load(cfg.model)
    pairs, _ = preferences(read_rows(cfg.data), tokenizer, max_length=64)

    def scored(packed, rows, lengths):
        model = load_model(cfg.model)
        logprob, _, _ = model.score(packed, rows)
        total = torch.segment_reduce(logprob, "sum", lengths=lengths).view(-1, 2)
        loss = dpo_loss(total[:, 0], total[:, 1], len(pairs), 0.1)
        loss.backward()
        return [loss.detach(), *(parameter.grad for parameter in model.parameters())]

    (batch,) = make_batches(pairs, 10**6, "cpu")
    ordered = [pairs[i] for i in batch.members]
    separate = pack([pair.prompt + c.tokens for pair in ordered for c in pair.completions])
    trained = [m for pair in ordered for c in pair.completions for m in [False] * len(pair.prompt) + c.mask]
    shared = scored(batch.packed, batch.rows, batch.lengths)
    unshared = scored(separate, torch.tensor(trained).nonzero().squeeze(1), batch.lengths)
    assert batch.packed.tokens.numel() < 0.85 * separate.tokens.numel()
    for one, other in zip(shared, unshared, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


def test_only_trained_tokens_count(cfg):
    """The log-probability of a completion is the sum over its mask, by the model's own logits."""
    model, tokenizer = load_model(cfg.model), Tokenizer.load(cfg.model)
    pairs, _ = preferences(read_rows(cfg.data)[:4], tokenizer, max_length=64)
    hidden_turn = dataclasses.replace(
        pairs[0],
        chosen=dataclasses.replace(
            pairs[0].chosen, mask=[i % 3 == 0 for i in range(len(pairs[0].chosen.mask))]
        ),
    )
    pairs = [hidden_turn, *pairs[1:]]

    found = completion_logprobs(model, pairs, 64)
    for pair, totals in zip(pairs, found, strict=True):
        for completion, total in zip(pair.completions, totals, strict=True):
            ids = pair.prompt + completion.tokens
            logprob = torch.log_softmax(model.logits(model(pack([ids]))), 1)[:-1].gather(
                1, torch.tensor(ids)[1:, None]
            )
            mask = torch.tensor(([False] * len(pair.prompt) + completion.mask)[1:])
            torch.testing.assert_close(total, logprob[mask].sum(), atol=1e-5, rtol=0)


# ---- the runs


@every_loss
def test_the_first_loss_is_known(cfg, name):
    """At the start policy and reference are one: every score of a referenced loss is exactly 0."""
    dpo.train(dataclasses.replace(cfg, loss=name, steps=1, micro_batch_tokens=90))
    (first,) = metrics_of(cfg.output)
    zero = torch.zeros(1)
    if VARIANTS[name].reference:
        assert first["margin"] == first["chosen"] == first["rejected"] == 0
        expected = loss_of(name, zero, zero, 1).item()
        assert first["loss"] == pytest.approx(expected, abs=1e-6)
    else:
        assert first["margin"] != 0
    if name in ("dpo", "cdpo"):
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert first["grad_norm"] > 0


@pytest.mark.parametrize("name", ["dpo", "ipo", "simpo", "orpo"])
def test_it_learns(cfg, name, pairs):
    cfg = dataclasses.replace(cfg, loss=name, steps=30, eval_data=pairs)
    dpo.train(cfg)
    metrics = metrics_of(cfg.output)
    assert metrics[-1]["accuracy"] > 0.8 and metrics[-1]["margin"] > metrics[0]["margin"] + 0.05
    assert sum(m["loss"] for m in metrics[-5:]) < 0.9 * sum(m["loss"] for m in metrics[:5])
    held_out = json.loads((cfg.output / "held_out.json").read_text())
    before, after = held_out["before"], held_out["after"]
    assert after["accuracy"] > 0.8 and before["pairs"] == after["pairs"] == 64
    assert after["logprob_accuracy"] > before["logprob_accuracy"] and after["loss"] < before["loss"]
    assert set(held_out) == {"before", "after"} and before.keys() == after.keys()


def test_labels_without_a_preference_teach_none(cfg, pairs, tmp_path):
    """Control: where every second pair is turned round, the margin on the pairs as they were stays near 0."""
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    for row in rows[::2]:
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    (tmp_path / "both.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    margins = []
    for name, data in (("true", pairs), ("both", tmp_path / "both.jsonl")):
        dpo.train(dataclasses.replace(cfg, data=data, eval_data=pairs, steps=20, output=tmp_path / name))
        margins.append(json.loads((tmp_path / name / "held_out.json").read_text())["after"]["margin"])
    assert margins[0] > 0.3 and abs(margins[1]) < 0.3 * margins[0]


@pytest.mark.parametrize("name", ["dpo", "ipo", "orpo"])
@pytest.mark.parametrize("micro_batch_tokens", [1, 90])
def test_gradients_do_not_depend_on_micro_batches(cfg, tmp_path, name, micro_batch_tokens):
    cfg = dataclasses.replace(cfg, loss=name)
    whole = dpo.train(cfg)
    cut = dataclasses.replace(cfg, output=tmp_path / "cut", micro_batch_tokens=micro_batch_tokens)
    same_run(cfg.output, whole, tmp_path / "cut", dpo.train(cut))


def same_run(one_output, one_model, other_output, other_model):
    for one, other in zip(
        load_model(one_model).parameters(), load_model(other_model).parameters(), strict=True
    ):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=0)
    for one, other in zip(metrics_of(one_output), metrics_of(other_output), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert one["margin"] == pytest.approx(other["margin"], abs=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


def test_the_reference_stays_where_training_began(cfg):
    """The margin is that of the trained model against the first, in the second epoch, too."""
    trained = dpo.train(dataclasses.replace(cfg, steps=7, save_every=6))  # 6 steps are an epoch of 64 pairs
    tokenizer = Tokenizer.load(trained)
    pairs, _ = preferences(read_rows(cfg.data), tokenizer, max_length=64)
    now = completion_logprobs(load_model(cfg.output / "step-6"), pairs, 1000)
    ratio = now - completion_logprobs(load_model(cfg.model), pairs, 1000)
    (*_, members) = [batch for batch, _ in zip(epochs(64, cfg.batch_size, cfg.seed), range(7), strict=False)]
    expected = 0.1 * (ratio[members, 0] - ratio[members, 1]).mean().item()
    assert metrics_of(cfg.output)[6]["margin"] == pytest.approx(expected, abs=1e-5)


def test_a_flag_that_the_loss_would_ignore_is_refused(cfg):
    with pytest.raises(InputError, match="--gamma: --loss dpo does not read it; simpo do"):
        dpo.train(dataclasses.replace(cfg, gamma=1.0))
    with pytest.raises(InputError, match="--label-smoothing: --loss ipo does not read it; cdpo, robust do"):
        dpo.train(dataclasses.replace(cfg, loss="ipo", label_smoothing=0.1))
    with pytest.raises(InputError, match=r"--label-smoothing: expected a number between 0 and 0\.499"):
        dpo.train(dataclasses.replace(cfg, loss="robust", label_smoothing=0.5))
    assert not cfg.output.exists()


@pytest.mark.parametrize("command", ["reward", "dpo", "kto"])
def test_wrong_input_is_one_line_and_leaves_nothing(cfg, tmp_path, capsys, command):
    good = {"prompt": "1+1+1=", "chosen": "3", "rejected": "4"}
    (tmp_path / "bad.jsonl").write_text(json.dumps(good) + "\n" + json.dumps({"prompt": "1+1+1="}) + "\n")
    arguments = ["--model", cfg.model, "--data", tmp_path / "bad.jsonl", "--output", tmp_path / "none"]
    assert main([command, *map(str, arguments)]) == 1
    assert (
        f"bad.jsonl line 2: expected the columns {'completion' if command == 'kto' else 'chosen'}"
        in capsys.readouterr().err
    )
    arguments[3] = cfg.data
    assert main([command, *map(str, arguments), "--batch-size", "0"]) == 1
    assert "--batch-size: expected a number at least 1" in capsys.readouterr().err
    assert main([command, *map(str, arguments), "--max-length", "5"]) == 1
    assert "64 dropped: longer than max_length" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


# ---- KTO


@pytest.fixture
def kto_cfg(cfg):
    shared = {
        name: getattr(cfg, name) for name in ("model", "data", "output", "steps", "learning_rate", "device")
    }
    return kto.Config(**shared, batch_size=24, warmup_steps=0)


def test_kto_starts_at_one_half_and_learns(kto_cfg):
    kto.train(dataclasses.replace(kto_cfg, steps=30))
    metrics = metrics_of(kto_cfg.output)
    assert metrics[0]["loss"] == pytest.approx(0.5, abs=1e-6)
    assert metrics[0]["kl"] == metrics[0]["chosen"] == metrics[0]["rejected"] == 0
    assert metrics[-1]["margin"] > 0.2 and metrics[-1]["loss"] < 0.48
    assert all(line["kl"] >= 0 for line in metrics) and any(line["kl"] > 0 for line in metrics)


@pytest.mark.parametrize("micro_batch_tokens", [1, 90])
def test_ktos_gradients_do_not_depend_on_micro_batches(kto_cfg, tmp_path, micro_batch_tokens):
    whole = kto.train(kto_cfg)
    cut = dataclasses.replace(kto_cfg, output=tmp_path / "cut", micro_batch_tokens=micro_batch_tokens)
    same_run(kto_cfg.output, whole, tmp_path / "cut", kto.train(cut))


def test_kto_of_one_kind_alone(kto_cfg, tmp_path):
    rows = [
        {"prompt": "1+1+1=", "completion": "3", "label": True},
        {"prompt": "1+2+3=", "completion": "6", "label": True},
    ]
    (tmp_path / "wanted.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kto.train(dataclasses.replace(kto_cfg, data=tmp_path / "wanted.jsonl", steps=2))
    assert all(line["rejected"] is None and line["margin"] is None for line in metrics_of(kto_cfg.output))


def test_ktos_kl_is_of_completions_to_other_prompts(kto_cfg):
    tokenizer = Tokenizer.load(kto_cfg.model)
    judged, _ = judged_completions(read_rows(kto_cfg.data), tokenizer, max_length=64)
    half = len(judged) // 2
    for i, one in enumerate(judged):
        assert judged[(i + half) % len(judged)].prompt != one.prompt
