"""Tiny weights under the names, and in the formats, of published folders."""

import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

ROWS = 96  # of the embedding


class Draw:
    """Random tensors in one dtype, from a seed."""

    def __init__(self, dtype: torch.dtype):
        self.dtype, self.generator = dtype, torch.Generator().manual_seed(len(str(dtype)))

    def __call__(self, *shape: int) -> Tensor:
        whole = torch.randint(-120, 121, shape, generator=self.generator)
        return (whole / 1024).to(self.dtype)

    def norm(self, width: int) -> Tensor:
        return 1 + 4 * self(width)

    def bytes(self, *shape: int) -> Tensor:
        return torch.randint(0, 256, shape, generator=self.generator).to(torch.uint8)


def attention(at: str, config: dict[str, Any], draw: Draw) -> Iterator[tuple[str, Tensor]]:
    C, H, G = (config[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    D, kind = config.get("head_dim") or C // H, config["model_type"]
    for name, rows, columns in (("q", H * D, C), ("k", G * D, C), ("v", G * D, C), ("o", C, H * D)):
        yield f"{at}.self_attn.{name}_proj.weight", draw(rows, columns)
        if kind == "gpt_oss" or (kind == "qwen2_moe" and name != "o"):
            yield f"{at}.self_attn.{name}_proj.bias", draw(rows)
    if kind in ("gemma3_text", "qwen3_moe"):
        yield f"{at}.self_attn.q_norm.weight", draw.norm(D)
        yield f"{at}.self_attn.k_norm.weight", draw.norm(D)
    if kind == "gpt_oss":
        yield f"{at}.self_attn.sinks", draw(H)


def latent_attention(at: str, config: dict[str, Any], draw: Draw) -> Iterator[tuple[str, Tensor]]:
    C, H, rank, kv_rank = (
        config[key] for key in ("hidden_size", "num_attention_heads", "q_lora_rank", "kv_lora_rank")
    )
    nope, rope, wide = (config[key] for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    if rank:
        yield f"{at}.self_attn.q_a_proj.weight", draw(rank, C)
        yield f"{at}.self_attn.q_a_layernorm.weight", draw.norm(rank)
        yield f"{at}.self_attn.q_b_proj.weight", draw(H * (nope + rope), rank)
    else:
        yield f"{at}.self_attn.q_proj.weight", draw(H * (nope + rope), C)
    yield f"{at}.self_attn.kv_a_proj_with_mqa.weight", draw(kv_rank + rope, C)
    yield f"{at}.self_attn.kv_a_layernorm.weight", draw.norm(kv_rank)
    yield f"{at}.self_attn.kv_b_proj.weight", draw(H * (nope + wide), kv_rank)
    yield f"{at}.self_attn.o_proj.weight", draw(C, H * wide)


def mlp(at: str, C: int, F: int, draw: Draw) -> Iterator[tuple[str, Tensor]]:
    yield f"{at}.gate_proj.weight", draw(F, C)
    yield f"{at}.up_proj.weight", draw(F, C)
    yield f"{at}.down_proj.weight", draw(C, F)


def experts(at: str, config: dict[str, Any], draw: Draw) -> Iterator[tuple[str, Tensor]]:
    """The layer's experts, one tensor each, with the router and what every token goes to."""
    C, F = config["hidden_size"], config["moe_intermediate_size"]
    E = config.get("num_experts") or config["n_routed_experts"]
    yield f"{at}.gate.weight", draw(E, C)
    if "scoring_func" in config:
        yield f"{at}.gate.e_score_correction_bias", draw(E).float()
    for e in range(E):
        yield from mlp(f"{at}.experts.{e}", C, F, draw)
    if "n_shared_experts" in config:
        yield from mlp(f"{at}.shared_experts", C, F * config["n_shared_experts"], draw)
    if "shared_expert_intermediate_size" in config:
        yield from mlp(f"{at}.shared_expert", C, config["shared_expert_intermediate_size"], draw)
        yield f"{at}.shared_expert_gate.weight", draw(1, C)


def fused_experts(at: str, config: dict[str, Any], draw: Draw) -> Iterator[tuple[str, Tensor]]:
    """gpt-oss': all experts in one tensor, transposed."""
    E, C, F = (config[key] for key in ("num_local_experts", "hidden_size", "intermediate_size"))
    yield f"{at}.router.weight", draw(E, C)
    yield f"{at}.router.bias", draw(E)
    for name, rows, columns in (("gate_up_proj", C, 2 * F), ("down_proj", F, C)):
        if "quantization_config" in config:
            yield f"{at}.experts.{name}_blocks", draw.bytes(E, columns, rows // 32, 16)
            yield f"{at}.experts.{name}_scales", draw.bytes(E, columns, rows // 32)
        else:
            yield f"{at}.experts.{name}", draw(E, rows, columns)
        yield f"{at}.experts.{name}_bias", draw(E, columns)


def layer(at: str, i: int, config: dict[str, Any], draw: Draw) -> Iterator[tuple[str, Tensor]]:
    C = config["hidden_size"]
    norms = ["input_layernorm", "post_attention_layernorm"]
    if config["model_type"] == "gemma3_text":
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    for name in norms:
        yield f"{at}.{name}.weight", draw.norm(C)
    yield from (latent_attention if "kv_lora_rank" in config else attention)(at, config, draw)
    if "num_local_experts" in config:
        yield from fused_experts(f"{at}.mlp", config, draw)
    elif "moe_intermediate_size" in config and i >= config.get("first_k_dense_replace", 0):
        yield from experts(f"{at}.mlp", config, draw)
    else:
        yield from mlp(f"{at}.mlp", C, config["intermediate_size"], draw)


def weights(config: dict[str, Any], draw: Draw) -> Iterator[tuple[str, Tensor]]:
    C, layers = config["hidden_size"], config["num_hidden_layers"]
    yield "model.embed_tokens.weight", draw(ROWS, C)
    for i in range(layers):
        yield from layer(f"model.layers.{i}", i, config, draw)

    for i in range(layers, layers + config.get("num_nextn_predict_layers", 0)):
        at = f"model.layers.{i}"  # DeepSeek-V3's layer that predicts one token further
        yield from layer(at, i, config, draw)
        yield f"{at}.embed_tokens.weight", draw(ROWS, C)
        yield f"{at}.enorm.weight", draw.norm(C)
        yield f"{at}.hnorm.weight", draw.norm(C)
        yield f"{at}.eh_proj.weight", draw(C, 2 * C)
        yield f"{at}.shared_head.norm.weight", draw.norm(C)
        yield f"{at}.shared_head.head.weight", draw(ROWS, C)

    yield "model.norm.weight", draw.norm(C)
    if not config.get("tie_word_embeddings", config["model_type"] == "gemma3_text"):
        yield "lm_head.weight", draw(ROWS, C)


def is_linear(name: str) -> bool:
    return name.endswith("_proj.weight") or name.endswith("_mqa.weight")


def in_fp8(tensors: Iterator[tuple[str, Tensor]], draw: Draw) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        if not is_linear(name):
            yield name, tensor
            continue
        blocks = [math.ceil(size / 128) for size in tensor.shape]
        yield name, tensor.to(torch.float8_e4m3fn)
        yield f"{name}_scale_inv", draw.norm(math.prod(blocks)).float().view(blocks)


def in_int4(
    tensors: Iterator[tuple[str, Tensor]], draw: Draw, rows: int, columns: int
) -> Iterator[tuple[str, Tensor]]:
    """GPTQ's (K / rows, N) or AWQ's (K, N / columns) int32 words of eight weights."""
    for name, tensor in tensors:
        if not is_linear(name):
            yield name, tensor
            continue
        (N, K), at = tensor.shape, name.removesuffix(".weight")
        yield f"{at}.qweight", draw.bytes(K // rows, N // columns).int()
        yield f"{at}.qzeros", draw.bytes(1, N // 8).int()
        yield f"{at}.scales", draw.norm(N).view(1, N).half()
        if rows > 1:
            yield f"{at}.g_idx", torch.zeros(K, dtype=torch.int32)


def in_gptq(tensors: Iterator[tuple[str, Tensor]], draw: Draw) -> Iterator[tuple[str, Tensor]]:
    return in_int4(tensors, draw, 8, 1)


def in_awq(tensors: Iterator[tuple[str, Tensor]], draw: Draw) -> Iterator[tuple[str, Tensor]]:
    return in_int4(tensors, draw, 1, 8)


# the sixteen values of NF4, https://arxiv.org/abs/2305.14314, appendix E
NF4 = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
]


def in_nf4(
    skipped: list[str],
) -> Callable[[Iterator[tuple[str, Tensor]], Draw], Iterator[tuple[str, Tensor]]]:
    """bitsandbytes', absmax in 8 bits: every byte is a valid pair of weights, so they are drawn."""

    def pack(tensors: Iterator[tuple[str, Tensor]], draw: Draw) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors:
            if not is_linear(name) or any(f"{module}." in name for module in skipped):
                yield name, tensor
                continue

            count = tensor.numel()
            blocks = math.ceil(count / 64)
            state = {
                "quant_type": "nf4",
                "blocksize": 64,
                "dtype": "bfloat16",
                "shape": list(tensor.shape),
                "nested_blocksize": 256,
                "nested_dtype": "float32",
                "nested_offset": 0.125,
            }

            yield name, draw.bytes(count // 2, 1)
            yield f"{name}.absmax", draw.bytes(blocks)
            yield f"{name}.quant_map", torch.tensor(NF4)
            yield f"{name}.nested_absmax", draw.norm(math.ceil(blocks / 256)).float() / 16
            yield f"{name}.nested_quant_map", torch.arange(-128, 128) / 128
            data = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
            yield f"{name}.quant_state.bitsandbytes__nf4", data

    return pack
