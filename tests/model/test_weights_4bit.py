"""Weights in 4 bits beside dense layers, as bitsandbytes writes them."""

import json
import re

import pytest
import torch
from burnish.model import InputError, weights
from burnish.model.adapter import add_lora, linears, merge_lora
from burnish.model.checkpoint import load_model, load_scalar_model, save_model
from burnish.model.generate import SamplingParams, generate
from burnish.model.scalar import ScalarModel
from folders import SMALL, UP, edit, quantized, rewrite, tensors_in
from tiny import PACKED, logits_of


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int8])
@pytest.mark.parametrize("options", [{}, {"double_quant": False, "quant_type": "fp4", "blocksize": 128}])
def test_4_bits_lie_in_numbers_of_any_dtype(folder, tmp_path, dtype, options):
    quantized(folder, lambda name: "_proj" in name, **options)
    expected, tensors = load_model(folder), tensors_in(folder)
    for name in tensors:
        if name.endswith("_proj.weight"):
            tensors[name] = tensors[name].flatten().view(dtype).reshape(-1, 1)

    rewrite(folder, tensors)
    edit(
        folder / "config.json",
        quantization_config={"load_in_4bit": True, "bnb_4bit_quant_storage": str(dtype)[6:]},
    )
    model = load_model(folder)
    assert torch.equal(logits_of(model), logits_of(expected))
    save_model(model, tmp_path / "saved")
    assert tensors_in(tmp_path / "saved")[f"{UP}.weight"].dtype == torch.uint8

    rewrite(folder, tensors | {f"{UP}.weight": tensors[f"{UP}.weight"][:-1]})
    with pytest.raises(
        InputError, match=rf"{UP}\.weight: expected 4096 bytes for a weight \(128, 64\) in 4 bits"
    ):
        load_model(folder)


@pytest.mark.parametrize(
    "state",
    [b"[", b"[" * 9000, b"null", b"\xff\xfe", b"{}", b"1" * 20_000, b'"s"', b'{"blocksize": Infinity}']
    + [
        json.dumps(
            {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [128, 64]} | change
        ).encode()
        for change in (
            {"blocksize": 10**30},
            {"blocksize": float("inf")},
            {"blocksize": 65},
            {"dtype": "nn"},
            {"dtype": ["float32"]},
            {"shape": None},
            {"shape": "x\n" * 2000},
            {"quant_type": ["nf4"]},
            {"nested_offset": float("nan")},
            {"nested_blocksize": {}},
        )
    ],
    ids=lambda state: repr(state[-30:]),
)
def test_a_state_that_is_none_ends_in_one_sentence(folder, state):
    quantized(folder, lambda name: "_proj" in name, double_quant=False)
    key = f"{UP}.weight.quant_state.bitsandbytes__nf4"
    rewrite(folder, tensors_in(folder) | {key: torch.tensor(list(state), dtype=torch.uint8)})
    with pytest.raises(InputError, match=re.escape(key) + r": (\w+: )?expected ") as error:
        load_model(folder)
    assert str(error.value).isprintable() and len(str(error.value)) < 700


SKIPPED = ["lm_head", "multi_modal_projector", "model.layers.0.self_attn", "model.layers.1.mlp"]


def is_chosen(name: str) -> bool:
    """All linear layers but those of SKIPPED, as a "dynamic" folder has them."""
    return "_proj" in name and not any(name.startswith(module) for module in SKIPPED)


def test_skipped_modules_stay_dense(folder, tmp_path, monkeypatch):
    meant = quantized(folder, is_chosen)
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "llm_int8_skip_modules": SKIPPED}
    edit(folder / "config.json", quantization_config=config | {"modules_to_not_convert": [["x"], {"y": []}]})
    with monkeypatch.context() as patch:
        patch.setattr(weights, "dequantize_nf4", lambda weight: pytest.fail("the dense model is in memory"))
        model = load_model(folder)
    for name, layer in linears(model).items():
        assert (layer.four_bit is not None) == is_chosen(name), name
        assert torch.equal(layer.dense(), meant[f"{name}.weight"]), name

    save_model(model, tmp_path / "saved")
    skipped = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"][
        "llm_int8_skip_modules"
    ]
    assert {*skipped} == {name for name in linears(model) if not is_chosen(name)}
    was, saved = tensors_in(folder), tensors_in(tmp_path / "saved")
    assert was.keys() == saved.keys() and all(torch.equal(was[name], saved[name]) for name in was)


def test_an_adapter_finds_the_skipped_modules_dense_again(folder, tmp_path):
    quantized(folder, is_chosen)
    model = load_model(folder)
    add_lora(model, 4, base=str(folder))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05
    save_model(model, tmp_path / "adapter")
    again = load_model(tmp_path / "adapter")
    assert torch.equal(logits_of(again), logits_of(model))
    assert linears(load_model(folder, base_4bit=True))[UP].four_bit is None  # skipped for a reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_4_bit_model_has_one_dtype(folder, dtype):
    save_model(load_model(folder, torch.bfloat16), folder)
    quantized(folder, lambda name: "_proj" in name)
    model = load_model(folder, dtype)
    merge_lora(model)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {dtype}
    assert logits_of(model).isfinite().all()


def test_a_head_in_4_bits_is_multiplied_out(folder, tmp_path):
    meant = quantized(folder, lambda name: "_proj" in name or name == "lm_head.weight")
    model = load_model(folder)
    assert torch.equal(model.head, meant["lm_head.weight"]) and linears(model)[UP].four_bit is not None
    logprob, _, _ = model.score(PACKED, torch.tensor([1, 2, 6]))
    expected = logits_of(model).log_softmax(-1)[[0, 1, 5], PACKED.tokens[[1, 2, 6]]]
    torch.testing.assert_close(logprob, expected)
    (sample,) = generate(model, [[1, 2]], SamplingParams(max_new_tokens=3, temperature=0.0))
    assert sample.tokens[0] == int(logits_of(model)[1].argmax())
    save_model(model, tmp_path / "saved")
    assert torch.equal(logits_of(load_model(tmp_path / "saved")), logits_of(model))
    assert torch.equal(tensors_in(tmp_path / "saved")["lm_head.weight"], meant["lm_head.weight"])
    assert load_scalar_model(folder).body.layers[0].mlp.up_proj.four_bit is not None  # passes the head over


def test_a_score_in_4_bits_is_multiplied_out(tmp_path):
    save_model(ScalarModel(SMALL, seed=3), tmp_path / "reward")
    meant = quantized(tmp_path / "reward", lambda name: "_proj" in name or name == "score.weight")
    model = load_scalar_model(tmp_path / "reward")
    assert torch.equal(model.score.weight, meant["score.weight"])
    assert model.body.layers[0].mlp.up_proj.four_bit is not None
