"""A model of two narrow layers for tests, and adapters on it."""

from dataclasses import replace

import torch
from burnish.model import ModelConfig, Transformer, pack
from burnish.model.adapter import add_lora
from burnish.model.scalar import ScalarModel

TINY = ModelConfig(
    vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
)
PACKED = pack([[1, 2, 3, 4, 5], [6, 7, 8]], device="cpu")
ROWS = torch.tensor([1, 2, 4, 7])


@torch.no_grad()
def logits_of(model, packed=PACKED) -> torch.Tensor:
    return model.logits(model(packed))


def trained(model: Transformer | ScalarModel, seed: int = 0) -> None:
    """Stand-in for training: every adapter becomes something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def tiny(seed: int = 1, **options) -> Transformer:
    """A model with a fresh adapter of rank 3."""
    model = Transformer(replace(TINY, initializer_range=0.2), seed=seed)
    add_lora(model, 3, **options)
    return model
