"""config.json key by key: stored logits of transformers for changed keys, and the config.json of published folders."""

import json

import pytest
import torch
from burnish.model import InputError, Transformer, pack
from burnish.model.checkpoint import load_model
from burnish.model.config import Latent, ModelConfig
from burnish.model.files.architectures import ARCHITECTURES, INERT, ROPE_INERT, loadable
from burnish.model.files.config_json import read_config, write_config
from burnish.model.generate import SamplingParams, generate
from faults import check_of, control, faults_of
from folders import GOLDEN
from planted import plant

MISSING = "(missing)"  # as make_config_mutations.py writes it
MINIMAL = {
    **{"vocab_size": 8, "hidden_size": 16, "intermediate_size": 4, "num_hidden_layers": 6},
    **{"num_attention_heads": 4, "num_key_value_heads": 4},
}


@control
def check_stored(data, name: str) -> None:
    """Our logits are those of transformers after each change, or the change is refused."""
    stored = json.loads((data / "config_mutations.json").read_text())["golden"][name]
    folder = data / "tiny-hf" / name
    raw = json.loads((folder / "config.json").read_text())
    state = load_model(folder).state_dict()
    ids = torch.randint(3, 96, (1, 24), generator=torch.Generator().manual_seed(5))[0].tolist()

    for row in stored:
        changed = {key: value for key, value in (raw | row["change"]).items() if value != MISSING}
        if row["logits"] is None:
            with pytest.raises(InputError):
                read_config(changed)
            continue
        model = Transformer(read_config(changed), device="meta")
        model.load_state_dict(state, assign=True)
        with torch.no_grad():
            found = model.logits(model(pack([ids]))[-1])[:4]
        assert (found - torch.tensor(row["logits"])).abs().max() < 1e-5, row["change"]


@pytest.mark.parametrize("name", GOLDEN)
def test_a_changed_key_gives_the_logits_of_transformers_or_is_refused(data, name):
    check_stored(data, name)


def check_published(data, name: str) -> None:
    raw = json.loads((data / "published_configs.json").read_text())[name]
    config = read_config(raw, name)
    assert read_config(write_config(config)) == config


def test_published_configs_are_read(data):
    for name in json.loads((data / "published_configs.json").read_text()):
        check_published(data, name)


def test_what_published_configs_say(data):
    read = {
        name: read_config(raw)
        for name, raw in json.loads((data / "published_configs.json").read_text()).items()
    }
    assert read["google/gemma-3-1b-it"].windows[:6] == (512,) * 5 + (None,)
    assert read["google/gemma-3-1b-it"].windows == read["google/gemma-3-1b-it"].windows[:6] * 4 + (512, 512)
    gpt_oss = read["openai/gpt-oss-20b"]
    assert (gpt_oss.rope.factor, gpt_oss.rope.truncate, gpt_oss.rope_layers[0]) == (32.0, False, True)
    moonlight = read["moonshotai/Moonlight-16B-A3B"]
    assert moonlight.latent is not None and moonlight.latent.q_rank == 0
    assert moonlight.experts is not None and moonlight.experts.layers == (False,) + (True,) * 26


@control
def check_rules(data, name: str) -> None:
    """Rules of a config that no logits of tiny-hf show."""
    minimal = {"model_type": name, **MINIMAL}
    for value in (False, 0, "", [], {}, 0.0, True):
        with pytest.raises(InputError, match=f"somebodys_key: not supported for {name}, got"):
            read_config({**minimal, "somebodys_key": value})
    for key, value in (("somebodys_key", None), ("_somebodys_key", 3)):
        read_config({**minimal, key: value})
    for key, value in (("is_causal", 1), ("attention_dropout", False)):
        with pytest.raises(InputError, match=f"{key}: expected"):
            read_config({**minimal, key: value})
    if name == "llama":
        yarn = {"rope_type": "yarn", "factor": 4.0, "truncate": None}
        assert read_config({**minimal, "rope_parameters": yarn}).rope.truncate is False
    if name == "gemma3_text":  # transformers does not look at `type` here
        with pytest.raises(InputError, match="factor: not supported for rope_type default"):
            read_config({**minimal, "rope_scaling": {"type": "linear", "factor": 8.0}})


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_rules_for_unknown_keys_and_values_that_python_takes_for_others(data, model_type):
    check_rules(data, model_type)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_inert_keys_change_no_field(model_type):
    minimal = {"model_type": model_type, **MINIMAL}
    inert = INERT | ARCHITECTURES[model_type].inert
    expected = read_config(minimal)
    for key in inert:
        assert read_config(minimal | {key: 3}) == expected, key
    assert all(len(reason.split()) > 3 for reason in inert.values())


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.parametrize(
    "change",
    [{"is_causal": False}, {"is_causal": None}, {"is_encoder_decoder": True}, {"pruned_heads": {"0": [1]}}],
)
def test_another_model_than_the_decoder_is_refused(model_type, change):
    with pytest.raises(
        InputError, match=f"config.json: {next(iter(change))}: expected .* nothing else is supported"
    ):
        read_config({"model_type": model_type, **MINIMAL, **change})


@pytest.mark.parametrize(
    "model_type, keys, message",
    [
        (
            "mixtral",
            {"num_experts_per_tok": 9},
            "num_experts_per_tok: expected at most num_local_experts=8, got 9",
        ),
        (
            "mixtral",
            {"num_experts": 4, "num_local_experts": 8},
            "num_experts: expected 8, as num_local_experts says",
        ),
        (
            "mixtral",
            {"norm_topk_prob": False},
            "norm_topk_prob: expected True, nothing else is supported, got False",
        ),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise: expected 0.0"),
        ("gpt_oss", {"norm_topk_prob": False}, "norm_topk_prob: expected True"),
        (
            "gpt_oss",
            {"experts_per_token": 2},
            "experts_per_token: expected 4, as num_experts_per_tok says, got 2",
        ),
        ("gpt_oss", {"sliding_window": None}, "sliding_window: expected a positive integer, got None"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv: expected None"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention: expected False"),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping: expected None"),
        (
            "gemma3_text",
            {"rope_parameters": {"rope_theta": 1e4}},
            "rope_parameters.rope_theta: expected full_attention",
        ),
        (
            "deepseek_v3",
            {"n_group": 3},
            "n_group: expected equal groups of two or more of.*n_routed_experts=256.*got 3",
        ),
        ("deepseek_v3", {"n_group": 256}, "n_group: expected equal groups of two or more"),
        ("deepseek_v3", {"topk_group": 9}, "topk_group: expected at most n_group=8, got 9"),
        (
            "deepseek_v3",
            {"topk_group": 1, "num_experts_per_tok": 33},
            "expected at most 32, the experts in 1 groups",
        ),
        (
            "deepseek_v3",
            {"num_key_value_heads": 2},
            "num_key_value_heads: expected num_attention_heads=4, got 2",
        ),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func: expected 'sigmoid'"),
        ("llama", {"rope_theta": float("nan")}, "rope_theta: expected a number >= 0, got nan"),
        ("llama", {"rope_theta": 10**400}, "rope_theta: expected a number >= 0"),
        ("llama", {"rope_scaling": {"type": "su"}}, "rope_scaling.rope_type: expected one of .* got 'su'"),
        (
            "llama",
            {"rope_scaling": {"type": "linear", "factor": True}},
            "factor: expected a number above 0, got True",
        ),
        (
            "llama",
            {"rope_scaling": {"type": "linear", "factor": 0}},
            "factor: expected a number above 0, got 0",
        ),
        (
            "llama",
            {"rope_scaling": {"type": "linear", "factor": 10**30}},
            "factor: expected a number from 1e-09 to 1e[+]15",
        ),
        *(
            (
                "llama",
                {"rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": size}},
                "original_max_position_embeddings: expected an integer above 0, up to 2147483647, got",
            )
            for size in (0.5, 64.0, True, 0, 2**31)
        ),
        (
            "llama",
            {"rope_theta": 1e30},
            "rope_theta: expected a number above 1, up to 1e[+]15, got 1e[+]30",
        ),
        ("llama", {"hidden_size": 2**63}, "hidden_size: expected at most 2147483647"),
        ("llama", {"num_hidden_layers": 10**30}, "num_hidden_layers: expected at most 10000"),
        (
            "olmoe",
            {"num_local_experts": float("nan")},
            "num_local_experts: expected nan, as num_experts says",
        ),
        ("qwen3_moe", {"shared_expert_intermediate_size": 8}, "expected 0, nothing else is supported, got 8"),
        ("qwen3_moe", {"use_qk_norm": False}, "use_qk_norm: expected True, nothing else is supported"),
        ("llama", {"model_type": ["llama"]}, "model_type: expected one of"),
    ],
)
def test_what_cannot_be_computed_is_said_at_loading(model_type, keys, message):
    with pytest.raises(InputError, match=message):
        read_config({"model_type": model_type, **MINIMAL, **keys})


@pytest.mark.parametrize("key", ["hidden_size", "layer_types", "rope_scaling", "k" * 5000, "bos_token_id"])
@pytest.mark.parametrize("value", ["v" * 5000, [0] * 5000, {"k" * 5000: 1}, "two\nlines"])
def test_a_refusal_is_one_short_line(key, value):
    with pytest.raises(InputError) as caught:
        read_config({"model_type": "llama", **MINIMAL, key: value})
    assert len(str(caught.value)) < 600 and "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ROPE_INERT)
def test_inert_keys_of_rope_change_no_field(key):
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    plain, noted = (
        read_config({"model_type": "llama", **MINIMAL, "rope_scaling": rope})
        for rope in (yarn, yarn | {key: 0.9})
    )
    assert plain == noted


def test_absent_windows_and_ropes_are_those_of_transformers():
    of = lambda model_type, **keys: read_config({"model_type": model_type, **MINIMAL, **keys})
    sliding = {"sliding_window": 7, "use_sliding_window": True}
    assert of("qwen3_moe", **sliding).windows == (7,) * 6
    assert of("qwen2_moe", **sliding, max_window_layers=3).windows == (7, None, 7, None, None, None)
    assert of("qwen2", **sliding, max_window_layers=3).windows == (None, None, None, 7, 7, 7)
    assert of("gpt_oss").windows == (128, None) * 3
    assert of("gemma3_text", sliding_window_pattern=2).windows == (4096, None) * 3
    rope = of("gpt_oss").rope
    assert (rope.rope_type, rope.factor, rope.original_max_position_embeddings) == ("yarn", 32.0, 4096)
    assert of("gpt_oss", rope_parameters={}).rope.rope_type == "default"
    assert (of("llama").eos_token_id, of("olmoe").pad_token_id, of("qwen3").eos_token_id) == (2, 1, None)


def test_values_wider_than_keys_in_latent_attention():
    """The cache gives the tokens that the whole sequence gives."""
    latent = Latent(kv_rank=8, nope_dim=6, rope_dim=4, value_dim=24)
    config = ModelConfig(31, 16, 24, 2, 2, head_dim=10, latent=latent, initializer_range=0.4)
    model = Transformer(config, seed=1)
    prompt = [3, 1, 4, 1, 5]
    (sample,) = generate(model, [prompt], SamplingParams(max_new_tokens=6, temperature=0))
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(6):
            ids.append(int(model.logits(model(pack([ids]))[-1]).argmax()))
    assert sample.tokens == ids[5:]


def test_every_architecture_has_a_golden_folder(data):
    configs = [json.loads((data / "tiny-hf" / name / "config.json").read_text()) for name in GOLDEN]
    assert {config["model_type"] for config in configs} == ARCHITECTURES.keys()


def test_what_loads_is_told_from_the_table():
    assert [row[0] for row in loadable()] == [*ARCHITECTURES]
    assert all(row[1].endswith("ForCausalLM") and row[2] for row in loadable())


# ---- planted faults


@pytest.mark.parametrize("fault", faults_of(__file__), ids=lambda fault: fault.id)
def test_a_planted_fault_is_caught(fault, data, monkeypatch):
    plant(fault, monkeypatch)
    with pytest.raises((AssertionError, pytest.fail.Exception, InputError)):
        check_of(fault)(data, fault.on)
