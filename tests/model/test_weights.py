"""Weights as published folders have them: quantised formats by name, 4 bits beside dense layers, experts in both forms,
layers that are passed over, and which of a folder's files is read."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from burnish.kernels import dequantize_nf4, quantize_nf4
from burnish.model import InputError, ModelConfig, Transformer, pack, weights
from burnish.model.adapter import add_lora, hf_name, linears, merge_lora
from burnish.model.checkpoint import load_model, load_scalar_model, save_model
from burnish.model.config import Experts
from burnish.model.files import bnb
from burnish.model.files.experts import to_disk
from burnish.model.files.tensors import Stored
from burnish.model.generate import generate
from burnish.model.scalar import ScalarModel
from safetensors.torch import load_file, save_file

SPARSE = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3"]
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
UP = "model.layers.1.mlp.up_proj"
PACKED = pack([[1, 5, 9, 4, 7], [2, 3]])
TINY = ModelConfig(
    vocab_size=31, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2
)
MIXTRAL = replace(
    TINY,
    model_type="mixtral",
    experts=Experts(4, 2, 128, (True,) * 2, renormalize=True, balance_coefficient=0.001),
)


@pytest.fixture
def folder(tmp_path) -> Path:
    save_model(Transformer(TINY, seed=3), tmp_path / "tiny")
    return tmp_path / "tiny"


@torch.no_grad()
def logits_of(model, packed=PACKED) -> torch.Tensor:
    return model.logits(model(packed))


def edit(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in folder.glob("model*.safetensors") for name, t in load_file(file).items()}


def rewrite(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 1) -> None:
    """Write `tensors` in place of the folder's: one file, or several and an index, which cut across the layers."""
    for file in [*folder.glob("model*.safetensors"), *folder.glob(INDEX)]:
        file.unlink()
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    if shards == 1:
        save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
        return
    files = {name: f"model-{i % shards:05}.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({name: t for name, t in tensors.items() if files[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"weight_map": files}))


def quantized(folder: Path, choose, **options) -> dict[str, torch.Tensor]:
    """The folder's weights with those that `choose` names in 4 bits, as bitsandbytes has them; what they stand for."""
    found, meant = {}, {}
    for name, tensor in tensors_in(folder).items():
        if choose(name):
            four_bit = quantize_nf4(tensor, **options)
            found |= bnb.tensors(name, four_bit)
            meant[name] = dequantize_nf4(four_bit)
        else:
            found[name] = meant[name] = tensor
    rewrite(folder, found)
    edit(folder / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    return meant


# ---- formats by name


@pytest.mark.parametrize(
    "quantization, name",
    [
        ({"quant_method": "gptq", "bits": 4, "modules_in_block_to_quantize": [["k"]]}, "GPTQ"),
        ({"quant_method": "awq", "modules_to_not_convert": None}, "AWQ"),
        ({"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}, "MXFP4"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}, "FP8 in blocks"),
        ({"quant_method": "fbgemm_fp8", "modules_to_not_convert": ["lm_head"]}, "FP8 of FBGEMM"),
        (
            {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"]},
            r"compressed-tensors \(pack-quantized\)",
        ),
        ({"quant_method": "hqq", "skip_modules": ["lm_head"]}, "HQQ"),
        ({"quant_method": "eetq"}, "EETQ"),
        ({"quant_method": "torchao", "quant_type": {"default": {}}}, "torchao"),
        ({"quant_method": "quanto", "weights": "int8"}, "quanto"),
        ({"quant_method": "aqlm"}, "AQLM"),
        ({"quant_method": "vptq"}, "VPTQ"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes in 8 bits"),
        ({"quant_method": "bitsandbytes"}, "bitsandbytes without load_in_4bit"),
        ({"load_in_8bit": True, "llm_int8_skip_modules": ["lm_head"]}, "bitsandbytes in 8 bits"),
        ({"load_in_4bit": True, "quant_method": "gptq"}, "GPTQ"),
        ({"group_size": 64, "bits": 4}, "MLX"),
        ({"quant_method": "a new one"}, "a new one"),
        ({"quant_method": ["gptq"]}, r"\['gptq'\]"),
        ({"quant_method": "x\n" * 5000}, r"'x\\nx"),
        ({"bits": 4}, "a format without a quant_method"),
    ],
)
def test_a_quantised_folder_is_refused_by_its_format(folder, quantization, name):
    edit(folder / "config.json", quantization_config=quantization)
    for load in (load_model, load_scalar_model):
        with pytest.raises(
            InputError, match=f"quantization_config: expected .* got {name}.*, which"
        ) as error:
            load(folder)
        message = str(error.value)
        assert message.startswith(f"{folder / 'config.json'}: ") and len(message) < 600
        assert message.isprintable()


@pytest.mark.parametrize("key", ["compression_config", "quantization"])
def test_older_keys_of_a_quantisation_are_named(folder, key):
    edit(folder / "config.json", **{key: {"bits": 4}})
    with pytest.raises(
        InputError, match=f"{key}: expected .* got (MLX|compressed-tensors), which is not read"
    ):
        load_model(folder)


@pytest.mark.parametrize("value", [[], [1], "gptq", "", 3, 0, True, False, 1.5])
def test_a_quantisation_that_is_no_object_is_refused(folder, value):
    edit(folder / "config.json", quantization_config=value)
    with pytest.raises(InputError, match="quantization_config: expected an object, got"):
        load_model(folder)


@pytest.mark.parametrize("value", [None, {}])
def test_no_quantisation_is_none(folder, value):
    edit(folder / "config.json", quantization_config=value)
    load_model(folder)


INT32, UINT8, INT8 = torch.int32, torch.uint8, torch.int8
FP8 = torch.float8_e4m3fn


@pytest.mark.parametrize(
    "parts, name",
    [
        ({"qweight": INT32, "qzeros": INT32, "g_idx": INT32, "scales": torch.float16}, "GPTQ"),
        ({"qweight": INT32, "qzeros": INT32, "scales": torch.float16}, "AWQ or GPTQ"),
        ({"weight": FP8, "weight_scale_inv": torch.float32}, "FP8 in blocks"),
        ({"weight": FP8, "weight_scale": torch.float32}, "FP8 or int8"),
        ({"weight": FP8}, "FP8"),
        ({"weight": INT8, "SCB": torch.float32, "weight_format": UINT8}, "bitsandbytes in 8 bits"),
        (
            {"weight": UINT8, "weight.absmax": UINT8, "weight.quant_map": torch.float32},
            "bitsandbytes in 4 bits",
        ),
        ({"weight_packed": INT32, "weight_shape": torch.int64}, "compressed-tensors"),
        ({"weight": UINT8, "weight_scale": FP8, "weight_scale_2": torch.float32}, "NVFP4"),
        ({"W_q": UINT8, "scale": torch.float16, "zero": torch.float16}, "HQQ"),
        ({"weight": INT8, "weight_scales": torch.float16}, "EETQ"),
        ({"weight._data": INT8, "weight._scale": torch.float16}, "quanto"),
        ({"_weight_qdata": INT8, "_weight_scale": torch.float16}, "torchao"),
        ({"codes": torch.int16, "codebooks": torch.float16, "scales": torch.float16}, "AQLM"),
        ({"indices": INT32, "centroids.weight": torch.float16}, "VPTQ"),
        ({"weight": torch.uint32, "scales": torch.float16, "biases": torch.float16}, "MLX"),
        ({"q_weight": INT32, "q_scale_max": torch.float16}, "EXL2"),
    ],
)
def test_tensors_tell_the_format_where_config_json_does_not(folder, parts, name):
    tensors = tensors_in(folder)
    del tensors[f"{UP}.weight"]
    rewrite(folder, tensors | {f"{UP}.{part}": torch.zeros(4, 2).to(dtype) for part, dtype in parts.items()})
    with pytest.raises(InputError, match=rf"{SINGLE}: {UP}\.\S+: expected .*, got {name}: take a copy"):
        load_model(folder)


def test_mxfp4_experts_tell_their_format(data, tmp_path):
    shutil.copytree(data / "tiny-hf" / "gpt_oss", tmp_path / "gpt")
    tensors = tensors_in(tmp_path / "gpt")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    del tensors[name]
    tensors |= {f"{name}_{part}": torch.zeros(2, 2, dtype=UINT8) for part in ("blocks", "scales")}
    rewrite(tmp_path / "gpt", tensors)
    with pytest.raises(InputError, match=r"gate_up_proj_blocks: expected .*, got MXFP4"):
        load_model(tmp_path / "gpt")


@pytest.mark.parametrize("dtype", [INT8, UINT8, INT32, torch.bool])
def test_integers_in_place_of_a_weight_are_refused(folder, dtype):
    tensors = tensors_in(folder)
    rewrite(folder, tensors | {f"{UP}.weight": torch.zeros_like(tensors[f"{UP}.weight"]).to(dtype)})
    with pytest.raises(InputError, match=rf"{UP}\.weight: expected floating point, got"):
        load_model(folder)


# ---- 4 bits beside dense layers


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
    assert tensors_in(tmp_path / "saved")[f"{UP}.weight"].dtype == UINT8
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
    rewrite(folder, tensors_in(folder) | {key: torch.tensor(list(state), dtype=UINT8)})
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
    (sample,) = generate(model, [[1, 5]], max_new_tokens=3, temperature=0.0)
    assert sample.tokens[0] == int(logits_of(model)[1].argmax())
    save_model(model, tmp_path / "saved")
    assert torch.equal(logits_of(load_model(tmp_path / "saved")), logits_of(model))
    assert torch.equal(tensors_in(tmp_path / "saved")["lm_head.weight"], meant["lm_head.weight"])
    assert load_scalar_model(folder).body.layers[0].mlp.up_proj.four_bit is not None  # passes the head over


def test_a_score_in_4_bits_is_multiplied_out(tmp_path):
    save_model(ScalarModel(TINY, seed=3), tmp_path / "reward")
    meant = quantized(tmp_path / "reward", lambda name: "_proj" in name or name == "score.weight")
    model = load_scalar_model(tmp_path / "reward")
    assert torch.equal(model.score.weight, meant["score.weight"])
    assert model.body.layers[0].mlp.up_proj.four_bit is not None


# ---- experts


def fuse(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Experts one by one to what save_original_format=False writes: stacked, the gate's rows before the up's."""
    found: dict[str, torch.Tensor] = {}
    experts: dict[str, dict[int, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        name = name.replace(".block_sparse_moe.", ".mlp.")
        one = re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)\.weight", name)
        if one is None:
            found[name] = tensor
            continue
        part = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}.get(one[3], one[3])
        experts.setdefault(f"{one[1]}.{part}", {})[int(one[2])] = tensor
    stacked = {
        name: torch.stack([several[e] for e in range(len(several))]) for name, several in experts.items()
    }
    for name, tensor in stacked.items():
        at, _, part = name.rpartition(".")
        if part == "down_proj":
            found[name] = tensor
        elif part == "gate_proj":
            found[f"{at}.gate_up_proj"] = torch.cat((tensor, stacked[f"{at}.up_proj"]), 1)
    return found


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("name", SPARSE)
def test_fused_experts_are_the_same_model(data, tmp_path, name, shards):
    source = data / "tiny-hf" / name
    shutil.copytree(source, tmp_path / name)
    rewrite(tmp_path / name, fuse(tensors_in(source)), shards)
    assert any(tensor.endswith(".experts.gate_up_proj") for tensor in tensors_in(tmp_path / name))
    for options in ({}, {"base_4bit": True}):
        ours, theirs = load_model(tmp_path / name, **options), load_model(source, **options)
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        assert all(torch.equal(t, ours.state_dict()[name]) for name, t in theirs.state_dict().items())
        assert torch.equal(logits_of(ours), logits_of(theirs))


@pytest.mark.parametrize("name", SPARSE)
def test_a_mixture_of_both_forms_is_refused(data, tmp_path, name):
    source = data / "tiny-hf" / name
    split = tensors_in(source)
    last = max(int(tensor.split(".")[2]) for tensor in split if ".experts." in tensor)
    fused = {n: t for n, t in fuse(split).items() if f"layers.{last}." in n and ".experts." in n}
    one_by_one = {n: t for n, t in split.items() if not (f"layers.{last}." in n and ".experts." in n)}
    shutil.copytree(source, tmp_path / name)
    for tensors in (one_by_one | fused, split | fused):
        rewrite(tmp_path / name, tensors)
        with pytest.raises(
            InputError, match=r"experts\S+: unexpected, other experts of this folder are fused"
        ):
            load_model(tmp_path / name)


def test_a_fused_tensor_of_another_shape_is_refused(data, tmp_path):
    shutil.copytree(data / "tiny-hf" / "qwen3_moe", tmp_path / "moe")
    tensors = fuse(tensors_in(tmp_path / "moe"))
    name = next(name for name in tensors if name.endswith("experts.gate_up_proj"))
    rewrite(tmp_path / "moe", tensors | {name: tensors[name].transpose(1, 2)})
    with pytest.raises(InputError, match=rf"{name}: expected shape"):
        load_model(tmp_path / "moe")


@pytest.mark.parametrize("blocksize", [64, 4096])
def test_experts_in_4_bits_each_are_one_weight(tmp_path, blocksize):
    """Transformers 4 wrote such, the router in 4 bits, too. 4096: a block for half an expert."""
    folder = tmp_path / "mixtral"
    save_model(Transformer(MIXTRAL, seed=3), folder)
    meant = quantized(folder, lambda name: "_proj" in name or "block_sparse" in name, blocksize=blocksize)
    model = load_model(folder)
    experts = model.layers[0].mlp.experts
    assert experts.gate_up_proj.four_bit is not None and experts.down_proj.weight is None
    state = {name: layer.dense() for name, layer in linears(model).items()}
    found = to_disk(MIXTRAL, {f"{name}.weight": tensor for name, tensor in state.items()})
    assert all(torch.equal(tensor, meant[name]) for name, tensor in found.items())
    assert torch.equal(model.layers[0].mlp.gate.weight, meant["model.layers.0.block_sparse_moe.gate.weight"])
    assert logits_of(model).isfinite().all()


def test_experts_whose_blocks_cross_are_multiplied_out(tmp_path):
    experts = replace(MIXTRAL.experts, intermediate_size=129)
    config = replace(MIXTRAL, hidden_size=32, intermediate_size=129, experts=experts)
    save_model(Transformer(config, seed=3), tmp_path / "mixtral")
    meant = quantized(tmp_path / "mixtral", lambda name: ".experts." in name)
    model = load_model(tmp_path / "mixtral")
    assert model.layers[0].mlp.experts.down_proj.four_bit is None
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items() if ".experts." in name}
    assert all(torch.equal(tensor, meant[name]) for name, tensor in to_disk(config, state).items())


def test_the_correction_of_experts_is_kept_in_fp32(data):
    """It decides which expert is chosen; transformers keeps it so whatever the dtype."""
    source = data / "tiny-hf" / "deepseek_v3"
    model = load_model(source, torch.bfloat16)
    assert all(buffer.dtype == torch.float32 for _, buffer in model.named_buffers())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


# ---- names


@pytest.mark.parametrize("name", ["qwen2", "llama", "qwen3_moe", "deepseek_v3"])
def test_a_model_saved_without_its_head_has_shorter_names(data, tmp_path, name):
    """AutoModel writes it so, and embedding models are published so; the head, where there is one, stands beside it."""
    source = Path(shutil.copytree(data / "tiny-hf" / name, tmp_path / name))
    expected, tensors = logits_of(load_model(source)), tensors_in(source)
    rewrite(source, {key.removeprefix("model."): tensor for key, tensor in tensors.items()}, shards=2)
    assert torch.equal(logits_of(load_model(source)), expected)
    save_model(load_model(source), tmp_path / "saved")
    assert tensors_in(tmp_path / "saved").keys() == tensors.keys()
    if "lm_head.weight" in tensors:
        rewrite(
            source, {key.removeprefix("model."): t for key, t in tensors.items() if key != "lm_head.weight"}
        )
        with pytest.raises(InputError, match=r"lm_head\.weight: missing from the safetensors files"):
            load_model(source)


# ---- what is passed over


FURTHER = (
    "embed_tokens.weight",
    "enorm.weight",
    "eh_proj.weight",
    "shared_head.head.weight",
    "mlp.gate.weight",
)


def further_layers(*layers: int) -> dict[str, torch.Tensor]:
    return {f"model.layers.{layer}.{name}": torch.ones(3, 5) for layer in layers for name in FURTHER}


@pytest.fixture
def deepseek(data, tmp_path) -> Path:
    """A folder of 3 layers."""
    return Path(shutil.copytree(data / "tiny-hf" / "deepseek_v3", tmp_path / "deepseek"))


def test_layers_that_predict_further_tokens_are_never_read(deepseek, monkeypatch):
    expected, tensors, read = logits_of(load_model(deepseek)), tensors_in(deepseek), []
    edit(deepseek / "config.json", num_nextn_predict_layers=2)
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)}
    scale = {"model.layers.4.mlp.up_proj.weight_scale_inv": torch.ones(3)}  # of another format, even
    rewrite(deepseek, tensors | further_layers(3, 4) | old | scale)
    original = Stored.read
    monkeypatch.setattr(Stored, "read", lambda self: (read.append(self.name), original(self))[1])
    assert torch.equal(logits_of(load_model(deepseek)), expected)
    assert sorted(read) == sorted(tensors)
    # transformers' own name for num_nextn_predict_layers
    source = weights.Source(deepseek, {"num_mtp_layers": 2}, torch.float32, "cpu")
    config = load_model(deepseek).config
    assert weights._to_be_read(source, config, ()).keys() == tensors.keys()


@pytest.mark.parametrize(
    ("layers", "further"), [([3], 0), ([3], None), ([4], 1), ([4], ...), ([3, 4, 5], 2), ([13], 2)]
)
def test_any_other_layer_is_refused(deepseek, layers, further):
    raw = json.loads((deepseek / "config.json").read_text()) | {"num_nextn_predict_layers": further}
    (deepseek / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))
    rewrite(deepseek, tensors_in(deepseek) | further_layers(*layers))
    with pytest.raises(InputError, match=rf"model\.layers\.{layers[-1]}\.\S+: unexpected"):
        load_model(deepseek)


def test_one_further_layer_is_passed_over_where_config_json_does_not_say_it(deepseek, folder):
    raw = json.loads((deepseek / "config.json").read_text())
    raw.pop("num_nextn_predict_layers")
    (deepseek / "config.json").write_text(json.dumps(raw))
    rewrite(deepseek, tensors_in(deepseek) | further_layers(3))
    load_model(deepseek)
    rewrite(folder, tensors_in(folder) | further_layers(2))  # no other architecture has any
    with pytest.raises(InputError, match=r"model\.layers\.2\.\S+: unexpected"):
        load_model(folder)


@pytest.mark.parametrize("value", [-1, True, "1", 1.0, [1], {"a": 1}])
def test_a_number_of_further_layers_is_an_integer(deepseek, value):
    edit(deepseek / "config.json", num_nextn_predict_layers=value)
    with pytest.raises(InputError, match=r"config\.json: num_nextn_predict_layers: expected an integer >= 0"):
        load_model(deepseek)


def test_sizes_are_compared_before_anything_is_read(folder, monkeypatch):
    monkeypatch.setattr(Stored, "read", lambda self: pytest.fail(f"{self.name} was read"))
    tensors = tensors_in(folder)
    for changed in (
        {UP + ".weight": torch.ones(3)},
        {"more": torch.ones(1)},
        {"lm_head.weight": torch.ones(1).int()},
    ):
        rewrite(folder, tensors | changed)
        with pytest.raises(InputError):
            load_model(folder)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux' list of mapped files")
def test_a_file_that_is_read_is_mapped_no_longer(folder, monkeypatch):
    """Its tensors would otherwise stay in memory beside the model, until the last file is through."""
    tensors, shards = {name: tensor.clone() for name, tensor in tensors_in(folder).items()}, 5
    names = [hf_name(name) for name in Transformer(TINY, device="meta").state_dict()]
    for file in folder.glob("model*.safetensors"):
        file.unlink()
    place = {name: f"model-{i * shards // len(names)}.safetensors" for i, name in enumerate(names)}
    for file in dict.fromkeys(place.values()):
        save_file({name: tensors[name] for name in names if place[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"weight_map": place}))

    mapped, dense = [], weights._dense

    def counted(*args):
        lines = Path("/proc/self/maps").read_text().splitlines()
        mapped.append(len({line.split()[-1] for line in lines if str(folder) in line}))
        return dense(*args)

    monkeypatch.setattr(weights, "_dense", counted)
    load_model(folder)
    assert mapped == sorted(mapped, reverse=True) and mapped[0] == shards
    assert mapped[-1] <= 2


# ---- which files


def test_files_beside_the_weights_are_not_read(folder):
    expected = logits_of(load_model(folder))
    rewrite(folder, tensors_in(folder), shards=3)
    for name in (
        "consolidated.safetensors",
        "pytorch_model.bin",
        "original/consolidated.00.pth",
        "rust_model.ot",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not to be opened")
    assert torch.equal(logits_of(load_model(folder)), expected)


def test_one_whole_file_goes_before_an_index(folder):
    expected = logits_of(load_model(folder))
    (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": "gone.safetensors"}}))
    assert torch.equal(logits_of(load_model(folder)), expected)


def test_a_file_that_the_index_names_is_read_whole(folder):
    expected, tensors = logits_of(load_model(folder)), tensors_in(folder)
    rewrite(folder, tensors, shards=3)
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    edit(folder / INDEX, weight_map={n: file for n, file in weight_map.items() if n != "model.norm.weight"})
    assert torch.equal(logits_of(load_model(folder)), expected)

    stale = folder / next(file for file in weight_map.values() if file != weight_map["model.norm.weight"])
    save_file(load_file(stale) | {"model.norm.weight": torch.zeros(64)}, stale)
    with pytest.raises(InputError, match=r"model\.norm\.weight: stands in model-\d+\.safetensors, too"):
        load_model(folder)
    edit(folder / INDEX, weight_map=weight_map)  # which says whose is the one
    assert torch.equal(logits_of(load_model(folder)), expected)


@pytest.mark.parametrize("name", ["llama-tied-llama3rope", "gemma3_text"])
def test_a_tied_matrix_may_stand_under_the_heads_name_alone(data, tmp_path, name):
    folder = Path(shutil.copytree(data / "tiny-hf" / name, tmp_path / name))
    expected, scalar = logits_of(load_model(folder)), load_scalar_model(folder).state_dict()
    tensors = tensors_in(folder)
    rewrite(folder, tensors | {"lm_head.weight": tensors.pop("model.embed_tokens.weight")})
    assert torch.equal(logits_of(load_model(folder)), expected)
    again = load_scalar_model(folder).state_dict()
    assert again.keys() == scalar.keys() and all(torch.equal(again[key], scalar[key]) for key in scalar)


@pytest.mark.parametrize("file", ["a" * 5000 + ".safetensors", "a\0.safetensors", "a\n.safetensors"])
def test_a_file_name_that_none_can_have_is_refused(folder, file):
    (folder / SINGLE).rename(folder / "other.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(InputError, match=r"a: expected a \.safetensors file of the same folder") as caught:
        load_model(folder)
    assert len(str(caught.value)) < 600 and "\n" not in str(caught.value)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_json_that_is_nested_without_end_is_no_json(folder, file):
    (folder / file).write_text('{"a": ' + "[" * 100_000)
    with pytest.raises(InputError, match=f"{file}: not JSON: objects and lists deeper"):
        load_model(folder)


@pytest.mark.parametrize("value", ["x", True, float("nan"), 1e300, 10**400, [1.0]])
def test_the_bias_of_a_score_is_a_number(tmp_path, value):
    save_model(ScalarModel(TINY), tmp_path / "reward")
    edit(tmp_path / "reward" / "config.json", score_bias=value)
    with pytest.raises(InputError, match=r"config\.json: score_bias: expected a number, got"):
        load_scalar_model(tmp_path / "reward")


def test_files_of_another_layout_alone_are_named(folder):
    (folder / SINGLE).rename(folder / "consolidated.safetensors")
    with pytest.raises(InputError, match=r"found neither \(consolidated\.safetensors has other names"):
        load_model(folder)
