"""Adapter folders in PEFT's format: adapter_config.json and adapter_model.safetensors.

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight                 (R, K)
    base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight                 (N, R)
    base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector         (N,), for DoRA
    base_model.model.model.layers.0.mlp.experts.base_layer.lora_A.weight           (E R, K), all experts' gate_up_proj
    base_model.model.model.layers.0.mlp.experts.lora_B.weight                      (N, R E), all experts' down_proj
    base_model.model.lm_head.weight                                                a module trained whole
    base_model.model.lm_head.base_layer.weight                                     a copy of the base's; read only

Source: https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, NoReturn

from ..adapters.config import LINEARS, LoraConfig
from ..errors import InputError
from .config_keys import LARGEST, MOST

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
MOST_NAMES = 10_000  # in a list or a pattern; 100 layers named in full have 700 modules
_INERT = {  # keys that change no number of a loaded adapter
    *("peft_type", "peft_version", "task_type", "base_model_name_or_path", "revision", "inference_mode"),
    *("auto_mapping", "megatron_core", "qalora_group_size", "runtime_config"),
    # how A and B were initialised; init_lora_weights shows whether the base's weights changed with them
    *("corda_config", "eva_config", "loftq_config", "lora_ga_config"),
    "merge_weights",  # PEFT 0.2: whether to merge the adapter while it is in use
    "fan_in_fan_out",  # for GPT-2's transposed layers; PEFT resets true to false for a linear layer
}
_READ = {
    *("r", "lora_alpha", "lora_dropout", "target_modules", "target_parameters", "exclude_modules"),
    *("rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern", "use_rslora", "use_dora"),
    *("modules_to_save", "ensure_weight_tying", "init_lora_weights"),
}
_REFUSED = {  # key of an unsupported option -> the values that switch it off, besides null
    "bias": ("none",),  # trained biases of the base
    "lora_bias": (False,),
    "trainable_token_indices": ([], {}),  # single rows of the embedding
    "layer_replication": ([],),  # layers that are in the model twice
    "megatron_config": ({},),  # the layers of another library
    "enable_lora": (),  # PEFT 0.2: parts of one fused layer
    "alora_invocation_tokens": ([],),  # an adapter that acts only after these tokens
    "use_qalora": (False,),  # this and the next are variants that compute other results
    "use_bdlora": (False,),
    **dict.fromkeys(("arrow_config", "kasa_config", "velora_config", "monteclora_config"), ()),
}
_DRAWN = (
    True,
    False,
    "gaussian",
    "orthogonal",
    "eva",
    None,
)  # init_lora_weights that leave the base as it is


def read_config(raw: dict[str, Any], source: str) -> LoraConfig:
    """Read a parsed adapter_config.json. source: its name in errors. Raises InputError naming the key.

    An unknown key is refused unless it is null, because even false might change the numbers.
    """
    keys = _Keys(raw, source)
    keys.check_known()

    targets, parameters = keys.names("target_modules"), keys.list_of_names("target_parameters")
    if not targets and not parameters:
        keys.refuse("target_modules", "module names or a regular expression")

    base, (layers, before) = raw.get("base_model_name_or_path"), keys.layers()
    if layers and isinstance(targets, str) and targets != "all-linear":
        keys.refuse("layers_to_transform", "null, since target_modules is a regular expression")

    config = LoraConfig(
        rank=keys.number("r", 8, 1, int, MOST),
        alpha=keys.number("lora_alpha", 8, 0),
        targets=LINEARS if targets == "all-linear" else targets,
        parameters=parameters,
        exclude=keys.names("exclude_modules"),
        layers=layers,
        layers_pattern=before,
        rank_pattern=keys.pattern("rank_pattern", 1),
        alpha_pattern=keys.pattern("alpha_pattern", 0),
        rslora=keys.flag("use_rslora"),
        dora=keys.flag("use_dora"),
        dropout=keys.number("lora_dropout", 0.0, 0, below=1),
        modules_to_save=keys.list_of_names("modules_to_save"),
        tied=keys.flag("ensure_weight_tying"),
        base=base if isinstance(base, str) else None,
    )

    config.check((), source)
    return config


@dataclass(frozen=True)
class _Keys:
    """The keys of adapter_config.json, each checked as it is read. source: the file's name."""

    raw: dict[str, Any]
    source: str

    def refuse(self, key: str, expected: str) -> NoReturn:
        got = repr(self.raw.get(key))
        raise InputError(f"{self.source}: {key:.60}: expected {expected}, got {got:.200}")

    def check_known(self) -> None:
        if self.raw.get("peft_type") != "LORA":
            self.refuse("peft_type", "LORA")
        for key, value in self.raw.items():
            off = _REFUSED.get(key, ())
            if key in _REFUSED and value is not None and not any(_same(value, each) for each in off):
                accepted = " or ".join(["null", *map(json.dumps, off)])
                self.refuse(key, f"{accepted}, since the option is not supported")
            if key not in _INERT | _READ | _REFUSED.keys() and value is not None:
                self.refuse(key, "null, since the key is unknown and might change the numbers")
        if self.raw.get("init_lora_weights") not in _DRAWN:
            self.refuse("init_lora_weights", "an initialisation that leaves the base's weights as they are")

    def number(
        self,
        key: str,
        default: Any,
        least: float,
        kind: type | tuple[type, ...] = (int, float),
        below: float = inf,
    ) -> Any:
        value = self.raw.get(key, default)
        is_number = isinstance(value, kind) and not isinstance(value, bool)
        if not is_number or not least <= value < below or value > LARGEST:
            bound = "" if below == inf else f" and below {below}"
            self.refuse(key, f"a number of at least {least}{bound}")
        return value

    def flag(self, key: str) -> bool:
        value = self.raw.get(key)
        if value is not None and not isinstance(value, bool):
            self.refuse(key, "true or false")
        return bool(value)

    def list_of_names(self, key: str) -> tuple[str, ...]:
        value = self.raw.get(key)
        if value is not None and not (isinstance(value, list) and all(isinstance(n, str) for n in value)):
            self.refuse(key, "a list of names")
        self.check_length(key)
        return tuple(value or ())

    def check_length(self, key: str) -> None:
        value = self.raw.get(key)
        if isinstance(value, list | dict) and len(value) > MOST_NAMES:
            raise InputError(f"{self.source}: {key}: expected at most {MOST_NAMES} entries, got {len(value)}")

    def names(self, key: str) -> tuple[str, ...] | str:
        value = self.raw.get(key)
        return value if isinstance(value, str) else self.list_of_names(key)

    def pattern(self, key: str, least: float) -> dict[str, Any]:
        value = self.raw.get(key)
        value = {} if value is None else value
        kind, most = (int, MOST) if key == "rank_pattern" else ((int, float), LARGEST)
        self.check_length(key)
        fits = isinstance(value, dict) and all(
            isinstance(v, kind) and not isinstance(v, bool) and least <= v <= most for v in value.values()
        )
        what = "whole numbers" if kind is int else "numbers"
        return value if fits else self.refuse(key, f"{what} of at least {least}, by module")

    def layers(self) -> tuple[tuple[int, ...] | None, tuple[str, ...]]:
        """Return (layers, names) from layers_to_transform and layers_pattern.

        layers: the layers with an adapter, or None for all. names: the parts of a module's name before a layer's
        number.
        """
        layers, before = self.raw.get("layers_to_transform"), self.raw.get("layers_pattern")
        layers = [layers] if type(layers) is int else layers  # by type, so that false is not layer 0
        if layers is not None and not (isinstance(layers, list) and all(type(i) is int for i in layers)):
            self.refuse("layers_to_transform", "layer numbers")
        patterns = (before,) if isinstance(before, str) and before else ()
        if not isinstance(before, str):
            patterns = self.list_of_names("layers_pattern")
        self.check_length("layers_to_transform")
        return tuple(layers) if layers else None, patterns


def _same(value: Any, other: Any) -> bool:
    """Return whether two values have the same type and are equal. For instance, 0 and False differ."""
    return type(value) is type(other) and value == other


def write_config(config: LoraConfig) -> dict[str, Any]:
    """Return the content of adapter_config.json."""

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
        "layers_pattern": list(config.layers_pattern) or None,
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
        "use_rslora": config.rslora,
        "use_dora": config.dora,
        "lora_dropout": config.dropout,
        "modules_to_save": listed(config.modules_to_save),
        "ensure_weight_tying": config.tied,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }
