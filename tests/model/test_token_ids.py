"""End tokens: which of those that a folder names can end a text, and what is said of the others."""

import json
import shutil
from pathlib import Path

import pytest
from burnish.model import InputError, ModelConfig, Transformer, vocabulary
from burnish.model.checkpoint import load_model
from burnish.model.generate import SamplingParams, generate, stream
from burnish.model.text.token_ids import read_stop_ids
from burnish.model.text.tokenizer import Tokenizer
from burnish.model.vocabulary import say_what_never_ends

DATA = Path(__file__).parents[1] / "data"
CONFIG, GENERATION = "config.json", "generation_config.json"


@pytest.fixture(autouse=True)
def nothing_said():
    vocabulary.warn_once.cache_clear()


def known(token: int) -> str | None:
    return str(token) if token < 20 else None


def write(folder: Path, file: str, **content) -> None:
    (folder / file).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("value", "ids"), [(2, [2]), ([3, 2], [3, 2]), (25, [25]), (-1, []), ([-1, 2], [2]), ([], []), (None, [])]
)
def test_end_tokens_are_read(tmp_path, value, ids, capsys):
    write(tmp_path, GENERATION, eos_token_id=value)
    write(tmp_path, CONFIG, vocab_size=30)
    assert read_stop_ids(tmp_path, known) == ids
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("file", [CONFIG, GENERATION])
@pytest.mark.parametrize("value", [30, 10**9, 2**31 - 1, [30, 31]])
def test_end_tokens_that_nothing_has_are_refused(tmp_path, file, value):
    write(tmp_path, CONFIG, vocab_size=30)
    write(tmp_path, file, **json.loads((tmp_path / CONFIG).read_text()) | {"eos_token_id": value})
    with pytest.raises(
        InputError, match=rf"{file}: eos_token_id: expected a token that ends a text.*head of 30 rows"
    ):
        read_stop_ids(tmp_path, known)


@pytest.mark.parametrize(
    "value", [True, 1.0, "2", [[2]], [True], {}, {"a": 2}, 2**31, -2, [2, 2**63], "\u202e"]
)
@pytest.mark.parametrize("file", [CONFIG, GENERATION])
def test_end_tokens_of_another_type_are_refused(tmp_path, file, value):
    write(tmp_path, file, eos_token_id=value)
    with pytest.raises(InputError, match=rf"{file}: eos_token_id: expected a token's id or a list") as error:
        read_stop_ids(tmp_path, known)
    assert str(error.value).isprintable()


def test_one_of_several_that_nothing_has_is_left_out_and_said_once(tmp_path, capsys):
    write(tmp_path, GENERATION, eos_token_id=[2, 99])
    for _ in range(3):
        assert read_stop_ids(tmp_path, known) == [2]
    printed = capsys.readouterr().err
    assert printed == f"warning: {tmp_path / GENERATION}: eos_token_id: [99] is not a token and is ignored\n"


def test_a_tokenizer_is_loaded_without_end_tokens_that_it_does_not_have(data, tmp_path):
    for file in (data / "tokenizer").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    write(tmp_path, GENERATION, eos_token_id=10**9)
    with pytest.raises(InputError, match="eos_token_id: expected a token that ends a text"):
        Tokenizer.load(tmp_path)


def test_generation_says_which_end_tokens_are_never_drawn(capsys):
    model = Transformer(ModelConfig(31, 16, 24, 1, 2))
    generate(model, [[1, 2]], SamplingParams(max_new_tokens=2, stop_ids={3, 40}))
    list(stream(model, [1, 2], SamplingParams(max_new_tokens=2, stop_ids={3, 40})))
    say_what_never_ends({3, 40}, 31)
    expected = (
        "warning: the model has rows only for ids below 31, so the stop ids [40] never end a generation\n"
    )
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize("key", ["bos_token_id", "eos_token_id", "pad_token_id"])
def test_a_token_of_generation_config_is_an_id(key, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(DATA / "tiny-hf" / "llama", folder)
    file = folder / "generation_config.json"
    for value in (2, 0, -1, None, *([[2, 3], []] if key == "eos_token_id" else [])):
        file.write_text(json.dumps({key: value, "temperature": 0.7, "anything": {"at": ["all"]}}))
        assert load_model(folder).config.generation[key] == value
    for value in (-2, 2**31, 10**30, 1.0, 1e-308, True, "2", {}, {"x": []}, ["x"], [[2]], float("inf")):
        file.write_text(json.dumps({key: value}))
        with pytest.raises(InputError, match=rf"generation_config\.json: {key}: expected a token's id, got"):
            load_model(folder)


@pytest.mark.parametrize("value", [float("nan"), [{"y": float("-inf")}]])
def test_a_number_that_is_not_finite_is_not_carried_along(value, tmp_path):
    folder = shutil.copytree(DATA / "tiny-hf" / "llama", tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"temperature": value}))
    with pytest.raises(InputError, match=r"generation_config\.json: expected finite numbers, as in JSON"):
        load_model(folder)
