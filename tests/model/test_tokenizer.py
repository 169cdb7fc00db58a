"""Tokens, special tokens, where chat templates come from, and real ones beside the library that they were made for."""

import copy
import functools
import json
import random
import shutil
from datetime import datetime

import pytest
from burnish.model import ModelConfig, Transformer
from burnish.model.checkpoint import save_model
from burnish.model.errors import InputError
from burnish.model.text.tokenizer import Tokenizer, TurnRewritten
from folders import edit
from talks import CHATML, CONVERSATION, USER, trained
from tokenizers import AddedToken, models, normalizers, processors
from tokenizers import Tokenizer as Backend


@pytest.fixture
def folder(data, tmp_path):
    """A copy of our tokenizer's folder, to be edited."""
    shutil.copytree(data / "tokenizer", tmp_path / "copy")
    return tmp_path / "copy"


def sentencepiece_like(**names):
    """Llama 2's kind: bos in front, and a space at the start of every text, which decoding takes away."""
    words = ["<unk>", "<s>", "</s>", "▁", "▁Once", "▁upon", "▁a", "▁time", "upon", *"Onceupatim:"]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
    backend = Backend(models.Unigram([(word, -float(len(word) == 1)) for word in vocabulary], unk_id=0))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Tokenizer(backend, bos="<s>", eos="</s>", **names)


# ---- text and special tokens


@pytest.mark.parametrize("text", ["", "The License, 12.5%", "  two\n\n lines\t", "再见 🎉 é", "a<|im_end|>b"])
def test_decoding_gives_the_text_back(data, text):
    tokenizer = Tokenizer.load(data / "tokenizer")
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


def test_special_tokens_are_recognised_counted_and_skipped(data):
    tokenizer = Tokenizer.load(data / "tokenizer")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (None, 2, 0)
    assert tokenizer.stop_ids == {0, 2} and tokenizer.vocabulary.end == tokenizer.vocabulary.size == 512
    assert tokenizer.encode("a<|im_end|>")[-1] == 2
    assert tokenizer.decode(tokenizer.encode("a<|im_end|>b")) == "ab"


def test_special_tokens_as_objects_and_in_their_own_file(folder):
    edit(
        folder / "tokenizer_config.json",
        eos_token={"__type": "AddedToken", "content": "<|im_end|>"},
        pad_token=None,
    )
    (folder / "special_tokens_map.json").write_text(
        '{"pad_token": {"content": "<|im_start|>"}, "eos_token": "x"}'
    )
    tokenizer = Tokenizer.load(folder)
    assert (tokenizer.eos_id, tokenizer.pad_id) == (2, 1)


@pytest.mark.parametrize("value, expected", [(0, {0, 2}), ([0, 5], {0, 2, 5}), (None, {2, 7})])
def test_stop_ids_join_generation_config_and_eos(folder, value, expected):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    (folder / "config.json").write_text('{"eos_token_id": 7}')  # asked only where the other says nothing
    assert Tokenizer.load(folder).stop_ids == expected


def test_truncation_and_padding_of_the_file_are_switched_off(folder):
    side = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    pad = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
    edit(
        folder / "tokenizer.json",
        truncation=side,
        padding=pad | {"pad_type_id": 0, "pad_token": "<|endoftext|>"},
    )
    tokenizer = Tokenizer.load(folder)
    ids = tokenizer.encode("Each of these many words counts once")
    assert 4 < len(ids) < 64 and tokenizer.decode(ids) == "Each of these many words counts once"


def test_one_bos_in_front_of_a_text_whether_or_not_it_is_spelled_out():
    tokenizer = sentencepiece_like()
    assert tokenizer.prefix_ids == [1] and 1 not in tokenizer.encode("Once")
    ids = tokenizer.encode_text("Once upon")
    assert ids.count(1) == 1 and ids[0] == 1
    assert tokenizer.encode_text("<s>Once upon").count(1) == 1
    assert sentencepiece_like(config={"add_bos_token": False}).prefix_ids == []


def test_a_continuation_gets_no_space_of_its_own():
    tokenizer = sentencepiece_like()
    joined = tokenizer.encode("Once upon") + tokenizer.encode(" a time", continues=True)
    assert joined == tokenizer.encode("Once upon a time")
    assert tokenizer.encode(" a time") != tokenizer.encode(" a time", continues=True)
    assert tokenizer.encode("Once") == tokenizer.encode("Once")  # the first reader is untouched


def test_what_is_saved_loads_the_same(folder, tmp_path):
    edit(folder / "tokenizer_config.json", sep_token="<|im_start|>", model_max_length=99)
    first = Tokenizer.load(folder)
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "generation_config.json").write_text('{"temperature": 0.6, "eos_token_id": 5}')
    first.save(tmp_path / "saved")
    second = Tokenizer.load(tmp_path / "saved")
    assert second.config == first.config and second.config["sep_token"] == "<|im_start|>"
    assert second.stop_ids == first.stop_ids and second.chat_template == first.chat_template
    assert second.encode_chat(CONVERSATION) == first.encode_chat(CONVERSATION)
    generation = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert generation == {"temperature": 0.6, "eos_token_id": [2, 0], "pad_token_id": 0}


# ---- where the template comes from, and what it may do


def test_template_from_its_file_the_config_a_list_or_the_caller(folder, tmp_path):
    assert Tokenizer.load(folder).render_chat([USER]).startswith("<|im_start|>user")
    edit(folder / "tokenizer_config.json", chat_template="config")
    assert Tokenizer.load(folder).render_chat([USER]).startswith("<|im_start|>user")
    (folder / "chat_template.jinja").unlink()
    assert Tokenizer.load(folder).render_chat([USER]) == "config"
    named = [{"name": "rag", "template": "rag"}, {"name": "default", "template": "default"}]
    edit(folder / "tokenizer_config.json", chat_template=named)
    assert Tokenizer.load(folder).render_chat([USER]) == "default"
    (tmp_path / "own.jinja").write_text("own")
    assert Tokenizer.load(folder, tmp_path / "own.jinja").render_chat([USER]) == "own"
    with pytest.raises(InputError, match=r"absent\.jinja: no such chat template"):
        Tokenizer.load(folder, tmp_path / "absent.jinja")


def test_a_template_for_tools_is_taken_where_tools_are_given(folder, tmp_path):
    """Named in tokenizer_config.json, or in transformers' own folder; also once saved."""
    (folder / "chat_template.jinja").unlink()
    named = {
        "default": "plain",
        "tool_use": "tools {{ tools }} {{ date }} {{ messages[0].name }}",
        "rag": "rag",
    }
    edit(
        folder / "tokenizer_config.json",
        chat_template=[{"name": name, "template": text} for name, text in named.items()],
    )

    first = Tokenizer.load(folder)
    first.save(tmp_path / "saved")
    for tokenizer in (first, Tokenizer.load(tmp_path / "saved")):
        assert tokenizer.render_chat([USER]) == tokenizer.render_chat([USER], tools=None) == "plain"
        assert tokenizer.render_chat([USER], tools=[1]) == "tools [1]  "
        assert tokenizer.template_variables >= {"tools", "date"}
    (tmp_path / "own.jinja").write_text("own")
    assert Tokenizer.load(folder, tmp_path / "own.jinja").render_chat([USER], tools=[1]) == "own"


def test_a_model_is_saved_with_its_template_for_tools_and_replaced(folder, tmp_path):
    """The template's folder can be entered by others, and stays a model's; what else lies there is not lost."""
    tokenizer, model = Tokenizer.load(folder), Transformer(ModelConfig(8, 4, 4, 1, 1))
    tokenizer.tool_template = "tools {{ tools }}"
    (tmp_path / "plain").mkdir()
    for _ in range(2):
        save_model(model, tmp_path / "saved", tokenizer)
    templates = tmp_path / "saved" / "additional_chat_templates"
    assert templates.stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert Tokenizer.load(tmp_path / "saved").render_chat([USER], tools=[1]) == "tools [1]"
    (templates / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="found something else: not replaced"):
        save_model(model, tmp_path / "saved", tokenizer)


def test_templates_have_the_variables_and_functions_that_vendors_use(make):
    template = (
        "{{ eos_token }}|{{ bos_token is defined }}|{{ {'a': '<b> é'} | tojson }}|{{ tools is none }}|{{ extra }}|"
        "{% for i in [1, 2, 3] %}{% if i == 2 %}{% continue %}{% endif %}{{ i }}{% endfor %}|{{ strftime_now('%Y') }}"
    )
    rendered = make(template).render_chat([USER], extra="more")
    assert rendered == f'<|im_end|>|False|{{"a": "<b> é"}}|True|more|13|{datetime.now():%Y}'


def test_blocks_are_trimmed_and_the_assistant_is_asked(make):
    template = "{% for m in messages %}\n    {% if true %}\n{{ m.content }}\n    {% endif %}\n{% endfor %}\n!"
    assert make(template).render_chat([USER]) == "What is 2+2?\n!"
    prompt = make(CHATML).render_chat([USER], add_generation_prompt=True)
    assert prompt == "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    "template, message",
    [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ messages[0].update({'role': 'x'}) }}", "unsafe"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[7].content }}", "no element 7"),
        ("{{ 1 // 0 }}", "by zero"),
        ("{% if %}", "cannot be parsed: line 1"),
        ("{% generation %}", "cannot be parsed"),
    ],
)
def test_a_template_that_misbehaves_is_an_input_error(make, template, message):
    with pytest.raises(InputError, match=message):
        make(template).render_chat([dict(USER)])


@pytest.mark.parametrize(
    "messages, message",
    [
        (["hi"], "message 1: expected an object with a role"),
        ([USER, {"content": "x"}], "message 2: expected an object with a role"),
        ([{"role": "user", "content": "a\ufdd0b"}], "message 1: has the Unicode noncharacter"),
    ],
)
def test_messages_that_are_none(make, messages, message):
    with pytest.raises(InputError, match=message):
        make(CHATML).encode_chat_with_mask(messages)


def test_pieces_join_to_the_text_wherever_it_is_cut(make):
    tokenizer = make(CHATML)
    draw = random.Random(0)
    parts = ["\n", " ", "  ", "<|im_end|>", "<|im_start|>", "the ", "License", "é", "🎉", "1", "\t"]

    for _ in range(300):
        text = "".join(draw.choices(parts, k=draw.randint(1, 12)))
        cuts = sorted(draw.sample(range(len(text) + 1), min(draw.randint(1, 4), len(text))))
        pieces = tokenizer._encode_pieces(text, cuts)

        ends = [*cuts, len(text)]
        for (start, ids), end in zip(pieces, ends, strict=True):
            assert tokenizer.decode(ids, skip_special_tokens=False) == text[start:end]
        assert pieces[0][1] == tokenizer.encode(text[: cuts[0]])
        if all(
            tokenizer.encode(text)[: len(tokenizer.encode(text[:cut]))] == tokenizer.encode(text[:cut])
            for cut in cuts
        ):
            assert [token for _, ids in pieces for token in ids] == tokenizer.encode(text)


def test_the_plain_template_writes_one_bos_and_trains_the_end(data):
    tokenizer = sentencepiece_like(chat_template=Tokenizer.load(data / "tokenizer", "plain").chat_template)
    talk = [{"role": "user", "content": "Once"}, {"role": "assistant", "content": "upon"}] * 2
    ids, mask = tokenizer.encode_chat_with_mask(talk)
    assert ids == tokenizer.encode_chat(talk) and ids.count(1) == 1
    wanted = [token for token, trains in zip(ids, mask, strict=True) if trains]
    assert wanted == [*tokenizer.encode("upon", continues=True), 2] * 2
    for turn in (1, 3):
        prompt = tokenizer.encode_chat(talk[:turn], add_generation_prompt=True)
        assert ids[: len(prompt)] == prompt


# ---- bad files


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        Tokenizer.load(tmp_path / "absent")
    with pytest.raises(InputError, match=r"tokenizer\.json: not found"):
        Tokenizer.load(tmp_path)


def test_the_folder_of_a_run_names_the_model_in_it(folder, tmp_path):
    run = tmp_path / "a-run"
    run.mkdir()
    folder.rename(run / "model")
    with pytest.raises(
        InputError, match=r"a-run: expected a model's folder, got a run's; its model is .*a-run/model"
    ):
        Tokenizer.load(run)


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("tokenizer.json", '{"model": ', r"tokenizer\.json: not "),
        ("tokenizer_config.json", "{", r"tokenizer_config\.json: not JSON"),
        ("tokenizer_config.json", "[]", r"tokenizer_config\.json: expected a JSON object"),
        (
            "tokenizer_config.json",
            '{"eos_token": "<nope>"}',
            "special token '<nope>' is not in the vocabulary",
        ),
        ("tokenizer_config.json", '{"chat_template": 3}', "chat_template: expected a text"),
        (
            "generation_config.json",
            '{"eos_token_id": "</s>"}',
            r"generation_config\.json: eos_token_id: expected",
        ),
    ],
)
def test_a_broken_file_is_named(folder, name, text, message):
    (folder / name).write_text(text)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match=message):
        Tokenizer.load(folder)


# ---- real tokenizers and templates, and the library that they were made for


@functools.cache
def real(path):
    return Tokenizer.load(path)


def with_template(tokenizer, file):
    """The same tokenizer, not read again: the real ones take seconds."""
    other = copy.copy(tokenizer)
    other.__dict__.pop("_template", None)
    other.chat_template = file.read_text() if file else tokenizer.chat_template
    return other


@pytest.mark.parametrize(
    "model, template, expected",
    [
        ("qwen3", "qwen2_5", ["It is 4.<|im_end|>", "Still 4. 再见 🎉<|im_end|>"]),
        (
            "qwen3",
            "qwen3_training",
            [f"<think>\n\n</think>\n\n{m['content']}<|im_end|>\n" for m in CONVERSATION[2::2]],
        ),
        ("qwen3", "qwen3", TurnRewritten),
        ("qwen3", "phi3", TurnRewritten),
        ("deepseek_v3", None, ["It is 4.<｜end▁of▁sentence｜>", "Still 4. 再见 🎉<｜end▁of▁sentence｜>"]),
        ("deepseek_v3", "deepseekv3", "generation prompt"),
        ("deepseek_v3", "gemma3", "no end-of-turn token"),
        ("deepseek_v3", "gptoss", "no end-of-turn token"),
    ],
)
def test_real_templates_are_masked_exactly_or_refused(shared_data, model, template, expected):
    file = shared_data / "chat_templates" / f"{template}.jinja" if template else None
    tokenizer = with_template(real(shared_data / "tokenizers" / model), file)
    if isinstance(expected, list):
        assert trained(tokenizer, CONVERSATION) == expected
        ids, mask = tokenizer.encode_chat_with_mask(CONVERSATION)
        assert ids == tokenizer.encode_chat(CONVERSATION)
        prompt = tokenizer.encode_chat(CONVERSATION[:2], add_generation_prompt=True)
        assert ids[: len(prompt)] == prompt and not any(mask[: len(prompt)])
    elif isinstance(expected, str):
        with pytest.raises(InputError, match=expected):
            tokenizer.encode_chat_with_mask(CONVERSATION)
    else:
        with pytest.raises(expected):
            tokenizer.encode_chat_with_mask(CONVERSATION)
        assert len(trained(tokenizer, CONVERSATION, turns={len(CONVERSATION) - 1})) == 1


VENDORS = {  # the special tokens that a template writes, the stop ids first; rstrip as Phi-3's swallow what follows
    "phi3": ["<|end|>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>"],
    "gemma3": ["<end_of_turn>", "<start_of_turn>", "<bos>"],
    "gptoss": ["<|return|>", "<|end|>", "<|start|>", "<|message|>", "<|channel|>"],
}


@pytest.mark.parametrize("rstrip", [False, True])
@pytest.mark.parametrize(
    "template, expected",
    [
        ("phi3", ["It is 4.<|end|>", "Still 4. 再见 🎉<|end|>"]),
        ("gemma3", ["It is 4.<end_of_turn>", "Still 4. 再见 🎉<end_of_turn>"]),
        ("gptoss", TurnRewritten),
    ],
)
def test_vendors_templates_with_their_own_special_tokens(
    shared_data, backend_json, template, expected, rstrip
):
    backend = Backend.from_str(backend_json)
    backend.add_special_tokens([AddedToken(token, rstrip=rstrip) for token in VENDORS[template]])
    source = (shared_data / "chat_templates" / f"{template}.jinja").read_text()
    tokenizer = Tokenizer(backend, eos=VENDORS[template][0], chat_template=source)

    ids = tokenizer.encode_chat(CONVERSATION)
    if isinstance(expected, list):
        assert trained(tokenizer, CONVERSATION) == expected
        assert tokenizer.encode_chat_with_mask(CONVERSATION)[0] == ids
    else:
        with pytest.raises(expected):
            tokenizer.encode_chat_with_mask(CONVERSATION)
        last = "<|channel|>final<|message|>Still 4. 再见 🎉<|return|>"
        assert trained(tokenizer, CONVERSATION, turns={len(CONVERSATION) - 1}) == [last]

    prompt = tokenizer.encode_chat(CONVERSATION[:4], add_generation_prompt=True)
    assert (
        tokenizer.encode_chat_with_mask(CONVERSATION, turns={len(CONVERSATION) - 1})[0][: len(prompt)]
        == prompt
    )


@pytest.mark.parametrize("model", ["qwen3", "deepseek_v3"])
def test_conversations_have_the_ids_and_masks_of_transformers(shared_data, tmp_path, model):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(shared_data / "tokenizers" / model)
    think = {"role": "assistant", "content": "<think>\nhmm\n</think>\n\nYes"}
    call = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "f", "arguments": {"x": "<1>"}}}],
    }

    conversations = [CONVERSATION, [USER, think], [USER, {"role": "assistant", "content": "\n\n4"}], [USER]]
    if model == "qwen3":
        conversations.append([USER, call, {"role": "tool", "content": "3"}, think])

    for file in [None, *sorted((shared_data / "chat_templates").iterdir())]:
        ours = with_template(real(shared_data / "tokenizers" / model), file)
        for messages in conversations:
            if (
                file is not None
                and file.stem in ("gptoss", "deepseekv3", "gemma3", "phi3")
                and len(messages) > 3
            ):
                messages = CONVERSATION

            for ask in (False, True):
                expected = theirs.apply_chat_template(
                    messages, chat_template=ours.chat_template, add_generation_prompt=ask, return_dict=False
                )
                assert ours.encode_chat(messages, add_generation_prompt=ask) == expected

            if "{%- generation %}" in ours.chat_template and len(messages) > 1:
                masks = theirs.apply_chat_template(
                    messages,
                    chat_template=ours.chat_template,
                    return_dict=True,
                    return_assistant_tokens_mask=True,
                )
                ids, mask = ours.encode_chat_with_mask(messages)
                assert ids == masks["input_ids"] and mask == [bool(m) for m in masks["assistant_masks"]]


def test_transformers_loads_what_is_saved(data, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = Tokenizer.load(data / "tokenizer")
    ours.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.apply_chat_template(CONVERSATION, return_dict=False) == ours.encode_chat(CONVERSATION)
    assert theirs.eos_token_id == ours.eos_id and theirs.pad_token_id == ours.pad_id
    assert set(transformers.GenerationConfig.from_pretrained(tmp_path).eos_token_id) == ours.stop_ids
