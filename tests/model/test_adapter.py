"""Adapters: against golden files of PEFT 0.21.2, and against the model that they are on."""

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from burnish.kernels import lora_linears, token_logprobs
from burnish.model import InputError, ModelConfig, Transformer, linear, pack, transformer
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
from burnish.model.adapters.config import LoraConfig
from burnish.model.checkpoint import load_model, load_scalar_model, read_adapter, save_model
from burnish.model.files import peft
from burnish.model.generate import generate
from burnish.model.linear import Linear
from burnish.model.scalar import ScalarModel
from safetensors.torch import load_file, save_file

GOLDEN = ["qwen3-lora", "qwen3-rslora", "qwen3-dora", "qwen3-rank_pattern"]
TINY = ModelConfig(
    vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
)
PACKED = pack([[1, 2, 3, 4, 5], [6, 7, 8]], device="cpu")
ROWS = torch.tensor([1, 2, 4, 7])


@pytest.fixture
def adapter_folder(data, tmp_path):
    """A function of a golden adapter's name: a copy to break, its base where the file says."""

    def copied(name: str) -> Path:
        shutil.copytree(data / "tiny-hf" / "qwen3", tmp_path / "qwen3", dirs_exist_ok=True)
        folder = Path(shutil.copytree(data / "tiny-peft" / name, tmp_path / name))
        edit(folder, base_model_name_or_path="../qwen3")
        return folder

    return copied


def edit(folder: Path, **changes) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


@torch.no_grad()
def logits_of(model, packed=PACKED) -> torch.Tensor:
    return model.logits(model(packed))


def trained(model: Transformer | ScalarModel, seed: int = 0) -> None:
    """Stand-in for training: every adapter becomes something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def tiny(seed: int = 1, **options) -> Transformer:
    model = Transformer(replace(TINY, initializer_range=0.2), seed=seed)
    add_lora(model, 3, **options)
    return model


# ---- against PEFT


@pytest.mark.parametrize("name", GOLDEN)
def test_logits_are_those_of_peft(adapter_folder, data, name):
    model = load_model(adapter_folder(name))
    golden = load_file(data / "tiny-hf" / "qwen3" / "expected.safetensors")
    expected = load_file(data / "tiny-peft" / name / "expected.safetensors")["logits"]
    mask = golden["attention_mask"] == 1
    packed = pack([row[m].tolist() for row, m in zip(golden["input_ids"], mask, strict=True)])
    torch.testing.assert_close(logits_of(model, packed), expected[mask], atol=1e-5, rtol=0)
    assert not torch.allclose(golden["logits"][mask], expected[mask], atol=1e-3)  # the adapter does something
    merge_lora(model)
    torch.testing.assert_close(logits_of(model, packed), expected[mask], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", GOLDEN)
def test_what_is_saved_is_what_was_loaded(adapter_folder, tmp_path, name):
    source = adapter_folder(name)
    model = load_model(source)
    save_model(model, tmp_path / "saved")
    saved, was = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "saved", source))
    assert saved.keys() == was.keys() and all(torch.equal(saved[key], was[key]) for key in was)
    now, before = (
        json.loads((at / "adapter_config.json").read_text()) for at in (tmp_path / "saved", source)
    )
    assert now["base_model_name_or_path"] == "../qwen3"
    assert now.items() <= before.items()
    assert torch.equal(logits_of(load_model(tmp_path / "saved")), logits_of(model))


def test_modules_trained_whole_and_a_head_with_an_adapter_are_saved(tmp_path):
    save_model(Transformer(TINY, seed=1), tmp_path / "base")
    model = load_model(tmp_path / "base")
    base = str(tmp_path / "base")
    options = {"targets": ("q_proj", "lm_head"), "modules_to_save": ("norm", "embed_tokens"), "base": base}
    add_lora(model, 3, 5, **options)
    before = logits_of(model)
    trained(model)
    after = logits_of(model)
    save_model(model, tmp_path / "adapter")
    keys = load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    assert {"base_model.model.lm_head.lora_A.weight", "base_model.model.model.embed_tokens.weight"} <= keys
    again = load_model(tmp_path / "adapter")
    torch.testing.assert_close(logits_of(again), after)
    with adapter_disabled(again):
        assert torch.equal(logits_of(again), before)
    assert torch.equal(logits_of(again), logits_of(model))
    merge_lora(again)
    torch.testing.assert_close(logits_of(again), after, atol=1e-5, rtol=1e-5)


def test_which_modules_a_config_names():
    names = linears(Transformer(TINY)).keys()
    q0, q1 = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"
    some = lambda **options: [name for name in names if LoraConfig(4, 8, **options).targeted(name)]
    assert len(some()) == 14 and "lm_head" not in some()
    assert some(targets=("q_proj",)) == [q0, q1]
    assert some(targets=("q_proj",), layers=(1,)) == [q1]
    assert some(targets=("q_proj",), exclude=("layers.0.self_attn.q_proj",)) == [q1]
    assert some(targets=r".*\.1\..*q_proj") == [q1]
    assert some(targets=("q_proj",), layers=(1,), layers_pattern=("h", "layers")) == [q1]
    assert some(targets=("q_proj",), layers=(1,), layers_pattern=("h",)) == []
    assert some(targets=(q0, "v_proj", "lm_head"), layers=(1,)) == [q0, q1.replace("q_", "v_"), "lm_head"]
    assert some(targets=("q_proj", "lm_head"), modules_to_save=("lm_head",)) == [q0, q1]
    config = LoraConfig(4, 8, rank_pattern={"0.self_attn.q_proj": 16}, alpha_pattern={"q_proj": 32})
    assert [config.rank_of(name) for name in (q0, q1)] == [16, 4]
    assert [config.scaling_of(name) for name in (q0, q1, "model.layers.0.mlp.up_proj")] == [2, 8, 2]
    assert replace(config, rslora=True).scaling_of(q0) == 32 / 4


# the second base is tied: its head is no module that an adapter could have
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rslora": True, "dropout": 0.1},
        {"dora": True, "targets": ("q_proj", "down_proj"), "layers": (1,)},
        {
            "rank_pattern": {"q_proj": 5},
            "alpha_pattern": {"layers.0.mlp.up_proj": 3},
            "modules_to_save": ("norm",),
        },
        {"targets": r".*\.0\..*_proj", "exclude": ("v_proj",)},
    ],
    ids=["lora", "rslora", "dora", "patterns", "expression"],
)
def test_peft_loads_what_we_save(data, tmp_path, architecture, options):
    library, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base = data / "tiny-hf" / architecture
    model = load_model(base)
    add_lora(model, 3, base=str(base), **options)
    trained(model)
    save_model(model, tmp_path / "adapter")
    theirs = library.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter"
    )
    ids = [1, 5, 9, 4, 7]
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(logits_of(model, pack([ids])), expected, atol=1e-5, rtol=1e-5)
    theirs.save_pretrained(tmp_path / "again")
    assert torch.equal(logits_of(load_model(tmp_path / "again"), pack([ids])), logits_of(model, pack([ids])))


# ---- what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type: expected LORA, got 'IA3'"),
        ({"r": 0}, "r: expected a number of at least 1 and below 2147483647, got 0"),
        (
            {"lora_bias": True},
            "lora_bias: expected null or false, for what it asks for is not supported, got",
        ),
        ({"bias": "all"}, 'bias: expected null or "none", for what it asks for is not supported, got'),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: expected an initialisation"),
        ({"use_of_tomorrow": False}, "use_of_tomorrow: expected null, for the key is not known .*got False"),
        ({"use_of_tomorrow": 0}, "use_of_tomorrow: expected null, .*got 0"),
        ({"lora_bias": 0}, "lora_bias: expected null or false, .*got 0"),
        ({"enable_lora": False}, "enable_lora: expected null, .*got False"),
        ({"enable_lora": [True, False, True]}, "enable_lora: expected null"),
        ({"trainable_token_indices": {"embed_tokens": [3]}}, "trainable_token_indices: expected null"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication: expected null"),
        ({"megatron_config": {"tensor": 2}}, "megatron_config: expected null"),
        ({"alora_invocation_tokens": [4]}, "alora_invocation_tokens: expected null"),
        ({"arrow_config": {"top_k": 3}}, "arrow_config: expected null"),
        ({"use_qalora": True}, "use_qalora: expected null or false"),
        ({"init_lora_weights": "corda", "corda_config": {}}, "init_lora_weights: expected an initialisation"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "an adapter of the embedding is not supported"),
        ({"lora_alpha": float("inf")}, "lora_alpha: expected a number of at least 0, got inf"),
        ({"lora_dropout": 1.0}, "lora_dropout: expected a number of at least 0 and below 1, got 1.0"),
        ({"use_dora": 0}, "use_dora: expected true or false, got 0"),
        ({"use_rslora": ""}, "use_rslora: expected true or false, got ''"),
        ({"rank_pattern": False}, "rank_pattern: expected whole numbers of at least 1, by module, got False"),
        ({"layers_to_transform": False}, "layers_to_transform: expected layer numbers, got False"),
        ({"layers_to_transform": [True]}, r"layers_to_transform: expected layer numbers, got \[True\]"),
        ({"modules_to_save": "lm_head"}, "modules_to_save: expected a list of names, got 'lm_head'"),
        (
            {"layers_to_transform": [0], "layers_pattern": "lay("},
            "layers_pattern: expected a regular expression",
        ),
        (
            {"layers_to_transform": [0], "target_modules": ".*q_proj"},
            "layers_to_transform: expected null beside a regular expression",
        ),
        ({"target_modules": "q_proj("}, r"target_modules: expected a regular expression, got 'q_proj\('"),
        ({"target_modules": ["w_proj"]}, "target_modules: .*names no linear layer"),
        ({"modules_to_save": ["heads"]}, "modules_to_save: the model has no module 'heads'"),
        (
            {"base_model_name_or_path": "nowhere"},
            "base_model_name_or_path: expected a model folder, found none at 'nowhere'",
        ),
        (
            {"base_model_name_or_path": None},
            "base_model_name_or_path: expected a model folder, found none at None",
        ),
        ({"base_model_name_or_path": "x" * 5000}, "found none at 'xxx"),
        ({"base_model_name_or_path": "a\0b"}, "found none at 'a"),
        ({"r": 5}, r"q_proj.lora_A.weight: expected shape \(5, 32\), got \(4, 32\)|expected shape \(5, 48\)"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_by_name(adapter_folder, changes, message):
    folder = adapter_folder("qwen3-lora")
    edit(folder, **changes)
    with pytest.raises(InputError, match=f"qwen3-lora.*{message}"):
        load_model(folder)


def of_version(version: str) -> dict:
    """adapter_config.json as PEFT of that version writes it, for the same adapter."""
    config = {
        **{
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": "x",
            "inference_mode": True,
        },
        **{"r": 4, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"]},
        **{"fan_in_fan_out": False, "bias": "none", "modules_to_save": None},
    }
    added = {
        "0.2": {"enable_lora": None, "merge_weights": False},
        "0.3": {"init_lora_weights": True},
        "0.4": {"revision": None, "auto_mapping": None, "layers_to_transform": None, "layers_pattern": None},
        "0.6": {"rank_pattern": {}, "alpha_pattern": {}, "loftq_config": {}},
        "0.8": {"megatron_config": None, "megatron_core": "megatron.core", "use_rslora": False},
        "0.10": {"use_dora": False, "layer_replication": None},
        "0.14": {"eva_config": None, "exclude_modules": None, "lora_bias": False},
        "0.15": {"corda_config": None, "trainable_token_indices": None},
        "0.18": {
            **{
                "target_parameters": None,
                "use_qalora": False,
                "qalora_group_size": 16,
                "peft_version": "0.18.0",
            },
            **{"alora_invocation_tokens": None, "arrow_config": None, "ensure_weight_tying": False},
        },
        "0.21": {
            **{"use_bdlora": None, "lora_ga_config": None, "kasa_config": None, "velora_config": None},
            "monteclora_config": None,
        },
    }
    for name, keys in added.items():
        if version != "0.2" and name == "0.2":
            continue
        config |= keys
        if name == version:
            return config
    raise KeyError(version)


@pytest.mark.parametrize(
    "version", ["0.2", "0.3", "0.4", "0.6", "0.8", "0.10", "0.14", "0.15", "0.18", "0.21"]
)
def test_every_version_of_a_config_is_read(version):
    expected = LoraConfig(4, 16, targets=("q_proj", "v_proj"), base="x")
    raw = of_version(version)
    assert peft.read_config(raw, "here") == expected
    begun = {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}, "loftq_config": {"loftq_bits": 4}}
    assert peft.read_config(raw | begun | {"fan_in_fan_out": True}, "here") == expected
    assert peft.read_config(raw | {"layers_pattern": ""}, "here") == expected


KEY = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop(KEY),
            "q_proj.lora_B.weight: missing, although the adapter's config names its module",
        ),
        (
            lambda t: t.update({KEY.replace("q_proj", "k_proj"): t[KEY].clone()}),
            "k_proj.lora_B.weight: unexpected",
        ),
        (
            lambda t: t.update({"other": t[KEY].clone()}),
            "other: expected a name that begins base_model.model.",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_name(adapter_folder, change, message):
    folder = adapter_folder("qwen3-lora")
    edit_tensors(folder, change)
    with pytest.raises(InputError, match=message):
        load_model(folder)


def test_a_broken_file_and_a_pickled_one_are_named(adapter_folder):
    folder = adapter_folder("qwen3-lora")
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(InputError, match=r"adapter_model.safetensors: not a whole safetensors file"):
        load_model(folder)
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(InputError, match="found a pickled file, which is not read"):
        load_model(folder)


@pytest.mark.parametrize(
    "support", [None, torch.tensor([[2, 9], [3, -1], [5, 30], [8, 1]], dtype=torch.int32)]
)
def test_an_adapter_of_the_head_is_scored_without_being_merged(monkeypatch, support):
    model = tiny(targets=("q_proj", "lm_head"))
    torch.nn.init.normal_(model.lm_head.lora.b)
    hidden = model(PACKED)[PACKED.predictors[ROWS]]
    merged = token_logprobs(hidden, model.head, PACKED.tokens[ROWS], support=support)
    wanted = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad([part.sum() for part in merged], wanted, allow_unused=True)

    def never(self):
        raise AssertionError("the head's adapter was multiplied out")

    monkeypatch.setattr(Linear, "merged", never)
    found = model.score(PACKED, ROWS, support=support)
    torch.testing.assert_close(found, merged)
    torch.testing.assert_close(
        torch.autograd.grad([part.sum() for part in found], wanted, allow_unused=True), expected
    )
    assert any(g is not None and g.abs().max() > 0 for g in expected)
    with pytest.raises(AssertionError, match="multiplied out"), adapter_disabled(model):  # the patch is seen
        model.score(PACKED, ROWS)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_of_the_head_is_sampled_from_without_being_merged(monkeypatch, tied, dora):
    """Merging makes a matrix of all words for every token that is drawn."""
    model = Transformer(replace(TINY, initializer_range=0.2, tie_word_embeddings=tied), seed=1)
    add_lora(model, 3, targets=("q_proj", "lm_head"), dora=dora, dropout=0.5)
    trained(model)
    model.eval()
    merged = copy.deepcopy(model)
    merge_lora(merged)
    expected, greedy = logits_of(merged), generate(merged, [[1, 2]], max_new_tokens=6, temperature=0.0)

    def never(self):
        raise AssertionError("the head's adapter was multiplied out")

    monkeypatch.setattr(Linear, "merged", never)
    torch.testing.assert_close(logits_of(model), expected, atol=1e-5, rtol=1e-5)
    assert generate(model, [[1, 2]], max_new_tokens=6, temperature=0.0)[0].tokens == greedy[0].tokens
    with adapter_disabled(model):
        assert not torch.allclose(logits_of(model), expected, atol=1e-3)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_dropout_on_an_adapter_of_the_head(monkeypatch, tied, dora):
    """It acts in training, is what it is without where nothing is dropped, and leaves the base's half of x whole."""
    model = Transformer(replace(TINY, initializer_range=0.2, tie_word_embeddings=tied), seed=1)
    add_lora(model, 3, targets=("q_proj", "lm_head"), dora=dora, dropout=0.5)
    trained(model)
    quiet = frozen_copy(model)
    with torch.no_grad():
        assert torch.equal(model.score(PACKED, ROWS)[0], quiet.score(PACKED, ROWS)[0])
    model.layers[0].self_attn.q_proj.lora.dropout = model.layers[1].self_attn.q_proj.lora.dropout = 0.0
    one, other = (model.score(PACKED, ROWS)[0] for _ in range(2))
    assert not torch.equal(one, other)
    monkeypatch.setattr(linear.F, "dropout", lambda x, p: x)  # nothing is dropped
    wanted = [p for p in model.parameters() if p.requires_grad]
    dropped = model.score(PACKED, ROWS)
    found = torch.autograd.grad(dropped[0].sum(), wanted)
    for module in linears(model).values():
        if module.lora is not None:
            module.lora.dropout = 0.0
    whole = model.score(PACKED, ROWS)
    torch.testing.assert_close(dropped, whole)
    torch.testing.assert_close(found, torch.autograd.grad(whole[0].sum(), wanted))


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
    options = {"samples_per_prompt": 3, "max_new_tokens": 9, "stop_ids": {3, 4, 5, 6}}
    samples = generate(stacked, prompts, adapters=which, seed=7, **options)
    lengths = {len(sample.tokens) for sample in samples}
    assert len(lengths) > 2  # rows leave at different times
    for i, model in enumerate([*models, base]):
        alone = generate(model, prompts, seed=7, **options)
        ours = [n for n, sample in enumerate(samples) if which[sample.prompt_index] == (i if i < 3 else -1)]
        assert [samples[n].tokens for n in ours] == [alone[n].tokens for n in ours]


def test_what_shares_no_batch_is_refused():
    with pytest.raises(InputError, match="adapter 1: with DoRA"):
        stack_adapters(Transformer(TINY), [take_adapter(tiny()), take_adapter(tiny(dora=True))])
    given = take_adapter(tiny())
    matrix = {"model.embed_tokens.weight": torch.ones(TINY.vocab_size, TINY.hidden_size)}  # not the base's
    with pytest.raises(InputError, match="adapter 1: with DoRA, modules_to_save"):
        stack_adapters(Transformer(TINY), [given, replace(given, tensors=given.tensors | matrix)])
    with pytest.raises(ValueError, match="a child sees what its parent's adapter made"):
        pack([[1], [2]], [-1, 0], adapters=[0, 1])
    with pytest.raises(ValueError, match="expected one for each of 2 sequences, got 1"):
        pack([[1], [2]], adapters=[0])
    with pytest.raises(InputError, match="several adapters"):
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
    with pytest.raises(InputError, match=r"experts.*: an adapter of experts has neither dropout nor DoRA"):
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
    with pytest.raises(InputError, match="experts in 4 bits have no place"):
        save_model(load_model(base, base_4bit=True), tmp_path / "four")
