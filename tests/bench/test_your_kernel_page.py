"""docs/your-kernel.md, followed to the letter: its files are written, its commands run in its order."""

import csv
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from burnish.bench import command
from burnish.bench.ops import contest, roofline
from burnish.kernels._chip import INTERPRET

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "your-kernel.md").read_text()
COMMANDS = re.findall(r"^    ((?:TRITON_INTERPRET=1 )?burnish bench .*?)(?:  +#.*)?$", PAGE, re.MULTILINE)
PYTEST = re.findall(r"^    (pytest.*)$", PAGE, re.MULTILINE)
ON_A_GPU = re.findall(r"^On a GPU:\n\n    (.*)$", PAGE, re.MULTILINE)

pytestmark = pytest.mark.skipif(INTERPRET, reason="interpreted kernels have no speed")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which a reader has written the files of the page."""
    for name, source in re.findall(
        r"^`(\w+\.py)`[^\n]*:\n\n```python\n(.*?)```", PAGE, re.MULTILINE | re.DOTALL
    ):
        (tmp_path / name).write_text(source)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_of_the_page_run_as_printed(folder, capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(contest, "SLICE", 1e-4)
    monkeypatch.setattr(contest, "COLD_BYTES", {"cpu": 1 << 16, "cuda": 1 << 16})
    monkeypatch.setattr(roofline, "measure", lambda device, dtype: roofline.Ceilings(1e10, 1e11))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    ran = 0
    for line in COMMANDS:
        if line.startswith("TRITON_INTERPRET") or line in ON_A_GPU:
            continue
        status = command.main(shlex.split(line)[2:])
        out = capsys.readouterr().out
        assert status == 0 or "--compare" in line, (
            f"{line}\n{out}"
        )  # on a busy machine something may be slower
        assert "--against" not in line or "mine.py:swiglu: compiling and checking ... right" in out
        ran += 1

    assert ran == 7 and len(ON_A_GPU) == 1
    for name in ("before.json", "after.json"):
        providers = {row["provider"] for row in json.loads((folder / name).read_text())["rows"]}
        assert providers == {"burnish", "eager", "mine.py:swiglu"}


def run(folder: Path, words: list[str], **more: str) -> str:
    outside = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = outside | {"PYTHONPATH": os.pathsep.join(sys.path)} | more
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_the_triton_kernel_of_the_page_is_right_under_the_interpreter(folder):
    (line,) = [line for line in COMMANDS if line.startswith("TRITON_INTERPRET")]
    words = [sys.executable, "-m", "burnish.bench", *shlex.split(line)[3:]]
    assert "kernel.py:swiglu: compiling and checking ... right" in run(folder, words, TRITON_INTERPRET="1")

    # one that is wrong past the last whole block
    source = (folder / "kernel.py").read_text()
    assert source.count("inside = at < n\n") == 2
    (folder / "kernel.py").write_text(source.replace("inside = at < n\n", "inside = at < n - 7\n", 1))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TRITON_INTERPRET": "1"}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "output 0" in done.stdout


@pytest.mark.slow
def test_pytest_benchmark_runs_as_the_page_says(tmp_path):
    """Autosave, compare, a plot for each case, CSV."""
    assert len(PYTEST) == 4
    storage = f"--benchmark-storage={tmp_path / 'saved'}"
    for line in PYTEST[:3]:
        words = shlex.split(line.replace("=swiglu", f"={tmp_path}/swiglu"))[1:]
        words[words.index("swiglu")] = "swiglu and not moe and not compile and not clamped"
        place = shlex.split(f"-c {ROOT}/pyproject.toml --rootdir {ROOT} -p no:cacheprovider -n 0")
        words[0] = str(ROOT / words[0])
        out = run(tmp_path, [sys.executable, "-m", "pytest", *words, *place, storage])
        assert "swiglu/elementwise" in out

        # it stands beside the saved run where that was asked for
        assert ("(0001_" in out) == ("--benchmark-compare" in line)
    assert len([*tmp_path.glob("swiglu*.svg")]) == 1

    # and as CSV
    table = tmp_path / "swiglu.csv"
    compared = [f"--storage={tmp_path / 'saved'}", "compare", f"--csv={table}"]
    run(tmp_path, [sys.executable, "-m", "pytest_benchmark", *compared])
    lines = [*csv.DictReader(table.open())]
    assert {line["param:case"] for line in lines} == {"swiglu/elementwise"}
    assert {line["param:contestant"] for line in lines} == {"burnish", "eager"}
    assert all(float(line["median"]) > 0 for line in lines)
