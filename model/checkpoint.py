"""Loading and saving models as Hugging Face folders: config.json, generation_config.json, safetensors; no pickles.

On disk a tensor has its parameter's name with "model." before it. score.weight and lm_head.weight have no such prefix,
and a tied lm_head.weight is left out. Weights may be in 4 bits (files/bnb.py). A folder may also hold an adapter alone
(files/peft.py). The model is then its base, which base_model_name_or_path names, with the adapter on it.
"""

import os
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .adapter import (
    Adapter,
    adapters,
    give_adapter,
    hf_name,
    linears,
    lora_config,
    merge_lora,
    quantize_base,
    take_adapter,
)
from .config import ModelConfig
from .errors import InputError, shown
from .files import bnb, formats, peft
from .files.architectures import TOKEN_IDS
from .files.config_json import read_config, write_config
from .files.config_keys import LARGEST, is_token_id
from .files.dtypes import read_dtypes
from .files.experts import disk_name, to_disk
from .files.finite import cast, check_finite
from .files.folder import absolute, base_of, holds_a_model, is_adapter, way_to_fetch
from .files.replacing import recover, replacing_folder
from .files.sizes import check_sizes
from .files.tensors import DTYPES, FLOATS, opened, stored_tensors, write_json, write_tensors
from .files.text_files import check_json, read_object, read_optional
from .linear import whole
from .scalar import ScalarModel
from .transformer import Transformer
from .weights import Source, read_weights

if TYPE_CHECKING:
    from .text.tokenizer import Tokenizer

SCALAR, SCORE_BIAS = "ForSequenceClassification", "score_bias"
# transformers' Gemma3ForSequenceClassification belongs to the multimodal model
SCALAR_CLASS = {"Gemma3ForCausalLM": f"Gemma3Text{SCALAR}"}
_SCORE = "score.weight"  # the head of a reward model
FOUR_BIT = "base_4bit"  # in an adapter's metadata: the dense base was quantised for the training


def load_model(
    folder: str | os.PathLike[str],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    base_4bit: bool = False,
    base: str | os.PathLike[str] | None = None,
) -> Transformer:
    """Load a model from a Hugging Face folder, or an adapter on its base, with weights in `dtype`.

    The model is in evaluation mode: call train() before training with an adapter's dropout. With an adapter, the
    parameters that it trains are fp32, and all others are frozen.
    base: the folder of an adapter's base, in place of the one that the adapter's file names.
    base_4bit: quantise the linear layers as they are read. An adapter that was trained on 4-bit weights sets this
    itself.
    Weights that are in 4 bits in the folder stay so, except for a head. The dense weights beside them stay dense.

    Raises InputError naming the file, key or tensor that is missing, broken, unexpected or of the wrong shape. It is
    also raised for an architecture or option that this transformer would compute differently.
    """
    folder = Path(folder)
    if is_adapter(folder):
        adapter, metadata = read_adapter(folder)
        if _SCORE in adapter.tensors:
            raise InputError(
                f"{folder}: expected a language model, found an adapter of a reward model: it scores text"
            )
        model = load_model(base or base_of(folder), dtype, device, base_4bit or FOUR_BIT in metadata)
        _give(model, adapter, folder)
        return model

    _check_no_base(folder, base)
    raw = _read_config(folder)
    if _is_scalar(raw):
        raise InputError(
            f"{folder}: expected a language model, found a {shown(raw['architectures'][0])}: it scores text"
        )
    model = Transformer(_checked_config(raw, folder), device="meta")

    # a tied head is not a parameter; if the folder has one even so, it must equal the embedding
    also = {"lm_head.weight": model.head.shape} if model.config.tie_word_embeddings else {}
    state = read_weights(Source(folder, raw, dtype, device, base_4bit), model, also)
    head = state.pop("lm_head.weight", None) if also else None
    _assign(model, state)
    if head is not None and not torch.equal(head, state["model.embed_tokens.weight"]):
        raise InputError(
            f"{folder}: lm_head.weight: differs from model.embed_tokens.weight although tie_word_embeddings is true"
        )
    model.dtypes = read_dtypes(stored_tensors(folder))
    return model.eval()


def load_scalar_model(
    folder: str | os.PathLike[str],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    base_4bit: bool = False,
    base: str | os.PathLike[str] | None = None,
) -> ScalarModel:
    """Load the reward model or critic of a *ForSequenceClassification folder with one label, or an adapter on its base.

    In a language model's folder, the body is used, with an adapter merged, and a fresh head is drawn from `seed`.
    base_4bit, base, the evaluation mode and the errors are as in `load_model`.
    """
    folder = Path(folder)
    if is_adapter(folder):
        adapter, metadata = read_adapter(folder)
        if _SCORE not in adapter.tensors:
            language = load_model(folder, dtype, device, base=base)
            merge_lora(language)
            if base_4bit:  # after the merge, so that the adapter is quantised with its base
                quantize_base(language)
            language.lm_head = None

            model = ScalarModel(language.config, device="meta")
            model.body = language
            model.draw_head(seed, dtype, device)
            return model.eval()

        base_4bit = base_4bit or FOUR_BIT in metadata
        model = load_scalar_model(base or base_of(folder), dtype, device, seed, base_4bit)
        _give(model, adapter, folder)
        model.bias = float(metadata.get(SCORE_BIAS, model.bias))
        return model

    _check_no_base(folder, base)
    raw = _read_config(folder)
    bias = raw.pop(SCORE_BIAS, 0.0)
    if not isinstance(bias, int | float) or isinstance(bias, bool) or not abs(bias) <= LARGEST:
        raise InputError(
            f"{folder / 'config.json'}: {SCORE_BIAS}: expected a number, got {shown(repr(bias))}"
        )

    model = ScalarModel(_checked_config(raw, folder), device="meta")
    source = Source(folder, raw, dtype, device, base_4bit)
    if _is_scalar(raw):
        _assign(model, read_weights(source, model))
        model.bias = float(bias)
    else:
        _assign(model.body, read_weights(source, model.body, unread=("lm_head.",)))
        model.draw_head(seed, dtype, device)
    model.body.dtypes = read_dtypes(stored_tensors(folder))
    return model.eval()


def has_score(folder: str | os.PathLike[str]) -> bool:
    """Return whether the folder holds a reward model's head. If it does not, load_scalar_model draws a fresh one."""
    if is_adapter(Path(folder)):
        return _SCORE in read_adapter(Path(folder))[0].tensors
    return _is_scalar(_read_config(Path(folder)))


def save_model(
    model: Transformer | ScalarModel,
    folder: str | os.PathLike[str],
    tokenizer: "Tokenizer | None" = None,
    *,
    dtype: torch.dtype | None = None,
    write: bool = True,
) -> None:
    """Write a folder that load_model (or load_scalar_model) and transformers can read, completely or not at all.

    A model with an adapter is saved as the adapter alone, which PEFT can read, too. Call merge_lora first to save the
    whole model. Weights in 4 bits are written in the format of bitsandbytes. An earlier model in `folder` is replaced
    with all its files. A file holds up to FILE_BYTES of weights, and at most one file is in memory beside the model.

    dtype: the dtype of all tensors on disk. With None, an fp32 tensor of a model that was read from a folder gets the
        dtype that it had there. Any other tensor keeps its own dtype. A new adapter is fp32, and an adapter that was
        read gets its file's dtype. A module trained whole gets the base's dtype.
    write: if several processes share the model, all of them call this function, and all but one pass False.

    Raises InputError if `folder` holds anything else or cannot be written, and TooLarge if a number does not fit the
    dtype.
    """
    folder = absolute(folder)
    if write and os.path.exists(folder) and not holds_a_model(folder):
        raise InputError(
            f"{folder}: expected a new folder or an earlier model, found something else: not replaced"
        )
    if adapters(model) and lora_config(model) is None:
        raise InputError(
            f"{folder}: expected at most one adapter, got several side by side: save each in a folder of its own"
        )

    if lora_config(model) is not None:
        content = _adapter_content(model, dtype)
        if write:
            _write_adapter(folder, content, tokenizer)
        return
    tensors = _on_disk(model, dtype)
    if not write:
        deque(tensors, maxlen=0)  # this process takes part in gathering each tensor
        return
    if any(layer.stack and layer.four_bit is not None for layer in linears(model).values()):
        raise InputError(
            f"{folder}: expected dense experts, got 4-bit ones, which the format cannot hold: call merge_lora first"
        )

    raw = _config_json(model, dtype)
    ids = {key: raw[key] for key in TOKEN_IDS if raw[key] is not None}
    with replacing_folder(folder) as beside:
        write_json(beside / "config.json", raw)
        write_json(beside / "generation_config.json", model.config.generation or ids)
        if tokenizer is not None:
            tokenizer.save(beside)
        write_tensors(beside, tensors)


def _config_json(model: Transformer | ScalarModel, dtype: torch.dtype | None) -> dict[str, Any]:
    """Return the content of config.json for a model without an adapter."""
    body = _body(model)
    usual = dtype or _written_in(body, "", body.embed_tokens.weight.dtype)
    raw = {**write_config(model.config), "dtype": str(usual).removeprefix("torch.")}
    if isinstance(model, ScalarModel):
        names = raw["architectures"]
        raw["architectures"] = [SCALAR_CLASS.get(n, n.replace("ForCausalLM", SCALAR)) for n in names]
        raw |= {"id2label": {"0": "score"}, "label2id": {"score": 0}, SCORE_BIAS: model.bias}
    return raw | _quantization(model, raw["dtype"])


def stream_weights(model: Transformer | ScalarModel) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of a plain model under the names of a Hugging Face folder, for a sampling engine.

    An adapter is merged in, 4-bit weights are made dense, and experts are given one by one. The bits are those that
    merge_lora and save_model would write. Only one parameter at a time is gathered, on the model's device. If several
    processes share the model, all of them must iterate.
    """
    body, layers = _body(model), linears(model)
    dtypes = {hf_name(name): base.dtype for name, base in body.replaced.items()}
    state = {hf_name(name): tensor for name, tensor in model.state_dict().items() if ".lora." not in name}
    quantized = [f"{name}.weight" for name, layer in layers.items() if layer.four_bit is not None]

    with torch.no_grad():
        for name in [*state, *quantized]:
            layer = layers.get(name.removesuffix(".weight"))
            tensor = whole(state[name]) if layer is None else layer.merged()
            tensor = tensor.detach().to(dtypes.get(name, tensor.dtype))
            for name_on_disk, part in to_disk(model.config, {name: tensor}).items():
                yield name_on_disk, cast(name_on_disk, part, _written_in(body, name_on_disk, part.dtype))


def _on_disk(
    model: Transformer | ScalarModel, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name on disk, tensor on the CPU) for a model without an adapter.

    Weights in 4 bits stay in 4 bits, and their quantisation state records the dtype.
    """
    body = _body(model)
    for name, weight in model.state_dict().items():
        state = {hf_name(name): whole(weight).detach().cpu().contiguous()}
        for name_on_disk, tensor in to_disk(model.config, state).items():
            yield (
                name_on_disk,
                cast(name_on_disk, tensor, dtype or _written_in(body, name_on_disk, tensor.dtype)),
            )
    for name, layer in linears(model).items():
        if layer.four_bit is not None:
            name_on_disk = disk_name(model.config, f"{name}.weight")
            weight = replace(
                layer.four_bit, dtype=dtype or _written_in(body, name_on_disk, layer.four_bit.dtype)
            )
            yield from bnb.tensors(name_on_disk, weight).items()


def _written_in(body: Transformer, name: str, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype on disk of a tensor that the model holds in `dtype`. name: the tensor's name on disk.

    An fp32 tensor of a model that was read from a folder gets the dtype that it had in the folder. If it was not in the
    folder, it gets the dtype of most numbers there. Any other tensor keeps `dtype`.
    """
    return body.dtypes.of(name) if body.dtypes is not None and dtype == torch.float32 else dtype


def _body(model: Transformer | ScalarModel) -> Transformer:
    return model.body if isinstance(model, ScalarModel) else model


def _quantization(model: Transformer | ScalarModel, dtype: str) -> dict[str, Any]:
    """Return the part of config.json about 4-bit weights. The modules in it have the names of transformers' modules."""
    layers = {name: layer for name, layer in linears(model).items() if not layer.stack}
    four_bit = [layer.four_bit for layer in layers.values() if layer.four_bit is not None]
    if not four_bit:
        return {}
    head = "score" if isinstance(model, ScalarModel) else "lm_head"  # dense, as by transformers' default
    dense = [name for name, layer in layers.items() if layer.four_bit is None and name != head]
    named = [disk_name(model.config, name) for name in dense]
    return {formats.CONFIG: bnb.config(four_bit[0], dtype, [*named, head] if named else ())}


# ---- adapters


class AdapterFolder(NamedTuple):
    """The content of a PEFT folder: the adapter, and the metadata of its weights file."""

    adapter: Adapter
    metadata: dict[str, str]


def read_adapter(folder: str | os.PathLike[str]) -> AdapterFolder:
    """Read a PEFT folder. Raises InputError naming the file and the key."""
    folder = Path(folder)
    recover(folder)
    raw = read_object(folder / peft.CONFIG)
    config = peft.read_config(raw, str(folder / peft.CONFIG))
    if not os.path.lexists(folder / peft.WEIGHTS) and os.path.lexists(folder / "adapter_model.bin"):
        raise InputError(f"{folder}: expected {peft.WEIGHTS}, found a pickled file, which is not read")

    found: dict[str, Tensor] = {}
    with opened(folder / peft.WEIGHTS) as tensors:
        for name in tensors.keys():  # noqa: SIM118 (not a dict)
            where, dtype = f"{folder / peft.WEIGHTS}: {shown(name)}", tensors.get_slice(name).get_dtype()
            if not name.startswith(peft.PREFIX):
                raise InputError(f"{where}: expected a name that begins {peft.PREFIX}")
            if DTYPES.get(dtype) not in FLOATS:
                raise InputError(f"{where}: expected floating point, got {dtype}")
            found[name] = tensors.get_tensor(name)
        metadata = tensors.metadata() or {}

    _check_metadata(metadata, str(folder / peft.WEIGHTS))
    for name, tensor in found.items():
        check_finite(f"{folder / peft.WEIGHTS}: {shown(name)}", tensor, torch.float32)
    found = {name.removeprefix(peft.PREFIX): tensor for name, tensor in found.items()}
    dtypes = {name: tensor.dtype for name, tensor in found.items()}
    adapter = Adapter(config, {name: tensor.float() for name, tensor in found.items()}, dtypes)
    return AdapterFolder(adapter, metadata)


def _check_metadata(metadata: dict[str, str], source: str) -> None:
    """Raise InputError if one of Burnish's own entries in an adapter's metadata has an invalid value."""
    if metadata.get(FOUR_BIT, "nf4") != "nf4":
        raise InputError(f"{source}: {FOUR_BIT}: expected nf4, got {shown(metadata[FOUR_BIT])}")
    bias = metadata.get(SCORE_BIAS, "0")
    try:
        fits = abs(float(bias)) <= LARGEST
    except ValueError:
        fits = False
    if not fits:
        raise InputError(f"{source}: {SCORE_BIAS}: expected a number, got {shown(bias)}")


def _give(model: Transformer | ScalarModel, adapter: Adapter, folder: Path) -> None:
    """Put the adapter of a folder on its base model, and record the dtypes of the adapter's tensors in the folder."""
    give_adapter(model, adapter, str(folder))
    body = _body(model)
    assert body.dtypes is not None
    dtypes = {f"{peft.PREFIX}{name}": dtype for name, dtype in adapter.dtypes.items()}
    body.dtypes = replace(body.dtypes, others=body.dtypes.others | dtypes)
    model.eval()


def _adapter_content(model: Transformer | ScalarModel, dtype: torch.dtype | None) -> AdapterFolder:
    """Return the content of a PEFT folder for the model's adapter. Tensors are on the CPU, by their names on disk."""
    adapter, body = take_adapter(model), _body(model)
    state: dict[str, Tensor] = {}
    for name, tensor in adapter.tensors.items():
        name_on_disk, tensor = f"{peft.PREFIX}{name}", whole(tensor).cpu().contiguous()
        known = None if body.dtypes is None else body.dtypes.others.get(name_on_disk)
        if known is None and ".lora_" not in name:  # trained whole: the base's dtype
            known = _written_in(body, disk_name(model.config, name), tensor.dtype)
        tensor = cast(name_on_disk, tensor, dtype or known or tensor.dtype)
        state[name_on_disk] = tensor.clone()  # a tied matrix is there twice, and a file may share no memory

    metadata = {"format": "pt"}
    if any(layer.four_bit is not None for layer in linears(model).values()):
        metadata[FOUR_BIT] = "nf4"
    if isinstance(model, ScalarModel):
        metadata[SCORE_BIAS] = repr(model.bias)
    return AdapterFolder(replace(adapter, tensors=state), metadata)


def _write_adapter(folder: Path, content: AdapterFolder, tokenizer: "Tokenizer | None") -> None:
    adapter, metadata = content
    task = "SEQ_CLS" if SCORE_BIAS in metadata else "CAUSAL_LM"
    with replacing_folder(folder) as beside:
        write_json(beside / peft.CONFIG, {**peft.write_config(adapter.config), "task_type": task})
        if tokenizer is not None:
            tokenizer.save(beside)
        save_file(adapter.tensors, beside / peft.WEIGHTS, metadata=metadata)


# ---- reading


def _check_no_base(folder: Path, base: str | os.PathLike[str] | None) -> None:
    if base is not None:
        raise InputError(f"{folder}: expected an adapter's folder, since a base is given, got a whole model")


def _read_config(folder: Path) -> dict[str, Any]:
    if not os.path.isdir(folder):
        found = "a file" if os.path.exists(folder) else "nothing"
        raise InputError(f"{folder}: expected a model folder, found {found}{way_to_fetch(folder)}")
    return read_object(folder / "config.json")


def _is_scalar(raw: dict[str, Any]) -> bool:
    """Return whether a parsed config.json describes a *ForSequenceClassification model, which has no language head."""
    architectures = raw.get("architectures")
    return isinstance(architectures, list) and any(str(name).endswith(SCALAR) for name in architectures)


def _checked_config(raw: dict[str, Any], folder: Path) -> ModelConfig:
    """Return the config of a folder, checked against the sizes of its tensors.

    raw: the parsed config.json. generation_config.json is read, too.
    """
    generation_file = folder / "generation_config.json"
    generation = read_optional(generation_file)
    for key in TOKEN_IDS:  # the other keys are kept as they are
        value = generation.get(key)
        ids = value if isinstance(value, list) and key == "eos_token_id" else [value]
        if value is not None and not all(map(is_token_id, ids)):
            raise InputError(f"{generation_file}: {key}: expected a token's id, got {shown(repr(value))}")
    check_json(generation, str(generation_file))

    file = folder / "config.json"
    formats.is_bnb_4bit(raw, file)  # raises for other formats, before their keys are read
    raw = {key: value for key, value in raw.items() if key != formats.CONFIG}
    config = read_config(raw, str(file), generation)
    check_sizes(config, stored_tensors(folder), str(file))
    return config


def _assign(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Make the tensors of `state` the model's parameters and buffers. state: tensors by their names on disk."""
    model.load_state_dict({name: state[hf_name(name)] for name in model.state_dict()}, assign=True)
