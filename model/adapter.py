"""Adapters on a model: train a few numbers beside frozen weights, switch them off, fold them in.

    add_lora(model, rank=16)             every weight is frozen but the new adapter's, which changes nothing yet
    quantize_base(model)                 the frozen weights of the linear layers to 4 bits: QLoRA
    with adapter_disabled(model): ...    the model as it was before
    reference = frozen_copy(model)       the policy that training starts from; what is frozen is shared, not copied
    merge_lora(model)                    the adapter folded into the weights: a plain model again
    stack_adapters(model, several)       one batch, each sequence with an adapter of its own, which `pack` is told

Files are checkpoint.py's; what needs no model is in adapters/. Names of modules are those of a Hugging Face model, as
in LoraConfig.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import quantize_nf4
from .adapters.config import LoraConfig
from .adapters.lora import EXPERTS, SUFFIXES, Adapter, Lora, filed_name
from .errors import InputError, shown
from .files.experts import to_halves, to_pairs
from .linear import Adaptable, Linear, whole
from .scalar import ScalarModel
from .transformer import Transformer

Model = Transformer | ScalarModel
EMBEDDING = "model.embed_tokens"


# ---- what a model holds


def hf_name(name: str) -> str:
    """A module's or parameter's name as a Hugging Face folder has it."""
    ours = name.split(".")[0] in ("lm_head", "score")
    return name if ours else f"model.{name.removeprefix('body.')}"


def linears(model: nn.Module) -> dict[str, Adaptable]:
    """Linear layers by name, experts' matrices among them."""
    return {hf_name(name): layer for name, layer in model.named_modules() if isinstance(layer, Adaptable)}


def adapters(model: Model) -> dict[str, Lora]:
    """Adapters by the names of their linear layers."""
    return {name: layer.lora for name, layer in linears(model).items() if layer.lora is not None}


def lora_config(model: Model) -> LoraConfig | None:
    """The shape of the model's adapter, None where it has none."""
    return _body(model).adapter


def is_fresh(model: Model) -> bool:
    """Whether the adapter still changes nothing, as add_lora made it."""
    changes = any(bool(lora.b.any()) for lora in adapters(model).values())
    fresh = lora_config(model) is not None and not changes
    parameters = dict(model.named_parameters())
    replaced = _body(model).replaced.items()
    return fresh and all(torch.equal(parameters[name], base.float()) for name, base in replaced)


def _body(model: Model) -> Transformer:
    return model.body if isinstance(model, ScalarModel) else model


# ---- adding, switching off, folding in


def add_lora(model: Model, rank: int, alpha: float | None = None, *, seed: int = 0, **options: Any) -> None:
    """Freeze the model and add a fresh adapter: A uniform in +-1/sqrt(K) from `seed`, B zero.

    alpha: 2 * rank by default. options: further fields of LoraConfig. Raises InputError where nothing matches.
    """
    place_adapter(model, LoraConfig(rank, 2.0 * rank if alpha is None else alpha, **options), "add_lora")
    generator, layers = torch.Generator().manual_seed(seed), linears(model)
    with torch.no_grad():
        for name, lora in adapters(model).items():
            bound = 1 / math.sqrt(lora.a.shape[-1])
            drawn = torch.empty(lora.a.shape)  # on the CPU: alike on every device
            lora.a.copy_(drawn.uniform_(-bound, bound, generator=generator))
            if lora.magnitude is not None:
                lora.magnitude.copy_(layers[name].dense().float().norm(dim=1))


def place_adapter(model: Model, config: LoraConfig, source: str) -> None:
    """Freeze the model and give it the modules that `config` names, A and B zero. source: what a message names."""
    body, splits = _body(model), _check_placeable(model, config, source)
    if splits:
        _split_the_head(body, config)

    # adapters beside frozen weights
    targets = {name: layer for name, layer in linears(model).items() if config.targeted(name)}
    parameters = dict(model.named_parameters())
    saved = [name for name in parameters if _is_saved(model, config, name)]
    model.requires_grad_(False)
    for name, layer in targets.items():
        rank, (N, K), device = config.rank_of(name), (layer.out_features, layer.in_features), model.device
        layer.lora = Lora(
            torch.zeros(*layer.stack, rank, K, device=device),
            torch.zeros(*layer.stack, N, rank, device=device),
            config.scaling_of(name),
            config.dropout,
            torch.ones(N, device=device) if config.dora else None,
        )

    for name in saved:
        parameter = parameters[name]
        body.replaced[name] = parameter.detach().clone()
        parameter.data = parameter.data.float()  # like all that is trained
        parameter.requires_grad_()
    body.adapter = config


def _check_placeable(model: Model, config: LoraConfig, source: str) -> bool:
    """Whether a tied head becomes one of its own. Raises InputError where `config` does not fit the model."""
    config.check([*linears(model), "lm_head"], source)
    splits = _splits_the_head(model, config)
    if _body(model).adapter is not None or adapters(model):
        raise InputError(f"{source}: the model has an adapter already; merge_lora folds it in")

    # modules that have an adapter
    if config.targeted(EMBEDDING):
        raise InputError(
            f"{source}: target_modules: expected linear layers, got {config.targets!r}, of which one is embed_tokens: "
            "an adapter of the embedding is not supported; merge it with PEFT, or train it whole (modules_to_save)"
        )
    layers = linears(model)
    if not any(config.targeted(name) for name in [*layers, *(["lm_head"] if splits else [])]):
        raise InputError(f"{source}: target_modules: {config.targets!r} names no linear layer of the model")

    # modules that are trained whole
    modules = {hf_name(name).rpartition(".")[0] for name, _ in model.named_parameters()}
    modules |= {"lm_head"} if _has_tied_head(model) else set()
    for name in config.modules_to_save:
        if name == "classifier" and isinstance(model, ScalarModel):
            continue  # PEFT names it beside score, whichever of the two a model has
        one = replace(config, modules_to_save=(name,))
        if not any(one.whole(module) for module in modules):
            raise InputError(f"{source}: modules_to_save: the model has no module {name!r}")

    if config.tied and _has_tied_head(model) and config.targeted("lm_head"):
        raise InputError(
            f"{source}: ensure_weight_tying: expected false beside an adapter of lm_head, for it puts one on the "
            "embedding, too, which is not supported; merge it with PEFT"
        )
    experts = next((name for name, layer in layers.items() if layer.stack and config.targeted(name)), None)
    if experts is not None and (config.dropout or config.dora):
        raise InputError(f"{source}: {experts}: an adapter of experts has neither dropout nor DoRA")
    return splits


def _has_tied_head(model: Model) -> bool:
    return isinstance(model, Transformer) and model.lm_head is None


def _is_saved(model: Model, config: LoraConfig, name: str) -> bool:
    """Whether our parameter is trained whole. A tied matrix that stays one is so, whichever of its modules is named."""
    also = config.tied and _has_tied_head(model) and name == "embed_tokens.weight"
    return config.whole(hf_name(name).rpartition(".")[0]) or (also and config.whole("lm_head"))


def _splits_the_head(model: Model, config: LoraConfig) -> bool:
    """Whether head and embedding, one matrix in the base, become two.

    An adapter of the head acts on its product alone, and what is trained whole are copies, as PEFT has it.
    """
    if not _has_tied_head(model):
        return False
    trained = config.whole("lm_head") or config.whole(EMBEDDING)
    return config.targeted("lm_head") or (trained and not config.tied)


def _split_the_head(body: Transformer, config: LoraConfig) -> None:
    """Put a head of its own on a tied model. The weight stays shared where an adapter leaves it as it is."""
    shared = body.embed_tokens.weight
    V, C = shared.shape
    with torch.device("meta"):
        body.lm_head = Linear(C, V, bias=False).train(body.training)
    trained = config.whole("lm_head") or config.whole(EMBEDDING)
    body.lm_head.weight = nn.Parameter(shared.detach().clone()) if trained else shared  # pyright: ignore
    body.config = replace(body.config, tie_word_embeddings=False)


def merge_lora(model: Model) -> None:
    """Fold the adapter into the weights, all of which can then be trained. A 4-bit base becomes a dense one."""
    with torch.no_grad():
        for layer in linears(model).values():
            if layer.lora is not None or layer.four_bit is not None:
                weight = layer.merged()
                layer.four_bit, layer.lora = None, None
                layer.weight = nn.Parameter(weight)

    parameters = dict(model.named_parameters())
    for name, base in _body(model).replaced.items():
        parameters[name].data = parameters[name].data.to(base.dtype)
    _body(model).adapter = None
    _body(model).replaced.clear()
    model.requires_grad_()


@contextmanager
def adapter_disabled(model: Model) -> Iterator[None]:
    """The base alone, without gradient: a backward pass outside of the block would see the adapter."""
    parameters = dict(model.named_parameters())
    trained = {name: parameters[name].data for name in _body(model).replaced}

    for lora in adapters(model).values():
        lora.enabled = False
    for name, base in _body(model).replaced.items():
        parameters[name].data = base

    try:
        with torch.no_grad():
            yield
    finally:
        for lora in adapters(model).values():
            lora.enabled = True
        for name, data in trained.items():
            parameters[name].data = data


def frozen_copy(model: Model) -> Model:
    """The model as it is now, without gradient or dropout: it shares what `model` does not train.

    A fresh adapter, which changes nothing, is left out: such a copy costs neither memory nor time for it.
    """
    shared: dict[int, Any] = {id(p): p for p in model.parameters() if not p.requires_grad}
    shared |= {id(q): q for q in (layer.four_bit for layer in linears(model).values()) if q is not None}
    fresh = is_fresh(model)
    frozen = copy.deepcopy(model, shared).requires_grad_(False).eval()
    if fresh:
        for layer in linears(frozen).values():
            layer.lora = None
        _body(frozen).adapter = None
        _body(frozen).replaced.clear()
    return frozen


def quantize_base(model: Model, double_quant: bool = True) -> None:
    """The linear layers' weights to NF4; the head, the embedding and what is trained stay.

    double_quant: each block's scale in a byte, 4.127 bits a weight in place of 4.5.
    """
    trained = _trained(model)
    for name, layer in linears(model).items():
        if name != "lm_head" and layer.four_bit is None and f"{name}.weight" not in trained:
            layer.hold(quantize_nf4(layer.dense().detach(), double_quant=double_quant))


# ---- adapters as tensors


def _trained(model: Model) -> dict[str, nn.Parameter]:
    parts = {
        f"{name}.{SUFFIXES[part]}": parameter
        for name, lora in adapters(model).items()
        for part, parameter in lora.named_parameters()
    }
    parameters = dict(model.named_parameters())
    return parts | {hf_name(name): parameters[name] for name in _body(model).replaced}


def take_adapter(model: Model) -> Adapter:
    """The model's adapter as it is now; the tensors are the model's own, but experts' ones in PEFT's layout."""
    config = lora_config(model)
    if config is None:
        raise InputError("the model has no adapter")
    return Adapter(config, _as_filed(model))


def _as_filed(model: Model) -> dict[str, Tensor]:
    trained = {name: parameter.detach() for name, parameter in _trained(model).items()}
    filed = {filed_name(name, trained): _filed(model, name, tensor) for name, tensor in trained.items()}
    if _has_tied_head(model) and f"{EMBEDDING}.weight" in filed:  # one matrix under both of its names
        filed["lm_head.weight"] = filed[f"{EMBEDDING}.weight"]
    return filed


def _filed(model: Model, name: str, tensor: Tensor) -> Tensor:
    """Experts' A (E, R, K) as (E R, K), B (E, N, R) as (N, R E); what is not of experts stays."""
    if EXPERTS.fullmatch(name) is None:
        return tensor
    tensor = whole(tensor)  # shares of different sizes cannot be flattened
    if "lora_A" in name:
        return tensor.flatten(0, 1)
    return (to_pairs(tensor) if _in_pairs(model, name) else tensor).permute(1, 2, 0).flatten(1)


def _unfiled(model: Model, name: str, tensor: Tensor, shape: torch.Size) -> Tensor:
    """The inverse, to `shape`."""
    if EXPERTS.fullmatch(name) is None or "lora_A" in name:
        return tensor.view(shape)
    E, N, R = shape
    tensor = tensor.view(N, R, E).permute(2, 0, 1)
    return to_halves(tensor) if _in_pairs(model, name) else tensor


def _in_pairs(model: Model, name: str) -> bool:
    return model.config.model_type == "gpt_oss" and ".gate_up_proj." in name


def give_adapter(model: Model, adapter: Adapter, source: str) -> None:
    """Place the adapter on a model without one. Raises InputError naming `source` and the tensor that does not fit."""
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

    if _has_tied_head(model) and not torch.equal(*_both_names(found)):
        raise InputError(
            f"{source}: lm_head.weight: expected the values of {EMBEDDING}.weight, with which it is tied, got others"
        )

    with torch.no_grad():
        trained = _trained(model)
        for name, parameter in trained.items():
            parameter.copy_(_unfiled(model, name, found[filed_name(name, trained)], parameter.shape))


def _check_ranks(model: Model, adapter: Adapter, source: str) -> None:
    """Raises InputError where a rank is not its tensor's, before tensors of these ranks are made."""
    config, found = adapter.config, adapter.tensors
    sizes = {name: (math.prod(layer.stack), layer.in_features) for name, layer in linears(model).items()}
    sizes |= {"lm_head": (1, model.config.hidden_size)} if _check_placeable(model, config, source) else {}
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
    """A tied matrix that is trained whole, under its two names; where it is not, nothing twice."""
    none = torch.empty(0)
    return tensors.get(f"{EMBEDDING}.weight", none), tensors.get("lm_head.weight", none)


def _without_copies(model: Model, adapter: Adapter, source: str) -> Adapter:
    """The adapter without the copies of the base's head and embedding that PEFT writes beside an adapter of lm_head, or
    where it was told to (save_embedding_layers). It reads them over the base, so one with other values is read as a
    module that was trained whole. Raises InputError for a resized one, and for one under an adapter, which is both.
    """
    if not isinstance(model, Transformer):
        return adapter
    config, tensors = adapter.config, dict(adapter.tensors)
    embedding, head = model.embed_tokens.weight, model.lm_head
    bases = {"lm_head": embedding if head is None else head.dense(), EMBEDDING: embedding}
    if config.tied and head is None and any(config.whole(module) for module in bases):
        return adapter  # the matrix that is trained whole, under both of its names

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
                    "another base: name that one"
                )
            trained[module] = copy
    if not trained:
        return Adapter(config, tensors, adapter.dtypes)

    if head is None:  # read over the base, one of them is both
        one = trained.get("lm_head", trained.get(EMBEDDING))
        assert one is not None
        trained = {"lm_head": one, EMBEDDING: trained.get(EMBEDDING, one)}
        config = replace(config, tied=True)

    names = tuple(module.rpartition(".")[2] for module in trained)
    config = replace(config, modules_to_save=(*config.modules_to_save, *names))
    tensors |= {f"{module}.weight": tensor for module, tensor in trained.items()}
    return Adapter(config, tensors, adapter.dtypes)


def _is_copy(base: Tensor, copy: Tensor, dtype: torch.dtype | None) -> bool:
    """The same values, but for the rounding to the dtype of either."""
    base, copy = base.detach(), copy.to(base.device)
    rounded = base if dtype is None else base.to(dtype)
    return torch.equal(rounded.float(), copy.float()) or torch.equal(base, copy.to(base.dtype))


def stack_adapters(model: Transformer, several: Sequence[Adapter]) -> None:
    """Place several adapters side by side; `pack` says which of them each sequence has. For use, not for training.

    Ranks are padded with zeros to the largest, scalings multiplied into B. Raises InputError for DoRA, for modules
    that an adapter has whole, and for an adapter of the head.
    """
    several = [_without_copies(model, adapter, f"adapter {i}") for i, adapter in enumerate(several)]
    for i, adapter in enumerate(several):
        config = adapter.config
        if config.dora or config.modules_to_save or config.parameters or config.targeted("lm_head"):
            raise InputError(
                f"adapter {i}: with DoRA, modules_to_save, experts or lm_head it shares no batch with others"
            )
        give_adapter(model, adapter, f"adapter {i}")  # refuses what does not fit
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
