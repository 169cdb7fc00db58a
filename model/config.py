"""What a checkpoint's config.json says, as plain fields: every difference between architectures is one of them.

    from_hf     config.json (transformers 4 or 5) -> ModelConfig; refuses what this transformer would not compute
    to_hf       ModelConfig -> the config.json that transformers 5 reads

transformers 4 wrote `rope_theta`, `rope_scaling` and `torch_dtype`, transformers 5 writes `rope_parameters` and `dtype`.
A key that is absent takes the value that transformers gives it for that architecture.
"""

from dataclasses import dataclass, field
from typing import Any

from .errors import InputError


@dataclass(frozen=True)
class Rope:
    """Rotary frequencies; the fields are the keys of `rope_parameters`, None where the type does not use them."""

    rope_theta: float = 10_000.0
    rope_type: str = "default"
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
    """The shape of one decoder. Names as in config.json where the meaning is the same."""

    vocab_size: int  # V
    hidden_size: int  # C
    intermediate_size: int  # F
    num_hidden_layers: int
    num_attention_heads: int  # H
    num_key_value_heads: int = 0  # G; 0 stands for H
    head_dim: int = 0  # D; 0 stands for C / H
    rms_norm_eps: float = 1e-6
    rope: Rope = Rope()
    rope_layers: tuple[bool, ...] = ()  # one for each layer: are queries and keys rotated; () stands for all
    windows: tuple[
        int | None, ...
    ] = ()  # one for each layer: sliding window W, or None; () stands for no windows
    qk_norm: bool = False  # RMSNorm over D on every query and key head, before the rotation
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    model_type: str = "llama"  # the name under which config.json describes these fields
    generation: dict[str, Any] = field(
        default_factory=dict, hash=False
    )  # generation_config.json, carried along

    def __post_init__(self):
        layers = self.num_hidden_layers
        for name, stands_for in (
            ("num_key_value_heads", self.num_attention_heads),
            ("head_dim", self.hidden_size // self.num_attention_heads),
            ("rope_layers", (True,) * layers),
            ("windows", (None,) * layers),
        ):
            if not getattr(self, name):
                object.__setattr__(self, name, stands_for)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads: expected a multiple of num_key_value_heads={self.num_key_value_heads}, "
                f"got {self.num_attention_heads}"
            )
        if self.head_dim % 2 and any(self.rope_layers):
            raise ValueError(
                f"head_dim: expected an even number where rope rotates pairs, got {self.head_dim}"
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
        """Read a parsed config.json. source names the file in errors; generation is a parsed generation_config.json.

        Raises InputError naming the key where one is missing, of the wrong type, or asks for what is not built.
        """
        return _Reader(raw, source).read(generation or {})

    def to_hf(self) -> dict[str, Any]:
        """config.json for transformers 5; dtype is left to the writer of the tensors.

        Raises ValueError where `model_type` has no key for one of the fields.
        """
        architecture = ARCHITECTURES[self.model_type]
        window = next((window for window in self.windows if window is not None), None)
        raw: dict[str, Any] = {
            "architectures": [architecture.class_name],
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            "rope_parameters": {key: value for key, value in vars(self.rope).items() if value is not None},
            "use_cache": True,
            "sliding_window": window,
            **{key: getattr(self, key) for key in ("model_type", *_SAME_NAME, *_TOKEN_IDS)},
        }
        if isinstance(self.eos_token_id, tuple):
            raw["eos_token_id"] = list(self.eos_token_id)
        if "attention_bias" in architecture.keys:
            raw["attention_bias"] = self.qkv_bias
        if "mlp_bias" in architecture.keys:
            raw["mlp_bias"] = self.mlp_bias
        if "no_rope_layers" in architecture.keys:
            raw["no_rope_layers"] = [int(rotated) for rotated in self.rope_layers]
        if "layer_types" in architecture.keys:
            raw["use_sliding_window"] = window is not None
            raw["layer_types"] = [
                "full_attention" if window is None else "sliding_attention" for window in self.windows
            ]
        if "sliding_window" not in architecture.keys:
            del raw["sliding_window"]
        if ModelConfig.from_hf(raw, generation=self.generation) != self:
            raise ValueError(f"model_type: {self.model_type!r} cannot express this configuration: {self}")
        return raw


# ---- architectures


@dataclass(frozen=True)
class Architecture:
    """How one `model_type` spells the fields: its class in transformers, its own keys, fields it fixes, its defaults."""

    class_name: str
    keys: frozenset[str]
    fixed: dict[str, Any] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)


_SLIDING = {"sliding_window", "use_sliding_window", "max_window_layers", "layer_types"}

ARCHITECTURES = {
    "llama": Architecture(
        "LlamaForCausalLM",
        frozenset({"attention_bias", "mlp_bias"}),
        defaults={"num_key_value_heads": None, "head_dim": None, "max_position_embeddings": 2048},
    ),
    "qwen2": Architecture(
        "Qwen2ForCausalLM",
        frozenset(_SLIDING),
        fixed={"qkv_bias": True},
        defaults={"head_dim": None, "sliding_window": 4096, "max_window_layers": 28},
    ),
    "qwen3": Architecture(
        "Qwen3ForCausalLM",
        frozenset({"attention_bias", *_SLIDING}),
        fixed={"qk_norm": True},
        defaults={"head_dim": 128, "sliding_window": 4096, "max_window_layers": 28},
    ),
    "mistral": Architecture(
        "MistralForCausalLM",
        frozenset({"sliding_window"}),
        defaults={"head_dim": None, "sliding_window": 4096, "max_position_embeddings": 131_072},
    ),
    "smollm3": Architecture(
        "SmolLM3ForCausalLM",
        frozenset({"attention_bias", "mlp_bias", "no_rope_layers", "no_rope_layer_interval", *_SLIDING}),
        defaults={
            "head_dim": None,
            "no_rope_layer_interval": 4,
            "tie_word_embeddings": True,
            "rope_theta": 2e6,
        },
    ),
}

_DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "max_position_embeddings": 32_768,
    "hidden_act": "silu",
    "rope_theta": 10_000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "partial_rotary_factor": 1.0,
    "sliding_window": None,
    "use_sliding_window": False,
    "layer_types": None,
    "no_rope_layers": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}

_SAME_NAME = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "rms_norm_eps max_position_embeddings initializer_range tie_word_embeddings"
).split()
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_READ = {
    *_SAME_NAME,
    *_TOKEN_IDS,
    *("model_type", "hidden_act", "attention_dropout", "partial_rotary_factor"),
    *("rope_parameters", "rope_scaling", "rope_theta"),
}
# keys without an effect on the numbers; tensors say their own dtype
_INERT = set(
    "architectures dtype torch_dtype transformers_version use_cache pretraining_tp return_dict output_attentions "
    "output_hidden_states id2label label2id num_labels problem_type is_llama_config transformers.js_config "
    "rope_interleaved max_window_layers unsloth_fixed unsloth_version".split()
)
_ROPE_KEYS = {  # rope_type -> required keys, optional keys, beside rope_type and rope_theta
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
    """One config.json under the eyes of from_hf: every look at a key checks it, and every refusal names it."""

    def __init__(self, raw: dict[str, Any], source: str):
        if not isinstance(raw, dict):
            raise InputError(f"{source}: expected a JSON object, got {type(raw).__name__}")
        self.raw, self.source = raw, source
        model_type = raw.get("model_type")
        if model_type not in ARCHITECTURES:
            self.refuse("model_type", f"one of {', '.join(ARCHITECTURES)}", model_type)
        self.architecture = ARCHITECTURES[model_type]

    def refuse(self, key: str, expected: str, got: Any):
        raise InputError(f"{self.source}: {key}: expected {expected}, got {got!r}")

    def get(
        self, key: str, kind: type | tuple[type, ...], expected: str, minimum: float | None = None
    ) -> Any:
        """The value of a key, or its default; None only where the default is None."""
        defaults = {**_DEFAULTS, **self.architecture.defaults}
        if key not in self.raw and key not in defaults:
            raise InputError(f"{self.source}: {key}: missing, expected {expected}")
        value = self.raw.get(key, defaults.get(key))
        if value is None and (key in ("num_key_value_heads", "head_dim") or defaults.get(key, 0) is None):
            return None
        is_kind = isinstance(value, kind) and not (isinstance(value, bool) and kind is not bool)
        if not is_kind or (minimum is not None and value < minimum):
            self.refuse(key, expected, value)
        return value

    def size(self, key: str) -> Any:
        return self.get(key, int, "a positive integer", minimum=1)

    def number(self, key: str) -> float:
        return float(self.get(key, (int, float), "a number >= 0", minimum=0))

    def flag(self, key: str) -> bool:
        return self.get(key, bool, "true or false")

    def read(self, generation: dict[str, Any]) -> ModelConfig:
        self.refuse_unknown()
        attention_bias = "attention_bias" in self.architecture.keys and self.flag("attention_bias")
        layers = self.size("num_hidden_layers")
        rope_layers = self.rope_layers(layers)
        values = {
            **{
                key: self.number(key) if key in ("rms_norm_eps", "initializer_range") else self.size(key) or 0
                for key in _SAME_NAME
                if key != "tie_word_embeddings"
            },
            **{key: self.token_id(key) for key in _TOKEN_IDS},
            "tie_word_embeddings": self.flag("tie_word_embeddings"),
            "rope": self.rope(),
            "rope_layers": rope_layers,
            "windows": self.windows(layers, rope_layers),
            "qkv_bias": attention_bias,
            "output_bias": attention_bias,
            "mlp_bias": "mlp_bias" in self.architecture.keys and self.flag("mlp_bias"),
            **self.architecture.fixed,
        }
        try:
            return ModelConfig(**values, model_type=self.raw["model_type"], generation=generation)
        except ValueError as error:
            raise InputError(f"{self.source}: {error}") from None

    def refuse_unknown(self):
        """A key that nobody here reads may change the numbers, unless it is off."""
        known = _READ | _INERT | self.architecture.keys
        for key, value in self.raw.items():
            if key not in known and not key.startswith("_") and value not in (None, False, 0, [], {}, ""):
                raise InputError(
                    f"{self.source}: {key}: not supported for {self.raw['model_type']}, got {value!r}"
                )
        for key, only in (("attention_dropout", 0.0), ("partial_rotary_factor", 1.0)):
            if (value := self.number(key)) != only:
                self.refuse(key, f"{only}: nothing else is built", value)
        if (activation := self.get("hidden_act", str, "silu")) not in ("silu", "swish"):
            self.refuse("hidden_act", "silu", activation)
        if self.raw.get("rope_interleaved"):
            self.refuse("rope_interleaved", "false", self.raw["rope_interleaved"])

    def token_id(self, key: str) -> int | tuple[int, ...] | None:
        value = self.get(key, (int, list), "a token id", minimum=None)
        if isinstance(value, list):
            if key != "eos_token_id" or not all(isinstance(id, int) for id in value):
                self.refuse(key, "a token id", value)
            return tuple(value)
        return value

    def rope(self) -> Rope:
        key = "rope_parameters" if self.raw.get("rope_parameters") else "rope_scaling"
        parameters = self.raw.get(key) or {}
        if not isinstance(parameters, dict):
            self.refuse(key, "an object", parameters)
        rope_type = parameters.get("rope_type", parameters.get("type", "default"))
        if rope_type not in _ROPE_KEYS:
            self.refuse(f"{key}.rope_type", f"one of {', '.join(_ROPE_KEYS)}", rope_type)
        required, optional = _ROPE_KEYS[rope_type]
        values = {name: value for name, value in parameters.items() if name not in ("rope_type", "type")}
        if values.pop("partial_rotary_factor", 1.0) != 1.0:
            self.refuse(f"{key}.partial_rotary_factor", "1.0", parameters["partial_rotary_factor"])
        for name in required:
            if name not in values:
                raise InputError(f"{self.source}: {key}.{name}: missing, rope_type {rope_type} needs it")
        for name, value in values.items():
            if name not in ("rope_theta", *required, *optional):
                raise InputError(f"{self.source}: {key}.{name}: not a parameter of rope_type {rope_type}")
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (
                is_number
                or (value is None and name not in required)
                or isinstance(value, bool)
                and name == "truncate"
            ):
                self.refuse(f"{key}.{name}", "a number", value)
        if "original_max_position_embeddings" in optional:
            values.setdefault("original_max_position_embeddings", self.size("max_position_embeddings"))
        if values.get("rope_theta") is None:
            values["rope_theta"] = self.number("rope_theta")
        return Rope(**{**values, "rope_theta": float(values["rope_theta"]), "rope_type": rope_type})

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
        window = self.raw.get("sliding_window", self.architecture.defaults.get("sliding_window"))
        if window is not None:
            window = self.size("sliding_window")
        if "layer_types" not in self.architecture.keys:
            return (window,) * layers
        if not self.flag("use_sliding_window"):
            window = None
        types = self.get("layer_types", list, "a list of attention kinds")
        if types is None and "no_rope_layers" in self.architecture.keys:
            types = [
                "full_attention" if rotated or window is None else "sliding_attention"
                for rotated in rope_layers
            ]
        elif types is None:
            first = (
                layers if window is None else self.get("max_window_layers", int, "an integer >= 0", minimum=0)
            )
            types = ["full_attention" if i < first else "sliding_attention" for i in range(layers)]
        if len(types) != layers or any(kind not in ("full_attention", "sliding_attention") for kind in types):
            self.refuse(
                "layer_types", f"full_attention or sliding_attention for each of {layers} layers", types
            )
        if "sliding_attention" in types and window is None:
            self.refuse("sliding_window", "a window and use_sliding_window, since layer_types slides", None)
        return tuple(window if kind == "sliding_attention" else None for kind in types)
