"""Conversations have the ids of transformers' apply_chat_template, under every template that TRL ships."""

import importlib.util
import json
import random
import sys
from pathlib import Path

import pytest
from burnish.algorithms.data.examples import sft_examples
from burnish.algorithms.data.rendering import whole_form
from burnish.model.errors import InputError
from burnish.model.text import sandbox
from burnish.model.text.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
trl = pytest.importorskip("trl", reason="trl is not installed")

TESTS = Path(__file__).parents[1]
TEMPLATES = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))


def module(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found
    spec.loader.exec_module(found)
    return found


def test_the_golden_ids_are_still_what_transformers_gives(monkeypatch, shared_data):
    monkeypatch.setenv("TRL_TEMPLATES", str(shared_data / "chat_templates"))
    stored = json.loads((TESTS / "data" / "chat.json").read_text(encoding="utf-8"))
    assert module(TESTS / "data" / "make_chat_golden.py").compute() == stored
    ours = module(TESTS / "algorithms" / "test_chat_golden.py").test_rows_have_the_ids_of_transformers
    for entry in stored:  # those whose template comes with trl, too
        ours(shared_data, monkeypatch, entry)


def test_every_template_renders_what_transformers_renders(monkeypatch):
    """Random conversations, each in the form in which the template leaves nothing out; some are refused."""
    golden = module(TESTS / "data" / "make_chat_golden.py")
    conversation = module(TESTS / "algorithms" / "test_rendering.py").conversation
    monkeypatch.setattr(sandbox, "datetime", golden.FrozenClock)
    monkeypatch.setattr(transformers.utils.chat_template_utils, "datetime", golden.FrozenClock)
    theirs = transformers.AutoTokenizer.from_pretrained(TESTS / "data" / "tokenizer", bos_token=golden.BOS)
    ours = Tokenizer.load(TESTS / "data" / "tokenizer")

    compared = {}
    for file in TEMPLATES:
        one = Tokenizer(ours.backend, eos="<|im_end|>", chat_template=file.read_text(), config=ours.config)
        one.config["bos_token"] = golden.BOS
        compared[file.stem] = 0
        for seed in range(100):
            if compared[file.stem] == 4:
                break

            draw = random.Random(seed)
            messages, variables = (
                conversation(draw),
                {"tools": [golden.WEATHER]} if draw.random() < 0.5 else {},
            )
            try:
                messages, _ = whole_form(messages, one, variables, ask=False)
            except InputError:
                continue

            for ask in (False, True):
                expected = theirs.apply_chat_template(
                    messages,
                    chat_template=one.chat_template,
                    add_generation_prompt=ask,
                    return_dict=False,
                    **variables,
                )
                assert one.encode_chat(messages, add_generation_prompt=ask, **variables) == expected
            compared[file.stem] += 1
    assert len(compared) > 60 and set(compared.values()) == {4}, compared


def test_a_template_of_its_own_for_tools(tmp_path):
    """A folder with several templates: transformers takes tool_use where there are tools, and reads what we save."""
    ours = Tokenizer.load(TESTS / "data" / "tokenizer")
    ours.tool_template = "{{ tools | tojson }}" + str(ours.chat_template)
    ours.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    talk = [{"role": "user", "content": "a"}]
    for tools in (None, [{"name": "f"}]):
        ids = theirs.apply_chat_template(talk, tools=tools, return_dict=False)
        assert Tokenizer.load(tmp_path).encode_chat(talk, tools=tools) == ids
    assert theirs.apply_chat_template(talk, return_dict=False) != ids


def test_a_tool_conversation_under_qwen3(shared_data):
    """Each of the assistant's turns is the sequence that generation would see, its tools in front."""
    folder = shared_data / "tokenizers" / "qwen3"
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    golden = module(TESTS / "data" / "make_chat_golden.py")
    examples, counts = sft_examples(
        [{"messages": golden.CALLED, "tools": json.dumps([golden.WEATHER])}],
        Tokenizer.load(folder),
        max_length=4096,
    )
    assert len(examples) == 2 and counts.unused == []
    for example, turns in zip(examples, (golden.CALLED[:3], golden.CALLED), strict=True):
        assert example.tokens == theirs.apply_chat_template(turns, tools=[golden.WEATHER], return_dict=False)
    without = theirs.apply_chat_template(golden.CALLED, return_dict=False)
    assert len(examples[1].tokens) > len(without) + 100
