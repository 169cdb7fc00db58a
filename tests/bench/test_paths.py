"""The table of lora_linear's paths is made from measurements, names them, and is what the op goes by."""

import json

import pytest
import torch
from burnish.bench import record
from burnish.bench.cases.registry import CASES
from burnish.bench.ops import paths
from burnish.kernels import _lora_paths, lora

SHAPE = {"T": 8192, "C": 4096, "F": 14336, "R": 16}
BOTH = ("forward", "forward+backward")


def times(p50: float, spread: float = 0.1) -> list[float]:
    return [p50 - spread, p50, p50 + spread]


def write_results(name: str, date: str, rows: list[dict], **machine) -> None:
    result = {
        "machine": {"device": "GPU", "driver": "1"} | machine,
        "date": date,
        "commit": "abc",
        "rows": rows,
    }
    record.write_whole(record.RESULTS / name, json.dumps(result))


def rows(forward: dict[str, float], with_backward: dict[str, float], dims=SHAPE, **changes) -> list[dict]:
    row = {
        "case": "lora_linear/dense",
        "dtype": "bf16",
        "dims": dims,
        "accurate": True,
        "eager_us": [1, 1, 1],
    }
    return [
        row | {"pass": which, "provider": provider, "device_us": times(p50)} | changes.get(provider, {})
        for which, each in zip(BOTH, (forward, with_backward), strict=True)
        for provider, p50 in each.items()
    ]


EQUAL = {"burnish": 10.0, "eager": 10, "burnish, cublas": 10, "burnish, epilogue": 10, "burnish, fused": 10}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "kernels").mkdir()
    monkeypatch.setattr(record, "ROOT", tmp_path)
    monkeypatch.setattr(record, "RESULTS", tmp_path / "bench" / "results")
    monkeypatch.setattr(paths, "MODULE", tmp_path / "kernels" / "_lora_paths.py")
    return tmp_path


def written() -> dict:
    """The names of kernels/_lora_paths.py after the command has run."""
    assert paths.main(paths.Config()) == 0
    names: dict = {}
    exec(paths.MODULE.read_text(), names)
    assert paths.main(paths.Config(check=True)) == 0
    return names


def test_what_is_committed_is_current(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()
    assert paths.main(paths.Config(check=True)) == 0, "burnish bench paths"


def test_without_measurements_every_device_takes_the_baselines_own_calls(capsys):
    names = written()
    assert names["PATHS"] == names["SOURCES"] == {} and "Nothing has been measured yet" in names["__doc__"]
    assert paths.table() == "No device has been measured yet: all take `cublas`.\n"
    paths.MODULE.write_text("old")
    assert (
        paths.main(paths.Config(check=True)) == 1
        and "stale: kernels/_lora_paths.py" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("forward", "with_backward", "taken"),
    [
        ({}, {}, "cublas"),
        ({"burnish, fused": 9}, {"burnish, fused": 9}, "fused"),
        ({"burnish, fused": 9}, {"burnish, fused": 11}, "cublas"),  # a gain forward alone
        ({"burnish, fused": 11}, {"burnish, fused": 9}, "cublas"),
        ({"burnish, fused": 9.85}, {"burnish, fused": 9.85}, "cublas"),  # its p80 is not below their p20
        (
            {"burnish, fused": 9, "burnish, epilogue": 9},
            {"burnish, fused": 9, "burnish, epilogue": 8},
            "epilogue",
        ),
        (
            {"burnish, fused": 9, "eager": 8},
            {"burnish, fused": 9, "eager": 8},
            "cublas",
        ),  # F.linear + addmm is faster
    ],
)
def test_a_path_is_taken_where_it_is_faster_in_both_passes(forward, with_backward, taken):
    write_results("gpu.json", "2026-01-01", rows(EQUAL | forward, EQUAL | with_backward))
    assert written()["PATHS"] == {("GPU", "bfloat16", 8192, 14336, 4096, 16): taken}
    cells = [f"{(EQUAL | with_backward)[name]:.4g}" for name in EQUAL if name != "burnish"]
    assert f"| bfloat16 | 8192 | 14336 | 4096 | 16 | {' | '.join(cells)} | `{taken}` |" in paths.table()


def test_a_path_outside_of_the_accuracy_rule_is_not_taken():
    fast = EQUAL | {"burnish, fused": 5}
    write_results("gpu.json", "2026-01-01", rows(fast, fast, **{"burnish, fused": {"accurate": False}}))
    assert list(written()["PATHS"].values()) == ["cublas"]
    assert "| not accurate | `cublas` |" in paths.table()


def test_the_newest_file_of_each_device_that_timed_the_paths_is_read_and_named():
    fast = EQUAL | {"burnish, fused": 5}
    write_results("gpu-1.json", "2026-01-01", rows(EQUAL, EQUAL))
    write_results("gpu-2.json", "2026-01-02", rows(fast, fast))
    write_results("gpu-3.json", "2026-01-03", rows({"eager": 1, "burnish": 1}, {"eager": 1, "burnish": 1}))
    write_results("other.json", "2026-01-01", rows(EQUAL, EQUAL), device="other GPU")
    write_results("cpu.json", "2026-01-04", rows(fast, fast), device="CPU", driver=None)
    file = record.RESULTS / "cpu.json"
    file.write_text(file.read_text().replace('"driver": null, ', "").replace(', "driver": null', ""))
    names = written()
    assert names["SOURCES"] == {
        "GPU": "bench/results/gpu-2.json, commit abc, 2026-01-02",
        "other GPU": "bench/results/other.json, commit abc, 2026-01-01",
    }
    assert {key[0]: path for key, path in names["PATHS"].items()} == {"GPU": "fused", "other GPU": "cublas"}
    assert "GPU, from `bench/results/gpu-2.json, commit abc, 2026-01-02`" in paths.table()


def test_the_op_goes_by_what_was_written(monkeypatch: pytest.MonkeyPatch):
    fast = EQUAL | {"burnish, epilogue": 5}
    write_results("gpu.json", "2026-01-02", rows(fast, fast, dims={"T": 32, "C": 33, "F": 21, "R": 4}))
    monkeypatch.setattr(_lora_paths, "PATHS", written()["PATHS"])
    x = torch.zeros(40, 33, dtype=torch.bfloat16)
    assert lora._measured_path(x, (21, 4)) == "cublas"
    monkeypatch.setattr(lora, "device_name", lambda _: "GPU")
    assert lora._measured_path(x, (21, 4)) == "epilogue"


def test_rows_are_powers_of_two_as_the_op_rounds_them():
    """Else a shape that is benchmarked would be looked up as another."""
    (case,) = (c for c in CASES if c.name == paths.CASE)
    assert all(dims["T"].bit_count() == 1 for dims in case.bench["cuda"])
