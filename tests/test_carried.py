"""The ops in other places: machines without Triton, copies of kernels/, a namesake beside the clone."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KERNELS = ROOT / "kernels"


def run(code: str, *arguments: object, cwd: Path = ROOT, **variables: str) -> str:
    """The output of a fresh process."""
    environment = os.environ | {"PYTHONSAFEPATH": "1", "TRITON_INTERPRET": "0"} | variables
    command = [sys.executable, "-c", code, *map(str, arguments)]
    process = subprocess.run(
        command, env=environment, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


# ---- without Triton

WITHOUT_TRITON = """
import sys

class Refusing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refusing())
"""
EVERY_OP = """
import math
from types import SimpleNamespace

import torch
from burnish.bench.cases.case import assert_accurate, make_inputs
from burnish.bench.cases.registry import CASES

def size(dims):
    return math.prod(dims.values())

torch.set_num_threads(1)
for case in CASES:
    assert_accurate(case, make_inputs(case, min(case.shapes, key=size), torch.float32, "cpu"))
assert "triton" not in sys.modules
"""
EVERY_COMMAND = """
import json
from importlib import import_module
from pathlib import Path

from burnish.algorithms import __main__ as burnish

folder = Path(sys.argv[1])
for module, _, _ in burnish.COMMANDS.values():
    import_module(module)
assert burnish.main(["--help"]) == 0

from burnish.model.checkpoint import save_model
from burnish.model.config import ModelConfig
from burnish.model.text.tokenizer import Tokenizer
from burnish.model.transformer import Transformer

tokenizer = Tokenizer.load(Path(sys.argv[2]))
config = ModelConfig(512, 16, 24, 1, 2, 2, tie_word_embeddings=True)
save_model(Transformer(config, seed=1), folder / "model", tokenizer)
(folder / "rows.jsonl").write_text(json.dumps({"prompt": "The License", "completion": " is free"}) + "\\n")
sft = ["sft", "--model", str(folder / "model"), "--data", str(folder / "rows.jsonl"), "--steps", "1"]
assert burnish.main([*sft, "--output", str(folder / "run")]) == 0
chat = ["chat", "--model", str(folder / "run" / "model"), "--prompt", "The License", "--max-new-tokens", "2"]
assert burnish.main(chat) == 0
"""
WHAT_NEEDS_IT = """
import importlib.util, os

from burnish.algorithms import __main__ as burnish, sft
from burnish.bench import __main__, command
from burnish.bench.record import machine
from burnish.kernels import _chip

def sentence(call, *arguments):
    try:
        return call(*arguments)
    except ModuleNotFoundError as error:
        print(error)

sys.stderr = sys.stdout
assert machine("cpu")["triton"] == "not installed"
assert command.main(["static"], plain=True) == command.main(["tune"], plain=True) == 1
on_a_gpu = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 1))
sentence(_chip.use_triton, on_a_gpu)
sft.train = lambda cfg: _chip.use_triton(on_a_gpu)
assert burnish.main(["sft", "--model", "x", "--data", "x"]) == 1
os.environ["TRITON_INTERPRET"] = "1"
spec = importlib.util.spec_from_file_location("burnish.kernels._again", _chip.__file__)
sentence(spec.loader.exec_module, importlib.util.module_from_spec(spec))
"""


def test_every_command_without_triton(tmp_path, data):
    run(WITHOUT_TRITON + EVERY_COMMAND, tmp_path, data / "tokenizer", cwd=tmp_path)


def test_every_op_without_triton_and_what_needs_it_says_so_in_one_sentence():
    lines = [line for line in run(WITHOUT_TRITON + EVERY_OP + WHAT_NEEDS_IT).splitlines() if line]
    wanting = ": expected Triton to be installed: pip install triton (on Windows triton-windows)"
    modules = [f"python -m burnish.bench {name}: the compiler" for name in ("static", "tune")]
    assert lines == [
        f"{what}{wanting}" for what in (*modules, "cuda:1", "burnish sft: cuda:1", "TRITON_INTERPRET=1")
    ]


# ---- copies

COPIES = {
    "mine_kernels": 2,
    "mytrainer.kernels": 3,
    "kernels": 5,
}  # and what one of their products is multiplied by
PLACES = {  # where it stands, in whichever room: in a path that torch knows as an op, on a CPU and in Triton
    "moe.py": "F.silu(gate) * up",
    "glu.py": "(u + offset) * g * tl.sigmoid(s)",
}
EACH_ITS_OWN = """
import sys
from importlib import import_module

import torch

sys.path.insert(0, sys.argv[2])
modules = [import_module(name) for name in ("burnish.kernels", *sys.argv[3:])]
x, up, down = torch.randn(2, 8), torch.randn(4, 12, 8), torch.randn(4, 8, 6)
weights, indices = torch.ones(2, 2), torch.tensor([[0, 3], [1, 2]])
calls = {
    "swiglu": lambda module, x: module.swiglu(x, x),
    "moe_mlp": lambda module, x: module.moe_mlp(x, up, down, weights, indices),
}
op = calls[sys.argv[1]]

def answers(module, compiled):
    leaf = x.clone().requires_grad_()
    out = compiled(module, leaf)
    assert torch.equal(out, op(module, x))
    return out, *torch.autograd.grad(out.sum(), leaf)

compiled = [torch.compile(op, backend="aot_eager", fullgraph=True, dynamic=False) for _ in modules]
for _ in range(2):
    found = [answers(*pair) for pair in zip(modules, compiled)]
    for module, own in zip(modules, found):
        ratios = [(mine / ours).median().item() for mine, ours in zip(own, found[0])]
        print(module._chip.NAMESPACE, *[round(ratio, 3) for ratio in ratios])
"""


def copy(folder: Path, name: str, factor: int) -> None:
    """kernels/ with its rooms as the package `name`, with one product of two of its files multiplied."""
    home = folder.joinpath(*name.split("."))
    shutil.copytree(KERNELS, home, ignore=shutil.ignore_patterns("__pycache__"))
    if "." in name:
        (home.parent / "__init__.py").touch()
    for file, old in PLACES.items():
        sources = {path: path.read_text() for path in home.rglob(file)}
        count = sum(source.count(old) for source in sources.values())
        assert count == 1, f"{file} does not have `{old}` once: change another number"
        for path, source in sources.items():
            path.write_text(source.replace(old, f"{factor} * {old}"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "op, interpret, gradient",
    [("moe_mlp", "0", True), ("swiglu", "1", False)],
    ids=["cpu", "triton"],
)
def test_copies_in_one_process_compute_their_own(tmp_path, op, interpret, gradient):
    for name, factor in COPIES.items():
        copy(tmp_path, name, factor)
    lines = run(EACH_ITS_OWN, op, tmp_path, *COPIES, cwd=tmp_path, TRITON_INTERPRET=interpret).splitlines()
    factors = {"burnish": 1, **{name.replace(".", "_"): factor for name, factor in COPIES.items()}}
    # of swiglu the forward alone was changed
    assert lines == 2 * [f"{name} {f:.1f} {f if gradient else 1:.1f}" for name, f in factors.items()]


# ---- the namesake

AT_THE_ROOT = """
import importlib.util, sys

sys.path.insert(0, "")
theirs = sys.argv[1:]
sys.path += theirs
assert importlib.util.find_spec("kernels") is not None  # as transformers asks before it imports it
"""
THEIRS = """
import kernels
import kernels.sub
from kernels import get_kernel
from importlib.metadata import version

import burnish.kernels

assert get_kernel() is kernels.get_kernel and kernels.__spec__.origin.startswith(theirs[0])
assert importlib.util.find_spec("kernels").origin == kernels.__file__ and version("kernels") == "0.15.2"
assert not hasattr(kernels, "rms_norm") and burnish.kernels._chip.NAMESPACE == "burnish"
print(kernels.sub.ANSWER)
"""
THEIRS_FAILS = """
try:
    import kernels
except ModuleNotFoundError as error:
    print(error.name, "kernels" in sys.modules)
"""
OURS = """
import kernels
import torch

assert kernels._chip.NAMESPACE == "kernels"
print(kernels.rms_norm(torch.ones(1), torch.ones(1)).item())
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder of installed packages that holds one named `kernels`."""
    for file, text in {
        "kernels/__init__.py": "def get_kernel():\n    return get_kernel\n",
        "kernels/sub.py": "ANSWER = 42\n",
        "kernels-0.15.2.dist-info/METADATA": "Metadata-Version: 2.1\nName: kernels\nVersion: 0.15.2\n",
    }.items():
        path = tmp_path / "site" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "site"


def test_the_root_of_the_clone_makes_way(site):
    assert run(AT_THE_ROOT + THEIRS, site) == "42\n"


def test_a_namesake_that_fails_is_not_taken_for_ours(site):
    (site / "kernels" / "__init__.py").write_text("import nowhere_to_be_found\n")
    assert run(AT_THE_ROOT + THEIRS_FAILS, site) == "nowhere_to_be_found False\n"


@pytest.mark.slow
def test_without_a_namesake_ours_is_kernels(tmp_path):
    (tmp_path / "kernels").mkdir()  # a folder alone is no package
    assert abs(float(run(AT_THE_ROOT + OURS, tmp_path)) - 1) < 1e-3
