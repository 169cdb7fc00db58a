"""The memory that training takes, counted from the shapes of a config, without any weights.

    full       fp32 weights, their gradients and AdamW's two moments: 16 bytes a parameter; bf16 comes from autocast
    LoRA       bf16 weights, 2 bytes a parameter, and 16 bytes for each parameter of the adapter
    QLoRA      the layers' matrices in NF4, 4.127 bits a parameter (docs/nf4.md), embedding and head in bf16

The activations counted are each layer's input, which checkpoint_activations keeps until the backward pass. The memory
that one layer needs while it runs, and the head's chunk of logits, are not counted.

Run:    python -m burnish.model.memory          prints the table of docs/lora.md
"""

from dataclasses import dataclass

import torch

from .adapter import linears, place_adapter
from .adapters.config import LoraConfig
from .config import ModelConfig
from .transformer import Transformer

TABLE_TOKENS = 4096  # in one micro-batch
SHAPES = {  # of real models: https://huggingface.co/HuggingFaceTB/SmolLM2-135M, arXiv 2407.21783, arXiv 2302.13971
    "SmolLM2 135M": ModelConfig(49_152, 576, 1536, 30, 9, 3, tie_word_embeddings=True),
    "Llama 3.1 8B": ModelConfig(128_256, 4096, 14_336, 32, 32, 8),
    "LLaMA 65B": ModelConfig(32_000, 8192, 22_016, 80, 64),
    "Llama 3.1 70B": ModelConfig(128_256, 8192, 28_672, 80, 64, 8),
}


@dataclass(frozen=True)
class Memory:
    """The memory of training in bytes, by purpose."""

    weights: int  # all but the adapter
    adapter: int
    gradients: int
    optimizer: int  # AdamW's moments
    activations: int
    gathered: int = 0  # sharded tensors while they are whole: those outside of layers, and two layers

    @property
    def total(self) -> int:
        kept = self.weights + self.adapter + self.gradients + self.optimizer
        return kept + self.activations + self.gathered


def training_memory(
    config: ModelConfig,
    lora: LoraConfig | None = None,
    base_4bit: bool = False,
    tokens: int = TABLE_TOKENS,
    frozen_dtype: torch.dtype = torch.bfloat16,
    processes: int = 1,
) -> Memory:
    """Return the memory of training every weight, or only the adapter `lora`.

    tokens: the tokens of one micro-batch.
    frozen_dtype: the dtype of the weights under an adapter that are not in 4 bits.
    processes: the processes that share the model; the result is for each of them. 4-bit weights are not sharded.
    """
    model = Transformer(config, device="meta")
    if lora is not None:
        place_adapter(model, lora, "training_memory")

    # weights: trained, in 4 bits, and the rest
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    width = 4 if lora is None else frozen_dtype.itemsize
    quantized = [layer for name, layer in linears(model).items() if base_4bit and name != "lm_head"]
    packed = sum(nf4_bytes(layer.numel) for layer in quantized)
    adapter = 0 if lora is None else 4 * trained
    dense = sum(p.numel() for name, p in model.named_parameters() if ".lora." not in name)
    dense -= sum(layer.numel for layer in quantized)

    # with several processes: the tensors outside of layers, and one layer, while they are whole
    per_layer = {id(p) for p in model.layers.parameters()}
    outside = sum(
        p.numel() * (width + 4 * p.requires_grad) for p in model.parameters() if id(p) not in per_layer
    )
    layer = [p for name, p in model.layers[-1].named_parameters()]
    whole_layer = sum(p.numel() * (4 if p.requires_grad else width) for p in layer)
    whole_layer -= width * sum(q.numel for q in quantized) // config.num_hidden_layers
    layer_gradients = 4 * sum(p.numel() for p in layer if p.requires_grad)

    return Memory(
        weights=width * dense // processes + packed,
        adapter=adapter // processes,
        gradients=4 * trained // processes,
        optimizer=8 * trained // processes,
        gathered=0 if processes == 1 else outside + 2 * whole_layer + layer_gradients,
        activations=config.num_hidden_layers * tokens * config.hidden_size * width,
    )


def nf4_bytes(numel: int, blocksize: int = 64) -> int:
    """Return the bytes of a weight in NF4 with a quantised absmax.

    Counted are the 4-bit codes, a byte per block for its scale, an fp32 number per 256 blocks for these scales, the
    offset, and the two tables of 16 and 256 fp32 numbers that decode weights and scales.
    """
    blocks = -(-numel // blocksize)
    return -(-numel // 2) + blocks + 4 * -(-blocks // 256) + 4 + 4 * 16 + 4 * 256


def table(rank: int = 16) -> str:
    """Return a Markdown table of the training memory of each model in each mode, in GB of 1e9 bytes."""
    lora = LoraConfig(rank, 2 * rank)
    modes = {"full": (None, False), f"LoRA {rank}": (lora, False), f"QLoRA {rank}": (lora, True)}
    columns = ("weights", "adapter", "gradients", "optimizer", "activations", "total")
    lines = [f"| model | mode | {' | '.join(columns)} |", "|---|---|" + "---:|" * len(columns)]
    for name, config in SHAPES.items():
        for mode, (adapter, base_4bit) in modes.items():
            memory = training_memory(config, adapter, base_4bit)
            figures = " | ".join(f"{getattr(memory, column) / 1e9:.2f}" for column in columns)
            lines.append(f"| {name} | {mode} | {figures} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
