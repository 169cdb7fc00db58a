"""The balance loss in every trainer: it is added, by the flags or config.json, logged, and refused without experts."""

import dataclasses
import json

import pytest
import torch
from burnish.algorithms import distill, dpo, grpo, kto, ppo, reward, sft
from burnish.algorithms.recipes.sums import demonstration_row, prompt_row, split_problems
from burnish.algorithms.run import learner
from burnish.algorithms.run.balance import Balance
from burnish.model.checkpoint import load_model, save_model
from burnish.model.config import Experts
from burnish.model.errors import InputError
from burnish.model.moe import pooled_balance
from burnish.model.packed import pack
from burnish.model.text.tokenizer import Tokenizer
from burnish.model.transformer import Transformer
from faults import check_of, control, faults_of
from planted import plant

TRAINERS = {m.__name__.rpartition(".")[2]: m for m in (sft, dpo, reward, kto, grpo, ppo, distill)}
GATES = [f"layers.{i}.mlp.gate.weight" for i in range(2)]


@pytest.fixture
def place(model_folder, tmp_path):
    """A model with four experts in each layer, two for a token, that prefers some of them; and rows of every shape."""
    dense = load_model(model_folder).config
    experts = Experts(4, 2, 24, (True, True), renormalize=True, balance_coefficient=0.05)
    config = dataclasses.replace(dense, model_type="mixtral", initializer_range=0.3, experts=experts)
    save_model(Transformer(config, seed=3), tmp_path / "sparse", Tokenizer.load(model_folder))

    problems = split_problems(0)[0][:8]
    rows = [demonstration_row(problem) for problem in problems]
    shapes = {
        "sft": rows,
        "dpo": [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": "9"} for r in rows],
        "kto": [row | {"label": i % 2 == 0} for i, row in enumerate(rows)],
        "grpo": [prompt_row(problem) for problem in problems],
    }
    shapes |= {"reward": shapes["dpo"], "ppo": shapes["grpo"], "distill": shapes["sft"]}
    for name, made in shapes.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))

    (tmp_path / "rewards.py").write_text(
        "def length(completions, **_):\n    return [float(len(c) + i) for i, c in enumerate(completions)]\n"
    )
    return tmp_path


def step_of(name, module, place, **more):
    """The gradients of one step, by name behind the number of the model; and what it logged."""
    found, models = {}, []
    step = learner.optimizer_step

    def keep(model, *rest):
        if not any(model is earlier for earlier in models):
            models.append(model)
            grads = {n.removeprefix("body."): p.grad for n, p in model.named_parameters()}
            found.update(
                {f"{len(models)}/{n}": grad.clone() for n, grad in grads.items() if grad is not None}
            )
        return step(model, *rest)

    if name in ("grpo", "ppo"):
        flags = {"reward": (f"{place}/rewards.py:length",), "prompts_per_step": 4, "group_size": 2}
        flags |= {"max_new_tokens": 4, "micro_batch_tokens": 4000}
        flags |= {"minibatches": 1, "epochs_per_rollout": 1} if name == "ppo" else {}
    else:
        flags = {"batch_size": 8, **({"teacher": place / "sparse"} if name == "distill" else {})}
    output = place / f"out-{len(list(place.iterdir()))}"
    common = {"model": place / "sparse", "data": place / f"{name}.jsonl", "output": output, "device": "cpu"}
    learner.optimizer_step = keep
    try:
        module.train(module.Config(**common | {"steps": 1, "learning_rate": 1e-4} | flags | more))
    finally:
        learner.optimizer_step = step
    return found, json.loads((output / "metrics.jsonl").read_text())


@control
def adds_its_balance(name, module, place):
    """The coefficient's share of the routers' gradients, in proportion, and no other's."""
    runs = [step_of(name, module, place, router_aux_loss_coef=c) for c in (0.0, 1.0, 2.0)]
    none, one, two = (grads for grads, _ in runs)
    for model in ("1/", "2/") if name == "ppo" else ("1/",):
        for gate in GATES:
            added = one[model + gate] - none[model + gate]
            assert added.abs().max() > 1e-4, gate
            torch.testing.assert_close(
                two[model + gate] - none[model + gate], 2 * added, rtol=1e-3, atol=1e-6
            )
    losses = {line.get("loss", line.get("policy_loss")) for _, line in runs}
    assert len(losses) == 1  # what is logged as the loss is without it
    assert all(1.9 < line["balance"] < 4 and line["dropped"] == 0 for _, line in runs)


@pytest.mark.parametrize("name", TRAINERS)
def test_every_trainer_adds_it(place, name):
    adds_its_balance(name, TRAINERS[name], place)


@pytest.mark.parametrize("name", TRAINERS)
def test_the_check_can_fail(place, name, monkeypatch):
    (fault,) = faults_of(__file__)
    plant(fault, monkeypatch)
    with pytest.raises(AssertionError):
        check_of(fault)(name, TRAINERS[name], place)


@pytest.mark.parametrize(
    "name, flags",
    [
        ("dpo", {}),
        ("kto", {}),
        ("grpo", {"updates_per_rollout": 3, "kl_coefficient": 0.1}),
        ("grpo", {"updates_per_rollout": 3, "kl_coefficient": 0.1, "lora_rank": 2}),
        ("ppo", {"epochs_per_rollout": 3}),
        ("distill", {"student_samples": 1.0, "max_new_tokens": 4}),
    ],
)
def test_only_passes_with_a_gradient_are_logged(place, name, flags, monkeypatch):
    """No reference's, no teacher's, no critic's, none that scores or samples. A micro-batch is a whole step."""
    passes, policies = [], []
    forward, loss = Transformer.forward, Balance.loss

    def recorded(model, packed):
        hidden = forward(model, packed)
        passes.append((model, torch.is_grad_enabled(), model.routing))
        return hidden

    def remembered(balance, *arguments):
        policies.append(balance._body)
        return loss(balance, *arguments)

    monkeypatch.setattr(Transformer, "forward", recorded)
    monkeypatch.setattr(Balance, "loss", remembered)
    _, line = step_of(name, TRAINERS[name], place, learning_rate=0.02, warmup_steps=0, **flags)
    trained = [routing for model, graded, routing in passes if model is policies[0] and graded]
    assert len(trained) == flags.get("updates_per_rollout", flags.get("epochs_per_rollout", 1)) < len(passes)
    values = [pooled_balance(routing, 2).item() for routing in trained]
    assert line["balance"] == pytest.approx(sum(values) / len(values), rel=1e-5)
    counts = sum(torch.stack([layer.counts for layer in routing]) for routing in trained)
    busiest = (counts * 4 / counts.sum(1, keepdim=True)).max().item()
    assert line["busiest_expert"] == pytest.approx(busiest, rel=1e-5)


def test_config_json_has_the_coefficient_and_a_flag_the_pooling(place):
    given = step_of("sft", sft, place, router_aux_loss_coef=0.05)
    config, _ = step_of("sft", sft, place)
    layer, line = step_of("sft", sft, place, balance="layer")
    assert all(torch.equal(config[key], grad) for key, grad in given[0].items())
    assert all((layer[f"1/{gate}"] - config[f"1/{gate}"]).abs().max() > 1e-5 for gate in GATES)
    assert line["balance"] == given[1]["balance"]  # pooled, whichever is trained


@pytest.mark.parametrize(
    "flags, name",
    [({"router_aux_loss_coef": 0.0}, "router-aux-loss-coef"), ({"balance": "layer"}, "balance")],
)
@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_model_without_experts_refuses_the_flags(place, model_folder, trainer, flags, name):
    more = {"teacher": model_folder} if trainer == "distill" else {}
    with pytest.raises(
        InputError, match=f"--{name}: .*random-model has no experts to balance: leave the flag out"
    ):
        step_of(trainer, TRAINERS[trainer], place, model=model_folder, **more, **flags)


def test_the_flags_reach_a_critic_with_experts_beside_a_model_without(place, model_folder):
    models = {"model": model_folder, "critic": place / "sparse"}
    runs = [step_of("ppo", ppo, place, **models, router_aux_loss_coef=c) for c in (0.0, 1.0)]
    assert all((runs[1][0][f"2/{gate}"] - runs[0][0][f"2/{gate}"]).abs().max() > 1e-4 for gate in GATES)
    assert "balance" not in runs[1][1]  # the critic's is in no metric
    with pytest.raises(InputError, match="has no experts to balance: leave the flag out"):
        step_of("ppo", ppo, place, **models | {"critic": model_folder}, balance="layer")


@pytest.mark.parametrize("wrong", [-0.1, float("nan"), float("inf")])
def test_a_coefficient_is_a_number_of_at_least_0(place, wrong):
    with pytest.raises(InputError, match="--router-aux-loss-coef: expected a number between 0 and"):
        step_of("sft", sft, place, router_aux_loss_coef=wrong)


def test_micro_batches_weigh_by_their_tokens(place):
    """Each has its own balance; the step's figure is their mean, and busiest_expert is of all their tokens."""
    cfg = sft.Config(model=place / "sparse", data=place / "sft.jsonl", device="cpu")
    model = load_model(place / "sparse")
    balance, parts, counts = Balance(model, cfg), [], 0

    for ids, share in (([[1, 2, 3]], 0.75), ([[4]], 0.25)):
        model(pack(ids))
        loss = balance.loss(share)
        alone = model.balance_loss(1.0)
        torch.testing.assert_close(loss, share * 0.05 * alone)
        parts.append(share * alone.item())
        counts = counts + torch.stack([layer.counts for layer in model.routing])

    model(pack([[0]]))
    assert balance.loss(0.0) == 0  # a process without a sequence: its one token is not counted
    found = balance.metrics()
    assert found["balance"] == pytest.approx(sum(parts))
    assert found["busiest_expert"] == pytest.approx((counts * 4 / counts.sum(1, keepdim=True)).max().item())
    assert balance.metrics() == {}
