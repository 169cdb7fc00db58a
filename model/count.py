"""The number of parameters of a model, counted from the shapes in its config, with the formula.

Source: the sizes of https://arxiv.org/abs/2401.04088 (Mixtral), 2405.04434 (DeepSeek-V2), 2412.19437 (DeepSeek-V3) and
        2101.03961 (Switch-C), and of the config.json of Qwen/Qwen3-30B-A3B
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .config import Experts, Latent, ModelConfig


@dataclass(frozen=True)
class Count:
    """A model's number of parameters.

    total: all parameters in memory.
    active: the total without the experts that a token does not go to.
    embedding: the parameters of the embedding alone.
    formula: the terms of the total, as text.

    A token reads one row of the embedding. Publishers count the embedding as active (Mixtral) or not (DeepSeek). Here
    it is active.
    """

    total: int
    active: int
    embedding: int
    formula: str


Term = tuple[str, int, int]  # description, all parameters, active parameters


def count_parameters(config: ModelConfig) -> Count:
    """Count the parameters of a model.

    The formula has a term for each kind of tensor, in the order of a forward pass.
    """
    C, V, layers = config.hidden_size, config.vocab_size, config.num_hidden_layers
    attention = _latent_attention(config, config.latent) if config.latent else _attention(config)
    terms = [_all(f"embedding {V} x {C}", V * C), attention, *_feed_forward(config)]
    terms.append(_all("norms", layers * C * (4 if config.gemma else 2) + C))
    if not config.tie_word_embeddings:
        terms.append(_all(f"head {V} x {C}", V * C))

    formula = "\n+ ".join(f"{words} = {total:,}" for words, total, _ in terms)
    return Count(sum(t for _, t, _ in terms), sum(a for _, _, a in terms), V * C, formula)


def _all(words: str, total: int) -> Term:
    """Return a term of the formula whose parameters are all active."""
    return words, total, total


def _latent_attention(config: ModelConfig, latent: Latent) -> Term:
    C, H, D = config.hidden_size, config.num_attention_heads, config.head_dim
    queries = C * H * D
    if latent.q_rank:
        queries = C * latent.q_rank + latent.q_rank + latent.q_rank * H * D

    narrow = C * (latent.kv_rank + latent.rope_dim) + latent.kv_rank
    keys_and_values = narrow + latent.kv_rank * H * (latent.nope_dim + latent.value_dim)
    output = H * latent.value_dim * C
    layers = config.num_hidden_layers
    return _all(f"{layers} latent attention", layers * (queries + keys_and_values + output))


def _attention(config: ModelConfig) -> Term:
    C, layers = config.hidden_size, config.num_hidden_layers
    H, G, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    biases = config.qkv_bias * (H + 2 * G) * D + config.output_bias * C
    norms = config.qk_norm * 2 * D + config.qk_norm_whole * (H + G) * D + config.sinks * H
    words = f"{layers} attention x ({C} x {D} x (2 x {H} + 2 x {G}) + {biases + norms})"
    return _all(words, layers * (C * D * (2 * H + 2 * G) + biases + norms))


def _feed_forward(config: ModelConfig) -> Iterator[Term]:
    C, F, experts = config.hidden_size, config.intermediate_size, config.experts
    sparse = sum(experts.layers) if experts else 0
    if dense := config.num_hidden_layers - sparse:
        yield _all(f"{dense} dense x 3 x {C} x {F}", dense * (3 * C * F + config.mlp_bias * (2 * F + C)))

    if experts and sparse:
        E, K, F = experts.num_experts, experts.top_k, experts.intermediate_size
        one = 3 * C * F + experts.clamped * (2 * F + C)
        yield _all(f"{sparse} routers x {E} x {C}", sparse * (E * C + E * experts.clamped))
        yield f"{sparse} x {E} experts x 3 x {C} x {F} ({K} active)", sparse * E * one, sparse * K * one

        if experts.shared_size:
            shared = 3 * C * experts.shared_size + experts.shared_gate * C
            yield _all(f"{sparse} shared experts x 3 x {C} x {experts.shared_size}", sparse * shared)


def count_switch(
    moe_layers: int,
    experts: int,
    hidden: int,
    ffn: int,
    attention_layers: int,
    attention: int,
    vocab_size: int,
) -> Count:
    """Count a Switch Transformer: experts of two matrices without a gate, one of them active per token.

    attention: the number of heads times their width.
    """
    one = moe_layers * 2 * hidden * ffn
    rest = attention_layers * 4 * hidden * attention + moe_layers * experts * hidden
    formula = (
        f"embedding {vocab_size} x {hidden} = {vocab_size * hidden:,}\n"
        f"+ {attention_layers} attention x 4 x {hidden} x {attention}, "
        f"{moe_layers} routers x {experts} x {hidden} = {rest:,}\n"
        f"+ {moe_layers} x {experts} experts x 2 x {hidden} x {ffn} = {experts * one:,}"
    )
    rest += vocab_size * hidden
    return Count(rest + experts * one, rest + one, vocab_size * hidden, formula)


def switch_c() -> Count:
    """Count Switch-C: 15 encoder and 15 decoder layers, 45 attentions of 32 heads of width 64.

    Source: https://arxiv.org/abs/2101.03961, table 9
    """
    return count_switch(30, 2048, 2080, 6144, attention_layers=45, attention=2048, vocab_size=32_128)


def _deepseek(**sizes: Any) -> ModelConfig:
    return ModelConfig(
        head_dim=192,
        latent=Latent(kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128, q_rank=1536),
        **sizes,
    )


PRESETS = {
    "Mixtral-8x7B": ModelConfig(
        vocab_size=32_000,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        experts=Experts(8, 2, 14_336, (True,) * 32, renormalize=True),
    ),
    "DeepSeek-V2.5": _deepseek(
        vocab_size=102_400,
        hidden_size=5120,
        intermediate_size=12_288,
        num_hidden_layers=60,
        num_attention_heads=128,
        experts=Experts(
            160, 6, 1536, (False,) + (True,) * 59, groups=8, top_groups=3, scale=16.0, shared_size=3072
        ),
    ),
    "DeepSeek-V3": _deepseek(
        vocab_size=129_280,
        hidden_size=7168,
        intermediate_size=18_432,
        num_hidden_layers=61,
        num_attention_heads=128,
        experts=Experts(
            256,
            8,
            2048,
            (False,) * 3 + (True,) * 58,
            score="sigmoid",
            groups=8,
            top_groups=4,
            renormalize=True,
            scale=2.5,
            shared_size=2048,
        ),
    ),
    "Qwen3-30B-A3B": ModelConfig(
        vocab_size=151_936,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        qk_norm=True,
        experts=Experts(128, 8, 768, (True,) * 48, renormalize=True),
    ),
}
