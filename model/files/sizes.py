"""A check of a config's sizes against the tensors in the files, before a model of these sizes is built.

    hidden_size      64    model.embed_tokens.weight (100, 64), model.layers.0.self_attn.q_proj.weight (64, 64), ...

If no tensor has a size of the config, the config is wrong. If only some tensors have it, the files are wrong, and a
later comparison of each tensor finds that. A quantised format does not show the sizes. There, a matrix must not have
more numbers than the files have bits.
"""

import re
from collections.abc import Iterator, Mapping
from math import prod
from typing import NamedTuple

import torch

from ..config import Experts, Latent, ModelConfig
from ..errors import InputError, shown
from .architectures import ARCHITECTURES
from .experts import disk_name, fused_on_disk, pieces_of
from .tensors import FLOATS, Stored

LAYER = "model.layers.0."  # represents all layers
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


class _Matrix(NamedTuple):
    """A matrix of the first layer. name: its name on disk. keys: the key of config.json for each dimension."""

    name: str
    shape: tuple[int, ...]
    keys: tuple[str, ...]


def check_sizes(
    config: ModelConfig, stored: Mapping[str, Stored], source: str, named: Mapping[str, str] | None = None
) -> None:
    """Raise InputError that names a key and a tensor if the config's sizes do not fit the stored tensors.

    source: the config's name in errors. named: key of config.json -> the name that `source` has for this key.
    """
    named = named or {}
    layers = {found[1] for name in stored if (found := re.match(r"model\.layers\.(\d+)\.", name))}
    if config.num_hidden_layers > 2 * len(layers):  # with fewer, a later error names the missing tensors
        key = named.get("num_hidden_layers", "num_hidden_layers")
        raise InputError(
            f"{source}: {key}: expected at most {len(layers)}, the number of layers in the files, got "
            f"{config.num_hidden_layers}"
        )

    matrices = {matrix.name: matrix for matrix in _matrices(config, fused_on_disk(config, stored))}
    seen: dict[str, dict[int, Stored]] = {}  # key -> each size found for it -> a tensor with that size
    for name, tensor in stored.items():
        matrix = matrices.get(_in_layer_0(name))
        dense = tensor.dtype in FLOATS and f"{name}.absmax" not in stored
        if matrix is not None and dense and len(tensor.shape) == len(matrix.shape):
            for key, size in zip(matrix.keys, tensor.shape, strict=True):
                seen.setdefault(key, {}).setdefault(size, tensor)

    room = 8 * sum(max(tensor.nbytes, tensor.numel) for tensor in stored.values())
    for matrix in matrices.values():
        for key, size in zip(matrix.keys, matrix.shape, strict=True):
            if key in seen and size not in seen[key]:
                found, tensor = next(iter(seen[key].items()))
                raise InputError(
                    f"{source}: {_named(key, named)}: expected {found}, by {shown(tensor.name)} in {tensor.file.name}, "
                    f"got {size}"
                )
        if prod(matrix.shape) > room:
            key = _named(max(zip(matrix.shape, matrix.keys, strict=True))[1], named)
            raise InputError(
                f"{source}: {key}: expected sizes that fit the files, got {matrix.shape} for {matrix.name}, which is "
                "more numbers than the files hold"
            )


def _named(key: str, named: Mapping[str, str]) -> str:
    """Return the name that the source has for a key of config.json, or for each key in a product of keys."""
    return " * ".join(named.get(part, part) for part in key.split(" * "))


def _in_layer_0(name: str) -> str:
    """Return a tensor's name with the numbers of the layer and of the expert replaced by 0."""
    return re.sub(r"\.experts\.\d+\.", ".experts.0.", re.sub(r"^model\.layers\.\d+\.", LAYER, name))


def _matrices(config: ModelConfig, fused: bool) -> Iterator[_Matrix]:
    V, C, F = config.vocab_size, config.hidden_size, config.intermediate_size
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        yield _Matrix(name, (V, C), ("vocab_size", "hidden_size"))
    yield from _latent(config, config.latent) if config.latent else _attention(config)
    if config.experts is not None:
        yield from _experts(config, config.experts, fused)
    if config.experts is None or not all(config.experts.layers):
        yield from _feed_forward(f"{LAYER}mlp", F, C, "intermediate_size")


def _attention(config: ModelConfig) -> Iterator[_Matrix]:
    C, D = config.hidden_size, config.head_dim
    queries, keys = config.num_attention_heads * D, config.num_key_value_heads * D
    if config.qk_norm:
        yield _Matrix(f"{LAYER}self_attn.q_norm.weight", (D,), ("head_dim",))
    yield _Matrix(
        f"{LAYER}self_attn.q_proj.weight", (queries, C), ("num_attention_heads * head_dim", "hidden_size")
    )
    yield _Matrix(
        f"{LAYER}self_attn.k_proj.weight", (keys, C), ("num_key_value_heads * head_dim", "hidden_size")
    )


def _latent(config: ModelConfig, latent: Latent) -> Iterator[_Matrix]:
    C, H = config.hidden_size, config.num_attention_heads
    queries, q = H * config.head_dim, "num_attention_heads * (qk_nope_head_dim + qk_rope_head_dim)"
    if latent.q_rank:
        yield _Matrix(f"{LAYER}self_attn.q_a_proj.weight", (latent.q_rank, C), ("q_lora_rank", "hidden_size"))
        yield _Matrix(f"{LAYER}self_attn.q_b_proj.weight", (queries, latent.q_rank), (q, "q_lora_rank"))
    else:
        yield _Matrix(f"{LAYER}self_attn.q_proj.weight", (queries, C), (q, "hidden_size"))
    narrow, wide = latent.kv_rank + latent.rope_dim, H * (latent.nope_dim + latent.value_dim)
    key = "kv_lora_rank + qk_rope_head_dim"
    yield _Matrix(f"{LAYER}self_attn.kv_a_proj_with_mqa.weight", (narrow, C), (key, "hidden_size"))
    key = "num_attention_heads * (qk_nope_head_dim + v_head_dim)"
    yield _Matrix(f"{LAYER}self_attn.kv_b_proj.weight", (wide, latent.kv_rank), (key, "kv_lora_rank"))
    key = "num_attention_heads * v_head_dim"
    yield _Matrix(f"{LAYER}self_attn.o_proj.weight", (C, H * latent.value_dim), ("hidden_size", key))


def _experts(config: ModelConfig, experts: Experts, fused: bool) -> Iterator[_Matrix]:
    C, E, F = config.hidden_size, experts.num_experts, experts.intermediate_size
    keys = ARCHITECTURES[config.model_type].keys
    number = next(key for key in _EXPERTS if key in keys)
    width = "moe_intermediate_size" if "moe_intermediate_size" in keys else "intermediate_size"
    yield _Matrix(disk_name(config, f"{LAYER}mlp.gate.weight", fused), (E, C), (number, "hidden_size"))

    one_by_one = not fused and config.model_type != "gpt_oss"
    whole = torch.Size((1 if one_by_one else E, C, F))
    (name,), shape = pieces_of(config, f"{LAYER}mlp.experts.down_proj.weight", whole, fused)
    sizes = (width, "hidden_size") if config.model_type == "gpt_oss" else ("hidden_size", width)
    yield _Matrix(name, tuple(shape), sizes if one_by_one else (number, *sizes))
    if experts.shared_size:
        shared = "shared_expert_intermediate_size"
        shared = shared if shared in keys else f"n_shared_experts * {width}"
        at = disk_name(config, f"{LAYER}mlp.shared_expert.", fused).removesuffix(".")
        yield from _feed_forward(at, experts.shared_size, C, shared)


def _feed_forward(at: str, F: int, C: int, key: str) -> Iterator[_Matrix]:
    yield _Matrix(f"{at}.gate_proj.weight", (F, C), (key, "hidden_size"))
