"""Changes to config.json, key by key, and what transformers computes: `python tests/data/make_config_mutations.py`.

Writes config_mutations.json: for each architecture some changes that leave the weights of tiny-hf as they are, with a
few of transformers' logits. tests/embed makes all the changes and has transformers beside it. Made with transformers
5.22.2, torch 2.13.0, on a CPU.
"""

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
FOLDERS = [file.parent.name for file in sorted(HERE.glob("tiny-hf/*/expected.safetensors"))]
LENGTH = 24  # tokens: more than three times the widest window in tiny-hf
MISSING = "(missing)"
# every kind of rope is tried: the others share llama's code
ROPES = ("llama", "deepseek_v3", "gpt_oss", "gemma3_text")
YARN = {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 32}
LLAMA3 = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}
TYPES = ["sliding_attention", "full_attention", "sliding_attention"]

# keys that a file may have and tiny-hf has not, and keys that act together; tried on every architecture
ADDED: list[dict[str, Any]] = [
    *({"is_causal": value} for value in (True, False, None)),
    *({"use_bidirectional_attention": value} for value in (True, False, None)),
    *({"final_logit_softcapping": value} for value in (2.0, None)),
    *({"attn_logit_softcapping": value} for value in (2.0, None)),
    *({"clip_qkv": value} for value in (0.1, None)),
    *({"attention_bias": value} for value in (True, False)),
    *({"norm_topk_prob": value} for value in (True, False)),
    *({"rope_theta": value} for value in (500.0, 20, None)),
    *({"rope_scaling": value} for value in (None, {}, {"type": "linear", "factor": 4}, YARN, LLAMA3)),
    {"rope_parameters": MISSING},
    {"rope_parameters": {}},
    {"rope_parameters": None},
    {"rope_parameters": None, "rope_theta": 700.0},
    {"rope_parameters": None, "rope_scaling": YARN, "rope_theta": 700.0},
    {"rope_parameters": None, "rope_scaling": {**LLAMA3, "type": "llama3"}},
    {"rope_parameters": None, "rope_scaling": {"type": "su", "factor": 2.0}},
    {"rope_parameters": None, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1]}},
    {"rope_parameters": None, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    {"rope_parameters": {**YARN, "truncate": None}},
    {"rope_parameters": {**YARN, "truncate": False, "beta_fast": 4, "beta_slow": 2}},
    {"rope_parameters": {**YARN, "attention_factor": 1.5}},
    {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}},
    {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.7}},
    {"rope_parameters": {**YARN, "beta_fast": None, "mscale": None}},
    {"rope_parameters": YARN, "original_max_position_embeddings": 16},
    {"rope_parameters": LLAMA3, "original_max_position_embeddings": 64},
    {"rope_parameters": {**LLAMA3, "high_freq_factor": 1}},
    {"rope_parameters": {"rope_type": "linear", "factor": 2, "partial_rotary_factor": 0.5}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 300, "factor": None}},
    {"original_max_position_embeddings": 64},
    {"rope_local_base_freq": 500.0},
    {
        "rope_parameters": None,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "rope_local_base_freq": 90,
    },
    {"rope_parameters": {"full_attention": {**YARN, "truncate": False}, "sliding_attention": None}},
    {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 3}}, "rope_theta": 800.0},
    {"rope_parameters": {"sliding_attention": {"rope_type": "default"}}, "rope_scaling": {"factor": 2.0}},
    {"partial_rotary_factor": 0.5},
    {"rope_interleaved": True},
    {"sliding_window": 4},
    {"sliding_window": None},
    {"sliding_window": 4, "use_sliding_window": True},
    {"sliding_window": 4, "use_sliding_window": True, "layer_types": MISSING},
    {"sliding_window": 4, "use_sliding_window": True, "layer_types": MISSING, "max_window_layers": 1},
    {"sliding_window": 4, "use_sliding_window": True, "layer_types": None, "max_window_layers": 2},
    {"sliding_window": 4, "use_sliding_window": True, "layer_types": TYPES},
    {"sliding_window": 4, "use_sliding_window": False, "layer_types": TYPES},
    {"sliding_window": 4, "use_sliding_window": True, "layer_types": ["full_attention"] * 3},
    {"sliding_window": None, "use_sliding_window": True, "layer_types": MISSING, "max_window_layers": 0},
    {"sliding_window": None, "use_sliding_window": True, "layer_types": TYPES},
    {"layer_types": ["full_attention"] * 3},
    {"layer_types": ["attention"] * 3},
    {"layer_types": MISSING},
    {"layer_types": MISSING, "sliding_window_pattern": 2},
    {"layer_types": None, "sliding_window_pattern": 3, "sliding_window": 3},
    {"layer_types": None, "sliding_window_pattern": None},
    {"sliding_window_pattern": 2},
    {"no_rope_layers": [0, 1, 0]},
    {"no_rope_layers": None, "no_rope_layer_interval": 2},
    {"no_rope_layers": [0, 1, 0], "use_sliding_window": True, "sliding_window": 4, "layer_types": None},
    {"num_experts": 2},
    {"num_local_experts": 2},
    {"num_experts": None},
    {"n_routed_experts": 8, "num_local_experts": 4},
    {"num_experts_per_tok": 4},
    {"num_experts_per_tok": 9},
    {"experts_per_token": 2},
    {"experts_per_token": 1},
    {"mlp_only_layers": [1]},
    {"mlp_only_layers": None},
    {"decoder_sparse_step": 2, "mlp_only_layers": []},
    {"first_k_dense_replace": 9},
    {"n_group": 1, "topk_group": 1},
    {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 3},
    {"n_group": 3},
    {"n_group": 8},
    {"n_group": 2, "topk_group": 3},
    {"n_group": 4, "topk_group": 1, "num_experts_per_tok": 3},
    {"q_lora_rank": None},
    {"v_head_dim": 40},
    {"v_head_dim": 5},
    {"scoring_func": "softmax"},
    {"topk_method": "greedy"},
    {"moe_layer_freq": 2},
    {"router_jitter_noise": 0.1},
    {"num_key_value_heads": 4},
    {"num_key_value_heads": 1},
    {"num_key_value_heads": 3},
    {"num_key_value_heads": None},
    {"num_kv_shared_layers": 1},
    {"head_dim": 8},
    {"head_dim": 6},
    {"head_dim": 7},
    {"head_dim": None},
    {"hidden_act": "gelu"},
    {"hidden_act": "swish"},
    {"hidden_activation": "silu"},
    {"hidden_activation": "gelu"},
    {"per_layer_config": {"1": {"sliding_window": 3}}},
    {"auto_map": {"AutoModelForCausalLM": "modeling.Other"}},
    {"transformers_weights": "other.safetensors"},
    {"cache_implementation": "hybrid"},
    {"tie_word_embeddings": None},
    {"eos_token_id": [2, 5]},
    {"pad_token_id": -1},
    {"pad_token_id": 96},
    {"an_unknown_key": 0},
    {"an_unknown_key": False},
    {"an_unknown_key": None},
    {"_an_unknown_key": True},
]


def mutations(raw: dict[str, Any]) -> list[dict[str, Any]]:
    """Changes to raw, as far as they change it: every numeric, boolean and null key of it, those nested in rope's
    parameters too, and ADDED."""
    changes = []
    for key, value in raw.items():
        others = _other_values(value)
        changes += [{key: MISSING}, *({key: new} for new in (others[:1] if key.endswith("_id") else others))]
    for path, value in _rope_values(raw["rope_parameters"]):
        for new in (MISSING, *_other_values(value)):
            parameters = copy.deepcopy(raw["rope_parameters"])
            of = parameters[path[0]] if len(path) == 2 else parameters
            of[path[-1]] = new
            if new == MISSING:
                del of[path[-1]]
            changes.append({"rope_parameters": parameters})
    ropes = raw["model_type"] in ROPES
    added = [change for change in ADDED if ropes or not _is_a_rope(change)]
    return [change for change in changes + added if changed(raw, change) != raw]


def _is_a_rope(change: dict[str, Any]) -> bool:
    return isinstance(change.get("rope_parameters"), dict) and "rope_type" in change["rope_parameters"]


def _other_values(value: Any) -> list[Any]:
    match value:
        case bool():
            return [not value, None]
        case int():
            return [value + 1, value * 2, 0, float(value), None]
        case float():
            return [value * 2, 0.0, int(value) + 1, None]
        case None:
            return [4, 0.5, True, False]
    return [None] if isinstance(value, list) else []


def _rope_values(parameters: dict[str, Any]) -> list[tuple[tuple[str, ...], Any]]:
    found = []
    for key, value in parameters.items():
        inner = (
            [((key, name), v) for name, v in value.items()] if isinstance(value, dict) else [((key,), value)]
        )
        found += inner
    return found


def changed(raw: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in (raw | change).items() if value != MISSING}


def tokens() -> torch.Tensor:
    return torch.randint(3, 96, (1, LENGTH), generator=torch.Generator().manual_seed(5))


def model_of(folder: Path) -> Any:
    """transformers' model of a folder's config.json, its weights whatever memory held."""
    import transformers
    from transformers.initialization import no_init_weights

    config = transformers.AutoConfig.from_pretrained(folder)
    config._attn_implementation = "eager"
    with no_init_weights():
        # not the file's dtype, in which even constants are rounded
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.tie_weights()
    return model


@torch.no_grad()
def draw(model: Any) -> None:
    """Weights that are far from any symmetry: what a key does shows in the logits."""
    generator = torch.Generator().manual_seed(7)
    for name, weight in model.state_dict().items():
        noise = torch.randn(weight.shape, generator=generator)
        norm = "norm" in name and not name.endswith("bias")
        weight.copy_(
            (0 if "gemma3" in model.config.model_type else 1) + 0.2 * noise if norm else 0.25 * noise
        )


# ---- the stored selection


def stored() -> dict[str, list[dict[str, Any]]]:
    """Architecture -> changes that leave the tensors of tiny-hf as they are, each with some of transformers' logits, or
    none where it is refused. A change that nothing shows, and one that transformers refuses, is left out."""
    from burnish.model import InputError
    from burnish.model.files.config_json import read_config

    result: dict[str, list[dict[str, Any]]] = {}
    own_folder = [name for name in FOLDERS if not name.startswith("llama-")]
    for name in FOLDERS:
        source = HERE / "tiny-hf" / name
        raw = json.loads((source / "config.json").read_text())
        changes = [c for c in mutations(raw) if c in ADDED] if name in own_folder else []
        for key, value in raw.items():
            changes += [{key: value * 2}] if isinstance(value, float) else []
        for path, value in _rope_values(raw["rope_parameters"]):
            parameters = copy.deepcopy(raw["rope_parameters"])
            of = parameters[path[0]] if len(path) == 2 else parameters
            of[path[-1]] = value * 2 if isinstance(value, int | float) else "linear"
            changes.append({"rope_parameters": parameters})

        unchanged = _logits(source, raw)
        assert unchanged is not None
        rows: list[dict[str, Any]] = [{"change": {}, "logits": unchanged}]

        for change in changes:
            logits = _logits(source, changed(raw, change))
            if logits is None or logits == unchanged:
                continue
            try:
                read_config(changed(raw, change))
            except InputError:
                logits = None
            rows.append({"change": change, "logits": logits})
        result[name] = rows
    return result


def _logits(source: Path, raw: dict[str, Any]) -> list[float] | None:
    """The last token's first logits with the weights of source, None where transformers does not take both."""
    import transformers

    with tempfile.TemporaryDirectory() as at:
        (Path(at) / "config.json").write_text(json.dumps(raw))
        (Path(at) / "model.safetensors").symlink_to(source / "model.safetensors")
        try:
            model, report = transformers.AutoModelForCausalLM.from_pretrained(
                at, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
            )
            with torch.no_grad():
                logits = model.eval()(tokens()).logits[0, -1, :4]
        except Exception:  # whatever its reason is
            return None
    return None if any(report.values()) else [round(x, 6) for x in logits.tolist()]


if __name__ == "__main__":
    import transformers

    made_by = f"python tests/data/make_config_mutations.py, transformers {transformers.__version__}"
    golden = stored()
    lines = ",\n".join(
        f"{json.dumps(name)}: [\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]"
        for name, rows in golden.items()
    )
    (HERE / "config_mutations.json").write_text(
        f'{{"made_by": {json.dumps(made_by)}, "golden": {{\n{lines}\n}}}}\n'
    )
