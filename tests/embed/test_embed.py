"""An embedded model computes what it computed before, with our ops; taken off again, to the bit."""

import copy
import importlib
import pickle
import subprocess
import sys
import types
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from burnish.kernels._chip import precision
from burnish.model import InputError, embed, embedding

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

DENSE = ["llama", "llama-tied-llama3rope", "llama-yarn", "qwen2", "qwen3", "mistral-sw", "smollm3"]
ROUTED = ["mixtral", "qwen3_moe", "gpt_oss"]
LAYERS = {
    "use_sliding_window": True,
    "sliding_window": 5,
    "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
}
WINDOWS = {  # what gives a model sliding windows that its files do not
    "qwen2": LAYERS,
    "qwen3": LAYERS,
    "mixtral": {"sliding_window": 5},
    "qwen3_moe": {"use_sliding_window": True, "sliding_window": 5},
}
OPS = {  # of each part, and the file that calls them
    "attention": (embedding.attention, ["flash_attention", "decode_attention"]),
    "rope": (embedding.layers, ["apply_rope"]),
    "norm": (embedding.layers, ["rms_norm"]),
    "swiglu": (embedding.layers, ["swiglu"]),
    "experts": (embedding.experts, ["moe_mlp"]),
    "head": (embedding.operands, ["token_logprobs"]),
}


def close(got, want):
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5)


def train(model, ids, keep, **inputs):
    """The logits at the positions to keep, and the gradients of their mean log-probability of the next token."""
    model.zero_grad()
    logits = model(ids, use_cache=False, **inputs).logits
    scored = keep[:, :-1] & keep[:, 1:]
    loss = F.cross_entropy(logits[:, :-1][scored], ids[:, 1:][scored])
    loss.backward()
    gradients = (torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters())
    return [logits[keep].detach(), *gradients]


def embedded_and_plain(model, run, **parts):
    """The same run after apply() and before."""
    before = run()
    embed.apply(model, **parts)
    return run(), before


# ---- the same numbers


@pytest.mark.parametrize("where", ["none", "left", "right"])
@pytest.mark.parametrize("name", DENSE + ROUTED)
def test_logits_and_gradients(load, ids, padding, name, where):
    model, mask = load(name, **WINDOWS.get(name, {})), padding[where]
    close(*embedded_and_plain(model, lambda: train(model, ids, mask.bool(), attention_mask=mask)))


@pytest.mark.parametrize("name", DENSE + ROUTED)
def test_packed_positions(load, ids, name):
    model = load(name, **WINDOWS.get(name, {}))
    lengths = [[4, 7, 2], [1, 1, 11], [13]]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    everything = torch.ones_like(ids).bool()
    got, want = embedded_and_plain(model, lambda: train(model, ids, everything, position_ids=positions))
    close(got, want)
    if name == "gpt_oss":  # transformers' own does not tell packed rows apart
        return
    alone = model(ids[:1, 4:11]).logits[0]
    torch.testing.assert_close(got[0][4:11], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("where", ["none", "left", "right"])
@pytest.mark.parametrize("cache", ["dynamic", "bare", "static"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral-sw", "mixtral", "qwen3_moe", "gpt_oss"])
def test_caches(load, ids, padding, name, cache, where):
    model, mask = load(name, **WINDOWS.get(name, {})), padding[where]
    make = {
        "dynamic": lambda: transformers.DynamicCache(config=model.config),
        "bare": transformers.DynamicCache,  # keeps everything, also of layers with a window
        "static": lambda: transformers.StaticCache(config=model.config, max_cache_len=16),
    }[cache]

    @torch.no_grad()
    def run():
        past, out = make(), []
        for start, end in ((0, 6), (6, 7), (7, 10), (10, 13)):
            logits = model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=past).logits
            out.append(logits[mask[:, start:end].bool()])
        return out

    close(*embedded_and_plain(model, run))


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("name", DENSE + ROUTED)
def test_generate(load, ids, padding, name, cache):
    model = load(name, **WINDOWS.get(name, {}))

    def run():
        out = model.generate(
            ids,
            attention_mask=padding["left"],
            max_new_tokens=8,
            do_sample=False,
            pad_token_id=0,
            cache_implementation=cache,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return [out.sequences, *out.logits]

    close(*embedded_and_plain(model, run))


def test_beams_and_samples(load, ids, padding):
    model = load("qwen3")

    def run():
        torch.manual_seed(0)
        shape = {"attention_mask": padding["left"], "max_new_tokens": 5, "pad_token_id": 0}
        beams = model.generate(ids, num_beams=3, do_sample=False, **shape)
        return [beams, model.generate(ids, do_sample=True, top_k=20, num_return_sequences=2, **shape)]

    close(*embedded_and_plain(model, run))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(load, ids, padding, dtype):
    """Under autocast norms are fp32, projections are not: our ops take one dtype."""
    model, mask = load("qwen3"), padding["left"]
    eager = train(model, ids, mask.bool(), attention_mask=mask)[0]

    def run():
        with torch.autocast("cpu", dtype=dtype):
            return train(model, ids, mask.bool(), attention_mask=mask)

    got, want = embedded_and_plain(model, run)
    assert got[0].dtype == want[0].dtype
    assert (got[0] - eager).abs().max() < 2 * (want[0] - eager).abs().max()


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gpt_oss"])
def test_gradient_checkpointing(load, ids, padding, name):
    model, mask = load(name), padding["left"]
    model.train().gradient_checkpointing_enable()
    close(*embedded_and_plain(model, lambda: train(model, ids, mask.bool(), attention_mask=mask)))


# ---- the loss of a training step


def step(model, *args, **kwargs):
    model.train().zero_grad()
    out = model(*args, **kwargs)
    out.loss.backward()
    return [out.loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)], out


@pytest.mark.parametrize(
    "name, how",
    [
        *product(
            ["llama", "llama-tied-llama3rope", *ROUTED], ["labels", "num_items_in_batch", "shift_labels"]
        ),
        *product(ROUTED, ["output_router_logits"]),
    ],
)
def test_loss_without_logits(load, ids, padding, name, how):
    model, mask = load(name), padding["right"]
    labels = ids.masked_fill(mask == 0, -100)
    more = {
        "labels": {},
        "num_items_in_batch": {"num_items_in_batch": torch.tensor(50)},
        "shift_labels": {"shift_labels": F.pad(labels[:, 2:], (0, 2), value=-100)},
        "output_router_logits": {"output_router_logits": True},
    }[how]
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels, **more}
    (got, ours), (want, theirs) = embedded_and_plain(model, lambda: step(model, **inputs))
    close(got, want)
    assert ours.logits is None and type(ours) is type(theirs) and theirs.keys() - ours.keys() == {"logits"}
    if "aux_loss" in theirs:
        torch.testing.assert_close(ours.aux_loss, theirs.aux_loss, rtol=1e-5, atol=1e-5)


def test_loss_where_the_logits_are_asked_for(load, ids):
    model = load("llama")
    want = model(ids, labels=ids)
    embed.apply(model)
    for got in (model(ids, labels=ids), model.train()(ids, labels=ids, return_dict=False)):
        close(got[:2], want[:2])
    assert model(ids, None, None, None, None, ids).logits is not None  # labels by place


def test_loss_of_nothing_is_zero(load, ids):
    model = load("llama")
    embed.apply(model)
    got, _ = step(model, ids, labels=torch.full_like(ids, -100))
    assert all(bool((g == 0).all()) for g in got)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_trainer(load, ids, tmp_path, name):
    """transformers' own Trainer, whose loss is divided by the trained tokens of two micro-batches."""
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    rows = [
        {"input_ids": row, "labels": row.masked_fill(torch.arange(13) < i, -100)} for i, row in enumerate(ids)
    ]

    def run(apply):
        model = load(name)
        if apply:
            embed.apply(model)

        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=2,
            learning_rate=1e-3,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )

        trainer = transformers.Trainer(model, arguments, train_dataset=rows * 2)
        trainer.train()
        return [line["loss"] for line in trainer.state.log_history if "loss" in line]

    want, got = run(False), run(True)
    assert len(got) == 3 and got == pytest.approx(want, abs=1e-5)


# ---- experts


@pytest.mark.parametrize("name", ROUTED)
def test_an_index_past_the_experts_is_skipped(load, name):
    model = load(name)
    experts = next(m for m in model.modules() if type(m).__name__.endswith("Experts"))
    x, weights = torch.randn(7, 32), torch.rand(7, 2)
    index = torch.randint(0, experts.num_experts, (7, 2))
    skipped = torch.rand(7, 2) < 0.4
    want = experts(x, index, weights.masked_fill(skipped, 0))
    embed.apply(model)
    close([experts(x, index.masked_fill(skipped, experts.num_experts), weights)], [want])


def test_other_experts_are_named(load):
    model = load("mixtral", hidden_act="gelu")
    with pytest.raises(InputError, match=r"experts\.act_fn.*experts=False"):
        embed.apply(model)
    embed.apply(model, experts=False)
    experts = model.model.layers[0].mlp.experts
    with pytest.raises(InputError, match=r"MixtralExperts.*experts=False"):
        index, weights = torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1)
        embedding.experts.experts_forward(experts, torch.randn(2, 32), index, weights)


# ---- which ops run


def count(monkeypatch):
    calls = {op: 0 for _, ops in OPS.values() for op in ops}

    def counted(op, original):
        def call(*args, **kwargs):
            calls[op] += 1
            return original(*args, **kwargs)

        return call

    for file, ops in OPS.values():
        for op in ops:
            monkeypatch.setattr(file, op, counted(op, getattr(file, op)))
    return calls


@pytest.mark.parametrize("part", [*OPS, None])
def test_each_part_can_be_left_out_and_stand_alone(load, ids, padding, monkeypatch, part):
    calls = count(monkeypatch)
    model, mask = load("qwen3_moe"), padding["left"]  # one of its layers has experts

    def run():
        model.eval()
        out = model.generate(ids, attention_mask=mask, max_new_tokens=2, do_sample=False, pad_token_id=0)
        model.train()
        right = padding["right"]
        loss = model(ids, attention_mask=right, labels=ids.masked_fill(right == 0, -100)).loss.detach()
        return [*train(model, ids, mask.bool(), attention_mask=mask), out, loss]

    want = run()
    assert not any(calls.values())
    for alone in (True, False):
        calls.update(dict.fromkeys(calls, 0))
        embed.apply(model, **{name: (name == part) == alone for name in OPS})
        close(run(), want)
        for name, (_, ops) in OPS.items():
            for op in ops:
                assert bool(calls[op]) == ((name == part) == alone), op
        embed.remove(model)


def without(op, name):
    return lambda *args, **kwargs: op(*args, **{**kwargs, name: None})


FAULTS = {
    "the mask is lost, as without AttentionMaskInterface": (
        *("llama", embed, "mask"),
        lambda _: lambda *_, **__: None,
    ),
    "the window is lost": (
        *("mistral-sw", embedding.attention, "flash_attention"),
        lambda op: without(op, "window"),
    ),
    "the window is lost beside a cache": (
        *("mistral-sw", embedding.attention, "decode_attention"),
        lambda op: without(op, "window"),
    ),
    "the sinks are lost": (
        *("gpt_oss", embedding.attention, "flash_attention"),
        lambda op: without(op, "sinks"),
    ),
    "gate and up are not taken apart": (
        *("gpt_oss", embedding.experts, "gate_first"),
        lambda _: lambda x: x,
    ),
    "the experts' biases are lost": (
        *("gpt_oss", embedding.experts, "moe_mlp"),
        lambda op: without(op, "down_bias"),
    ),
    "rotated backwards": (
        *("llama", embedding.layers, "rotate"),
        lambda op: lambda q, k, cos, sin, halves: op(q, k, cos, -sin, halves),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(load, ids, padding, monkeypatch, fault):
    """The control of the tests above: they fail where the adapters between transformers and the ops are wrong."""
    name, file, function, plant = FAULTS[fault]
    model, mask = load(name), padding["left"]

    def run():
        past = transformers.DynamicCache()  # keeps more than a window
        with torch.no_grad():
            model(ids[:, :10], attention_mask=mask[:, :10], past_key_values=past)
            last = model(ids[:, 10:], attention_mask=mask, past_key_values=past).logits
        return [*train(model, ids, mask.bool(), attention_mask=mask), last]

    want = run()
    monkeypatch.setattr(file, function, plant(getattr(file, function)))
    embed.apply(model)
    with pytest.raises(AssertionError, match="not close"):
        close(run(), want)


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


# ---- torch.compile


@pytest.mark.parametrize(
    "name, which, backend",
    [
        *product(["llama", "qwen2", "qwen3", "mistral-sw", "smollm3", *ROUTED], [0], ["aot_eager"]),
        ("qwen3_moe", 1, "aot_eager"),  # the one with experts
        ("mixtral", 0, "inductor"),
    ],
)
def test_a_block_compiles_whole(load, ids, padding, name, which, backend):
    """Forward and backward, with padding and without; the mask is that of the forward pass around it."""
    model = load(name, **WINDOWS.get(name, {}))
    embed.apply(model)
    block, x = model.model.layers[which], torch.randn(*ids.shape, 32, requires_grad=True)
    angles = model.model.rotary_emb(x, torch.arange(13)[None])
    causal = transformers.masking_utils.causal_mask_function

    def run(block, mask):
        out = block(x, position_embeddings=angles, attention_mask=mask)
        return [out.detach(), *torch.autograd.grad(out.square().mean(), [x, *block.parameters()])]

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    for real in (None, padding["left"].bool()):
        mask = embedding.attention.mask(3, 13, 13, mask_function=causal, attention_mask=real)
        assert (mask is None) == (real is None)
        close(run(compiled, mask), run(block, mask))


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_a_training_step_compiles_whole(load, ids, padding, name):
    """The model around the blocks, too: the mask inside the graph, the loss without logits."""
    model = load(name)
    embed.apply(model)

    def run(call):
        model.zero_grad()
        more = {"attention_mask": padding["left"], "labels": ids.masked_fill(padding["left"] == 0, -100)}
        loss = call(ids, use_cache=False, **more).loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    model.train()
    torch._dynamo.reset()
    close(run(torch.compile(model, fullgraph=True, backend="aot_eager")), run(model))


def test_generate_compiles_whole(load, ids, padding):
    """transformers compiles a step with a static cache by itself on a GPU; here it is told to."""
    model = load("gpt_oss")
    embed.apply(model)
    whole = transformers.CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    whole._compile_all_devices = True

    def run(**how):
        out = model.generate(
            ids,
            attention_mask=padding["left"],
            max_new_tokens=4,
            do_sample=False,
            pad_token_id=0,
            cache_implementation="static",
            output_logits=True,
            return_dict_in_generate=True,
            **how,
        )
        return [out.sequences, *out.logits]

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    close(run(compile_config=whole), run(disable_compile=True))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_masks_compile_whole(load, ids, padding):
    """A traced mask has as many segments as there are tokens, where eager has as many as there are."""
    traced = torch.compile(embedding.attention.mask, fullgraph=True, backend="eager")
    causal = transformers.masking_utils.causal_mask_function
    for mask in padding.values():
        arguments = {"mask_function": causal, "attention_mask": mask.bool()}
        eager, whole = (f(3, 13, 13, **arguments) for f in (embedding.attention.mask, traced))
        whole = whole.flatten().unique()
        want = torch.arange(0, 40, 13) if eager is None else eager.flatten().unique()
        assert torch.equal(whole, want.int())
        cached = {**arguments, "q_offset": 12}
        eager, whole = (f(3, 1, 13, **cached) for f in (embedding.attention.mask, traced))
        assert eager is None or torch.equal(eager, whole)


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


def loss_and_gradients(wrapped, ids):
    wrapped.zero_grad()
    loss = wrapped(input_ids=ids, labels=ids).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in wrapped.parameters() if p.grad is not None)]


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


def test_hooks_are_named(load):
    hooks = pytest.importorskip("accelerate.hooks", reason="accelerate is not installed")
    model = load("llama")
    hooks.add_hook_to_module(model.model.layers[0].mlp, hooks.AlignDevicesHook("cpu"))
    with pytest.raises(InputError, match="device_map"):
        embed.apply(model)
    embed.apply(model, swiglu=False)


def test_a_forward_that_is_no_method_is_passed_on_to(load, ids):
    model = load("llama")
    want, plain = model(ids).logits, model.forward
    model.forward = lambda *args, **kwargs: plain(*args, **kwargs)
    own = model.forward
    embed.apply(model)
    close([model(ids).logits], [want])
    embed.remove(model)
    assert model.forward is own


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


def test_nothing_optional_is_imported():
    modules = (
        "kernels",
        "model.embed",
        "model.checkpoint",
        "algorithms.sft",
        "algorithms.grpo",
        "bench.registry",
    )
    code = f"import sys, {', '.join(f'burnish.{m}' for m in modules)}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"transformers", "peft", "trl", "accelerate", "datasets"} & set(done.stdout.split())
