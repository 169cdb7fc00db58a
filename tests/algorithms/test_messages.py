"""All that a message says is trained: it stands in the text, or the row is refused, or a printed line names it."""

import json
import random
from datetime import datetime
from decimal import Decimal

import pytest
from burnish.algorithms.data import examples, messages, tables
from burnish.algorithms.data.examples import rl_prompts, sft_examples
from burnish.algorithms.data.rendering import Form
from burnish.algorithms.data.rows import read_rows
from burnish.model.errors import InputError
from burnish.model.text.tokenizer import Tokenizer
from conversations import (
    ASSISTANT,
    CALL,
    PARTS,
    RESULT,
    ROWS,
    SHAREGPT,
    TEMPLATE,
    TOOLS,
    USER,
    read,
    sft,
    turn,
)


@pytest.fixture(scope="module")
def chat(make) -> Tokenizer:
    return make(TEMPLATE)


# ---- nulls


def ragged_rows(draw: random.Random) -> list[dict]:
    """Conversations with calls whose arguments have other names each, and keys that only some messages have."""
    rows = []
    for i in range(6):
        name = draw.choice(["city", "zone", "day"])
        arguments = {"deep": {draw.choice("xyz"): i}, name: draw.choice(["Oslo", "Rome"])}
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        talk = [
            USER,
            {"role": "assistant", "content": "", "tool_calls": [call]},
            RESULT | {"content": f"r{i}"},
        ]
        talk += [ASSISTANT | ({"thinking": "hm"} if draw.random() < 0.5 else {})]
        rows.append({"messages": talk if draw.random() < 0.7 else [USER, ASSISTANT], "tools": TOOLS})
    return rows


@pytest.mark.parametrize("seed", range(2))
def test_parquet_and_jsonl_of_the_same_rows_train_the_same_text(make, chat, tmp_path, seed):
    """Arrow gives every object the fields of all, null where a row has none. Those that it has keep one order."""
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    rows = ragged_rows(random.Random(seed))
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    one, other = (read_rows(tmp_path / name) for name in ("a.parquet", "a.jsonl"))
    assert "null" in json.dumps(table.to_pylist()) and "null" not in json.dumps([one, other])
    assert sft(chat, *one) == sft(chat, *other)
    assert "null" not in str(sft(chat, *one))
    strict = make(
        TEMPLATE.replace("{%- for call in m.tool_calls -%}", "{%- for call in m['tool_calls'] or [] -%}")
    )
    assert sft(strict, *one) == sft(strict, *other)


def test_a_map_of_parquet_is_an_object(chat, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    kind = pyarrow.list_(
        pyarrow.struct(
            [("role", pyarrow.string()), ("content", pyarrow.map_(pyarrow.string(), pyarrow.string()))]
        )
    )
    rows = [[{"role": "tool", "content": [("city", "Oslo")]}]]
    table = pyarrow.table({"messages": pyarrow.array(rows, kind)})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert read_rows(tmp_path / "a.parquet")[0]["messages"][0]["content"] == {"city": "Oslo"}


def test_a_null_that_json_spells_out_in_arguments_is_data(chat):
    call = {"function": {"name": "f", "arguments": {"city": "Oslo", "zone": None}}, "id": None}
    ((text, _),) = sft(
        chat, {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [call]}]}
    )
    assert '<call>f{"city": "Oslo", "zone": null}' in text


def test_a_null_of_a_message_is_absent(make):
    """gpt-oss and DeepSeek ask whether a message has tool_calls, not which."""
    strict = make(TEMPLATE.replace("m.tool_calls", "(m['tool_calls'][0:] if 'tool_calls' in m else [])"))
    nulls = {"tool_calls": None, "thinking": None, "name": None, "function_call": None, "weight": None}
    assert sft(strict, {"messages": [USER | nulls, ASSISTANT | nulls]}) == sft(strict, ROWS["messages"])


# ---- contents


def test_parts_are_joined_where_the_template_takes_text(chat, make, folder):
    row = {"messages": [{"role": "user", "content": PARTS}, ASSISTANT]}
    assert sft(chat, row) == sft(chat, ROWS["messages"])
    assert sft(chat, {"messages": [{"role": "user", "content": ["a ", "question"]}, ASSISTANT]}) == sft(
        chat, row
    )

    plain = Tokenizer.load(folder, "plain")  # would print Python's list
    assert sft(plain, row) == sft(plain, ROWS["messages"])

    printed = make(
        TEMPLATE.replace("m.content is string", "m.content is not none").replace(
            "- m.content -", "- m.content | string -"
        )
    )
    assert sft(printed, row) == sft(chat, row)
    dumped = make(
        TEMPLATE.replace("m.content is string", "true").replace("- m.content -", "- m.content | tojson -")
    )
    assert sft(dumped, row)[0][0].count('"text"') == 0


def test_parts_stay_parts_where_the_template_reads_them(make):
    loop = "{%- for p in m.content -%}{{- '[' + p.text + ']' -}}{%- endfor -%}"
    reading = make(TEMPLATE.replace("{%- if m.content is string -%}{{- m.content -}}{%- endif -%}", loop))
    ((text, _),) = sft(reading, {"messages": [{"role": "user", "content": PARTS}, ASSISTANT]})
    assert text == turn("user", "[a ][question]") + turn("assistant", "[an answer]")  # a text becomes a part


@pytest.mark.parametrize(
    "message, expected",
    [
        ({"role": "assistant", "content": 3}, "content: expected text, got 3"),
        ({"role": "assistant", "content": True}, "content: expected text, got True"),
        ({"role": "assistant", "content": None}, "content: expected text, got null"),
        ({"role": "assistant"}, "content: expected text, got none"),
        ({"role": "assistant", "content": {"a": 1}}, "content: expected text, got {'a': 1}"),
        (
            {"role": "assistant", "content": [{"type": "image"}]},
            "content, part 1: expected type 'text', the only type that",
        ),
        ({"role": "assistant", "content": [{"type": "text"}]}, "content, part 1: expected text, got None"),
        ({"role": "assistant", "content": "a", "tool_calls": "x"}, "tool_calls: expected a list of calls"),
        (
            {"role": "assistant", "content": "a", "tool_calls": [{}]},
            "tool_calls: expected a name and arguments",
        ),
        ({"role": "assistant", "content": "a", "weight": 0.5}, "weight: expected 0 or 1, got 0.5"),
        ({"role": "assistant", "content": "a", "train": "no"}, "train: expected true or false, got 'no'"),
        ({"role": ["assistant"], "content": "a"}, "expected an object with a role and content"),
    ],
)
@pytest.mark.parametrize("plain", [True, False])
def test_a_message_of_a_wrong_kind_is_refused_by_file_line_and_key(
    chat, folder, tmp_path, plain, message, expected
):
    tokenizer = Tokenizer.load(folder, "plain") if plain else chat
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [USER, message]}) + "\n")
    with pytest.raises(InputError) as error:
        sft(tokenizer, *read_rows(tmp_path / "a.jsonl"))
    assert f"a.jsonl line 1: messages, message 2: {expected}" in str(error.value)


@pytest.mark.parametrize(
    "answer", [{"rain": [1, "x"]}, ["Oslo", "Bergen"], [{"type": "book"}], {}, [], [True], 7, False]
)
def test_a_tools_answer_may_be_anything(chat, make, answer):
    """It is written as JSON, by the template or for it."""
    row = {"messages": [USER, CALL, {"role": "tool", "content": answer}, ASSISTANT]}
    writing = TEMPLATE.replace(
        "{%- if m.content is string -%}{{- m.content -}}{%- endif -%}",
        "{{ m.content | tojson if m.role == 'tool' and m.content is not string else m.content }}",
    )
    for tokenizer in (chat, make(writing)):
        assert turn("tool", json.dumps(answer)) in sft(tokenizer, row)[0][0]


# ---- calls and roles


def test_calls_of_every_spelling_are_the_same_text(chat):
    expected = sft(chat, {"messages": [USER, CALL, RESULT, ASSISTANT]})
    arguments = '{"city": "Oslo"}'
    function = {"name": "weather", "arguments": arguments}
    older = {"role": "assistant", "content": None, "function_call": function}
    for talk in (
        [USER, CALL | {"content": ""}, RESULT, ASSISTANT],
        [USER, {"role": "assistant", "tool_calls": CALL["tool_calls"]}, RESULT, ASSISTANT],
        [USER, CALL | {"tool_calls": [{"id": "1", "function": function}]}, RESULT, ASSISTANT],
        [USER, older, {"role": "function", "name": "weather", "content": "rain"}, ASSISTANT],
    ):
        assert sft(chat, {"messages": talk}) == expected

    for value in (json.dumps(function), json.dumps([CALL["tool_calls"][0]["function"]])):
        talk = [
            SHAREGPT[0],
            {"from": "function_call", "value": value},
            {"from": "observation", "value": "rain"},
        ]
        assert sft(chat, {"conversations": [*talk, SHAREGPT[1]]}) == expected

    with pytest.raises(
        InputError, match="message 2: function_call: expected JSON of a name and arguments, got 'x'"
    ):
        sft(chat, {"conversations": [SHAREGPT[0], {"from": "function_call", "value": "x"}]})


def test_arguments_are_text_where_the_template_adds_text(make):
    adding = make(
        TEMPLATE.replace("{{- call.function.arguments | tojson -}}", "{{- call.function.arguments + '' -}}")
    )
    printing = make(TEMPLATE.replace("call.function.arguments | tojson", "call.function.arguments"))
    as_text = [{"function": {"name": "weather", "arguments": '{"city":"Oslo"}'}}]
    for tokenizer in (adding, printing):
        assert '<call>weather{"city": "Oslo"}' in sft(tokenizer, {"messages": [USER, CALL]})[0][0]
        row = {"messages": [USER, CALL | {"tool_calls": as_text}]}
        assert '<call>weather{"city":"Oslo"}' in sft(tokenizer, row)[0][0]  # as it is written


def test_a_null_content_is_never_printed(make):
    printing = make(
        TEMPLATE.replace("{%- if m.content is string -%}{{- m.content -}}{%- endif -%}", "{{- m.content -}}")
    )
    ((text, _),) = sft(printing, {"messages": [USER, CALL, RESULT, ASSISTANT]})
    assert "None" not in text and "<call>weather" in text


@pytest.mark.parametrize("role", ["model", "bot", "Assistant", "ipython"])
def test_a_role_that_means_nothing_is_named(chat, make, role):
    expected = "expected a conversation with a turn of role 'assistant' to train on"
    message = f"row 1: messages, message 2: role: {expected}, got '{role}'"
    with pytest.raises(InputError, match=message):
        sft(chat, {"messages": [USER, {"role": role, "content": "4"}]})
    known = make(
        TEMPLATE.replace("for m in messages", "for m in messages if m.role in ('user', 'assistant')")
    )
    with pytest.raises(
        InputError, match=rf"row 1: messages, message 1 \(role '{role}'\): content: the chat template"
    ):
        sft(known, {"messages": [{"role": role, "content": "4"}, USER, ASSISTANT]})


# ---- words that look like something else


@pytest.mark.parametrize("quoted", ["{'city': 'Oslo'}", "{'a': 1}", '{"city": "Oslo"}', "None", "['x']"])
def test_a_text_may_quote_any_notation(chat, quoted):
    talk = [
        {"role": "user", "content": f"call it with {quoted}"},
        CALL,
        {"role": "tool", "content": {"a": 1}},
        ASSISTANT,
    ]
    assert quoted in sft(chat, {"messages": talk})[0][0]


@pytest.mark.parametrize(
    "arguments, written",
    [
        ("{}", "{}"),
        ({}, "{}"),
        (" ", "{}"),
        (None, "{}"),
        ("[1, 2]", "[1, 2]"),
        ('{"a": true}', '{"a": true}'),
    ],
)
def test_arguments_are_encoded_once_whatever_they_hold(chat, make, arguments, written):
    adding = make(
        TEMPLATE.replace("{{- call.function.arguments | tojson -}}", "{{- call.function.arguments + '' -}}")
    )
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    row = {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [call]}]}
    for tokenizer in (chat, adding):
        assert f"<call>f{written}<|im_end|>" in sft(tokenizer, row)[0][0]


def test_functions_that_are_tools_already_stay_as_they_are(chat):
    assert sft(chat, ROWS["messages"] | {"functions": TOOLS}) == sft(
        chat, ROWS["messages"] | {"tools": TOOLS}
    )
    assert read("sft", [ROWS["messages"] | {"functions": "none"}], chat).unused == ["functions"]


@pytest.mark.parametrize(
    "message, expected",
    [
        ({"from": "gpt", "value": "a", "content": "b"}, "expected 'value' or 'content', got both"),
        (CALL | {"function_call": {"name": "g"}}, "expected 'tool_calls' or 'function_call', got both"),
        ({"from": "gpt", "value": None}, "content: expected text, got null"),
    ],
)
def test_what_is_said_twice_is_refused(chat, message, expected):
    with pytest.raises(InputError, match=f"row 1: messages, message 2: {expected}"):
        sft(chat, {"messages": [USER, message]})


def test_a_null_content_is_found_for_a_template_that_asks_for_one(make, tmp_path):
    asking = make(
        TEMPLATE.replace(
            "for call in m.tool_calls", "for call in (m.tool_calls if m.content is none else [])"
        )
    )
    for content in ({"content": None}, {"content": ""}, {}):
        message = {key: value for key, value in CALL.items() if key != "content"} | content
        assert "<call>weather" in sft(asking, {"messages": [USER, message]})[0][0]


def test_only_reasoning_may_be_dropped_from_earlier_turns(make):
    last = make(
        TEMPLATE.replace(
            "m.content is string", "m.content is string and (loop.last or m.role != 'assistant')"
        )
    )
    talk = [USER, ASSISTANT | {"content": "important"}, USER]
    with pytest.raises(
        InputError, match=r"message 2 \(role 'assistant'\): content: the chat template leaves it out"
    ):
        rl_prompts([{"prompt": talk}], last, max_length=4096)


@pytest.mark.parametrize(
    "arguments",
    [datetime(2026, 1, 2), b"x", Decimal("1.5"), {"a": datetime(2026, 1, 2)}],
    ids=["day", "bytes", "decimal", "in"],
)
def test_what_json_does_not_know_is_refused_in_a_sentence(chat, arguments):
    call = {"function": {"name": "f", "arguments": {"x": arguments}}}
    with pytest.raises(InputError, match="row 1: the chat template refuses the conversation: Object of type"):
        sft(chat, {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [call]}]})


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), [{"deep": float("inf")}]])
def test_a_number_that_json_lacks_is_in_no_conversation(chat, value):
    """A template would print it. Elsewhere in a row it is another column's."""
    call = {"function": {"name": "f", "arguments": {"a": value}}}
    for row in (
        {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [call]}]},
        ROWS["messages"] | {"tools": [{"name": "f", "default": value}]},
        ROWS["messages"] | {"chat_template_kwargs": {"mood": value}},
    ):
        with pytest.raises(InputError, match=r"row 1: .*expected finite numbers, as in JSON"):
            sft(chat, row)
    sft(chat, ROWS["messages"] | {"score": value})


def test_what_is_nested_too_deeply_and_half_a_character_are_refused(chat):
    deep: dict = {}
    for _ in range(3000):
        deep = {"a": deep}
    call = {"function": {"name": "f", "arguments": deep}}
    for row in (
        {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [call]}]},
        ROWS["messages"] | {"tools": [deep]},
        ROWS["messages"] | {"chat_template_kwargs": {"mood": deep}},
        {"messages": [USER, ASSISTANT | {"content": "x \ud83d"}]},
    ):
        with pytest.raises(InputError, match="row 1: "):
            sft(chat, row)


def test_rows_without_anything_to_train_are_counted_not_refused(make, chat):
    asking = make("{{ messages[0].content }}" + TEMPLATE)
    for empty in ({"messages": []}, {"messages": [{"role": "system", "content": "s"}]}):
        _, counts = sft_examples([empty, ROWS["messages"]], asking, max_length=4096)
        assert counts["dropped: no token to train on"] == 1 and counts["examples"] == 1
    user = USER | {"analysis": {"lang": "en"}, "weight": 3}
    assert read("sft", [{"messages": [user, ASSISTANT]}], chat).unused == [
        "messages.analysis",
        "messages.weight of 'user'",
    ]


# ---- planted faults: each must be caught by the test beside it

FAULTS = {
    "nulls of Arrow kept": (tables, "_reader", lambda type_: None, "parquet"),
    "any content taken": (messages, "_content", lambda content, role, where: content, "content"),
    "any role taken": (examples, "no_assistant", lambda turns: None, "role"),
    "nothing has to be said": (
        messages,
        "whole_form",
        lambda messages, *_, **__: (list(messages), Form((0,))),
        "role",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught(monkeypatch, tmp_path, folder, make, chat, name):
    where, attribute, fault, check = FAULTS[name]
    number = {"role": "user", "content": 3}, "content: expected text, got 3"
    checks = {
        "parquet": lambda: test_parquet_and_jsonl_of_the_same_rows_train_the_same_text(
            make, chat, tmp_path, 0
        ),
        "content": lambda: test_a_message_of_a_wrong_kind_is_refused_by_file_line_and_key(
            chat, folder, tmp_path, True, *number
        ),
        "role": lambda: test_a_role_that_means_nothing_is_named(chat, make, "bot"),
    }

    checks[check]()
    monkeypatch.setattr(where, attribute, fault)
    with pytest.raises((AssertionError, InputError, pytest.fail.Exception)):
        checks[check]()
