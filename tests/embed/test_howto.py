"""docs/add-an-architecture.md, followed to the letter in a copy of the tree, beside transformers."""

import json

import pytest
from following import copy_of_tree, follow

pytest.importorskip("transformers", reason="transformers is not installed")


def test_an_architecture_is_added(tmp_path):
    tree = copy_of_tree(tmp_path / "tree")
    (tree / "build" / "link").mkdir(parents=True)
    (tree / "build" / "link" / "burnish").symlink_to(tree)
    ran = follow("add-an-architecture", tree, {}, skip=("burnish bench report",))
    assert [command.split()[0] for command in ran] == ["python", "python", "pytest", "pytest"]
    golden = json.loads((tree / "tests" / "data" / "config_mutations.json").read_text())["golden"]
    assert len(golden["ministral"]) > 10
