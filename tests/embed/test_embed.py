"""An embedded model computes what it computed before, with our ops."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from burnish.model import InputError, embed, embedding
from embedded import DENSE, OPS, ROUTED, WINDOWS, close, count, embedded_and_plain, train

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


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
