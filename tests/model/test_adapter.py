"""Adapters beside the model that they are on: fresh, trained, merged, disabled, several in a batch, on experts."""

import json
from dataclasses import replace

import pytest
import torch
from burnish.kernels import lora_linears
from burnish.model import InputError, Transformer, linear, pack, transformer
from burnish.model.adapter import (
    adapter_disabled,
    adapters,
    add_lora,
    frozen_copy,
    give_adapter,
    is_fresh,
    linears,
    lora_config,
    merge_lora,
    stack_adapters,
    take_adapter,
)
from burnish.model.checkpoint import load_model, load_scalar_model, read_adapter, save_model
from burnish.model.generate import SamplingParams, generate
from safetensors.torch import load_file
from tiny import PACKED, ROWS, TINY, logits_of, tiny, trained


def test_what_cannot_be_added_is_refused():
    tied = Transformer(replace(TINY, tie_word_embeddings=True))
    with pytest.raises(InputError, match=r"target_modules: .* embed_tokens: an adapter of the embedding"):
        add_lora(tied, 2, targets=("q_proj", "embed_tokens"))
    with pytest.raises(InputError, match="ensure_weight_tying: expected false beside an adapter of lm_head"):
        add_lora(tied, 2, targets=("lm_head",), tied=True)
    assert all(parameter.requires_grad for parameter in tied.parameters()) and tied.lm_head is None
    with pytest.raises(InputError, match="has an adapter already"):
        add_lora(tiny(), 2)


# ---- what an adapter does to a model


@pytest.mark.parametrize("options", [{}, {"dora": True}, {"rslora": True}], ids=["lora", "dora", "rslora"])
def test_a_fresh_adapter_changes_nothing_and_is_all_that_is_trained(options):
    base = logits_of(Transformer(replace(TINY, initializer_range=0.2), seed=1))
    model = tiny(**options)
    assert is_fresh(model)
    torch.testing.assert_close(logits_of(model), base, atol=0 if not options.get("dora") else 1e-6, rtol=0)
    model.score(PACKED, ROWS)[0].sum().backward()
    for name, parameter in model.named_parameters():
        assert (".lora." in name) == parameter.requires_grad == (parameter.grad is not None), name
    trained(model)
    assert not is_fresh(model)
    assert (logits_of(model) - base).abs().max() > 0.01


def test_weights_follow_the_seed():
    models = [Transformer(TINY) for _ in range(3)]
    for model, seed in zip(models, (5, 5, 6), strict=True):
        add_lora(model, 3, seed=seed)
    one, same, other = (take_adapter(model).tensors for model in models)
    assert all(torch.equal(one[name], same[name]) for name in one)
    key = "model.layers.0.self_attn.q_proj.lora_A.weight"
    assert not torch.equal(one[key], other[key])
    assert one[key].abs().max() <= 1 / 4 < 1.2 * one[key].abs().max()  # uniform in +-1/sqrt(16)


@pytest.mark.parametrize("options", [{}, {"dora": True}], ids=["lora", "dora"])
def test_merged_equals_unmerged_and_can_be_trained(options):
    model = tiny(**options)
    trained(model)
    before = logits_of(model)
    merge_lora(model)
    torch.testing.assert_close(logits_of(model), before, atol=1e-5, rtol=1e-5)
    assert not adapters(model) and lora_config(model) is None
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_disabled_is_the_base_bit_for_bit_also_after_an_error():
    base = logits_of(Transformer(replace(TINY, initializer_range=0.2), seed=1))
    model = tiny(modules_to_save=("lm_head",))
    trained(model)
    after = logits_of(model)
    with adapter_disabled(model):
        assert torch.equal(logits_of(model), base)
    with pytest.raises(RuntimeError, match="mine"), adapter_disabled(model):
        raise RuntimeError("mine")
    assert torch.equal(logits_of(model), after)


def test_a_frozen_copy_shares_the_base_and_keeps_the_adapter_as_it_was():
    model = tiny()
    base = logits_of(model)
    fresh = frozen_copy(model)
    assert not adapters(fresh)
    trained(model)
    loaded = frozen_copy(model)
    then = logits_of(model)
    trained(model, seed=1)
    assert torch.equal(logits_of(fresh), base) and torch.equal(logits_of(loaded), then)
    for reference in (fresh, loaded):
        weights = zip(linears(reference).values(), linears(model).values(), strict=True)
        assert all(one.weight is other.weight for one, other in weights)
        assert not any(parameter.requires_grad for parameter in reference.parameters())
    assert adapters(model) and all(lora.a.requires_grad for lora in adapters(model).values())


def test_dropout_acts_where_a_gradient_is_taken_and_nowhere_else():
    model = tiny(dropout=0.5)
    trained(model)
    with torch.no_grad():
        assert torch.equal(model(PACKED), model(PACKED))
    quiet = logits_of(frozen_copy(model))
    torch.manual_seed(3)
    one, other = model(PACKED), model(PACKED)
    assert not torch.equal(one, other)
    torch.manual_seed(3)
    assert torch.equal(model(PACKED), one)  # a function of the generator: a resumed run drops the same
    with torch.no_grad():
        assert torch.equal(model.logits(model(PACKED)), quiet)


def test_layers_of_one_x_go_together(monkeypatch):
    """q, k and v; gate and up: where all have an adapter, of one form. The numbers are those of each alone."""
    groups = []
    monkeypatch.setattr(
        linear,
        "lora_linears",
        lambda x, weights, *rest, **more: (
            groups.append(len(weights)) or lora_linears(x, weights, *rest, **more)
        ),
    )

    models = [tiny(rank_pattern={"k_proj": 5}), tiny(dora=True), tiny(targets=("q_proj", "gate_proj"))]
    together = []
    for model in models:
        trained(model)
        together.append(logits_of(model))
    assert groups == [3, 2] * 4

    with adapter_disabled(models[0]):
        logits_of(models[0])
    linears(models[0])["model.layers.0.self_attn.q_proj"].lora.dropout = 0.5  # unlike its neighbours: alone
    models[0].score(PACKED, ROWS)
    assert groups[8:] == [2, 3, 2]

    monkeypatch.setattr(
        transformer, "linears_of", lambda layers, x, adapter: [one(x, adapter) for one in layers]
    )
    for model, expected in zip(models, together, strict=True):
        torch.testing.assert_close(logits_of(model), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing_changes_no_gradient(dropout):
    model = tiny(dropout=dropout)
    trained(model)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        torch.manual_seed(4)
        model.score(PACKED, ROWS)[0].sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    model.checkpoint_activations = True
    for name, gradient in gradients().items():
        assert torch.equal(gradient, plain[name]), name


def test_a_bf16_base_keeps_its_adapter_in_fp32(tmp_path):
    save_model(Transformer(replace(TINY, initializer_range=0.2), seed=1), tmp_path / "base")
    exact, half = (load_model(tmp_path / "base", dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    for model in (exact, half):
        add_lora(model, 3, base=str(tmp_path / "base"), modules_to_save=("lm_head", "norm"))
        trained(model)
    assert all(p.dtype == torch.float32 for p in half.parameters() if p.requires_grad)

    with torch.autocast("cpu", torch.bfloat16):
        logprob = half.score(PACKED, ROWS)[0]
    logprob.sum().backward()
    torch.testing.assert_close(logprob, exact.score(PACKED, ROWS)[0], atol=0.1, rtol=0)
    assert all(
        lora.b.grad is not None and lora.b.grad.dtype == torch.float32 for lora in adapters(half).values()
    )

    save_model(half, tmp_path / "adapter")
    assert all(
        torch.equal(t, take_adapter(half).tensors[n])
        for n, t in read_adapter(tmp_path / "adapter")[0].tensors.items()
    )


# ---- a scalar model


def test_a_reward_models_adapter_holds_its_head(tmp_path):
    save_model(Transformer(TINY, seed=1), tmp_path / "base")
    model = load_scalar_model(tmp_path / "base", seed=3)
    add_lora(model, 2, modules_to_save=("score",), base=str(tmp_path / "base"))
    trained(model)
    model.bias = 0.25
    save_model(model, tmp_path / "reward")
    assert json.loads((tmp_path / "reward" / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    again = load_scalar_model(tmp_path / "reward")
    assert torch.equal(again.values(PACKED, ROWS), model.values(PACKED, ROWS))
    with pytest.raises(InputError, match="expected a language model, found an adapter of a reward model"):
        load_model(tmp_path / "reward")


def test_a_reward_model_starts_from_a_language_models_adapter(tmp_path):
    save_model(Transformer(TINY, seed=1), tmp_path / "base")
    language = load_model(tmp_path / "base")
    add_lora(language, 2, base=str(tmp_path / "base"))
    trained(language)
    save_model(language, tmp_path / "language")
    model = load_scalar_model(tmp_path / "language", seed=3)
    with torch.no_grad():
        torch.testing.assert_close(model.body(PACKED), language(PACKED), atol=1e-5, rtol=1e-5)
    assert torch.equal(model.score.weight, load_scalar_model(tmp_path / "base", seed=3).score.weight)
    assert not adapters(model) and all(parameter.requires_grad for parameter in model.parameters())

    # in 4 bits what is frozen, the adapter in it: again so under an adapter of its own
    four = load_scalar_model(tmp_path / "language", seed=3, base_4bit=True)
    assert all(layer.four_bit is not None for layer in linears(four).values())
    add_lora(four, 2, modules_to_save=("score",), base=str(tmp_path / "language"))
    trained(four)
    save_model(four, tmp_path / "reward")
    again = load_scalar_model(tmp_path / "reward")
    assert torch.equal(again.values(PACKED, ROWS), four.eval().values(PACKED, ROWS))


# ---- several adapters in one batch


def several():
    """A base, and three models on it with adapters of different rank, scale and modules."""
    base = Transformer(replace(TINY, initializer_range=0.2), seed=1)
    shapes = [
        {"rank": 3},
        {"rank": 5, "alpha": 1, "targets": ("q_proj", "up_proj")},
        {"rank": 2, "rslora": True},
    ]
    models = []
    for i, shape in enumerate(shapes):
        model = Transformer(replace(TINY, initializer_range=0.2), seed=1)
        add_lora(model, **shape)
        trained(model, seed=i)
        models.append(model)
    stacked = Transformer(replace(TINY, initializer_range=0.2), seed=1)
    stack_adapters(stacked, [take_adapter(model) for model in models])
    return base, models, stacked


def test_several_adapters_in_one_batch():
    base, models, stacked = several()
    sequences, which = [[1, 2, 3], [1, 2, 3], [4, 5], [6, 7, 8, 9], [1, 2, 3]], [0, 1, -1, 2, 0]
    together = logits_of(stacked, pack(sequences, adapters=which)).split([len(s) for s in sequences])
    for sequence, i, ours in zip(sequences, which, together, strict=True):
        alone = logits_of(base if i < 0 else models[i], pack([sequence]))
        torch.testing.assert_close(ours, alone, atol=1e-5, rtol=1e-5)


def test_several_adapters_answer_in_one_batch():
    """Equal prompts of different adapters are not prefilled together, and the cache keeps who is who as rows leave."""
    base, models, stacked = several()
    prompts, which = [[1, 2, 3], [1, 2, 3], [1, 2, 3], [4, 5], [1, 2, 3]], [0, 1, -1, 2, 0]
    params = SamplingParams(samples_per_prompt=3, max_new_tokens=9, stop_ids={3, 4, 5, 6}, seed=7)
    samples = generate(stacked, prompts, params, adapters=which)
    lengths = {len(sample.tokens) for sample in samples}
    assert len(lengths) > 2  # rows leave at different times
    for i, model in enumerate([*models, base]):
        alone = generate(model, prompts, params)
        ours = [n for n, sample in enumerate(samples) if which[sample.prompt_index] == (i if i < 3 else -1)]
        assert [samples[n].tokens for n in ours] == [alone[n].tokens for n in ours]


def test_what_shares_no_batch_is_refused():
    with pytest.raises(InputError, match="adapter 1: expected no DoRA"):
        stack_adapters(Transformer(TINY), [take_adapter(tiny()), take_adapter(tiny(dora=True))])
    given = take_adapter(tiny())
    matrix = {"model.embed_tokens.weight": torch.ones(TINY.vocab_size, TINY.hidden_size)}  # not the base's
    with pytest.raises(InputError, match="adapter 1: expected no DoRA, modules_to_save"):
        stack_adapters(Transformer(TINY), [given, replace(given, tensors=given.tensors | matrix)])
    with pytest.raises(ValueError, match="expected the same adapter for a child and its parent"):
        pack([[1], [2]], [-1, 0], adapters=[0, 1])
    with pytest.raises(ValueError, match="expected one for each of 2 sequences, got 1"):
        pack([[1], [2]], adapters=[0])
    with pytest.raises(InputError, match="expected at most one adapter, got several side by side"):
        save_model(several()[2], "nowhere")


def test_an_adapter_given_to_another_model():
    adapter = take_adapter(tiny())
    wide = Transformer(replace(TINY, intermediate_size=32))
    with pytest.raises(InputError, match=r"here: .*_proj.lora_.\.weight: expected shape"):
        give_adapter(wide, adapter, "here")


# ---- on experts

EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


@pytest.mark.parametrize("parameters", [EXPERTS, EXPERTS[1:]], ids=["both", "down"])
@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss", "qwen3_moe"])
def test_an_adapter_of_experts(data, tmp_path, architecture, parameters):
    """Fresh, disabled, merged, copied, saved, loaded; and what PEFT, where it is installed, makes of the file."""
    base = data / "tiny-hf" / architecture
    model = load_model(base)
    before = logits_of(model)
    options = {
        "targets": ("q_proj",),
        "parameters": parameters,
        "alpha_pattern": {r".*experts\.down_proj": 5},
    }

    add_lora(model, 3, base=str(base), **options)
    assert torch.equal(logits_of(model), before) and is_fresh(model)
    trained(model)
    after = logits_of(model)
    assert not torch.allclose(after, before, atol=1e-3)
    with adapter_disabled(model):
        assert torch.equal(logits_of(model), before)

    reference = frozen_copy(model)
    save_model(model, tmp_path / "adapter")
    again = load_model(tmp_path / "adapter")
    assert torch.equal(logits_of(again), after) and torch.equal(logits_of(reference), after)
    merge_lora(again)
    torch.testing.assert_close(logits_of(again), after, atol=1e-5, rtol=1e-5)
    keys = load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    assert any("experts.base_layer.lora_A" in key for key in keys) == (len(parameters) == 2)

    # PEFT's own model of the file, and its file
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    plain = transformers.AutoModelForCausalLM.from_pretrained(base)
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter")
    ids = [1, 5, 9, 4, 7]
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(logits_of(model, pack([ids])), expected, atol=1e-5, rtol=1e-5)
    theirs.save_pretrained(tmp_path / "again")
    assert torch.equal(logits_of(load_model(tmp_path / "again"), pack([ids])), logits_of(model, pack([ids])))


@pytest.mark.parametrize("options", [{"dropout": 0.1}, {"dora": True}])
def test_experts_have_neither_dropout_nor_dora(data, options):
    model = load_model(data / "tiny-hf" / "mixtral")
    with pytest.raises(
        InputError, match=r"experts.*: an adapter of experts can have neither dropout nor DoRA"
    ):
        add_lora(model, 3, parameters=EXPERTS, **options)


def test_experts_in_4_bits_under_an_adapter(data, tmp_path):
    base = data / "tiny-hf" / "qwen3_moe"
    model = load_model(base, base_4bit=True)
    experts = [layer for layer in linears(model).values() if layer.stack]
    assert len(experts) == 4 and all(layer.four_bit is not None and layer.weight is None for layer in experts)
    add_lora(model, 3, base=str(base), targets=("q_proj",), parameters=EXPERTS)
    trained(model)
    after = logits_of(model)

    save_model(model, tmp_path / "adapter")
    again = load_model(tmp_path / "adapter")  # which says that its base was quantised
    assert torch.equal(logits_of(again), after)
    merge_lora(again)
    torch.testing.assert_close(logits_of(again), after, atol=1e-5, rtol=1e-5)
    save_model(again, tmp_path / "merged")
    assert torch.equal(logits_of(load_model(tmp_path / "merged")), logits_of(again))
    with pytest.raises(
        InputError, match="expected dense experts, got 4-bit ones, which the format cannot hold"
    ):
        save_model(load_model(base, base_4bit=True), tmp_path / "four")
