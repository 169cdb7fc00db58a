"""Experts' weights in a folder, and the few other names that differ between a folder and this model.

In memory, a layer's experts are two tensors: gate_up (E, 2F, C), with the gate's rows first, and down (E, C, F). A
folder has one of three forms:

    one by one    X.experts.0.gate_proj.weight (F, C), .up_proj, .down_proj (C, F)    as published; mixtral: w1, w3, w2
    fused         X.experts.gate_up_proj (E, 2F, C), X.experts.down_proj (E, C, F)    save_original_format=False
    gpt-oss       the same two, but transposed, with alternating rows of gate and up, and with biases

In the first form, a tensor in memory is the concatenation of tensors in the folder. All three forms are read. The
published form of the architecture is written.
"""

import re
from collections.abc import Iterable

import torch
from torch import Tensor

from ..config import ModelConfig

FUSED = re.compile(r".*\.mlp\.experts\.(gate_up|down)_proj")
ONE_BY_ONE = re.compile(r".*\.experts\.\d+\..*")


def fused_on_disk(config: ModelConfig, names: Iterable[str]) -> bool:
    """Return whether a folder with these tensor names stores fused experts, where one tensor an expert is allowed, too.

    The result is False for a model without experts, and for gpt-oss, whose experts are always fused.
    """
    split = config.experts is not None and config.model_type != "gpt_oss"
    return split and any(FUSED.fullmatch(name) for name in names)


def disk_name(config: ModelConfig, name: str, fused: bool = False) -> str:
    """Return transformers' name of our parameter `name`. For the weights of experts, use `pieces_of`."""
    if config.model_type == "mixtral" and not fused:  # the fused form has our name
        return name.replace(".mlp.", ".block_sparse_moe.")
    if config.model_type == "gpt_oss":
        return name.replace(".mlp.gate.", ".mlp.router.")
    if config.model_type == "deepseek_v3":
        return name.replace(".mlp.shared_expert.", ".mlp.shared_experts.")
    return name


def pieces_of(
    config: ModelConfig, name: str, shape: torch.Size, fused: bool = False
) -> tuple[list[str], torch.Size]:
    """Return (names, shape): the names on disk of our parameter's pieces, in order, and the shape of each piece."""
    at, _, which = name.rpartition(".experts.")
    if not at:
        return [disk_name(config, name, fused)], shape
    at = f"{disk_name(config, at + '.', fused)}experts"
    if config.model_type == "gpt_oss":
        E, *rest = shape
        return [f"{at}.{_fused_name(which)}"], torch.Size((E, *reversed(rest)))
    if fused:
        return [f"{at}.{_fused_name(which)}"], shape

    gate_name, up_name, down_name = _parts(config)
    E, rows, columns = shape
    if which == "gate_up_proj.weight":
        names = [f"{at}.{e}.{part}.weight" for e in range(E) for part in (gate_name, up_name)]
        return names, torch.Size((rows // 2, columns))
    return [f"{at}.{e}.{down_name}.weight" for e in range(E)], torch.Size((rows, columns))


def from_disk(config: ModelConfig, name: str, tensor: Tensor) -> Tensor:
    """Return our parameter `name`, given the single tensor that stores it in a folder.

    The matrices of gpt-oss' experts are transposed, and rows of gate and up are reordered. Other tensors stay
    unchanged.
    """
    if config.model_type != "gpt_oss" or ".experts." not in name:
        return tensor
    tensor = tensor if tensor.dim() == 2 else tensor.transpose(1, 2)  # (E, in, out) -> (E, out, in)
    return (to_halves(tensor) if ".experts.gate_up" in name else tensor).contiguous()


def to_disk(config: ModelConfig, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert parameters to the tensors of a folder, by their names there.

    Experts get the form in which models of the architecture are published.
    """
    files: dict[str, Tensor] = {}
    for name, tensor in state.items():
        names, shape = pieces_of(config, name, tensor.shape)
        if config.model_type == "gpt_oss" and ".experts." in name:
            tensor = to_pairs(tensor) if ".experts.gate_up" in name else tensor
            tensor = tensor if tensor.dim() == 2 else tensor.transpose(1, 2)  # (E, out, in) -> (E, in, out)
        for piece, part in zip(names, tensor.reshape(len(names), *shape), strict=True):
            files[piece] = part.contiguous()
    return files


def to_pairs(tensor: Tensor) -> Tensor:
    """Reorder the rows of (E, 2F, ...) for gpt-oss: from all gate rows first to alternating gate and up rows."""
    return tensor.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)  # (E, 2, F) -> (E, F, 2) -> (E, 2F)


def to_halves(tensor: Tensor) -> Tensor:
    """Reorder the rows of (E, 2F, ...) from alternating gate and up rows to all gate rows first."""
    return tensor.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)  # (E, F, 2) -> (E, 2, F) -> (E, 2F)


def _parts(config: ModelConfig) -> tuple[str, str, str]:
    """Return the names of an expert's gate, up and down matrices on disk."""
    return ("w1", "w3", "w2") if config.model_type == "mixtral" else ("gate_proj", "up_proj", "down_proj")


def _fused_name(which: str) -> str:
    """Return the name of fused experts' weight or bias on disk.

    Examples: gate_up_proj.weight -> gate_up_proj, down_bias -> down_proj_bias.
    """
    if which.endswith(".weight"):
        return which.removesuffix(".weight")
    return which.replace("_bias", "_proj_bias")
