"""A checkpoint's config.json, read and written.

    read_config     config.json (transformers 4 or 5) -> ModelConfig; refuses what this transformer would not compute
    write_config    ModelConfig -> a config.json that transformers 5 reads

transformers 4 wrote `rope_theta`, `rope_scaling` and `torch_dtype`, transformers 5 writes `rope_parameters` and
`dtype`. A key that is absent takes the value that transformers gives it for that architecture.
"""

from dataclasses import fields
from typing import Any, NoReturn

from .architectures import (
    ARCHITECTURES,
    COMMON,
    DEFAULTS,
    INERT,
    NULLABLE,
    NUMBERS,
    ONLY,
    ROPE_KEYS,
    SIZES,
    TOKEN_IDS,
)
from .config import Experts, Latent, ModelConfig, Rope, yarn_factor
from .errors import InputError


def read_config(
    raw: dict[str, Any], source: str = "config.json", generation: dict[str, Any] | None = None
) -> ModelConfig:
    """From a parsed config.json; source names it in errors, generation is a parsed generation_config.json.

    Raises InputError naming the key that is missing, of the wrong type, or asks for what is not built.
    """
    return _Reader(raw, source).read(generation or {})


# ---- writing


def write_config(config: ModelConfig) -> dict[str, Any]:
    """config.json for transformers 5, without dtype: that is the tensors'.

    Raises ValueError where the keys of `model_type` cannot say what the fields say.
    """
    architecture = ARCHITECTURES[config.model_type]
    window = next((window for window in config.windows if window is not None), None)
    eos = config.eos_token_id
    raw: dict[str, Any] = {
        "architectures": [architecture.class_name],
        "model_type": config.model_type,
        **{key: getattr(config, key) for key in (*SIZES, *NUMBERS, *TOKEN_IDS, "tie_word_embeddings")},
        "eos_token_id": list(eos) if isinstance(eos, tuple) else eos,
        "rope_parameters": _rope_keys(config.rope),
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "use_cache": True,
    }
    own = {
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
        "no_rope_layers": [int(rotated) for rotated in config.rope_layers],
        "sliding_window": window,
        "use_sliding_window": window is not None,
        "layer_types": ["full_attention" if w is None else "sliding_attention" for w in config.windows],
    }
    own |= _experts_keys(config) | _attention_keys(config)
    raw |= {key: value for key, value in own.items() if key in architecture.keys}
    if config.latent:
        raw["head_dim"] = config.latent.rope_dim  # transformers rotates this much
    if config.gemma:
        del raw["hidden_act"]
        kinds = ("full_attention", config.rope), ("sliding_attention", config.local_rope or config.rope)
        raw["rope_parameters"] = {kind: _rope_keys(rope) for kind, rope in kinds}
    again = read_config(raw, generation=config.generation)
    lost = [f.name for f in fields(config) if getattr(config, f.name) != getattr(again, f.name)]
    if lost:
        raise ValueError(f"{', '.join(lost)}: {config.model_type}'s config.json cannot say this: {config}")
    return raw


def _experts_keys(config: ModelConfig) -> dict[str, Any]:
    experts = config.experts
    if experts is None:
        return {}
    return {
        **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), experts.num_experts),
        "num_experts_per_tok": experts.top_k,
        "moe_intermediate_size": experts.intermediate_size,
        "norm_topk_prob": experts.renormalize,
        "router_aux_loss_coef": experts.balance_coefficient,
        "routed_scaling_factor": experts.scale,
        "n_group": experts.groups,
        "topk_group": experts.top_groups,
        "shared_expert_intermediate_size": experts.shared_size,
        "n_shared_experts": experts.shared_size // experts.intermediate_size,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i, has in enumerate(experts.layers) if not has],
        "first_k_dense_replace": (*experts.layers, True).index(True),
        "swiglu_alpha": experts.alpha,
        "swiglu_limit": experts.limit,
    }


def _attention_keys(config: ModelConfig) -> dict[str, Any]:
    scale = config.attention_scale
    own: dict[str, Any] = {
        "qkv_bias": config.qkv_bias,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": round(scale**-2) if scale else config.head_dim,
    }
    if config.latent:
        own |= {
            "q_lora_rank": config.latent.q_rank or None,
            "kv_lora_rank": config.latent.kv_rank,
            "qk_nope_head_dim": config.latent.nope_dim,
            "qk_rope_head_dim": config.latent.rope_dim,
            "qk_head_dim": config.latent.nope_dim + config.latent.rope_dim,
            "v_head_dim": config.latent.value_dim,
            "rope_interleave": config.latent.interleaved,
        }
    return own


def _rope_keys(rope: Rope) -> dict[str, Any]:
    return {key: value for key, value in vars(rope).items() if value is not None}


# ---- reading


class _Reader:
    """One config.json: every look at a key checks it, and every refusal names it."""

    def __init__(self, raw: dict[str, Any], source: str):
        self.raw, self.source = raw, source
        self.model_type = raw.get("model_type")
        if self.model_type not in ARCHITECTURES:
            self.refuse("model_type", f"one of {', '.join(ARCHITECTURES)}", self.model_type)
        self.architecture = ARCHITECTURES[self.model_type]
        self.defaults = DEFAULTS | self.architecture.defaults

    def refuse(self, key: str, expected: str, got: Any) -> NoReturn:
        raise InputError(f"{self.source}: {key}: expected {expected}, got {got!r}")

    def get(self, key: str, kind: type | tuple[type, ...], expected: str, least: float | None = None) -> Any:
        """The value of a key, or its default. None comes only from keys that may be null."""
        if key not in self.raw and key not in self.defaults:
            raise InputError(f"{self.source}: {key}: missing, expected {expected}")
        value = self.raw.get(key, self.defaults.get(key))
        if value is None:
            return None if key in NULLABLE else self.refuse(key, expected, value)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            self.refuse(key, expected, value)
        if least is not None and not value >= least:  # NaN included
            self.refuse(key, expected, value)
        return value

    def size(self, key: str) -> Any:
        return self.get(key, int, "a positive integer", least=1)

    def number(self, key: str) -> float:
        return float(self.get(key, (int, float), "a number >= 0", least=0))

    def flag(self, key: str) -> bool:
        """False also where the architecture does not have the key."""
        return key in COMMON | self.architecture.keys and self.get(key, bool, "true or false")

    def read(self, generation: dict[str, Any]) -> ModelConfig:
        self.refuse_what_is_not_built()
        layers = self.size("num_hidden_layers")
        rope_layers, rope, latent = self.rope_layers(layers), self.rope(), self.latent()
        values = {
            **{key: self.size(key) or 0 for key in SIZES},
            **{key: self.number(key) for key in NUMBERS},
            **{key: self.token_id(key) for key in TOKEN_IDS},
            "rope": rope,
            "rope_layers": rope_layers,
            "windows": self.windows(layers, rope_layers),
            "qkv_bias": self.flag("attention_bias") or self.flag("qkv_bias"),
            "output_bias": self.flag("attention_bias"),
            "mlp_bias": self.flag("mlp_bias"),
            "tie_word_embeddings": self.flag("tie_word_embeddings"),
            "experts": self.experts(layers),
            "latent": latent,
            **self.architecture.fixed,
        }
        if latent is not None:
            values["head_dim"] = latent.nope_dim + latent.rope_dim
            values["attention_scale"] = values["head_dim"] ** -0.5 * yarn_factor(rope) ** 2
        if self.model_type == "gemma3_text":
            values["local_rope"] = self.rope("sliding_attention")
            values["attention_scale"] = self.size("query_pre_attn_scalar") ** -0.5
        try:
            return ModelConfig(**values, model_type=self.raw["model_type"], generation=generation)
        except ValueError as error:
            raise InputError(f"{self.source}: {error}") from None

    def refuse_what_is_not_built(self) -> None:
        """A key that nobody reads may change the numbers, unless its value switches it off."""
        for key, value in self.raw.items():
            if key in ONLY and value not in ONLY[key]:
                self.refuse(key, f"{ONLY[key][0]!r}, nothing else is built", value)
            known = COMMON - {"hidden_activation"} | INERT | self.architecture.keys
            unknown = key not in known and not key.startswith("_")
            if unknown and value not in (None, False, 0, "", [], {}):
                raise InputError(f"{self.source}: {key}: not supported for {self.model_type}, got {value!r}")

    def token_id(self, key: str) -> int | tuple[int, ...] | None:
        value = self.get(key, (int, list), "a token id")
        if not isinstance(value, list):
            return value
        if key != "eos_token_id" or not all(isinstance(token, int) for token in value):
            self.refuse(key, "a token id", value)
        return tuple(value)

    def latent(self) -> Latent | None:
        if "kv_lora_rank" not in self.architecture.keys:
            return None
        return Latent(
            kv_rank=self.size("kv_lora_rank"),
            nope_dim=self.size("qk_nope_head_dim"),
            rope_dim=self.size("qk_rope_head_dim"),
            value_dim=self.size("v_head_dim"),
            q_rank=self.size("q_lora_rank") or 0,
            interleaved=self.flag("rope_interleave"),
        )

    def experts(self, layers: int) -> Experts | None:
        keys = self.architecture.keys
        name = next((k for k in ("num_experts", "num_local_experts", "n_routed_experts") if k in keys), None)
        if name is None:
            return None
        spelled = next((k for k in (name, "num_experts", "num_local_experts") if k in self.raw), name)
        size = self.size("moe_intermediate_size" if "moe_intermediate_size" in keys else "intermediate_size")
        options: dict[str, Any] = {}
        if self.model_type == "deepseek_v3":
            first = self.get("first_k_dense_replace", int, "an integer >= 0", least=0)
            has = tuple(i >= first for i in range(layers))
            options |= {
                "score": "sigmoid",
                "groups": self.size("n_group"),
                "top_groups": self.size("topk_group"),
                "scale": self.number("routed_scaling_factor"),
                "shared_size": size * self.get("n_shared_experts", int, "an integer >= 0", least=0),
            }
        else:
            dense, step = [], 1
            if "mlp_only_layers" in keys:
                dense = self.get("mlp_only_layers", list, "a list of layers")
                step = self.size("decoder_sparse_step")
            has = tuple(i not in dense and (i + 1) % step == 0 for i in range(layers))
            options["balance_coefficient"] = self.number("router_aux_loss_coef")
        if "shared_expert_intermediate_size" in keys:
            options |= {"shared_size": self.size("shared_expert_intermediate_size"), "shared_gate": True}
        if self.model_type == "gpt_oss":
            options |= {
                "clamped": True,
                "alpha": self.number("swiglu_alpha"),
                "limit": self.number("swiglu_limit"),
            }
        return Experts(
            num_experts=self.size(spelled),
            top_k=self.size("num_experts_per_tok"),
            intermediate_size=size,
            layers=has,
            renormalize=self.get("norm_topk_prob", bool, "true or false"),
            **options,
        )

    def rope(self, kind: str = "full_attention") -> Rope:
        """kind: which layers', where the file keeps them apart."""
        key = "rope_scaling" if self.raw.get("rope_scaling") else "rope_parameters"
        parameters = self.raw.get(key) or {}
        if not isinstance(parameters, dict):
            self.refuse(key, "an object", parameters)
        theta = "rope_theta"
        apart = "rope_local_base_freq" in self.architecture.keys
        if apart and isinstance(parameters.get(kind), dict):
            key, parameters = f"{key}.{kind}", parameters[kind]
        elif kind != "full_attention":
            theta, parameters = "rope_local_base_freq", {}
        rope_type = parameters.get("rope_type", parameters.get("type", "default"))
        if rope_type not in ROPE_KEYS:
            self.refuse(f"{key}.rope_type", f"one of {', '.join(ROPE_KEYS)}", rope_type)
        needed, possible = ROPE_KEYS[rope_type]
        values: dict[str, Any] = {"rope_theta": self.number(theta)}
        if "original_max_position_embeddings" in possible:
            values["original_max_position_embeddings"] = self.size("max_position_embeddings")
        for name, value in parameters.items():
            if name in ("rope_type", "type") or (name, value) == ("partial_rotary_factor", 1.0):
                continue
            if name not in ("rope_theta", *needed, *possible):
                raise InputError(
                    f"{self.source}: {key}.{name}: not supported for rope_type {rope_type}, got {value!r}"
                )
            if not isinstance(value, int | float) and (value is not None or name in needed):
                self.refuse(f"{key}.{name}", "a number", value)
            if value is not None:
                values[name] = value
        for name in needed:
            if name not in values:
                raise InputError(f"{self.source}: {key}.{name}: missing, rope_type {rope_type} needs it")
        return Rope(rope_type=rope_type, **values)

    def rope_layers(self, layers: int) -> tuple[bool, ...]:
        if "no_rope_layers" not in self.architecture.keys:
            return (True,) * layers
        # 1 where rope is used, in spite of the name
        rotated = self.get("no_rope_layers", list, "a list of 0 and 1")
        if rotated is None:
            interval = self.size("no_rope_layer_interval")
            return tuple((i + 1) % interval != 0 for i in range(layers))
        if len(rotated) < layers or any(value not in (0, 1) for value in rotated):
            self.refuse("no_rope_layers", f"0 or 1 for each of {layers} layers", rotated)
        return tuple(bool(value) for value in rotated[:layers])

    def windows(self, layers: int, rope_layers: tuple[bool, ...]) -> tuple[int | None, ...]:
        if "sliding_window" not in self.architecture.keys:
            return (None,) * layers
        unused = self.raw.get("sliding_window") == 0 and not self.raw.get("use_sliding_window")
        window = None if unused else self.size("sliding_window")
        if "layer_types" not in self.architecture.keys:
            return (window,) * layers
        if "use_sliding_window" in self.architecture.keys and not self.flag("use_sliding_window"):
            window = None
        kinds = self.get("layer_types", list, "a list of attention kinds")
        if kinds is None:
            if period := self.architecture.period:
                slides = [(i + 1) % period != 0 for i in range(layers)]
            elif "no_rope_layers" in self.architecture.keys:
                slides = [not rotated for rotated in rope_layers]
            else:
                first = self.get("max_window_layers", int, "an integer >= 0", least=0)
                slides = [i >= first for i in range(layers)]
            return tuple(window if slide else None for slide in slides)
        if len(kinds) != layers or any(kind not in ("full_attention", "sliding_attention") for kind in kinds):
            self.refuse(
                "layer_types", f"full_attention or sliding_attention for each of {layers} layers", kinds
            )
        if "sliding_attention" in kinds and window is None:
            self.refuse(
                "sliding_window", "a window, and use_sliding_window, since layer_types slides", window
            )
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
