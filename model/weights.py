"""The weights of a Hugging Face folder, read into a model.

A parameter may consist of several tensors of the folder, its pieces. The headers of the files show any mistake in a
folder, so it is refused before a weight is allocated or read. Then one parameter at a time is read. A 4-bit weight goes
straight to its layer, so the dense model is never in memory.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..kernels import dequantize_nf4, quantize_nf4
from .adapter import hf_name, linears
from .config import ModelConfig
from .errors import InputError, shown
from .files import bnb, formats
from .files.experts import ONE_BY_ONE, from_disk, fused_on_disk, pieces_of
from .files.finite import check_finite
from .files.formats import is_bnb_4bit
from .files.tensors import FLOATS, Stored, stored_tensors
from .linear import Adaptable
from .scalar import ScalarModel
from .transformer import Transformer

# keys of DeepSeek and of transformers: the number of additional layers, after the last, that predict further tokens
BEHIND_THE_LAST = ("num_nextn_predict_layers", "num_mtp_layers")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Piece = Stored | bnb.Packed


@dataclass(frozen=True)
class Source:
    """A folder whose weights are read, and the form in which they are read: see `checkpoint.load_model`."""

    folder: Path
    raw: dict[str, Any]  # its config.json
    dtype: torch.dtype
    device: torch.device | str
    base_4bit: bool = False

    @property
    def config(self) -> Path:
        return self.folder / "config.json"


def read_weights(
    source: Source,
    model: Transformer | ScalarModel,
    also: dict[str, torch.Size] | None = None,
    unread: tuple[str, ...] = (),
) -> dict[str, Tensor]:
    """Return name -> tensor for the parameters and buffers of `model`, under their names in a Hugging Face folder.

    A weight that is in 4 bits, or is to be quantised, goes to its linear layer and is not in the result. A 4-bit weight
    of the head, the score or the router is made dense.
    also: further tensors, read if the folder has them.
    unread: prefixes of the names to skip.

    Raises InputError naming the file and the tensor.
    """
    layers = {f"{name}.weight": layer for name, layer in linears(model).items() if name != "lm_head"}
    buffers = {hf_name(name) for name, _ in model.named_buffers()}
    in_4_bits, state = is_bnb_4bit(source.raw, source.config), dict[str, Tensor]()

    plan = _plan(source, model, also or {}, unread)
    for name in [*plan]:
        pieces = plan.pop(name)  # a file stays mapped until its last piece is released
        layer = layers.get(name)
        if layer is not None and (four_bit := _four_bit(layer, pieces, source)) is not None:
            layer.hold(four_bit)
            continue

        # the correction that decides which experts are chosen stays at least fp32, as in transformers
        dtype = torch.promote_types(source.dtype, torch.float32) if name in buffers else source.dtype
        tensor = _dense(model, name, pieces, dtype, source.device)
        if layer is not None and source.base_4bit and not in_4_bits:
            layer.hold(quantize_nf4(tensor, double_quant=True))
        else:
            state[name] = tensor
    return state


def _four_bit(layer: Adaptable, pieces: list[Piece], source: Source) -> Any:
    """Return the NF4Weight of a layer, or None if the layer must be dense.

    pieces: the folder's tensors that make up the weight. The layer is dense if a piece is not in 4 bits, or if the
        pieces cannot be joined without dequantising.
    """
    if not all(isinstance(piece, bnb.Packed) for piece in pieces):
        return None
    weights = [piece.read(source.dtype) for piece in pieces if isinstance(piece, bnb.Packed)]
    whole = bnb.stack(weights, _shape(layer)) if layer.stack else weights[0]
    return None if whole is None else whole.to(source.device)


def _shape(layer: Adaptable) -> torch.Size:
    return torch.Size((*layer.stack, layer.out_features, layer.in_features))


def _dense(
    model: Transformer | ScalarModel,
    name: str,
    pieces: list[Piece],
    dtype: torch.dtype,
    device: torch.device | str,
) -> Tensor:
    """Return our parameter `name` as a dense tensor, made from its pieces, the tensors that the folder has for it.

    Several pieces are copied to their places one by one.
    """
    if len(pieces) == 1:
        tensor = from_disk(model.config, name, _multiplied_out(pieces[0], dtype))
        return tensor.to(device, dtype)  # a copy of the mapped tensor, because the file may change

    whole = torch.empty(len(pieces), *pieces[0].shape, dtype=dtype, device=device)
    for part, piece in zip(whole, pieces, strict=True):
        part.copy_(_multiplied_out(piece, dtype))
    experts = model.config.experts
    assert experts is not None
    return whole.view(experts.num_experts, -1, whole.shape[-1])  # (E, 2F, C) or (E, C, F)


def _multiplied_out(piece: Piece, dtype: torch.dtype) -> Tensor:
    """Return a piece of a parameter, one tensor of the folder, as a dense tensor.

    A piece in 4 bits is dequantised to `dtype`. A dense piece is cast to `dtype`, unless `dtype` has a larger range:
    that cast is safe, and left to the caller. Raises InputError if a number is not finite.
    """
    if isinstance(piece, Stored):
        return check_finite(f"{piece.file}: {shown(piece.name)}", piece.read(), dtype)
    return dequantize_nf4(piece.read(dtype))


# ---- which tensor goes where


def _plan(
    source: Source, model: Transformer | ScalarModel, also: dict[str, torch.Size], unread: tuple[str, ...]
) -> dict[str, list[Piece]]:
    """Return a mapping from the name of each parameter to its pieces, the folder's tensors that make it up, in order.

    Raises InputError if a piece does not fit, is missing or is left over.
    """
    stored = _to_be_read(source, model.config, unread)
    fused = fused_on_disk(model.config, stored)
    shapes = {hf_name(name): tensor.shape for name, tensor in model.state_dict().items()}
    shapes |= {name: shape for name, shape in also.items() if name in stored}
    places = {name: pieces_of(model.config, name, shape, fused) for name, shape in shapes.items()}
    wanted = {piece: shape for names, shape in places.values() for piece in names}

    # weights in 4 bits, each of several parts, and the rest
    parts: dict[str, dict[str, Stored]] = {}
    if is_bnb_4bit(source.raw, source.config):
        parts = _parts(stored, wanted)
    packed = {f"{name}.{part}" for name, several in parts.items() for part in several} | parts.keys()
    rest = {name: tensor for name, tensor in stored.items() if name not in packed}
    _check(source, rest, {name: shape for name, shape in wanted.items() if name not in parts}, fused)

    pieces: dict[str, Piece] = {**rest}
    for name, several in parts.items():
        pieces[name] = bnb.packed(name, several, wanted[name], str(source.folder))
    return {name: [pieces[piece] for piece in names] for name, (names, _) in places.items()}


def _to_be_read(source: Source, config: ModelConfig, unread: tuple[str, ...]) -> dict[str, Stored]:
    """Return the folder's tensors, without those that transformers skips as well.

    DeepSeek has layers after the last one that predict further tokens, each with an eh_proj. Old checkpoints contain
    rotary_emb.inv_freq, a constant. A tied matrix may have the head's name alone, because programs that drop copies
    keep the first name in the alphabet.
    """
    stored, layers = stored_tensors(source.folder), config.num_hidden_layers
    if config.tie_word_embeddings and EMBEDDING not in stored and HEAD in stored:
        stored[EMBEDDING] = stored.pop(HEAD)

    key = next((key for key in BEHIND_THE_LAST if key in source.raw), BEHIND_THE_LAST[0])
    default = 1 if source.raw.get("model_type") == "deepseek_v3" else 0  # as in transformers
    count = source.raw.get(key, default)
    if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 0):
        raise InputError(f"{source.config}: {key}: expected an integer >= 0, got {count!r:.200}")

    def passed_over(name: str) -> bool:
        layer = re.match(r"model\.layers\.(\d{1,18})\.", name)
        behind = layer is not None and layers <= int(layer[1]) < layers + (count or 0)
        predicts = layer is not None and f"{layer[0]}eh_proj.weight" in stored
        return (behind and predicts) or name.endswith("rotary_emb.inv_freq") or name.startswith(unread)

    return {name: tensor for name, tensor in stored.items() if not passed_over(name)}


def _parts(stored: dict[str, Stored], wanted: dict[str, torch.Size]) -> dict[str, dict[str, Stored]]:
    """Return a mapping from the name of each 4-bit weight in `wanted` to its tensors, by part name."""
    parts: dict[str, dict[str, Stored]] = {}
    for name, tensor in stored.items():
        weight, _, part = name.partition(".weight.")
        if part and f"{weight}.weight" in wanted:
            parts.setdefault(f"{weight}.weight", {})[part] = tensor
        elif name in wanted and tensor.dtype == torch.uint8:
            parts.setdefault(name, {})

    for name, several in parts.items():
        if name in stored:
            several["packed"] = stored[name]
    return parts


def _check(source: Source, rest: dict[str, Stored], wanted: dict[str, torch.Size], fused: bool) -> None:
    """Raise InputError if the tensors that are not in 4 bits do not match the tensors that the model needs."""
    odd = [t for name, t in rest.items() if name not in wanted or t.dtype not in FLOATS]
    quantised = formats.of_tensors(odd)
    if quantised is not None and not is_bnb_4bit(source.raw, source.config):
        formats.refuse_tensor(*quantised)

    for name, tensor in rest.items():
        where = f"{tensor.file}: {shown(name)}"
        if name not in wanted:
            if fused and ONE_BY_ONE.fullmatch(name):
                raise InputError(
                    f"{where}: expected fused experts, as elsewhere in this folder, got a single one"
                )
            raise InputError(f"{where}: unexpected, a model of this config.json has no such tensor")
        if tensor.shape != wanted[name]:
            expected, got = tuple(wanted[name]), tuple(tensor.shape)
            raise InputError(f"{where}: expected shape {expected}, got {shown(got)}")
        if tensor.dtype not in FLOATS:
            raise InputError(f"{where}: expected floating point, got {tensor.dtype}")

    missing = [name for name in wanted if name not in rest]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"{source.folder}: {missing[0]}{more}: missing from the safetensors files")
