"""Model folders for tests: their JSON edited, their tensors written anew, some of these in 4 bits."""

import json
from pathlib import Path

import torch
from burnish.kernels import dequantize_nf4, quantize_nf4
from burnish.model import ModelConfig
from burnish.model.files import bnb
from safetensors.torch import load_file, save_file

TINY_HF = Path(__file__).parents[1] / "data" / "tiny-hf"
SHARDED = "qwen3-sharded"  # the same model as qwen3, in several files
# every golden folder: a test that is parametrised by it holds a new architecture as soon as its folder is there
GOLDEN = [
    file.parent.name for file in sorted(TINY_HF.glob("*/expected.safetensors")) if file.parent.name != SHARDED
]
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
UP = "model.layers.1.mlp.up_proj"
SMALL = ModelConfig(  # a row has a whole block of 64
    vocab_size=31, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2
)


def edit(file: Path, **changes) -> None:
    """Change keys of a JSON file; `...` takes a key away."""
    raw = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in raw.items() if value is not ...}))


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in folder.glob("model*.safetensors") for name, t in load_file(file).items()}


def rewrite(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 1) -> None:
    """Write `tensors` in place of the folder's: one file, or several and an index, which cut across the layers."""
    for file in [*folder.glob("model*.safetensors"), *folder.glob(INDEX)]:
        file.unlink()
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    if shards == 1:
        save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
        return
    files = {name: f"model-{i % shards:05}.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({name: t for name, t in tensors.items() if files[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"weight_map": files}))


def quantized(folder: Path, choose, **options) -> dict[str, torch.Tensor]:
    """The folder's weights with those that `choose` names in 4 bits, as bitsandbytes has them; what they stand for."""
    found, meant = {}, {}
    for name, tensor in tensors_in(folder).items():
        if choose(name):
            four_bit = quantize_nf4(tensor, **options)
            found |= bnb.tensors(name, four_bit)
            meant[name] = dequantize_nf4(four_bit)
        else:
            found[name] = meant[name] = tensor
    rewrite(folder, found)
    edit(folder / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    return meant
