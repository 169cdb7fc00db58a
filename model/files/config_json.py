"""The reader and the writer of a folder's config.json.

    read_config     config.json (transformers 4 or 5) -> ModelConfig; raises for values that are not supported
    write_config    ModelConfig -> a config.json that transformers 5 reads

transformers 4 wrote `rope_theta`, `rope_scaling` and `torch_dtype`. transformers 5 writes `rope_parameters` and
`dtype`. An absent key takes the value that transformers gives it for that architecture.
"""

from dataclasses import fields
from typing import Any

from ..config import Experts, Latent, ModelConfig
from ..errors import InputError, shown
from ..rope import Rope, yarn_factor
from .architectures import (
    ARCHITECTURES,
    NUMBERS,
    ROPE_INERT,
    ROPE_KEYS,
    ROPE_LEAST,
    ROPE_MAY_BE_NULL,
    ROPE_MAY_BE_ZERO,
    ROPE_MOST,
    SIZES,
    TOKEN_IDS,
)
from .config_keys import MOST, MOST_LAYERS, Keys, is_token_id

_NUMBER_OF_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")  # each architecture has one


def read_config(
    raw: dict[str, Any], source: str = "config.json", generation: dict[str, Any] | None = None
) -> ModelConfig:
    """Read a parsed config.json. source: its name in errors.

    generation: a parsed generation_config.json, which the ModelConfig keeps.
    Raises InputError naming the key that is missing, has the wrong type, or has an unsupported value.
    """
    return _Reader(raw, source).read(generation or {})


# ---- writing


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Return config.json for transformers 5, without a dtype, which depends on the tensors.

    Raises ValueError if the keys of `model_type` cannot express the config.
    """
    architecture = ARCHITECTURES[config.model_type]
    window = next((window for window in config.windows if window is not None), None)
    if window is None and architecture.needs_window:
        window = architecture.defaults["sliding_window"]  # transformers needs one, even if no layer uses it

    # the keys of all architectures
    eos = config.eos_token_id
    raw: dict[str, Any] = {
        "architectures": [architecture.class_name],
        "model_type": config.model_type,
        **{key: getattr(config, key) for key in (*SIZES, *NUMBERS, *TOKEN_IDS, "tie_word_embeddings")},
        "eos_token_id": list(eos) if isinstance(eos, tuple) else eos,
        "rope_parameters": _rope_keys(config.rope),
        **({"hidden_activation": "gelu_pytorch_tanh"} if config.gemma else {"hidden_act": "silu"}),
        "attention_dropout": 0.0,
        "use_cache": True,
    }

    # the other keys, as far as this architecture has them
    special = {
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
        "no_rope_layers": [int(rotated) for rotated in config.rope_layers],
        "sliding_window": window,
        "use_sliding_window": window is not None,
        "layer_types": ["full_attention" if w is None else "sliding_attention" for w in config.windows],
    }
    special |= _experts_keys(config) | _attention_keys(config)
    raw |= {key: value for key, value in special.items() if key in architecture.keys}

    # keys that transformers needs in another form
    if config.latent:
        raw["head_dim"] = config.latent.rope_dim  # the width that transformers rotates
        raw["qk_head_dim"] = config.latent.nope_dim + config.latent.rope_dim
    if config.gemma:
        kinds = ("full_attention", config.rope), ("sliding_attention", config.local_rope or config.rope)
        raw["rope_parameters"] = {kind: _rope_keys(rope) for kind, rope in kinds}

    again = read_config(raw, generation=config.generation)
    lost = [f.name for f in fields(config) if getattr(config, f.name) != getattr(again, f.name)]
    if lost:
        raise ValueError(
            f"{', '.join(lost)}: {config.model_type}'s config.json cannot express this: {config}"
        )
    return raw


def _experts_keys(config: ModelConfig) -> dict[str, Any]:
    experts = config.experts
    if experts is None:
        return {}
    choice = {
        "num_experts_per_tok": experts.top_k,
        "norm_topk_prob": experts.renormalize,
        "router_aux_loss_coef": experts.balance_coefficient,
        "routed_scaling_factor": experts.scale,
        "n_group": experts.groups,
        "topk_group": experts.top_groups,
    }

    return {
        **choice,
        **dict.fromkeys(_NUMBER_OF_EXPERTS, experts.num_experts),
        "moe_intermediate_size": experts.intermediate_size,
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
    found: dict[str, Any] = {
        "qkv_bias": config.qkv_bias,
        "query_pre_attn_scalar": round(scale**-2) if scale else config.head_dim,
    }
    if config.latent:
        found |= {
            "q_lora_rank": config.latent.q_rank or None,
            "kv_lora_rank": config.latent.kv_rank,
            "qk_nope_head_dim": config.latent.nope_dim,
            "qk_rope_head_dim": config.latent.rope_dim,
            "v_head_dim": config.latent.value_dim,
            "rope_interleave": config.latent.interleaved,
        }
    return found


def _rope_keys(rope: Rope) -> dict[str, Any]:
    return {key: value for key, value in vars(rope).items() if value is not None}


# ---- reading


class _Reader(Keys):
    """A reader that turns one config.json into the fields of ModelConfig."""

    def read(self, generation: dict[str, Any]) -> ModelConfig:
        self.refuse_what_is_not_built()
        layers = self.size("num_hidden_layers", MOST_LAYERS)
        rope_layers, rope, latent = self.rope_layers(layers), self.rope(), self.latent()

        values = {
            **{key: self.size(key) or 0 for key in SIZES},
            **{key: self.number(key) for key in NUMBERS},
            **{key: self.token_id(key) for key in TOKEN_IDS},
            # attention
            "rope": rope,
            "rope_layers": rope_layers,
            "windows": self.windows(layers, rope_layers),
            "qkv_bias": self.flag("attention_bias") or self.flag("qkv_bias"),
            "output_bias": self.flag("attention_bias"),
            # all else
            "mlp_bias": self.flag("mlp_bias"),
            "tie_word_embeddings": self.flag("tie_word_embeddings"),
            "experts": self.experts(layers),
            "latent": latent,
            **self.architecture.fixed,
        }

        if latent is not None:
            heads, shared = values["num_attention_heads"], values["num_key_value_heads"]
            if shared not in (0, heads):
                self.refuse("num_key_value_heads", f"num_attention_heads={heads}", shared)
            values["head_dim"] = latent.nope_dim + latent.rope_dim
            values["attention_scale"] = values["head_dim"] ** -0.5 * yarn_factor(rope) ** 2
        if self.has("query_pre_attn_scalar"):
            values["local_rope"] = self.rope("sliding_attention")
            values["attention_scale"] = self.size("query_pre_attn_scalar") ** -0.5

        try:
            return ModelConfig(**values, model_type=self.raw["model_type"], generation=generation)
        except ValueError as error:
            raise InputError(f"{self.source}: {error}") from None

    def token_id(self, key: str) -> int | tuple[int, ...] | None:
        value = self.get(key, (int, list), "a token id")
        if value is None:
            return None
        ids: list[Any] = value if isinstance(value, list) and key == "eos_token_id" else [value]
        if not all(map(is_token_id, ids)):
            self.refuse(key, f"a token id, up to {MOST}", value)
        return tuple(ids) if ids is value else ids[0]

    def latent(self) -> Latent | None:
        if not self.has("kv_lora_rank"):
            return None
        return Latent(
            kv_rank=self.size("kv_lora_rank"),
            nope_dim=self.size("qk_nope_head_dim"),
            rope_dim=self.size("qk_rope_head_dim"),
            value_dim=self.size("v_head_dim"),
            q_rank=self.size("q_lora_rank") or 0,
            interleaved=self.flag("rope_interleave"),
        )

    # ---- experts

    def experts(self, layers: int) -> Experts | None:
        name = next((key for key in _NUMBER_OF_EXPERTS if self.has(key)), None)
        if name is None:
            return None
        E, K = self.size(name), self.size("num_experts_per_tok")
        if K > E:
            self.refuse("num_experts_per_tok", f"at most {name}={E}", K)
        width = "moe_intermediate_size" if self.has("moe_intermediate_size") else "intermediate_size"
        size = self.size(width)

        options: dict[str, Any] = {}
        if self.has("n_group"):
            options = self.grouped(name, E, K, size)
        if self.has("router_aux_loss_coef"):
            options["balance_coefficient"] = self.number("router_aux_loss_coef")
        if self.has("shared_expert_intermediate_size"):
            options |= {"shared_size": self.size("shared_expert_intermediate_size"), "shared_gate": True}
        if self.has("swiglu_limit"):
            alpha, limit = self.number("swiglu_alpha"), self.number("swiglu_limit")
            options |= {"clamped": True, "alpha": alpha, "limit": limit}

        return Experts(
            num_experts=E,
            top_k=K,
            intermediate_size=size,
            layers=self.layers_with_experts(layers),
            renormalize=self.flag("norm_topk_prob") if self.has("norm_topk_prob") else True,
            **options,
        )

    def layers_with_experts(self, layers: int) -> tuple[bool, ...]:
        if self.has("first_k_dense_replace"):
            first = self.count("first_k_dense_replace")
            return tuple(i >= first for i in range(layers))
        if not self.has("mlp_only_layers"):
            return (True,) * layers
        step = self.size("decoder_sparse_step")
        dense = self.get("mlp_only_layers", list, "a list of layers") or []
        if any(type(i) is not int for i in dense):
            self.refuse("mlp_only_layers", "a list of layers", dense)
        return tuple(i not in dense and (i + 1) % step == 0 for i in range(layers))

    def grouped(self, name: str, E: int, K: int, size: int) -> dict[str, Any]:
        """Return the options of DeepSeek's choice of experts, which takes experts of the best groups only.

        A group's score is the sum of the scores of its two best experts.
        """
        groups, kept = self.size("n_group"), self.size("topk_group")
        if E % groups or E // groups < 2:
            self.refuse("n_group", f"equal groups of two or more of the {name}={E} experts", groups)
        if kept > groups:
            self.refuse("topk_group", f"at most n_group={groups}", kept)
        if kept * (E // groups) < K:
            self.refuse(
                "num_experts_per_tok", f"at most {kept * (E // groups)}, the experts in {kept} groups", K
            )

        return {
            "score": "sigmoid",
            "groups": groups,
            "top_groups": kept,
            "scale": self.number("routed_scaling_factor"),
            "shared_size": size * self.size("n_shared_experts"),
        }

    # ---- rope

    def rope(self, kind: str = "full_attention") -> Rope:
        """Read the rope parameters. kind: full_attention or sliding_attention, for files with parameters for each."""
        key, parameters, theta = self.rope_parameters(kind)
        rope_type = parameters.get("rope_type", parameters.get("type", "default"))
        if not isinstance(rope_type, str) or rope_type not in ROPE_KEYS:
            self.refuse(f"{key}.rope_type", f"one of {', '.join(ROPE_KEYS)}", rope_type)
        needed, possible = ROPE_KEYS[rope_type]
        for name in needed:
            if name not in parameters:
                raise InputError(f"{self.source}: {key}.{name}: missing, rope_type {rope_type} needs it")

        values: dict[str, Any] = {"rope_theta": theta}
        if "original_max_position_embeddings" in possible:
            values["original_max_position_embeddings"] = self.size("max_position_embeddings")
        for name, value in parameters.items():
            if name in ("rope_theta", *needed, *possible):
                values |= self.rope_value(f"{key}.{name}", name, value)
            elif name == "partial_rotary_factor":
                if value != 1 or isinstance(value, bool):
                    self.refuse(f"{key}.{name}", "1.0, nothing else is supported", value)
            elif name not in ("rope_type", "type") and value is not None and name not in ROPE_INERT:
                raise InputError(
                    f"{self.source}: {key}.{shown(name)}: not supported for rope_type {rope_type}, "
                    f"got {shown(repr(value))}"
                )

        if not 1 < values["rope_theta"] <= ROPE_MOST:
            self.refuse(f"{key}.rope_theta", f"a number above 1, up to {ROPE_MOST:g}", values["rope_theta"])
        if rope_type == "llama3" and not values["high_freq_factor"] > values["low_freq_factor"]:
            low = values["low_freq_factor"]
            self.refuse(
                f"{key}.high_freq_factor", f"more than low_freq_factor={low}", values["high_freq_factor"]
            )
        return Rope(rope_type=rope_type, **values)

    def rope_parameters(self, kind: str) -> tuple[str, dict[str, Any], float]:
        """Return (key, parameters, theta): rope's key and parameters in the file, and the default of rope_theta."""
        scaling, parameters = self.raw.get("rope_scaling"), self.raw.get("rope_parameters")
        for key, value in (("rope_scaling", scaling), ("rope_parameters", parameters)):
            if value is not None and not isinstance(value, dict):
                self.refuse(key, "an object", value)

        if not self.has("rope_local_base_freq"):
            key = "rope_scaling" if scaling else "rope_parameters"
            found = {**(scaling or (self.architecture.rope if parameters is None else parameters))}
            if "original_max_position_embeddings" in self.raw:
                found["original_max_position_embeddings"] = self.raw["original_max_position_embeddings"]
                if found.get("rope_type", found.get("type", "default")) not in ("llama3", "yarn"):
                    del found["original_max_position_embeddings"]  # only these two read it
            return key, found, self.number("rope_theta")

        kinds = ("full_attention", "sliding_attention")
        if flat := [name for name in parameters or {} if name not in kinds]:
            self.refuse(
                f"rope_parameters.{shown(flat[0])}", f"{' or '.join(kinds)}", (parameters or {})[flat[0]]
            )
        found = (parameters or {}).get(kind) or {}
        key = f"rope_parameters.{kind}"
        if not isinstance(found, dict):
            self.refuse(key, "an object", found)
        if kind == "full_attention" and scaling is not None:
            # without rope_type the type is "default", whatever `type` is
            key, found = "rope_scaling", {"rope_type": "default"} | found | scaling
        if found.get("truncate", True) is not True:
            self.refuse(
                f"{key}.truncate", "true, nothing else is supported for two kinds of rope", found["truncate"]
            )
        return key, found, self.number("rope_theta" if kind == "full_attention" else "rope_local_base_freq")

    def rope_value(self, key: str, name: str, value: Any) -> dict[str, Any]:
        """Check a rope parameter, and return {name: value}. For null, return {}, so that a default applies."""
        if name == "truncate":
            if value is not None and not isinstance(value, bool):
                self.refuse(key, "true or false", value)
            return {name: bool(value)}
        if value is None and name in ROPE_MAY_BE_NULL:
            return {}
        if name == "original_max_position_embeddings" and (type(value) is not int or not 1 <= value <= MOST):
            self.refuse(key, f"an integer above 0, up to {MOST}", value)

        zero = name in ROPE_MAY_BE_ZERO
        expected = "a number >= 0" if zero else "a number above 0"
        if not isinstance(value, int | float) or isinstance(value, bool) or not value >= 0:
            self.refuse(key, expected, value)
        if value == 0 and not zero:
            self.refuse(key, expected, value)
        if value and not ROPE_LEAST <= value <= ROPE_MOST:
            self.refuse(key, f"a number from {ROPE_LEAST:g} to {ROPE_MOST:g}", value)
        return {name: value}

    def rope_layers(self, layers: int) -> tuple[bool, ...]:
        if not self.has("no_rope_layers"):
            return (True,) * layers
        # 1 where rope is used, in spite of the name
        rotated = self.get("no_rope_layers", list, "a list of 0 and 1")
        interval = self.size("no_rope_layer_interval")
        if rotated is None:
            return tuple((i + 1) % interval != 0 for i in range(layers))
        if len(rotated) < layers or any(value not in (0, 1) for value in rotated):
            self.refuse("no_rope_layers", f"0 or 1 for each of {layers} layers", rotated)
        return tuple(bool(value) for value in rotated[:layers])

    # ---- windows

    def windows(self, layers: int, rope_layers: tuple[bool, ...]) -> tuple[int | None, ...]:
        if not self.has("sliding_window"):
            return tuple(None for _ in range(layers))
        used = self.flag("use_sliding_window") if self.has("use_sliding_window") else True
        window = self.size("sliding_window") if used else None
        needed = self.architecture.needs_window or self.architecture.slides == "early"
        if used and window is None and needed:
            self.refuse("sliding_window", "a positive integer", window)
        kinds = None
        if self.has("layer_types"):
            kinds = self.get("layer_types", list, "a list of attention kinds")
        if kinds is None:
            return tuple(window if slides else None for slides in self.slides(layers, rope_layers))

        if len(kinds) != layers or any(kind not in ("full_attention", "sliding_attention") for kind in kinds):
            self.refuse(
                "layer_types", f"full_attention or sliding_attention for each of {layers} layers", kinds
            )
        if "sliding_attention" in kinds and window is None:
            self.refuse(
                "sliding_window",
                "a window, and use_sliding_window, for layer_types' sliding_attention",
                window,
            )
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)

    def slides(self, layers: int, rope_layers: tuple[bool, ...]) -> list[bool]:
        """Return a bool for each layer: whether the architecture's rule gives it the sliding window."""
        match self.architecture.slides:
            case "late":
                first = self.count("max_window_layers")
                return [i >= first for i in range(layers)]
            case "early":
                last = self.count("max_window_layers")
                return [i % 2 == 0 and i < last for i in range(layers)]
            case "period":
                period = self.size("sliding_window_pattern")
                return [(i + 1) % period != 0 for i in range(layers)]
            case "unrotated":
                return [not rotated for rotated in rope_layers]
            case _:
                return [True] * layers
