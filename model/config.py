"""What a checkpoint's config.json says, as plain fields: every difference between architectures is one of them.

    from_hf     config.json (transformers 4 or 5) -> ModelConfig; refuses what this transformer would not compute
    to_hf       ModelConfig -> a config.json that transformers 5 reads

transformers 4 wrote `rope_theta`, `rope_scaling` and `torch_dtype`, transformers 5 writes `rope_parameters` and
`dtype`. A key that is absent takes the value that transformers gives it for that architecture.
"""

from dataclasses import dataclass, field, fields
from typing import Any, NoReturn

from .errors import InputError


@dataclass(frozen=True)
class Rope:
    """Rotary frequencies. The fields are the keys of `rope_parameters`, None where the type does not use them."""

    rope_theta: float = 10_000.0
    rope_type: str = "default"  # default, linear, llama3 or yarn
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None


@dataclass(frozen=True)
class ModelConfig:
    """The shape of one decoder. Names are config.json's where the meaning is the same."""

    vocab_size: int  # V
    hidden_size: int  # C
    intermediate_size: int  # F
    num_hidden_layers: int
    num_attention_heads: int  # H
    num_key_value_heads: int = 0  # G; 0 stands for H
    head_dim: int = 0  # D; 0 stands for C / H
    rms_norm_eps: float = 1e-6
    rope: Rope = Rope()
    rope_layers: tuple[bool, ...] = ()  # a layer: are its queries and keys rotated? () stands for all
    windows: tuple[int | None, ...] = ()  # a layer: its sliding window W, or None; () stands for no windows
    qk_norm: bool = False  # RMSNorm over D of every query and key head, before the rotation
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 2048  # what the model was trained for: nothing here stops at it
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    model_type: str = "llama"  # the architecture under whose keys to_hf writes the fields
    generation: dict[str, Any] = field(
        default_factory=dict, hash=False
    )  # generation_config.json, carried along

    def __post_init__(self):
        layers = self.num_hidden_layers
        for name, value in (
            ("num_key_value_heads", self.num_attention_heads),
            ("head_dim", self.hidden_size // self.num_attention_heads),
            ("rope_layers", (True,) * layers),
            ("windows", (None,) * layers),
        ):
            if not getattr(self, name):
                object.__setattr__(self, name, value)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads: expected a multiple of num_key_value_heads={self.num_key_value_heads}, "
                f"got {self.num_attention_heads}"
            )
        if self.head_dim % 2 and any(self.rope_layers):
            raise ValueError(
                f"head_dim: expected an even number, since rope rotates pairs, got {self.head_dim}"
            )
        for name in ("rope_layers", "windows"):
            if len(getattr(self, name)) != layers:
                raise ValueError(
                    f"{name}: expected one for each of {layers} layers, got {len(getattr(self, name))}"
                )

    @classmethod
    def from_hf(
        cls, raw: dict[str, Any], source: str = "config.json", generation: dict[str, Any] | None = None
    ) -> "ModelConfig":
        """From a parsed config.json; source names it in errors, generation is a parsed generation_config.json.

        Raises InputError naming the key that is missing, of the wrong type, or asks for what is not built.
        """
        return _Reader(raw, source).read(generation or {})

    def to_hf(self) -> dict[str, Any]:
        """config.json for transformers 5, without dtype: that is the tensors'.

        Raises ValueError where the keys of `model_type` cannot say what the fields say.
        """
        architecture = ARCHITECTURES[self.model_type]
        window = next((window for window in self.windows if window is not None), None)
        eos = self.eos_token_id
        raw: dict[str, Any] = {
            "architectures": [architecture.class_name],
            "model_type": self.model_type,
            **{key: getattr(self, key) for key in (*_SIZES, *_NUMBERS, *_TOKEN_IDS, "tie_word_embeddings")},
            "eos_token_id": list(eos) if isinstance(eos, tuple) else eos,
            "rope_parameters": {key: value for key, value in vars(self.rope).items() if value is not None},
            "hidden_act": "silu",
            "attention_dropout": 0.0,
            "use_cache": True,
        }
        own = {
            "attention_bias": self.qkv_bias,
            "mlp_bias": self.mlp_bias,
            "no_rope_layers": [int(rotated) for rotated in self.rope_layers],
            "sliding_window": window,
            "use_sliding_window": window is not None,
            "layer_types": ["full_attention" if w is None else "sliding_attention" for w in self.windows],
        }
        raw |= {key: value for key, value in own.items() if key in architecture.keys}
        again = ModelConfig.from_hf(raw, generation=self.generation)
        lost = [f.name for f in fields(self) if getattr(self, f.name) != getattr(again, f.name)]
        if lost:
            raise ValueError(f"{', '.join(lost)}: {self.model_type}'s config.json cannot say this: {self}")
        return raw


# ---- architectures


@dataclass(frozen=True)
class Architecture:
    """How one `model_type` spells the fields."""

    class_name: str  # in transformers
    keys: frozenset[str]  # of config.json, beside those that all share
    fixed: dict[str, Any] = field(default_factory=dict)  # fields of ModelConfig that no key sets
    defaults: dict[str, Any] = field(default_factory=dict)  # of absent keys, where not _DEFAULTS'


_SLIDING = {"sliding_window", "use_sliding_window", "max_window_layers", "layer_types"}

ARCHITECTURES = {
    "llama": Architecture(
        "LlamaForCausalLM",
        frozenset({"attention_bias", "mlp_bias"}),
        defaults={"num_key_value_heads": None, "max_position_embeddings": 2048},
    ),
    "mistral": Architecture(
        "MistralForCausalLM",
        frozenset({"sliding_window"}),
        defaults={"sliding_window": 4096, "max_position_embeddings": 131_072},
    ),
    "qwen2": Architecture(
        "Qwen2ForCausalLM",
        frozenset(_SLIDING),
        fixed={"qkv_bias": True},
        defaults={"sliding_window": 4096},
    ),
    "qwen3": Architecture(
        "Qwen3ForCausalLM",
        frozenset({"attention_bias", *_SLIDING}),
        fixed={"qk_norm": True},
        defaults={"sliding_window": 4096, "head_dim": 128},
    ),
    "smollm3": Architecture(
        "SmolLM3ForCausalLM",
        frozenset({"attention_bias", "mlp_bias", "no_rope_layers", "no_rope_layer_interval", *_SLIDING}),
        defaults={"tie_word_embeddings": True, "rope_theta": 2e6},
    ),
}

_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings"),
)
_NUMBERS = ("rms_norm_eps", "initializer_range")
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_ONLY = {  # keys of which one value is built
    "hidden_act": ("silu", "swish"),
    "attention_dropout": (0.0, None),
    "partial_rotary_factor": (1.0, None),
    "rope_interleaved": (False, None),
}
_DEFAULTS: dict[str, Any] = {
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "max_position_embeddings": 32_768,
    "rope_theta": 10_000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "max_window_layers": 28,
    "no_rope_layer_interval": 4,
    **dict.fromkeys(("head_dim", "sliding_window", "layer_types", "no_rope_layers", *_TOKEN_IDS)),
}
_NULLABLE = {"num_key_value_heads", *(key for key, value in _DEFAULTS.items() if value is None)}
_COMMON = {
    *("model_type", "tie_word_embeddings", "rope_parameters", "rope_scaling", "rope_theta"),
    *_SIZES,
    *_NUMBERS,
    *_TOKEN_IDS,
    *_ONLY,
}
_INERT = {  # keys that no number depends on; the tensors say their own dtype
    *("architectures", "dtype", "torch_dtype", "transformers_version", "transformers.js_config", "use_cache"),
    *(
        "pretraining_tp",
        "return_dict",
        "id2label",
        "label2id",
        "num_labels",
        "is_llama_config",
        "max_window_layers",
    ),
    *(
        "tokenizer_class",
        "name_or_path",
        "is_decoder",
        "output_attentions",
        "output_hidden_states",
    ),
    *("do_sample", "temperature", "top_k", "top_p", "max_length", "unsloth_fixed", "unsloth_version"),
}
_ROPE_KEYS = {  # rope_type -> keys it needs, keys it may have, beside rope_type and rope_theta
    "default": ((), ()),
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ("original_max_position_embeddings",)),
    "yarn": (
        ("factor",),
        (
            *("original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
            *("mscale", "mscale_all_dim", "truncate"),
        ),
    ),
}


# ---- reading


class _Reader:
    """One config.json: every look at a key checks it, and every refusal names it."""

    def __init__(self, raw: dict[str, Any], source: str):
        self.raw, self.source = raw, source
        self.model_type = raw.get("model_type")
        if self.model_type not in ARCHITECTURES:
            self.refuse("model_type", f"one of {', '.join(ARCHITECTURES)}", self.model_type)
        self.architecture = ARCHITECTURES[self.model_type]
        self.defaults = _DEFAULTS | self.architecture.defaults

    def refuse(self, key: str, expected: str, got: Any) -> NoReturn:
        raise InputError(f"{self.source}: {key}: expected {expected}, got {got!r}")

    def get(self, key: str, kind: type | tuple[type, ...], expected: str, least: float | None = None) -> Any:
        """The value of a key, or its default. None comes only from keys that may be null."""
        if key not in self.raw and key not in self.defaults:
            raise InputError(f"{self.source}: {key}: missing, expected {expected}")
        value = self.raw.get(key, self.defaults.get(key))
        if value is None:
            return None if key in _NULLABLE else self.refuse(key, expected, value)
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
        shared = key in _COMMON
        return (shared or key in self.architecture.keys) and self.get(key, bool, "true or false")

    def read(self, generation: dict[str, Any]) -> ModelConfig:
        self.refuse_what_is_not_built()
        layers = self.size("num_hidden_layers")
        rope_layers = self.rope_layers(layers)
        values = {
            **{key: self.size(key) or 0 for key in _SIZES},
            **{key: self.number(key) for key in _NUMBERS},
            **{key: self.token_id(key) for key in _TOKEN_IDS},
            "rope": self.rope(),
            "rope_layers": rope_layers,
            "windows": self.windows(layers, rope_layers),
            "qkv_bias": self.flag("attention_bias"),
            "output_bias": self.flag("attention_bias"),
            "mlp_bias": self.flag("mlp_bias"),
            "tie_word_embeddings": self.flag("tie_word_embeddings"),
            **self.architecture.fixed,
        }
        try:
            return ModelConfig(**values, model_type=self.raw["model_type"], generation=generation)
        except ValueError as error:
            raise InputError(f"{self.source}: {error}") from None

    def refuse_what_is_not_built(self) -> None:
        """A key that nobody reads may change the numbers, unless its value switches it off."""
        for key, value in self.raw.items():
            if key in _ONLY and value not in _ONLY[key]:
                self.refuse(key, f"{_ONLY[key][0]!r}, nothing else is built", value)
            known = key in _COMMON | _INERT | self.architecture.keys or key.startswith("_")
            if not known and value not in (None, False, 0, "", [], {}):
                raise InputError(f"{self.source}: {key}: not supported for {self.model_type}, got {value!r}")

    def token_id(self, key: str) -> int | tuple[int, ...] | None:
        value = self.get(key, (int, list), "a token id")
        if not isinstance(value, list):
            return value
        if key != "eos_token_id" or not all(isinstance(token, int) for token in value):
            self.refuse(key, "a token id", value)
        return tuple(value)

    def rope(self) -> Rope:
        key = "rope_scaling" if self.raw.get("rope_scaling") else "rope_parameters"
        parameters = self.raw.get(key) or {}
        if not isinstance(parameters, dict):
            self.refuse(key, "an object", parameters)
        rope_type = parameters.get("rope_type", parameters.get("type", "default"))
        if rope_type not in _ROPE_KEYS:
            self.refuse(f"{key}.rope_type", f"one of {', '.join(_ROPE_KEYS)}", rope_type)
        needed, possible = _ROPE_KEYS[rope_type]
        values: dict[str, Any] = {"rope_theta": self.number("rope_theta")}
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
        rotated = self.get(
            "no_rope_layers", list, "a list of 0 and 1"
        )  # 1 where rope is used, in spite of the name
        if rotated is None:
            interval = self.size("no_rope_layer_interval")
            return tuple((i + 1) % interval != 0 for i in range(layers))
        if len(rotated) < layers or any(value not in (0, 1) for value in rotated):
            self.refuse("no_rope_layers", f"0 or 1 for each of {layers} layers", rotated)
        return tuple(bool(value) for value in rotated[:layers])

    def windows(self, layers: int, rope_layers: tuple[bool, ...]) -> tuple[int | None, ...]:
        if "sliding_window" not in self.architecture.keys:
            return (None,) * layers
        window = self.size("sliding_window")
        if "layer_types" not in self.architecture.keys:
            return (window,) * layers
        if not self.flag("use_sliding_window"):
            window = None
        kinds = self.get("layer_types", list, "a list of attention kinds")
        if kinds is None:
            if "no_rope_layers" in self.architecture.keys:
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
