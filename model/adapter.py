"""Adapters on a model: train a few numbers beside frozen weights, switch them off, fold them in.

    add_lora(model, rank=16)             every weight is frozen but the new adapter's, which changes nothing yet
    quantize_base(model)                 the frozen weights of the linear layers to 4 bits: QLoRA
    with adapter_disabled(model): ...    the model as it was before
    reference = frozen_copy(model)       the policy that training starts from; what is frozen is shared, not copied
    merge_lora(model)                    the adapter folded into the weights: a plain model again
    stack_adapters(model, several)       one batch, each sequence with an adapter of its own, which `pack` is told

What these stand on: placement.py, where on a model an adapter is; adapter_tensors.py, an adapter as named tensors;
adapters/, what needs no model. Files are checkpoint.py's. Names of modules are those of a Hugging Face model.
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
    """Freeze the model and add a fresh adapter: A uniform in +-1/sqrt(K) from `seed`, B zero.

    alpha: 2 * rank by default. options: further fields of LoraConfig. Raises InputError where nothing matches.
    """
    place_adapter(model, LoraConfig(rank, 2.0 * rank if alpha is None else alpha, **options), "add_lora")
    generator, layers = torch.Generator().manual_seed(seed), linears(model)
    with torch.no_grad():
        for name, lora in adapters(model).items():
            bound = 1 / math.sqrt(lora.a.shape[-1])
            drawn = torch.empty(lora.a.shape)  # on the CPU: alike on every device
            lora.a.copy_(drawn.uniform_(-bound, bound, generator=generator))
            if lora.magnitude is not None:
                lora.magnitude.copy_(layers[name].dense().float().norm(dim=1))


def merge_lora(model: Model) -> None:
    """Fold the adapter into the weights, all of which can then be trained. A 4-bit base becomes a dense one."""
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
    """The base alone, without gradient: a backward pass outside of the block would see the adapter."""
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
    """The model as it is now, without gradient or dropout: it shares what `model` does not train.

    A fresh adapter, which changes nothing, is left out: such a copy costs neither memory nor time for it.
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
    """The linear layers' weights to NF4; the head, the embedding and what is trained stay.

    double_quant: each block's scale in a byte, 4.127 bits a weight in place of 4.5.
    """
    trained = trained_tensors(model)
    for name, layer in linears(model).items():
        if name != "lm_head" and layer.four_bit is None and f"{name}.weight" not in trained:
            layer.hold(quantize_nf4(layer.dense().detach(), double_quant=double_quant))
