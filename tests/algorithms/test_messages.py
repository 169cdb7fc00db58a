"""All that a row says is trained: it stands in the text, or the row is refused, or a printed line names it."""

import json
import random
import re
import string
from datetime import datetime
from decimal import Decimal
from pathlib import Path

import pytest
from burnish.algorithms.data import examples, messages, rows
from burnish.algorithms.data import row as row_file
from burnish.algorithms.data.examples import rl_prompts, sft_examples
from burnish.algorithms.data.functions import takes
from burnish.algorithms.data.pairs import judged_completions, preferences
from burnish.algorithms.data.rendering import Form
from burnish.algorithms.data.rows import read_rows, report_counts
from burnish.algorithms.data.tokenizer import load_tokenizer
from burnish.algorithms.sft import Config
from burnish.model.errors import InputError
from burnish.model.text.tokenizer import Tokenizer
from tokenizers import Tokenizer as Backend

# A template of our own that renders all that it knows: tools, reasoning, calls, a system message.
TEMPLATE = """\
{%- if tools %}{{ '<|im_start|>tools\\n' + (tools | tojson) + '<|im_end|>\\n' }}{% endif -%}
{%- if mood is defined %}{{ 'mood ' + mood + '\\n' }}{% endif -%}
{%- for m in messages -%}
    {{- '<|im_start|>' + m.role + '\\n' -}}
    {%- if m.thinking -%}{{- '<think>' + m.thinking + '</think>' -}}{%- endif -%}
    {%- if m.content is string -%}{{- m.content -}}{%- endif -%}
    {%- for call in m.tool_calls -%}
        {{- '<call>' + call.function.name -}}{{- call.function.arguments | tojson -}}
    {%- endfor -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}
"""
USER, ASSISTANT = {"role": "user", "content": "a question"}, {"role": "assistant", "content": "an answer"}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}],
}
RESULT = {"role": "tool", "content": "rain"}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
SHAREGPT = [{"from": "human", "value": "a question"}, {"from": "gpt", "value": "an answer"}]


@pytest.fixture(scope="module")
def folder(request) -> Path:
    return request.path.parents[1] / "data" / "tokenizer"


@pytest.fixture(scope="module")
def make(folder):
    """A tokenizer of ours with another template."""
    backend = (folder / "tokenizer.json").read_text()
    return lambda template, **names: Tokenizer(
        Backend.from_str(backend), **{"eos": "<|im_end|>", "chat_template": template, **names}
    )


@pytest.fixture(scope="module")
def chat(make) -> Tokenizer:
    return make(TEMPLATE)


def texts(tokenizer, examples) -> list[tuple[str, str]]:
    """The text of each example, and what of it is trained."""
    found = []
    for example in examples:
        own = [token for token, trained in zip(example.tokens, example.mask, strict=True) if trained]
        found.append((tokenizer.decode(example.tokens, False), tokenizer.decode(own, False)))
    return found


def sft(tokenizer, *rows, **options) -> list[tuple[str, str]]:
    return texts(tokenizer, sft_examples(rows, tokenizer, max_length=4096, **options)[0])


def turn(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


# ---- columns


ROWS = {
    "messages": {"messages": [USER, ASSISTANT]},
    "ShareGPT": {"conversations": SHAREGPT},
    "turns": {"prompt": [USER], "completion": [ASSISTANT]},
    "texts": {"prompt": "2+2=", "completion": "4"},
    "text": {"text": "a text"},
    "question": {"question": "a question", "answer": "an answer"},
    "Alpaca": {"instruction": "do it", "input": "with this", "output": "an answer"},
    "Alpaca with history": {"instruction": "b", "output": "c", "system": "s", "history": [["d", "e"]]},
    "self-instruct": {"instruction": "i", "instances": [{"input": "", "output": "one"}]},
}
PAIRS = {
    "texts": {"prompt": "2+2=", "chosen": "4", "rejected": "5"},
    "question": {"question": "2+2?", "system": "s", "chosen": "4", "rejected": "5"},
    "turns": {"chosen": [USER, ASSISTANT], "rejected": [USER, dict(ASSISTANT, content="none")]},
    "HH": {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
}
PROMPTS = {
    "text": {"prompt": "2+2="},
    "turns": {"prompt": [USER], "system": "s"},
    "question": {"question": "a question"},
    "instruction": {"instruction": "do it", "input": "", "history": [["d", "e"]]},
    "messages": {"messages": [USER]},
    "ShareGPT": {"conversations": SHAREGPT[:1]},
}
READERS = {"sft": ROWS, "preferences": PAIRS, "judged": PAIRS, "prompts": PROMPTS}


def read(reader: str, rows: list, tokenizer, **options):
    function = {"sft": sft_examples, "preferences": preferences, "judged": judged_completions}
    return function.get(reader, rl_prompts)(rows, tokenizer, max_length=4096, **options)[1]


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
            "row 1: chat_template_kwargs: 'messages' is not set here",
        ),
        ({"chat_template_kwargs": {"tools": []}}, "row 1: chat_template_kwargs: 'tools' is not set here"),
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
        '{"tools": []}': "'tools' is not set here",
    }.items():
        with pytest.raises(InputError, match=f"--chat-template-kwargs: {re.escape(message)}"):
            tokenizer(value)
    with pytest.raises(InputError, match="--chat-template-kwargs: the rows are texts"):
        sft(tokenizer('{"mood": "calm"}'), ROWS["texts"])


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
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    one, other = (read_rows(tmp_path / name) for name in ("a.parquet", "a.jsonl"))
    assert "null" in json.dumps(one) and "null" not in json.dumps(other)
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


PARTS = [{"type": "text", "text": "a "}, {"type": "text", "text": "question"}]


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
            "content, part 1: expected type 'text', which alone",
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


# ---- which turns are trained


@pytest.mark.parametrize("flag", [{"weight": 0}, {"weight": 0.0}, {"train": False}])
@pytest.mark.parametrize("marked", [True, False])
def test_a_turn_of_weight_0_is_context(make, flag, marked):
    template = TEMPLATE
    if marked:
        inner = "{%- if m.content is string -%}{{- m.content -}}{%- endif -%}"
        generation = (
            "{%- if m.role == 'assistant' -%}{%- generation -%}" + inner + "{%- endgeneration -%}{%- else -%}"
        )
        template = TEMPLATE.replace(inner, generation + inner + "{%- endif -%}")
    chat = make(template)

    talk = [USER, ASSISTANT | {"content": "bad"} | flag, USER, ASSISTANT | {"train": True, "weight": 1}]
    row = {"messages": talk}
    examples, counts = sft_examples([row], chat, max_length=4096)
    whole = turn("user", "a question") + turn("assistant", "bad")
    whole += turn("user", "a question") + turn("assistant", "an answer")
    assert texts(chat, examples) == [(whole, "an answer<|im_end|>")]
    assert counts["turns that are not trained (weight 0, train false)"] == 1 and counts.unused == []
    ((_, trained),) = sft(chat, row, train_on="all")
    assert "bad" not in trained and "a question" in trained and "an answer" in trained

    pair = {"prompt": [USER], "chosen": talk[1:], "rejected": [ASSISTANT | {"content": "no"}]}
    ((preference,), _) = preferences([pair], chat, max_length=4096)
    assert texts(chat, [preference.chosen])[0][1] == "an answer<|im_end|>"
    with pytest.raises(InputError, match="no token to train on"):
        sft(chat, {"messages": talk[:2]})


def test_sharegpt_turns_keep_their_flags(chat):
    talk = [*SHAREGPT, SHAREGPT[0], SHAREGPT[1] | {"value": "bad", "train": False}]
    ((_, trained),) = sft(chat, {"conversations": talk})
    assert trained == "an answer<|im_end|>"


@pytest.mark.parametrize("empty", ["", "  \n", [], [{"type": "text", "text": " "}]])
def test_an_empty_turn_and_an_empty_completion_are_both_not_trained_and_counted(chat, empty):
    blank = {"role": "assistant", "content": empty}
    examples, counts = sft_examples([{"messages": [USER, blank, USER, ASSISTANT]}], chat, max_length=4096)
    assert texts(chat, examples)[0][1] == "an answer<|im_end|>"
    assert counts["turns of the assistant without text"] == 1
    rows = [{"messages": [USER, blank]}, ROWS["messages"], {"messages": [USER, CALL]}]
    _, counts = sft_examples(rows, chat, max_length=4096)
    assert counts["dropped: no token to train on"] == 1 and counts["examples"] == 2
    rows = [{"prompt": "2+2=", "completion": " \n"}, ROWS["texts"]]
    assert sft_examples(rows, chat, max_length=4096)[1]["dropped: no token to train on"] == 1
    pair = {"prompt": [USER], "chosen": [blank], "rejected": [ASSISTANT]}
    counts = read("preferences", [pair, PAIRS["turns"]], chat)
    assert counts["dropped: empty completion"] == 1


def test_calls_alone_are_something_to_learn(chat):
    pair = {"prompt": [USER], "chosen": [CALL], "rejected": [ASSISTANT]}
    ((preference,), _) = preferences([pair], chat, max_length=4096)
    assert texts(chat, [preference.chosen])[0][1] == '<call>weather{"city": "Oslo"}<|im_end|>'


def test_rows_that_are_all_too_long_say_so(chat):
    with pytest.raises(InputError) as error:
        sft_examples([ROWS["messages"]] * 2, chat, max_length=5)
    expected = "(the first: row 1): 2 dropped: no trained token within max_length; max_length is 5"
    assert str(error.value) == f"no row has a token to train on {expected}"


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
    message = f"row 1: messages, message 2: role '{role}': no turn here is the assistant's"
    with pytest.raises(InputError, match=message):
        sft(chat, {"messages": [USER, {"role": role, "content": "4"}]})
    known = make(
        TEMPLATE.replace("for m in messages", "for m in messages if m.role in ('user', 'assistant')")
    )
    with pytest.raises(
        InputError, match=rf"row 1: messages, message 1 \(role '{role}'\): content: the chat template"
    ):
        sft(known, {"messages": [{"role": role, "content": "4"}, USER, ASSISTANT]})


# ---- system and history


def test_a_system_column_stands_in_front(chat):
    start = turn("system", "be brief")
    for row in (ROWS["messages"], ROWS["ShareGPT"], ROWS["turns"], ROWS["question"]):
        ((text, trained),) = sft(chat, row | {"system": "be brief"})
        assert text == start + turn("user", "a question") + turn("assistant", "an answer")
        assert trained == "an answer<|im_end|>"
    for row in PROMPTS.values():
        if "text" not in row and row.get("prompt") != "2+2=":
            ((prompt,), _) = rl_prompts([row | {"system": "be brief"}], chat, max_length=4096)
            assert chat.decode(prompt.tokens, False).startswith(start)
            assert prompt.text[0] == {"role": "system", "content": "be brief"}
    for row in (PAIRS["question"], PAIRS["turns"], PAIRS["HH"], PAIRS["turns"] | {"prompt": USER["content"]}):
        ((pair,), counts) = preferences([row | {"system": "be brief"}], chat, max_length=4096)
        assert chat.decode(pair.prompt, False).count("user\n") == 1 and counts.unused == []
        assert chat.decode(pair.prompt, False).startswith(start)


def test_two_system_messages_are_one_or_an_error(chat):
    talk = [{"role": "system", "content": "be brief"}, USER, ASSISTANT]
    assert sft(chat, {"messages": talk, "system": "be brief"}) == sft(chat, {"messages": talk})
    with pytest.raises(InputError, match="row 1: system: messages, message 1 is a system message, too"):
        sft(chat, {"messages": talk, "system": "be long"})
    assert sft(chat, ROWS["messages"] | {"system": ""}) == sft(chat, ROWS["messages"])
    assert read("sft", [ROWS["messages"] | {"system": ""}], chat).unused == []


def test_history_is_earlier_turns(chat):
    row = {"instruction": "b", "input": "", "output": "c", "history": [["d", "e"]], "system": "s"}
    ((text, trained),) = sft(chat, row)
    expected = turn("system", "s") + turn("user", "d") + turn("assistant", "e") + turn("user", "b")
    assert text == expected + turn("assistant", "c") and trained == "e<|im_end|>c<|im_end|>"
    for wrong in ("x", [["a"]], [["a", 1]], {"a": 1}):
        with pytest.raises(InputError, match="row 1: history: expected pairs of a question and its answer"):
            sft(chat, row | {"history": wrong})


@pytest.mark.parametrize("more", [{"system": "s"}, {"history": [["d", "e"]]}, {"tools": TOOLS}])
def test_a_base_model_names_what_it_cannot_place(make, more):
    base, row = make(None), {"instruction": "b", "output": "c"}
    assert read("sft", [row | more], base).unused == list(more)
    assert sft(base, row | more) == sft(base, row)


def test_a_system_column_that_is_no_text_is_named(chat):
    assert read("sft", [ROWS["messages"] | {"system": {"os": 1}}], chat).unused == ["system"]


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
        with pytest.raises(InputError, match=f"--chat-template-kwargs: '{name}' changes nothing"):
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
        with pytest.raises(InputError, match=r"row 1: .*expected numbers that JSON has"):
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


# ---- preferences


@pytest.mark.parametrize(
    "first",
    [
        [USER | {"timestamp": 1}],
        [USER | {"content": "a question "}],
        [{"role": "user", "content": PARTS}],
        [{"role": "system", "content": "s"}, USER],
    ],
)
def test_a_prompt_that_the_answers_repeat_stands_once(chat, first):
    row = {
        "prompt": "a question",
        "chosen": [*first, ASSISTANT],
        "rejected": [*first, ASSISTANT | {"content": "no"}],
    }
    ((pair,), _) = preferences([row], chat, max_length=4096)
    assert chat.decode(pair.prompt, False).count("<|im_start|>user") == 1
    row["rejected"] = [*first[:-1], USER, ASSISTANT | {"content": "no"}]
    assert len(preferences([row | {"prompt": None}], chat, max_length=4096)[0]) == 1


@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "s"}]])
def test_a_single_answer_may_repeat_its_prompt_too(chat, system):
    """And go on with further turns."""
    row = {"prompt": [USER], "completion": [*system, USER, ASSISTANT, USER, ASSISTANT], "label": True}
    ((judged,), _) = judged_completions([row], chat, max_length=4096)
    assert judged.prompt == chat.encode_chat([*system, USER], add_generation_prompt=True)
    assert texts(chat, [judged.completion])[0][1] == "an answer<|im_end|>" * 2


def test_what_stands_behind_the_last_answer_is_named(chat):
    row = {"chosen": [USER, ASSISTANT, USER], "rejected": [USER, ASSISTANT | {"content": "no"}]}
    assert read("preferences", [row], chat).unused == ["chosen: what stands behind the last answer"]


def test_the_line_of_columns_is_one_line(chat, capsys):
    row = ROWS["messages"] | {f"k{i}\x1b[31m\n": 1 for i in range(3000)}
    report_counts(Path("rows.jsonl"), read("sft", [row], chat))
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) == 2 and "\x1b" not in printed and len(printed) < 1000
    assert printed.endswith(" and 2970 more\n")


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
    "nulls of Arrow kept": (row_file, "without_nulls", lambda value: value, "parquet"),
    "weights not read": (messages, "_is_trained", lambda turn: True, "weight"),
    "empty turns trained": (messages, "says_something", lambda turn: True, "empty"),
    "tools left behind": (messages, "template_variables", lambda row, tokenizer: {}, "tools"),
    "system left behind": (examples, "with_system", lambda row, turns: turns, "system"),
    "history left behind": (messages, "_history", lambda row: [], "history"),
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
    checks = {
        "column": lambda: test_a_column_that_nothing_reads_is_named(chat, "sft", "messages"),
        "parquet": lambda: test_parquet_and_jsonl_of_the_same_rows_train_the_same_text(
            make, chat, tmp_path, 0
        ),
        "weight": lambda: test_a_turn_of_weight_0_is_context(make, {"weight": 0}, False),
        "empty": lambda: test_an_empty_turn_and_an_empty_completion_are_both_not_trained_and_counted(
            chat, ""
        ),
        "tools": lambda: test_tools_reach_the_template_from_every_shape(chat, TOOLS, "sft", "question"),
        "system": lambda: test_a_system_column_stands_in_front(chat),
        "history": lambda: test_history_is_earlier_turns(chat),
        "content": lambda: test_a_message_of_a_wrong_kind_is_refused_by_file_line_and_key(
            chat, folder, tmp_path, True, {"role": "user", "content": 3}, "content: expected text, got 3"
        ),
        "role": lambda: test_a_role_that_means_nothing_is_named(chat, make, "bot"),
    }
    checks[check]()
    monkeypatch.setattr(where, attribute, fault)
    with pytest.raises((AssertionError, InputError, pytest.fail.Exception)):
        checks[check]()
