"""The benchmark's second door needs torch, triton, numpy and pytest alone: what a GPU machine has."""

import json
import os
import subprocess
import sys

import pytest
from burnish.bench.command import COMMANDS
from burnish.bench.runs import gpu
from burnish.kernels._chip import INTERPRET

pytestmark = pytest.mark.skipif(INTERPRET, reason="nothing of it is interpreted")

NEVER = (
    "tyro jinja2 matplotlib"  # no command's flags, and nothing that is imported with its file, needs these
)
MISSING = f"{NEVER} tqdm safetensors tokenizers"  # what a GPU machine lacks
FURTHER = "xdist pytest_timeout ml_dtypes yaml pyarrow gguf"  # what our own tests do without, too
WITH_MODELS = {"rollouts", "conformance"}  # whole runs, whose models lie on disk
HELP = ["--help", *(f"{name} --help" for name in COMMANDS)]
RUNS = ["static swiglu --processes 1", "paths --check", "tune --chip sm_90", "--list swiglu"]
RUNS += ['swiglu --shape "B=1 T=3 F=8" --check-only']
LINES = [*HELP, *RUNS]

EACH = """
import runpy, shlex, traceback

def run(words):
    sys.argv = ["burnish.bench", *shlex.split(words)]
    try:
        runpy.run_module("burnish.bench", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code
    except BaseException:
        traceback.print_exc()

statuses = {words: run(words) for words in WORDS}
with open(FILE, "w") as file:
    json.dump(statuses, file)
"""
COLLECT = """
import pytest
from burnish.bench import __main__, command
from burnish.bench.ops import paths, speed, static, tune
from burnish.bench.runs import crew, gpu, verdict, worker
sys.exit(pytest.main(["-q", "--collect-only", "-p", "no:cacheprovider", *gpu.TESTS]))
"""


def without(missing: str, source: str, **names: object) -> subprocess.CompletedProcess[str]:
    """A process in which the packages cannot be imported."""
    first = f"import json, sys\nsys.modules |= dict.fromkeys({missing.split()})\n"
    first += "".join(f"{name} = {value!r}\n" for name, value in names.items())
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-c", first + source]
    return subprocess.run(command, cwd=gpu.ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """Each command line's status, and what all of them wrote."""
    folder = tmp_path_factory.mktemp("without")
    statuses, out, err = {}, "", ""
    for missing, lines in (
        (MISSING, [words for words in LINES if words.split()[0] not in WITH_MODELS]),
        (NEVER, [words for words in LINES if words.split()[0] in WITH_MODELS]),
    ):
        done = without(missing, EACH, WORDS=lines, FILE=str(folder / "statuses.json"))
        assert done.returncode == 0, done.stderr[-2000:]
        statuses |= json.loads((folder / "statuses.json").read_text())
        out, err = out + done.stdout, err + done.stderr
    return statuses, out, err


@pytest.mark.parametrize("words", LINES)
def test_a_command_needs_no_other_package(words, ends):
    statuses, out, err = ends
    assert statuses[words] == 0, err[-2000:]
    if words in HELP:
        usage = " ".join(["usage: python -m burnish.bench", *words.split()[:-1], "[-h]"])
        assert usage in " ".join(out.split())


def test_a_package_that_is_needed_is_seen(tmp_path):
    """The planted fault: a block of torch itself ends every command."""
    file = tmp_path / "statuses.json"
    done = without(f"{MISSING} torch", EACH, WORDS=["--help"], FILE=str(file))
    assert json.loads(file.read_text()) == {"--help": None} and "import of torch halted" in done.stderr


@pytest.mark.slow
def test_torch_triton_numpy_and_pytest_are_enough():
    """All that `make gpu` runs is imported, tests included, where nothing else can be."""
    done = without(f"{MISSING} {FURTHER}", COLLECT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
