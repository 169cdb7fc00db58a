"""Turns: which of them are trained, the system message and the history before them, the answers of a pair."""

import pytest
from burnish.algorithms.data import examples, messages
from burnish.algorithms.data.examples import rl_prompts, sft_examples
from burnish.algorithms.data.pairs import judged_completions, preferences
from burnish.model.errors import InputError
from burnish.model.text.tokenizer import Tokenizer
from conversations import (
    ASSISTANT,
    CALL,
    PAIRS,
    PARTS,
    PROMPTS,
    ROWS,
    SHAREGPT,
    TEMPLATE,
    TOOLS,
    USER,
    read,
    sft,
    texts,
    turn,
)


@pytest.fixture(scope="module")
def chat(make) -> Tokenizer:
    return make(TEMPLATE)


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
    with pytest.raises(
        InputError, match="row 1: system: expected one system message, got another in messages, message 1"
    ):
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
    """The prompt stands once, and further turns may follow the answer."""
    row = {"prompt": [USER], "completion": [*system, USER, ASSISTANT, USER, ASSISTANT], "label": True}
    ((judged,), _) = judged_completions([row], chat, max_length=4096)
    assert judged.prompt == chat.encode_chat([*system, USER], add_generation_prompt=True)
    assert texts(chat, [judged.completion])[0][1] == "an answer<|im_end|>" * 2


def test_what_stands_behind_the_last_answer_is_named(chat):
    row = {"chosen": [USER, ASSISTANT, USER], "rejected": [USER, ASSISTANT | {"content": "no"}]}
    assert read("preferences", [row], chat).unused == ["chosen: the turns after the last answer"]


# ---- planted faults: each must be caught by the test beside it

FAULTS = {
    "weights not read": (messages, "_is_trained", lambda turn: True, "weight"),
    "empty turns trained": (messages, "says_something", lambda turn: True, "empty"),
    "system left behind": (examples, "with_system", lambda row, turns: turns, "system"),
    "history left behind": (messages, "_history", lambda row: [], "history"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught(monkeypatch, make, chat, name):
    where, attribute, fault, check = FAULTS[name]
    checks = {
        "weight": lambda: test_a_turn_of_weight_0_is_context(make, {"weight": 0}, False),
        "empty": lambda: test_an_empty_turn_and_an_empty_completion_are_both_not_trained_and_counted(
            chat, ""
        ),
        "system": lambda: test_a_system_column_stands_in_front(chat),
        "history": lambda: test_history_is_earlier_turns(chat),
    }
    checks[check]()
    monkeypatch.setattr(where, attribute, fault)
    with pytest.raises((AssertionError, InputError, pytest.fail.Exception)):
        checks[check]()
