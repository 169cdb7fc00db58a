"""Every shape of a row, every row accounted for, and packing that neither splits nor loses."""

import gzip
import json
import random
import sys

import pytest
from burnish.algorithms.data.examples import Example, rl_prompts, sft_examples
from burnish.algorithms.data.rows import read_rows
from burnish.algorithms.run.processes import best_fit
from burnish.model.errors import InputError
from burnish.model.text.tokenizer import Tokenizer
from conversations import ASSISTANT, USER, split
from tokenizers import Tokenizer as Backend
from tokenizers import pre_tokenizers


def write(tmp_path, text, name="rows.jsonl"):
    (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path / name


# ---- files


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.json.gz"])
@pytest.mark.parametrize("layout", ["lines", "list"])
def test_json_in_every_layout(tmp_path, name, layout):
    rows = [{"text": "é 🎉"}, {"text": "two", "more": None}, {"text": "three\n"}]
    if layout == "list" and ".jsonl" in name:
        pytest.skip("a JSONL file holds one object a line")
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n"
    text = (json.dumps(rows, indent=1) if layout == "list" else "\ufeff" + lines).encode()
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    read = read_rows(tmp_path / name)
    assert read == [{"text": "é 🎉"}, {"text": "two"}, {"text": "three\n"}]
    place = "entry 2" if layout == "list" else "line 3"
    assert read[1].where == f"{tmp_path / name} {place}"


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.jsonl", '{"text": "x"}\n{"text": \n', r"a\.jsonl line 2: not JSON: .*'{\"text\":'"),
        ("a.jsonl", '{"text": "x"}\n\n["text"]\n', r"a\.jsonl line 3: expected an object with named columns"),
        ("a.jsonl", "", r"a\.jsonl: expected at least one row, got none"),
        ("a.jsonl", "\n \n", r"a\.jsonl: expected at least one row, got none"),
        ("a.json", "[]", r"a\.json: expected at least one row, got none"),
        ("a.json", '[{"text": "x"}, 3]', r"a\.json entry 2: expected an object"),
        ("a.json", '[{"text": "x"}', r"a\.json: not JSON"),
        ("a.json", '{"text": "x"}\nnope\n', r"a\.json line 2: not JSON"),
        ("a.csv", "text\nx\n", r"a\.csv: expected \.jsonl"),
        ("a.jsonl.gz", "not gzip", r"a\.jsonl\.gz: incomplete or broken gzip file"),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path, name, text, message):
    with pytest.raises(InputError, match=message):
        read_rows(write(tmp_path, text, name))


def test_files_that_are_missing_cut_short_or_not_text(tmp_path):
    with pytest.raises(InputError, match=r"absent\.jsonl: no such file"):
        read_rows(tmp_path / "absent.jsonl")
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(InputError, match=r"a\.jsonl: not UTF-8"):
        read_rows(tmp_path / "a.jsonl")
    whole = gzip.compress(b'{"text": "x"}\n' * 1000)
    (tmp_path / "a.jsonl.gz").write_bytes(whole[:-9])
    with pytest.raises(InputError, match=r"a\.jsonl\.gz: incomplete or broken gzip file"):
        read_rows(tmp_path / "a.jsonl.gz")


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    rows = [{"prompt": [USER], "answer": "1"}, {"prompt": [USER], "answer": None}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    read = read_rows(tmp_path / "a.parquet")
    assert read == [rows[0], {"prompt": [USER]}] and read[1].where.endswith("a.parquet row 2")
    with pytest.raises(InputError, match=r"b\.parquet: not a readable parquet file"):
        read_rows(write(tmp_path, "PAR1 but no more", "b.parquet"))


def test_parquet_without_pyarrow_names_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"pip install 'burnish\[parquet\]'"):
        read_rows(write(tmp_path, "", "a.parquet"))


# ---- shapes


CHATML = "<|im_start|>user\na question<|im_end|>\n<|im_start|>assistant\nan answer<|im_end|>\n"
TURN = "an answer<|im_end|>"
ALPACA = (
    "<|im_start|>Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n### Instruction:\ndo it\n\n### Input:\nwith this\n\n"
    "### Response:\nan answer<|endoftext|>"
)


@pytest.mark.parametrize(
    "row, text, trained",
    [
        ({"messages": [USER, ASSISTANT]}, CHATML, TURN),
        ({"prompt": [USER], "completion": [ASSISTANT]}, CHATML, TURN),
        ({"question": "a question", "answer": "an answer"}, CHATML, TURN),
        ({"instruction": "a question", "input": "", "output": "an answer"}, CHATML, TURN),
        (
            {"instruction": "a", "input": "b", "output": "an answer"},
            CHATML.replace("a question", "a\n\nb"),
            TURN,
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "a question"},
                    {"from": "gpt", "value": "an answer"},
                ]
            },
            CHATML,
            TURN,
        ),
        (
            {
                "system": "s",
                "conversations": [
                    {"from": "human", "value": "a question"},
                    {"from": "gpt", "value": "an answer"},
                ],
            },
            "<|im_start|>system\ns<|im_end|>\n" + CHATML,
            TURN,
        ),
        ({"conversations": [USER, ASSISTANT]}, CHATML, TURN),
        ({"prompt": "2+2=", "completion": "4"}, "2+2=4<|im_end|>", "4<|im_end|>"),
        ({"prompt": "2+2=", "completion": "4<|im_end|>"}, "2+2=4<|im_end|>", "4<|im_end|>"),
    ],
)
def test_rows_for_a_chat_model(chat, row, text, trained):
    examples, counts = sft_examples([row], chat, max_length=512)
    assert counts == {"rows": 1, "examples": 1}
    assert split(chat, examples[0]) == (text, trained)


@pytest.mark.parametrize(
    "row, text, trained",
    [
        ({"prompt": "2+2=", "completion": "4"}, "<|im_start|>2+2=4<|endoftext|>", "4<|endoftext|>"),
        ({"prompt": "", "completion": "4"}, "<|im_start|>4<|endoftext|>", "4<|endoftext|>"),
        ({"text": "a text"}, "<|im_start|>a text<|endoftext|>", "a text<|endoftext|>"),
        ({"text": "<|im_start|>a text"}, "<|im_start|>a text<|endoftext|>", "a text<|endoftext|>"),
        (
            {"question": "Q?", "answer": "A"},
            "<|im_start|>Question: Q?\nAnswer: A<|endoftext|>",
            " A<|endoftext|>",
        ),
        (
            {"instruction": "do it", "input": "with this", "output": "an answer"},
            ALPACA,
            "an answer<|endoftext|>",
        ),
    ],
)
def test_rows_for_a_base_model(base, row, text, trained):
    (example,), counts = sft_examples([row], base, max_length=512)
    assert counts == {"rows": 1, "examples": 1}
    assert split(base, example) == (text, trained)
    assert example.tokens.count(base.bos_id) == 1


def test_a_self_instruct_row_is_one_example_an_instance(chat):
    row = {"instruction": "i", "instances": [{"input": "", "output": "one"}, {"input": "b", "output": "two"}]}
    examples, counts = sft_examples([row], chat, max_length=512)
    assert counts == {"rows": 1, "examples": 2}
    assert [split(chat, example)[1] for example in examples] == ["one<|im_end|>", "two<|im_end|>"]
    assert "user\ni\n\nb<" in split(chat, examples[1])[0]


def test_all_trains_everything_but_the_first_token_which_nothing_predicts(chat, base):
    for tokenizer, row in (
        (chat, {"messages": [USER, ASSISTANT]}),
        (chat, {"prompt": [USER], "completion": [ASSISTANT]}),
        (base, {"prompt": "2+2=", "completion": "4"}),
        (base, {"text": "a text"}),
    ):
        (example,), _ = sft_examples([row], tokenizer, max_length=512, train_on="all")
        assert example.mask == [False] + [True] * (len(example.tokens) - 1)


def test_only_the_completion_of_a_longer_conversation_is_trained(chat):
    row = {"prompt": [USER, ASSISTANT, USER], "completion": [{"role": "assistant", "content": "last"}]}
    (example,), _ = sft_examples([row], chat, max_length=512)
    assert split(chat, example)[1] == "last<|im_end|>"


def test_prompt_ids_begin_the_ids_of_the_pair(base):
    draw = random.Random(0)
    parts = ["the", " ", "License", "\n", "1", ".", "  ", "é"]
    for _ in range(100):
        prompt, completion = ("".join(draw.choices(parts, k=draw.randint(1, 5))) for _ in range(2))
        if not completion.strip():
            continue
        (example,), _ = sft_examples([{"prompt": prompt, "completion": completion}], base, max_length=512)
        given = base.encode_text(prompt)
        assert example.tokens[: len(given)] == given
        assert example.mask == [False] * len(given) + [True] * (len(example.tokens) - len(given))
        ((asked,), _) = (
            rl_prompts([{"prompt": prompt}], base, max_length=512) if prompt.strip() else ((None,), 0)
        )
        assert asked is None or asked.tokens == given


def test_a_completion_gets_no_space_of_its_own(base):
    backend = Backend.from_str(base.backend.to_str())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer = Tokenizer(backend, eos="<|endoftext|>")
    (example,), _ = sft_examples([{"prompt": "2+2=", "completion": "4"}], tokenizer, max_length=512)
    assert split(tokenizer, example) == (" 2+2=4<|endoftext|>", "4<|endoftext|>")


def test_a_prompt_that_does_not_begin_the_rendered_completion_is_refused(chat):
    template = (
        "{% for m in messages %}{{ m.role }}:{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% endfor %}"
        "{% if add_generation_prompt %}assistant: <think>{% endif %}"
    )
    tokenizer = Tokenizer(chat.backend, eos="<|im_end|>", chat_template=template)
    with pytest.raises(
        InputError, match="row 1: the chat template renders the prompt with its completion diff"
    ):
        sft_examples([{"prompt": [USER], "completion": [ASSISTANT]}], tokenizer, max_length=512)


def test_a_conversation_whose_template_rewrites_it_becomes_one_example_a_turn(folder, chat):
    thinking = chat.chat_template.replace(
        "+ message.content", "+ ('<think>' if loop.last and message.role != 'user' else '') + message.content"
    )
    tokenizer = Tokenizer(chat.backend, eos="<|im_end|>", chat_template=thinking)
    rows = [{"messages": [USER, ASSISTANT, USER, ASSISTANT]}, {"messages": [USER, ASSISTANT]}]
    examples, counts = sft_examples(rows, tokenizer, max_length=512)
    assert counts == {"rows": 2, "examples": 3, "from conversations split by turn": 2}
    assert [split(tokenizer, e)[1] for e in examples] == ["<think>an answer<|im_end|>"] * 3
    assert [split(tokenizer, e)[0].count("<think>") for e in examples] == [1, 1, 1]


# ---- accounting


def test_every_row_is_kept_truncated_or_dropped_for_a_stated_reason(base):
    long = "the License " * 50
    rows = [
        {"prompt": "a", "completion": "b"},
        {"prompt": "a", "completion": long},
        {"prompt": long, "completion": "b"},
        {"prompt": "a", "completion": " \n"},
        {"prompt": "a", "completion": ""},
    ]

    examples, counts = sft_examples(rows, base, max_length=20)
    assert counts == {
        "rows": 5,
        "examples": 2,
        "truncated": 1,
        "dropped: no trained token within max_length": 1,
        "dropped: no token to train on": 2,
    }
    assert counts["examples"] + sum(n for reason, n in counts.items() if "dropped" in reason) == len(rows)

    cut = examples[1]
    assert len(cut.tokens) == len(cut.mask) == 20 and cut.mask[-1]
    assert base.eos_id not in cut.tokens and examples[0].tokens[-1] == base.eos_id
    whole = len(examples[0].tokens)
    assert sft_examples(rows[:1], base, max_length=whole)[1] == {"rows": 1, "examples": 1}


@pytest.mark.parametrize(
    "rows",
    [[{"messages": [USER]}], [{"messages": []}], [{"messages": [USER, dict(ASSISTANT, content="")]}] * 2],
)
def test_data_without_a_trained_token_is_refused_and_a_lone_such_row_is_counted(chat, rows):
    with pytest.raises(InputError, match=r"no row has a token to train on \(the first: row 1\)"):
        sft_examples(rows, chat, max_length=512)
    _, counts = sft_examples([*rows, {"messages": [USER, ASSISTANT]}], chat, max_length=512)
    empty = "turns of the assistant without text"
    expected = {"rows": len(rows) + 1, "examples": 1, "dropped: no token to train on": len(rows)}
    assert counts == expected | ({empty: 2} if len(rows) == 2 else {})


@pytest.mark.parametrize(
    "second, message",
    [
        ({"text": "x"}, r"line 2: expected the shape 'messages' of .*line 1, got 'text'"),
        (
            {"chosen": "x", "rejected": "y"},
            r"line 2: expected the columns of one of these shapes: .*; got chosen, rejected",
        ),
        ({}, r"line 2: expected the columns of one of these shapes: .*; got \(none\)"),
        ({"messages": "hello"}, "line 2: messages: expected a list of messages, got 'hello'"),
        ({"messages": [{"content": "x"}]}, "line 2: messages, message 1: expected an object with a role"),
        (
            {"messages": [USER, dict(ASSISTANT, content=3)]},
            "line 2: messages, message 2: content: expected",
        ),
    ],
)
def test_the_first_offending_row_is_named(tmp_path, chat, second, message):
    rows = read_rows(write(tmp_path, json.dumps({"messages": [USER, ASSISTANT]}) + "\n" + json.dumps(second)))
    with pytest.raises(InputError, match=message):
        sft_examples(rows, chat, max_length=512)


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": "x", "completion": 4}, "row 1: completion: expected text, got 4"),
        ({"prompt": [USER], "completion": "x"}, "row 1: completion: expected a list of messages"),
        ({"prompt": [USER], "completion": [USER]}, "row 1: completion: expected to begin with the assistant"),
        ({"text": ["x"]}, "row 1: text: expected text"),
        (
            {"conversations": [{"from": "bot", "value": "x"}]},
            "row 1: conversations, message 1: unknown 'from' 'bot'",
        ),
        ({"instruction": "x", "instances": "y"}, "row 1: instances: expected a list"),
    ],
)
def test_a_cell_of_the_wrong_kind_is_named(chat, row, message):
    with pytest.raises(InputError, match=message):
        sft_examples([row], chat, max_length=512)


def test_a_base_model_refuses_conversations_and_names_the_way_out(base):
    for row in ({"messages": [USER, ASSISTANT]}, {"prompt": [USER], "completion": [ASSISTANT]}):
        with pytest.raises(InputError, match=r"row 1: the model has no chat template.*--chat-template"):
            sft_examples([row], base, max_length=512)


def test_a_completion_that_cannot_be_ended_is_refused(base):
    endless = Tokenizer(base.backend)
    with pytest.raises(InputError, match="tokenizer has no eos_token"):
        sft_examples([{"text": "x"}], endless, max_length=512)


# ---- packing


def test_best_fit_fills_the_fullest_bin_that_has_room():
    assert best_fit([5, 6, 3, 4, 2], 10) == [[1, 3], [0, 2, 4]]
    assert best_fit([7, 6, 3, 4], 10) == [[0, 2], [1, 3]]
    assert best_fit([7, 6, 3], 10) == [[0, 2], [1]]  # into the room of 3, not of 4
    assert best_fit([4, 4, 4], 8) == [[0, 1], [2]]
    assert best_fit([20, 1], 8) == [[0], [1]]  # longer than a bin: one of its own, never split
    assert best_fit([], 8) == []


def test_best_fit_loses_nothing_and_is_within_a_third_of_the_least_bins():
    draw = random.Random(0)
    for _ in range(50):
        capacity = draw.randint(8, 100)
        lengths = [draw.randint(1, capacity) for _ in range(draw.randint(1, 200))]
        bins = best_fit(lengths, capacity)
        assert sorted(index for members in bins for index in members) == list(range(len(lengths)))
        assert all(sum(lengths[i] for i in members) <= capacity for members in bins)
        assert bins == best_fit(lengths, capacity)
        assert len(bins) <= 11 / 9 * -(-sum(lengths) // capacity) * 1.5 + 1
        loose = sum(capacity - sum(lengths[i] for i in members) >= capacity / 2 for members in bins)
        assert loose <= 1  # two bins half empty would have been one


# ---- real data


def test_real_rows_are_all_accounted_for(shared_data):
    base = Tokenizer.load(shared_data / "stories260k" / "hf")
    plain = Tokenizer.load(shared_data / "stories260k" / "hf", "plain")
    for tokenizer, file, size in (
        (base, "gsm8k/test.jsonl", 1319),
        (plain, "sft/fastchat_dummy_conversation_sharegpt.json", 500),
        (base, "sft/self_instruct_seed_tasks.jsonl", 175),
    ):
        rows = read_rows(shared_data / file)
        examples, counts = sft_examples(rows, tokenizer, max_length=512)
        assert counts["rows"] == len(rows) == size
        assert sum(n for reason, n in counts.items() if reason == "examples" or "dropped" in reason) == size

        for example in examples:
            assert isinstance(example, Example) and len(example.tokens) == len(example.mask) <= 512
            assert example.tokens.count(tokenizer.bos_id) == 1 and any(example.mask) and not example.mask[0]
            if len(example.tokens) < 512:
                trained = [
                    token for token, wanted in zip(example.tokens, example.mask, strict=True) if wanted
                ]
                assert trained[-1] == tokenizer.eos_id

    prompts, counts = rl_prompts(read_rows(shared_data / "gsm8k" / "test.jsonl"), base, max_length=512)
    assert counts["prompts"] == 1319 and prompts[0].columns["answer"].endswith("#### 18")
