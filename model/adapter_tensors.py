"""An adapter as named tensors: taken from a model, loaded into a model, or stacked with others.

Tensors have their names in PEFT's files. For the experts of a layer, PEFT stores one matrix A of shape (E R, K) and one
matrix B of shape (N, R E). In memory, A is (E, R, K) and B is (E, N, R).
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .adapters.lora import EXPERTS, SUFFIXES, Adapter, Lora, filed_name
from .errors import InputError, shown
from .files.experts import to_halves, to_pairs
from .linear import whole
from .placement import (
    EMBEDDING,
    Model,
    check_placeable,
    has_tied_head,
    linears,
    lora_config,
    place_adapter,
    trained_tensors,
)
from .transformer import Transformer


def take_adapter(model: Model) -> Adapter:
    """Return the model's adapter as it is now.

    Its tensors are the model's parameters, detached. The adapters of experts are converted to PEFT's layout.
    """
    config = lora_config(model)
    if config is None:
        raise InputError("the model has no adapter")
    return Adapter(config, _as_filed(model))


def _as_filed(model: Model) -> dict[str, Tensor]:
    trained = {name: parameter.detach() for name, parameter in trained_tensors(model).items()}
    filed = {filed_name(name, trained): _filed(model, name, tensor) for name, tensor in trained.items()}
    if has_tied_head(model) and f"{EMBEDDING}.weight" in filed:  # one matrix under both names
        filed["lm_head.weight"] = filed[f"{EMBEDDING}.weight"]
    return filed


def _filed(model: Model, name: str, tensor: Tensor) -> Tensor:
    """Convert a tensor of the model's adapter to PEFT's layout.

    For experts, A (E, R, K) becomes (E R, K), and B (E, N, R) becomes (N, R E). In gpt-oss, the rows of gate and up in
    B are made to alternate. Other tensors stay as they are.
    """
    if EXPERTS.fullmatch(name) is None:
        return tensor
    tensor = whole(tensor)  # the shares of several processes differ in size, and cannot be flattened
    if "lora_A" in name:
        return tensor.flatten(0, 1)
    return (to_pairs(tensor) if _in_pairs(model, name) else tensor).permute(1, 2, 0).flatten(1)


def _unfiled(model: Model, name: str, tensor: Tensor, shape: torch.Size) -> Tensor:
    """Convert a tensor in PEFT's layout to the model's layout, with the given shape: the inverse of `_filed`."""
    if EXPERTS.fullmatch(name) is None or "lora_A" in name:
        return tensor.view(shape)
    E, N, R = shape
    tensor = tensor.view(N, R, E).permute(2, 0, 1)
    return to_halves(tensor) if _in_pairs(model, name) else tensor


def _in_pairs(model: Model, name: str) -> bool:
    return model.config.model_type == "gpt_oss" and ".gate_up_proj." in name


def give_adapter(model: Model, adapter: Adapter, source: str) -> None:
    """Place the adapter on a model that has none.

    source: the name of the adapter in messages. Raises InputError naming the tensor that does not fit.
    """
    adapter = _without_copies(model, adapter, source)
    _check_ranks(model, adapter, source)
    place_adapter(model, adapter.config, source)

    wanted, found = _as_filed(model), adapter.tensors
    for name in [*found, *wanted]:
        if name not in wanted:
            why = "unexpected, the adapter's config names no such module of this model"
            raise InputError(f"{source}: {shown(name)}: {why}")
        if name not in found:
            raise InputError(f"{source}: {name}: missing, although the adapter's config names its module")
        if found[name].shape != wanted[name].shape:
            expected, got = tuple(wanted[name].shape), tuple(found[name].shape)
            raise InputError(f"{source}: {name}: expected shape {expected}, got {got}")

    if has_tied_head(model) and not torch.equal(*_both_names(found)):
        raise InputError(
            f"{source}: lm_head.weight: expected the values of {EMBEDDING}.weight, since they are tied, got others"
        )

    with torch.no_grad():
        trained = trained_tensors(model)
        for name, parameter in trained.items():
            parameter.copy_(_unfiled(model, name, found[filed_name(name, trained)], parameter.shape))


def _check_ranks(model: Model, adapter: Adapter, source: str) -> None:
    """Raise InputError if a rank in the adapter's config differs from that of the stored A matrix, or if A is missing.

    The check runs before the model allocates matrices of these ranks.
    """
    config, found = adapter.config, adapter.tensors
    sizes = {name: (math.prod(layer.stack), layer.in_features) for name, layer in linears(model).items()}
    sizes |= {"lm_head": (1, model.config.hidden_size)} if check_placeable(model, config, source) else {}
    trained = {f"{name}.{SUFFIXES['a']}": name for name in sizes if config.targeted(name)}
    for name, module in trained.items():
        filed, rank, (E, K) = filed_name(name, trained), config.rank_of(module), sizes[module]
        if filed not in found:
            raise InputError(f"{source}: {filed}: missing, although the adapter's config names its module")
        expected, got = (E * rank, K), tuple(found[filed].shape)
        if got != expected:
            key = "r" if rank == config.rank else "rank_pattern"
            got = shown(got)
            raise InputError(f"{source}: {filed}: expected shape {expected}, got {got}: {key} says {rank}")


def _both_names(tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the tensors of the embedding and of the head among an adapter's tensors.

    If the adapter does not train the tied matrix, it has neither tensor, and two empty tensors are returned.
    """
    none = torch.empty(0)
    return tensors.get(f"{EMBEDDING}.weight", none), tensors.get("lm_head.weight", none)


def _without_copies(model: Model, adapter: Adapter, source: str) -> Adapter:
    """Return the adapter without PEFT's copies of the base's head and embedding.

    PEFT writes these copies beside an adapter of lm_head, or if save_embedding_layers is set. On loading, PEFT
    overwrites the base with them. So a copy with values other than the base's is treated as a module that was trained
    whole.
    Raises InputError for a resized copy, and for a changed copy of a module that also has an adapter.
    """
    if not isinstance(model, Transformer):
        return adapter
    config, tensors = adapter.config, dict(adapter.tensors)
    embedding, head = model.embed_tokens.weight, model.lm_head
    bases = {"lm_head": embedding if head is None else head.dense(), EMBEDDING: embedding}
    if config.tied and head is None and any(config.whole(module) for module in bases):
        return adapter  # the tied matrix is trained whole, and is there under both names

    trained: dict[str, Tensor] = {}
    for module, base in bases.items():
        for name in (f"{module}.weight", f"{module}.base_layer.weight"):
            if name not in tensors or config.whole(module):
                continue

            copy = tensors.pop(name)
            if copy.shape != base.shape:
                raise InputError(
                    f"{source}: {name}: expected the base's shape {tuple(base.shape)}, got {tuple(copy.shape)}: the "
                    "adapter belongs to a model whose vocabulary was resized: save that model and name it as the base"
                )
            if _is_copy(base, copy, adapter.dtypes.get(name)):
                continue

            if config.targeted(module) or module in trained:
                raise InputError(
                    f"{source}: {name}: expected a copy of the base's, got other values: the adapter was trained on "
                    "another base: name that base"
                )
            trained[module] = copy
    if not trained:
        return Adapter(config, tensors, adapter.dtypes)

    if head is None:  # on a tied base, one changed copy is both head and embedding
        one = trained.get("lm_head", trained.get(EMBEDDING))
        assert one is not None
        trained = {"lm_head": one, EMBEDDING: trained.get(EMBEDDING, one)}
        config = replace(config, tied=True)

    names = tuple(module.rpartition(".")[2] for module in trained)
    config = replace(config, modules_to_save=(*config.modules_to_save, *names))
    tensors |= {f"{module}.weight": tensor for module, tensor in trained.items()}
    return Adapter(config, tensors, adapter.dtypes)


def _is_copy(base: Tensor, copy: Tensor, dtype: torch.dtype | None) -> bool:
    """Return whether `copy` has the values of `base`, once one of the two is rounded to the dtype of the other.

    dtype: the dtype of the copy in its file, or None if it is unknown.
    """
    base, copy = base.detach(), copy.to(base.device)
    rounded = base if dtype is None else base.to(dtype)
    return torch.equal(rounded.float(), copy.float()) or torch.equal(base, copy.to(base.dtype))


def stack_adapters(model: Transformer, several: Sequence[Adapter]) -> None:
    """Place several adapters side by side, for inference only. `pack` is told which adapter each sequence uses.

    A and B are padded with zeros to the largest rank, and the scalings are multiplied into B. Raises InputError for an
    adapter with DoRA, with modules trained whole, of experts, or of the head.
    """
    several = [_without_copies(model, adapter, f"adapter {i}") for i, adapter in enumerate(several)]
    for i, adapter in enumerate(several):
        config = adapter.config
        if config.dora or config.modules_to_save or config.parameters or config.targeted("lm_head"):
            raise InputError(
                f"adapter {i}: expected no DoRA, modules_to_save, experts or lm_head in an adapter that shares a batch"
            )
        give_adapter(model, adapter, f"adapter {i}")  # raises if it does not fit
        for layer in linears(model).values():
            layer.lora = None
        model.adapter = None

    for name, layer in linears(model).items():
        having = [i for i, adapter in enumerate(several) if adapter.config.targeted(name)]
        if not having:
            continue

        rank = max(several[i].config.rank_of(name) for i in having)
        a = torch.zeros(len(several), rank, layer.in_features, device=model.device)
        b = torch.zeros(len(several), layer.out_features, rank, device=model.device)
        for i in having:
            config, tensors = several[i].config, several[i].tensors
            R = config.rank_of(name)
            a[i, :R] = tensors[f"{name}.{SUFFIXES['a']}"]
            b[i, :, :R] = config.scaling_of(name) * tensors[f"{name}.{SUFFIXES['b']}"]
        layer.lora = Lora(a, b, scaling=1.0)
    model.requires_grad_(False)
