"""Regular expressions of adapters: what `re` says, in bounded time."""

import copy
import json
import random
import re
import time
import warnings

import pytest
from burnish.model import InputError, ModelConfig, Transformer
from burnish.model.adapter import add_lora
from burnish.model.adapters import expressions
from burnish.model.adapters.config import LINEARS, LoraConfig
from burnish.model.adapters.expressions import Expression
from burnish.model.checkpoint import load_model, save_model

MODULES = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
MODULES += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
NAMES = [f"model.layers.{i}.{module}" for i in range(94) for module in MODULES]
PUBLISHED = [  # as Unsloth, ms-swift and axolotl write them, and people
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:q_proj|k_proj|v_proj).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|ffn|dense)\.(?:(?:q_proj|k_proj|up_proj)))",
    r"^(language_model|model(?!\.(visual|vision)))(?!.*(lm_head|output|emb|wte|shared)).*\.(q_proj|k_proj|v_proj)",
    r"model.layers.[\d]+.(mlp|cross_attn|self_attn).(up|down|gate|q|k|v|o)_proj",
    r".*\.(q|v)_proj",
    r"^(?!.*o_proj).*self_attn.*$",
    r"model\.layers\.(?:1[0-9]|2\d)\..*",
    r"(?i)MODEL\..*_PROJ",
]
ENDLESS = [  # more ways than there is time for
    r"(a+)+!",
    r"(.*)*!",
    r"(.?){30}.{30}!",
    r"(\w+\.?)+!",
    r"(.*.*)*!",
    r"(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)!",
    r"((((((.*)*)*)*)*)*)*!",
    r"(m|mo|mod|mode|model|o|d|e|l|\.|.)*!",
    r"(?=(.*)*!).*",
    r"(?!(.*.*.*.*.*)*!).*",
    "(.|.|.)" * 40 + "!",
    ".?" * 200 + "." * 30 + "!",
]


def drawn(rng: random.Random, depth: int) -> str:
    if depth == 0 or rng.random() < 0.3:
        return rng.choice(
            ["a", "b", r"\.", ".", "[ab]", "[^a]", r"\d", r"\w", r"\W", "[a-c1]", "^", "$", r"\b"]
        )
    part, other = drawn(rng, depth - 1), drawn(rng, depth - 1)
    times = rng.choice(["*", "+", "?", "*?", "+?", "??", "{2}", "{1,2}", "{0,3}?", "{2,}"])
    look = rng.choice(["?=", "?!"])
    behind = f"({rng.choice(['?<=', '?<!'])}{rng.choice(['a', '[ab].'])})"
    return rng.choice(
        [part + other, f"(?:{part}|{other})", f"({part})", f"(?:{part}){times}", f"({look}{part}){other}"]
        + [f"(?i:{part})", f"{behind}{part}"]
    )


def test_all_ways_at_once_are_those_of_re(monkeypatch):
    rng = random.Random(7)
    for ways in (0, expressions.MOST_WAYS):
        monkeypatch.setattr(expressions, "MOST_WAYS", ways)
        for _ in range(250):
            text = drawn(rng, 4)
            found, theirs = Expression(text), re.compile(text)
            for name in ("".join(rng.choices("abcA1._B", k=rng.randrange(1, 8))) for _ in range(6)):
                assert found.matches(name) == bool(theirs.fullmatch(name)), (text, name)


@pytest.mark.parametrize("text", PUBLISHED)
def test_published_expressions_match_as_in_re_and_quickly(text):
    started = time.process_time()
    expression = Expression(text)
    found = [name for name in NAMES if expression.matches(name)]
    assert time.process_time() - started < 1.5
    assert found == [name for name in NAMES if re.fullmatch(text, name)] and found


@pytest.mark.parametrize("text", ENDLESS)
def test_an_expression_without_end_is_matched_or_refused_in_time(text):
    started = time.process_time()
    config = LoraConfig(2, 4, targets=text)
    try:
        assert any(config.targeted(name) for name in NAMES[:100]) == text.startswith("(?!")
    except InputError as error:
        assert str(error).startswith("target_modules: expected a regular expression that matches quickly")
    assert time.process_time() - started < 3


@pytest.mark.parametrize(
    "key", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_pattern"]
)
@pytest.mark.parametrize("text", [r"(.+)+!", "(?=.*(?=.*(?=.*(?=.*(?=.*(?=.*!))))))"])
def test_a_folder_with_such_an_expression_is_read_or_refused_by_its_key(tmp_path, monkeypatch, key, text):
    monkeypatch.setattr(expressions, "MOST_STEPS", 20_000)
    model = Transformer(ModelConfig(31, 16, 24, 2, 2))
    save_model(model, tmp_path / "base")
    add_lora(model, 2, base=str(tmp_path / "base"))
    save_model(model, tmp_path / "adapter")

    file = tmp_path / "adapter" / "adapter_config.json"
    value = {"rank_pattern": {text: 2}, "alpha_pattern": {text: 2}, "layers_pattern": [text]}.get(key, text)
    changes = {key: value} | ({"layers_to_transform": [0]} if key == "layers_pattern" else {})
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    started = time.process_time()
    try:
        load_model(tmp_path / "adapter")
    except InputError as error:
        assert str(tmp_path / "adapter") in str(error) and str(error).isprintable()
        assert key in str(error) or "target_modules" in str(error) or "unexpected" in str(error)
    assert time.process_time() - started < 3


@pytest.mark.parametrize(
    "text",
    ["q_proj(", "a)(b", "(?P<a", "[", "*", r"(a)\1", "(?>a)b", "a++", "(" * 5000, "a" * 20_000, "{" * 9],
)
@pytest.mark.parametrize("key", ["targets", "exclude", "rank_pattern", "alpha_pattern", "layers_pattern"])
def test_what_is_no_expression_is_refused_by_its_key(key, text):
    value = {"targets": text, "exclude": text, "layers_pattern": (text,)}.get(key, {text: 2})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            LoraConfig(2, 4, **{key: value}).check((), "a")
        except InputError as error:
            assert re.match(r"a: ((target|exclude)_modules|(rank|alpha|layers)_pattern): ", str(error))
            assert str(error).isprintable() and len(str(error)) <= 600
        else:
            assert text == "{" * 9  # which is text to `re`


def test_a_warning_of_re_is_not_printed():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Expression("[[]a.*").matches("[a.b")


def test_a_copy_matches_as_the_original_does():
    config = LoraConfig(2, 4, targets=PUBLISHED[1], rank_pattern={r"(?!x).*q_proj": 3})
    before = [config.targeted(name) for name in NAMES[:14]]
    again = copy.deepcopy(config)
    assert [again.targeted(name) for name in NAMES[:14]] == before and again == config
    assert again.rank_of(NAMES[0]) == 3 and again.rank_of(NAMES[1]) == 2


def test_names_and_layers_of_a_list():
    every = LoraConfig(2, 4)
    assert all(every.targeted(name) for name in NAMES) and set(LINEARS) == {m.split(".")[1] for m in MODULES}
    some = LoraConfig(2, 4, targets=("self_attn.q_proj", "proj"), layers=(3, 10**9, -1))
    assert [name for name in NAMES if some.targeted(name)] == ["model.layers.3.self_attn.q_proj"]
    assert LoraConfig(2, 4, modules_to_save=("attn.q_proj",)).whole(NAMES[0])
    assert not LoraConfig(2, 4, modules_to_save=("q_pro",)).whole(NAMES[0])
