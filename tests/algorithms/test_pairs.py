"""Preferences and judged completions: every shape of a row, every row accounted for."""

import json

import pytest
import torch
from burnish.algorithms.data.examples import Example
from burnish.algorithms.data.pairs import Judged, Preference, judged_completions, preferences
from burnish.algorithms.data.rows import read_rows
from burnish.algorithms.run.batch import Completion, make_batches
from burnish.model.errors import InputError
from burnish.model.text.tokenizer import Tokenizer
from conversations import ASSISTANT, USER, split


def decoded(tokenizer, completion):
    """A completion's text and its trained text."""
    return split(tokenizer, Example(completion.tokens, completion.mask))


@pytest.mark.parametrize(
    "row, prompt",
    [
        ({"prompt": "Say: ", "chosen": "yes", "rejected": "no"}, "Say: "),
        ({"prompt": [USER], "chosen": "yes", "rejected": "no"}, None),
        (
            {
                "prompt": [USER],
                "chosen": [{"role": "assistant", "content": "yes"}],
                "rejected": [{"role": "assistant", "content": "no"}],
            },
            None,
        ),
        (
            {
                "prompt": USER["content"],  # as UltraFeedback has it
                "chosen": [USER, {"role": "assistant", "content": "yes"}],
                "rejected": [USER, {"role": "assistant", "content": "no"}],
            },
            None,
        ),
        ({"question": USER["content"], "chosen": "yes", "rejected": "no"}, None),
        ({"instruction": USER["content"], "chosen": "yes", "rejected": "no"}, None),
        (
            {
                "conversations": [{"from": "human", "value": USER["content"]}],
                "chosen": {"from": "gpt", "value": "yes"},
                "rejected": {"from": "gpt", "value": "no"},
            },
            None,
        ),
        (
            {
                "chosen": "\n\nHuman: a question\n\nAssistant: yes",
                "rejected": "\n\nHuman: a question\n\nAssistant: no",
            },
            None,
        ),
    ],
)
def test_preferences_of_every_shape(chat, row, prompt):
    (pair,), counts = preferences([row], chat, max_length=100)
    expected = chat.encode_text(prompt) if prompt else chat.encode_chat([USER], add_generation_prompt=True)
    assert pair.prompt == expected and counts == {"rows": 1, "pairs": 1} and pair.margin == 0
    assert decoded(chat, pair.chosen) == ("yes<|im_end|>", "yes<|im_end|>")
    assert decoded(chat, pair.rejected) == ("no<|im_end|>", "no<|im_end|>")
    judged, counts = judged_completions([row], chat, max_length=100)
    assert [(one.prompt, one.completion, one.label) for one in judged] == [
        (pair.prompt, pair.chosen, True),
        (pair.prompt, pair.rejected, False),
    ]
    assert counts == {"rows": 1, "completions": 2}


def test_a_base_model_reads_a_question_as_text(base):
    (pair,), _ = preferences([{"question": "2+2?", "chosen": "4", "rejected": "5"}], base, max_length=100)
    assert base.decode(pair.prompt, False) == "<|im_start|>Question: 2+2?\nAnswer:"
    assert decoded(base, pair.chosen)[1] == " 4<|endoftext|>"


def test_only_the_assistant_is_trained_where_conversations_part_early(chat):
    talks = {
        name: "\n\nHuman: a\n\nAssistant: same\n\nHuman: b"
        f"\n\nAssistant: {name}1\n\nHuman: c{name}\n\nAssistant: {name}2"
        for name in ("chosen", "rejected")
    }

    (pair,), _ = preferences([talks], chat, max_length=200)
    assert chat.decode(pair.prompt).count("same") == 1
    for name, completion in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        text, trained = decoded(chat, completion)
        assert trained == f"{name}1<|im_end|>{name}2<|im_end|>"
        assert f"c{name}" in text and completion.mask[-1]

        whole = chat.encode_chat_with_mask(
            [
                {"role": role, "content": content}
                for role, content in zip(
                    ["user", "assistant"] * 3,
                    ["a", "same", "b", f"{name}1", f"c{name}", f"{name}2"],
                    strict=True,
                )
            ]
        )[0]
        assert whole[: len(pair.prompt) + len(completion.tokens)] == pair.prompt + completion.tokens


def test_a_completion_ends_where_sampling_stops(folder, tmp_path):
    """The template marks the newline behind it as the assistant's, too."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}<|im_end|>\n{% endgeneration %}"
        "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    (tmp_path / "marked.jinja").write_text(template)
    marked = Tokenizer.load(folder, tmp_path / "marked.jinja")
    (pair,), _ = preferences([{"prompt": [USER], "chosen": "yes", "rejected": "no"}], marked, max_length=100)
    assert decoded(marked, pair.chosen) == ("yes<|im_end|>", "yes<|im_end|>")


def test_every_pair_is_accounted_for(chat):
    rows = [
        {"prompt": "p", "chosen": "a", "rejected": "b", "margin": 2},
        {"prompt": "p", "chosen": "a", "rejected": " "},
        {"prompt": "p", "chosen": "a", "rejected": "a"},
        {"prompt": "p", "chosen": "a", "rejected": "b " * 50},
    ]

    pairs, counts = preferences(rows, chat, max_length=20)
    assert len(pairs) == 1 and pairs[0].margin == 2
    assert counts == {
        "rows": 4,
        "pairs": 1,
        "dropped: empty completion": 1,
        "dropped: chosen is rejected": 1,
        "dropped: longer than max_length": 1,
    }

    with pytest.raises(
        InputError, match="no pairs to train on: 1 rows, 0 pairs, 1 dropped: empty completion"
    ):
        preferences(rows[1:2], chat, max_length=20)


def test_judged_completions(chat):
    rows = [
        {"prompt": "p", "completion": "a", "label": True},
        {"prompt": "p", "completion": "b", "label": 0},
        {"prompt": "p", "completion": "", "label": 1},
    ]
    judged, counts = judged_completions(rows, chat, max_length=20)
    assert [one.label for one in judged] == [True, False]
    assert counts == {"rows": 3, "completions": 2, "dropped: empty completion": 1}
    messages = [
        {"prompt": [USER], "completion": [ASSISTANT], "label": False},
        {"completion": [USER, ASSISTANT], "label": 1},
    ]
    one, other = judged_completions(messages, chat, max_length=50)[0]
    assert (one.prompt, one.completion) == (other.prompt, other.completion)
    assert one.prompt == chat.encode_chat([USER], add_generation_prompt=True)


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": "p", "chosen": "a"}, "expected the columns chosen and rejected, got prompt, chosen"),
        ({"chosen": "a", "rejected": "b"}, "chosen: expected a prompt column beside this text"),
        ({"prompt": "p", "chosen": "a", "rejected": 3}, "rejected: expected a list of messages, got 3"),
        ({"prompt": " ", "chosen": "a", "rejected": "b"}, "prompt: expected a prompt, got an empty text"),
        (
            {"prompt": "p", "chosen": "a", "rejected": "b", "margin": "big"},
            "margin: expected a number, got 'big'",
        ),
        ({"chosen": [ASSISTANT], "rejected": [ASSISTANT, USER]}, "expected a prompt in its own column or"),
        (
            {"prompt": [USER], "chosen": [USER], "rejected": [ASSISTANT]},
            "expected an assistant turn first after the prompt",
        ),
    ],
)
def test_a_wrong_pair_names_its_line(chat, tmp_path, row, message):
    good = {"prompt": "p", "chosen": "a", "rejected": "b"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(good) + "\n\n" + json.dumps(row) + "\n")
    with pytest.raises(InputError, match=rf"rows\.jsonl line 3: .*{message}"):
        preferences(read_rows(tmp_path / "rows.jsonl"), chat, max_length=100)


def test_a_wrong_label_is_refused(chat):
    with pytest.raises(InputError, match=r"row 1: label: expected true or false, got 'good'"):
        judged_completions([{"prompt": "p", "completion": "a", "label": "good"}], chat, max_length=10)
    with pytest.raises(InputError, match=r"row 1: expected the columns completion and label, got prompt"):
        judged_completions([{"prompt": "p"}], chat, max_length=10)


def test_a_dialogue_needs_a_template(base):
    talk = "\n\nHuman: a\n\nAssistant: b"
    with pytest.raises(InputError, match="row 1: the model has no chat template: name one"):
        preferences([{"chosen": talk, "rejected": talk + "c"}], base, max_length=50)


def test_micro_batches_of_pairs():
    def completion(*tokens):
        return Completion(list(tokens), [token != 9 for token in tokens])

    pairs = [
        Preference([1, 2], completion(3, 9, 4), completion(5)),
        Preference([6], completion(7, 8), completion(7)),
    ]
    (one,) = make_batches(pairs, 100, "cpu")
    assert one.members == [0, 1] and one.packed.tokens.tolist() == [1, 2, 3, 9, 4, 5, 6, 7, 8, 7]
    assert one.packed.parents is not None and one.packed.parents.tolist() == [-1, 0, 0, -1, 3, 3]
    assert one.last.tolist() == [4, 5, 8, 9]
    assert one.rows.tolist() == [2, 4, 5, 7, 8, 9] and one.lengths.tolist() == [2, 1, 2, 1]
    assert one.sums(torch.tensor([1.0, 2, 4, 8, 16, 32])).tolist() == [3, 4, 24, 32]
    assert [batch.members for batch in make_batches(pairs, 1, "cpu")] == [[0], [1]]
    (judged,) = make_batches([Judged([1], completion(2, 3), True)], 9, "cpu")
    assert judged.last.tolist() == [2] and judged.lengths.tolist() == [2]
