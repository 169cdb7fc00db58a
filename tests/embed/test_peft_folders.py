"""Adapter folders that PEFT has just written, and ours read by PEFT: the same logits, the same gradients.

On an untied base (llama) and on a tied one (qwen2), whose head PEFT takes from the embedding once it is adapted.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from burnish.algorithms.run.targets import placed
from burnish.model import InputError, pack
from burnish.model.adapter import adapter_disabled, add_lora, linears, merge_lora, place_adapter
from burnish.model.checkpoint import load_model, load_scalar_model, save_model
from safetensors.torch import load_file, save_file
from torch import Tensor

peft = pytest.importorskip("peft", reason="PEFT is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

IDS = torch.tensor([[1, 5, 9, 4, 7, 30, 2]])
BASES = ["llama", "qwen2"]
HEADS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ["q_proj", "lm_head"]},
    "dora": {"target_modules": ["q_proj", "lm_head"], "use_dora": True},
    "dropout": {"target_modules": ["q_proj", "lm_head"], "lora_dropout": 0.3},
    "one layer": {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [1]},
    "pattern": {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
    "both whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "embedding whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "head whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "head adapted, embedding whole": {
        "target_modules": ["q_proj", "lm_head"],
        "modules_to_save": ["embed_tokens"],
    },
    "tied": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "tied, both named": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens", "lm_head"],
        "ensure_weight_tying": True,
    },
    "transposed, as of GPT-2": {"target_modules": ["q_proj"], "fan_in_fan_out": True},
    "eva": {"target_modules": ["q_proj"], "init_lora_weights": "eva"},
}


def trained(
    base: Path, seed: int = 0, dtype: torch.dtype = torch.float32, kind: Any = None, **options: Any
) -> Any:
    """A PEFT model with an adapter that does something. kind: its class, a language model's by default."""
    if kind is None:
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    else:
        model = one_label(base, kind)
    config = peft.LoraConfig(r=2, lora_alpha=4, **{"task_type": "CAUSAL_LM", **options})
    model = peft.get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model


def one_label(base: Path, kind: Any) -> Any:
    return kind.from_pretrained(base, num_labels=1, dtype=torch.float32)


@torch.no_grad()
def logits_of(theirs: Any) -> Tensor:
    return theirs(IDS).logits[0]


@torch.no_grad()
def ours_of(model: Any) -> Tensor:
    return model.logits(model(pack(IDS.tolist())))


def read_by_peft(base: Path, adapter: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(model, adapter).eval()


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", HEADS)
def test_it_is_read_saved_merged_and_switched_off(data, tmp_path, base, name):
    base = data / "tiny-hf" / base
    theirs = trained(base, **HEADS[name])
    expected = logits_of(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    model = load_model(tmp_path / "adapter")
    torch.testing.assert_close(ours_of(model), expected, atol=2e-5, rtol=1e-5)
    with adapter_disabled(model):
        torch.testing.assert_close(ours_of(model), ours_of(load_model(base)), atol=0, rtol=0)

    save_model(model, tmp_path / "saved")
    torch.testing.assert_close(logits_of(read_by_peft(base, tmp_path / "saved")), expected, atol=1e-6, rtol=0)
    assert torch.equal(ours_of(load_model(tmp_path / "saved")), ours_of(model))

    # a plain folder computes the same, in transformers, too: a tied base is no longer tied where it must not be
    merge_lora(model)
    save_model(model, tmp_path / "merged")
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits_of(whole.eval()), expected, atol=5e-5, rtol=1e-5)
    torch.testing.assert_close(ours_of(load_model(tmp_path / "merged")), expected, atol=5e-5, rtol=1e-5)


FLAGS: list[tuple[str, tuple[str, ...], dict[str, Any]]] = [  # a base, --lora-targets, and other flags
    ("llama", (), {"rslora": True}),
    ("llama", ("all-linear",), {"dora": True}),
    ("llama", ("q_proj", "down_proj", "lm_head"), {"dora": True, "rslora": True, "dropout": 0.3}),
    ("qwen2", (r".*\.0\..*(q|up)_proj",), {"dora": True}),
    ("mixtral", ("q_proj", "down_proj"), {"rslora": True}),
    ("mixtral", (r".*(q|down)_proj",), {}),
    ("qwen2_moe", ("shared_expert.down_proj", "q_proj"), {"dora": True}),
    ("qwen2_moe", ("all-linear",), {}),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("base", "targets", "options"), FLAGS)
def test_an_adapter_by_flags_is_read_by_peft(data, tmp_path, base, targets, options):
    base = data / "tiny-hf" / base
    model = load_model(base)
    add_lora(model, 3, 5.0, base=str(base), **placed(targets, linears(model)), **options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    save_model(model, tmp_path / "adapter")

    theirs = read_by_peft(base, tmp_path / "adapter")
    torch.testing.assert_close(logits_of(theirs), ours_of(model), atol=2e-5, rtol=1e-5)
    with torch.no_grad(), theirs.disable_adapter():
        assert (theirs(IDS).logits[0] - ours_of(model)).abs().max() > 0.01  # the adapter does something


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", ["lora", "dora", "both whole", "embedding whole", "tied"])
def test_its_gradient_is_that_of_peft(data, tmp_path, base, name):
    theirs = trained(data / "tiny-hf" / base, **HEADS[name])
    theirs.save_pretrained(tmp_path / "adapter")
    theirs.train()(IDS, labels=IDS).loss.backward()
    expected = {
        key.replace(".default", "").replace(".modules_to_save", ""): parameter.grad
        for key, parameter in theirs.named_parameters()
        if parameter.grad is not None
    }

    model = load_model(tmp_path / "adapter").train()
    packed = pack(IDS.tolist())
    model.score(packed, torch.arange(1, IDS.shape[1]))[0].mean().neg().backward()
    found = {
        key: parameter.grad
        for key, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.grad is not None
    }

    assert len(found) == len(expected)
    for key, gradient in found.items():
        filed = key.replace(".lora.a", ".lora_A.weight").replace(".lora.b", ".lora_B.weight")
        filed = filed.replace(".lora.magnitude", ".lora_magnitude_vector.weight")
        filed = f"base_model.model.{filed if filed.startswith('lm_head') else f'model.{filed}'}"
        torch.testing.assert_close(gradient, expected[filed], atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", ["lora", "both whole", "tied"])
def test_it_keeps_its_dtypes(data, tmp_path, base, name):
    """Adapters are fp32 on a bf16 base, what is trained whole is bf16. A fresh one of ours is written so, too."""
    save_model(load_model(data / "tiny-hf" / base), tmp_path / "base", dtype=torch.bfloat16)
    trained(tmp_path / "base", dtype=torch.bfloat16, **HEADS[name]).save_pretrained(tmp_path / "adapter")
    model = load_model(tmp_path / "adapter")
    save_model(model, tmp_path / "saved")
    fresh = load_model(tmp_path / "base")
    place_adapter(fresh, model.adapter, "here")
    save_model(fresh, tmp_path / "fresh")
    theirs, saved, ours = (
        load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("adapter", "saved", "fresh")
    )
    assert {tensor.dtype for tensor in theirs.values()} == {torch.float32, torch.bfloat16}
    assert saved.keys() == ours.keys() == {key for key in theirs if ".base_layer." not in key}
    for key, tensor in saved.items():
        assert tensor.dtype == ours[key].dtype == theirs[key].dtype and torch.equal(tensor, theirs[key]), key


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("base", BASES)
def test_embeddings_that_were_trained_beside_it_are_read_over_the_base(data, tmp_path, base):
    """save_embedding_layers=True writes both matrices; PEFT reads them over the base's."""
    base = data / "tiny-hf" / base
    theirs = trained(base, target_modules=["q_proj"])
    theirs.save_pretrained(tmp_path / "copies", save_embedding_layers=True)
    torch.testing.assert_close(ours_of(load_model(tmp_path / "copies")), logits_of(theirs), atol=1e-5, rtol=0)
    assert load_model(tmp_path / "copies").adapter.modules_to_save == ()

    with torch.no_grad():
        theirs.get_input_embeddings().weight[3:9] += 0.2
        theirs.get_output_embeddings().weight[5] -= 0.1
    theirs.save_pretrained(tmp_path / "trained", save_embedding_layers=True)
    expected = logits_of(read_by_peft(base, tmp_path / "trained"))
    model = load_model(tmp_path / "trained")
    torch.testing.assert_close(ours_of(model), expected, atol=1e-5, rtol=0)
    save_model(model, tmp_path / "saved")
    torch.testing.assert_close(logits_of(read_by_peft(base, tmp_path / "saved")), expected, atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("base", BASES)
def test_a_reward_model_of_theirs_is_read_and_saved(data, tmp_path, base):
    """PEFT names score and classifier, whichever the model has; the base is a language model under a fresh head."""
    base = data / "tiny-hf" / base
    kind = transformers.AutoModelForSequenceClassification
    theirs = trained(base, kind=kind, task_type="SEQ_CLS", target_modules=["q_proj", "down_proj"])
    expected = theirs(IDS).logits[0, 0]
    theirs.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert sorted(config["modules_to_save"]) == ["classifier", "score"]

    model, last = load_scalar_model(tmp_path / "adapter"), torch.tensor([IDS.shape[1] - 1])
    torch.testing.assert_close(model.values(pack(IDS.tolist()), last)[0], expected, atol=1e-5, rtol=1e-5)
    save_model(model, tmp_path / "saved")
    again = peft.PeftModel.from_pretrained(one_label(base, kind), tmp_path / "saved").eval()
    torch.testing.assert_close(again(IDS).logits[0, 0], expected, atol=1e-6, rtol=0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("base", BASES)
def test_another_base_under_an_adapter_of_the_head_is_refused(data, tmp_path, base):
    trained(data / "tiny-hf" / base, target_modules=["lm_head"]).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.lm_head.base_layer.weight"
    tensors[key][7] *= 1.01
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lm_head\.base_layer\.weight: expected a copy of the base's"):
        load_model(tmp_path / "adapter")
    save_file(tensors | {key: torch.cat([tensors[key]] * 2)}, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"base_layer.weight: expected the base's shape .* was resized"):
        load_model(tmp_path / "adapter")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["q_proj", "embed_tokens"]}, "target_modules: .*adapter of the embedding is not"),
        (
            {"target_modules": ["q_proj"], "trainable_token_indices": [3, 4]},
            "trainable_token_indices: expected null",
        ),
        ({"target_modules": ["q_proj"], "bias": "lora_only"}, "bias: expected null"),
        ({"target_modules": ["q_proj"], "lora_bias": True}, "lora_bias: expected null"),
        ({"target_modules": ["q_proj"], "alora_invocation_tokens": [5]}, "alora_invocation_tokens: expected"),
        (
            {"target_modules": ["q_proj"], "layer_replication": [[0, 2], [1, 2]]},
            "layer_replication: expected",
        ),
        ({"target_modules": ["q_proj"], "init_lora_weights": "pissa"}, "init_lora_weights: expected"),
    ],
    ids=lambda value: next(reversed(value)) if isinstance(value, dict) else "",
)
def test_what_would_compute_something_else_is_refused(data, tmp_path, base, options, message):
    trained(data / "tiny-hf" / base, **options).save_pretrained(tmp_path / "adapter")
    with pytest.raises(InputError, match=message) as refused:
        load_model(tmp_path / "adapter")
    assert "\n" not in str(refused.value)


def test_every_key_that_peft_knows_is_read_inert_or_refused():
    from burnish.model.files.peft import _INERT, _READ, _REFUSED

    names = peft.LoraConfig.__dataclass_fields__.keys()
    assert names <= _INERT | _READ | _REFUSED.keys()
