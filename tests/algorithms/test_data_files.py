"""The files behind --data: globs, names of the hub, and what a folder may name."""

import json
import re
from pathlib import Path

import pytest
from burnish.algorithms.data.examples import load_examples
from burnish.algorithms.data.rows import read_rows
from burnish.algorithms.run.data_files import data_files
from burnish.algorithms.run.order import Part
from burnish.algorithms.sft import Config
from burnish.model.errors import InputError
from burnish.model.text.tokenizer import Tokenizer
from faults import check_of, control, faults_of
from planted import copy_of


def write(path: Path, *rows: dict) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_glob_is_one_argument_of_sorted_files(tmp_path, folder, capsys):
    for name in ("b", "a", "c"):
        write(tmp_path / "runs" / f"{name}.jsonl", {"text": name})
    write(tmp_path / "runs" / "a.json", {"text": "no JSONL"})
    pattern = tmp_path / "runs" / "*.jsonl"
    assert data_files(pattern) == [tmp_path / "runs" / f"{name}.jsonl" for name in "abc"]
    assert data_files((pattern, tmp_path / "runs" / "a.json"))[-1].name == "a.json"
    assert data_files(tmp_path / "**" / "b.*") == [tmp_path / "runs" / "b.jsonl"]

    rows = read_rows(pattern)
    assert [row["text"] for row in rows] == ["a", "b", "c"] and rows[2].where.endswith("c.jsonl line 1")
    examples = load_examples(Config(model=folder, data=pattern, data_weights=(2.0,)), Tokenizer.load(folder))
    assert examples.parts == [Part(3, 2.0)]
    assert f"{pattern} (3 files): 3 rows, 3 examples" in capsys.readouterr().out

    # a file whose name has such letters is that file
    odd = write(tmp_path / "[a]*.jsonl", {"text": "odd"})
    assert data_files(odd) == [odd]
    for nothing in (tmp_path / "*.parquet", Path("a\0*")):
        with pytest.raises(InputError, match="no file has a name like this"):
            data_files(nothing)
    with pytest.raises(
        InputError, match=r"runs: expected a file, or a folder .* give a glob: '.*runs/\*\.jsonl'"
    ):
        data_files(tmp_path / "*s")


def test_a_name_of_the_hub_is_told_how_to_be_fetched(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for name in ("openai/gsm8k", "HuggingFaceH4/ultrachat_200k"):
        fetch = f"`hf download --repo-type dataset {name} --local-dir DIR`"
        with pytest.raises(InputError, match=f"{name}: no such file; .* fetch it by {re.escape(fetch)}"):
            read_rows(name)
    for name in ("data/train", "rows/train.jsonl", "/openai/gsm8k", "a/b/c", "gsm8k", "\0/a"):
        with pytest.raises(InputError) as refused:
            read_rows(name)
        assert str(refused.value).endswith("no such file")


# ---- planted faults


@control
def files_are_resolved(module, folder: Path) -> None:
    names = [write(folder / "runs" / f"{name}.jsonl", {"text": name}) for name in "cab"]
    found = module.data_files(folder / "runs" / "*.jsonl")
    assert found == sorted(names), f"expected sorted files, got {found}"
    odd = write(folder / "runs" / "a[1].jsonl", {"text": "odd"})
    write(folder / "runs" / "a1.jsonl", {"text": "other"})
    assert module.data_files(odd) == [odd], "expected the file of that name"
    (folder / "runs" / "state.json").write_text('{"_data_files": [{"filename": "../a"}]}')
    try:
        found = module.data_files(folder / "runs")
    except InputError as error:
        found = str(error)
    assert "expected names of files in the folder" in str(found), f"expected a refusal, got {found}"


@pytest.mark.parametrize("fault", faults_of(__file__), ids=lambda fault: fault.id)
def test_a_planted_fault_is_caught(fault, tmp_path, monkeypatch):
    module = copy_of(fault.file, tmp_path, monkeypatch, fault)
    with pytest.raises(AssertionError, match="expected"):
        check_of(fault)(module, tmp_path)


def test_a_faithful_copy_passes(tmp_path, monkeypatch):
    files_are_resolved(copy_of("algorithms/run/data_files", tmp_path, monkeypatch), tmp_path)
