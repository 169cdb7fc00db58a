"""The model that is trained, as the adapter flags make it: --lora-rank, --lora-alpha, --lora-dropout, --base-4bit.

    model = load_trainee(cfg)              in place of load_model(cfg.model, device=cfg.device)
    reference = frozen_copy(model)         model/adapter.py: with a fresh adapter, the same weights and no second copy
    teacher = load_frozen(folder, device)  another model, which only looks on

With --lora-rank the weights are frozen, in bf16 on CUDA or in 4 bits, and what is trained, optimized, checkpointed and
saved is the adapter. Where --model is an adapter folder, training goes on with that adapter.
"""

from pathlib import Path
from typing import Any

import torch

from ...model.adapter import adapters, add_lora, linears, lora_config
from ...model.adapters.config import LINEARS
from ...model.checkpoint import load_model, load_scalar_model, read_adapter
from ...model.errors import InputError
from ...model.files.folder import is_adapter
from ...model.scalar import ScalarModel
from ...model.transformer import Transformer
from .processes import host

EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


def load_trainee(cfg: Any) -> Transformer:
    """The language model of --model, ready to be trained as the flags say."""
    continued = is_adapter(cfg.model)
    model = load_model(cfg.model, _dtype(cfg, cfg.model, continued), _device(cfg), cfg.base_4bit)
    model.checkpoint_activations = cfg.checkpoint_activations
    _add(model, cfg, cfg.model)
    _start_training(model, cfg)
    return model


def load_frozen(folder: Path, device: str, base_4bit: bool = False) -> Transformer:
    """A language model that is not trained, in bf16 on CUDA. base_4bit: with its weights in 4 bits."""
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    return load_model(folder, dtype, host(device), base_4bit).requires_grad_(False).eval()


def load_scalar_trainee(cfg: Any, folder: Path) -> ScalarModel:
    """A reward model or critic from `folder`, likewise; its head is trained whole beside an adapter.

    A critic that is an adapter goes on with it, whether or not --lora-rank gives the policy a new one.
    """
    continued = is_adapter(folder) and "score" in read_adapter(folder)[0].config.modules_to_save
    dtype = _dtype(cfg, folder, continued)
    model = load_scalar_model(folder, dtype, _device(cfg), cfg.seed, cfg.base_4bit)
    model.body.checkpoint_activations = cfg.checkpoint_activations
    if not continued:
        _add(model, cfg, folder, modules_to_save=("score",))
    _start_training(model, cfg)
    return model


def _start_training(model: Transformer | ScalarModel, cfg: Any) -> None:
    """Dropout acts from here on; but in RL the policy that samples, without dropout, is the one that is trained."""
    if not hasattr(cfg, "lora_dropout"):
        for lora in adapters(model).values():
            lora.dropout = 0.0
    model.train()


def _device(cfg: Any) -> str:
    """The device on which the weights are read; 4-bit ones stay whole on each GPU."""
    return cfg.device if cfg.base_4bit else host(cfg.device)


def _dtype(cfg: Any, folder: Path, continued: bool) -> torch.dtype:
    """The weights' dtype. continued: whether `folder` is an adapter, with which training goes on.

    Raises InputError for a flag that would be ignored.
    """
    if continued and cfg.lora_rank and folder == cfg.model:
        raise InputError(
            f"--lora-rank: {folder} is an adapter, with which training goes on as it is: leave the flag out"
        )
    for flag in ("lora_alpha", "lora_dropout"):
        if getattr(cfg, flag, None) and not cfg.lora_rank:
            raise InputError(f"--{flag.replace('_', '-')}: expected --lora-rank beside it, for a new adapter")
    frozen = continued or cfg.lora_rank > 0
    if cfg.base_4bit and not frozen:
        raise InputError("--base-4bit: 4-bit weights are frozen: expected --lora-rank beside it")
    return torch.bfloat16 if frozen and cfg.device.startswith("cuda") else torch.float32


def _add(model: Transformer | ScalarModel, cfg: Any, folder: Path, **options: Any) -> None:
    if cfg.lora_rank:
        options |= {"dropout": getattr(cfg, "lora_dropout", 0.0), "base": str(folder)}
        if model.config.experts is not None:
            # names that the model has: PEFT would take others for experts' old names
            names = {name.rpartition(".")[2] for name, layer in linears(model).items() if not layer.stack}
            options |= {"targets": tuple(name for name in LINEARS if name in names), "parameters": EXPERTS}
        add_lora(model, cfg.lora_rank, cfg.lora_alpha, seed=cfg.seed, **options)
    elif lora_config(model) is None and any(layer.four_bit is not None for layer in linears(model).values()):
        raise InputError(
            f"--model {folder}: its weights are in 4 bits, which are frozen: expected --lora-rank"
        )
