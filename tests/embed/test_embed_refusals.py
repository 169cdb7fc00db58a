"""All that stays as it was beside an embedded model, and what is refused by name."""

import copy
import importlib
import pickle
import subprocess
import sys
import types

import pytest
import torch
from burnish.kernels._chip import precision
from burnish.model import InputError, embed
from embedded import close, count, embedded_and_plain, loss_and_gradients, train

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


# ---- what stays as it was


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe", "gpt_oss"])
def test_remove_restores(load, ids, padding, name):
    model, mask = load(name), padding["left"]
    own = types.MethodType(lambda self, x: type(self).forward(self, x), model.model.norm)
    model.model.norm.forward = own

    members = {name: dict(module.__dict__) for name, module in model.named_modules()}
    config, state = model.config.to_dict(), {k: v.clone() for k, v in model.state_dict().items()}
    implementations = lambda: (model.config._attn_implementation, model.config._experts_implementation)
    set_before = implementations()
    want = train(model, ids, mask.bool(), attention_mask=mask)

    embed.apply(model)
    assert model.model.norm.forward is not own and implementations()[0] == embed.NAME
    assert list(model.state_dict()) == list(state)
    embed.remove(model)
    assert model.model.norm.forward is own
    for name, module in model.named_modules():
        assert module.__dict__.keys() == members[name].keys()
    assert model.config.to_dict() == config and set_before == implementations()

    got = train(model, ids, mask.bool(), attention_mask=mask)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_another_model_of_the_class_is_left_alone(load, ids, monkeypatch):
    calls = count(monkeypatch)
    embed.apply(load("llama"))
    load("llama")(ids)
    assert not any(calls.values())


def test_a_copy_is_embedded_and_independent(load, ids):
    model = load("llama")
    embed.apply(model)
    again = copy.deepcopy(model)
    with torch.no_grad():
        for p in again.parameters():
            p.zero_()
    assert model(ids).logits.abs().max() > 0 and again(ids).logits.abs().max() == 0
    embed.remove(again)
    assert again.config._attn_implementation == "sdpa" and model.config._attn_implementation == embed.NAME


def test_saved_files_are_the_same(load, tmp_path):
    model = load("llama")
    model.save_pretrained(tmp_path / "before")
    embed.apply(model)
    model.save_pretrained(tmp_path / "after")
    for file in (tmp_path / "before").iterdir():
        assert file.read_bytes() == (tmp_path / "after" / file.name).read_bytes()


PICKLED = """
import pickle, sys
import torch

if sys.argv[2] == "without":
    class Refusing:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "burnish":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    sys.meta_path.insert(0, Refusing())
model, ids, logits = torch.load(sys.argv[1], weights_only=False)
assert torch.equal(model(ids).logits, logits)
if sys.argv[2] == "with":
    from burnish.model import embed
    embed.apply(model)
    torch.testing.assert_close(model(ids).logits, logits)
    model = pickle.loads(pickle.dumps(model))
    assert torch.equal(model(ids).logits, logits)
"""


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
@pytest.mark.parametrize("burnish", ["with", "without"])
def test_a_pickled_model_is_the_plain_one(load, ids, tmp_path, burnish, name):
    model = load(name)
    with torch.no_grad():
        logits = model(ids).logits
    embed.apply(model)
    torch.save((model, ids, logits), tmp_path / "model.pt")

    again = pickle.loads(pickle.dumps(model))
    for before in ("_attn_implementation", "_experts_implementation"):
        assert getattr(again.config, before) == getattr(load(name).config, before)
        assert getattr(model.config, before) == getattr(copy.deepcopy(model).config, before)
    assert model.config._attn_implementation == embed.NAME
    with torch.no_grad():
        assert torch.equal(again(ids).logits, logits)
    with pytest.raises(InputError, match="not applied"):
        embed.remove(again)

    command = [sys.executable, "-c", PICKLED, str(tmp_path / "model.pt"), burnish]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_ops_run_after_tf32_is_asked_for_as_trainers_do(load, ids, tmp_path):
    """TrainingArguments(tf32=True) sets torch.backends.fp32_precision, after which older getters raise."""
    transformers_sets = importlib.import_module("transformers.utils.import_utils").enable_tf32
    before = torch.backends.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    model = load("mixtral").train()
    want = loss_and_gradients(model, ids)
    try:
        transformers_sets(True)
        assert torch.backends.fp32_precision == "tf32" and precision() == "tf32"
        embed.apply(model)
        close(loss_and_gradients(model, ids), want)
    finally:
        torch.backends.fp32_precision, torch.backends.cuda.matmul.fp32_precision = before


def test_a_forward_that_is_no_method_is_passed_on_to(load, ids):
    model = load("llama")
    want, plain = model(ids).logits, model.forward
    model.forward = lambda *args, **kwargs: plain(*args, **kwargs)
    own = model.forward
    embed.apply(model)
    close([model(ids).logits], [want])
    embed.remove(model)
    assert model.forward is own


def test_nothing_optional_is_imported():
    modules = (
        "kernels",
        "model.embed",
        "model.checkpoint",
        "algorithms.sft",
        "algorithms.grpo",
        "bench.cases.registry",
    )
    code = f"import sys, {', '.join(f'burnish.{m}' for m in modules)}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"transformers", "peft", "trl", "accelerate", "datasets"} & set(done.stdout.split())


# ---- refusals


@pytest.mark.parametrize("name", ["gemma3_text", "olmoe", "deepseek_v3"])
def test_unknown_architectures_are_named(load, name):
    model = load(name)
    with pytest.raises(InputError, match=type(model).__name__):
        embed.apply(model)
    with pytest.raises(InputError, match="Linear"):
        embed.apply(torch.nn.Linear(2, 2))


def test_unknown_layers_are_named(load):
    model = load("llama")

    class Odd(torch.nn.Module):
        pass

    model.model.layers[1] = Odd()
    with pytest.raises(InputError, match="Odd"):
        embed.apply(model)


def test_other_activations_are_named(load, ids):
    model = load("llama", hidden_act="gelu")
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.act_fn.*swiglu=False"):
        embed.apply(model)
    assert model.config._attn_implementation == "sdpa"
    close(*embedded_and_plain(model, lambda: [model(ids).logits], swiglu=False))


def test_hooks_are_named(load):
    hooks = pytest.importorskip("accelerate.hooks", reason="accelerate is not installed")
    model = load("llama")
    hooks.add_hook_to_module(model.model.layers[0].mlp, hooks.AlignDevicesHook("cpu"))
    with pytest.raises(InputError, match="device_map"):
        embed.apply(model)
    embed.apply(model, swiglu=False)


def test_twice_and_not_at_all(load):
    model = load("llama")
    with pytest.raises(InputError, match="not applied"):
        embed.remove(model)
    embed.apply(model)
    with pytest.raises(InputError, match="applied already"):
        embed.apply(model)


def test_masks_that_cannot_be_expressed_are_named(load, ids, padding):
    model = load("mistral-sw")
    embed.apply(model)
    holes = padding["none"].clone()
    holes[1, 5] = 0
    square = torch.ones(3, 1, 13, 13, dtype=torch.bool).tril()

    with pytest.raises(NotImplementedError, match="padding between tokens"):
        model(ids, attention_mask=holes)
    with pytest.raises(NotImplementedError, match=r"\(3, 1, 13, 13\) torch.bool"):
        model(ids, attention_mask=square)

    with torch.no_grad(), pytest.raises(NotImplementedError, match="sliding window"):
        past = transformers.DynamicCache()
        model(ids[:, :5], past_key_values=past)
        model(ids[:, 5:], attention_mask=holes, past_key_values=past)
    with pytest.raises(NotImplementedError, match="no gradient"):
        past = transformers.DynamicCache()
        model(ids[:, :9], attention_mask=padding["left"][:, :9], past_key_values=past)
        model(ids[:, 9:], attention_mask=padding["left"], past_key_values=past)

    create = transformers.masking_utils.create_causal_mask
    with pytest.raises(NotImplementedError, match="and_mask_function"):
        inputs = torch.zeros(3, 13, 32)
        create(model.config, inputs, None, None, and_mask_function=lambda b, h, i, j: i - j < 3)
    model.config.is_causal = False
    with pytest.raises(NotImplementedError, match="bidirectional"):
        model(ids)


def test_attention_dropout_is_named(load, ids):
    model = load("llama", attention_dropout=0.1).train()
    embed.apply(model)
    with pytest.raises(NotImplementedError, match="attention_dropout"):
        model(ids)
    model.eval()(ids)
