"""Folders that are broken, or lie: each ends in one sentence, at once, and before memory is taken."""

import json
import os
import resource
import shutil
import signal
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from burnish.model import InputError, ModelConfig, Transformer
from burnish.model.adapter import add_lora
from burnish.model.checkpoint import load_model, save_model
from burnish.model.files.folder import is_adapter
from burnish.model.files.tensors import stored_tensors
from safetensors.torch import load_file, save_file

MEGABYTES, SECONDS = 100, 1  # of memory and of a processor's time that a refusal may take
WEIGHTS, ADAPTER = "model.safetensors", "adapter_model.safetensors"
TINY = ModelConfig(
    vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
)


def refusal(function: Callable[[], object]) -> str:
    """The sentence that it is refused with, in a process with little memory and time."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXCPU, signal.SIG_DFL)
        now = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
        resource.setrlimit(resource.RLIMIT_CPU, (int(now) + SECONDS + 1, int(now) + SECONDS + 1))
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEGABYTES * 2**20,) * 2)

        try:
            text = f"accepted: {function()}"
        except InputError as error:
            text = f"refused: {error}"
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(write, text.encode()[:4000])
        os._exit(0)

    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        text = pipe.read().decode()
    assert os.waitpid(child, 0)[1] == 0, "expected an end, got a signal: too slow"

    kind, _, message = text.partition(": ")
    assert kind == "refused", text
    assert message.isprintable() and len(message) <= 600
    return message


def edit(file: Path, **changes) -> None:
    raw = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in raw.items() if value is not ...}))


def write_header(file: Path, header: bytes, data: bytes) -> None:
    file.write_bytes(struct.pack("<Q", len(header)) + header + data)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A model and an adapter on it, once for all tests."""
    folder = tmp_path_factory.mktemp("made")
    model = Transformer(TINY, seed=3)
    save_model(model, folder / "tiny")
    add_lora(model, 2, base="tiny")
    save_model(model, folder / "adapter")
    return folder


@pytest.fixture
def folder(made, tmp_path) -> Path:
    return Path(shutil.copytree(made / "tiny", tmp_path / "tiny"))


@pytest.fixture
def adapter(folder, made, tmp_path) -> Path:
    return Path(shutil.copytree(made / "adapter", tmp_path / "adapter"))


# ---- sizes

SIZES = [
    *(("llama", "num_hidden_layers", size) for size in (7, 10_000, 3_000_000, 2**63)),
    *(("llama", "vocab_size", size) for size in (101, 10**9, 2**31 - 1)),
    *(("llama", "hidden_size", size) for size in (2**31 - 1, 68)),
    *(("llama", "intermediate_size", size) for size in (2**31 - 1, 97)),
    *(("llama", "head_dim", size) for size in (2**31 - 2, 18)),
    ("llama", "num_attention_heads", 2**31 - 2),
    *(("mixtral", "num_local_experts", size) for size in (2**31 - 1, 2**20, 9)),
    ("mixtral", "intermediate_size", 2**31 - 1),
    ("qwen2_moe", "num_experts", 10**9),
    ("qwen2_moe", "moe_intermediate_size", 10**9),
    ("qwen2_moe", "shared_expert_intermediate_size", 10**9),
    ("gpt_oss", "num_local_experts", 10**9),
    ("gpt_oss", "intermediate_size", 10**9),
    ("deepseek_v3", "n_shared_experts", 2**31 - 1),
    ("deepseek_v3", "kv_lora_rank", 10**9),
    ("deepseek_v3", "q_lora_rank", 10**9),
    ("deepseek_v3", "v_head_dim", 10**9),
    ("deepseek_v3", "qk_nope_head_dim", 10**9),
    ("deepseek_v3", "n_group", 10**9),
]


@pytest.mark.parametrize(("name", "key", "size"), SIZES)
def test_a_size_that_the_files_do_not_have_is_refused_at_once(data, tmp_path, name, key, size):
    copy = Path(shutil.copytree(data / "tiny-hf" / name, tmp_path / name))
    edit(copy / "config.json", **{key: size})
    message = refusal(lambda: load_model(copy))
    assert f"{name}/config.json: " in message and key in message, message
    more = {"hidden_size": 64, "intermediate_size": 97, "vocab_size": 101}
    if size == more.get(key):
        assert WEIGHTS in message


@pytest.mark.parametrize("size", [10**9, 2**31 - 1])
def test_a_size_of_weights_in_4_bits_is_bounded_by_their_bytes(data, tmp_path, size):
    copy = Path(shutil.copytree(data / "tiny-bnb" / "qwen3-nf4", tmp_path / "qwen3"))
    edit(copy / "config.json", intermediate_size=size)
    assert "config.json: intermediate_size: expected " in refusal(lambda: load_model(copy))


def test_a_last_layer_that_predicts_nothing_further_is_not_passed_over(data, tmp_path):
    copy = Path(shutil.copytree(data / "tiny-hf" / "deepseek_v3", tmp_path / "deepseek_v3"))
    edit(copy / "config.json", num_hidden_layers=2)
    assert "model.layers.2." in refusal(lambda: load_model(copy))


def test_a_model_without_files_has_any_size():
    assert Transformer(ModelConfig(50_000_000, 4096, 16, 1, 2), device="meta").device.type == "meta"


@pytest.mark.parametrize(
    ("name", "key"), [("llama", "max_position_embeddings"), ("qwen2", "max_window_layers")]
)
def test_a_number_that_allocates_nothing_may_be_large(data, tmp_path, name, key):
    copy = Path(shutil.copytree(data / "tiny-hf" / name, tmp_path / name))
    edit(copy / "config.json", **{key: 2**31 - 1})
    load_model(copy)


# ---- types

TYPES = [{"a": 1}, [None], "\x00" + "a" * 5000, True, -1, 10**30]


@pytest.mark.parametrize(
    ("name", "key"),
    [
        *(
            ("llama", key)
            for key in ("model_type", "architectures", "rope_parameters", "quantization_config")
        ),
        *(("llama", key) for key in ("hidden_act", "eos_token_id", "bos_token_id", "rms_norm_eps")),
        *(("qwen2", key) for key in ("layer_types", "sliding_window", "use_sliding_window")),
        *(("qwen2_moe", key) for key in ("mlp_only_layers", "decoder_sparse_step", "norm_topk_prob")),
        *(("smollm3", key) for key in ("no_rope_layers", "no_rope_layer_interval")),
        *(("deepseek_v3", key) for key in ("num_nextn_predict_layers", "topk_method", "q_lora_rank")),
    ],
)
def test_a_value_of_any_type_is_read_or_refused_by_its_key(data, tmp_path, name, key):
    copy = Path(shutil.copytree(data / "tiny-hf" / name, tmp_path / name))
    raw = json.loads((copy / "config.json").read_text())
    for value in TYPES:
        (copy / "config.json").write_text(json.dumps(raw | {key: value}))
        try:
            load_model(copy)
        except InputError as error:
            assert "config.json: " in str(error) and key in str(error), str(error)


@pytest.mark.parametrize("key", ["rope_type", "factor", "rope_theta", "type", "truncate"])
def test_rope_parameters_of_any_type(folder, key):
    for value in TYPES:
        edit(folder / "config.json", rope_parameters={"rope_type": "yarn", "factor": 2.0} | {key: value})
        try:
            load_model(folder)
        except InputError as error:
            assert "config.json: rope_parameters." in str(error)


@pytest.mark.parametrize("key", ["quant_method", "load_in_4bit", "bits", "format", "weight_block_size"])
def test_a_quantisation_of_any_type(folder, key):
    for value in TYPES:
        edit(folder / "config.json", quantization_config={"quant_method": "fp8"} | {key: value})
        with pytest.raises(
            InputError, match=r"config\.json: quantization_config: expected plain weights"
        ) as error:
            load_model(folder)
        assert str(error.value).isprintable()


@pytest.mark.parametrize("value", [2**31, -2, 10**30, True, 1.0, [[1]], [True], {}, "x", [2**31]])
def test_an_end_token_that_no_vocabulary_can_have(folder, value):
    edit(folder / "config.json", eos_token_id=value)
    with pytest.raises(InputError, match=r"config\.json: eos_token_id: expected a token id"):
        load_model(folder)


def test_what_stands_in_generation_config_is_written_again(folder, tmp_path):
    content = {"eos_token_id": [1, 2], "pad_token_id": -1, "x": {"y": "z"}, "top_p": "0.9"}
    (folder / "generation_config.json").write_text(json.dumps(content))
    save_model(load_model(folder), tmp_path / "again")
    assert json.loads((tmp_path / "again" / "generation_config.json").read_text()) == content


# ---- safetensors and index


def test_what_safetensors_lets_through_is_refused(folder):
    file = folder / WEIGHTS
    raw = file.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header, data = raw[8 : 8 + length].rstrip(), raw[8 + length :]
    name = '"model.embed_tokens.weight":'
    place = json.loads(header)["model.embed_tokens.weight"]
    twice = f"{name}{json.dumps(place | {'shape': [16, 31]})},{name}".encode()
    write_header(file, header.replace(name.encode(), twice, 1), data)
    assert f"{WEIGHTS}: header: model.embed_tokens.weight: expected once" in refusal(
        lambda: load_model(folder)
    )
    end = len(data)
    extra = f',"a\\u001bb":{{"dtype":"F32","shape":[0,{2**63}],"data_offsets":[{end},{end}]}}}}'.encode()
    write_header(file, header[:-1] + extra, data)
    assert "expected sizes below 2^63" in refusal(lambda: load_model(folder))


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "F33"},
        {"dtype": "I64"},
        {"shape": [0]},
        {"shape": [2**62, 2**62]},
        {"shape": [-1]},
        {"shape": "x"},
        {"data_offsets": [0, 10**18]},
        {"data_offsets": [8, 4]},
    ],
)
def test_a_header_that_does_not_fit_the_file_is_refused(folder, change):
    file = folder / WEIGHTS
    raw = file.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    header["model.norm.weight"] |= change
    write_header(file, json.dumps(header).encode(), raw[8 + length :])
    assert WEIGHTS in refusal(lambda: load_model(folder))


@pytest.mark.parametrize("metadata", ['{"x": 1}', "[]", '{"x": null}', '{"x": {}}'])
def test_metadata_that_is_no_text_is_refused(folder, metadata):
    write_header(folder / WEIGHTS, f'{{"__metadata__": {metadata}}}'.encode(), b"")
    assert f"{WEIGHTS}: not a whole safetensors file" in refusal(lambda: load_model(folder))


# ---- special files


def put(kind: str, file: Path) -> None:
    file.unlink(missing_ok=True)
    match kind:
        case "pipe":
            os.mkfifo(file)
        case "folder":
            file.mkdir()
        case "circle":
            file.symlink_to(file)
        case "nowhere":
            file.symlink_to(file.parent / "not there")
        case "device":
            file.symlink_to("/dev/zero")
        case "empty":
            file.touch()


@pytest.mark.parametrize("kind", ["pipe", "folder", "circle", "nowhere", "device", "empty"])
@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "generation_config.json",
        WEIGHTS,
        f"{WEIGHTS}.index.json",
        "adapter_config.json",
        ADAPTER,
    ],
)
def test_a_special_file_ends_in_a_sentence(folder, adapter, kind, name):
    at = adapter if "adapter" in name else folder
    if "index" in name:
        (folder / WEIGHTS).unlink()
    put(kind, at / name)
    assert name.partition(".")[0] in refusal(lambda: load_model(at))


# ---- adapters

BASES = [
    "b" * 5000,
    "a\0b",
    "https://example.org/model",
    "",
    "../adapter",
    ".",
    7,
    ["x"],
    {"a": "b"},
    True,
    None,
]


@pytest.mark.parametrize("base", BASES)
def test_a_base_that_is_none_is_refused(adapter, base):
    edit(adapter / "adapter_config.json", base_model_name_or_path=base)
    assert "base_model_name_or_path: expected " in refusal(lambda: load_model(adapter))


def test_adapters_that_are_each_others_base_are_refused(adapter, tmp_path):
    for name, base in (("one", "two"), ("two", "three"), ("three", "one")):
        shutil.copytree(adapter, tmp_path / name)
        edit(tmp_path / name / "adapter_config.json", base_model_name_or_path=str(tmp_path / base))
    assert "leads back to" in refusal(lambda: load_model(tmp_path / "one"))


@pytest.mark.parametrize(
    "changes",
    [
        {"r": 10**9},
        {"r": 10**30},
        {"r": 3},
        {"rank_pattern": {"q_proj": 10**9}},
        {"rank_pattern": {"q_proj": 2.0}},
        {"rank_pattern": dict.fromkeys(map(str, range(20_000)), 2)},
        {"layers_to_transform": [0] * 200_000},
        {"target_modules": ["q_proj"] * 200_000},
        {"modules_to_save": [f"x{i}" for i in range(200_000)]},
        {"layers_pattern": ["x"] * 200_000, "layers_to_transform": [0]},
        {"layers_to_transform": [10**9]},
    ],
)
def test_numbers_of_an_adapter_that_its_tensors_do_not_have(adapter, changes):
    edit(adapter / "adapter_config.json", **changes)
    message = refusal(lambda: load_model(adapter))
    assert str(adapter) in message
    assert any(key in message for key in [*changes, "target_modules"])


def test_a_rank_says_which_key_and_tensor_differ(adapter):
    edit(adapter / "adapter_config.json", r=3)
    expected = r"model\.layers\.0\.self_attn\.q_proj\.lora_A\.weight: expected shape \(3, 16\), got \(2, 16\): r says 3"
    with pytest.raises(InputError, match=expected):
        load_model(adapter)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_an_adapters_tensor_that_is_no_floating_point_is_refused(adapter, dtype):
    tensors = load_file(adapter / ADAPTER)
    name = next(iter(tensors))
    save_file(tensors | {name: torch.ones(tensors[name].shape).to(dtype)}, adapter / ADAPTER)
    with pytest.raises(InputError, match=rf"{ADAPTER}: {name}: expected floating point, got "):
        load_model(adapter)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("base_4bit", v) for v in ("", "9999", "x\n")),
        *(("score_bias", v) for v in ("nan", "x", "", "inf", "1e999")),
    ],
)
def test_our_own_metadata_in_another_form_is_refused(adapter, key, value):
    save_file(load_file(adapter / ADAPTER), adapter / ADAPTER, metadata={key: value})
    assert f"{ADAPTER}: {key}: expected " in refusal(lambda: load_model(adapter))


# ---- writing


@pytest.mark.parametrize("name", ["a\0b", "n" * 5000, "file", "file/below", "circle", "a/b/" + "n" * 300])
def test_a_place_that_cannot_be_written_is_named_and_left_as_it_was(tmp_path, name):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError) as error:
        save_model(Transformer(TINY), tmp_path / name)
    assert str(error.value).isprintable() and str(tmp_path) in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("what", ["config.json", "weights", "rename"])
@pytest.mark.parametrize("earlier", [False, True])
def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, what, earlier):
    place = tmp_path / "deep" / "model"
    if earlier:
        save_model(Transformer(TINY, seed=1), place)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}

    def full(*args, **more):
        raise OSError(28, "No space left on device", "/a/name/of/no/use")

    places = {"config.json": (Path, "write_text"), "rename": (Path, "rename")}
    if what == "weights":
        monkeypatch.setattr("burnish.model.files.tensors.save_file", full)
    else:
        monkeypatch.setattr(*places[what], full)
    with pytest.raises(InputError, match=r"model: cannot be written: No space left on device$"):
        save_model(Transformer(TINY, seed=2), place)
    monkeypatch.undo()
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
    assert [*tmp_path.iterdir()] == ([tmp_path / "deep"] if earlier else [])


def test_a_folder_of_the_longest_name_is_written(tmp_path):
    save_model(Transformer(TINY), tmp_path / ("ä" * 127))
    assert not is_adapter(tmp_path / ("ä" * 127)) and stored_tensors(tmp_path / ("ä" * 127))
