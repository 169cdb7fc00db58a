"""`pip install .` gives one package, complete, whose command starts; and an sdist that builds the same."""

import os
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from pathlib import Path

import pytest
from following import copy_of_tree

ROOT = Path(__file__).parent.parent
SOURCES = ["kernels", "model", "algorithms", "bench"]


def build(folder: Path, kind: str, output: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        f"--{kind}",
        "--outdir",
        str(output),
        str(folder),
    ]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (built,) = output.iterdir()
    return built


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The tree without what a build or a run leaves in it, with one room more, and a folder that is none."""
    tree = copy_of_tree(tmp_path / "tree")
    for file in (
        "kernels/planted_room/__init__.py",
        "kernels/planted_room/file.py",
        "kernels/no_room/file.py",
    ):
        (tree / file).parent.mkdir(exist_ok=True)
        (tree / file).write_text('"""A file."""\n')
    return tree


@pytest.mark.slow
def test_wheel_and_sdist(tree, tmp_path):
    wheel = build(tree, "wheel", tmp_path / "wheel")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"burnish", "burnish-0.1.0.dist-info"}
    for folder in SOURCES:
        for path in (tree / folder).rglob("*.py"):
            packed = f"burnish/{path.relative_to(tree).as_posix()}" in names
            assert packed == (path.parent / "__init__.py").exists(), path
        assert f"burnish/{folder}/py.typed" in names

    (metadata,) = (name for name in names if name.endswith("/METADATA"))
    page = message_from_string(zipfile.ZipFile(wheel).read(metadata).decode())
    assert page["Description-Content-Type"] == "text/markdown" and page.get_payload().startswith(
        "# Burnish\n"
    )
    licence = page["License-Expression"] or page["License"]  # as old and as newer setuptools write it
    assert page["Requires-Python"] == ">=3.11" and licence == "Apache-2.0"
    supported = {f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13, 14)}
    assert supported <= {*page.get_all("Classifier")} and page["Summary"] and page["Keywords"]

    sdist = build(tree, "sdist", tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    again = build(tmp_path / "burnish-0.1.0", "wheel", tmp_path / "again")
    assert sorted(zipfile.ZipFile(again).namelist()) == sorted(names)

    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import burnish.kernels.planted_room.file as k, burnish.algorithms.__main__ as m; "
        "print(k.__file__); m.main(['--help'])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.startswith(str(tmp_path / "site")) and "usage: burnish COMMAND" in run.stdout
