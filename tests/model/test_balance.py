"""The balance loss: transformers' values and gradients, stored, and what a model makes of its layers' routing."""

import json
from dataclasses import replace

import pytest
import torch
from burnish.kernels import moe_route
from burnish.model import ModelConfig, Transformer, pack
from burnish.model.config import Experts
from burnish.model.moe import layer_balance, pooled_balance
from faults import control, faults_of
from planted import plant

TINY = ModelConfig(
    vocab_size=31,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=4,
    num_attention_heads=2,
    initializer_range=0.4,
    model_type="qwen2_moe",
    experts=Experts(5, 2, 24, (False, True, True, True), balance_coefficient=0.5),
)
ROWS = [[1, 2, 3, 4, 5], [6, 7, 8]]


@control
def is_transformers(balance, data) -> None:
    """Rows without their padding: packed tokens have none."""
    stored = json.loads((data / "balance.json").read_text())
    for case in stored["cases"]:
        logits = torch.tensor(case["logits"]).requires_grad_()  # (layers, tokens, E)
        real = torch.tensor(case["real"]).bool()
        routing = [moe_route(layer[real], stored["top_k"])[2] for layer in logits]
        value = balance(routing, stored["top_k"])
        (gradient,) = torch.autograd.grad(value, logits)
        assert value.item() == pytest.approx(case["value"], rel=1e-6), case["name"]
        torch.testing.assert_close(gradient, torch.tensor(case["gradient"]), atol=2e-8, rtol=1e-5)


def test_the_pooled_balance_is_transformers(data):
    is_transformers(pooled_balance, data)


@pytest.mark.parametrize("fault", faults_of(__file__), ids=lambda fault: fault.id)
def test_the_check_can_fail(fault, data, monkeypatch):
    plant(fault, monkeypatch)
    with pytest.raises((AssertionError, RuntimeError)):
        is_transformers(pooled_balance, data)


def test_padding_counted_would_be_another_number(data):
    stored = json.loads((data / "balance.json").read_text())
    for case in stored["cases"]:
        routing = [moe_route(torch.tensor(layer), 2)[2] for layer in case["logits"]]
        same = pooled_balance(routing, 2).item() == pytest.approx(case["value"], rel=1e-4)
        assert same == ("whole" in case["name"])


def test_pooled_is_no_mean_of_layers_unless_there_is_one():
    generator = torch.Generator().manual_seed(0)
    routing = [moe_route(3 * torch.randn(9, 4, generator=generator), 2)[2] for _ in range(6)]
    assert abs(pooled_balance(routing, 2) - layer_balance(routing)) > 0.05
    torch.testing.assert_close(pooled_balance(routing[:1], 2), routing[0].balance)
    torch.testing.assert_close(layer_balance(routing), sum(layer.balance for layer in routing) / 6)
    even = [moe_route(torch.eye(4).repeat(3, 1), 1)[2] for _ in range(2)]
    torch.testing.assert_close(pooled_balance(even, 1), torch.tensor(1.0))  # K where the load is even


def test_a_model_pools_its_layers_with_experts_by_its_own_coefficient():
    model = Transformer(TINY, seed=1)
    model(pack(ROWS))
    assert len(model.routing) == 3
    pooled, layer = pooled_balance(model.routing, 2), layer_balance(model.routing)
    assert abs(pooled - layer) > 1e-3
    torch.testing.assert_close(model.balance_loss(), 0.5 * pooled)
    torch.testing.assert_close(model.balance_loss(pooled=False), 0.5 * layer)
    torch.testing.assert_close(model.balance_loss(2.0), 2.0 * pooled)
    assert model.balance_loss(0.0) == 0
    model.balance_loss().backward()
    assert all(layer.mlp.gate.weight.grad.any() for layer in model.layers[1:])
    dense = Transformer(replace(TINY, experts=None, model_type="qwen2"))
    dense(pack(ROWS))
    assert dense.balance_loss() == dense.balance_loss(1.0) == 0


@pytest.mark.parametrize("pooled", [True, False])
def test_activation_checkpointing_counts_no_routing_twice(pooled):
    found = []
    for again in (False, True):
        model = Transformer(TINY, seed=1).double()
        model.checkpoint_activations = again
        logprob, _, _ = model.score(pack(ROWS), torch.tensor([1, 2, 6]))
        counts = [layer.counts.clone() for layer in model.routing]
        loss = model.balance_loss(pooled=pooled)
        (loss - logprob.mean()).backward()
        assert all(torch.equal(layer.counts, n) for layer, n in zip(model.routing, counts, strict=True))
        found.append({"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters()})
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, atol=1e-14, rtol=0, msg=name)
