"""Masks of conversations: exactly the assistant's text and its end token, or a refusal."""

import pytest
from burnish.model.errors import InputError
from burnish.model.text.tokenizer import TurnRewritten
from talks import CHATML, CONVERSATION, MARKED, USER, trained


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["turn boundaries", "generation marks"])
def test_exactly_the_assistants_text_and_its_end_token_are_trained(make, template):
    tokenizer = make(template)
    assert trained(tokenizer, CONVERSATION) == ["It is 4.<|im_end|>", "Still 4. 再见 🎉<|im_end|>"]
    assert trained(tokenizer, CONVERSATION, turns={len(CONVERSATION) - 1}) == ["Still 4. 再见 🎉<|im_end|>"]
    assert trained(tokenizer, CONVERSATION[:-1]) == ["It is 4.<|im_end|>"]
    assert tokenizer.encode_chat_with_mask(CONVERSATION)[0] == tokenizer.encode_chat(CONVERSATION)


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["turn boundaries", "generation marks"])
@pytest.mark.parametrize("content", ["4", "\n\n4", " 4 \n", "\n<|endoftext|>4", "é", "\u0301"])
def test_a_prompts_ids_begin_the_ids_of_prompt_and_answer(make, template, content):
    tokenizer = make(template)
    ids, mask = tokenizer.encode_chat_with_mask([USER, {"role": "assistant", "content": content}])
    prompt = tokenizer.encode_chat([USER], add_generation_prompt=True)
    assert ids[: len(prompt)] == prompt and not any(mask[: len(prompt)]) and mask[len(prompt)]
    answer = [token for token, wanted in zip(ids, mask, strict=True) if wanted]
    assert tokenizer.decode(answer, skip_special_tokens=False) == content + "<|im_end|>"


def test_without_stop_ids_the_last_special_token_of_the_turn_is_its_end(make):
    assert trained(make(CHATML, eos="<|endoftext|>"), CONVERSATION)[0] == "It is 4.<|im_end|>"


def test_the_first_end_token_behind_an_answer_is_its_end(make):
    ended = CHATML + "{% if not add_generation_prompt %}<|endoftext|>{% endif %}"
    tokenizer = make(ended, stop_ids=[0])
    assert trained(tokenizer, CONVERSATION) == ["It is 4.<|im_end|>", "Still 4. 再见 🎉<|im_end|>"]


def test_one_end_token_behind_a_mark_is_trained_and_no_second(make):
    twice = MARKED.replace("<|im_end|>", "<|im_end|><|endoftext|>")
    assert trained(make(twice, stop_ids=[0]), CONVERSATION)[0] == "It is 4.<|im_end|>"
    assert trained(make(twice, eos="<|endoftext|>"), CONVERSATION)[0] == "It is 4.<|im_end|>"
    inside = "{% generation %}4<|im_end|>\n{% endgeneration %}<|endoftext|>"
    assert trained(make(inside, stop_ids=[0]), TALK[1:2]) == ["4<|im_end|>\n"]


def test_marked_spans_belong_to_the_turn_in_which_they_stand(make):
    """Reasoning and answer have one each; a turn that has none is refused, whatever the sum."""
    inner = "{% if m.why %}{% generation %}{{ m.why }}{% endgeneration %} {% endif %}"
    answer = "{% if m.quiet %}{{ m.content }}{% else %}{% generation %}{{ m.content }}{% endgeneration %}{% endif %}"
    two = MARKED.replace("{% generation %}{{ m.content }}{% endgeneration %}", inner + answer)
    talk = [
        USER,
        {"role": "assistant", "content": "4", "why": "hm"},
        USER,
        {"role": "assistant", "content": "5"},
    ]

    assert trained(make(two), talk) == ["hm", "4<|im_end|>", "5<|im_end|>"]
    assert trained(make(two), talk, turns=[1]) == ["hm", "4<|im_end|>"]
    assert trained(make(two), talk, turns=[3]) == ["5<|im_end|>"]
    talk[3]["quiet"] = True
    for turns in ([1], [3], None):
        with pytest.raises(InputError, match=r"marks \[2, 0\] spans in the 2 assistant turns"):
            make(two).encode_chat_with_mask(talk, turns=turns)


def test_marks_are_taken_as_they_are(make):
    inside = MARKED.replace("{% endgeneration %}", "<|im_end|>\n{% endgeneration %}", 1).replace(
        "<|im_end|>\n{% endfor", "{% endfor"
    )
    inside = inside.replace("{% else %}{{ m.content }}", "{% else %}{{ m.content }}<|im_end|>\n")
    assert trained(make(inside), CONVERSATION)[0] == "It is 4.<|im_end|>\n"
    scoped = (
        "{% set x = 'out' %}{% generation %}{% set x = 'in' %}{{ x }}<|im_end|>{% endgeneration %}{{ x }}"
    )
    assert make(scoped).render_chat([USER]) == "in<|im_end|>out"
    assert trained(make(scoped), [{"role": "assistant", "content": ""}]) == ["in<|im_end|>"]


REWRITING = CHATML.replace(
    "{{ m.content }}", "{% if loop.last or m.role == 'user' %}{{ m.content }}{% endif %}"
)
TALK = [USER, {"role": "assistant", "content": "4"}, USER, {"role": "assistant", "content": "4"}]


@pytest.mark.parametrize(
    "template, messages, message",
    [
        (CHATML, [USER], "no assistant turn"),
        (CHATML, [], "no assistant turn"),
        (MARKED, [USER], "no assistant turn"),
        (None, TALK, "no chat template.*--chat-template"),
        (REWRITING, TALK, "assistant message 2 of 4: .*differently once other turns follow"),
        (CHATML.replace("assistant\n{% endif %}", "model\n{% endif %}"), TALK, "generation prompt"),
        (CHATML.replace("<|im_end|>", ""), TALK, "no end-of-turn token"),
        (
            CHATML.replace("<|im_end|>", ""),
            [{"role": "assistant", "content": "<|im_start|>x"}],
            "no end-of-turn token",
        ),
        (MARKED.replace("m.role == 'assistant'", "loop.last"), TALK, "marks 1 of the 2 assistant turns"),
        (
            MARKED.replace("{{ m.content }}{% endg", "{% endg").replace("<|im_end|>", ""),
            TALK,
            "turns are empty",
        ),
    ],
)
def test_a_mask_that_cannot_be_exact_is_refused(make, template, messages, message):
    with pytest.raises(InputError, match=message):
        make(template).encode_chat_with_mask(messages)


def test_a_turn_that_the_template_rewrites_can_be_trained_where_it_is_the_last(make):
    with pytest.raises(TurnRewritten):
        make(REWRITING).encode_chat_with_mask(TALK)
    assert trained(make(REWRITING), TALK, turns={3}) == ["4<|im_end|>"]
    assert trained(make(REWRITING), TALK[:2], turns={1}) == ["4<|im_end|>"]
