"""PEFT's adapters on an embedded model, in fp32 and in 4 bits, and on its head."""

import pytest
import torch
from burnish.model import InputError, embed
from embedded import close, embedded_and_plain, loss_and_gradients

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


# ---- on the layers


@pytest.mark.parametrize("first", ["peft", "embed"])
@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt_oss"])
def test_peft(load, ids, padding, name, first):
    """An adapter on every linear layer, or on attention and the experts' own parameters."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model, mask = load(name), padding["left"]
    where = {"target_modules": "all-linear"}
    if name != "llama":
        experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        where = {"target_modules": ["q_proj", "v_proj"], "target_parameters": experts}
    lora = peft.LoraConfig(r=4, **where, init_lora_weights=False, task_type="CAUSAL_LM")

    def run(wrapped):
        wrapped.zero_grad()
        logits = wrapped(ids, attention_mask=mask, use_cache=False).logits
        logits[mask.bool()].square().mean().backward()
        gradients = [p.grad.clone() for p in wrapped.parameters() if p.requires_grad]
        with wrapped.disable_adapter():
            plain = wrapped(ids, attention_mask=mask).logits[mask.bool()].detach()
        generated = wrapped.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
        return [logits[mask.bool()].detach(), *gradients, plain, generated]

    if first == "embed":
        embed.apply(model)
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(model, lora)
    if first == "peft":
        embed.apply(wrapped)
    got = run(wrapped)
    embed.remove(wrapped)
    close(got, run(wrapped))
    targets = 7 if name == "llama" else 4
    assert len(got) == 3 + 2 * targets * model.config.num_hidden_layers  # two matrices each


@pytest.fixture
def in_four_bits(tmp_path):
    """A llama in bitsandbytes' layers, whose CPU code wants rows of whole blocks (64), and tiles of 32 rows."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    sizes = {"vocab_size": 96, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    return transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path,
        dtype=torch.float32,
        quantization_config=transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    )


def test_peft_on_four_bits(in_four_bits, ids, padding):
    """QLoRA as PEFT does it: bitsandbytes' layers stay, our ops go between them."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    lora = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    model, mask = peft.get_peft_model(in_four_bits, lora), padding["left"]

    def run():
        model.train().zero_grad()
        logits = model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
        logits.square().mean().backward()
        return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    got, want = embedded_and_plain(model, run)
    close(got, want)
    assert len(got) == 1 + 2 * 7 * in_four_bits.config.num_hidden_layers


@torch.no_grad()
@pytest.mark.parametrize("has_bf16", [False, True])
def test_answers_in_four_bits(in_four_bits, ids, padding, monkeypatch, has_bf16):
    """bitsandbytes repacks the weights for inference where the CPU has AVX512-BF16, and multiplies in bf16 then."""
    layers = [m for m in in_four_bits.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
    assert len(layers) == 7 * in_four_bits.config.num_hidden_layers
    if has_bf16 and not layers[0].support_avx512bf16_for_cpu:
        pytest.skip("this CPU has no AVX512-BF16")
    for layer in layers:
        monkeypatch.setattr(layer, "support_avx512bf16_for_cpu", has_bf16)
    mask = padding["left"]
    got, want = embedded_and_plain(
        in_four_bits.eval(), lambda: in_four_bits(ids, attention_mask=mask).logits[mask.bool()]
    )
    # where x is rounded the other way, an output is off by a rounding of bf16
    bound = {"rtol": 0, "atol": 2**-7 * want.abs().max().item()} if has_bf16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(got, want, **bound)


# ---- on the head


HEADS = {
    "adapter": {"target_modules": ["lm_head", "q_proj"]},
    "whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
}


@pytest.mark.parametrize("first", ["peft", "embed"])
@pytest.mark.parametrize("how", HEADS)
def test_an_adapted_head(load, ids, how, first):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = load("llama")
    if first == "embed":
        embed.apply(model)
    lora = {name: peft.LoraConfig(r=4, **HEADS[how], init_lora_weights=False) for name in ("one", "two")}
    wrapped = peft.get_peft_model(model, lora["one"], adapter_name="one").train()
    wrapped.add_adapter("two", lora["two"])
    if first == "peft":
        embed.apply(wrapped)
    assert model(ids, labels=ids).logits is None

    def run():
        found = loss_and_gradients(wrapped, ids)
        with torch.no_grad(), wrapped.disable_adapter():
            return [*found, wrapped(input_ids=ids, labels=ids).loss]

    def run_each():
        return [x for name in lora if wrapped.set_adapter(name) is None for x in run()]

    if how == "adapter":
        wrapped.base_model.set_adapter(["one", "two"])  # both at a time
    got, each = run(), run_each()
    embed.remove(wrapped)
    assert all("forward" not in module.__dict__ for module in model.modules())
    close(each, run_each())
    if how == "adapter":
        wrapped.base_model.set_adapter(["one", "two"])
        close(got, run())


BEYOND = [
    ({"lora_dropout": 0.1}, "lora_dropout"),
    ({"use_dora": True}, "DoRA"),
    ({"lora_bias": True}, "lora_bias"),
    ("IA3Config", "no LoRA"),
]


@pytest.mark.parametrize("options, named", BEYOND, ids=[named for _, named in BEYOND])
def test_a_head_that_does_more_is_named(load, ids, options, named):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    where = {"target_modules": ["lm_head", "q_proj"]}
    if isinstance(options, str):
        config = getattr(peft, options)(**where, feedforward_modules=[])
    else:
        config = peft.LoraConfig(**where, **options)
    wrapped = peft.get_peft_model(load("llama"), config).train()

    message = rf"lm_head: expected torch\.nn\.Linear.*, got peft\.\S+ with .*{named}.*; pass head=False$"
    with pytest.raises(InputError, match=message):
        embed.apply(wrapped)
    embed.apply(wrapped, head=False)
    assert wrapped(input_ids=ids, labels=ids).logits is not None

    late = load("llama").train()
    embed.apply(late)
    with pytest.raises(InputError, match=message):
        peft.get_peft_model(late, config)(input_ids=ids, labels=ids)
