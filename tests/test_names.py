"""The names that README, CONTRIBUTING, SECURITY and docs/ give: each is there, and the doors stay where they are."""

import re
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from pathlib import Path

import pytest
from burnish.algorithms.__main__ import COMMANDS

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [*ROOT.glob("docs/*.md"), *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY"))]
)
FOLDERS = ("kernels", "model", "algorithms", "bench", "tests", "docs")
THEIRS = {"trainer/grpo_trainer.py"}  # TRL's

DOORS = {  # what users write; a name moves here only with a change that says so
    "burnish.algorithms.sft": "Config train sft_loss",
    "burnish.algorithms.reward": "Config train",
    "burnish.algorithms.dpo": "Config train dpo_loss",
    "burnish.algorithms.kto": "Config train",
    "burnish.algorithms.ppo": "Config train",
    "burnish.algorithms.grpo": "Config train",
    "burnish.algorithms.distill": "Config train",
    "burnish.algorithms.teach": "Config teach",
    "burnish.algorithms.evaluate": "Config evaluate",
    "burnish.algorithms.verifiers": "gsm8k last_number number",
    "burnish.bench.conformance": "EOS Batch NotApplicable Step Toy Trainer ids_of",
    "burnish.model": "Cache InputError ModelConfig Packed Rope Transformer Vocabulary pack",
    "burnish.model.adapter": "add_lora adapter_disabled frozen_copy merge_lora quantize_base stack_adapters",
    "burnish.model.checkpoint": "load_model save_model stream_weights",
    "burnish.model.embed": "apply",
    "burnish.model.generate": "SamplingParams generate stream",
    "burnish.model.memory": "Memory Training training_memory",
    "burnish.model.packed": "Packed pack",
}
COMMAND_FUNCTIONS = {
    "r1": "burnish.algorithms.recipes.r1:train",
    "instruct": "burnish.algorithms.recipes.instruct:train",
    "chat-demo": "burnish.algorithms.recipes.chat_demo:train",
    "sft": "burnish.algorithms.sft:train",
    "reward": "burnish.algorithms.reward:train",
    "dpo": "burnish.algorithms.dpo:train",
    "kto": "burnish.algorithms.kto:train",
    "ppo": "burnish.algorithms.ppo:train",
    "grpo": "burnish.algorithms.grpo:train",
    "distill": "burnish.algorithms.distill:train",
    "teach": "burnish.algorithms.teach:teach",
    "evaluate": "burnish.algorithms.evaluate:evaluate",
    "report": "burnish.algorithms.report:report",
    "memory": "burnish.algorithms.memory:main",
    "merge": "burnish.algorithms.merge:merge",
    "chat": "burnish.algorithms.chat:main",
    "convert": "burnish.model.convert:main",
    "bench": "burnish.bench.command:main",
}


# ---- names of the package


def is_there(name: str) -> bool:
    """Whether `burnish.x.y.name` is a module, or what a module has."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        module = ".".join(parts[:count])
        try:
            found = import_module(module)
        except ModuleNotFoundError as error:
            if not f"{module}.".startswith(f"{error.name}."):
                raise  # the module is there, and needs what is not
            continue
        for part in parts[count:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def is_run(module: str) -> bool:
    """Whether `python -m module` does something."""
    if not is_there(module):
        return False
    spec = find_spec(module)
    if spec is not None and spec.submodule_search_locations is not None:
        spec = find_spec(f"{module}.__main__")
    return bool(spec and spec.origin and '__name__ == "__main__"' in Path(spec.origin).read_text())


def names(text: str) -> Iterator[str]:
    """Dotted names: what is imported from burnish, in code or prose, and what is written out."""
    for module, imported in re.findall(r"from\s+(burnish[\w.]*)\s+import\s+(\([^)]*\)|[^\n#`;]*)", text):
        for each in imported.strip("() \n").split(","):
            if name := each.split("#")[0].split(" as ")[0].strip():
                yield f"{module}.{name}"
    for name in re.findall(r"\bburnish(?:\.\w+)+(?::\w+)?", text):
        yield name.replace(":", ".")


def wrong_names(text: str) -> list[str]:
    text = re.sub(r"`[^`]*` at commit", "", text)  # a command of then
    wrong = [name for name in dict.fromkeys(names(text)) if not is_there(name)]
    run = dict.fromkeys(re.findall(r"-m\s+(burnish(?:\.\w+)*)", text))
    wrong += [f"python -m {module}" for module in run if not is_run(module)]
    commands = dict.fromkeys(re.findall(r"(?:^ {4,}|`|\$ |/)burnish ([a-z][\w-]*)", text, re.MULTILINE))
    return wrong + [f"burnish {command}" for command in commands if command not in COMMANDS]


# ---- paths


@cache
def tree() -> set[str]:
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.*")]
    return {path.relative_to(ROOT).as_posix() for path in (*files, *ROOT.glob("*.*"))}


def found(path: str) -> list[Path]:
    """The files that a path names, which may be the last part of theirs alone."""
    return [ROOT / file for file in sorted(tree()) if f"/{file}".endswith(f"/{path}")]


def wrong_paths(text: str, page: Path = ROOT / "README.md") -> list[str]:
    """Paths that begin with a folder of ours, in prose, code and tables; names of .py files in backticks; links."""
    wrong = []
    made = set(
        re.findall(r"^`([\w./-]+)`, a new file:$", text, re.MULTILINE)
    )  # by a reader who follows the page
    for path in re.findall(rf"(?<![\w./-])(?:{'|'.join(FOLDERS)})/[\w./*<>-]*", text):
        pattern = re.sub(r"<\w+>", "*", path.rstrip("."))
        if path.rstrip(".") in made:
            continue
        if not any(ROOT.glob(pattern)) and not any(ROOT.glob(f"{pattern}.py")):
            wrong.append(path)

    prose = re.sub(r"^(```.*?^```| {4}[^\n]*)", "", text, flags=re.MULTILINE | re.DOTALL)
    written = re.findall(r"^`(\w+\.py)`[^\n]*:\n\n```python", text, re.MULTILINE)  # by the reader
    for span in re.findall(r"`([^`]+)`", prose):
        for path in re.findall(r"(?<![\w./<>*-])[\w/]+\.py\b", span):
            if not path.startswith("FILE") and path not in {*THEIRS, *written, *made} and not found(path):
                wrong.append(path)

    for link, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", prose):
        if not link.startswith("http"):
            target = page.parent / link if link else page
            if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
                wrong.append(f"({link}#{anchor})" if anchor else f"({link})")
    return wrong


@cache
def words() -> set[str]:
    """Every word of our sources but for this one, whose examples are wrong on purpose; and the names of the files."""
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    texts = [path.read_text() for path in files if path != Path(__file__)]
    return {path.stem for path in files}.union(*(re.findall(r"\w+", text) for text in texts))


def wrong_words(text: str) -> list[str]:
    """Private names in backticks, and tests, that stand in no file."""
    spans = re.findall(r"`([^`\n]+)`", text)
    found = [name for span in spans for name in re.findall(r"(?<![\w.*<>-])_[a-z]\w+", span)]
    return [name for name in (*found, *re.findall(r"\btest_\w+", text)) if name not in words()]


TICKED = r"(`\w+`(?:(?:,| and|, and)\s`\w+`)*)"
FILE = r"`([\w/]+\.py)"
IN_A_FILE = [
    rf"{TICKED}\s\({FILE}`",
    rf"{TICKED}\s(?:of|in)\s{FILE}`",
]  # `name` (`file.py`), `name` of `file.py`
OF_A_FILE = [rf"{FILE}: (\w+)`", rf"^\| {FILE}` \| {TICKED}"]  # `file.py: name`, a row of a table of files


def wrong_places(text: str) -> list[str]:
    """Names that a page places in a file, where the file does not define them."""
    pairs = [pair for pattern in IN_A_FILE for pair in re.findall(pattern, text)]
    pairs += [pair[::-1] for pattern in OF_A_FILE for pair in re.findall(pattern, text, re.MULTILINE)]
    wrong = []
    for listed, path in pairs:
        sources = [file.read_text() for file in found(path)]
        for name in re.findall(r"`(\w+)`", listed) or [listed]:
            defined = re.compile(rf"^\s*(?:(?:def|class) {name}\b|{name}\s*[:=])", re.MULTILINE)
            if not any(map(defined.search, sources)):
                wrong.append(f"{name} in {path}")
    return wrong


def wrong_map(text: str) -> list[str]:
    """Files and rooms of README's map that are not there.

    A line names a folder, a room or files, and behind two spaces what they hold; a room's files stand further in.
    """
    wrong, places = [], {}
    for block in re.findall(r"^```\n(kernels/ .*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            depth = len(line) - len(line.lstrip())
            above = max((place for indent, place in places.items() if indent < depth), key=len, default="")
            for name in re.sub(r"<\w+>", "*", line.strip().split("  ")[0]).split():
                if name.endswith("/"):
                    places = {d: place for d, place in places.items() if d < depth} | {depth: above + name}
                if not any(ROOT.glob(above + name + ("" if name.endswith("/") else ".py"))):
                    wrong.append(above + name)
    return wrong


def anchors(text: str) -> set[str]:
    """The headings of a page as GitHub links to them."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# ---- the pages and the doors


@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_every_name_and_path_of_a_page_is_there(page):
    text = page.read_text()
    assert not wrong_names(text)
    assert not wrong_paths(text, page)
    assert not wrong_places(text)
    assert not wrong_words(text)


def test_what_tests_import_in_programs_of_theirs_is_there():
    """A text that another process runs shows a wrong name late, or never: in a test that is slow or skipped."""
    wrong = []
    for file in sorted(ROOT.glob("tests/**/*.py")):
        if file != Path(__file__) and file.parent.name != "architecture":
            imports = re.findall(r"from (burnish[\w.]*) import \(?\s*(\w+)", file.read_text())
            wrong += [f"{file.name}: {'.'.join(pair)}" for pair in imports if not is_there(".".join(pair))]
    assert not wrong


@pytest.mark.parametrize("module", DOORS)
def test_doors_stay(module):
    missing = [name for name in DOORS[module].split() if not is_there(f"{module}.{name}")]
    assert is_there(module) and not missing, f"{module} has no {', '.join(missing)}"


def test_commands_stay():
    assert {
        name: f"{module}:{function}" for name, (module, function, _) in COMMANDS.items()
    } == COMMAND_FUNCTIONS
    for name, (module, function, line) in COMMANDS.items():
        found = import_module(module)
        if name == "bench":  # it has commands of its own
            continue
        assert list(signature(getattr(found, function)).parameters) == ["cfg"] and found.Config and line


def test_the_map_of_readme_names_what_is_there():
    text = (ROOT / "README.md").read_text()
    assert "\n```\nkernels/  " in text and not wrong_map(text)


# ---- controls


@pytest.mark.parametrize(
    "text",
    [
        "from burnish.kernels import rms_norms",
        "```python\nfrom burnish.kernels import (\n    rms_norm,\n    rms_norms,  # a comment\n)\n```",
        "from burnish.kernel import rms_norm",
        "    from burnish.model.checkpoint import load_model as load, save_models  # a comment",
        "the `burnish.model.checkpoint.load_models` of it",
        "`burnish.algorithms.verifiers:gsm9k`",
        "`burnish.algorithms.verifier:gsm8k`",
        "    --reward burnish.algorithms.verifiers:gsm8k.x --answer burnish.algorithms.verifiers:word",
        "python -m burnish.bench.statics",
        "`python -m\nburnish.bench.case`",
        "`python -m burnish.model`",
        "    torchrun -m burnish.algorithms.data.rows",
        "`burnish sfts --model DIR`",
        "    burnish grpos --model DIR",
    ],
)
def test_a_wrong_name_is_found(text):
    assert wrong_names(text)


@pytest.mark.parametrize(
    "text",
    [
        "`algorithms/dpos.py` is the whole",
        "see docs/dpos.md.",
        "    pytest tests/kernels/test_norms.py",
        "`bench/case_<file>.py`",
        "the room `algorithms/plumbing/`",
        "`objective/policy.py`",
        "| `checkpoints.py` | saves |",
        "`test_names.py`, `test_namesake.py: what it says`",
        "[a page](docs/dpos.md)",
        "[a section](docs/gpu.md#visions)",
        "`kernels/caps.py`, a new file: and no more",
    ],
)
def test_a_wrong_path_is_found(text):
    assert wrong_paths(text)


@pytest.mark.parametrize(
    "text",
    [
        "`rms_norms` (`kernels/norm.py`)",
        "`rms_norm` and `swiglu` (`kernels/norm.py`)",
        "the table `ATTENTION` of `kernels/attention.py`",
        "`bench/runs/conformance.py: Trainers`",
        "| `packed.py` | `pack`, `unpack`: sequences |",
    ],
)
def test_a_name_in_another_file_is_found(text):
    assert len(wrong_places(text)) == 1


@pytest.mark.parametrize(
    "line",
    [
        "  norms          not there",
        "  tensors        in a room, not upstairs",
        "  files/\n    folders        not there",
        "  files/\n  folder         upstairs again",
        "  rooms/         not there",
        "  moe rotation   the second name is wrong",
        "  files/\n    folder         right\nkernels/       ops\n    folder         of another room",
    ],
)
def test_a_wrong_line_of_the_map_is_found(line):
    before = "```\nkernels/       ops\n  norm           RMSNorm\nmodel/         a model\n"
    assert wrong_map(f"{before}{line}\n```\n") and not wrong_map(f"{before}```\n")


@pytest.mark.parametrize("text", ["`_micro_batches_of.groups`", "test_said's planted faults"])
def test_a_word_of_no_file_is_found(text):
    assert wrong_words(text)


def test_what_is_right_is_not_found():
    text = """
`burnish.algorithms.verifiers:gsm8k`, `burnish.model.checkpoint.stream_weights`, `burnish sft`, `burnish COMMAND`
`algorithms/dpo.py`, `objectives/policy.py`, `checkpoint.py`, `tests/faults/kernels/<file>.toml`, `kernels/`
`FILE.py:NAME`
[a section](docs/gpu.md#versions), [elsewhere](https://example.org/docs/x.md#y), RUN/model/config.json

    from burnish.kernels import (rms_norm, swiglu as glu)  # both
    from burnish.model import embed
    python -m burnish.bench static rms_norm
    python -m burnish.bench --peers
    python -m my_adapter.py:adapter
"""
    text += (
        "`_chip`, `_op.make_op`, `test_names.py`, `test_one_level_of_rooms`, `a_b`, `bench/cases/<file>.py`"
    )
    assert not wrong_names(text) and not wrong_paths(text) and not wrong_words(text)
    assert not wrong_paths("`kernels/caps.py`, a new file:\n\nand `kernels/caps.py` is there.")
    assert not wrong_places(
        "`rms_norm`, `add_rms_norm` (`kernels/norm.py`)\n| `packed.py` | `pack`: sequences |"
    )
