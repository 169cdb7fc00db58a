"""4-bit folders: against golden files of bitsandbytes 0.50.2, and what is written against what was read."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from burnish.kernels import dequantize_nf4
from burnish.model import InputError, ModelConfig, Transformer, pack
from burnish.model.adapter import add_lora, frozen_copy, linears, merge_lora, quantize_base
from burnish.model.checkpoint import load_model, load_scalar_model, save_model
from safetensors.torch import load_file, save_file

GOLDEN = ["qwen3-nf4", "qwen3-nf4-dq", "qwen3-fp4"]
WEIGHT = "model.layers.1.mlp.up_proj.weight"
TINY = ModelConfig(
    vocab_size=31, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2
)


@pytest.fixture
def folder(data, tmp_path):
    return Path(shutil.copytree(data / "tiny-bnb" / "qwen3-nf4-dq", tmp_path / "qwen3"))


@torch.no_grad()
def logits_of(model, packed) -> torch.Tensor:
    return model.logits(model(packed))


@pytest.mark.parametrize("name", GOLDEN)
def test_weights_and_logits_are_those_of_bitsandbytes(data, name):
    model = load_model(data / "tiny-bnb" / name)
    expected = load_file(data / "tiny-bnb" / name / "expected.safetensors")
    layers = linears(model)
    for key, weight in expected.items():
        if key.endswith(".dequant"):
            four_bit = layers[key.removesuffix(".dequant")].four_bit
            assert torch.equal(dequantize_nf4(four_bit), weight), key
    golden = load_file(data / "tiny-hf" / "qwen3" / "expected.safetensors")
    mask = golden["attention_mask"] == 1
    packed = pack([row[m].tolist() for row, m in zip(golden["input_ids"], mask, strict=True)])
    torch.testing.assert_close(logits_of(model, packed), expected["logits"][mask], atol=1e-5, rtol=0)
    assert all((layer.four_bit is None) == (name == "lm_head") for name, layer in layers.items())
    assert not any("_proj" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("name", GOLDEN)
def test_what_is_saved_is_what_was_loaded(data, tmp_path, name):
    source = data / "tiny-bnb" / name
    save_model(load_model(source), tmp_path / "saved")
    saved, was = (load_file(at / "model.safetensors") for at in (tmp_path / "saved", source))
    assert saved.keys() == was.keys()
    for key in was:
        if "quant_state" in key:
            now, before = (json.loads(bytes(tensor[key].tolist())) for tensor in (saved, was))
            assert now == before
        else:
            assert saved[key].dtype == was[key].dtype and torch.equal(saved[key], was[key]), key
    now, before = (json.loads((at / "config.json").read_text()) for at in (tmp_path / "saved", source))
    assert now["quantization_config"].items() <= before["quantization_config"].items()


@pytest.mark.parametrize("double_quant", [False, True])
def test_transformers_loads_what_we_write(tmp_path, double_quant):
    transformers = pytest.importorskip("transformers")
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = Transformer(TINY)
    quantize_base(model, double_quant)
    save_model(model, tmp_path / "saved")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", device_map="cpu")
    for name, layer in linears(model).items():
        if layer.four_bit is not None:
            weight = theirs.get_submodule(name).weight
            unpacked = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
            assert torch.equal(unpacked, layer.dense()), name
    ids = [1, 5, 9, 4, 7]
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0]
    # on a CPU with AVX-512 bitsandbytes multiplies in bf16
    torch.testing.assert_close(logits_of(model, pack([ids])), expected, atol=5e-3, rtol=0)


def test_quantised_when_loaded_is_quantised_later(tmp_path):
    save_model(Transformer(TINY, seed=3), tmp_path / "base")
    packed = pack([[1, 2, 3, 4]])
    early, late = load_model(tmp_path / "base", base_4bit=True), load_model(tmp_path / "base")
    exact = logits_of(late, packed)
    quantize_base(late)
    assert torch.equal(logits_of(early, packed), logits_of(late, packed))
    assert 0 < (logits_of(late, packed) - exact).abs().max() < 0.4 * exact.abs().max()
    assert all(layer.weight is None for name, layer in linears(early).items() if name != "lm_head")
    assert (
        load_scalar_model(tmp_path / "base", base_4bit=True).body.layers[0].mlp.up_proj.four_bit is not None
    )


def test_an_adapter_remembers_that_its_base_was_in_4_bits(tmp_path):
    save_model(Transformer(TINY, seed=3), tmp_path / "base")
    model = load_model(tmp_path / "base", base_4bit=True)
    add_lora(model, 4, base=str(tmp_path / "base"))
    packed = pack([[1, 2, 3, 4]])
    model.score(packed, torch.tensor([1, 2, 3]))[0].sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            assert (parameter.grad is None) == (not parameter.requires_grad)
            if parameter.requires_grad:
                parameter += 0.1

    save_model(model, tmp_path / "adapter")
    again = load_model(tmp_path / "adapter")
    assert again.layers[0].mlp.up_proj.four_bit is not None
    assert torch.equal(logits_of(again, packed), logits_of(model, packed))

    reference = frozen_copy(again)
    assert reference.layers[0].mlp.up_proj.four_bit is again.layers[0].mlp.up_proj.four_bit
    assert torch.equal(logits_of(reference, packed), logits_of(again, packed))

    merge_lora(again)
    assert again.layers[0].mlp.up_proj.four_bit is None
    torch.testing.assert_close(logits_of(again, packed), logits_of(model, packed), atol=1e-4, rtol=1e-4)


def test_a_dtype_does_not_reach_the_4_bit_weight(tmp_path):
    model = Transformer(TINY)
    quantize_base(model)
    before = model.layers[0].mlp.up_proj.dense()
    assert torch.equal(model.bfloat16().layers[0].mlp.up_proj.dense(), before)
    assert model.layers[0].mlp.up_proj.four_bit.absmax.dtype == torch.uint8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop(f"{WEIGHT}.absmax"),
            "up_proj.weight.absmax: missing, although the weight is in 4 bits",
        ),
        (lambda t: t.pop(f"{WEIGHT}.quant_state.bitsandbytes__nf4"), "bitsandbytes__nf4: missing"),
        (
            lambda t: t.update({WEIGHT: t[WEIGHT][:-1].clone()}),
            "up_proj.weight: expected 768 bytes for a weight",
        ),
        (
            lambda t: t.update({f"{WEIGHT}.absmax": torch.ones(24)}),
            "absmax: expected 24 numbers of torch.uint8",
        ),
        (lambda t: edit_state(t, shape=[32, 48]), r"nf4: expected shape \[48, 32\], got \[32, 48\]"),
        (lambda t: edit_state(t, quant_type="int4"), "nf4: quant_type: expected nf4 or fp4"),
        (lambda t: edit_state(t, dtype="float33"), "nf4: dtype: expected one of float64"),
        (lambda t: t.update({f"{WEIGHT}.other": torch.ones(1)}), "up_proj.weight.other: unexpected"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_name(folder, change, message):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=f"qwen3.*{message}"):
        load_model(folder)


def edit_state(tensors, **changes) -> None:
    key = f"{WEIGHT}.quant_state.bitsandbytes__nf4"
    state = json.loads(bytes(tensors[key].tolist())) | changes
    tensors[key] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


def test_4_bit_tensors_in_a_folder_that_does_not_say_so(folder):
    raw = json.loads((folder / "config.json").read_text())
    del raw["quantization_config"]
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(InputError, match=r"model\.safetensors: .*_proj\.weight.*: "):
        load_model(folder)
