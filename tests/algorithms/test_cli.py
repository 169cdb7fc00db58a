"""The command line as a user meets it: help, wrong usage, and one clear message for each kind of wrong input."""

import re
import subprocess
import sys
from pathlib import Path

import burnish.algorithms
import pytest
from burnish.algorithms.__main__ import COMMANDS, main
from burnish.algorithms.show.versions import versions


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert (f"burnish {command}" in text and ("--output" in text or command == "bench")) or "--prompt" in text


@pytest.mark.parametrize("command, runs_own", [("sft", True), ("teach", True), ("chat", False)])
def test_the_help_is_the_same_each_time_and_offers_what_can_be_read(command, runs_own, capsys):
    def text() -> str:
        with pytest.raises(SystemExit):
            main([command, "--help"])
        return " ".join(capsys.readouterr().out.replace("│", "").split())

    found = text()
    assert found == text() and ("such as a run's config.json" in found) is runs_own
    assert (f"runs/{command}-DATE-TIME-RANDOM" in found) is runs_own


def test_usage(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {command} " in text for command in COMMANDS)
    assert main([]) == 2
    assert main(["no-such-command"]) == 2
    assert "no command 'no-such-command'" in capsys.readouterr().err


def test_the_version_is_that_of_the_package(capsys):
    assert main(["--version"]) == 0
    line = capsys.readouterr().out.strip()
    assert re.fullmatch(r"burnish 0\.1\.0, torch \d\S+, triton \S+, Python 3\.\d+\.\d+\S*", line)
    setup = Path(__file__).parents[2] / "setup.py"
    words = [sys.executable, str(setup), "--version"]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=setup.parent)
    assert done.stdout.split()[-1] == burnish.algorithms.__version__ == versions()["burnish"] == "0.1.0"


def test_the_command_starts_without_the_modules_it_does_not_need():
    start = "import sys, burnish.algorithms.__main__ as m; m.main(['--help']); m.main(['--version'])"
    code = f"{start}; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip().endswith("False")
