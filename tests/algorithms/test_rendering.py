"""A template that leaves something out is found, whatever it leaves out, and a template that says all is believed."""

import json
import random
import re
from types import ModuleType

import pytest
from burnish.algorithms.data import rendering
from burnish.algorithms.data.examples import rl_prompts, sft_examples
from burnish.algorithms.data.rendering import NotRendered
from burnish.model.errors import InputError
from burnish.model.text.template import PLAIN_TEMPLATE
from burnish.model.text.tokenizer import Tokenizer
from faults import check_of, control, faults_of
from planted import copy_of
from tokenizers import Tokenizer as Backend

TEMPLATE = """\
{%- for m in messages -%}
    {{- '<|im_start|>' -}}
    {{- m.role + ':' -}}
    {%- if m.reasoning -%}
        {%- if loop.last or keep -%}{{- '<think>' + m.reasoning + '</think>' -}}{%- endif -%}
    {%- endif -%}
    {%- if m.content is string -%}
        {{- m.content | trim -}}
    {%- else -%}
        {%- for part in m.content or [] -%}{{- part.text -}}{%- endfor -%}
    {%- endif -%}
    {%- for call in m.tool_calls -%}
        {{- call.function.name -}}
        {%- for key, value in call.function.arguments.items() -%}
            {{- key -}}
            {{- value | tojson -}}
        {%- endfor -%}
    {%- endfor -%}
    {{- '<|im_end|>' -}}
{%- endfor -%}
"""
CALL = {"function": {"name": "f", "arguments": {"a": 1, "b": {"c": "d", "e": [2.5, "g"]}}}}
TALK = [
    {"role": "system", "content": " be brief"},
    {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
    {"role": "assistant", "content": None, "reasoning": "hm", "tool_calls": [CALL, CALL]},
    {"role": "tool", "content": "1"},
    {"role": "assistant", "content": "1", "reasoning": "so"},
]


@pytest.fixture(scope="module")
def make(request):
    backend = (request.path.parents[1] / "data" / "tokenizer" / "tokenizer.json").read_text()
    return lambda template: Tokenizer(Backend.from_str(backend), eos="<|im_end|>", chat_template=template)


def check(tokenizer, messages=TALK, module=rendering):
    return module.whole_form(messages, tokenizer, {}, ask=False)


def test_a_template_that_says_all_is_believed(make):
    messages, form = check(make(TEMPLATE))
    assert messages == TALK and form == ((0, 0, 0, 0), 1, ())  # reasoning of the turn that is not the last


def outputs() -> list[str]:
    """The template's blocks that print what messages hold."""
    return [block for block in re.findall(r"\{\{-.*?-\}\}", TEMPLATE) if "<|im" not in block]


@pytest.mark.parametrize("block", outputs())
@pytest.mark.parametrize("instead", ["", "{{- '...' -}}"])
def test_whatever_is_taken_out_of_a_template_is_missed(make, block, instead):
    assert TEMPLATE.count(block) == 1
    if block == "{{- m.role + ':' -}}":  # a role is no word of a message
        return
    if block in ("{{- m.content | trim -}}", "{{- part.text -}}"):  # the other of the two says it
        messages, _ = check(make(TEMPLATE.replace(block, instead)))
        assert isinstance(messages[1]["content"], str if "part" in block else list)
        return
    with pytest.raises(NotRendered):
        check(make(TEMPLATE.replace(block, instead)))


@pytest.mark.parametrize(
    "old, new",
    [
        ("for m in messages", "for m in messages if m.role != 'tool'"),
        ("for m in messages", "for m in messages[1:]"),
        ("for m in messages", "for m in messages[:-1]"),
        ("for call in m.tool_calls", "for call in (m.tool_calls or [])[:1]"),
        ("for part in m.content or []", "for part in (m.content or [])[:1]"),
        (".items()", ".items() if key != 'b'"),
        ("value | tojson", "value['c'] if value is mapping else value"),
        ("loop.last or keep", "false"),
        ("loop.last or keep", "loop.first"),
    ],
)
def test_what_a_template_passes_over_is_missed(make, old, new):
    """The same words may stand elsewhere: the tool's 1 is the answer's, too."""
    assert old in TEMPLATE
    tokenizer = make(TEMPLATE.replace(old, new))
    if "part in" in old:
        messages, _ = check(tokenizer)  # a joined text is all that is needed
        assert messages[1]["content"] == "onetwo"
        return
    with pytest.raises(NotRendered):
        check(tokenizer)


def test_a_template_is_asked_once_for_conversations_of_one_kind(make, monkeypatch):
    tokenizer = make(TEMPLATE)
    rendered = []
    original = Tokenizer.render_chat
    monkeypatch.setattr(Tokenizer, "render_chat", lambda *a, **k: rendered.append(1) or original(*a, **k))
    for word in ("a", "b", "c d", "<", "1 < 2 > 0"):
        check(tokenizer, [{"role": "user", "content": word}])
    assert len(rendered) == 1 + 5  # and each once more with its own words
    check(tokenizer, [{"role": "user", "content": "<think>"}])  # tags are another kind
    assert len(rendered) == 2 + 6


def test_a_template_that_refuses_other_words_is_asked_with_the_real_ones(make):
    answer = "m.content if m.content in ('yes', 'no') else raise_exception('what?')"
    strict = make(f"{{% for m in messages %}}{{{{ {answer} }}}}{{% endfor %}}")
    talk = [{"role": "user", "content": "yes"}, {"role": "assistant", "content": "no"}]
    assert check(strict, talk) == (talk, ((0, 0, 0, 0), 0, ()))
    half = make(strict.chat_template.replace("for m in messages", "for m in messages[1:]"))
    with pytest.raises(NotRendered) as error:
        check(half, talk)
    assert error.value.mark[:2] == (0, "content")
    with pytest.raises(InputError, match="what"):
        check(strict, [{"role": "user", "content": "perhaps"}])


# ---- the templates of vendors


WORDS = iter(range(10**9))


def word() -> str:
    return f"w{next(WORDS):04d}e"


def conversation(draw: random.Random) -> list[dict]:
    """Turns of every kind, of words that occur once. A template may render or refuse them."""
    first = {"role": draw.choice(["system", "system", "developer"]), "content": word()}
    turns = [first] if draw.random() < 0.4 else []
    for _ in range(draw.randint(1, 3)):
        parts = [{"type": "text", "text": word()} for _ in range(2)]
        turns.append({"role": "user", "content": word() if draw.random() < 0.8 else parts})

        if draw.random() < 0.4:
            arguments = {
                word(): draw.choice([word(), 1, None, {"x": word()}]) for _ in range(draw.randint(0, 2))
            }
            names = [word() for _ in range(draw.choice([1, 1, 2]))]
            given = arguments if draw.random() < 0.5 else json.dumps(arguments)
            calls = [{"type": "function", "function": {"name": name, "arguments": given}} for name in names]
            turns.append(
                {"role": "assistant", "content": draw.choice(["", None, word()]), "tool_calls": calls}
            )
            turns += [{"role": draw.choice(["tool", "tool", "function"]), "content": word()} for _ in names]

        answer = {"role": draw.choice(["assistant"] * 9 + ["model"]), "content": word()}
        kind = draw.choice(["none"] * 4 + ["tags", "reasoning_content", "thinking", "reasoning"])
        if kind == "tags":
            answer["content"] = f"<think>\n{word()}\n</think>\n\n{word()}"
        elif kind != "none":
            answer[kind] = word()
        turns.append(answer)
    return turns


def words_of(turns: list[dict]) -> tuple[set[str], set[str]]:
    """All words of a conversation, and those that a template may drop: what earlier turns thought."""
    every = set(re.findall(r"w\d{4,}e", json.dumps(turns)))
    may_miss: set[str] = set()
    for turn in turns[:-1]:
        if turn["role"] == "assistant":
            thoughts = [str(turn.get(key)) for key in ("reasoning_content", "thinking", "reasoning")]
            thoughts += re.findall("<think>.*</think>", str(turn["content"]), re.DOTALL)
            thoughts += [str(turn["content"])] if "tool_calls" in turn else []  # gpt-oss: the call's analysis
            may_miss |= set(re.findall(r"w\d{4,}e", " ".join(thoughts)))
    return every, may_miss


def named_words(turns: list[dict], unused: list[str]) -> set[str]:
    """Those of keys that the printed line names: what others than the assistant are said to think."""
    keys = [name.partition(".")[2] for name in unused]
    return {turn[key] for turn in turns if turn["role"] != "assistant" for key in keys if key in turn}


def holds(tokenizer: Tokenizer, turns: list[dict]) -> bool:
    """Check that all of a conversation stands in the text. Returns whether it was read."""
    try:
        examples, counts = sft_examples([{"messages": turns}], tokenizer, max_length=10**6, train_on="all")
    except InputError as error:
        assert str(error).startswith("row 1: ")
        return False

    text = tokenizer.decode(examples[0].tokens, False)
    every, may_miss = words_of(turns)
    missing = {one for one in every if one not in text} - named_words(turns, counts.unused)
    assert missing <= may_miss, f"{missing - may_miss} of {turns}\n{text}"
    assert not missing or counts["turns whose reasoning the chat template drops, because other turns follow"]
    assert "{'" not in text and "None" not in text, f"Python's notation: {turns}\n{text}"

    asked = turns[:-1]
    try:
        ((prompt,), counts) = rl_prompts([{"prompt": asked}], tokenizer, max_length=10**6)
    except InputError:
        return True
    text = tokenizer.decode(prompt.tokens, False)
    every, may_miss = words_of(asked)
    missing = {one for one in every if one not in text} - named_words(asked, counts.unused)
    assert missing <= may_miss | words_of([*asked, turns[-1]])[1]
    return True


TEMPLATES = ("deepseekv3", "gemma3", "gptoss", "phi3", "qwen2_5", "qwen3", "qwen3_training", "plain")


@pytest.mark.parametrize("seed, count", [(0, 40), pytest.param(1, 400, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", TEMPLATES)
def test_what_a_message_says_stands_in_the_text_or_the_row_is_refused(shared_data, make, name, seed, count):
    file = shared_data / "chat_templates" / f"{name}.jinja"
    tokenizer = make(PLAIN_TEMPLATE if name == "plain" else file.read_text())
    tokenizer.config["bos_token"] = "<|im_start|>"
    draw = random.Random(f"{name} {seed}")
    read = [holds(tokenizer, conversation(draw)) for _ in range(count)]
    assert 2 <= sum(read) <= 0.95 * count, f"{sum(read)} of {count}: too few, or too many to be true"


# ---- planted faults


@control
def believes(module: ModuleType, make) -> None:
    assert check(make(TEMPLATE), module=module) == (TALK, ((0, 0, 0, 0), 1, ()))


@control
def misses_what_is_taken_out(module: ModuleType, make) -> None:
    for block in outputs()[1:]:
        if "content" in block or "part" in block:
            continue  # each says what the other would
        with pytest.raises(module.NotRendered):
            check(make(TEMPLATE.replace(block, "")), module=module)
    with pytest.raises(module.NotRendered):
        check(make(TEMPLATE.replace("loop.last or keep", "false")), module=module)
    with pytest.raises(module.NotRendered):
        check(make(TEMPLATE.replace("for m in messages", "for m in messages[1:]")), module=module)


@control
def finds_the_form(module: ModuleType, make) -> None:
    printing = make(
        "{% for m in messages %}{{ m.content }}{{ m.tool_calls[0].function.arguments }}{% endfor %}"
    )
    arguments = {"a": "b"}
    talk = [
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"function": {"name": "", "arguments": arguments}}],
        }
    ]
    ((message,), _) = check(printing, talk, module)
    assert "content" not in message and message["tool_calls"][0]["function"]["arguments"] == '{"a": "b"}'

    dumping = make("{% for m in messages %}{{ m.tool_calls[0].function.arguments | tojson }}{% endfor %}")
    talk[0]["tool_calls"][0]["function"]["arguments"] = '{"a": "b"}'
    ((message,), _) = check(dumping, talk, module)
    assert message["tool_calls"][0]["function"]["arguments"] == arguments


@control
def the_same_word_elsewhere(module: ModuleType, make) -> None:
    """A tool's name that stands in the conversation anyway."""
    question = {"role": "user", "content": "f a 1 b c d e 2.5 g"}
    talk = [question, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    with pytest.raises(module.NotRendered):
        check(make(TEMPLATE.replace("{{- call.function.name -}}", "")), talk, module)


@control
def misses_words(module: ModuleType, make) -> None:
    """A template that leaves out one word alone."""
    with pytest.raises(module.NotRendered):
        check(make(TEMPLATE.replace(".items()", ".items() if key != 'b'")), module=module)


FAULTS = faults_of(__file__)
FILE = "algorithms/data/rendering"


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.id)
def test_a_planted_fault_is_caught(fault, tmp_path, monkeypatch, make):
    module = copy_of(FILE, tmp_path, monkeypatch, fault)
    with pytest.raises((AssertionError, pytest.fail.Exception, InputError, KeyError)):
        check_of(fault)(module, make)


def test_a_faithful_copy_passes(tmp_path, monkeypatch, make):
    module = copy_of(FILE, tmp_path, monkeypatch)
    for check in dict.fromkeys(map(check_of, FAULTS)):
        check(module, make)
