"""Weights out: the stream for a rollout engine, and models in several files."""

from dataclasses import replace

import pytest
import torch
from burnish.model import ModelConfig, Transformer
from burnish.model.adapter import adapters, add_lora, merge_lora, quantize_base
from burnish.model.checkpoint import load_model, load_scalar_model, save_model, stream_weights
from burnish.model.config import Experts
from burnish.model.errors import InputError
from burnish.model.scalar import ScalarModel
from safetensors.torch import load_file

SMALL = ModelConfig(60, 64, 64, 2, 4, 2, qkv_bias=True, model_type="qwen2")
EXPERTS = Experts(3, 2, 24, (True, False), renormalize=True)


def trained_adapter(model, **options) -> None:
    add_lora(model, 3, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for lora in adapters(model).values():
            lora.b.normal_(std=0.1, generator=generator)


def plain():
    return Transformer(SMALL)


def tied_bf16_lora():
    model = Transformer(replace(SMALL, tie_word_embeddings=True)).bfloat16()
    trained_adapter(model)
    return model


def experts_lora():
    model = Transformer(replace(SMALL, model_type="qwen3_moe", qk_norm=True, qkv_bias=False, experts=EXPERTS))
    trained_adapter(model, targets=("q_proj",))
    return model


def qlora_with_dora_and_a_whole_head():
    model = Transformer(SMALL).bfloat16()
    quantize_base(model)
    trained_adapter(model, dora=True, modules_to_save=("lm_head",))
    torch.nn.init.normal_(model.lm_head.weight)
    return model


def four_bit_alone():
    model = Transformer(SMALL)
    quantize_base(model)
    return model


def scalar_lora():
    model = ScalarModel(SMALL)
    trained_adapter(model, modules_to_save=("score",))
    torch.nn.init.normal_(model.score.weight)
    return model


MODELS = (plain, tied_bf16_lora, experts_lora, qlora_with_dora_and_a_whole_head, four_bit_alone, scalar_lora)


@pytest.mark.parametrize("made", MODELS)
def test_the_stream_is_what_the_merged_model_saves(made, tmp_path):
    model = made()
    pairs = list(stream_weights(model))
    streamed = {name: tensor.clone() for name, tensor in pairs}
    assert len(streamed) == len(pairs)  # each name once
    assert adapters(model) or made in (plain, four_bit_alone)  # the model is as it was
    merge_lora(model)
    save_model(model, tmp_path / "merged")
    saved = load_file(tmp_path / "merged" / "model.safetensors")
    assert streamed.keys() == saved.keys()
    assert all(torch.equal(streamed[name], saved[name]) for name in saved)
    assert all(streamed[name].dtype == saved[name].dtype for name in saved)


def test_experts_are_streamed_one_by_one():
    names = [name for name, _ in stream_weights(experts_lora())]
    assert "model.layers.0.mlp.experts.2.up_proj.weight" in names and not any(
        "gate_up" in name for name in names
    )


@pytest.mark.parametrize("four_bit", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "mixtral", "gpt_oss"])
def test_the_stream_has_the_names_of_the_published_folder(data, tmp_path, name, four_bit):
    """Nothing is fused, missing or the adapter's, with adapters on the experts, too."""
    model = load_model(data / "tiny-hf" / name)
    if four_bit:
        quantize_base(model)
    experts = {} if name == "llama" else {"parameters": ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")}
    trained_adapter(model, **experts)
    streamed = {key: tensor.clone() for key, tensor in stream_weights(model)}
    published = load_file(data / "tiny-hf" / name / "model.safetensors")
    assert {key: t.shape for key, t in streamed.items()} == {key: t.shape for key, t in published.items()}
    merge_lora(model)
    save_model(model, tmp_path / "merged")
    saved = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(torch.equal(streamed[key], saved[key]) for key in published)
    for key, tensor in published.items():
        adapted = ("_proj" in key or ".experts." in key) and "bias" not in key
        assert torch.equal(streamed[key].float(), tensor.float()) != adapted, key


@pytest.mark.parametrize("made", [plain, experts_lora, four_bit_alone, scalar_lora])
def test_several_files_are_the_model_of_one(made, tmp_path, monkeypatch):
    model = made()
    if adapters(model):
        merge_lora(model)
    save_model(model, tmp_path / "one")
    monkeypatch.setattr("burnish.model.files.tensors.FILE_BYTES", 40_000)
    save_model(model, tmp_path / "several")
    files = sorted((tmp_path / "several").glob("*.safetensors"))
    assert len(files) >= 2 and files[0].name == f"model-00001-of-{len(files):05}.safetensors"

    tensors = [load_file(file) for file in files]
    assert all(sum(t.nbytes for t in shard.values()) <= 40_000 or len(shard) == 1 for shard in tensors)
    joined = {name: tensor for shard in tensors for name, tensor in shard.items()}
    expected = load_file(tmp_path / "one" / "model.safetensors")
    assert joined.keys() == expected.keys() and all(
        torch.equal(joined[name], expected[name]) for name in expected
    )

    load = load_scalar_model if isinstance(model, ScalarModel) else load_model
    for name, tensor in load(tmp_path / "several").state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
    save_model(model, tmp_path / "several")  # and may be replaced


def test_who_does_not_write_leaves_nothing(tmp_path):
    for made in (plain, tied_bf16_lora):
        save_model(made(), tmp_path / "model", write=False)
    assert not [*tmp_path.iterdir()]
    (tmp_path / "else.txt").write_text("")
    with pytest.raises(InputError, match="something else"):
        save_model(plain(), tmp_path)
