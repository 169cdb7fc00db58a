"""The memory that training takes, counted from the shapes of a config, without any weights.

    full       fp32 weights, their gradients and the optimizer's states: 16 bytes a parameter with AdamW
    LoRA       weights of 2 bytes on a GPU, 4 on a CPU, and 16 bytes for each parameter of the adapter
    QLoRA      the layers' matrices in NF4, 4.127 bits a parameter (docs/nf4.md), embedding and head as with LoRA

Activations are found by a training step on tensors without numbers (torch's FakeTensorMode): every tensor that a pass
makes is counted from its first to its last use. That covers what the forward keeps for the backward, on a GPU also the
bf16 copies of fp32 weights, and what the largest layer, its backward and the head need while they run. An op's own
buffers are not seen. Of these the block of logits is added, which is the largest.

Not counted are the CUDA context (0.3 to 0.5 GB), libraries' workspaces, and what the allocator loses between tensors.

Run:    python -m burnish.model.memory          prints the table of docs/lora.md
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..kernels import _chip, quantize_nf4
from ..kernels.head.inputs import CPU_BUDGET, GPU_BUDGET
from .adapter import linears, place_adapter, quantize_base
from .adapters.config import LoraConfig
from .config import ModelConfig
from .packed import Packed, pack
from .placement import Model, body_of
from .rope import cos_and_sin
from .scalar import ScalarModel
from .transformer import Transformer

TABLE_TOKENS = 4096  # in one micro-batch
SEQUENCE = 512  # tokens of each sequence in the counted micro-batch; no figure depends on it much
SHAPES = {  # of real models: https://huggingface.co/HuggingFaceTB/SmolLM2-135M, arXiv 2407.21783, arXiv 2302.13971
    "SmolLM2 135M": ModelConfig(49_152, 576, 1536, 30, 9, 3, tie_word_embeddings=True),
    "Llama 3.1 8B": ModelConfig(128_256, 4096, 14_336, 32, 32, 8),
    "LLaMA 65B": ModelConfig(32_000, 8192, 22_016, 80, 64),
    "Llama 3.1 70B": ModelConfig(128_256, 8192, 28_672, 80, 64, 8),
}


def adamw_bytes(model: nn.Module) -> int:
    """Return the bytes of AdamW's two fp32 moments of each trained parameter."""
    return 8 * sum(p.numel() for p in model.parameters() if p.requires_grad)


@dataclass(frozen=True)
class Training:
    """The way in which a model is trained."""

    lora: LoraConfig | None = None  # the adapter; None trains every weight
    base_4bit: bool = False
    tokens: int = TABLE_TOKENS  # of one micro-batch
    checkpoint_activations: bool = True
    processes: int = 1  # that share the model; the result is for each of them. 4-bit weights are not shared
    on_gpu: bool = True  # frozen weights and products in bf16; fp32 on a CPU
    scalar: bool = False  # a reward model or critic, with a score in place of the language head
    optimizer_bytes: Callable[[nn.Module], int] = adamw_bytes  # of a model on the meta device

    @property
    def frozen_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.on_gpu else torch.float32


@dataclass(frozen=True)
class Memory:
    """The memory of training in bytes, by purpose."""

    weights: int  # all but the adapter
    adapter: int
    gradients: int
    optimizer: int
    activations: int  # what the forward pass of a micro-batch keeps for the backward
    working: int  # beyond them: the layer at work, its gradients, the block of logits
    gathered: int = 0  # shared tensors while they are whole: those outside of layers, and two layers

    @property
    def kept(self) -> int:
        """The bytes that are there between two steps."""
        return self.weights + self.adapter + self.optimizer

    @property
    def total(self) -> int:
        return self.kept + self.gradients + self.activations + self.working + self.gathered


def training_memory(config: ModelConfig, training: Training | None = None) -> Memory:
    """Return the memory of training a model of this shape."""
    training = training or Training()
    model = planned(config, training)
    processes, width = training.processes, training.frozen_dtype.itemsize

    # 1. weights: in 4 bits, and the others by their dtypes
    bytes_of = lambda p: p.numel() * (4 if p.requires_grad else width)
    quantized = [layer for name, layer in linears(model).items() if training.base_4bit and name != "lm_head"]
    packed = sum(nf4_bytes(layer.numel) for layer in quantized)
    adapter = sum(4 * p.numel() for name, p in model.named_parameters() if ".lora." in name)
    dense = sum(bytes_of(p) for name, p in model.named_parameters() if ".lora." not in name)
    dense -= width * sum(layer.numel for layer in quantized)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)

    # 2. with several processes: the tensors outside of layers, and one layer, while they are whole
    layers = body_of(model).layers
    inside = {id(p) for p in layers.parameters()}
    outside = sum(
        bytes_of(p) + 4 * p.numel() * p.requires_grad for p in model.parameters() if id(p) not in inside
    )
    whole_layer = sum(map(bytes_of, layers[-1].parameters()))
    whole_layer -= width * sum(q.numel for q in quantized) // config.num_hidden_layers
    layer_gradients = 4 * sum(p.numel() for p in layers[-1].parameters() if p.requires_grad)

    # 3. a step on tensors without numbers
    states = training.optimizer_bytes(model)
    activations, peak = activation_memory(config, training)
    return Memory(
        weights=dense // processes + packed,
        adapter=adapter // processes,
        gradients=4 * trained // processes,
        optimizer=states // processes,
        gathered=0 if processes == 1 else outside + 2 * whole_layer + layer_gradients,
        activations=activations,
        working=peak - activations,
    )


def frozen_memory(config: ModelConfig, training: Training) -> tuple[int, int]:
    """Return (weights, working) of a model that only scores: its bytes, and those of a forward pass without gradients.

    Of `training`, its tokens, `on_gpu`, `scalar` and `base_4bit` count.
    """
    model = planned(config, training).requires_grad_(False)
    quantized = [layer for name, layer in linears(model).items() if training.base_4bit and name != "lm_head"]
    dense = sum(p.numel() for p in model.parameters()) - sum(layer.numel for layer in quantized)
    weights = training.frozen_dtype.itemsize * dense + sum(nf4_bytes(layer.numel) for layer in quantized)
    return weights, activation_memory(config, training, frozen=True)[1]


def nf4_bytes(numel: int, blocksize: int = 64) -> int:
    """Return the bytes of a weight in NF4 with a quantised absmax.

    Counted are the 4-bit codes, a byte per block for its scale, an fp32 number per 256 blocks for these scales, the
    offset, and the two tables of 16 and 256 fp32 numbers that decode weights and scales.
    """
    blocks = -(-numel // blocksize)
    return -(-numel // 2) + blocks + 4 * -(-blocks // 256) + 4 + 4 * 16 + 4 * 256


# ---- a step without numbers


def planned(config: ModelConfig, training: Training) -> Model:
    """Return the model on the meta device, with its adapter."""
    model = (ScalarModel if training.scalar else Transformer)(config, device="meta")
    if training.lora is not None:
        place_adapter(model, training.lora, "training_memory")
    body_of(model).checkpoint_activations = training.checkpoint_activations
    return model


class Step(NamedTuple):
    """The bytes of a micro-batch beyond weights and their gradients."""

    kept: int  # after the forward pass
    forward: int  # at the peak of the forward pass
    backward: int  # at the peak of the backward pass, 0 without one


def activation_memory(config: ModelConfig, training: Training, frozen: bool = False) -> tuple[int, int]:
    """Return (bytes after the forward pass, bytes at the peak) of a micro-batch, beyond weights and their gradients.

    Layers of one kind take the same. So steps with one layer of each kind, and with one more, give those of all. With
    two kinds the peak is up to 5 % off, because it depends on their order.
    frozen: only score, without gradients.
    """
    if not training.tokens:
        return 0, 0
    kinds = kinds_of(config)
    least = [*dict.fromkeys(kinds)]
    if len(kinds) <= len(least) + 1 or (training.lora is not None and training.lora.layers is not None):
        found = simulated(config, training, frozen)
        return found.kept, max(found.forward, found.backward)

    of_least = simulated(with_layers(config, least), training, frozen)
    sums = [*of_least]
    for kind in least:
        of_more = simulated(with_layers(config, [*least, kind]), training, frozen)
        times = kinds.count(kind) - 1
        sums = [
            total + times * (more - one) for total, more, one in zip(sums, of_more, of_least, strict=True)
        ]
    return sums[0], max(sums[1:])


def kinds_of(config: ModelConfig) -> list[bool]:
    """Return for each layer whether it has experts."""
    return [False] * config.num_hidden_layers if config.experts is None else [*config.experts.layers]


def with_layers(config: ModelConfig, kinds: Sequence[bool]) -> ModelConfig:
    """Return the config with other layers. kinds: for each of them, whether it has experts."""
    experts = None if config.experts is None else replace(config.experts, layers=tuple(kinds))
    return replace(config, num_hidden_layers=len(kinds), rope_layers=(), windows=(), experts=experts)


def simulated(config: ModelConfig, training: Training, frozen: bool = False) -> Step:
    """Run a micro-batch on tensors without numbers, and return its bytes.

    Gradients are there from an earlier micro-batch, and the new ones are added to them.
    """
    lengths = [SEQUENCE] * (training.tokens // SEQUENCE)
    lengths += [training.tokens - sum(lengths)] if training.tokens > sum(lengths) else []
    packed = pack([[0] * length for length in lengths])
    rows = torch.arange(training.tokens)[packed.predictors >= 0]

    # tables that are kept for later calls must have numbers
    for rope in (config.rope, config.local_rope):
        if rope is not None:
            cos_and_sin(rope, config.rotary_dim, packed.positions)
    quantize_nf4(torch.ones(64))

    model = planned(config, training)
    if frozen:
        model.requires_grad_(False)
    with FakeTensorMode(allow_non_fake_inputs=True), _as_on_gpu(training.on_gpu):
        _give_tensors(model, training.frozen_dtype)
        if training.base_4bit:
            quantize_base(model)

        # weights and gradients are there before; all else is counted
        live = _Live({"token_logprobs": logits_bytes(config, training)})
        live.ignore(_held(model))
        with live, torch.set_grad_enabled(not frozen):
            live.alive += _inside_experts(config, training)
            result = _scored(model, packed, rows, training.on_gpu)
            kept, forward, live.peak = live.alive, live.peak, 0
            if not frozen:
                result.sum().backward()
    return Step(kept, forward, live.peak)


def logits_bytes(config: ModelConfig, training: Training) -> int:
    """Return the bytes of the largest block of logits. A CPU holds three copies of it, in fp32."""
    budget, width = (GPU_BUDGET, 2) if training.on_gpu else (CPU_BUDGET, 12)
    return min(budget, width * training.tokens * config.vocab_size)


def _scored(model: Model, packed: Packed, rows: Tensor, on_gpu: bool) -> Tensor:
    """Return one number for each of the tokens at `rows`."""
    with torch.autocast("cpu", torch.bfloat16, enabled=on_gpu):
        return model.values(packed, rows) if isinstance(model, ScalarModel) else model.score(packed, rows)[0]


def _inside_experts(config: ModelConfig, training: Training) -> int:
    """Return the bytes that experts on a CPU keep inside an op: about 3 C + 6 F fp32 numbers for each choice."""
    experts = config.experts
    if experts is None or training.on_gpu:
        return 0
    layers = min(1, sum(experts.layers)) if training.checkpoint_activations else sum(experts.layers)
    numbers = 3 * config.hidden_size + 6 * experts.intermediate_size
    return 4 * layers * training.tokens * experts.top_k * numbers


@contextlib.contextmanager
def _as_on_gpu(on_gpu: bool) -> Iterator[None]:
    """Let the ops take the way of a GPU inside the block, on tensors without numbers."""
    before, _chip.TARGET = _chip.TARGET, (9, 0) if on_gpu else _chip.TARGET
    try:
        yield
    finally:
        _chip.TARGET = before


def _give_tensors(model: Model, frozen: torch.dtype) -> None:
    """Replace parameters and buffers on the meta device by tensors on the CPU. Trained ones get a gradient."""
    given: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in given:
                trained = parameter.requires_grad
                tensor = torch.empty(parameter.shape, dtype=torch.float32 if trained else frozen)
                given[id(parameter)] = nn.Parameter(tensor, requires_grad=trained)
                given[id(parameter)].grad = torch.empty_like(tensor) if trained else None
            module._parameters[name] = given[id(parameter)]

        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _held(model: Model) -> Iterator[Tensor]:
    """Yield the tensors that are there before a pass: weights, gradients and 4-bit weights."""
    for parameter in model.parameters():
        yield parameter
        if parameter.grad is not None:
            yield parameter.grad
    for layer in linears(model).values():
        if layer.four_bit is not None:
            yield from filter(torch.is_tensor, layer.four_bit.tensors())


class _Live(TorchDispatchMode):
    """Count the bytes of the tensors that exist at a time, from the op that makes one to its last use.

    inner: the bytes of an op's own buffers, by a part of its name.
    """

    def __init__(self, inner: dict[str, int]):
        super().__init__()
        self.inner, self.alive, self.peak = inner, 0, 0
        self.sizes: dict[int, int] = {}  # by storage

    def ignore(self, tensors: Iterator[Tensor]) -> None:
        self.sizes |= {tensor.untyped_storage()._cdata: 0 for tensor in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        buffers = sum(size for name, size in self.inner.items() if name in str(func))
        self.peak = max(self.peak, self.alive + buffers)
        return out

    def _add(self, storage: Any) -> None:
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.alive += storage.nbytes()
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.alive -= self.sizes.pop(key, 0)


# ---- the table of docs/lora.md


def table(rank: int = 16) -> str:
    """Return a Markdown table of the training memory of each model in each mode, in GB of 1e9 bytes."""
    lora = LoraConfig(rank, 2 * rank)
    modes = {"full": (None, False), f"LoRA {rank}": (lora, False), f"QLoRA {rank}": (lora, True)}
    columns = ("weights", "adapter", "gradients", "optimizer", "activations", "working", "total")
    lines = [f"| model | mode | {' | '.join(columns)} |", "|---|---|" + "---:|" * len(columns)]
    for name, config in SHAPES.items():
        for mode, (adapter, base_4bit) in modes.items():
            memory = training_memory(config, Training(adapter, base_4bit))
            figures = " | ".join(f"{getattr(memory, column) / 1e9:.2f}" for column in columns)
            lines.append(f"| {name} | {mode} | {figures} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
