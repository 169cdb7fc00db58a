"""Packages that a machine may lack: every file is imported without them, and what needs one says so in a sentence."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted(
    ".".join(("burnish", *path.relative_to(ROOT).with_suffix("").parts))
    for folder in ("kernels", "model", "algorithms", "bench")
    for path in (ROOT / folder).rglob("*.py")
)
ABSENT = ("jinja2", "matplotlib", "tyro")
SANDBOX = {  # made of jinja2's own classes: imported as a template is compiled
    "burnish.model.text.bounded",
    "burnish.model.text.meter",
    "burnish.model.text.sandbox",
}

IMPORT_ALL = """
for module in modules:
    try:
        import_module(module)
    except ModuleNotFoundError as error:
        print(module, error.name.split(".")[0])
"""
TOKENIZER = """
from burnish.model.text.tokenizer import Tokenizer
tokenizer = Tokenizer.load("tests/data/tokenizer")
tokenizer.chat_template = "{{ messages[0].content }}"
assert tokenizer.decode(tokenizer.encode("hello")) == "hello"
"""
PLAIN_ROWS = (
    TOKENIZER
    + """
from burnish.algorithms.data.examples import sft_examples
from burnish.algorithms.data.row import Row
rows = [Row({"prompt": "a", "completion": "b"}, "rows line 1")]
examples, _ = sft_examples(rows, tokenizer, max_length=64)
print(len(examples))
"""
)
CHAT = (
    TOKENIZER
    + """
messages = [{"role": "user", "content": "hello"}]
try:
    print(tokenizer.decode(tokenizer.encode_chat(messages)))
except ValueError as error:
    print(error)
"""
)
ROW_TEMPLATE = """
from pathlib import Path
from burnish.algorithms.data.row import Row
from burnish.algorithms.data.row_template import shaped
Path(folder, "row.jinja").write_text("{{ a }}")
try:
    print(shaped([Row({"a": "b"}, "rows line 1")], Path(folder, "row.jinja")))
except ValueError as error:
    print(error)
"""
PAGE = """
from burnish.algorithms.recipes import page
try:
    print(page.check_packages())
except ValueError as error:
    print(error)
"""

SLOW = pytest.mark.slow


def run(program: str, absent: tuple[str, ...] = ABSENT, **names: object) -> list[str]:
    """The lines that a program prints, in a process of its own that has no package `absent`."""
    given = "\n".join(f"{name} = {value!r}" for name, value in names.items())
    source = f"import sys\nfrom importlib import import_module\nsys.modules |= dict.fromkeys({absent})\n"
    done = subprocess.run(
        [sys.executable, "-c", f"{source}{given}\n{program}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_every_file_is_imported_without_them():
    failed = dict(line.split() for line in run(IMPORT_ALL, modules=MODULES))
    assert failed == dict.fromkeys(SANDBOX, "jinja2")


def test_a_trainer_imports_none_of_them():
    trainers = [f"burnish.algorithms.{name}" for name in ("sft", "grpo", "ppo", "recipes.r1")]
    loaded = run(f"{IMPORT_ALL}print(*sys.modules)", absent=(), modules=trainers)[-1].split()
    assert "burnish.algorithms.recipes.page" in loaded and not {*ABSENT} & {*loaded}


@pytest.mark.parametrize(
    "program, found, printed",
    [
        pytest.param(PLAIN_ROWS, "1", "1", marks=SLOW),
        pytest.param(CHAT, "hello", "the chat template: expected jinja2 to be installed", marks=SLOW),
        pytest.param(
            ROW_TEMPLATE,
            "[{'prompt': 'b'}]",
            "--row-template row.jinja: expected jinja2 to be installed",
            marks=SLOW,
        ),
        (PAGE, "None", "the report: expected jinja2 to be installed"),
    ],
    ids=["plain rows", "chat template", "row template", "page"],
)
def test_what_needs_a_package_says_so(program, found, printed, tmp_path):
    assert run(program, absent=(), folder=str(tmp_path)) == [found]
    (line,) = run(program, folder=str(tmp_path))
    assert line.replace(f"{tmp_path}/", "").startswith(printed)
