"""Conversations and chat templates for tests, and what of a conversation is trained."""

USER = {"role": "user", "content": "What is 2+2?"}
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    USER,
    {"role": "assistant", "content": "It is 4."},
    {"role": "user", "content": "And  now?\n"},
    {"role": "assistant", "content": "Still 4. 再见 🎉"},
]
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def trained(tokenizer, messages, **options):
    """The text of each run of trained tokens."""
    ids, mask = tokenizer.encode_chat_with_mask(messages, **options)
    runs, previous = [], False
    for token, wanted in zip(ids, mask, strict=True):
        if wanted:
            runs = runs if previous else [*runs, []]
            runs[-1].append(token)
        previous = wanted
    return [tokenizer.decode(run, skip_special_tokens=False) for run in runs]
