"""A few mutations of every kind of file, a thousand where slow tests run; and faults that the fuzzer has to find."""

import json
import mmap
import os
import pickle
import socket
import struct
import subprocess
import time
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
import torch
from burnish.model import checkpoint
from burnish.model.errors import InputError
from campaign import Bench, chosen, results_of, warm_up
from classes import class_of, explained
from differences import ABSENT, Difference, Numbers
from inputs import make_inputs
from mutations import Mutation
from outcomes import Limits, Outcome, outcome_of
from readers import of_model, readers

SEED = 20
AREAS = (
    *("config", "weights", "index", "generation", "reward", "4bit", "adapter", "tokenizer"),
    *("template", "flags"),
    *("rows", "run", "lessons", "gguf"),
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    return folder


def failures(area: str, inputs: Path, work: Path, each: int) -> str:
    found = chosen(readers(inputs), [area])
    warm_up(found, inputs, work)
    results = chain.from_iterable(results_of(reader, inputs, work, SEED, each) for reader in found)
    return "\n".join(
        f"{r.kind}: {r.reader} number {r.number}: {r.what}: {r.where}{r.why} {r.message[:200]!r}"
        for r in results
        if not r.fine
    )


def test_every_area_is_tested(inputs):
    assert {reader.name.partition("/")[0] for reader in readers(inputs)} == set(AREAS)


@pytest.mark.parametrize(
    "area", ("config/llama", "weights/sharded", "index", "4bit/config/qwen3-nf4", "lessons")
)
def test_a_few_mutations(area, inputs, tmp_path):
    assert not failures(area, inputs, tmp_path, 2)


@pytest.mark.parametrize(
    "area",
    ("adapter/config/qwen3-dora", "tokenizer/tokenizer", "template/rows", "rows/messages/lines", "gguf"),
)
def test_a_few_mutations_of_texts(area, inputs, tmp_path):
    assert not failures(area, inputs, tmp_path, 2)


@pytest.mark.slow
@pytest.mark.parametrize("area", AREAS)
def test_a_thousand_mutations(area, inputs, tmp_path):
    assert not failures(area, inputs, tmp_path, 13)


def test_a_case_depends_on_its_seed_and_number_alone(inputs, tmp_path):
    (reader,) = chosen(readers(inputs), ["rows/text/lines"])
    one, other = (Bench(reader, inputs, tmp_path / name) for name in ("one", "other"))
    drawn = [one.mutation(SEED, number) for number in range(20)]
    assert [other.mutation(SEED, number) for number in reversed(range(20))] == drawn[::-1]
    assert [one.mutation(SEED + 1, number) for number in range(20)] != drawn


# ---- controls: readers that do what none may do


class TwoLines(InputError):
    def __str__(self) -> str:
        return "one line\nand another"


class Endless(InputError):
    def __str__(self) -> str:
        return "x" * 601


class Coloured(InputError):
    def __str__(self) -> str:
        return "\x1b[31mred"


def raises(error: Exception):
    def read(folder: Path) -> str:
        raise error

    return read


def loops(folder: Path) -> str:
    while True:
        pass


def waits(folder: Path) -> str:
    time.sleep(60)
    return ""


def grows(folder: Path) -> str:
    return str(len(bytearray(80 << 20)))


def grows_and_says_so_in_one_line(folder: Path) -> str:
    in_memory = bytearray(80 << 20)
    raise InputError(f"{len(in_memory)} bytes are too many")


def asks_for_too_much(folder: Path) -> str:
    return str(torch.empty(1 << 60, dtype=torch.uint8))


def aborts(folder: Path) -> str:
    os.abort()


def panics_and_goes_on(folder: Path) -> str:
    os.write(2, b"thread '<unnamed>' panicked at src/lib.rs:1:1\n")
    return ""


def leaves_half(folder: Path) -> str:
    (folder / ".model.safetensors.partial").touch()
    raise InputError("cannot be written")


def makes_a_message_of_what_it_cannot_have(folder: Path) -> str:
    try:
        return asks_for_too_much(folder)
    except RuntimeError:
        raise InputError("it is too large") from None


def prints(text: str, stream: int):
    def read(folder: Path) -> str:
        os.write(stream, text.encode())
        return ""

    return read


def leaves_all(folder: Path) -> str:
    (folder / "out").mkdir()
    raise InputError("cannot be read, after all")


def unpickles(folder: Path) -> str:
    return str(pickle.loads(pickle.dumps(Path)))


def runs(folder: Path) -> str:
    return str(subprocess.run(["true"]))


def calls(folder: Path) -> str:
    with socket.socket() as opened:
        return str(opened.connect_ex(("127.0.0.1", 9)))


def opens(path: str, mode: str = "rb"):
    def read(folder: Path) -> str:
        try:
            with open(folder / path, mode):
                return ""
        except OSError:
            raise InputError("cannot be opened") from None

    return read


@pytest.mark.parametrize(
    "kind, read",
    [
        ("traceback", raises(KeyError("name"))),
        ("traceback", raises(RecursionError("too deep"))),
        ("traceback", raises(SystemExit(1))),
        ("long", raises(TwoLines(""))),
        ("long", raises(Endless(""))),
        ("long", raises(Coloured(""))),
        ("hang", loops),
        ("hang", waits),
        ("memory", grows),
        ("memory", grows_and_says_so_in_one_line),
        ("memory", asks_for_too_much),
        ("memory", raises(MemoryError())),
        ("crash", aborts),
        ("noise", panics_and_goes_on),
        ("left", leaves_half),
        ("left", leaves_all),
        ("memory", makes_a_message_of_what_it_cannot_have),
        ("noise", prints("warning: \x1b[2J\n", 2)),
        ("noise", prints("rows: \x1b[2J\n", 1)),
        ("accepted", prints("warning: rows\n", 2)),
        ("accepted", prints("rows\n", 1)),
        ("reach", unpickles),
        ("reach", runs),
        ("reach", calls),
        ("reach", opens("/etc/passwd")),
        ("reach", opens("../../x")),
        ("reach", opens("../new", "wb")),
        ("clean", opens("x")),
        ("clean", opens("/dev/null/x")),
        ("clean", raises(InputError("config.json: missing"))),
        ("accepted", lambda folder: "digest"),
    ],
)
def test_outcome_of_a_planted_reader(kind, read, tmp_path):
    assert outcome_of(read, tmp_path, Limits(seconds=1, bytes=64 << 20)).kind == kind


def test_what_this_process_has_freed_hides_no_growth(tmp_path):
    pieces = [
        bytearray(100_000) for _ in range(1100)
    ]  # of the heap, where they leave room for all that `grows` asks
    last = pieces.pop()
    del pieces
    assert outcome_of(grows, tmp_path, Limits(seconds=1, bytes=64 << 20)).kind == "memory", len(last)


@pytest.mark.slow
@pytest.mark.parametrize("times, kind", [(1, "accepted, same"), (2, "hang")])
def test_a_hang_is_one_that_hangs_again(times, kind, inputs, tmp_path):
    """A machine may stand still under a reader; under two attempts in turn it does not."""
    (reader,) = chosen(readers(inputs), ["rows/text/lines"])
    left = mmap.mmap(-1, 1)  # shared with the forks

    def read(folder: Path) -> str:
        left[0] -= left[0] > 0
        while left[0]:
            pass
        return "digest"

    left[0] = 1
    bench = Bench(replace(reader, read=read), inputs, tmp_path, Limits(seconds=1))
    left[0] = times + 1
    assert bench.run(SEED, 0).kind == kind


# ---- controls: readers that accept what means something else


def of_a_config_that_guesses(folder: Path) -> str:
    """A length that is no number counts as absent."""
    real, key = checkpoint.read_config, "max_position_embeddings"
    guessed = lambda raw: {k: v for k, v in raw.items() if k != key or isinstance(v, int)}
    checkpoint.read_config = lambda raw, *rest: real(guessed(raw), *rest)
    return of_model(folder)


def of_texts_that_are_some(folder: Path) -> str:
    """Passes over rows without a text, and takes the last of two."""
    rows = [
        json.loads(line)
        for line in (folder / "rows.jsonl").read_text(errors="replace").splitlines()
        if line.strip()
    ]
    return repr([row["text"] for row in rows if isinstance(row, dict) and isinstance(row.get("text"), str)])


def of_weights_as_bytes(folder: Path) -> str:
    """Whatever the header says."""
    return repr((folder / "model.safetensors").read_bytes()[:4000])


PLANTED = (  # reader, what reads in its place, and the text -> the text that it accepts
    ("config/llama", of_a_config_that_guesses, b": 256,", b': "256",'),
    ("rows/text/lines", of_texts_that_are_some, b'"1 + 1 = 2"', b"null"),
    ("rows/text/lines", of_texts_that_are_some, b"}", b', "text": "x"}'),
    ("weights/llama", of_weights_as_bytes, b'"F32"', b'"I32"'),
    ("weights/llama", of_weights_as_bytes, b'"data_offsets":[0,', b'"data_offsets":[8,'),
)


@pytest.mark.parametrize("name, read, old, new", PLANTED)
def test_a_silent_acceptance_is_not_explained(name, read, old, new, inputs, tmp_path):
    (reader,) = chosen(readers(inputs), [name])
    (file,) = reader.files
    bench = Bench(replace(reader, read=read), inputs, tmp_path)
    assert old in bench.whole[file]
    mutation = Mutation(bench.whole[file].replace(old, new, 1), "planted")
    (bench.folder / file).write_bytes(mutation.data)
    outcome = outcome_of(read, bench.folder)
    assert bench.judged(file, mutation, outcome)[0] == "unexplained", outcome


def test_a_silent_acceptance_is_drawn(inputs, tmp_path):
    (reader,) = chosen(readers(inputs), ["rows/text/lines"])
    bench = Bench(replace(reader, read=of_texts_that_are_some), inputs, tmp_path)
    assert any(bench.run(SEED, number).kind == "unexplained" for number in range(40))


def numbers(dtype: str = "F32", shape: tuple[int, ...] = (2,), *values: float) -> Numbers:
    return Numbers(dtype, shape, repr(values).encode(), values)


ONE, NAN, INF = numbers("F32", (2,), -1), float("nan"), float("inf")
LOWER, HIGHER = numbers("F32", (2,), -2), numbers("F32", (2,), 1)
IDS, BROKEN = numbers("I32"), numbers("F32", (2,), NAN)
TURNS = [{"role": "user", "content": "x"}]
FULL = ["full_attention", "sliding_attention"]
NEAR = (  # reader, path, what stands there, what else may, and what may not
    ("config/llama", "rms_norm_eps", 1e-6, 1e-5, ("1e-5", True, NAN, INF, -1e-6, None)),
    ("reward/config", "rope_parameters.rope_theta", 1e4, 1e6, (NAN, -1, 0, 1, 1e30, "1e6", [])),
    ("config/llama", "rope_parameters.factor", 8, 2.0, (0, NAN, None, "2", True)),
    ("config/llama", "rope_parameters.mscale", 1.0, None, (-1, "1", True, NAN)),
    ("config/llama", "hidden_size", 64, 64, (32, 1, None)),
    ("config/qwen3_moe", "num_experts_per_tok", 2, 3, (-1, 0, 2.0, True, 2**40, "3")),
    ("4bit/config/qwen3-fp4", "max_position_embeddings", 256, 128, (None, 0.5, -1, "256", True)),
    ("config/qwen3_moe", "norm_topk_prob", True, False, (0, 1, "false", None)),
    ("config/qwen2", "layer_types.0", "full_attention", "sliding_attention", ("full", 1, None)),
    ("config/qwen2", "layer_types", FULL, FULL[::-1], ([], FULL[:1], [*FULL, "full_attention"])),
    ("config/llama", "eos_token_id", 2, [2, 3], (-2, [-2], [[]], "2", 2**40, 1.0)),
    ("4bit/config/x", "hidden_act", "silu", "silu", ("gelu", None, ABSENT)),
    ("generation", "pad_token_id", 0, 1, ("x", [1], -7)),
    ("generation", "use_cache", True, False, (NAN,)),
    ("index", "weight_map.x", "a", "a", ("b", None)),
    ("weights/llama", "x", ONE, numbers("BF16", (2,), 3), (IDS, numbers("F32", (1,)), BROKEN)),
    ("4bit/weights/x", "x.absmax", ONE, HIGHER, (numbers("F32", (2,), INF), BROKEN)),
    ("adapter/weights/x", "x", ONE, HIGHER, (numbers("C64"), ABSENT, BROKEN)),
    ("adapter/config/x", "lora_alpha", 8, 16, ("16", INF, -1, True)),
    ("adapter/config/x", "target_modules.0", "q_proj", "q_proj", ("k_proj", None)),
    ("lessons", "logprobs", ONE, LOWER, (HIGHER, numbers("F32", (2,), NAN), ABSENT)),
    (
        "lessons",
        "tokens",
        IDS,
        numbers("I32", (2,), 3),
        (ONE, numbers("I32", (2,), 512), numbers("I32", (2,), -1)),
    ),
    ("run/checkpoint", "optimizer/0/exp_avg", ONE, LOWER, (numbers("BF16"), ABSENT, BROKEN)),
    ("run/checkpoint", "optimizer/0/exp_avg_sq", HIGHER, numbers("F32", (2,), 2), (LOWER, BROKEN)),
    ("run/checkpoint", "metadata.values.step", 2, 1, (-1, 1.0, "1", True, ABSENT, 4)),
    ("tokenizer/tokenizer", "model.vocab.x", 7, 8, ("8", 2**40, -1, None)),
    ("tokenizer/tokenizer", "added_tokens.0.id", 0, 1, ("1", 2**40, True, ABSENT)),
    ("tokenizer/tokenizer", "added_tokens.0.x", 0, 0, (1, ABSENT)),
    ("tokenizer/tokenizer", "decoder.add_prefix_space", True, False, (1, "true", [])),
    (
        "tokenizer/tokenizer_config",
        "eos_token",
        "a",
        {"content": "b"},
        (1, ["a"], {}, {"content": 1}, "no token"),
    ),
    ("tokenizer/generation_config", "eos_token_id", 2, [10**9, 3], (10**9, [10**9], "2", True)),
    ("template/chat", "", "a", "b", ("\ud800", None)),
    ("flags/kwargs", "enable_thinking", True, [1], (NAN, "\ud800")),
    ("rows/text/lines", "cell.text", "a", "b", ("\ud800", 1, None, ABSENT, ["b"])),
    ("rows/preferences/lines", "cell.margin", 0.5, 1, (NAN, "1", True, INF)),
    ("rows/judged/lines", "cell.label", True, 0, (2, "yes", None, 0.5)),
    (
        "rows/messages/lines",
        "cell.messages",
        [],
        TURNS,
        ("x", [1], [{"role": 1}], [{"role": "user", "content": 1}]),
    ),
    (
        "rows/tools/lines",
        "cell.messages",
        [],
        [{"role": "tool", "content": 1}],
        ([{"role": "tool", "content": NAN}],),
    ),
    ("gguf", "fields.bos_token_id", [4, b"\2"], ABSENT, ([4, b"\3"], [5, b"\2"])),
    ("gguf", "fields.note", ABSENT, [4, b"\2"], ()),
    ("rows/tools/lines", "cell.tools", [], "[]", ("x", {}, 1)),
    ("gguf", "fields.x.1", b"\0" * 4, b"\0" * 4, (b"\1\0\0\0",)),
    ("gguf", "fields", {}, {}, (None, {"llama.block_count": [4, b"\2"]})),
)


@pytest.mark.parametrize("reader, path, before, right, wrong", NEAR)
def test_a_class_takes_what_is_right_and_nothing_near_it(reader, path, before, right, wrong):
    place = tuple(int(key) if key.isdecimal() else key for key in path.split(".") if key)
    if right != before:
        assert class_of(reader, Difference(place, before, right)) is not None
    for value in wrong:
        assert class_of(reader, Difference(place, before, value)) is None, value


@pytest.mark.parametrize(
    "key, right, wrong",
    [
        ("llama.rope.freq_base", 5e5, (NAN, INF, -1.0, 1.0)),
        ("llama.attention.layer_norm_rms_epsilon", 1e-6, (NAN, INF, -1e-6)),
        ("llama.context_length", 7, (0, 2**31)),
        ("tokenizer.ggml.eos_token_id", 3, (512, 2**32 - 1)),
    ],
)
def test_a_class_of_gguf_takes_numbers_that_the_key_may_have(key, right, wrong):
    packed = "<f" if isinstance(right, float) else "<I"
    field = lambda value: Difference(("fields", key, 1), b"\0\0\0\1", struct.pack(packed, value))
    assert class_of("gguf", field(right)) == "field"
    assert not any(class_of("gguf", field(value)) for value in wrong)


def test_a_file_that_contradicts_itself_is_not_explained(inputs):
    """Two tokens on one id, one token on two, more experts for a token than there are."""
    whole = (inputs / "small" / "tokenizer.json").read_bytes()
    value = json.loads(whole)
    name = next(iter(value["model"]["vocab"]))
    for token, token_id in (("new", value["model"]["vocab"][name]), (name, 700)):
        changed = value | {
            "added_tokens": [
                *value["added_tokens"],
                value["added_tokens"][0] | {"content": token, "id": token_id},
            ]
        }
        assert explained("tokenizer/tokenizer", "json", whole, json.dumps(changed).encode()) == []
    whole = (inputs / "qwen3_moe" / "config.json").read_bytes()
    changed = json.loads(whole) | {"num_experts_per_tok": 5}
    assert explained("config/qwen3_moe", "json", whole, json.dumps(changed).encode()) == []


def test_what_is_not_finite_is_told_apart(inputs, tmp_path):
    (reader,) = chosen(readers(inputs), ["weights/llama"])
    bench = Bench(reader, inputs, tmp_path)
    data = bench.whole["model.safetensors"]
    mutation = Mutation(data[:-4] + struct.pack("<f", 3e38), "planted")
    assert (
        bench.judged("model.safetensors", mutation, Outcome("accepted", "x not finite"))[0]
        == "accepted, not finite"
    )
    assert bench.judged("model.safetensors", mutation, Outcome("accepted", "x"))[0] == "accepted, differs"
