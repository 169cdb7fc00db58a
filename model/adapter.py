"""Adapters on a model: train a few numbers beside frozen weights, switch them off, merge them into the weights.

    add_lora(model, rank=16)             freeze every weight and add a fresh adapter, which changes nothing yet
    quantize_base(model)                 quantise the frozen weights of the linear layers to 4 bits: QLoRA
    with adapter_disabled(model): ...    use the model as it was before
    reference = frozen_copy(model)       keep the policy that training starts from; frozen weights are shared
    merge_lora(model)                    merge the adapter into the weights: a plain model again
    stack_adapters(model, several)       use several adapters in one batch; `pack` takes the adapter of each sequence

This file builds on placement.py (the places of an adapter on a model), adapter_tensors.py (an adapter as named tensors)
and adapters/ (the parts that need no model). checkpoint.py reads and writes the files. Names of modules are those of a
Hugging Face model.
"""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..kernels import quantize_nf4
from .adapter_tensors import give_adapter as give_adapter
from .adapter_tensors import stack_adapters as stack_adapters
from .adapter_tensors import take_adapter as take_adapter
from .adapters.config import LoraConfig
from .adapters.lora import Adapter as Adapter
from .placement import Model, adapters, body_of, is_fresh, linears, place_adapter, trained_tensors
from .placement import hf_name as hf_name
from .placement import lora_config as lora_config


def add_lora(model: Model, rank: int, alpha: float | None = None, *, seed: int = 0, **options: Any) -> None:
    """Freeze the model and add a fresh adapter: A is uniform in +-1/sqrt(K), drawn from `seed`, and B is zero.

    alpha: 2 * rank by default. options: further fields of LoraConfig. Raises InputError if no layer matches.
    """
    place_adapter(model, LoraConfig(rank, 2.0 * rank if alpha is None else alpha, **options), "add_lora")
    generator, layers = torch.Generator().manual_seed(seed), linears(model)
    with torch.no_grad():
        for name, lora in adapters(model).items():
            bound = 1 / math.sqrt(lora.a.shape[-1])
            drawn = torch.empty(lora.a.shape)  # on the CPU, so that every device gets the same numbers
            lora.a.copy_(drawn.uniform_(-bound, bound, generator=generator))
            if lora.magnitude is not None:
                lora.magnitude.copy_(layers[name].dense().float().norm(dim=1))


def merge_lora(model: Model) -> None:
    """Merge the adapter into the weights, and make all weights trainable. A 4-bit base becomes a dense one."""
    with torch.no_grad():
        for layer in linears(model).values():
            if layer.lora is not None or layer.four_bit is not None:
                weight = layer.merged()
                layer.four_bit, layer.lora = None, None
                layer.weight = nn.Parameter(weight)

    parameters = dict(model.named_parameters())
    for name, base in body_of(model).replaced.items():
        parameters[name].data = parameters[name].data.to(base.dtype)
    body_of(model).adapter = None
    body_of(model).replaced.clear()
    model.requires_grad_()


@contextmanager
def adapter_disabled(model: Model) -> Iterator[None]:
    """Run the block on the base alone, without gradients.

    A backward pass after the block would run with the adapter on, so gradients are off inside.
    """
    parameters = dict(model.named_parameters())
    trained = {name: parameters[name].data for name in body_of(model).replaced}

    for lora in adapters(model).values():
        lora.enabled = False
    for name, base in body_of(model).replaced.items():
        parameters[name].data = base

    try:
        with torch.no_grad():
            yield
    finally:
        for lora in adapters(model).values():
            lora.enabled = True
        for name, data in trained.items():
            parameters[name].data = data


def frozen_copy(model: Model) -> Model:
    """Return the model as it is now, without gradients or dropout.

    The copy shares all tensors that `model` does not train. A fresh adapter changes nothing and is left out, so the
    copy spends no memory or time on it.
    """
    shared: dict[int, Any] = {id(p): p for p in model.parameters() if not p.requires_grad}
    shared |= {id(q): q for q in (layer.four_bit for layer in linears(model).values()) if q is not None}
    fresh = is_fresh(model)
    frozen = copy.deepcopy(model, shared).requires_grad_(False).eval()
    if fresh:
        for layer in linears(frozen).values():
            layer.lora = None
        body_of(frozen).adapter = None
        body_of(frozen).replaced.clear()
    return frozen


def quantize_base(model: Model, double_quant: bool = True) -> None:
    """Quantise the linear layers' weights to NF4. The head, the embedding and the trained weights stay dense.

    double_quant: store the scale of each block in one byte, which takes 4.127 bits per weight instead of 4.5.
    """
    trained = trained_tensors(model)
    for name, layer in linears(model).items():
        if name != "lm_head" and layer.four_bit is None and f"{name}.weight" not in trained:
            layer.hold(quantize_nf4(layer.dense().detach(), double_quant=double_quant))
