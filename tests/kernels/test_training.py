"""A whole model trains alike on the Triton code and on the torch path: losses and weights over three steps."""

import importlib

import pytest
import torch
from burnish.kernels import attention
from burnish.kernels._chip import INTERPRET
from burnish.model.config import ModelConfig
from burnish.model.packed import pack
from burnish.model.transformer import Transformer

KERNEL_FILES = ("attention", "glu", "head.blocks", "head.inputs", "head.logprob", "norm", "rope")


def train(steps: int, device: str) -> tuple[list[float], list[torch.Tensor]]:
    config = ModelConfig(
        vocab_size=53,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        windows=(None, 5),
        qk_norm=True,
        initializer_range=0.2,
    )

    model = Transformer(config, seed=1, device=device)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.3
    )  # Adam would hide a gradient that is off by a factor

    generator = torch.Generator().manual_seed(0)
    lengths = (9, 4, 7, 1, 20)
    sequences = [torch.randint(0, 53, (n,), generator=generator).tolist() for n in lengths]
    packed = pack(sequences, parents=[-1, 0, 0, -1, 3], device=device)
    rows = (packed.predictors >= 0).nonzero().squeeze(1)

    losses = []
    for _ in range(steps):
        logprob, lse, entropy = model.score(packed, rows)
        loss = (-logprob + 1e-2 * lse.square() - 1e-2 * entropy).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, [parameter.detach() for parameter in model.parameters()]


def assert_alike(found, expected) -> None:
    (losses, weights), (expected_losses, expected_weights) = found, expected
    assert losses == pytest.approx(expected_losses, abs=1e-5) and losses[-1] < losses[0]
    for weight, expected_weight in zip(weights, expected_weights, strict=True):
        torch.testing.assert_close(weight.cpu(), expected_weight, atol=1e-5, rtol=0)


def on_torch(steps: int, monkeypatch: pytest.MonkeyPatch) -> tuple[list[float], list[torch.Tensor]]:
    if INTERPRET:  # elsewhere the device alone decides
        for name in KERNEL_FILES:
            monkeypatch.setattr(
                importlib.import_module(f"burnish.kernels.{name}"), "use_triton", lambda _: False
            )
    return train(steps, "cpu")


both_paths = pytest.mark.skipif(
    not (INTERPRET or torch.cuda.is_available()), reason="both runs would be torch's"
)


@pytest.mark.slow
@both_paths
def test_a_model_trains_alike_on_both_paths(device, monkeypatch):
    found = train(3, device)
    assert_alike(found, on_torch(3, monkeypatch))


@pytest.mark.slow
@both_paths
@pytest.mark.parametrize("gradient", ["q", "k"])
def test_a_fault_of_one_percent_in_a_gradient_is_seen(device, gradient, monkeypatch):
    name, derived = {"q": ("_query_grad", 0), "k": ("_key_and_value_grad", 0)}[gradient]
    backward = getattr(attention, name)

    def faulty(*args):
        return [g * 1.01 if place == derived else g for place, g in enumerate(backward(*args))]

    monkeypatch.setattr(attention, name, faulty)
    found = train(2, device)
    with pytest.raises(AssertionError):
        assert_alike(found, on_torch(2, monkeypatch))
