"""Standard streams that close, fill up, or were never open: no traceback, and what is trained is not lost."""

import os
import subprocess
import sys

import pytest
from burnish.algorithms.show.text import harmless

PROGRAM = """
import sys
from burnish.algorithms.run.streams import is_lost, run_program

def main():
    for i in range(3000):
        print("some text of a run, \\u2192 with a character that ASCII lacks \\ud800", i, flush=i % 7 == 0)
        sys.stderr.write("progress;")
    sys.stdin.read()
    open(sys.argv[1], "w").write(f"done {is_lost(sys.stdout)}")
    return int(sys.argv[2])

sys.exit(run_program("program", main))
"""
SENTENCE = "program: standard output cannot be written: No space left on device\n"
STREAMS = {  # what the shell does: (status, what stdout still shows, what stderr says beside progress)
    "": (0, "\\u2192", ""),
    ">/dev/full": (1, None, SENTENCE),
    "2>/dev/full": (0, "\\u2192", None),
    ">/dev/full 2>/dev/full": (1, None, None),
    ">&-": (0, None, ""),
    "2>&-": (0, "\\u2192", None),
    "<&- >&- 2>&-": (0, None, None),
    "| head -n 1": (1, "\\u2192", ""),
    "2>&1 | head -n 1": (1, "\\u2192", None),
}


def shell(script: str, *arguments: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    words = ["bash", "-c", f"set -o pipefail; {script}", "bash", *map(str, arguments)]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    return subprocess.run(words, input=stdin, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("streams", STREAMS)
def test_a_program_ends_as_it_would(tmp_path, streams):
    status, output, says = STREAMS[streams]
    (tmp_path / "program.py").write_text(PROGRAM)
    done = shell(f'"$1" "$2" "$3" 0 {streams}', sys.executable, tmp_path / "program.py", tmp_path / "done")
    lost = streams.startswith((">/dev/full", "| head", "2>&1"))
    assert (tmp_path / "done").read_text() == f"done {lost}", "the run has gone on to its end"
    assert done.returncode == status
    if output is not None:
        assert output in done.stdout
    if says is not None:
        assert done.stderr.replace("progress;", "") == says
    assert "Traceback" not in done.stderr + done.stdout and "Exception" not in done.stderr


def test_a_model_does_not_write_to_a_terminal_what_moves_it():
    assert (
        harmless("a\x1b[2J\r\x9b\x07 b\n\tcaf\u00e9 \U0001f600")
        == r"a\x1b[2J\r\x9b\x07 b" + "\n\tcaf\u00e9 \U0001f600"
    )


def test_a_status_of_its_own_stays(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    line = '"$1" "$2" "$3" 3 >/dev/full'
    assert shell(line, sys.executable, tmp_path / "program.py", tmp_path / "done").returncode == 3


def test_help_that_nobody_reads():
    for streams, status in (("| true", 1), (">/dev/full", 1), (">&-", 0), ("2>&-", 0)):
        done = shell(f'"$1" -m burnish.algorithms --help {streams}', sys.executable)
        assert "Traceback" not in done.stderr and "Exception" not in done.stderr and done.returncode == status


@pytest.mark.slow
def test_a_run_is_not_lost_with_its_terminal(model_folder, demonstrations, tmp_path):
    terminal, end = os.openpty()
    os.close(terminal)  # as when a connection breaks: reading gives nothing, writing an error

    command = [sys.executable, "-m", "burnish.algorithms", "sft", "--model", model_folder]
    command += ["--data", demonstrations, "--output", tmp_path / "out"]
    command += ["--steps", "2", "--batch-size", "4", "--device", "cpu"]
    done = subprocess.run([*map(str, command)], stdin=end, stdout=end, stderr=end)
    os.close(end)

    assert done.returncode == 1, "its output is lost"
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file()
