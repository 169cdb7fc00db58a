"""Loading of a run's models, with the flags of an adapter, --lora-rank and the others, and --base-4bit.

    model = load_trainee(cfg)              the model to train, instead of load_model(cfg.model, device=cfg.device)
    reference = frozen_copy(model)         model/adapter.py: shares the weights of a model with a fresh adapter
    teacher = load_frozen(folder, device)  another model, which is not trained

With --lora-rank the weights are frozen, in bf16 on CUDA or in 4 bits. Only the adapter is then trained, checkpointed
and saved. If --model is an adapter folder, training continues with that adapter.
"""

from pathlib import Path
from typing import Any

import torch

from ...model.adapter import adapters, add_lora, linears, lora_config
from ...model.adapters.config import LoraConfig
from ...model.checkpoint import load_model, load_scalar_model, read_adapter
from ...model.config import ModelConfig
from ...model.errors import InputError
from ...model.files.folder import is_adapter
from ...model.scalar import ScalarModel
from ...model.transformer import Transformer
from .processes import host
from .targets import placed


def load_trainee(cfg: Any) -> Transformer:
    """Load the language model of --model for training, with the adapter that the flags ask for."""
    continued = is_adapter(cfg.model)
    model = load_model(cfg.model, _dtype(cfg, cfg.model, continued), _device(cfg), cfg.base_4bit)
    model.checkpoint_activations = cfg.checkpoint_activations
    _add(model, cfg, cfg.model)
    _start_training(model, cfg)
    return model


def load_frozen(folder: Path, device: str, base_4bit: bool = False) -> Transformer:
    """Load a language model that is not trained, in bf16 on CUDA and fp32 on CPU. base_4bit: hold weights in 4 bits."""
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    return load_model(folder, dtype, host(device), base_4bit).requires_grad_(False).eval()


def load_scalar_trainee(cfg: Any, folder: Path) -> ScalarModel:
    """Load a reward model or critic from `folder` for training, with the adapter that the flags ask for.

    The score head is trained in full beside an adapter. If `folder` is an adapter with a score head, training continues
    with that adapter, even if --lora-rank gives the policy a new one.
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
    """Put the model in training mode. For a trainer without the flag --lora-dropout, set the adapter's dropout to 0.

    RL trainers do not have the flag: their policy samples without dropout, and the same policy must be trained.
    """
    if not hasattr(cfg, "lora_dropout"):
        for lora in adapters(model).values():
            lora.dropout = 0.0
    model.train()


def _device(cfg: Any) -> str:
    """Return the device on which to load weights. 4-bit weights go to --device, because they are not sharded."""
    return cfg.device if cfg.base_4bit else host(cfg.device)


def _dtype(cfg: Any, folder: Path, continued: bool) -> torch.dtype:
    """Return the dtype of the weights: bf16 for frozen weights on CUDA, otherwise fp32.

    continued: whether `folder` is an adapter with which training continues. Raises InputError for a flag that would
    have no effect.
    """
    for name in ("rank", "alpha", "targets", "dora", "rslora", "dropout"):
        if not getattr(cfg, f"lora_{name}", None):
            continue
        if continued and folder == cfg.model:
            own = "rank" if name == "rank" else "settings"
            raise InputError(
                f"--lora-{name}: {folder} is an adapter, and training continues with its own {own}: leave the flag out"
            )
        if not cfg.lora_rank:
            raise InputError(f"--lora-{name}: expected --lora-rank, too, for a new adapter")
    frozen = continued or cfg.lora_rank > 0
    if cfg.base_4bit and not frozen:
        raise InputError("--base-4bit: expected --lora-rank, too, because 4-bit weights are frozen")
    return torch.bfloat16 if frozen and cfg.device.startswith("cuda") else torch.float32


def _add(model: Transformer | ScalarModel, cfg: Any, folder: Path, **options: Any) -> None:
    if cfg.lora_rank:
        targets = placed(cfg.lora_targets, linears(model), scores=isinstance(model, ScalarModel))
        dropout = getattr(cfg, "lora_dropout", 0.0)
        if targets["parameters"] and (dropout or cfg.lora_dora):
            raise InputError(
                f"--lora-{'dora' if cfg.lora_dora else 'dropout'}: expected --lora-targets beside it that name no "
                "experts, such as q_proj v_proj: an adapter of experts has neither DoRA nor dropout"
            )
        options |= {"dropout": dropout, "dora": cfg.lora_dora, "rslora": cfg.lora_rslora, "base": str(folder)}
        add_lora(model, cfg.lora_rank, cfg.lora_alpha, seed=cfg.seed, **targets, **options)
    elif lora_config(model) is None and any(layer.four_bit is not None for layer in linears(model).values()):
        raise InputError(
            f"--model {folder}: expected --lora-rank for this model, because its 4-bit weights are frozen"
        )


def planned_adapter(cfg: Any, config: ModelConfig, *modules_to_save: str) -> LoraConfig | None:
    """Return the adapter that the flags ask for on a model of this shape, without weights. None without --lora-rank."""
    _dtype(cfg, cfg.model, continued=False)
    if not cfg.lora_rank:
        return None
    model = (ScalarModel if modules_to_save else Transformer)(config, device="meta")
    _add(model, cfg, cfg.model, **({"modules_to_save": modules_to_save} if modules_to_save else {}))
    return lora_config(model)
