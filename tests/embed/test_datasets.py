"""Folders of `datasets.save_to_disk` and files of its cache: what is read is the dataset, without nulls of Arrow."""

import json
from pathlib import Path
from typing import Any

import pytest

datasets = pytest.importorskip("datasets", reason="datasets is not installed")
import pyarrow  # noqa: E402
from burnish.algorithms.data.rows import read_rows  # noqa: E402
from burnish.algorithms.run.data_files import data_files  # noqa: E402
from burnish.model.errors import InputError  # noqa: E402
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value  # noqa: E402

CALL = {"name": "f", "arguments": {"x": 1}}
TALKS = [
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "n": 1},
    {"messages": [{"role": "assistant", "content": None, "tool_calls": [CALL, {"name": "g"}]}], "n": None},
    {"messages": [], "n": 3},
    {"messages": None, "n": 4},
]


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()


def without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_nulls(field) for name, field in value.items() if field is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def texts(count: int) -> Dataset:
    return Dataset.from_dict({"text": [f"{i}" for i in range(count)]})


def table(**columns: Any) -> Dataset:
    return Dataset(pyarrow.table(columns))


def labels() -> Dataset:
    features = Features({"label": ClassLabel(names=["no", "yes"]), "pair": List(Value("float32"), length=2)})
    return Dataset.from_dict({"label": ["yes", "no"], "pair": [[1.5, 2], [3, 4]]}, features=features)


STRINGS = ["a", None, "a text of more than twelve bytes"]
KINDS = {
    "messages": lambda: Dataset.from_list(TALKS),
    "a class label and a list of two": labels,
    "large strings": lambda: table(x=pyarrow.array(STRINGS, pyarrow.large_string())),
    "string views": lambda: table(x=pyarrow.array(STRINGS, pyarrow.string_view())),
    "string views in lists": lambda: table(
        x=pyarrow.array([STRINGS, [], None], pyarrow.list_(pyarrow.string_view()))
    ),
    "categories": lambda: table(x=pyarrow.array(STRINGS).dictionary_encode()),
    "large lists": lambda: table(x=pyarrow.array([["a"], None], pyarrow.large_list(pyarrow.string()))),
    "JSON": lambda: Dataset.from_list(
        [{"x": {"a": 1}}, {"x": [1, "b"]}, {"x": None}], on_mixed_types="use_json"
    ),
    "selected": lambda: texts(20).select([7, 3, 3, 19]),
    "shuffled": lambda: texts(20).shuffle(seed=1),
    "filtered": lambda: texts(20).filter(lambda row: int(row["text"]) % 3 == 0),
    "sorted": lambda: texts(20).sort("text", reverse=True),
    "mapped": lambda: texts(5).map(lambda row: {"length": len(row["text"])}),
    "joined": lambda: datasets.concatenate_datasets([texts(3), texts(2).shuffle(seed=2)]),
    "formatted": lambda: texts(3).with_format("numpy"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_dataset_is_its_rows(tmp_path, kind):
    dataset = KINDS[kind]()
    dataset.save_to_disk(tmp_path / "saved")
    rows = read_rows(tmp_path / "saved")
    assert rows == [without_nulls(row) for row in list(dataset.with_format(None))]
    assert all(Path(row.where.rpartition(" row ")[0]).is_file() for row in rows)

    # the same rows by other writers of it
    dataset.to_parquet(tmp_path / "rows.parquet")
    assert read_rows(tmp_path / "rows.parquet") == rows


@pytest.mark.parametrize("shards", [2, 3, 7])
def test_shards_are_read_in_their_order(tmp_path, shards):
    texts(7).shuffle(seed=0).save_to_disk(tmp_path / "saved", num_shards=shards)
    assert len(data_files(tmp_path / "saved")) == shards
    assert read_rows(tmp_path / "saved") == list(datasets.load_from_disk(tmp_path / "saved"))


def test_a_dataset_of_several_splits_names_them(tmp_path):
    DatasetDict({"train": texts(3), "test": texts(2)}).save_to_disk(tmp_path / "saved")
    with pytest.raises(
        InputError, match=r"expected one split of this DatasetDict; give one of .*test, .*train"
    ):
        read_rows(tmp_path / "saved")
    assert len(read_rows(tmp_path / "saved" / "train")) == 3


def test_files_of_its_cache_are_read(tmp_path):
    """Those that `load_dataset` leaves in ~/.cache/huggingface."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": f"{i}"}) + "\n" for i in range(9)))
    loaded = datasets.load_dataset(
        "json", data_files=str(tmp_path / "rows.jsonl"), split="train", cache_dir=str(tmp_path / "cache")
    )
    files = [Path(entry["filename"]) for entry in loaded.cache_files]
    assert len(files) == 1 and read_rows(files[0]) == list(loaded)
    assert read_rows(tmp_path / "cache" / "**" / "*.arrow") == list(loaded)


def test_a_saved_dataset_that_lost_bytes_is_refused(tmp_path):
    texts(3000).save_to_disk(tmp_path / "saved")
    (file,) = data_files(tmp_path / "saved")
    whole = file.read_bytes()
    for end in range(0, len(whole), len(whole) // 20):
        file.write_bytes(whole[:end])
        with pytest.raises(InputError, match="not a readable Arrow file"):
            read_rows(tmp_path / "saved")
