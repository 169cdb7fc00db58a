"""The commands that a run tells to run next: for which model, and with which flags."""

import dataclasses

from burnish.algorithms import evaluate
from burnish.algorithms.show.advice import DEFAULTS, next_commands


def test_the_commands_at_the_end_are_for_the_best_model(tmp_path):
    for name in ("model", "best"):
        (tmp_path / name).mkdir()
        assert next_commands(tmp_path, "dpo", {"data": "d"}) == [] or name == "best"
        (tmp_path / name / "config.json").write_text("{}")
    assert next_commands(tmp_path, "dpo", {"data": "d"}) == [f"burnish chat --model {tmp_path / 'model'}"]
    flags = {"data": "d", "keep_best": "loss", "chat_template_kwargs": '{"a": 1}'}
    chat = f"burnish chat --model {tmp_path / 'best'} --chat-template-kwargs '{{\"a\": 1}}'"
    assert next_commands(tmp_path, "dpo", flags) == [chat]
    assert next_commands(tmp_path, "", flags) == []  # an unknown model: it may be a reward model


def test_the_commands_leave_out_what_evaluate_does_by_itself():
    fields = {field.name: field.default for field in dataclasses.fields(evaluate.Config)}
    assert {name: fields[name] for name in DEFAULTS} == DEFAULTS
