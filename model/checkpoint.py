"""Hugging Face folders, read and written: config.json, generation_config.json and safetensors; nothing is unpickled.

On disk a tensor has its parameter's name behind "model.", but for score.weight, and lm_head.weight, which is left out
where it is tied. A folder may also hold 4-bit weights (bnb.py), or no model but an adapter (peft.py): the model is then
the one that its base_model_name_or_path names, with the adapter on it.
"""

import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..kernels import quantize_nf4
from . import bnb, peft
from .adapter import (
    Adapter,
    adapters,
    give_adapter,
    hf_name,
    linears,
    lora_config,
    merge_lora,
    take_adapter,
)
from .config import ModelConfig
from .errors import InputError
from .folder import (
    INDEX,
    WEIGHTS,
    base_of,
    holds_a_model,
    is_adapter,
    opened,
    read_json,
    replacing,
    write_json,
)
from .linear import whole
from .moe import disk_name, from_disk, to_disk
from .scalar import ScalarModel
from .transformer import Transformer

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

FILE_BYTES = 5_000_000_000  # of weights in one file
SCALAR, SCORE_BIAS = "ForSequenceClassification", "score_bias"
# transformers' Gemma3ForSequenceClassification is that of the multimodal model
SCALAR_CLASS = {"Gemma3ForCausalLM": f"Gemma3Text{SCALAR}"}
FOUR_BIT = "base_4bit"  # in an adapter's metadata: its base was quantised from the folder that is named


def load_model(
    folder: str | os.PathLike[str],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    base_4bit: bool = False,
) -> Transformer:
    """The model in a Hugging Face folder, its weights in `dtype` whatever the files hold; or an adapter on its base.

    base_4bit: quantise the linear layers as they are read, also done for an adapter that was trained on such a base.
    The weights of a 4-bit folder stay in 4 bits. Parameters that an adapter trains are fp32, the others then frozen.
    Raises InputError naming the file, and the key or tensor, where one is missing, broken, unexpected or of the wrong
    shape, and where config.json asks for an architecture or option that this transformer would compute differently.
    """
    folder = Path(folder)
    if is_adapter(folder):
        adapter, metadata = read_adapter(folder)
        model = load_model(base_of(folder), dtype, device, base_4bit or FOUR_BIT in metadata)
        give_adapter(model, adapter, str(folder))
        return model
    raw = _read_config(folder)
    if _is_scalar(raw):
        raise InputError(
            f"{folder}: expected a language model, found a {raw['architectures'][0]}: it scores text"
        )
    config = _model_config(raw, folder)
    model = Transformer(config, device="meta")
    also = ("lm_head.weight",) if config.tie_word_embeddings else ()
    state = _read_tensors(folder, model, dtype, device, also, base_4bit)
    head = state.pop("lm_head.weight") if also and "lm_head.weight" in state else None
    _assign(model, state)
    if head is not None and not torch.equal(head, state["model.embed_tokens.weight"]):
        raise InputError(
            f"{folder}: lm_head.weight: differs from model.embed_tokens.weight although tie_word_embeddings is true"
        )
    return model


def load_scalar_model(
    folder: str | os.PathLike[str],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    base_4bit: bool = False,
) -> ScalarModel:
    """The reward model or critic in a *ForSequenceClassification folder with one label, or its adapter on its base; or
    the body of the language model in `folder`, an adapter merged, under a fresh head that is drawn from `seed`.

    base_4bit as in `load_model`. Raises InputError as it does.
    """
    folder = Path(folder)
    if is_adapter(folder):
        adapter, metadata = read_adapter(folder)
        if "score.weight" not in adapter.tensors:
            language = load_model(folder, dtype, device, base_4bit)
            merge_lora(language)
            language.lm_head = None
            model = ScalarModel(language.config, device="meta")
            model.body = language
            model.draw_head(seed, dtype, device)
            return model
        model = load_scalar_model(base_of(folder), dtype, device, seed, base_4bit or FOUR_BIT in metadata)
        give_adapter(model, adapter, str(folder))
        model.bias = float(metadata.get(SCORE_BIAS, model.bias))
        return model
    raw = _read_config(folder)
    bias = raw.pop(SCORE_BIAS, 0.0)
    if not isinstance(bias, int | float):
        raise InputError(f"{folder / 'config.json'}: {SCORE_BIAS}: expected a number, got {bias!r}")
    model = ScalarModel(_model_config(raw, folder), device="meta")
    if _is_scalar(raw):
        _assign(model, _read_tensors(folder, model, dtype, device, base_4bit=base_4bit))
        model.bias = float(bias)
        return model
    state = _read_tensors(folder, model.body, dtype, device, ("lm_head.weight",), base_4bit)
    state.pop("lm_head.weight", None)
    _assign(model.body, state)
    model.draw_head(seed, dtype, device)
    return model


def has_score(folder: str | os.PathLike[str]) -> bool:
    """Does the folder hold a head of one number, a reward model's? load_scalar_model draws one where it does not."""
    if is_adapter(Path(folder)):
        return "score.weight" in read_adapter(Path(folder))[0].tensors
    return _is_scalar(_read_config(Path(folder)))


def save_model(
    model: Transformer | ScalarModel,
    folder: str | os.PathLike[str],
    tokenizer: "Tokenizer | None" = None,
    *,
    write: bool = True,
) -> None:
    """Write a folder that load_model (load_scalar_model) and transformers read. It appears whole or not at all.

    A model with an adapter is saved as the adapter alone, which PEFT reads, too; merge_lora before for the whole. What
    is in 4 bits is written so, as bitsandbytes does.
    An earlier model in `folder` is replaced, with all its files. Raises InputError where `folder` holds something else,
    or cannot be written.

    Files hold up to FILE_BYTES; no more than one of them is in memory at a time beside the model.
    write: where processes share the model, every one of them calls this, with False but for one.
    """
    folder = Path(folder).resolve()
    if write and folder.exists() and not holds_a_model(folder):
        raise InputError(
            f"{folder}: expected a new folder or an earlier model, found something else: not replaced"
        )
    if adapters(model) and lora_config(model) is None:
        raise InputError(
            f"{folder}: several adapters side by side are not saved; each has a folder of its own"
        )
    if lora_config(model) is not None:
        return _save_adapter(model, folder, tokenizer, write)
    tensors = _on_disk(model)
    if not write:
        deque(tensors, maxlen=0)
        return
    config = model.config
    four_bit = [layer.four_bit for layer in linears(model).values() if layer.four_bit is not None]
    if any(layer.stack and layer.four_bit is not None for layer in linears(model).values()):
        raise InputError(
            f"{folder}: experts in 4 bits have no place in a Hugging Face folder; merge_lora multiplies them out"
        )
    body = model.body if isinstance(model, ScalarModel) else model
    raw = {**config.to_hf(), "dtype": str(body.embed_tokens.weight.dtype).removeprefix("torch.")}
    if isinstance(model, ScalarModel):
        names = raw["architectures"]
        raw["architectures"] = [SCALAR_CLASS.get(n, n.replace("ForCausalLM", SCALAR)) for n in names]
        raw |= {"id2label": {"0": "score"}, "label2id": {"score": 0}, SCORE_BIAS: model.bias}
    if four_bit:
        raw["quantization_config"] = bnb.config(four_bit[0], raw["dtype"])
    ids = {key: raw[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if raw[key] is not None}
    with replacing(folder) as beside:
        write_json(beside / "config.json", raw)
        write_json(beside / "generation_config.json", config.generation or ids)
        if tokenizer is not None:
            tokenizer.save(beside)
        _write_files(beside, tensors)


def stream_weights(model: Transformer | ScalarModel) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a plain model, for an engine that samples: an adapter merged in, 4 bits multiplied out, experts
    one by one, under the names of a Hugging Face folder. The bits are those that merge_lora and save_model would write.

    One parameter at a time is whole, on the model's device. Where processes share the model, all of them go through it.
    """
    body, layers = model.body if isinstance(model, ScalarModel) else model, linears(model)
    dtypes = {hf_name(name): base.dtype for name, base in body.replaced.items()}
    state = {hf_name(name): tensor for name, tensor in model.state_dict().items() if ".lora." not in name}
    quantized = [f"{name}.weight" for name, layer in layers.items() if layer.four_bit is not None]
    with torch.no_grad():
        for name in [*state, *quantized]:
            layer = layers.get(name.removesuffix(".weight"))
            tensor = whole(state[name]) if layer is None else layer.merged()
            tensor = tensor.detach().to(dtypes.get(name, tensor.dtype))
            yield from to_disk(model.config, {name: tensor}).items()


def _on_disk(model: Transformer | ScalarModel) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor on the CPU) of a model without an adapter, 4 bits as they are."""
    for name, weight in model.state_dict().items():
        state = {hf_name(name): whole(weight).detach().cpu().contiguous()}
        yield from to_disk(model.config, state).items()
    for name, layer in linears(model).items():
        if layer.four_bit is not None:
            yield from bnb.tensors(disk_name(model.config, f"{name}.weight"), layer.four_bit).items()


def _write_files(folder: Path, tensors: Iterator[tuple[str, Tensor]]) -> None:
    """One file, or several and an index where there is more than FILE_BYTES."""
    files: list[list[str]] = []  # the names in each
    held: dict[str, Tensor] = {}
    total = 0

    def close() -> None:
        save_file(held, folder / f"{len(files)}.safetensors", metadata={"format": "pt"})
        files.append([*held])
        held.clear()

    for name, tensor in tensors:
        if held and sum(t.nbytes for t in held.values()) + tensor.nbytes > FILE_BYTES:
            close()
        held[name] = tensor
        total += tensor.nbytes
    close()
    if len(files) == 1:
        (folder / "0.safetensors").rename(folder / WEIGHTS)
        return
    weight_map: dict[str, str] = {}
    for i, names in enumerate(files):
        file = f"model-{i + 1:05}-of-{len(files):05}.safetensors"
        (folder / f"{i}.safetensors").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


# ---- adapters


def read_adapter(folder: str | os.PathLike[str]) -> tuple[Adapter, dict[str, str]]:
    """The adapter in a PEFT folder, and its file's metadata. Raises InputError naming the file and the key."""
    folder = Path(folder)
    raw = read_json(folder / peft.CONFIG)
    config = peft.read_config(
        raw | {"base_model_name_or_path": str(base_of(folder))}, str(folder / peft.CONFIG)
    )
    if not (folder / peft.WEIGHTS).exists() and [*folder.glob("adapter_model.bin")]:
        raise InputError(f"{folder}: expected {peft.WEIGHTS}, found a pickled file, which is not read")
    with opened(folder / peft.WEIGHTS) as tensors:
        found = {name: tensors.get_tensor(name).float() for name in tensors.keys()}  # noqa: SIM118 (not a dict)
        metadata = tensors.metadata() or {}
    wrong = next((name for name in found if not name.startswith(peft.PREFIX)), None)
    if wrong is not None:
        raise InputError(f"{folder / peft.WEIGHTS}: {wrong}: expected a name that begins {peft.PREFIX}")
    return Adapter(
        config, {name.removeprefix(peft.PREFIX): tensor for name, tensor in found.items()}
    ), metadata


def _save_adapter(
    model: Transformer | ScalarModel, folder: Path, tokenizer: "Tokenizer | None", write: bool
) -> None:
    adapter = take_adapter(model)
    state = {
        f"{peft.PREFIX}{name}": whole(tensor).cpu().contiguous() for name, tensor in adapter.tensors.items()
    }
    if not write:
        return
    metadata = {"format": "pt"}
    if any(layer.four_bit is not None for layer in linears(model).values()):
        metadata[FOUR_BIT] = "nf4"
    if isinstance(model, ScalarModel):
        metadata[SCORE_BIAS] = repr(model.bias)
    task = "SEQ_CLS" if isinstance(model, ScalarModel) else "CAUSAL_LM"
    with replacing(folder) as beside:
        write_json(beside / peft.CONFIG, {**peft.write_config(adapter.config), "task_type": task})
        if tokenizer is not None:
            tokenizer.save(beside)
        save_file(state, beside / peft.WEIGHTS, metadata=metadata)


# ---- reading


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise InputError(
            f"{folder}: expected a model folder, found {'a file' if folder.exists() else 'nothing'}"
        )
    return read_json(folder / "config.json")


def _is_scalar(raw: dict[str, Any]) -> bool:
    """Says config.json that a head of labels stands on the transformer, not one of the vocabulary?"""
    architectures = raw.get("architectures")
    return isinstance(architectures, list) and any(str(name).endswith(SCALAR) for name in architectures)


def _model_config(raw: dict[str, Any], folder: Path) -> ModelConfig:
    generation_file = folder / "generation_config.json"
    generation = read_json(generation_file) if generation_file.exists() else {}
    raw = {key: value for key, value in raw.items() if key != "quantization_config"}  # which bnb.py reads
    return ModelConfig.from_hf(raw, str(folder / "config.json"), generation)


def _read_tensors(
    folder: Path,
    model: Transformer | ScalarModel,
    dtype: torch.dtype,
    device: torch.device | str,
    also: tuple[str, ...] = (),
    base_4bit: bool = False,
) -> dict[str, Tensor]:
    """Name on disk -> tensor: those of `model`, and the names in `also` where the files hold them.

    Weights in 4 bits, or to be put into them, go to their layers at once, and are not in the result.
    """
    config = model.config
    ours = {hf_name(name): weight for name, weight in model.state_dict().items()}
    wanted = {name: weight.shape for name, weight in to_disk(config, ours).items()}
    layers = {
        disk_name(config, f"{name}.weight"): layer
        for name, layer in linears(model).items()
        if name != "lm_head"
    }
    quantized = bnb.is_4bit(_read_config(folder), str(folder / "config.json"))
    parts: dict[str, dict[str, Tensor]] = {}  # by weight: what a 4-bit one is made of
    state: dict[str, Tensor] = {}
    for file, names in _files(folder).items():
        with opened(file) as tensors:
            held = dict.fromkeys(tensors.keys())
            for name in held if names is None else names:
                if name not in held:
                    raise InputError(f"{file}: {name}: missing, although {INDEX} says that it is there")
                if name.endswith("rotary_emb.inv_freq"):  # a constant that old checkpoints carry
                    continue
                weight, _, part = name.partition(".weight.")
                if quantized and f"{weight}.weight" in layers and part:
                    parts.setdefault(f"{weight}.weight", {})[part] = tensors.get_tensor(name)
                    continue
                if name not in wanted and name not in also:
                    raise InputError(
                        f"{file}: {name}: unexpected for this config.json, which has no such tensor"
                    )
                tensor = tensors.get_tensor(name)
                if quantized and name in layers and tensor.dtype == torch.uint8:
                    parts.setdefault(name, {})["packed"] = tensor
                    continue
                if name in wanted and tensor.shape != wanted[name]:
                    raise InputError(
                        f"{file}: {name}: expected shape {tuple(wanted[name])}, got {tuple(tensor.shape)}"
                    )
                if not tensor.is_floating_point():
                    raise InputError(f"{file}: {name}: expected floating point, got {tensor.dtype}")
                if base_4bit and name in layers:
                    layers[name].hold(quantize_nf4(tensor.to(device, dtype), double_quant=True))
                    del wanted[name]
                    continue
                state[name] = tensor.to(device, dtype, copy=True)  # a copy: the file may change while mapped
    for name, made_of in parts.items():
        layers[name].hold(bnb.weight(name, made_of, wanted.pop(name), str(folder)).to(device))
    missing = [name for name in wanted if name not in state]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"{folder}: {missing[0]}{more}: missing from the safetensors files")
    state = from_disk(config, state, ours)
    for name, layer in linears(model).items() if base_4bit else ():
        if layer.stack:  # on disk an expert is a tensor: quantised when all of a layer's stand together
            layer.hold(quantize_nf4(state.pop(f"{name}.weight"), double_quant=True))
    return state


def _assign(model: nn.Module, state: dict[str, Tensor]) -> None:
    model.load_state_dict({name: state[hf_name(name)] for name in model.state_dict()}, assign=True)


# ---- names and files


def _files(folder: Path) -> dict[Path, list[str] | None]:
    """Safetensors file -> the tensors to take from it, None for all."""
    if (folder / WEIGHTS).exists():
        return {folder / WEIGHTS: None}
    index = folder / INDEX
    if not index.exists():
        pickled = (
            " (pickled .bin and .pt files are not read)"
            if [*folder.glob("*.bin"), *folder.glob("*.pt*")]
            else ""
        )
        raise InputError(f"{folder}: expected {WEIGHTS} or {INDEX}, found neither{pickled}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: weight_map: expected an object from tensor to file, got {weight_map!r}")
    files: dict[Path, list[str] | None] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or file != os.path.basename(file) or not file.endswith(".safetensors"):
            raise InputError(
                f"{index}: {name}: expected a .safetensors file of the same folder, got {file!r}"
            )
        names = files.setdefault(folder / file, [])
        assert names is not None
        names.append(name)
    return files
