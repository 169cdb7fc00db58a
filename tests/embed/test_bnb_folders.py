"""4-bit folders between transformers with bitsandbytes and us: what either writes, the other reads to the same numbers.

bitsandbytes has two paths on a CPU: with AVX512-BF16 it repacks the weights and multiplies in bf16. Numbers are
compared on the other, which is the definition: x times the weights multiplied out.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from burnish.model import pack
from burnish.model.adapter import add_lora, linears
from burnish.model.checkpoint import load_model, load_scalar_model, save_model
from burnish.model.generate import SamplingParams, generate

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")

IDS = [1, 5, 9, 4, 7, 22, 13]
SIZES: dict[str, Any] = {  # rows of whole blocks (64): what bitsandbytes' CPU code asks for
    **{"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2},
}
SKIPPED = ["lm_head", "multi_modal_projector", "merger", "model.layers.0.self_attn", "model.layers.1.mlp"]


def definition(model: Any) -> Any:
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.eval()


def theirs_in(folder: Path, **options: Any) -> Any:
    options = {"dtype": torch.float32, "device_map": "cpu", **options}
    return definition(transformers.AutoModelForCausalLM.from_pretrained(folder, **options))


@pytest.fixture
def make(tmp_path) -> Callable[..., tuple[Any, Path]]:
    """make(config, ...): a model of transformers in 4 bits, drawn from a seed, and the folder that it wrote."""

    def make(config: Any, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, Path]:
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(tmp_path / "dense")
        four_bit = transformers.BitsAndBytesConfig(load_in_4bit=True, **options)
        model = theirs_in(tmp_path / "dense", dtype=dtype, quantization_config=four_bit)
        model.save_pretrained(tmp_path / "four")
        return model, tmp_path / "four"

    return make


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    if isinstance(model, torch.nn.Module) and hasattr(model, "logits"):
        return model.logits(model(pack([IDS])))
    return model(torch.tensor([IDS])).logits[0].float()


def close(got: torch.Tensor, want: torch.Tensor, bound: float = 2e-5) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=bound)


OPTIONS = {
    "fp4": {},
    "nf4 nested": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "dynamic": {"bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": SKIPPED},
    "by the ends of names": {"llm_int8_skip_modules": ["lm_head", "o_proj", "gate_proj"]},
    "head": {"bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": []},
    **{
        f"in {dtype}": {"bnb_4bit_quant_storage": dtype, "bnb_4bit_use_double_quant": True}
        for dtype in ("bfloat16", "float16", "float32", "float64", "int8")
    },
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_both_read_what_either_writes(make, tmp_path, options):
    theirs, folder = make(transformers.LlamaConfig(**SIZES), **options)
    ours = load_model(folder)
    close(logits_of(ours), logits_of(theirs))
    save_model(ours, tmp_path / "again")
    close(logits_of(theirs_in(tmp_path / "again")), logits_of(theirs))
    in_4_bits = {name for name, module in theirs.named_modules() if type(module).__name__ == "Linear4bit"}
    ours_in_4_bits = {name for name, layer in linears(ours).items() if layer.four_bit is not None}
    assert ours_in_4_bits == in_4_bits - {"lm_head"} and in_4_bits  # the head is multiplied out
    if "lm_head" in in_4_bits:
        samples = generate(ours, [IDS], SamplingParams(max_new_tokens=1, temperature=0.0))
        assert samples[0].tokens == [int(logits_of(theirs)[-1].argmax())]
        load_scalar_model(folder)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("options", [{}, {"llm_int8_skip_modules": ["lm_head", "up_proj"]}])
def test_bf16_folders(make, tmp_path, tied, options):
    """Published folders are bf16 beside the 4 bits: off by no more than twice what transformers is off in bf16."""
    theirs, folder = make(
        transformers.Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=tied),
        torch.bfloat16,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        **options,
    )

    exact, ours = load_model(folder), load_model(folder, torch.bfloat16)
    for name, layer in linears(exact).items():
        module = theirs.get_submodule(name)
        if layer.four_bit is not None:
            module.weight.quant_state.dtype = torch.float32
            unpacked = functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            module.weight.quant_state.dtype = torch.bfloat16
            assert torch.equal(unpacked, layer.dense()), name

    truth, want = logits_of(exact), logits_of(theirs)
    assert (logits_of(ours) - truth).abs().max() <= 2 * (want - truth).abs().max() + 1e-5

    save_model(ours, tmp_path / "again")
    assert torch.equal(logits_of(theirs_in(tmp_path / "again", dtype=torch.bfloat16)), want)


SPARSE = {
    "mixtral": ("MixtralConfig", {"num_local_experts": 4}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 16}
        | {"shared_expert_intermediate_size": 64},
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 16},
    ),
    "olmoe": ("OlmoeConfig", {"num_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v3": (
        "DeepseekV3Config",
        {"num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2}
        | {"topk_group": 1, "moe_intermediate_size": 64, "first_k_dense_replace": 1, "q_lora_rank": 64}
        | {"kv_lora_rank": 64, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 32},
    ),
}


@pytest.mark.parametrize("skipped", [None, ["lm_head", "model.layers.1.self_attn"]])
@pytest.mark.parametrize("name", SPARSE)
def test_models_with_experts(make, tmp_path, name, skipped):
    """transformers 5 leaves experts and routers dense; a shared expert and its gate are linear layers."""
    kind, keys = SPARSE[name]
    theirs, folder = make(getattr(transformers, kind)(**SIZES | keys), llm_int8_skip_modules=skipped)
    ours = load_model(folder)
    close(logits_of(ours), logits_of(theirs))
    save_model(ours, tmp_path / "again")
    close(logits_of(theirs_in(tmp_path / "again")), logits_of(theirs))


@pytest.mark.parametrize("shard", ["5GB", "40KB"])
@pytest.mark.parametrize("name", SPARSE)
def test_experts_that_transformers_leaves_fused(load, data, tmp_path, name, shard):
    theirs = load(name)
    theirs.save_pretrained(tmp_path / name, save_original_format=False, max_shard_size=shard)
    assert (tmp_path / name / "model.safetensors.index.json").exists() == (shard == "40KB")
    ours = load_model(tmp_path / name)
    close(logits_of(ours), logits_of(theirs))
    plain, quantised = (load_model(at, base_4bit=True) for at in (data / "tiny-hf" / name, tmp_path / name))
    assert torch.equal(logits_of(plain), logits_of(quantised))


def test_an_adapter_on_a_dynamic_folder_is_peft_s(make, tmp_path):
    """Trained here on a folder with skipped modules; PEFT reads it onto the same folder to the same numbers."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    theirs, folder = make(transformers.LlamaConfig(**SIZES), **OPTIONS["dynamic"])
    ours = load_model(folder)
    add_lora(ours, 4, base=str(folder))
    optimizer = torch.optim.Adam([p for p in ours.parameters() if p.requires_grad], 1e-2)
    for _ in range(3):
        (-ours.score(pack([IDS]), torch.arange(1, len(IDS)))[0].mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    save_model(ours, tmp_path / "adapter")
    again = load_model(tmp_path / "adapter")
    assert torch.equal(logits_of(again), logits_of(ours))
    adapted = definition(peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter"))
    close(logits_of(adapted), logits_of(ours))
    assert (logits_of(ours) - logits_of(load_model(folder))).abs().max() > 0.05


def test_the_other_formats_of_transformers_are_refused(data, tmp_path):
    """Every method that transformers can read and we cannot has a name in the refusal."""
    from burnish.model.errors import InputError
    from burnish.model.files.formats import METHODS
    from transformers.utils.quantization_config import QuantizationMethod

    folder = Path(shutil.copytree(data / "tiny-hf" / "llama", tmp_path / "llama"))
    raw = json.loads((folder / "config.json").read_text())
    for method in QuantizationMethod:
        if method != QuantizationMethod.BITS_AND_BYTES:
            quantization = {
                "quantization_config": {"quant_method": method.value, "modules_to_not_convert": ["x"]}
            }
            (folder / "config.json").write_text(json.dumps(raw | quantization))
            with pytest.raises(
                InputError, match=f"got {METHODS.get(method.value, method.value)}, which is not read"
            ):
                load_model(folder)
