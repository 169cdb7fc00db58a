"""Wrong input through the command line: one clear message, exit status 1, and no output left behind."""

import json
import signal
import subprocess
import sys
import time

import pytest
from burnish.algorithms.__main__ import main


def truncate_weights(model, data):
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def remove_weights(model, data):
    (model / "model.safetensors").unlink()


def unknown_architecture(model, data):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "perceptron"}))


def another_width(model, data):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"intermediate_size": 99}))


def malformed_line(model, data):
    lines = data.read_text().splitlines()
    lines[2] = '{"prompt": "1+'
    data.write_text("\n".join(lines))


def empty_data(model, data):
    data.write_text("")


def nothing_to_train(model, data):
    data.write_text(json.dumps({"prompt": "1+2+3=" * 20, "completion": "<think>"}) + "\n")


def remove_data(model, data):
    data.unlink()


FAULTS = {
    truncate_weights: "model.safetensors",
    remove_weights: "model.safetensors",
    unknown_architecture: "perceptron",
    another_width: "99",
    malformed_line: "demonstrations.jsonl line 3",
    empty_data: "demonstrations.jsonl",
    nothing_to_train: "demonstrations.jsonl",
    remove_data: "demonstrations.jsonl",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_the_message_names_the_thing(model_folder, demonstrations, tmp_path, capsys, fault):
    fault(model_folder, demonstrations)
    output = tmp_path / "out"
    arguments = ["--model", model_folder, "--data", demonstrations, "--output", output]
    assert main(["sft", *map(str, arguments), "--max-length", "20", "--steps", "1"]) == 1
    message = capsys.readouterr().err.strip()
    assert message.startswith("burnish sft: ") and FAULTS[fault] in message
    assert len(message.splitlines()) == 1 and "Traceback" not in message
    assert not output.exists()


def test_a_missing_model_is_named(demonstrations, tmp_path, capsys):
    arguments = [
        "--model",
        str(tmp_path / "nowhere"),
        "--data",
        str(demonstrations),
        "--output",
        str(tmp_path / "out"),
    ]
    assert main(["sft", *arguments]) == 1
    assert str(tmp_path / "nowhere") in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise KeyError('answer')", "reward f raised KeyError: 'answer'"),
        ("return []", "reward f: expected 128 rewards"),
    ],
)
def test_a_failing_reward_function(model_folder, prompts, tmp_path, capsys, body, message):
    (tmp_path / "reward.py").write_text(f"def f(completions, **_):\n    {body}\n")
    arguments = ["--model", model_folder, "--data", prompts, "--reward", f"{tmp_path}/reward.py:f"]
    arguments += ["--output", tmp_path / "out", "--max-new-tokens", "4"]
    assert main(["grpo", *map(str, arguments)]) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "out" / "model").exists()


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *[("--batch-size", "-1"), ("--steps", "0"), ("--max-length", "-3"), ("--micro-batch-tokens", "0")],
        *[
            ("--learning-rate", "-1e-3"),
            ("--learning-rate", "nan"),
            ("--max-grad-norm", "-1"),
            ("--seed", "-1"),
        ],
        *[("--warmup-steps", "-5"), ("--save-every", "-1"), ("--weight-decay", "-1"), ("--device", "mps")],
        *[
            ("--batch-size", "9" * 30),
            ("--steps", "9" * 20),
            ("--learning-rate", "inf"),
            ("--max-grad-norm", "1e300"),
            ("--device", ""),
            ("--device", "cuda:x"),
            ("--device", "x" * 5000),
            ("--device", "cpu:1"),
            ("--seed", "9" * 30),
        ],
    ],
)
def test_an_impossible_flag_of_sft(model_folder, demonstrations, tmp_path, capsys, flag, value):
    arguments = ["--model", model_folder, "--data", demonstrations, "--output", tmp_path / "out"]
    assert main(["sft", *map(str, arguments), flag, value]) == 1
    assert f"burnish sft: {flag}: expected" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *[
            ("--prompts-per-step", "0"),
            ("--group-size", "1"),
            ("--temperature", "0"),
            ("--temperature", "nan"),
        ],
        *[
            ("--top-p", "0"),
            ("--top-p", "1.5"),
            ("--top-k", "0"),
            ("--max-new-tokens", "0"),
            ("--clip-low", "5"),
        ],
        *[("--clip-high", "nan"), ("--kl-coefficient", "-1"), ("--updates-per-rollout", "0")],
        *[("--sampling-batch-size", "0"), ("--reward-weights", "nan"), ("--reward-timeout", "0")],
        *[("--group-size", "2147483648"), ("--max-new-tokens", "9" * 30)],
    ],
)
def test_an_impossible_flag_of_grpo(model_folder, prompts, tmp_path, capsys, flag, value):
    arguments = [
        "--model",
        model_folder,
        "--data",
        prompts,
        "--reward",
        "burnish.algorithms.recipes.sums:form",
    ]
    assert main(["grpo", *map(str, arguments), "--output", str(tmp_path / "out"), flag, value]) == 1
    assert f"burnish grpo: {flag}: expected" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", ["x" * 5000, "\x1b[31mred\n", "x/" * 3000, ""], ids=ascii)
@pytest.mark.parametrize("flag", ["--model", "--data", "--output", "--chat-template", "--row-template"])
def test_a_name_that_no_file_can_have(
    model_folder, demonstrations, tmp_path, capsys, monkeypatch, flag, value
):
    monkeypatch.chdir(tmp_path)  # "" is this folder
    flags = {"--model": model_folder, "--data": demonstrations, "--output": tmp_path / "out", flag: value}
    status = main(["sft", *(str(word) for pair in flags.items() for word in pair), "--steps", "1"])
    message = capsys.readouterr().err.strip().removeprefix("burnish sft: ")
    if (flag, status) != ("--output", 0):  # a name with control characters is one
        assert status == 1 and message.isprintable() and len(message) <= 600


def test_a_folder_may_have_any_name(model_folder, demonstrations, tmp_path):
    output = tmp_path / "caf\udce9"  # Latin-1, as some archives unpack
    arguments = ["--model", model_folder, "--data", demonstrations, "--output", output, "--steps", "1"]
    assert main(["sft", *map(str, arguments)]) == 0 and (output / "model" / "config.json").is_file()


def test_an_output_that_cannot_be_written(model_folder, demonstrations, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    arguments = ["--model", model_folder, "--data", demonstrations, "--output", tmp_path / "file" / "out"]
    assert main(["sft", *map(str, arguments)]) == 1
    assert "cannot be written" in capsys.readouterr().err


def test_a_tokenizer_with_more_ids_than_the_model(model_folder, demonstrations, tmp_path, capsys):
    tokenizer = json.loads((model_folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["z"] = 17
    (model_folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with open(demonstrations, "a") as file:
        file.write(json.dumps({"prompt": "1+2=", "completion": "3z"}) + "\n")
    arguments = ["--model", model_folder, "--data", demonstrations, "--output", tmp_path / "out"]
    assert main(["sft", *map(str, arguments)]) == 1
    expected = (
        "demonstrations.jsonl line 65: token 'z': the model has no row for its id 17, expected ids below 17"
    )
    assert expected in capsys.readouterr().err


@pytest.mark.slow
def test_one_file_as_a_command_says_the_same(tmp_path):
    command = [
        sys.executable,
        "-m",
        "burnish.algorithms.sft",
        "--model",
        str(tmp_path / "nowhere"),
        "--data",
        "x",
    ]
    run = subprocess.run([*command, "--output", str(tmp_path / "out")], capture_output=True, text=True)
    assert run.returncode == 1 and "nowhere" in run.stderr and "Traceback" not in run.stderr


@pytest.mark.slow
def test_an_interrupt_leaves_whole_files(model_folder, demonstrations, tmp_path):
    output = tmp_path / "out"
    command = [sys.executable, "-m", "burnish.algorithms", "sft", "--model", str(model_folder)]
    command += ["--data", str(demonstrations), "--output", str(output)]
    command += ["--steps", "1000000", "--save-every", "2"]

    listen = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it
    streams = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "text": True}
    process = subprocess.Popen(command, preexec_fn=listen, **streams)

    for _ in range(600):
        if (output / "step-4").exists():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)

    assert process.returncode == 130
    assert "burnish sft: interrupted" in errors and "Traceback" not in errors
    assert [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    for path in output.iterdir():
        if path.is_dir():
            assert path.name.startswith("step-") and (path / "model.safetensors").is_file()
            assert (path / "config.json").is_file()
