"""A real trained Llama on real text, as a user would run it. The model and the data are not part of this repository."""

import gzip
import json
import shutil

import pytest
from burnish.algorithms.__main__ import main


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def stories(shared_data):
    return shared_data / "stories260k" / "hf"


def head(source, target, rows):
    with open(source, encoding="utf-8") as file:
        target.write_text("".join(line for _, line in zip(range(rows), file, strict=False)), encoding="utf-8")
    return target


def test_sft_on_gsm8k(stories, shared_data, tmp_path, capsys):
    data = head(shared_data / "gsm8k" / "train.jsonl", tmp_path / "gsm8k.jsonl", 64)
    arguments = ["--model", stories, "--data", data, "--output", tmp_path / "out", "--steps", "12"]
    arguments += [
        "--batch-size",
        "16",
        "--learning-rate",
        "1e-3",
        "--warmup-steps",
        "2",
        "--max-length",
        "256",
    ]

    assert main(["sft", *map(str, arguments)]) == 0
    losses = [line["loss"] for line in metrics_of(tmp_path / "out")]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    assert "64 rows" in capsys.readouterr().out


def test_sft_on_conversations(stories, shared_data, tmp_path, capsys):
    rows = json.loads((shared_data / "sft" / "fastchat_dummy_conversation_sharegpt.json").read_text())[:32]
    (tmp_path / "chat.json").write_text(json.dumps(rows))

    arguments = ["--model", stories, "--data", tmp_path / "chat.json"]
    arguments += ["--output", tmp_path / "out", "--steps", "2"]
    assert main(["sft", *map(str, arguments)]) == 1  # a base model has no chat template, and says so
    assert "chat template" in capsys.readouterr().err

    with_template = shutil.copytree(stories, tmp_path / "with-template")
    shutil.copy(
        shared_data / "chat_templates" / "qwen3_training.jinja", with_template / "chat_template.jinja"
    )
    arguments[1] = with_template
    assert main(["sft", *map(str, arguments), "--max-length", "512", "--batch-size", "8"]) == 0
    assert "32 rows" in capsys.readouterr().out


def test_grpo_with_a_reward_of_the_users(stories, shared_data, tmp_path):
    data = head(shared_data / "gsm8k" / "train.jsonl", tmp_path / "gsm8k.jsonl", 16)
    (tmp_path / "reward.py").write_text(
        "def few_letters_e(prompts, completions, completion_ids, answer, **columns):\n"
        "    assert len(prompts) == len(completions) == len(completion_ids) == len(answer)\n"
        "    return [-text.count('e') / max(1, len(text)) for text in completions]\n"
    )

    arguments = ["--model", stories, "--data", data, "--reward", f"{tmp_path}/reward.py:few_letters_e"]
    arguments += [
        "--output",
        tmp_path / "out",
        "--steps",
        "12",
        "--prompts-per-step",
        "4",
        "--group-size",
        "8",
    ]
    arguments += ["--max-new-tokens", "24", "--learning-rate", "1e-3", "--max-prompt-length", "512"]

    assert main(["grpo", *map(str, arguments)]) == 0
    metrics = metrics_of(tmp_path / "out")
    assert sum(line["reward"] for line in metrics[-3:]) > sum(line["reward"] for line in metrics[:3])
    assert max(line["mismatch"] for line in metrics if "mismatch" in line) < 1e-4


def right_and_wrong(shared_data, target, rows):
    """Pairs of a right and a wrong graded solution, the `rows` shortest."""
    pairs = []
    with open(shared_data / "gsm8k" / "example_model_solutions.jsonl", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            graded = [value for value in row.values() if isinstance(value, dict)]
            right = [one["solution"] for one in graded if one["is_correct"]]
            wrong = [one["solution"] for one in graded if not one["is_correct"]]
            if right and wrong:
                pairs.append({"question": row["question"], "chosen": right[0], "rejected": wrong[0]})
    pairs.sort(key=lambda pair: sum(map(len, pair.values())))
    target.write_text("".join(json.dumps(pair) + "\n" for pair in pairs[:rows]))
    return target


@pytest.mark.slow
@pytest.mark.parametrize("command, rate", [("reward", 1e-3), ("dpo", 1e-3), ("kto", 1e-4)])
def test_preferences_of_right_over_wrong_solutions(stories, shared_data, tmp_path, command, rate):
    """Eight pairs are learned by heart: the margin grows, and with it the order on the same pairs."""
    data = right_and_wrong(shared_data, tmp_path / "pairs.jsonl", 8)
    arguments = ["--model", stories, "--data", data, "--output", tmp_path / "out", "--steps", "16"]
    arguments += ["--batch-size", "8", "--micro-batch-tokens", "800"]
    arguments += ["--learning-rate", rate, "--warmup-steps", "2"]

    assert main([command, *map(str, arguments)]) == 0
    metrics = metrics_of(tmp_path / "out")
    margins = [line["margin"] for line in metrics if line["margin"] is not None]
    assert sum(margins[-3:]) / 3 > sum(margins[:3]) / 3 + 0.5
    assert sum(line["loss"] for line in metrics[-3:]) < sum(line["loss"] for line in metrics[:3])


@pytest.mark.slow
def test_pairs_of_hh(stories, shared_data, tmp_path, capsys):
    with gzip.open(
        shared_data / "preference" / "hh_harmless_base_test.jsonl.gz", "rt", encoding="utf-8"
    ) as file:
        (tmp_path / "hh.jsonl").write_text("".join(line for _, line in zip(range(40), file, strict=False)))

    arguments = ["--model", stories, "--data", tmp_path / "hh.jsonl"]
    arguments += ["--output", tmp_path / "out", "--steps", "3"]
    arguments += ["--batch-size", "8", "--micro-batch-tokens", "800", "--max-length", "400"]

    assert main(["reward", *map(str, arguments)]) == 1  # a base model has no chat template, and says so
    assert "--chat-template FILE.jinja, or plain" in capsys.readouterr().err
    assert main(["reward", *map(str, arguments), "--chat-template", "plain"]) == 0
    assert "40 rows" in (shown := capsys.readouterr().out) and "dropped: longer than max_length" in shown
    assert all(0 <= line["accuracy"] <= 1 and line["loss"] < 3 for line in metrics_of(tmp_path / "out"))
