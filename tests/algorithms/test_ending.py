"""The text at the end of a run: what came out, and commands for what comes next."""

import dataclasses
import json
import shlex
from pathlib import Path

import pytest
import torch
from burnish.algorithms import grpo, reward, sft
from burnish.algorithms.__main__ import main
from burnish.algorithms.show import display

ACCURACY = "burnish.algorithms.recipes.sums:accuracy"


@pytest.fixture
def cfg(model_folder, demonstrations, tmp_path):
    torch.set_num_threads(1)
    flags = {"steps": 6, "batch_size": 4, "learning_rate": 1e-2, "save_every": 3, "device": "cpu"}
    return sft.Config(model=model_folder, data=demonstrations, output=tmp_path / "run", **flags)


def test_the_text_at_the_end_names_the_model_the_figures_and_the_next_steps(cfg, capsys):
    sft.train(cfg)
    lines = capsys.readouterr().out.splitlines()
    assert f"written: {cfg.output / 'model'}" in lines and f"report: {cfg.output / 'report.html'}" in lines
    figures = next(line for line in lines if " -> " in line)
    logged = [json.loads(line) for line in (cfg.output / "metrics.jsonl").read_text().splitlines()]
    assert figures.startswith(f"loss {logged[0]['loss']:.4g} -> {logged[-1]['loss']:.4g}, grad_norm")


def test_samples_at_the_end_are_short_and_harmless(cfg, capsys):
    cfg.output.mkdir()
    (cfg.output / "model").mkdir()
    (cfg.output / "config.json").write_text("{}")
    (cfg.output / "metrics.jsonl").write_text('{"step": 0, "reward": 1.0}\n')
    sample = {"step": 4, "prompt": "a\nb\x1b[2J", "completion": "long " * 400, "reward": 0.5}
    (cfg.output / "samples.jsonl").write_text((json.dumps(sample) + "\n") * 5)
    display.Display(cfg, cfg.output, 0).close(None)
    printed = capsys.readouterr().out
    assert printed.count(r"sample of step 4, reward 0.5: a b\x1b[2J") == 3
    assert max(map(len, printed.splitlines())) < 320 and "\x1b" not in printed


def next_commands(printed: str) -> list[list[str]]:
    """The commands after "next:", as words."""
    return [shlex.split(line)[1:] for line in printed.splitlines() if line.startswith("    burnish ")]


@pytest.mark.slow
def test_the_commands_at_the_end_work_when_they_are_pasted(
    cfg, prompts, pairs, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    start = sft.train(dataclasses.replace(cfg, output=tmp_path / "a folder", lora_rank=2))
    ran = next_commands(capsys.readouterr().out)
    flags = {"steps": 1, "learning_rate": 1e-3, "device": "cpu"}
    reward.train(reward.Config(model=cfg.model, data=pairs, output=tmp_path / "reward", **flags))
    ran += next_commands(capsys.readouterr().out)
    few = {"prompts_per_step": 2, "group_size": 2, "max_new_tokens": 3, "reward": (ACCURACY,)}
    grpo.train(grpo.Config(model=start, data=prompts, output=tmp_path / "grpo", **flags, **few))
    ran += next_commands(capsys.readouterr().out)

    names = [command[0] for command in ran]
    assert names == ["chat", "evaluate", "merge", "evaluate", "ppo", "chat", "evaluate", "merge"]
    for command in ran:
        short = ["--max-new-tokens", "2"]
        more = {"ppo": ["--steps", "1", *short], "chat": ["--prompt", "1+2=", *short]}.get(command[0], [])
        more = [*more, *(["--samples", "1", *short] if "--reward" in command else [])]
        more += [] if "merge" in command else ["--device", "cpu"]
        if command[0] in ("evaluate", "ppo"):
            more += ["--output", f"out-{len([*tmp_path.iterdir()])}"]
        assert main([*command, *more]) == 0, command


def test_the_commands_at_the_end_read_the_rows_as_the_run_did(cfg, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rows.jinja").write_text('{"prompt": {{ q | tojson }}, "completion": "4"}')
    for name in ("a", "b"):
        Path(f"{name}.jsonl").write_text('{"q": "2+2="}\n' * 4)
    data = (Path("a.jsonl"), Path("b.jsonl"))
    changes = {"row_template": Path("rows.jinja"), "train_on": "all", "max_length": 5, "output": Path("run")}
    sft.train(dataclasses.replace(cfg, data=data, **changes))
    _, command = next_commands(capsys.readouterr().out)
    assert main([*command, "--output", "out", "--device", "cpu"]) == 0
    assert json.loads(Path("out/result.json").read_text())["figures"]["tokens"] == 8 * 4


def test_a_stage_of_a_recipe_ends_in_one_line(cfg, capsys):
    from burnish.algorithms.show.ending import brief_endings

    with brief_endings():
        sft.train(cfg)
    printed = capsys.readouterr().out
    assert f"written: {cfg.output / 'model'}\n" in printed and "next:" not in printed
