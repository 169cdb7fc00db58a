"""Experts in the model: names on disk, parameters counted, what a forward pass says of its routing."""

from dataclasses import replace

import pytest
import torch
from burnish.model import ModelConfig, Transformer, attention, moe, pack
from burnish.model.checkpoint import load_model, save_model
from burnish.model.config import Experts
from burnish.model.count import PRESETS, count_parameters, switch_c
from burnish.model.moe import pooled_balance
from safetensors.torch import load_file

SPARSE = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss"]
TINY = ModelConfig(
    vocab_size=31,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=2,
    model_type="mixtral",
    experts=Experts(4, 2, 24, (True,) * 3, renormalize=True, balance_coefficient=0.5),
)


@pytest.mark.parametrize(
    "name, total, active",
    [("Mixtral-8x7B", 46.7, 12.9), ("DeepSeek-V2.5", 235.7, 21.4), ("DeepSeek-V3", 671.0, 37.6)],
)
def test_parameters_of_published_models(name, total, active):
    count = count_parameters(PRESETS[name])
    assert (round(count.total / 1e9, 1), round(count.active / 1e9, 1)) == (total, active)
    assert (
        sum(int(line.split("= ")[1].replace(",", "")) for line in count.formula.splitlines()) == count.total
    )


def test_deepseek_counts_no_embedding_and_switch_c_is_1571_billion():
    v3 = count_parameters(PRESETS["DeepSeek-V3"])
    assert round((v3.active - v3.embedding) / 1e9) == 37
    assert round(switch_c().total / 1e9) == 1571
    assert "30 x 2048 experts x 2 x 2080 x 6144 = 1,570,347,417,600" in switch_c().formula


@pytest.mark.parametrize("architecture", [*SPARSE, "gemma3_text", "llama", "qwen3"])
def test_the_formula_counts_what_the_model_holds(data, architecture):
    model = load_model(data / "tiny-hf" / architecture)
    assert count_parameters(model.config).total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("architecture", SPARSE)
def test_names_on_disk_and_back(data, tmp_path, architecture):
    model = load_model(data / "tiny-hf" / architecture)
    state = {name: torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    model.load_state_dict(state)
    save_model(model, tmp_path / "saved")
    files = load_file(tmp_path / "saved" / "model.safetensors")
    assert not any(f"model.{name}" in files for name in state if ".experts." in name)
    again = load_model(tmp_path / "saved").state_dict()
    assert again.keys() == state.keys() and all(torch.equal(again[name], state[name]) for name in state)


def test_a_forward_pass_says_how_it_routed():
    model = Transformer(TINY, seed=1)
    packed = pack([[1, 2, 3, 4, 5], [6, 7, 8]])
    hidden = model(packed)
    assert [int(routed.counts.sum()) for routed in model.routing] == [16, 16, 16]
    loss = model.balance_loss()
    assert loss.item() == pytest.approx(0.5 * pooled_balance(model.routing, 2).item())
    loss.backward()
    assert all(layer.mlp.gate.weight.grad.any() for layer in model.layers)
    assert model.layers[2].mlp.experts.down_proj.weight.grad is None
    plain = Transformer(replace(TINY, experts=None, model_type="llama"))
    plain(packed)
    assert plain.balance_loss() == 0 and hidden.shape == (8, 16)


def test_products_are_in_autocasts_dtype(monkeypatch):
    """Attention's and the experts' operands, which the ops take as they come."""
    seen = set()

    def watched(module, name):
        op = getattr(module, name)

        def call(*operands, **more):
            seen.add((name, *{t.dtype for t in operands[:3]}))
            return op(*operands, **more)

        monkeypatch.setattr(module, name, call)

    watched(attention, "flash_attention")
    watched(moe, "moe_mlp")
    model = Transformer(TINY, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        model(pack([[1, 2, 3, 4, 5], [6, 7, 8]])).sum().backward()
    assert seen == {("flash_attention", torch.bfloat16), ("moe_mlp", torch.bfloat16)}
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())


def test_a_fresh_model_is_saved_and_loaded(tmp_path):
    model = Transformer(TINY, seed=1)
    save_model(model, tmp_path / "saved")
    again = load_model(tmp_path / "saved")
    packed = pack([[1, 2, 3, 4, 5]])
    assert torch.equal(model(packed), again(packed))
