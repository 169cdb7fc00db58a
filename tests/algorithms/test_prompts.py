"""Prompts for reinforcement learning: every shape of a row, every row accounted for."""

import pytest
from burnish.algorithms.data.examples import rl_prompts, sft_examples
from burnish.model.errors import InputError
from conversations import ASSISTANT, USER


@pytest.mark.parametrize(
    "row, options, text",
    [
        ({"prompt": "2+2="}, {}, "2+2="),
        ({"prompt": [USER]}, {}, [USER]),
        ({"messages": [USER]}, {}, [USER]),
        ({"conversations": [{"from": "human", "value": "a question"}]}, {}, [USER]),
        ({"question": "a question"}, {}, [USER]),
        ({"instruction": "a", "input": "b"}, {}, [{"role": "user", "content": "a\n\nb"}]),
        ({"task": "a question", "prompt": "x"}, {"prompt_column": "task"}, [USER]),
    ],
)
def test_prompts_for_a_chat_model(chat, row, options, text):
    (prompt,), counts = rl_prompts([row], chat, max_length=512, **options)
    assert counts == {"rows": 1, "prompts": 1} and prompt.text == text
    expected = (
        chat.encode(text) if isinstance(text, str) else chat.encode_chat(text, add_generation_prompt=True)
    )
    assert prompt.tokens == expected


def test_prompts_for_a_base_model(base):
    rows = [{"question": "Q?", "answer": "A"}]
    (prompt,), _ = rl_prompts(rows, base, max_length=512)
    (example,), _ = sft_examples(rows, base, max_length=512)
    assert prompt.text == "Question: Q?\nAnswer:" and prompt.tokens[0] == base.bos_id
    assert example.tokens[: len(prompt.tokens)] == prompt.tokens  # what SFT taught is what RL asks
    (named,), _ = rl_prompts([{"task": "go on"}], base, max_length=512, prompt_column="task")
    assert named.text == "go on"


def test_columns_reach_the_reward_function_and_are_the_same_for_all(chat):
    rows = [{"prompt": "a", "completion": "c", "answer": 1}, {"prompt": "b", "hint": [2]}]
    prompts, _ = rl_prompts(rows, chat, max_length=512)
    assert [prompt.columns for prompt in prompts] == [
        {"answer": 1, "hint": None},
        {"answer": None, "hint": [2]},
    ]


def test_prompts_are_dropped_only_with_a_count(chat):
    rows = [{"prompt": "a"}, {"prompt": "the License " * 50}, {"prompt": " "}, {"prompt": []}]
    prompts, counts = rl_prompts(rows, chat, max_length=20)
    assert len(prompts) == 1
    assert counts == {
        "rows": 4,
        "prompts": 1,
        "dropped: prompt longer than max_length": 1,
        "dropped: empty prompt": 2,
    }
    length = len(chat.encode("the License"))
    assert len(rl_prompts([{"prompt": "the License"}], chat, max_length=length)[0]) == 1
    with pytest.raises(InputError, match="no prompt to sample from: 1 rows, 1 dropped: empty prompt"):
        rl_prompts(rows[2:3], chat, max_length=20)
    with pytest.raises(InputError, match=r"1 dropped: empty prompt \(the first: row 1\)$"):
        rl_prompts(rows[2:3], chat, max_length=20)


@pytest.mark.parametrize(
    "rows, message",
    [
        ([{"chosen": "x"}], "row 1: expected a prompt in one of the columns .*; got chosen"),
        (
            [{"prompt": "x"}, {"question": "y"}],
            "row 2: expected a prompt in column 'prompt', got columns question",
        ),
        ([{"prompt": 3}], "row 1: prompt: expected text, got 3"),
        ([{"messages": [USER, ASSISTANT]}], "row 1: messages: expected another role than 'assistant'"),
        ([], "no prompt to sample from: 0 rows"),
    ],
)
def test_a_row_without_a_usable_prompt_is_named(chat, rows, message):
    with pytest.raises(InputError, match=message):
        rl_prompts(rows, chat, max_length=512)
