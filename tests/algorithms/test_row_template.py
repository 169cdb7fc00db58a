"""--row-template: rows of any columns become prompt and completion, or messages."""

import json

import pytest
from burnish.algorithms.__main__ import main
from burnish.algorithms.data.examples import rl_prompts, sft_examples
from burnish.algorithms.data.pairs import preferences
from burnish.algorithms.data.rows import read_rows
from burnish.model.errors import InputError

ROWS = [
    {"premise": "a ||| b", "hypothesis": "c", "label": 0, "idx": 7},
    {"premise": "d", "hypothesis": "e", "label": 1, "idx": 8},
]
NLI = '{{ premise }} so {{ hypothesis }}?\n|||\n{{ ["yes", "no"][label] }}\n'


@pytest.fixture
def shaped(tmp_path):
    """The rows of a file that a template makes."""

    def shaped(template, rows=ROWS):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / "shape.jinja").write_text(template)
        return read_rows(tmp_path / "rows.jsonl", tmp_path / "shape.jinja")

    return shaped


def test_prompt_and_completion(shaped, chat):
    rows = shaped(NLI)
    assert [(row["prompt"], row["completion"]) for row in rows] == [
        ("a ||| b so c?", "yes"),
        ("d so e?", "no"),
    ]
    assert rows[1].where.endswith("rows.jsonl line 2")
    examples, counts = sft_examples(rows, chat, max_length=100)
    assert counts == {"rows": 2, "examples": 2} and counts.unused == ["idx"]
    assert chat.decode(examples[1].tokens, False) == "d so e?no<|im_end|>"


def test_messages_and_whole_rows(shaped, chat):
    turn = lambda role, column: f'{{"role": "{role}", "content": {{{{ {column} | tojson }}}}}}'
    talk = f"[{turn('user', 'premise')}, {turn('assistant', 'hypothesis')}]"
    rows = shaped(talk, [ROWS[0] | {"premise": 'say "x"\n'}])
    assert rows[0]["messages"][0] == {"role": "user", "content": 'say "x"\n'}
    (example,), counts = sft_examples(rows, chat, max_length=100)
    assert chat.decode(example.tokens, False).startswith('<|im_start|>user\nsay "x"\n<|im_end|>')
    assert counts.unused == ["label", "idx"]
    rows = shaped('{"prompt": "p", "chosen": {{ premise | tojson }}, "rejected": {{ hypothesis | tojson }}}')
    pairs, counts = preferences(rows, chat, max_length=100)
    assert len(pairs) == 2 and counts.unused == ["label", "idx"]


def test_columns_that_shape_a_row_give_way_and_the_others_stay(shaped, chat):
    row = {
        "messages": [{"role": "user", "content": "old"}],
        "question": "q",
        "chosen": "a",
        "rejected": "b",
        "margin": 2,
    }
    (made,) = shaped("Q: {{ question }}", [row])
    assert made == {"prompt": "Q: q", "chosen": "a", "rejected": "b", "margin": 2}
    ((pair,), counts) = preferences([made], chat, max_length=100)
    assert chat.decode(pair.prompt) == "Q: q" and pair.margin == 2 and counts.unused == ["messages"]


def test_reward_functions_see_the_rows_own_columns(shaped, chat):
    rows = shaped("{{ premise }}?")
    (first, _), counts = rl_prompts(rows, chat, max_length=100, takes=lambda name: name == "label")
    assert first.text == "a ||| b?" and first.columns == ROWS[0] and counts.unused == ["hypothesis", "idx"]
    (_, text), _ = rl_prompts(rows, chat, max_length=100)
    assert text.columns["label"] == 1


def test_templates_of_promptsource(shaped):
    """Its variables, filters and functions are jinja's, and zip and enumerate."""
    template = (
        "{% set answer_choices = ['yes', 'no'] %}"
        "{% for i, choice in enumerate(answer_choices) %}{{ i }} {{ choice }} {% endfor %}"
        "{% if label == 0 %}{{ premise | replace('|', '/') }}{% else %}{{ hypothesis | upper }}{% endif %}"
        "|||{{ answer_choices[label] }}"
    )
    assert [row["prompt"] for row in shaped(template)] == ["0 yes 1 no a /// b", "0 yes 1 no E"]


@pytest.mark.parametrize(
    "template, message",
    [
        ("{{ premis }} ||| x", "line 1: --row-template .*shape.jinja fails: 'premis' is undefined"),
        (
            "{{ raise_exception(messages) }}",
            "line 1: --row-template .*shape.jinja fails: 'messages' is undefined",
        ),
        ("{{ extra }} ||| x", "line 1: --row-template .*fails: 'extra' is null"),
        ("{{ premise.__class__.__mro__ }}", "line 1: .*unsafe"),
        ("{{ premise }}|||a|||b", r"line 1: .*expected one \|\|\|, got 2"),
        ("{{ 'q' ~ extra }}", "line 1: .*fails: 'extra' is null"),
        ("{{ extra | upper }}", "line 1: .*fails: 'extra' is null"),
        ("{{ [premise, extra] | join }}", "line 1: .*fails: 'extra' is null"),
        (
            '[{"role": "user", "content": "{{ premise }}"x}]',
            r"line 1: .*expected valid JSON \(write texts with `tojson`\), got",
        ),
        ("{% if %}", "shape.jinja: cannot be parsed: line 1"),
        ("{{ 1 // label }}", "line 1: .*fails: .*by zero"),
    ],
)
def test_a_template_that_fails_names_the_row(shaped, template, message):
    with pytest.raises(InputError, match=message):
        shaped(template, [ROWS[0] | {"extra": None}, ROWS[1] | {"extra": "x"}])


def test_what_is_null_may_be_tested(shaped):
    rows = [{"a": 1, "b": None}, {"a": 2, "b": "x"}]
    for test in ("b", "b is not none", "b is defined"):
        template = f"{{% if {test} %}}{{{{ b }}}}{{% else %}}{{{{ a }}}}{{% endif %}}|||y"
        assert [row["prompt"] for row in shaped(template, rows)] == ["1", "x"]


def test_a_row_for_which_nothing_is_written_is_dropped_and_counted(shaped, chat):
    rows = shaped("{% if label %}{{ premise }}|||{{ hypothesis }}{% endif %}")
    examples, counts = sft_examples(rows, chat, max_length=100)
    assert (
        len(examples) == 1 and counts["dropped: the row template wrote nothing"] == 1 and counts["rows"] == 2
    )
    assert sft_examples(rows[::-1], chat, max_length=100)[1] == counts
    prompts, counts = rl_prompts(rows, chat, max_length=100)
    assert len(prompts) == 1 and counts["dropped: the row template wrote nothing"] == 1


def test_columns_are_told_apart_from_those_that_the_template_writes(shaped, chat):
    row = {"prompt": "p", "completion": "c", "a": "x", "b": "y"}
    assert sft_examples(shaped("{{ a }}|||{{ b }}", [row]), chat, max_length=9)[1].unused == [
        "prompt",
        "completion",
    ]
    written = '{"prompt": "p", "completion": "c", "sytem": "s"}'
    unused = sft_examples(shaped(written + "{# {{ a }} #}", [row]), chat, max_length=9)[1].unused
    assert unused == ["prompt", "completion", "a", "b", "sytem (of the row template)"]
    unused = rl_prompts(shaped("{{ a }}|||{{ b }}", [row]), chat, max_length=9)[1].unused
    assert unused == ["prompt", "completion", "completion (of the row template)"]
    assert sft_examples(shaped("{{ range }}|||x", [{"range": "q"}]), chat, max_length=9)[1].unused == []


def test_cells_and_expressions_may_hold_the_separator(shaped):
    rows = [{"a": "one ||| two"}]
    assert shaped("{{ a.split('|||')[1] }}|||x", rows)[0]["prompt"] == "two"
    with pytest.raises(InputError, match=r"line 1: .*U\+FDD2"):
        shaped("{{ a }}|||x", [{"a": "\ufdd2"}])


def test_lines_stay_as_jinja_leaves_them(shaped):
    assert (
        shaped("Q: {{ a }}\n{% if a %}\nhint\n{% endif %}\nA:", [{"a": "x"}])[0]["prompt"]
        == "Q: x\n\nhint\n\nA:"
    )


def test_nulls_of_parquet_do_not_reach_the_template(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([{"m": {"a": 1}}, {"m": {"b": 2}}]), tmp_path / "a.parquet"
    )
    (tmp_path / "shape.jinja").write_text("{{ m | tojson }}|||x")
    rows = read_rows(tmp_path / "a.parquet", tmp_path / "shape.jinja")
    assert [row["prompt"] for row in rows] == ['{"a": 1}', '{"b": 2}']


def test_a_template_that_is_no_file(shaped, tmp_path):
    shaped(NLI)
    with pytest.raises(InputError, match=r"--row-template .*none\.jinja: no such file"):
        read_rows(tmp_path / "rows.jsonl", tmp_path / "none.jinja")


def test_the_flag_of_a_command(model_folder, tmp_path, capsys):
    rows = [{"a": i % 5, "b": i % 4, "note": "x"} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "shape.jinja").write_text("{{ a }}+{{ b }}=|||{{ (a + b) % 10 }}")
    arguments = ["--model", model_folder, "--data", tmp_path / "rows.jsonl", "--output", tmp_path / "out"]
    arguments += ["--row-template", tmp_path / "shape.jinja", "--steps", "1", "--device", "cpu"]
    assert main(["sft", *map(str, arguments)]) == 0
    printed = capsys.readouterr().out
    assert "rows.jsonl: 8 rows, 8 examples\n" in printed and "rows.jsonl: columns not used: note\n" in printed
    assert main(["dpo", *map(str, arguments[:-6]), "--output", str(tmp_path / "other")]) == 1
    assert "expected the columns chosen and rejected" in capsys.readouterr().err
