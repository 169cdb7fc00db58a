"""What each architecture's config.json may say: its keys, what an absent one stands for, and what all of them share.

A `model_type` is a row of ARCHITECTURES; config.py reads and writes by these tables, and refuses a key that is in none.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Architecture:
    """How one `model_type` spells the fields."""

    class_name: str  # in transformers
    keys: frozenset[str]  # of config.json, beside those that all share
    fixed: dict[str, Any] = field(default_factory=dict)  # fields of ModelConfig that no key sets
    defaults: dict[str, Any] = field(default_factory=dict)  # of absent keys, where not DEFAULTS'
    period: int = 0  # every so many layers one sees everything, where no layer_types says which


_SLIDING = {"sliding_window", "use_sliding_window", "max_window_layers", "layer_types"}
_EXPERTS = {"num_experts_per_tok", "router_aux_loss_coef"}
_SOME_LAYERS = {"moe_intermediate_size", "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers"}

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
    "mixtral": Architecture(
        "MixtralForCausalLM",
        frozenset({"sliding_window", "num_local_experts", *_EXPERTS}),
        defaults={
            "max_position_embeddings": 131_072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
        },
    ),
    "qwen2_moe": Architecture(
        "Qwen2MoeForCausalLM",
        frozenset(
            {
                *("qkv_bias", "num_experts", "shared_expert_intermediate_size"),
                *(*_EXPERTS, *_SOME_LAYERS, *_SLIDING),
            }
        ),
        defaults={
            "sliding_window": 4096,
            "num_key_value_heads": 16,
            "qkv_bias": True,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
        },
    ),
    "qwen3_moe": Architecture(
        "Qwen3MoeForCausalLM",
        frozenset(
            {"attention_bias", "num_experts", "num_local_experts", *_EXPERTS, *_SOME_LAYERS, *_SLIDING}
        ),
        fixed={"qk_norm": True},
        defaults={
            "sliding_window": 4096,
            "num_key_value_heads": 4,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
        },
    ),
    "olmoe": Architecture(
        "OlmoeForCausalLM",
        frozenset({"attention_bias", "num_experts", "norm_topk_prob", *_EXPERTS}),
        fixed={"qk_norm_whole": True},
        defaults={
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "num_key_value_heads": None,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "router_aux_loss_coef": 0.01,
        },
    ),
    "deepseek_v3": Architecture(
        "DeepseekV3ForCausalLM",
        frozenset(
            {
                *("attention_bias", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"),
                *("n_routed_experts", "n_shared_experts", "first_k_dense_replace", "routed_scaling_factor"),
                *("n_group", "topk_group", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim"),
                *("qk_rope_head_dim", "qk_head_dim", "v_head_dim", "rope_interleave"),
            }
        ),
        defaults={
            "num_key_value_heads": None,
            "max_position_embeddings": 4096,
            "n_routed_experts": 256,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 2048,
            "norm_topk_prob": True,
            "q_lora_rank": 1536,
        },
    ),
    "gpt_oss": Architecture(
        "GptOssForCausalLM",
        frozenset(
            {
                *("attention_bias", "sliding_window", "layer_types", "num_local_experts"),
                *("swiglu_alpha", "swiglu_limit", *_EXPERTS),
            }
        ),
        fixed={"sinks": True},
        period=2,
        defaults={
            "max_position_embeddings": 131_072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 150_000.0,
            "attention_bias": True,
            "sliding_window": 128,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "num_local_experts": 128,
            "num_experts_per_tok": 4,
            "norm_topk_prob": True,
        },
    ),
    "gemma3_text": Architecture(
        "Gemma3ForCausalLM",
        frozenset(
            {
                *("attention_bias", "sliding_window", "layer_types", "query_pre_attn_scalar"),
                *("hidden_activation", "rope_local_base_freq"),
            }
        ),
        fixed={"qk_norm": True, "gemma": True},
        period=6,
        defaults={
            "max_position_embeddings": 131_072,
            "sliding_window": 4096,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "tie_word_embeddings": True,
            "rope_theta": 1e6,
        },
    ),
}

SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings"),
)
NUMBERS = ("rms_norm_eps", "initializer_range")
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
ONLY = {  # keys of which one value is built
    "hidden_act": ("silu", "swish"),
    "attention_dropout": (0.0, None),
    "partial_rotary_factor": (1.0, None),
    "rope_interleaved": (False, None),
    "hidden_activation": ("gelu_pytorch_tanh",),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "moe_layer_freq": (1,),
}
DEFAULTS: dict[str, Any] = {
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
    "router_aux_loss_coef": 0.001,
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "n_shared_experts": 1,
    "first_k_dense_replace": 3,
    "routed_scaling_factor": 2.5,
    "n_group": 8,
    "topk_group": 4,
    "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "rope_interleave": True,
    "query_pre_attn_scalar": 256,
    "rope_local_base_freq": 10_000.0,
    **dict.fromkeys(("head_dim", "sliding_window", "layer_types", "no_rope_layers", *TOKEN_IDS)),
}
NULLABLE = {
    "num_key_value_heads",
    "q_lora_rank",
    *(key for key, value in DEFAULTS.items() if value is None),
}
COMMON = {
    *("model_type", "tie_word_embeddings", "rope_parameters", "rope_scaling", "rope_theta"),
    *SIZES,
    *NUMBERS,
    *TOKEN_IDS,
    *ONLY,
}
INERT = {  # keys that no number depends on; the tensors say their own dtype
    *("architectures", "dtype", "torch_dtype", "transformers_version", "transformers.js_config", "use_cache"),
    *("pretraining_tp", "return_dict", "id2label", "label2id", "num_labels", "is_llama_config"),
    *(
        "output_router_logits",
        "router_jitter_noise",
        "initial_context_length",
        "ep_size",
        "max_window_layers",
    ),
    "num_nextn_predict_layers",  # transformers leaves the layers that predict further tokens out, too
    *("tokenizer_class", "name_or_path", "is_decoder", "output_attentions", "output_hidden_states"),
    *("do_sample", "temperature", "top_k", "top_p", "max_length", "unsloth_fixed", "unsloth_version"),
}
ROPE_KEYS = {  # rope_type -> keys it needs, keys it may have, beside rope_type and rope_theta
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
