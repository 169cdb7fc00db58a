"""Runs that are killed before each of their file operations, and go on: what they then end with, counted.

    python tests/common/crash_runs.py FOLDER sft dpo grpo ppo distill       FOLDER: a new folder to work in

does so for every operation, of first runs and of finished runs that go on for another step.
"""

import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from burnish.algorithms import distill, dpo, grpo, ppo, sft
from burnish.algorithms.recipes.sums import (
    VOCABULARY,
    demonstration_row,
    make_tokenizer,
    prompt_row,
    split_problems,
)
from burnish.algorithms.run.checks import CHECKPOINT
from burnish.model.checkpoint import save_model
from burnish.model.config import ModelConfig
from burnish.model.text.tokenizer import Tokenizer
from burnish.model.transformer import Transformer
from crash import in_a_process
from safetensors import safe_open

MODULES = {"sft": sft, "dpo": dpo, "grpo": grpo, "ppo": ppo, "distill": distill}
TIMES = ("seconds", "sampling_seconds", "scoring_seconds", "update_seconds", "tokens_per_second")
STEPS = 2


class Task(NamedTuple):
    """A trainer, and its flags for a first run of two steps with a checkpoint after each."""

    train: Callable[[Any], Any]
    config: Any


def make_tasks(folder: Path) -> dict[str, Task]:
    """Write a small model, a teacher, rows and a reward function, and return a task for each trainer."""
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = ModelConfig(vocab_size=len(VOCABULARY), tie_word_embeddings=True, eos_token_id=0, **shape)
    tokenizer = Tokenizer(make_tokenizer(), eos="<eos>")
    for name, seed in (("model", 0), ("teacher", 7)):
        save_model(Transformer(config, seed=seed), folder / name, tokenizer)

    problems = split_problems(0)[0][:12]
    rows = [demonstration_row(problem) for problem in problems]
    pairs = [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": row["completion"][::-1] + "+"}
        for row in rows
    ]
    data = {"rows": rows, "pairs": pairs, "prompts": [prompt_row(problem) for problem in problems]}
    files = {name: folder / f"{name}.jsonl" for name in data}
    for name, file in files.items():
        file.write_text("".join(json.dumps(row) + "\n" for row in data[name]))

    odd = folder / "odd.py"
    odd.write_text(
        "def odd(completion_ids, log_extra, **_):\n"
        "    log_extra('length', [len(ids) for ids in completion_ids])\n"
        "    return [float(sum(i % 2 for i in ids)) for ids in completion_ids]\n"
    )
    common = {"model": folder / "model", "steps": STEPS, "save_every": 1, "keep": 1, "learning_rate": 1e-2}
    common |= {"device": "cpu", "output": folder / "unused", "log_every": 1}  # a report after each step

    sampled = {
        "data": files["prompts"],
        "reward": (f"{odd}:odd",),
        "prompts_per_step": 2,
        "max_new_tokens": 3,
    }

    configs = {
        "sft": sft.Config(data=files["rows"], batch_size=3, **common),
        "dpo": dpo.Config(data=files["pairs"], batch_size=3, **common),
        "grpo": grpo.Config(group_size=3, **sampled, **common),
        "ppo": ppo.Config(kl_target=0.01, kl_horizon=20, **sampled, **common),
        "distill": distill.Config(
            data=files["rows"],
            teacher=folder / "teacher",
            student_samples=0.5,
            max_new_tokens=3,
            batch_size=3,
            **common,
        ),
    }
    return {name: Task(MODULES[name].train, config) for name, config in configs.items()}


def content(folder: Path) -> dict[str, Any]:
    """Every entry of a run folder with what a resumed run must have in common with one that was not stopped."""
    found: dict[str, Any] = {}
    for entry in folder.rglob("*"):
        name = entry.relative_to(folder).as_posix()
        if entry.is_dir() or name in ("config.json", "report.html"):  # with the flag --resume, and times
            found[name] = None
        elif name.endswith(".jsonl"):
            lines = [json.loads(line) for line in entry.read_text().splitlines()]
            found[name] = [{key: line[key] for key in line if key not in TIMES} for line in lines]
        elif name == CHECKPOINT:
            with safe_open(entry, "pt") as opened:
                found[name] = {key: opened.get_tensor(key).numpy().tobytes() for key in opened.keys()}  # noqa: SIM118
                found[name]["values"] = opened.metadata()["values"]
        else:
            found[name] = entry.read_bytes()
    return found


def counts_of_kills(task: Task, folder: Path, again: bool, choose: Callable[[int], Iterable[int]]) -> Counter:
    """Count how runs end that are killed before an operation and then resumed.

    again: kill a run that goes on from a finished one for another step, rather than a first run. choose: from the
    number of operations, those to kill before.
    """
    start, whole, cut = (folder / name for name in ("start", "whole", "cut"))
    config = replace(task.config, steps=STEPS + again, resume=again)
    run = lambda output, at=None, **flags: in_a_process(
        lambda: task.train(replace(config, output=output, **flags)), output, at
    )
    if again:
        assert run(start, steps=STEPS, resume=False).status == 0
        shutil.copytree(start, whole)
    ended = run(whole)
    assert ended.status == 0, ended.output
    expected = content(whole)

    found: Counter = Counter(points=0)
    for k in choose(len(ended.operations)):
        shutil.rmtree(cut, ignore_errors=True)
        if again:
            shutil.copytree(start, cut)
        killed = run(cut, k)
        assert killed.status == -9, killed.output
        found["points"] += 1

        what = "no checkpoint yet"
        if again and not (cut / "model" / "model.safetensors").is_file():
            what = "model gone meanwhile"
        elif (cut / CHECKPOINT).exists():
            resumed = run(cut, resume=True)
            what = "lost" if resumed.status else "not equal"
            if not resumed.status and (end := content(cut)).keys() != expected.keys():
                what = f"left over: {sorted(end.keys() ^ expected.keys())}"
            elif not resumed.status and end == expected:
                what = "resumed equal"
        found[what] += 1
        if what not in ("resumed equal", "no checkpoint yet"):
            print(f"killed before {ended.operations[k]!r}: {what}", flush=True)
    return found


def main(folder: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    folder.mkdir(parents=True)
    tasks = make_tasks(folder)
    for name in names:
        for again in (False, True):
            place = folder / f"{name}-{'again' if again else 'first'}"
            place.mkdir()
            found = counts_of_kills(tasks[name], place, again, range)
            print(name, "again" if again else "first", dict(found), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
