"""The memory calculator against a small model that is trained, and the table in docs/lora.md against the calculator."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from burnish.model import ModelConfig, Transformer, pack
from burnish.model.adapter import add_lora, linears, quantize_base
from burnish.model.adapters.config import LoraConfig
from burnish.model.memory import SHAPES, table, training_memory

SMALL = ModelConfig(300, 64, 96, 3, 4, 2, qkv_bias=True)
MODES = {"full": (None, False), "lora": (LoraConfig(4, 8), False), "qlora": (LoraConfig(4, 8), True)}


def nbytes(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_what_is_counted_is_what_training_holds(mode, tied):
    config = replace(SMALL, tie_word_embeddings=tied)
    lora, base_4bit = MODES[mode]
    model = Transformer(config)
    model.checkpoint_activations = True
    if lora is not None:
        model.bfloat16()
        add_lora(model, lora.rank, lora.alpha)
    if base_4bit:
        quantize_base(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    tokens = 50
    saved: dict[int, torch.Tensor] = {}
    parameters = {p.data_ptr() for p in model.parameters()}

    def keep(x):
        if x.data_ptr() not in parameters:
            saved[x.data_ptr()] = x
        return x

    packed = pack([list(range(tokens))])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model(packed)
    memory = training_memory(config, lora, base_4bit, tokens)
    # the final norm keeps its input, and where its weight is trained its statistics, beside the layers' inputs
    inputs = [t for t in saved.values() if t.shape == (tokens, config.hidden_size)]
    assert len(inputs) in (4, 5) and memory.activations == 3 * inputs[0].nbytes
    logprob = model.score(packed, torch.arange(1, tokens))[0]
    logprob.sum().backward()
    optimizer.step()
    adapter = [p for name, p in model.named_parameters() if ".lora." in name]
    trained = [p for p in model.parameters() if p.requires_grad]
    weights = [p for name, p in model.named_parameters() if ".lora." not in name]
    quantized = [layer.four_bit for layer in linears(model).values() if layer.four_bit is not None]
    packed_weights = [x for weight in quantized for x in vars(weight).values() if isinstance(x, torch.Tensor)]
    assert memory.weights == nbytes(weights) + nbytes(packed_weights)
    assert memory.adapter == nbytes(adapter)
    assert memory.gradients == nbytes(p.grad for p in trained)
    moments = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    assert memory.optimizer == nbytes(moments)


def test_65b_in_4_bits_trains_on_a_card_of_48_gb():
    assert training_memory(SHAPES["LLaMA 65B"], LoraConfig(16, 32), True).total < 48e9
    parameters = sum(p.numel() for p in Transformer(SHAPES["LLaMA 65B"], device="meta").parameters())
    assert parameters == pytest.approx(65.2e9, rel=0.01)


@pytest.mark.slow
def test_the_table_in_the_docs_is_the_calculators():
    docs = Path(__file__).parents[2] / "docs" / "lora.md"
    assert table() in docs.read_text(), (
        "run `python -m burnish.model.memory` and put its table into docs/lora.md"
    )


@pytest.mark.parametrize("mode", MODES)
def test_processes_share_what_is_kept_but_for_four_bits(mode):
    lora, base_4bit = MODES[mode]
    one, four = (training_memory(SMALL, lora, base_4bit, processes=count) for count in (1, 4))
    for part in ("adapter", "gradients", "optimizer"):
        assert getattr(four, part) == getattr(one, part) // 4
    model = Transformer(SMALL)
    packed = 0
    if base_4bit:
        quantize_base(model)
        packed = sum(layer.four_bit.nbytes for layer in linears(model).values() if layer.four_bit)
    assert four.weights == (one.weights - packed) // 4 + packed
    assert four.activations == one.activations and one.gathered == 0


def test_what_is_whole_while_it_is_used():
    model = Transformer(SMALL)
    outside = nbytes(p for name, p in model.named_parameters() if not name.startswith("layers."))
    layer = nbytes(model.layers[0].parameters())
    assert training_memory(SMALL, processes=4).gathered == 2 * outside + 3 * layer  # weights and gradients
