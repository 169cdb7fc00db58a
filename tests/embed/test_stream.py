"""The stream for a rollout engine, read by transformers: its model says what ours, adapted and in 4 bits, says."""

import shutil

import pytest
import torch
from burnish.model.adapter import adapters, add_lora, quantize_base
from burnish.model.checkpoint import load_model, stream_weights
from burnish.model.packed import pack
from safetensors.torch import save_file

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.mark.parametrize("four_bit", [False, True])
@pytest.mark.parametrize("name", ["qwen3", "mixtral", "qwen3_moe", "gpt_oss"])
def test_transformers_reads_the_stream(data, ids, tmp_path, name, four_bit):
    model = load_model(data / "tiny-hf" / name).eval()
    if four_bit:
        quantize_base(model)
    sparse = {"parameters": ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")}
    add_lora(model, 3, **({} if name == "qwen3" else sparse))
    with torch.no_grad():
        for lora in adapters(model).values():
            lora.b.normal_(std=0.1)
        want = model.logits(model(pack(ids.tolist()))).unflatten(0, ids.shape)

    shutil.copy(data / "tiny-hf" / name / "config.json", tmp_path)
    save_file(dict(stream_weights(model)), tmp_path / "model.safetensors", metadata={"format": "pt"})
    read, loading = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not any(loading.values()), loading  # no key missing, unexpected or of another shape
    torch.testing.assert_close(read.eval()(ids).logits, want, rtol=1e-5, atol=1e-5)
