"""Write chat.json: the ids of rows with tools and template variables: `python tests/data/make_chat_golden.py`.

Made with transformers 5.22.2 and the templates of trl 1.16.0, whose folder TRL_TEMPLATES may name. The tokenizer is the
one beside this file; the day that templates print is frozen. An entry is a row, whether the assistant is asked behind
it, and `apply_chat_template(messages, tools=..., **chat_template_kwargs)`.
"""

import importlib.util
import json
import os
from datetime import datetime
from pathlib import Path

HERE = Path(__file__).parent
DAY = datetime(2026, 1, 2)
BOS = "<|im_start|>"  # the tokenizer has none of its own, and templates write one

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Its name."},
                "days": {"type": "array", "items": {"type": "integer"}},
                "unit": {"type": "string", "enum": ["C", "F"], "default": "C"},
            },
            "required": ["city"],
        },
    },
}
SYSTEM = {"role": "system", "content": "Be brief."}
ASK, AGAIN = (
    {"role": "user", "content": "Is it raining in Tromsø?"},
    {"role": "user", "content": "And  now?\n"},
)
ANSWER = {"role": "assistant", "content": 'Yes: 7 °C "at most".'}
THOUGHT = {"role": "assistant", "content": "<think>\nIt did.\n</think>\n\nStill."}
TOOL = {"role": "tool", "content": '{"rain": true, "note": "<7>"}'}


def call(arguments, content="") -> dict:
    function = {"name": "get_weather", "arguments": arguments}
    return {
        "role": "assistant",
        "content": content,
        "tool_calls": [{"type": "function", "function": function}],
    }


ARGUMENTS = {"city": "Tromsø", "days": [1, 2], "unit": None}
TEXT = json.dumps(ARGUMENTS, ensure_ascii=False)
PLAIN = [SYSTEM, ASK, ANSWER, AGAIN, ANSWER]
CALLED = [SYSTEM, ASK, call(ARGUMENTS), TOOL, ANSWER]
ROWS = {
    "qwen3": [
        {"messages": CALLED, "tools": [WEATHER]},
        {
            "messages": [ASK, call(TEXT, "Let me see."), TOOL, THOUGHT],
            "tools": json.dumps([WEATHER, WEATHER]),
        },
        {"messages": [*PLAIN, AGAIN, THOUGHT]},
        {"messages": [SYSTEM, ASK], "chat_template_kwargs": {"enable_thinking": False}, "tools": [WEATHER]},
        {"messages": CALLED[:-1], "tools": [WEATHER], "chat_template_kwargs": '{"enable_thinking": true}'},
    ],
    "qwen2_5": [
        {"messages": CALLED, "tools": json.dumps([WEATHER])},
        {"messages": [ASK, call(ARGUMENTS, None), TOOL, ANSWER]},
        {"messages": PLAIN[:-1], "tools": [WEATHER]},
    ],
    "gptoss": [
        {"messages": CALLED, "tools": [WEATHER]},
        {
            "messages": [ASK, ANSWER | {"thinking": "It did."}],
            "chat_template_kwargs": {"reasoning_effort": "high"},
        },
        {"messages": CALLED[:-1], "tools": json.dumps([WEATHER])},
        {
            "messages": [ASK],
            "chat_template_kwargs": {"model_identity": "You are small.", "builtin_tools": ["python"]},
        },
    ],
    "deepseekv3": [
        {"messages": [SYSTEM, ASK, call(TEXT), TOOL, ANSWER], "tools": [WEATHER]},
        {"messages": [ASK, call(TEXT, None), TOOL, ANSWER, AGAIN, ANSWER]},
        {"messages": PLAIN[:-1], "tools": [WEATHER]},
    ],
    "phi3": [
        {"messages": PLAIN, "tools": [WEATHER]},
        {"messages": PLAIN[:-1], "tools": json.dumps([WEATHER])},
    ],
    "llama3": [{"messages": PLAIN, "tools": [WEATHER]}, {"messages": PLAIN[:-1]}],
    "llama3_1": [
        {"messages": CALLED, "tools": [WEATHER]},
        {
            "messages": [*CALLED, AGAIN],
            "tools": json.dumps([WEATHER]),
            "chat_template_kwargs": {"date_string": "today"},
        },
        {"messages": CALLED, "tools": [WEATHER], "chat_template_kwargs": {"tools_in_user_message": False}},
    ],
    "llama3_2": [{"messages": CALLED, "tools": [WEATHER]}],
}


def template_file(name: str, *folders: Path) -> Path | None:
    """The template of that name in one of the folders, or in trl where it is installed."""
    found = importlib.util.find_spec("trl")
    installed = [Path(found.origin).parent / "chat_templates"] if found and found.origin else []
    files = [folder / f"{name}.jinja" for folder in (*folders, *installed)]
    return next((file for file in files if file.is_file()), None)


class FrozenClock(datetime):
    @classmethod
    def now(cls, tz=None):
        return DAY


def compute() -> list[dict]:
    from transformers import AutoTokenizer
    from transformers.utils import chat_template_utils

    folders = [Path(os.environ["TRL_TEMPLATES"])] if "TRL_TEMPLATES" in os.environ else []
    tokenizer = AutoTokenizer.from_pretrained(HERE / "tokenizer", bos_token=BOS)
    clock, chat_template_utils.datetime = chat_template_utils.datetime, FrozenClock
    entries = []

    for name, rows in ROWS.items():
        file = template_file(name, *folders)
        assert file is not None, f"no template {name}: name its folder by TRL_TEMPLATES"
        for row in rows:
            ask = row["messages"][-1]["role"] != "assistant"
            tools, variables = (row.get(key) for key in ("tools", "chat_template_kwargs"))
            ids = tokenizer.apply_chat_template(
                row["messages"],
                tools=json.loads(tools) if isinstance(tools, str) else tools,
                chat_template=file.read_text(),
                add_generation_prompt=ask,
                return_dict=False,
                **(json.loads(variables) if isinstance(variables, str) else variables or {}),
            )
            entries.append({"template": name, "row": row, "ask": ask, "ids": ids})

    chat_template_utils.datetime = clock
    return entries


if __name__ == "__main__":
    lines = [json.dumps(entry, ensure_ascii=False) for entry in compute()]
    (HERE / "chat.json").write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
