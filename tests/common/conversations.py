"""Rows of conversations, and what is trained of them under a template of our own."""

from burnish.algorithms.data.examples import rl_prompts, sft_examples
from burnish.algorithms.data.pairs import judged_completions, preferences
from burnish.algorithms.data.rows import check_rendered

# renders all that it knows: tools, reasoning, calls, a system message
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
PARTS = [{"type": "text", "text": "a "}, {"type": "text", "text": "question"}]
SHAREGPT = [{"from": "human", "value": "a question"}, {"from": "gpt", "value": "an answer"}]


def split(tokenizer, example) -> tuple[str, str]:
    """The example's text and its trained text."""
    trained = [token for token, wanted in zip(example.tokens, example.mask, strict=True) if wanted]
    return tokenizer.decode(example.tokens, False), tokenizer.decode(trained, False)


def texts(tokenizer, examples) -> list[tuple[str, str]]:
    return [split(tokenizer, example) for example in examples]


def sft(tokenizer, *rows, **options) -> list[tuple[str, str]]:
    """Each example's text and its trained text. The flags are checked as when a file is loaded."""
    examples, counts = sft_examples(rows, tokenizer, max_length=4096, **options)
    check_rendered([counts], tokenizer)
    return texts(tokenizer, examples)


def turn(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


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
