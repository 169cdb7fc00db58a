"""The pages of docs/ that say how something is added, followed to the letter in a copy of the tree."""

import json
import re
from pathlib import Path

import pytest
from burnish.algorithms.recipes.sums import VOCABULARY, make_tokenizer
from burnish.model import ModelConfig, Transformer
from burnish.model.checkpoint import save_model
from burnish.model.text.tokenizer import Tokenizer
from following import ROOT, copy_of_tree, follow, insert, replace, steps

TINY = str(ROOT / "tests" / "data" / "tiny-hf" / "qwen3")
PAIR = {"prompt": "1+2=", "chosen": "3", "rejected": "4"}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the tree, with the package `burnish` in build/link."""
    copy = copy_of_tree(tmp_path / "tree")
    (copy / "build" / "link").mkdir(parents=True)
    (copy / "build" / "link" / "burnish").symlink_to(copy)
    return copy


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A random model that reads digits."""
    config = ModelConfig(len(VOCABULARY), 16, 24, 2, 2, tie_word_embeddings=True, eos_token_id=0)
    tokenizer = Tokenizer(make_tokenizer(), eos="<eos>")
    save_model(Transformer(config, seed=0), tmp_path / "model", tokenizer)
    return tmp_path / "model"


@pytest.mark.slow
def test_an_op_is_added(tree):
    ran = follow("add-an-op", tree, {}, skip=("burnish bench report", "burnish bench softcap"))
    assert [command.split()[0] for command in ran] == ["pytest", "TRITON_INTERPRET=1", "burnish"]
    accepted = json.loads((tree / "bench" / "static.json").read_text())["builds"]
    assert any(key.startswith("softcap/") for key in accepted)


@pytest.mark.slow
def test_a_loss_is_added(tree, model_folder, tmp_path):
    rows = tmp_path / "pairs.jsonl"
    rows.write_text("".join(json.dumps(PAIR) + "\n" for _ in range(4)))
    ran = follow("add-a-loss", tree, {"DIR": str(model_folder), "PAIRS.jsonl": str(rows)})
    assert ran[-1].startswith("burnish dpo") and [*tree.glob("runs/*/model/model.safetensors")]


@pytest.mark.slow
def test_a_reward_is_added(model_folder, tmp_path):
    ran = follow("add-a-reward", tmp_path, {"DIR": str(model_folder)})
    assert len(ran) == 2 and (tmp_path / "runs" / "sums" / "model" / "model.safetensors").exists()


def test_memory_is_counted_as_printed(capsys):
    page = (ROOT / "docs" / "fit-into-memory.md").read_text()
    programs = [step["program"] for step in steps("fit-into-memory") if "program" in step]
    counted, of_a_folder = (compile(program.replace("DIR", TINY), "page", "exec") for program in programs)
    exec(counted, {})
    assert f"```text\n{capsys.readouterr().out}```" in page
    exec(of_a_folder, {})
    assert re.fullmatch(r"0\.\d{3} GB\n", capsys.readouterr().out)


def test_what_is_not_there_once_is_an_error(tmp_path):
    file = tmp_path / "x.py"
    for text in ("", "a = 1\na = 1\n"):
        file.write_text(text)
        with pytest.raises(AssertionError, match=r"x\.py: 'a = 1' stands in"):
            insert(file, "a = 1", "b = 2\n", before=True)
        with pytest.raises(AssertionError, match=r"x\.py: 'a = 1' stands in"):
            replace(file, "a = 1", "b = 2")
    file.write_text("a = 1\n")
    insert(file, "a = 1", "b = 2\n", before=False)
    replace(file, "a = 1", "c = 3")
    assert file.read_text() == "c = 3\nb = 2\n"


def test_a_command_that_fails_is_an_error(model_folder, tmp_path):
    with pytest.raises(AssertionError, match=r"none\.jsonl: no such file"):
        follow("add-a-reward", tmp_path, {"DIR": str(model_folder), "sums.jsonl": "none.jsonl"})
