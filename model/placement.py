"""The places of an adapter on a model: the linear layers that can have one, and the modules that are trained whole.

Names are those of a Hugging Face model, as in LoraConfig.
"""

from dataclasses import replace

import torch
from torch import nn

from .adapters.config import LoraConfig
from .adapters.lora import SUFFIXES, Lora
from .errors import InputError
from .linear import Adaptable, Linear
from .scalar import ScalarModel
from .transformer import Transformer

Model = Transformer | ScalarModel
EMBEDDING = "model.embed_tokens"

# ---- what a model holds


def hf_name(name: str) -> str:
    """Return the name that a module or parameter of this model has in a Hugging Face model."""
    ours = name.split(".")[0] in ("lm_head", "score")
    return name if ours else f"model.{name.removeprefix('body.')}"


def linears(model: nn.Module) -> dict[str, Adaptable]:
    """Return the linear layers by name, including the experts' matrices."""
    return {hf_name(name): layer for name, layer in model.named_modules() if isinstance(layer, Adaptable)}


def adapters(model: Model) -> dict[str, Lora]:
    """Return the adapters by the names of their linear layers."""
    return {name: layer.lora for name, layer in linears(model).items() if layer.lora is not None}


def lora_config(model: Model) -> LoraConfig | None:
    """Return the configuration of the model's adapter, or None if it has no adapter."""
    return body_of(model).adapter


def is_fresh(model: Model) -> bool:
    """Return whether the model has an adapter that changes nothing yet, as add_lora made it."""
    changes = any(bool(lora.b.any()) for lora in adapters(model).values())
    fresh = lora_config(model) is not None and not changes
    parameters = dict(model.named_parameters())
    replaced = body_of(model).replaced.items()
    return fresh and all(torch.equal(parameters[name], base.float()) for name, base in replaced)


def body_of(model: Model) -> Transformer:
    """Return the model itself, or the transformer inside a ScalarModel."""
    return model.body if isinstance(model, ScalarModel) else model


def trained_tensors(model: Model) -> dict[str, nn.Parameter]:
    """Return the adapter's tensors and the parameters that are trained whole, by their names in PEFT's files."""
    parts = {
        f"{name}.{SUFFIXES[part]}": parameter
        for name, lora in adapters(model).items()
        for part, parameter in lora.named_parameters()
    }
    parameters = dict(model.named_parameters())
    return parts | {hf_name(name): parameters[name] for name in body_of(model).replaced}


# ---- placing an adapter


def place_adapter(model: Model, config: LoraConfig, source: str) -> None:
    """Freeze the model, and add an adapter with A and B zero to each module that `config` names.

    Modules in modules_to_save become trainable in fp32. source: the name used in messages.
    """
    body, splits = body_of(model), check_placeable(model, config, source)
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
        parameter.data = parameter.data.float()  # all trained tensors are fp32
        parameter.requires_grad_()
    body.adapter = config


def check_placeable(model: Model, config: LoraConfig, source: str) -> bool:
    """Return whether the adapter needs a head of its own, on a model whose head is tied to the embedding.

    Raises InputError if `config` does not fit the model. source: the name used in messages.
    """
    config.check([*linears(model), "lm_head"], source)
    splits = _splits_the_head(model, config)
    if body_of(model).adapter is not None or adapters(model):
        raise InputError(f"{source}: the model has an adapter already; call merge_lora first")

    # modules that have an adapter
    if config.targeted(EMBEDDING):
        raise InputError(
            f"{source}: target_modules: expected linear layers, got {config.targets!r}, which targets embed_tokens: "
            "an adapter of the embedding is not supported; merge it with PEFT, or train it whole (modules_to_save)"
        )
    layers = linears(model)
    if not any(config.targeted(name) for name in [*layers, *(["lm_head"] if splits else [])]):
        raise InputError(f"{source}: target_modules: {config.targets!r} names no linear layer of the model")

    # modules that are trained whole
    modules = {hf_name(name).rpartition(".")[0] for name, _ in model.named_parameters()}
    modules |= {"lm_head"} if has_tied_head(model) else set()
    for name in config.modules_to_save:
        if name == "classifier" and isinstance(model, ScalarModel):
            continue  # PEFT names both classifier and score, although a model has only one of them
        one = replace(config, modules_to_save=(name,))
        if not any(one.whole(module) for module in modules):
            raise InputError(f"{source}: modules_to_save: the model has no module {name!r}")

    if config.tied and has_tied_head(model) and config.targeted("lm_head"):
        raise InputError(
            f"{source}: ensure_weight_tying: expected false beside an adapter of lm_head, since true puts one on the "
            "embedding, too, which is not supported; merge it with PEFT"
        )
    experts = next((name for name, layer in layers.items() if layer.stack and config.targeted(name)), None)
    if experts is not None and (config.dropout or config.dora):
        raise InputError(f"{source}: {experts}: an adapter of experts can have neither dropout nor DoRA")
    return splits


def has_tied_head(model: Model) -> bool:
    return isinstance(model, Transformer) and model.lm_head is None


def _is_saved(model: Model, config: LoraConfig, name: str) -> bool:
    """Return whether our parameter `name` is trained whole.

    A matrix that stays tied is trained whole if modules_to_save names the head or the embedding.
    """
    also = config.tied and has_tied_head(model) and name == "embed_tokens.weight"
    return config.whole(hf_name(name).rpartition(".")[0]) or (also and config.whole("lm_head"))


def _splits_the_head(model: Model, config: LoraConfig) -> bool:
    """Return whether the tied matrix must become two, one for the head and one for the embedding.

    An adapter of the head needs this, because it must not change the embedding. Training the head or the embedding
    whole without ensure_weight_tying needs it, too, because PEFT then trains a copy of the matrix.
    """
    if not has_tied_head(model):
        return False
    trained = config.whole("lm_head") or config.whole(EMBEDDING)
    return config.targeted("lm_head") or (trained and not config.tied)


def _split_the_head(body: Transformer, config: LoraConfig) -> None:
    """Give a model with a tied head a separate head.

    Head and embedding still share the weight if neither is trained whole.
    """
    shared = body.embed_tokens.weight
    V, C = shared.shape
    with torch.device("meta"):
        body.lm_head = Linear(C, V, bias=False).train(body.training)
    trained = config.whole("lm_head") or config.whole(EMBEDDING)
    body.lm_head.weight = nn.Parameter(shared.detach().clone()) if trained else shared  # pyright: ignore
    body.config = replace(body.config, tie_word_embeddings=False)
