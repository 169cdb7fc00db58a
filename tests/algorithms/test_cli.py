"""The command line as a user meets it: help, wrong usage, and one clear message for each kind of wrong input."""

import subprocess
import sys

import pytest
from burnish.algorithms.__main__ import COMMANDS, main


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert (f"burnish {command}" in text and ("--output" in text or command == "bench")) or "--prompt" in text


def test_usage(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {command} " in text for command in COMMANDS)
    assert main([]) == 2
    assert main(["no-such-command"]) == 2
    assert "no command 'no-such-command'" in capsys.readouterr().err


def test_the_command_starts_without_the_modules_it_does_not_need():
    code = "import sys, burnish.algorithms.__main__ as m; m.main(['--help']); print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip().endswith("False")
