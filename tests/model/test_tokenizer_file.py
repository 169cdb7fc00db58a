"""tokenizer.json and the names of special tokens: what loads can be used, saved and read again."""

import base64
import copy
import json
import os
import random
import shutil
import tempfile

import pytest
from burnish.model.errors import InputError
from burnish.model.text import special_tokens, tokenizer_file
from burnish.model.text.tokenizer import Tokenizer
from burnish.model.vocabulary import Vocabulary
from fork import in_a_fork

TEXT = "Hello, wörld! 12  \n<|im_end|> 再见"
REPLACE = {"type": "Replace", "pattern": {"String": ""}, "content": "xx"}
STRIP = {"type": "Strip", "content": "H", "start": 3, "stop": 3}
LONG_NAME = "\x1b" + "n" * 5000


@pytest.fixture(scope="module")
def settings(request):
    """Our tokenizer with fewer merges, so that it loads sooner."""
    file = request.path.parents[1] / "data" / "tokenizer" / "tokenizer.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    model = settings["model"]
    kept = {token: i for token, i in model["vocab"].items() if i < 320}
    model["vocab"], model["merges"] = kept, [m for m in model["merges"] if "".join(m) in kept]
    return settings


@pytest.fixture
def folder(data, settings, tmp_path):
    shutil.copytree(data / "tokenizer", tmp_path / "copy")
    (tmp_path / "copy" / "tokenizer.json").write_text(json.dumps(settings), encoding="utf-8")
    return tmp_path / "copy"


def added(**changes):
    token = {"id": 320, "content": "<new>", "single_word": False, "lstrip": False, "rstrip": False}
    return lambda s: s["added_tokens"].append(token | {"normalized": False, "special": True} | changes)


def vocabulary(token, token_id):
    return lambda s: s["model"]["vocab"].update({token: token_id})


def part(name, value):
    return lambda s: s.update({name: value})


def charsmap(raw):
    return part("normalizer", {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(raw).decode()})


REFUSED = {
    "two tokens on one id": (vocabulary("zzz", 300), "the id 300 has two tokens, .* and zzz|zzz and"),
    "a special token's id": (vocabulary("zzz", 2), r"the id 2 has two tokens, <\|im_end\|> and zzz"),
    "an id of 2^31": (vocabulary("zzz", 2**31), "zzz: expected an id from 0 to 16777215, got 2147483648"),
    "an id of 2^32 - 1": (vocabulary("zzz", 2**32 - 1), "expected an id from 0"),
    "an id of 10^20": (vocabulary("zzz", 10**20), "expected an id from 0"),
    "a negative id": (vocabulary("zzz", -1), "expected an id from 0"),
    "an id with a fraction": (vocabulary("zzz", 1.5), "not a tokenizer.json"),
    "a long name": (vocabulary(LONG_NAME, 2**31), "expected an id from 0"),
    "an added id of 2^31": (added(id=2**31), "<new>: expected an id from 0"),
    "an added id beyond the next": (
        added(id=400),
        "<new>: expected its id in the vocabulary or the next free one, got 400, which `tokenizers` changes to 320",
    ),
    "an added token on an id": (
        added(id=2),
        "<new>: expected its id in the vocabulary or the next free one, got 2, which",
    ),
    "an added token without text": (
        added(content=""),
        "expected its id in the vocabulary or the next free one, got 320, which",
    ),
    "a normalizer that panics": (part("normalizer", REPLACE), "can read: index out of bounds"),
    "a charsmap without end": (charsmap(b"\xff\xff\xff\xff\x00\x00\x00\x00"), "precompiled_charsmap"),
    "a charsmap without a tree": (charsmap(b""), "precompiled_charsmap"),
    "a decoder that panics": (part("decoder", STRIP), "can read: index out of bounds"),
    "no such part": (part("pre_tokenizer", {"type": "Foo"}), "not a tokenizer.json"),
    "a broken expression": (
        part("normalizer", REPLACE | {"pattern": {"Regex": "("}}),
        "not a tokenizer.json .*parenthesis",
    ),
    "a key twice": (lambda s: s.update({"version\x00": 1}), "not a tokenizer.json"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_file_that_cannot_be_used_is_refused(folder, settings, kind, capfd):
    """The refusal is one sentence, and nothing of what Rust writes to standard error is seen."""
    change, message = REFUSED[kind]
    changed = copy.deepcopy(settings)
    change(changed)
    (folder / "tokenizer.json").write_text(json.dumps(changed), encoding="utf-8")
    with pytest.raises(InputError, match=rf"tokenizer\.json: .*{message}") as caught:
        Tokenizer.load(folder)
    assert len(str(caught.value)) <= 600 and str(caught.value).isprintable()
    assert capfd.readouterr().err == ""


def test_what_the_package_writes_without_a_panic_is_shown(capfd):
    with tokenizer_file._without_panics():
        os.write(2, b"a warning\n")
    assert capfd.readouterr().err == "a warning\n"


def test_a_file_is_read_where_nothing_can_be_written(folder, monkeypatch):
    """Neither beside it, in a temporary folder, nor to standard error."""
    saved, full = os.dup(2), os.open("/dev/full", os.O_WRONLY)
    try:
        os.dup2(full, 2)
        with tokenizer_file._without_panics():
            os.write(2, b"a warning\n")
        monkeypatch.setattr(tempfile, "tempdir", str(folder / "nowhere"))
        Tokenizer.load(folder)
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(full)


def test_an_id_may_be_missing_and_nothing_varies(folder, settings, tmp_path):
    changed = copy.deepcopy(settings)
    changed["model"] |= {"vocab": settings["model"]["vocab"] | {"zzz": 5000}, "dropout": 0.5}
    changed["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 4}
    (folder / "tokenizer.json").write_text(json.dumps(changed), encoding="utf-8")
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.vocabulary.size == 321 and tokenizer.vocabulary.end == 5001
    assert len({tuple(tokenizer.encode(TEXT * 3)) for _ in range(8)}) == 1
    tokenizer.save(tmp_path / "saved")
    assert Tokenizer.load(tmp_path / "saved").encode(TEXT * 3) == tokenizer.encode(TEXT * 3)


def test_a_text_on_which_the_tokenizer_fails_is_named(folder, settings):
    """A regular expression without end, and a word that is unknown where no token is for the unknown."""
    changed = copy.deepcopy(settings)
    pattern = {"Regex": "(a+)+$"}
    changed["pre_tokenizer"] = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    (folder / "tokenizer.json").write_text(json.dumps(changed), encoding="utf-8")
    with pytest.raises(InputError, match=r"the tokenizer fails on 'aaaa.*: Onig: .*retry-limit"):
        Tokenizer.load(folder).encode("a" * 30 + "b")
    changed["model"] = {"type": "WordLevel", "vocab": {"<|endoftext|>": 0, "a": 3}, "unk_token": "<unk>"}
    changed["added_tokens"] = changed["added_tokens"][:1]
    (folder / "tokenizer.json").write_text(json.dumps(changed), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text("{}")
    assert Tokenizer.load(folder).encode("a") == [3]
    with pytest.raises(InputError, match=r"the tokenizer fails on 'b': .*Missing"):
        Tokenizer.load(folder).encode("b")


# ---- special tokens

WRONG = [7, 1.5, True, ["<|im_end|>"], {}, {"content": None}, {"content": 3}]
EMPTY = ["", {"content": ""}]


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("name", ["eos_token", "bos_token", "sep_token"])
def test_a_special_token_of_a_wrong_type_is_refused(folder, file, name):
    absent = [None] if name == "eos_token" else [None, *EMPTY]
    for value in WRONG + [value for value in EMPTY if value not in absent]:
        (folder / file).write_text(json.dumps({name: value}))
        with pytest.raises(InputError, match=rf"{file}: {name}: expected a token's text, .*got"):
            Tokenizer.load(folder)
    for value in absent:
        (folder / file).write_text(json.dumps({name: value}))
        Tokenizer.load(folder)


@pytest.mark.parametrize(
    "name, value", [("num_image_token", 256), ("use_image_token", True), ("stop_token", ["a"])]
)
def test_a_setting_whose_name_ends_like_a_token_is_no_token(folder, name, value):
    (folder / "tokenizer_config.json").write_text(json.dumps({name: value, "image_token": "<image>"}))
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.config[name] == value and tokenizer.config["image_token"] == "<image>"


@pytest.mark.parametrize(
    "name, value, expected",
    [
        *(("add_bos_token", value, "true, false or null") for value in (0, 1, "true", [True], {})),
        *(("additional_special_tokens", value, "a list of tokens") for value in (1, "a", True)),
        *(("additional_special_tokens", value, "a token's text") for value in ([1], [None], [""], [{}])),
        ("extra_special_tokens", {"image_token": 3}, "a token's text"),
        ("chat_template", [1], "objects with a name"),
        ("chat_template", [{"template": "a"}], "objects with a name"),
        ("chat_template", {"default": "a"}, "expected a text"),
        ("eos_token", LONG_NAME, "is not in the vocabulary"),
    ],
)
def test_other_keys_of_a_wrong_type_are_refused(folder, name, value, expected):
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({name: value}))
    with pytest.raises(InputError, match=expected):
        Tokenizer.load(folder)


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_a_stop_id_is_a_whole_number(folder, file):
    for name in ("generation_config.json", "config.json"):
        (folder / name).unlink(missing_ok=True)
    for value in (True, -2, 1.0, 2**31, 2**63, 10**30, "2", [[2]], [2, False], [2, None], {}, float("nan")):
        (folder / file).write_text(json.dumps({"eos_token_id": value}))
        with pytest.raises(InputError, match=rf"{file}: eos_token_id: expected a token's id or a list"):
            Tokenizer.load(folder)
    (folder / file).write_text('{"eos_token_id": [2147483647, 0]}')
    assert Tokenizer.load(folder).stop_ids == {0, 2}


@pytest.mark.parametrize(
    "file",
    ["tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "chat_template.jinja"],
)
def test_what_is_no_file_is_not_absent(folder, file):
    (folder / file).unlink(missing_ok=True)
    (folder / file).symlink_to("nowhere")
    with pytest.raises(InputError, match=f"{file}: not a regular file"):
        Tokenizer.load(folder)
    (folder / file).unlink()
    os.mkfifo(folder / file)
    with pytest.raises(InputError, match=f"{file}: not a regular file"):
        Tokenizer.load(folder)


# ---- any file

VALUES = [
    None,
    True,
    False,
    0,
    -1,
    1,
    3,
    319,
    2**31,
    2**32 - 1,
    10**9,
    0.5,
    "",
    "x",
    "<|im_end|>",
    "▁",
    "\x00",
]
VALUES += ["a" * 9000, [], {}, [[]], [1], ["a"], {"a": 1}, [None]]
PARTS = [
    {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True},
    {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, {"type": "NFC"}]},
    {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}]},
    {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}, STRIP]},
    {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}},
    *({"type": name} for name in ("NFC", "Whitespace", "Fuse", "ByteFallback", "BPE", "Lowercase")),
    *(REPLACE, STRIP, REPLACE | {"content": ""}, {"type": "Prepend", "prepend": ""}),
]


def mutated(settings, draw):
    """A copy with one to three places changed, mostly outside of the vocabulary."""
    found = copy.deepcopy(settings)
    for _ in range(draw.choice((1, 1, 2, 3))):
        parent, key = found, draw.choice(list(found))
        while isinstance(parent[key], dict | list) and parent[key] and draw.random() < 0.75:
            parent = parent[key]
            key = draw.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))

        kind = draw.choice(("set", "set", "part", "delete", "add", "copy"))
        if kind == "set":
            parent[key] = copy.deepcopy(draw.choice(VALUES))
        elif kind == "part":
            name = draw.choice(("normalizer", "pre_tokenizer", "post_processor", "decoder"))
            found[name] = copy.deepcopy(draw.choice(PARTS))
        elif kind == "delete":
            del parent[key]
        elif isinstance(parent, dict):
            parent[f"{key}x" if kind == "add" else draw.choice(list(parent))] = copy.deepcopy(parent[key])
        if not found:
            return found
    return found


def round_trips(settings, folder, count):
    """The number of mutations that are used: these have the same ids once saved and loaded."""
    used = 0
    for seed in range(count):
        text = json.dumps(mutated(settings, random.Random(seed)))
        (folder / "tokenizer.json").write_text(text, encoding="utf-8")
        try:
            first = Tokenizer.load(folder)
        except InputError:
            continue

        first.save(folder / "saved")
        second = Tokenizer.load(folder / "saved")
        assert second.backend.get_vocab() == first.backend.get_vocab(), seed
        for options in ({}, {"continues": True}):
            try:
                ids = first.encode(TEXT, **options)
            except InputError:
                continue
            assert second.encode(TEXT, **options) == ids, seed
            assert second.decode(ids) == first.decode(ids), seed
        assert second.stop_ids == first.stop_ids and second.prefix_ids == first.prefix_ids, seed
        used += 1
    return used


@pytest.mark.parametrize("count", [60, pytest.param(300, marks=pytest.mark.slow)])
def test_whatever_loads_is_saved_and_loads_again(folder, settings, count):
    used = in_a_fork(lambda: round_trips(settings, folder, count))
    assert isinstance(used, int) and count / 6 < used < count * 5 / 6, used


@pytest.mark.parametrize(
    "owner, name, planted, change, message",
    [
        (tokenizer_file, "distinct_ids", lambda _: Vocabulary(320), vocabulary("zzz", 300), "two tokens"),
        (tokenizer_file, "_check_ids", lambda *_: None, vocabulary("zzz", 2**24), "expected an id"),
        (special_tokens, "_refuse", lambda *_: None, part("x", 1), "expected a token's text"),
    ],
    ids=["two tokens", "large ids", "wrong types"],
)
def test_planted_faults_are_caught(folder, settings, monkeypatch, owner, name, planted, change, message):
    changed = copy.deepcopy(settings)
    if owner is special_tokens:
        (folder / "special_tokens_map.json").write_text('{"sep_token": 3}')
    else:
        change(changed)
        (folder / "tokenizer.json").write_text(json.dumps(changed), encoding="utf-8")
        monkeypatch.setattr(tokenizer_file, "SMALL", 1 if name == "distinct_ids" else 2**20)
    with pytest.raises(InputError, match=message):
        Tokenizer.load(folder)
    monkeypatch.setattr(owner, name, planted)
    Tokenizer.load(folder)


# ---- texts that grow


def replaced(found, content, key="String"):
    return {"type": "Replace", "pattern": {key: found}, "content": content}


def in_sequence(parts, key="normalizers"):
    return {"type": "Sequence", key: parts}


TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "a", "type_id": 0}}] * 20000,
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"a": {"id": "a", "ids": [1] * 2000, "tokens": ["b"] * 2000}},
}
GROWING = [
    {"normalizer": in_sequence([replaced("l", "ll")] * 40)},
    {"normalizer": in_sequence([replaced("", "l")] * 40)},
    {"normalizer": in_sequence([replaced("x*", "l", "Regex")] * 40)},
    {"normalizer": in_sequence([replaced(r"\p{L}", "ll", "Regex")] * 40)},
    {"normalizer": in_sequence([in_sequence([replaced("l", "l" * 9000)])] * 3)},
    {"normalizer": in_sequence([{"type": "Prepend", "prepend": "l" * 9000}, replaced("l", "l" * 9000)])},
    {"decoder": in_sequence([{"type": "Fuse"}, *[replaced("l", "l" * 9000)] * 3], "decoders")},
    {"post_processor": TEMPLATE},
]


@pytest.mark.parametrize("padding", [0, 2**20], ids=["small", "large"])
def test_a_text_that_grows_and_grows_is_refused(folder, settings, padding):
    """Each would take gigabytes, and did where the text is encoded."""
    for change in GROWING:
        changed = json.dumps({**settings, **change}) + " " * padding
        (folder / "tokenizer.json").write_text(changed, encoding="utf-8")
        found = in_a_fork(lambda: str(Tokenizer.load(folder)), seconds=10, gigabytes=1)
        assert found is not None and "times as long" in found, (change, found)


def test_normalizers_of_published_tokenizers_are_read(folder, settings):
    parts = [
        replaced(r" {2,}", "\u2581", "Regex"),
        replaced("``", '"'),
        replaced(" ", "\u2581"),
        {"type": "NFKC"},
    ] * 10
    (folder / "tokenizer.json").write_text(json.dumps({**settings, "normalizer": in_sequence(parts)}))
    assert Tokenizer.load(folder).encode("a")
