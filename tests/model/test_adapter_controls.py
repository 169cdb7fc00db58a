"""Negative controls: faults planted in adapters, 4-bit weights and what is read of a folder, caught by the named check.

A fault is put into the running function itself, since these call one another by name.
"""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from burnish.model import (
    ModelConfig,
    Transformer,
    adapter,
    memory,
    pack,
)
from burnish.model.adapter import (
    adapter_disabled,
    add_lora,
    frozen_copy,
    merge_lora,
    quantize_base,
    stack_adapters,
    take_adapter,
)
from burnish.model.adapters.config import LoraConfig
from burnish.model.checkpoint import load_model, save_model
from burnish.model.errors import InputError
from faults import check_of, control, faults_of
from planted import plant
from safetensors.torch import load_file, save_file

TINY = ModelConfig(
    vocab_size=31,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    initializer_range=0.2,
)
PACKED = pack([[1, 2, 3, 4, 5], [6, 7, 8]], device="cpu")
EXPERTS = "model.layers.1.mlp.experts"
PEFT_MODELS = ("qwen3-rslora", "qwen3-rank_pattern")


@torch.no_grad()
def logits_of(model, packed=PACKED) -> torch.Tensor:
    return model.logits(model(packed))


def same(found: torch.Tensor, expected: torch.Tensor, bound: float = 1e-5) -> None:
    assert found.shape == expected.shape and (found - expected).abs().max() <= bound


def trained(**options) -> Transformer:
    model = Transformer(TINY, seed=1)
    add_lora(model, 3, **options)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


# ---- the checks


@control
def logits_are_those_of_peft(data, tmp_path):
    for name in PEFT_MODELS:
        shutil.copytree(data / "tiny-hf" / "qwen3", tmp_path / "qwen3", dirs_exist_ok=True)
        folder = shutil.copytree(data / "tiny-peft" / name, tmp_path / name)
        config = folder / "adapter_config.json"
        named = '"base_model_name_or_path": '
        before, _, after = config.read_text().partition(named)
        config.write_text(f'{before}{named}"../qwen3"{after[after.index(",") :]}')
        golden = load_file(data / "tiny-hf" / "qwen3" / "expected.safetensors")
        expected = load_file(data / "tiny-peft" / name / "expected.safetensors")["logits"]
        mask = golden["attention_mask"] == 1
        packed = pack([row[m].tolist() for row, m in zip(golden["input_ids"], mask, strict=True)])
        same(logits_of(load_model(folder), packed), expected[mask])


@control
def merged_equals_unmerged(data, tmp_path):
    model = trained(dora=True, alpha_pattern={"k_proj": 11})
    before = logits_of(model)
    merge_lora(model)
    same(logits_of(model), before)


@control
def disabled_is_the_base(data, tmp_path):
    model = trained(modules_to_save=("lm_head",))
    with adapter_disabled(model):
        same(logits_of(model), logits_of(Transformer(TINY, seed=1)), 0)


@control
def the_reference_keeps_a_loaded_adapter(data, tmp_path):
    model = trained()
    same(logits_of(frozen_copy(model)), logits_of(model), 0)


@control
def the_base_gets_no_gradient(data, tmp_path):
    model = trained()
    model.score(PACKED, torch.tensor([1, 2]))[0].sum().backward()
    assert all((p.grad is None) == (".lora." not in name) for name, p in model.named_parameters())


@control
def nothing_is_dropped_without_a_gradient(data, tmp_path):
    model = trained(dropout=0.5)
    same(logits_of(model), logits_of(frozen_copy(model)), 0)


@control
def what_is_saved_is_what_acts(data, tmp_path):
    save_model(Transformer(TINY, seed=1), tmp_path / "base")
    model = trained(base=str(tmp_path / "base"), rslora=True, rank_pattern={"k_proj": 2})
    save_model(model, tmp_path / "adapter")
    same(logits_of(load_model(tmp_path / "adapter")), logits_of(model), 0)


@control
def several_act_as_each_alone(data, tmp_path):
    one, other = trained(), trained(alpha=1)
    stacked = Transformer(TINY, seed=1)
    stack_adapters(stacked, [take_adapter(one), take_adapter(other)])
    found = logits_of(stacked, pack([[1, 2, 3], [1, 2, 3]], adapters=[1, 0]))
    same(found, torch.cat([logits_of(m, pack([[1, 2, 3]])) for m in (other, one)]))


@control
def a_4_bit_folder_holds_its_weights(data, tmp_path):
    model = load_model(data / "tiny-bnb" / "qwen3-nf4-dq")
    save_model(model, tmp_path / "saved")
    same(logits_of(load_model(tmp_path / "saved")), logits_of(model), 0)


@control
def skipped_modules_stay_dense(data, tmp_path):
    model = Transformer(TINY, seed=1)
    dense = model.layers[0].mlp.up_proj.weight
    quantize_base(model)
    model.layers[0].mlp.up_proj.weight, model.layers[0].mlp.up_proj.four_bit = dense, None
    save_model(model, tmp_path / "saved")
    raw = json.loads((tmp_path / "saved" / "config.json").read_text())
    skipped = raw["quantization_config"].get("llm_int8_skip_modules")
    assert skipped == ["model.layers.0.mlp.up_proj", "lm_head"]
    again = load_model(tmp_path / "saved", base_4bit=True)
    assert again.layers[0].mlp.up_proj.four_bit is None
    same(logits_of(again), logits_of(model), 0)


@control
def experts_are_in_their_places(data, tmp_path):
    source, fused = data / "tiny-hf" / "qwen3_moe", tmp_path / "fused"
    model, tensors = load_model(source), load_file(source / "model.safetensors")
    gate, up = (
        tensors.pop(name) for name in (f"{EXPERTS}.2.gate_proj.weight", f"{EXPERTS}.2.up_proj.weight")
    )
    same(model.layers[1].mlp.experts.gate_up_proj.weight[2], torch.cat((gate, up)), 0)
    tensors = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for name, tensor in model.state_dict().items():
        if ".experts." in name:
            tensors[f"model.{name}".removesuffix(".weight")] = tensor
    shutil.copytree(source, fused)
    save_file(tensors, fused / "model.safetensors")
    same(logits_of(load_model(fused)), logits_of(model), 0)


@control
def only_layers_behind_the_last_are_passed_over(data, tmp_path):
    source, folder = data / "tiny-hf" / "deepseek_v3", tmp_path / "further"
    expected, tensors = logits_of(load_model(source)), load_file(source / "model.safetensors")
    for layer, refused in ((3, False), (4, True)):
        shutil.copytree(source, folder, dirs_exist_ok=True)
        save_file(
            tensors | {f"model.layers.{layer}.eh_proj.weight": torch.ones(1)}, folder / "model.safetensors"
        )
        try:
            same(logits_of(load_model(folder)), expected, 0)
        except InputError:
            assert refused
        else:
            assert not refused


@control
def counted_is_held(data, tmp_path):
    model = trained()
    found = memory.training_memory(TINY, memory.Training(LoraConfig(3, 6), on_gpu=False))
    size = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert (found.adapter, found.gradients, found.optimizer) == (size, size, 2 * size)


@control
def dtypes_come_back(data, tmp_path):
    save_model(Transformer(TINY, seed=1), tmp_path / "base", dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    model = load_model(tmp_path / "base")
    save_model(model, tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert {name: t.dtype for name, t in saved.items()} == {name: t.dtype for name, t in tensors.items()}
    assert '"dtype": "bfloat16"' in (tmp_path / "saved" / "config.json").read_text()


@control
def too_large_is_refused(data, tmp_path):
    model = Transformer(TINY, seed=1)
    torch.nn.init.constant_(model.norm.weight, 1e5)
    try:
        save_model(model, tmp_path / "saved", dtype=torch.float16)
    except InputError:
        return
    raise AssertionError("written")


@control
def a_tied_head_is_adapted_alone(data, tmp_path):
    """The embedding stays, as in PEFT; merged, head and embedding are two matrices."""
    tied = replace(TINY, tie_word_embeddings=True)
    save_model(Transformer(tied, seed=1), tmp_path / "base")
    model = load_model(tmp_path / "base")
    add_lora(model, 3, targets=("lm_head",), base=str(tmp_path / "base"))
    torch.nn.init.normal_(model.lm_head.lora.b)
    with torch.no_grad():
        same(model(PACKED), load_model(tmp_path / "base")(PACKED), 0)
    expected = logits_of(model)
    merge_lora(model)
    save_model(model, tmp_path / "merged")
    same(logits_of(load_model(tmp_path / "merged")), expected)


@control
def copies_are_the_bases(data, tmp_path):
    """The copy that PEFT writes beside an adapter of the head: passed over if it is the base's, else refused."""
    save_model(Transformer(TINY, seed=1), tmp_path / "base")
    model = load_model(tmp_path / "base")
    add_lora(model, 3, targets=("lm_head",), base=str(tmp_path / "base"))
    save_model(model, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors, copy = load_file(file), model.lm_head.weight.detach().bfloat16()
    for offset in (0, 1e-2):
        more = {"base_model.model.lm_head.base_layer.weight": copy + offset}
        save_file(tensors | more, file, metadata={"format": "pt"})
        try:
            same(logits_of(load_model(tmp_path / "adapter")), logits_of(model), 0)
        except InputError:
            assert offset
        else:
            assert not offset


@control
def loaded_it_does_not_train(data, tmp_path):
    save_model(Transformer(TINY, seed=1), tmp_path / "base")
    model = load_model(tmp_path / "base")
    add_lora(model, 3, dropout=0.5, base=str(tmp_path / "base"))
    torch.nn.init.normal_(linear_of(model).lora.b)
    save_model(model, tmp_path / "adapter")
    again = load_model(tmp_path / "adapter")
    same(again(PACKED), again(PACKED), 0)
    again.train()
    assert not torch.equal(again(PACKED), again(PACKED))


def linear_of(model):
    return adapter.linears(model)["model.layers.0.self_attn.q_proj"]


# ---- planted faults

FAULTS = faults_of(__file__)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.id)
def test_fault_is_caught(fault, data, tmp_path, monkeypatch):
    plant(fault, monkeypatch)
    with pytest.raises((AssertionError, InputError)):
        check_of(fault)(data, tmp_path)


@pytest.mark.parametrize("check", dict.fromkeys(map(check_of, FAULTS)), ids=lambda check: check.__name__)
def test_without_a_fault_the_check_passes(check, data, tmp_path):
    check(data, tmp_path)
