"""A conversation at the keyboard, played from a list: what is asked, what the model sees, and how it ends."""

import json
import shutil

import pytest
from burnish.algorithms import chat
from burnish.algorithms.__main__ import main as command
from burnish.algorithms.chat import Config, main
from burnish.model.checkpoint import load_model, save_model
from burnish.model.config import ModelConfig
from burnish.model.errors import InputError
from burnish.model.generate import SamplingParams, generate
from burnish.model.text.tokenizer import Tokenizer
from burnish.model.transformer import Transformer

USER = {"role": "user", "content": "The License"}


@pytest.fixture(scope="module")
def tokenizer(request):
    return Tokenizer.load(request.path.parents[1] / "data" / "tokenizer")


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """A random model that our tokenizer fits."""
    config = ModelConfig(512, 32, 48, 2, 4, 2, tie_word_embeddings=True, initializer_range=0.3)
    save_model(Transformer(config, seed=1), folder := tmp_path_factory.mktemp("chat") / "model", tokenizer)
    return folder


@pytest.fixture
def keyboard(monkeypatch):
    """Lines to type; an exception among them is raised instead. The end of the list is Ctrl-D."""

    def type_in(*lines):
        waiting = list(lines)

        def read(_=""):
            line = waiting.pop(0) if waiting else EOFError()
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr("builtins.input", read)

    return type_in


@pytest.fixture
def replies(monkeypatch, tokenizer):
    """Have the model give these answers; returns the prompts that it was given."""

    def answer_with(*answers):
        prompts, waiting = [], [tokenizer.encode(answer) for answer in answers]

        def scripted(model, prompt, params):
            prompts.append(tokenizer.decode(prompt, skip_special_tokens=False))
            yield from waiting.pop(0)

        monkeypatch.setattr(chat, "stream", scripted)
        return prompts

    return answer_with


def test_a_conversation_remembers_and_starts_anew(folder, keyboard, replies, capsys):
    keyboard("The License", "", "and more", "/new", "again")
    prompts = replies("one<|im_end|>", "two<|im_end|>", "three<|im_end|>")
    main(Config(model=folder, system="brief", device="cpu"))
    system, ask = "<|im_start|>system\nbrief<|im_end|>\n", "<|im_end|>\n<|im_start|>assistant\n"
    first = f"{system}<|im_start|>user\nThe License{ask}"
    assert prompts == [
        first,
        f"{first}one<|im_end|>\n<|im_start|>user\nand more{ask}",
        f"{system}<|im_start|>user\nagain{ask}",
    ]
    assert capsys.readouterr().out == "one\ntwo\nthree\n\n"


def test_one_prompt_one_answer(folder, tokenizer, capsys):
    main(Config(model=folder, prompt="The License", temperature=0, max_new_tokens=8, device="cpu"))
    prompt = tokenizer.encode_chat([USER], add_generation_prompt=True)
    (expected,) = generate(
        load_model(folder),
        [prompt],
        SamplingParams(max_new_tokens=8, temperature=0, stop_ids=tokenizer.stop_ids),
    )
    assert capsys.readouterr().out == tokenizer.decode(expected.tokens) + "\n"


def test_the_same_seed_gives_the_same_answer(folder, capsys):
    def answers(seed):
        main(
            Config(
                model=folder,
                prompt="The",
                temperature=1.0,
                top_p=1.0,
                max_new_tokens=12,
                seed=seed,
                device="cpu",
            )
        )
        return capsys.readouterr().out

    assert answers(0) == answers(0) != answers(1)


SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20}


@pytest.mark.parametrize(
    ("generation", "flags", "expected"),
    [
        ({}, {}, {"temperature": 0}),
        ({"eos_token_id": 2}, {}, {"temperature": 0}),
        (SAMPLING | {"do_sample": False}, {}, {"temperature": 0}),
        ({"temperature": 0.6, "top_p": 0.9}, {}, {"temperature": 0}),  # do_sample is not there
        (SAMPLING, {}, {"temperature": 0.6, "top_p": 0.9, "top_k": 20}),
        (SAMPLING | {"top_k": 0, "min_p": 0.1}, {}, {"temperature": 0.6, "top_p": 0.9, "min_p": 0.1}),
        ({"do_sample": True}, {}, {"temperature": 1}),
        (SAMPLING, {"temperature": 0.0}, {"temperature": 0}),
        (SAMPLING, {"temperature": 2.0}, {"temperature": 2, "top_p": 0.9, "top_k": 20}),
        (SAMPLING, {"top_p": 1.0, "top_k": 0}, {"temperature": 0.6, "top_p": 1.0}),
        ({}, {"top_k": 3}, {"temperature": 1, "top_k": 3}),
        ({}, {"temperature": 0.5}, {"temperature": 0.5}),
    ],
)
def test_the_rule_is_that_of_the_flags_or_else_of_the_model(folder, generation, flags, expected):
    assert chat.rule_of(Config(model=folder, device="cpu", **flags), generation) == expected


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "0.9", [0.9], 10**400])
def test_a_wrong_value_of_the_model_is_named(folder, value):
    with pytest.raises(
        InputError, match=r"^generation_config\.json: top_p: expected more than 0 and at most 1"
    ):
        chat.rule_of(Config(model=folder, device="cpu"), SAMPLING | {"top_p": value})


def test_the_greeting_and_the_answers_follow_the_model(
    folder, tokenizer, keyboard, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    keyboard("The License", "/new", "The License")
    main(Config(model=folder, device="cpu", max_new_tokens=12))
    greeting, first, second = capsys.readouterr().out.strip().split("\n")
    assert "greedy: the most likely token each time; /new starts" in greeting and first == second

    shutil.copytree(folder, tmp_path / "model")
    file = tmp_path / "model" / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | SAMPLING | {"temperature": 1.5}))
    keyboard("The License", "/new", "The License")
    main(Config(model=tmp_path / "model", device="cpu", max_new_tokens=12))
    greeting, first, second = capsys.readouterr().out.strip().split("\n")
    assert "samples at temperature 1.5, top_p 0.9, top_k 20; /new starts" in greeting and first != second


def test_another_answer_draws_anew(folder, keyboard, capsys):
    keyboard("The", "/new", "The")
    main(Config(model=folder, temperature=1.0, top_p=1.0, max_new_tokens=12, device="cpu"))
    first, second = capsys.readouterr().out.strip().split("\n", 1)
    assert first != second


def test_characters_of_several_tokens_are_shown_whole(folder, replies, capsys, monkeypatch):
    replies("é 🎉 再<|im_end|>")
    written = []
    monkeypatch.setattr("builtins.print", lambda *parts, **_: written.extend(parts))
    main(Config(model=folder, prompt="x", device="cpu"))
    assert "".join(written) == "é 🎉 再" and not any("\ufffd" in part for part in written)
    assert len(written) > 3  # as it comes, not at the end


def test_ctrl_c_stops_an_answer_and_at_the_prompt_the_conversation(
    folder, keyboard, tokenizer, monkeypatch, capsys
):
    prompts = []

    def interrupted(model, prompt, params):
        prompts.append(tokenizer.decode(prompt))
        yield from tokenizer.encode("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "stream", interrupted)
    keyboard("The License", "and", KeyboardInterrupt(), "never read")
    main(Config(model=folder, device="cpu"))
    assert capsys.readouterr().out == "half\nhalf\n\n"
    assert len(prompts) == 2 and "half" in prompts[1]
    assert command(["chat", "--model", str(folder), "--prompt", "x", "--device", "cpu"]) == 130


def test_a_model_without_a_template_goes_on_with_the_text(folder, tokenizer, replies, tmp_path, capsys):
    save_model(load_model(folder), tmp_path / "base", Tokenizer(tokenizer.backend, eos="<|endoftext|>"))
    prompts = replies(" and more", "yes")
    main(Config(model=tmp_path / "base", prompt="The License", device="cpu"))
    main(Config(model=tmp_path / "base", prompt="The License", chat_template="plain", device="cpu"))
    assert prompts == ["The License", "User:\nThe License\n\nAssistant:\n"]
    with pytest.raises(InputError, match="--system: the model has no chat template"):
        main(Config(model=tmp_path / "base", system="brief", device="cpu"))


def test_a_conversation_beyond_the_trained_length_is_remarked_upon(folder, replies, capsys):
    replies("x")
    main(Config(model=folder, prompt="x", max_new_tokens=2048, device="cpu"))
    assert "beyond the 2048 tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--max-new-tokens", "0"], "--max-new-tokens: expected at least 1, got 0"),
        (["--temperature", "-1"], "--temperature: expected at least 0 and at most 1000, got -1.0"),
        (["--temperature", "nan"], "--temperature: expected at least 0 and at most 1000, got nan"),
        (["--temperature", "1e4"], "--temperature: expected at least 0 and at most 1000, got 10000.0"),
        (["--top-p", "0"], "--top-p: expected more than 0 and at most 1, got 0.0"),
        (["--top-k", "-1"], "--top-k: expected a whole number of at least 0, got -1"),
        (["--temperature", "0", "--top-k", "5"], "--top-k: expected --temperature above 0 beside it, got 0"),
        (["--chat-template", "absent.jinja"], "absent.jinja: no such chat template"),
    ],
)
def test_wrong_flags_end_with_one_line(folder, capsys, flags, message):
    assert command(["chat", "--model", str(folder), *flags]) == 1
    assert capsys.readouterr().err.strip().startswith(f"burnish chat: {message}")


def test_a_folder_that_is_no_model_ends_with_one_line(tmp_path, capsys):
    assert command(["chat", "--model", str(tmp_path / "absent")]) == 1
    assert "no such folder" in capsys.readouterr().err


TOOLS = '[{"name": "weather"}]'


def test_tools_and_variables_reach_the_template(folder, tmp_path, keyboard, replies):
    (tmp_path / "own.jinja").write_text(
        "{{ tools | tojson }} {{ mood }} {% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    )
    (tmp_path / "tools.json").write_text(TOOLS)
    keyboard("hello", "again")
    prompts = replies("one", "two")
    flags = {"chat_template": str(tmp_path / "own.jinja"), "chat_template_kwargs": '{"mood": "calm"}'}
    main(Config(model=folder, tools=tmp_path / "tools.json", device="cpu", **flags))
    assert prompts == [
        f"{TOOLS} calm user hello ",
        f"{TOOLS} calm user hello assistant one user again ",
    ]


@pytest.mark.parametrize(
    "template, flags, message",
    [
        (
            "{{ messages[-1].content }}",
            {"system": "be brief"},
            "--system: .*content: the chat template leaves it",
        ),
        (
            "{{ messages[-1].content }}",
            {"tools": "tools.json"},
            "--tools: the chat template does not use tools",
        ),
        (
            "{{ tools }}{{ messages[-1].content }}",
            {"tools": "none.json"},
            r"--tools .*none\.json: no such file",
        ),
        ("{{ tools }}{{ messages[-1].content }}", {"tools": "bad.json"}, r"--tools .*bad\.json: not JSON"),
        (None, {"tools": "tools.json"}, "--tools: the model has no chat template"),
        (None, {"chat_template_kwargs": "{}"}, "--chat-template-kwargs: the model has no chat template"),
        (
            "{{ messages[-1].content }}",
            {"chat_template_kwargs": '{"a": 1}'},
            "reads no variable 'a'; it reads none",
        ),
    ],
)
def test_what_the_template_would_leave_out_is_refused(folder, tmp_path, template, flags, message):
    (tmp_path / "tools.json").write_text(TOOLS)
    (tmp_path / "bad.json").write_text("[")
    model = folder
    if template is None:
        model = tmp_path / "base"
        tokenizer = Tokenizer.load(folder)
        save_model(load_model(folder), model, Tokenizer(tokenizer.backend, eos="<|im_end|>"))
    else:
        (tmp_path / "own.jinja").write_text(template)
        flags = flags | {"chat_template": str(tmp_path / "own.jinja")}
    if "tools" in flags:
        flags = flags | {"tools": tmp_path / flags["tools"]}
    with pytest.raises(InputError, match=message):
        main(Config(model=model, prompt="hello", device="cpu", **flags))
