"""Columns and keys of a row: what reaches the template is used, and a printed line names what does not."""

import json
import random
import re
import string
from pathlib import Path

import pytest
from burnish.algorithms.data import messages, row_template, rows
from burnish.algorithms.data import row as row_file
from burnish.algorithms.data.examples import rl_prompts, sft_examples
from burnish.algorithms.data.functions import takes
from burnish.algorithms.data.pairs import judged_completions, preferences
from burnish.algorithms.data.row import SHAPES
from burnish.algorithms.data.rows import report_counts
from burnish.algorithms.data.tokenizer import load_tokenizer
from burnish.algorithms.sft import Config
from burnish.model.errors import InputError
from burnish.model.text.tokenizer import Tokenizer
from conversations import ASSISTANT, PAIRS, READERS, RESULT, ROWS, TEMPLATE, TOOLS, USER, read, sft, turn


@pytest.fixture(scope="module")
def chat(make) -> Tokenizer:
    return make(TEMPLATE)


# ---- columns


def test_every_shape_is_read_and_a_template_drops_its_columns():
    """A row of each shape is read; what a row template makes is not overruled by a column of the file."""
    found = {next(n for n, columns in SHAPES.items() if set(columns) <= row.keys()) for row in ROWS.values()}
    assert found == SHAPES.keys()
    for columns in SHAPES.values():
        row = row_file.Row(dict.fromkeys((*columns, "other"), "x"), "file line 1")
        made = row_template._row(row, {"text": "made"}, set())
        assert (
            made["text"] == "made"
            and next(n for n, names in SHAPES.items() if set(names) <= made.keys()) == "text"
        )


def test_a_shape_that_nothing_is_built_for_is_no_alpaca(chat, monkeypatch):
    monkeypatch.setitem(SHAPES, "new", ("input", "target"))
    row = row_file.Row({"input": "a", "target": "b"}, "file line 1")
    with pytest.raises(AssertionError, match="SHAPES has the shape 'new', for which nothing is built"):
        sft_examples([row], chat, max_length=99, train_on="completion")


@pytest.mark.parametrize(
    "reader, name", [(reader, name) for reader, rows in READERS.items() for name in rows]
)
def test_a_column_that_nothing_reads_is_named(chat, reader, name):
    """A random one, in one row of several, so that no list of names could do it; and no column that is read."""
    draw = random.Random(f"{reader} {name}")
    row = READERS[reader][name]
    assert read(reader, [row, row], chat).unused == []
    for value in ("a text", 3, [1], {"a": None}, False):
        key = "".join(draw.choices(string.ascii_letters + "_", k=draw.randint(1, 12)))
        assert read(reader, [row, row | {key: value}], chat).unused == [key]


@pytest.mark.parametrize("taken", [True, False])
def test_a_column_that_a_reward_function_takes_is_used(chat, taken):
    def named(completions, q7):
        return [0.0]

    def keywords(completions, **columns):
        return [0.0]

    row = {"prompt": "2+2=", "q7" if taken else "q8": "x"}
    unused = lambda function: read("prompts", [row], chat, takes=lambda name: takes(function, name)).unused
    assert unused(named) == ([] if taken else ["q8"]) and unused(keywords) == []
    reserved = {"prompt": "2+2=", "completion": "4"}  # a function's own name: the column does not reach it
    assert read("prompts", [reserved], chat, takes=lambda name: takes(keywords, name)).unused == [
        "completion"
    ]


def test_what_lies_inside_a_column_is_named_too(chat):
    messages = [USER | {"x1": 1}, ASSISTANT | {"weight": 1}]
    assert read("sft", [{"messages": messages}], chat).unused == ["messages.x1"]
    row = {"instruction": "i", "instances": [{"output": "one", "x2": 1}]}
    assert read("sft", [row], chat).unused == ["instances.x2"]
    row = {"messages": [USER, ASSISTANT], "chat_template_kwargs": {"mood": "fine", "x3": 1}}
    assert read("sft", [row], chat).unused == ["chat_template_kwargs.x3"]
    assert read("prompts", [{"messages": [USER | {"weight": 1}]}], chat).unused == [
        "messages.weight of 'user'"
    ]


def test_the_margin_is_used_where_the_loss_reads_it(chat):
    row = PAIRS["texts"] | {"margin": 1.0}
    assert read("preferences", [row], chat).unused == []
    assert read("preferences", [row], chat, margins=False).unused == ["margin"]
    for margin in (float("nan"), float("inf"), "1", True):
        with pytest.raises(InputError, match="row 1: margin: expected a number, got"):
            read("preferences", [row | {"margin": margin}], chat)


def test_one_printed_line_names_them(chat, capsys):
    counts = read("sft", [ROWS["messages"] | {"b": 1, "a": 2}], chat)
    report_counts(Path("rows.jsonl"), counts)
    printed = capsys.readouterr().out.splitlines()
    assert printed == ["rows.jsonl: 1 rows, 1 examples", "rows.jsonl: columns not used: b, a"]


def test_the_line_of_columns_is_one_line(chat, capsys):
    row = ROWS["messages"] | {f"k{i}\x1b[31m\n": 1 for i in range(3000)}
    report_counts(Path("rows.jsonl"), read("sft", [row], chat))
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) == 2 and "\x1b" not in printed and len(printed) < 1000
    assert printed.endswith(" and 2970 more\n")


# ---- tools, and variables of the template


RENDERED = [(reader, name) for reader, rows in READERS.items() for name in rows if "text" not in name]


@pytest.mark.parametrize(
    "tools", [TOOLS, json.dumps(TOOLS), [json.dumps(TOOLS[0])]], ids=["list", "text", "texts"]
)
@pytest.mark.parametrize("reader, name", RENDERED)
def test_tools_reach_the_template_from_every_shape(chat, tools, reader, name):
    row = READERS[reader][name] | {"tools": tools, "chat_template_kwargs": '{"mood": "fine"}'}
    function = {"sft": sft_examples, "preferences": preferences, "judged": judged_completions}
    found, counts = function.get(reader, rl_prompts)([row], chat, max_length=4096)
    start = turn("tools", json.dumps(TOOLS)) + "mood fine\n"
    for one in found:
        ids = one.tokens if hasattr(one, "tokens") else one.prompt
        assert chat.decode(ids, False).startswith(start)
    assert found and counts.unused == []


def test_functions_are_tools_by_their_older_name(chat):
    row = ROWS["messages"] | {"functions": [TOOLS[0]["function"]]}
    assert sft(chat, row) == sft(chat, ROWS["messages"] | {"tools": TOOLS})


def test_a_template_without_tools_has_the_column_named(make):
    plain = make(TEMPLATE.replace("tools", "none_such").replace("mood", "none_such"))
    counts = read("sft", [ROWS["messages"] | {"tools": TOOLS, "chat_template_kwargs": {"mood": 1}}], plain)
    assert counts.unused == ["tools", "chat_template_kwargs.mood"]


@pytest.mark.parametrize(
    "more, message",
    [
        ({"tools": "[{"}, "row 1: tools: not JSON"),
        ({"tools": {"name": "x"}}, "row 1: tools: expected a list of tools"),
        ({"chat_template_kwargs": [1]}, "row 1: chat_template_kwargs: expected an object"),
        (
            {"chat_template_kwargs": {"messages": []}},
            "row 1: chat_template_kwargs: 'messages' cannot be set here",
        ),
        ({"chat_template_kwargs": {"tools": []}}, "row 1: chat_template_kwargs: 'tools' cannot be set here"),
    ],
)
def test_tools_and_variables_of_a_wrong_kind_are_named(chat, more, message):
    with pytest.raises(InputError, match=re.escape(message)):
        sft(chat, ROWS["messages"] | more)


def test_a_flag_sets_variables_for_a_run(folder, tmp_path):
    (tmp_path / "own.jinja").write_text(TEMPLATE)

    def tokenizer(text, template=str(tmp_path / "own.jinja")):
        return load_tokenizer(
            Config(model=folder, data=tmp_path, chat_template=template, chat_template_kwargs=text)
        )

    (text, _), *_ = sft(tokenizer('{"mood": "calm"}'), ROWS["messages"])
    assert text.startswith("mood calm\n")
    row = ROWS["messages"] | {"chat_template_kwargs": {"mood": "a row's own"}}
    assert sft(tokenizer('{"mood": "calm"}'), row)[0][0].startswith("mood a row's own\n")
    for value, message in {
        '{"mod": 1}': "the chat template reads no variable 'mod'; it reads mood, tools",
        "[1]": "expected a JSON object, got",
        "{": "not JSON",
        '{"tools": []}': "'tools' cannot be set here",
    }.items():
        with pytest.raises(InputError, match=f"--chat-template-kwargs: {re.escape(message)}"):
            tokenizer(value)
    with pytest.raises(InputError, match="--chat-template-kwargs: the rows are plain texts"):
        sft(tokenizer('{"mood": "calm"}'), ROWS["texts"])


# ---- what is read is found by looking at the text


def test_keys_that_a_template_does_not_read_are_named_wherever_they_stand(chat, make):
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}, "result": 2}}
    messages = [
        USER | {"name": "Bob", "content": [{"type": "text", "text": "hi", "annotations": 1}]},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        RESULT | {"name": "f"},
        ASSISTANT | {"analysis": {"lang": "en"}},
    ]

    found = read("sft", [{"messages": messages}], chat).unused
    inside = ["content.annotations", "name", "tool_calls.function.result", "tool_calls.id"]
    assert found == [f"messages.{name}" for name in ["analysis", *inside]]

    naming = make(
        TEMPLATE.replace("{{- '<|im_start|>' + m.role", "{{- '<|im_start|>' + (m.name or '') + m.role")
    )
    assert "messages.name" not in read("sft", [{"messages": messages}], naming).unused
    of_tools = make(TEMPLATE.replace("+ m.role", "+ m.role + (m.name if m.role == 'tool' else '')"))
    assert "messages.name" in read("sft", [{"messages": messages}], of_tools).unused  # the user's


def test_variables_that_a_template_sets_itself_are_not_read(make, folder, tmp_path):
    setting = (
        "{%- for m in messages -%}{%- set mood = m.role -%}{%- if mood == '' -%}x{%- endif -%}{%- endfor -%}"
    )
    own = make(setting + TEMPLATE.replace("mood", "calm"))
    row = ROWS["messages"] | {"chat_template_kwargs": {"mood": "x", "calm": "y", "noise": "z"}}
    assert read("sft", [row], own).unused == ["chat_template_kwargs.mood", "chat_template_kwargs.noise"]

    (tmp_path / "own.jinja").write_text(own.chat_template)
    cfg = Config(
        model=folder,
        data=tmp_path,
        chat_template=str(tmp_path / "own.jinja"),
        chat_template_kwargs='{"mood": 1}',
    )
    with pytest.raises(
        InputError, match="--chat-template-kwargs: the chat template reads no variable 'mood'"
    ):
        load_tokenizer(cfg)


def test_a_variable_of_vendors_templates_that_changes_nothing_is_refused(folder, tmp_path, shared_data):
    """Jinja's own list of what a template reads has names in it that the template sets first."""
    file = shared_data / "chat_templates" / "qwen3.jinja"
    for name, works in {"enable_thinking": True, "content": False, "reasoning_content": False}.items():
        cfg = Config(
            model=folder,
            data=tmp_path,
            chat_template=str(file),
            chat_template_kwargs=json.dumps({name: True}),
        )

        tokenizer = load_tokenizer(cfg)
        assert name in tokenizer.template_variables
        if works:
            sft(tokenizer, ROWS["messages"])
            continue
        with pytest.raises(InputError, match=f"--chat-template-kwargs: '{name}' does not change"):
            sft(tokenizer, ROWS["messages"])

    cfg = Config(
        model=folder, data=tmp_path, chat_template=str(file), chat_template_kwargs='{"thinking": true}'
    )
    with pytest.raises(InputError, match="reads no variable 'thinking'; it reads enable_thinking, tools"):
        load_tokenizer(cfg)


def test_a_variable_counts_as_read_whatever_its_value(make):
    off = make(
        TEMPLATE + "{% if add_generation_prompt and think is defined and think is false %}no{% endif %}"
    )
    for value in (True, False, None, "x"):
        row = {"messages": [USER], "chat_template_kwargs": {"think": value}}
        assert read("prompts", [row], off).unused == []


# ---- planted faults: each must be caught by the test beside it


def nothing_is_unused(self, rows, used=None):
    for row in rows:
        self.update(row.notes)


FAULTS = {
    "columns not named": (rows.Tally, "close", nothing_is_unused, "column"),
    "every column taken": (
        row_file.Row,
        "take",
        lambda row, name: row.used.update(row) or row.get(name),
        "column",
    ),
    "tools left behind": (messages, "template_variables", lambda row, tokenizer: {}, "tools"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught(monkeypatch, chat, name):
    where, attribute, fault, check = FAULTS[name]
    checks = {
        "column": lambda: test_a_column_that_nothing_reads_is_named(chat, "sft", "messages"),
        "tools": lambda: test_tools_reach_the_template_from_every_shape(chat, TOOLS, "sft", "question"),
    }
    checks[check]()
    monkeypatch.setattr(where, attribute, fault)
    with pytest.raises((AssertionError, InputError, pytest.fail.Exception)):
        checks[check]()
