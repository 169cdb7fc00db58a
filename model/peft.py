"""Adapter folders as PEFT writes them: adapter_config.json and adapter_model.safetensors.

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight                 (R, K)
    base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight                 (N, R)
    base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector         (N,), DoRA's
    base_model.model.model.layers.0.mlp.experts.base_layer.lora_A.weight           (E R, K), all experts' gate_up_proj
    base_model.model.model.layers.0.mlp.experts.lora_B.weight                      (N, R E), all experts' down_proj
    base_model.model.lm_head.weight                                                a module trained whole

Source: https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

import re
from collections.abc import Sequence
from typing import Any, NoReturn

from .errors import InputError
from .linear import LINEARS, LoraConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
_INERT = {  # keys that no number of a loaded adapter depends on
    *("peft_type", "peft_version", "task_type", "base_model_name_or_path", "revision", "inference_mode"),
    *("auto_mapping", "megatron_core", "qalora_group_size"),
}
_DRAWN = (True, False, "gaussian", "orthogonal", None)  # init_lora_weights that leave the base as it is


def read_config(raw: dict[str, Any], source: str) -> LoraConfig:
    """From a parsed adapter_config.json; source names it in errors. Raises InputError naming the key.

    A key that is not known, and not off, is refused: it might change the numbers.
    """

    def refuse(key: str, expected: str) -> NoReturn:
        raise InputError(f"{source}: {key}: expected {expected}, got {raw.get(key)!r}")

    def number(key: str, default: Any, least: float, kind: type | tuple[type, ...] = (int, float)) -> Any:
        value = raw.get(key, default)
        if isinstance(value, bool) or not isinstance(value, kind) or not value >= least:
            refuse(key, f"a number of at least {least}")
        return value

    def compiles(expression: str) -> bool:
        try:
            return bool(re.compile(expression))
        except re.error:
            return False

    def flag(key: str) -> bool:
        value = raw.get(key)
        return value if isinstance(value, bool) else refuse(key, "true or false") if value else False

    def names(key: str) -> Any:
        value = raw.get(key)
        if isinstance(value, str):
            return value if value == "all-linear" or compiles(value) else refuse(key, "a regular expression")
        if value is not None and not (isinstance(value, list) and all(isinstance(n, str) for n in value)):
            refuse(key, "module names or a regular expression")
        return tuple(value or ())

    def pattern(key: str, least: float) -> dict[str, Any]:
        value = raw.get(key) or {}
        fits = isinstance(value, dict) and all(
            compiles(k) and isinstance(v, int | float) and not isinstance(v, bool) and v >= least
            for k, v in value.items()
        )
        return value if fits else refuse(key, f"numbers of at least {least}, by module")

    if raw.get("peft_type") != "LORA":
        refuse("peft_type", "LORA")
    known = {*_INERT, "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "rank_pattern"}
    known |= {
        "alpha_pattern",
        "target_parameters",
        "use_rslora",
        "use_dora",
        "modules_to_save",
        "layers_to_transform",
        "init_lora_weights",
    }
    for key, value in raw.items():
        if key not in known and value not in (None, False, 0, "", "none", [], {}):
            raise InputError(f"{source}: {key}: not supported, got {value!r}")
    if raw.get("init_lora_weights") not in _DRAWN:
        refuse("init_lora_weights", "an initialisation that leaves the base's weights as they are")
    targets = names("target_modules")
    parameters = names("target_parameters")
    if isinstance(parameters, str):
        refuse("target_parameters", "a list of parameter names")
    if not targets and not parameters:
        refuse("target_modules", "module names or a regular expression")
    layers = raw.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers
    if layers is not None and not (isinstance(layers, list) and all(isinstance(i, int) for i in layers)):
        refuse("layers_to_transform", "layer numbers")
    base = raw.get("base_model_name_or_path")
    return LoraConfig(
        rank=number("r", 8, 1, int),
        alpha=number("lora_alpha", 8, 0),
        targets=LINEARS if targets == "all-linear" else targets,
        parameters=parameters,
        exclude=names("exclude_modules"),
        layers=None if not layers else tuple(layers),
        rank_pattern=pattern("rank_pattern", 1),
        alpha_pattern=pattern("alpha_pattern", 0),
        rslora=flag("use_rslora"),
        dora=flag("use_dora"),
        dropout=number("lora_dropout", 0.0, 0),
        modules_to_save=names("modules_to_save"),
        base=base if isinstance(base, str) else None,
    )


def write_config(config: LoraConfig) -> dict[str, Any]:
    """adapter_config.json."""

    def listed(names: Sequence[str]) -> Any:
        return names if isinstance(names, str) else sorted(names) or None

    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "target_modules": listed(config.targets) or [],
        "target_parameters": listed(config.parameters),
        "exclude_modules": listed(config.exclude),
        "layers_to_transform": None if config.layers is None else list(config.layers),
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
        "use_rslora": config.rslora,
        "use_dora": config.dora,
        "lora_dropout": config.dropout,
        "modules_to_save": listed(config.modules_to_save),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }
