"""The keys of each architecture's config.json, their defaults, and the values that are supported.

Each `model_type` is a row of ARCHITECTURES; config_keys.py and config_json.py use these tables. A key belongs to one of
three kinds. It is read (`keys`, COMMON), or only some of its values are supported (`only`, ONLY), or it is inert
(`inert`, INERT). An inert key changes no number, for the reason given beside it. Any other key is refused with an error
that names it, unless its value is null.
"""

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Architecture:
    """One `model_type`: its keys of config.json, and their meaning."""

    class_name: str  # in transformers
    special: str  # how it differs from the others, for a table in the docs
    keys: frozenset[str]  # keys that are read, besides COMMON
    fixed: dict[str, Any] = field(default_factory=dict)  # fields of ModelConfig that no key sets
    defaults: dict[str, Any] = field(default_factory=dict)  # values of absent keys, before DEFAULTS
    only: dict[str, tuple[Any, ...]] = field(default_factory=dict)  # key -> its supported values
    inert: dict[str, str] = field(default_factory=dict)  # key -> why it changes no number
    aliases: dict[str, str] = field(default_factory=dict)  # another name of a key -> the key
    repeats: dict[str, str] = field(default_factory=dict)  # key -> the key whose value it repeats
    rope: dict[str, Any] = field(default_factory=dict)  # rope's parameters if no key has them
    # the layers with the window if there is no layer_types. all: every layer; late: from max_window_layers on;
    # early: every other one before max_window_layers; period: all but each sliding_window_pattern-th; unrotated:
    # those without rope
    slides: Literal["all", "late", "early", "period", "unrotated"] = "all"
    needs_window: bool = False  # transformers fails without a sliding_window, even if no layer has it


_SLIDING = {"sliding_window", "use_sliding_window", "max_window_layers", "layer_types"}
_EXPERTS = {"num_experts_per_tok", "router_aux_loss_coef"}
_SOME_LAYERS = {"moe_intermediate_size", "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers"}
_NO_BIAS = {"attention_bias": (False,)}
_LLAMA_IDS = {"bos_token_id": 1, "eos_token_id": 2}
_LONG_CONTEXT = {
    "dual_chunk_attention_config": "vLLM's attention beyond the trained length: transformers ignores it"
}
_NO_WINDOW_LAYERS = {"max_window_layers": "left over from Qwen2's config: no layer is chosen by it"}

ARCHITECTURES = {
    "llama": Architecture(
        "LlamaForCausalLM",
        "the plain one; rope of Llama 3",
        frozenset({"attention_bias", "mlp_bias"}),
        defaults={"num_key_value_heads": None, "max_position_embeddings": 2048, **_LLAMA_IDS},
    ),
    "mistral": Architecture(
        "MistralForCausalLM",
        "a sliding window in every layer",
        frozenset({"sliding_window"}),
        defaults={
            "sliding_window": 4096,
            "max_position_embeddings": 131_072,
            "num_key_value_heads": 8,
            **_LLAMA_IDS,
        },
        only=_NO_BIAS,
    ),
    "qwen2": Architecture(
        "Qwen2ForCausalLM",
        "biases of queries, keys and values; a window in late layers",
        frozenset(_SLIDING),
        fixed={"qkv_bias": True},
        defaults={"sliding_window": 4096, "num_key_value_heads": 32},
        inert=_LONG_CONTEXT,
        slides="late",
    ),
    "qwen3": Architecture(
        "Qwen3ForCausalLM",
        "norms of query and key heads; a window in late layers",
        frozenset({"attention_bias", *_SLIDING}),
        fixed={"qk_norm": True},
        defaults={"sliding_window": 4096, "num_key_value_heads": 32, "head_dim": 128},
        slides="late",
    ),
    "smollm3": Architecture(
        "SmolLM3ForCausalLM",
        "layers without rope",
        frozenset(
            {
                *("attention_bias", "mlp_bias", "no_rope_layers", "no_rope_layer_interval"),
                *(_SLIDING - {"max_window_layers"}),
            }
        ),
        defaults={
            "tie_word_embeddings": True,
            "rope_theta": 2e6,
            "num_key_value_heads": 4,
            "bos_token_id": 128_000,
            "eos_token_id": 128_001,
            "pad_token_id": 128_004,
        },
        inert=_NO_WINDOW_LAYERS,
        slides="unrotated",
    ),
    "mixtral": Architecture(
        "MixtralForCausalLM",
        "experts in every layer",
        frozenset({"sliding_window", "num_local_experts", *_EXPERTS}),
        defaults={
            "max_position_embeddings": 131_072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            **_LLAMA_IDS,
        },
        # the noise would be added in training only
        only={"router_jitter_noise": (0.0,), "norm_topk_prob": (True,), **_NO_BIAS},
        aliases={"num_experts": "num_local_experts"},
    ),
    "qwen2_moe": Architecture(
        "Qwen2MoeForCausalLM",
        "experts, and one with a gate that every token goes to",
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
        slides="early",
    ),
    "qwen3_moe": Architecture(
        "Qwen3MoeForCausalLM",
        "experts in some layers; norms of query and key heads; a window in every layer",
        frozenset(
            {
                *("attention_bias", "num_experts", "num_local_experts"),
                *("sliding_window", "use_sliding_window"),
                *(*_EXPERTS, *_SOME_LAYERS),
            }
        ),
        fixed={"qk_norm": True},
        defaults={
            "sliding_window": 4096,
            "num_key_value_heads": 4,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
        },
        # Qwen3-Coder's files have these keys
        only={"use_qk_norm": (True,), "qkv_bias": (False,), "shared_expert_intermediate_size": (0, None)},
        inert=_NO_WINDOW_LAYERS | _LONG_CONTEXT,
        aliases={"num_local_experts": "num_experts"},
    ),
    "olmoe": Architecture(
        "OlmoeForCausalLM",
        "experts in every layer; norms over all query and all key heads",
        frozenset({"attention_bias", "num_experts", "norm_topk_prob", *_EXPERTS}),
        fixed={"qk_norm_whole": True},
        defaults={
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "num_key_value_heads": None,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "router_aux_loss_coef": 0.01,
            "eos_token_id": 50_279,
            "pad_token_id": 1,
        },
        only={"clip_qkv": (None,)},
        aliases={"num_local_experts": "num_experts"},
    ),
    "deepseek_v3": Architecture(
        "DeepseekV3ForCausalLM",
        "latent attention; experts in groups, chosen by sigmoids, and one for every token",
        frozenset(
            {
                *("attention_bias", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"),
                *("n_routed_experts", "n_shared_experts", "first_k_dense_replace", "routed_scaling_factor"),
                *("n_group", "topk_group", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim"),
                *("qk_rope_head_dim", "v_head_dim", "rope_interleave"),
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
            "bos_token_id": 0,
            "eos_token_id": 1,
        },
        only={"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",), "moe_layer_freq": (1,)},
        inert={
            "auto_map": "names DeepSeek's own code for what transformers computes by itself",
            "aux_loss_alpha": "weight of a balance loss that transformers does not have for this architecture",
            "seq_aux": "the averaging of that balance loss",
            "ep_size": "the distribution of the experts over devices",
            **dict.fromkeys(
                ("num_nextn_predict_layers", "num_mtp_layers"),
                "layers that predict further tokens: transformers leaves them out, too",
            ),
            **dict.fromkeys(
                ("head_dim", "qk_head_dim"), "follows from qk_nope_head_dim and qk_rope_head_dim"
            ),
        },
        aliases={"num_local_experts": "n_routed_experts"},
    ),
    "gpt_oss": Architecture(
        "GptOssForCausalLM",
        "sinks; experts with biases and a clamped SwiGLU; every other layer has a window",
        frozenset(
            {
                *("attention_bias", "sliding_window", "layer_types", "num_local_experts"),
                *("swiglu_alpha", "swiglu_limit", *_EXPERTS),
            }
        ),
        fixed={"sinks": True},
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
            "sliding_window_pattern": 2,
        },
        only={"norm_topk_prob": (True,)},
        inert={"initial_context_length": "rope's parameters have it as original_max_position_embeddings"},
        aliases={"num_experts": "num_local_experts"},
        repeats={"experts_per_token": "num_experts_per_tok"},
        rope={
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        slides="period",
        needs_window=True,
    ),
    "gemma3_text": Architecture(
        "Gemma3ForCausalLM",
        "norms around each branch; GeGLU; a rope of its own in the layers with a window, five of six",
        frozenset(
            {
                *("attention_bias", "sliding_window", "layer_types", "query_pre_attn_scalar"),
                *("rope_local_base_freq", "sliding_window_pattern"),
            }
        ),
        fixed={"qk_norm": True, "gemma": True},
        defaults={
            "max_position_embeddings": 131_072,
            "sliding_window": 4096,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "tie_word_embeddings": True,
            "rope_theta": 1e6,
            "sliding_window_pattern": 6,
            "bos_token_id": 2,
            "eos_token_id": 1,
            "pad_token_id": 0,
        },
        only={
            "hidden_activation": ("gelu_pytorch_tanh",),
            "final_logit_softcapping": (None,),
            "attn_logit_softcapping": (None,),
            "use_bidirectional_attention": (False, None),
        },
        inert={
            "hidden_act": "the activation is read from hidden_activation",
            "cache_implementation": "how keys and values are kept while sampling",
        },
        slides="period",
        needs_window=True,
    ),
}

SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings"),
)
NUMBERS = ("rms_norm_eps", "initializer_range")
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
ONLY: dict[str, tuple[Any, ...]] = {  # key -> its supported values; messages name the first
    "hidden_act": ("silu", "swish"),
    "attention_dropout": (0.0, None),
    "partial_rotary_factor": (1.0, None),
    "is_causal": (True,),  # null and false let tokens see what comes after them
    "mlp_bias": (False,),
    # these keys are not read; another value would mean another model
    "rope_interleaved": (False, None),
    "use_mrope": (False, None),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "pruned_heads": ({}, None),
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
    **dict.fromkeys(
        ("head_dim", "sliding_window", "layer_types", "no_rope_layers", "mlp_only_layers", *TOKEN_IDS)
    ),
}
NULLABLE = {"num_key_value_heads", "q_lora_rank", *(key for key, value in DEFAULTS.items() if value is None)}
COMMON = {
    *("model_type", "tie_word_embeddings", "rope_parameters", "rope_scaling", "rope_theta"),
    *("original_max_position_embeddings", *SIZES, *NUMBERS, *TOKEN_IDS),
}
_REASONS: dict[str, tuple[str, ...]] = {
    "a name, a version, or a note of the program that wrote the file": (
        *("architectures", "transformers_version", "transformers.js_config"),
        *("tokenizer_class", "name_or_path"),
        *("is_llama_config", "model_name", "unsloth_fixed", "unsloth_version"),
    ),
    "a length limit that is not enforced": ("max_sequence_length", "model_max_length"),
    "each tensor has its own dtype": ("dtype", "torch_dtype", "use_bfloat16"),
    "a choice of outputs, which does not change their values": (
        *("use_cache", "return_dict", "output_attentions", "output_hidden_states"),
        *("output_router_logits", "torchscript"),
    ),
    "a choice between ways to compute the same numbers": (
        *("attn_implementation", "gradient_checkpointing", "chunk_size_feed_forward", "pretraining_tp"),
        *("use_flash_attention_2", "use_flash_attn"),
    ),
    "names of a classifier's outputs, or of its task": (
        *("id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params"),
    ),
    "only used by models with an encoder": (
        *("is_decoder", "tie_encoder_decoder", "cross_attention_hidden_size", "decoder_start_token_id"),
        "tf_legacy_loss",
    ),
    "a default for sampling, which belongs to generation_config.json": (
        *("max_length", "min_length", "max_new_tokens", "do_sample", "early_stopping", "num_beams"),
        *("num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "prefix"),
        *("repetition_penalty", "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"),
        *("bad_words_ids", "num_return_sequences", "output_scores", "return_dict_in_generate"),
        *("sep_token_id", "unk_token_id"),
        *("forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values", "suppress_tokens"),
        *("exponential_decay_length_penalty", "begin_suppress_tokens"),
    ),
}
# key -> why it changes no number, whatever the architecture
INERT = {key: reason for reason, keys in _REASONS.items() for key in keys}
ROPE_KEYS = {  # rope_type -> (required keys, optional keys), besides rope_type and rope_theta
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
# further key of rope -> why transformers computes the same without it
ROPE_INERT = {
    "attn_factor": "a factor on yarn's attention_factor in vLLM and llama.cpp: transformers ignores it",
    "finetuned": "a note of yarn's authors that the stretched model was trained further",
}
ROPE_MAY_BE_NULL = {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"}
ROPE_MAY_BE_ZERO = {"attention_factor", "mscale", "mscale_all_dim"}
ROPE_LEAST, ROPE_MOST = 1e-9, 1e15  # bounds of a rope number other than 0: beyond, frequencies are not finite


def loadable() -> list[tuple[str, str, str]]:
    """Return (model_type, transformers' class, difference from the others) for each architecture."""
    return [(name, a.class_name, a.special) for name, a in ARCHITECTURES.items()]
