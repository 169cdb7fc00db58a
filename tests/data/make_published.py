"""Make folders as they are published: every key of the hub's config.json, tiny weights in the hub's layout.

    make("google/gemma-3-1b-it", FOLDER)        what tests call: torch, safetensors and tokenizers, no network
    python tests/data/make_published.py         published.json anew: the logits that transformers gives them

Sizes are shrunk and nothing else: keys, values, tensor names and dtypes are those of the repositories that PUBLISHED
names. Weights are small integers over 1024: exact in bfloat16, alike on any machine.
The logits are of transformers 5.22.2, torch 2.13.0 and bitsandbytes 0.50.2, on a CPU.
"""

import json
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tokenizers
import torch
from published_weights import ROWS, Draw, in_awq, in_fp8, in_gptq, in_nf4, weights
from safetensors.torch import save_file
from torch import Tensor

IDS = [*range(5, 92, 7), *range(3, 60, 9)]  # 20 tokens: longer than the tiny windows

HERE = Path(__file__).parent
CONFIGS = json.loads((HERE / "published_configs.json").read_text())  # repository -> its config.json


# ---- quantization_config


MXFP4 = {
    "modules_to_not_convert": [
        *("model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"),
    ],
    "quant_method": "mxfp4",
}
FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
BNB = {
    "_load_in_4bit": True,
    "_load_in_8bit": False,
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_storage": "uint8",
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "llm_int8_enable_fp32_cpu_offload": False,
    "llm_int8_has_fp16_weight": False,
    "llm_int8_threshold": 6.0,
    "load_in_4bit": True,
    "load_in_8bit": False,
    "quant_method": "bitsandbytes",
}
SKIPPED = [  # of unsloth's "dynamic" folders; names of other models stand among them
    *("lm_head", "multi_modal_projector", "merger", "modality_projection"),
    *("model.layers.1.self_attn", "model.layers.0.mlp"),
]
GPTQ = {
    "bits": 4,
    "damp_percent": 0.01,
    "desc_act": False,
    "group_size": 128,
    "quant_method": "gptq",
    "sym": True,
    "true_sequential": True,
}
AWQ = {
    "bits": 4,
    "group_size": 128,
    "modules_to_not_convert": None,
    "quant_method": "awq",
    "version": "gemm",
    "zero_point": True,
}


# ---- folders


TINY = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": ROWS}
TINY_MOE = TINY | {"moe_intermediate_size": 24, "num_hidden_layers": 2, "num_experts_per_tok": 2}
TINY_LATENT = TINY_MOE | {
    "n_routed_experts": 8,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 3,
}
TINY_OSS = TINY | {
    "intermediate_size": 32,
    "head_dim": 16,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "num_local_experts": 8,
    "sliding_window": 8,
}
TINY_LLAMA_2 = TINY | {"num_key_value_heads": 4, "num_hidden_layers": 2}
TINY_LLAMA_3 = TINY | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "head_dim": 16,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def shrunk(config: dict[str, Any], sizes: dict[str, Any], **also: Any) -> dict[str, Any]:
    """The config with smaller values under the keys that it has."""
    small = {**sizes, **SPECIAL, **also}
    return {key: small.get(key, value) for key, value in config.items()}


def plain(tensors: Iterator[tuple[str, Tensor]], draw: Draw) -> Iterator[tuple[str, Tensor]]:
    return tensors


def quantized(config: dict[str, Any], how: dict[str, Any]) -> dict[str, Any]:
    return {**config, "quantization_config": how}


# repository -> config.json, how linear weights are packed, files, ids that the tokenizer has beyond the rows
PUBLISHED: dict[str, tuple[dict[str, Any], Callable, int, int]] = {
    "google/gemma-3-1b-it": (
        shrunk(
            CONFIGS["google/gemma-3-1b-it"],
            TINY | {"head_dim": 16, "num_hidden_layers": 7, "query_pre_attn_scalar": 16, "sliding_window": 6},
            eos_token_id=[2, 3],
        ),
        *(plain, 1, 1),
    ),
    "unsloth/gpt-oss-20b-BF16": (
        shrunk(CONFIGS["openai/gpt-oss-20b"], TINY_OSS) | {"torch_dtype": "bfloat16"},
        plain,
        2,
        0,
    ),
    "openai/gpt-oss-20b": (quantized(shrunk(CONFIGS["openai/gpt-oss-20b"], TINY_OSS), MXFP4), plain, 2, 0),
    "unsloth/DeepSeek-V3-bf16": (
        shrunk(CONFIGS["deepseek-ai/DeepSeek-V3"], TINY_LATENT, n_group=4, topk_group=2, q_lora_rank=24),
        *(plain, 3, 0),
    ),
    "deepseek-ai/DeepSeek-V3": (
        quantized(
            shrunk(CONFIGS["deepseek-ai/DeepSeek-V3"], TINY_LATENT, n_group=4, topk_group=2, q_lora_rank=24),
            FP8,
        ),
        *(in_fp8, 3, 0),
    ),
    "moonshotai/Moonlight-16B-A3B": (
        shrunk(CONFIGS["moonshotai/Moonlight-16B-A3B"], TINY_LATENT),
        plain,
        2,
        0,
    ),
    "Qwen/Qwen3-30B-A3B": (
        shrunk(
            CONFIGS["Qwen/Qwen3-30B-A3B"],
            TINY_MOE | {"head_dim": 16, "num_key_value_heads": 2, "num_experts": 8},
        ),
        *(plain, 2, 0),
    ),
    "Qwen/Qwen1.5-MoE-A2.7B": (
        shrunk(
            CONFIGS["Qwen/Qwen1.5-MoE-A2.7B"],
            TINY_MOE | {"num_key_value_heads": 4, "num_experts": 6, "shared_expert_intermediate_size": 40},
        ),
        *(plain, 2, 0),
    ),
    "meta-llama/Llama-2-7b-hf": (shrunk(CONFIGS["meta-llama/Llama-2-7b-hf"], TINY_LLAMA_2), plain, 2, 1),
    "unsloth/Llama-3.2-1B-Instruct-bnb-4bit": (
        quantized(
            shrunk(CONFIGS["unsloth/Llama-3.2-1B-Instruct"], TINY_LLAMA_3),
            BNB | {"llm_int8_skip_modules": None},
        ),
        *(in_nf4([]), 1, 0),
    ),
    "unsloth/Llama-3.2-1B-Instruct-unsloth-bnb-4bit": (
        quantized(
            shrunk(CONFIGS["unsloth/Llama-3.2-1B-Instruct"], TINY_LLAMA_3),
            BNB | {"llm_int8_skip_modules": SKIPPED},
        ),
        *(in_nf4(SKIPPED), 1, 0),
    ),
    "TheBloke/Llama-2-7B-Chat-GPTQ": (
        quantized(shrunk(CONFIGS["meta-llama/Llama-2-7b-hf"], TINY_LLAMA_2), GPTQ),
        *(in_gptq, 1, 0),
    ),
    "TheBloke/Llama-2-7B-Chat-AWQ": (
        quantized(shrunk(CONFIGS["meta-llama/Llama-2-7b-hf"], TINY_LLAMA_2), AWQ),
        *(in_awq, 1, 0),
    ),
}
REFUSED = {  # repository -> the format that a refusal names
    "openai/gpt-oss-20b": "mxfp4",
    "deepseek-ai/DeepSeek-V3": "fp8",
    "TheBloke/Llama-2-7B-Chat-GPTQ": "gptq",
    "TheBloke/Llama-2-7B-Chat-AWQ": "awq",
}
LOADED = [name for name in PUBLISHED if name not in REFUSED]


def make(name: str, folder: Path) -> Path:
    """Write the repository `name` of PUBLISHED into a new folder, which is returned."""
    config, pack, files, beyond = PUBLISHED[name]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    draw = Draw(getattr(torch, config.get("torch_dtype", "bfloat16")))
    tensors = {name: tensor.contiguous() for name, tensor in pack(weights(config, draw), draw)}
    if (
        config["model_type"] == "llama" and "quantization_config" not in config
    ):  # a constant in folders of 2023
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    write_shards(folder, tensors, files)
    write_tokenizer(folder, ROWS + beyond)
    return folder


def write_shards(folder: Path, tensors: dict[str, Tensor], files: int) -> None:
    if files == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = [*tensors]
    per_file = math.ceil(len(names) / files)
    weight_map: dict[str, str] = {}
    for i in range(files):
        file = f"model-{i + 1:05}-of-{files:05}.safetensors"
        shard = {name: tensors[name] for name in names[i * per_file : (i + 1) * per_file]}
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def write_tokenizer(folder: Path, size: int) -> None:
    """A word an id: <pad>, <s>, </s>, <unk>, then w4, w5, ...; ids beyond the rows are special tokens."""
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(4, ROWS))]
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    more = ["<image_soft_token>", "<extra>"][: size - ROWS]
    backend.add_special_tokens([*words[:4], *more])
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    config |= {
        "pad_token": more[-1] if more and "gemma" not in folder.name else "<pad>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


# ---- golden logits


def logits(name: str, folder: Path) -> Tensor:
    """The logits that transformers computes in fp32 for IDS, (T, V); 4-bit weights are multiplied out first."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        make(name, folder), dtype=torch.float32, attn_implementation="eager"
    )
    if "quantization_config" in PUBLISHED[name][0]:
        for module in model.modules():
            if type(module).__name__ == "Linear4bit":  # not rounded to the bf16 that its state names
                module.weight.quant_state.dtype = torch.float32
        model.dequantize(dtype=torch.float32)
        model.float()
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0]


if __name__ == "__main__":
    import transformers

    golden = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in LOADED:
            values = logits(name, Path(folder, name))[[1, len(IDS) // 2, -1]]
            golden[name] = [[round(value, 6) for value in row] for row in values.tolist()]
    made_by = f"python tests/data/make_published.py, transformers {transformers.__version__}"
    file = HERE / "published.json"
    file.write_text(json.dumps({"made_by": made_by, "golden": golden}) + "\n")
