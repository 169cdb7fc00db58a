"""A kept file of figures with anything in it is one line that names the file, and status 1."""

import json

import pytest
from burnish.bench import command, record
from burnish.bench.ops import paths, static, tune
from burnish.bench.publish import pictures, report
from burnish.model.errors import InputError
from faults import check_of, control, faults_of
from planted import copy_of

RESULT = {
    "machine": {"device": "GPU", "driver": "1"},
    "date": "2026-01-01",
    "commit": "a",
    "command": "b",
    "ceilings": {},
    "rows": [],
}
ROW = {"case": paths.CASE, "accurate": True, "provider": "eager", "pass": "forward", "dtype": "bf16"}
ANY = (None, True, 3, -1.5, "x\x1b[2J", "y" * 5000, [], [[]], [None], {}, {"a": None}, [{"a": []}])


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch: pytest.MonkeyPatch):
    for name in ("kernels", "bench/results", "docs/pictures"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.setattr(record, "ROOT", tmp_path)
    monkeypatch.setattr(record, "RESULTS", tmp_path / "bench" / "results")
    monkeypatch.setattr(paths, "MODULE", tmp_path / "kernels" / "_lora_paths.py")
    monkeypatch.setattr(pictures, "PICTURES", tmp_path / "docs" / "pictures")
    for draw in ("roofline_picture", "speed_picture", "r1_picture"):
        monkeypatch.setattr(pictures, draw, lambda *_: "<svg/>")
    monkeypatch.setattr(pictures, "headline_works", dict)
    document = tmp_path / "README.md"
    document.write_text("".join(f"<!-- generated: {n} -->\n<!-- /generated -->\n" for n in SECTIONS))
    monkeypatch.setattr(report, "DOCUMENTS", (document,))
    for name in ("static.json", "candidates.json"):
        text = '{"triton": "3", "builds": {}, "entries": {}}'
        (tmp_path / "bench" / name).write_text(text)
    return tmp_path


SECTIONS = (
    "paths",
    "speed",
    "headlines",
    "static",
    "proven",
    "candidates",
    "trainers",
    "conformance",
    "r1",
    "rollouts",
)


def one_line(command, capsys, name: str) -> bool:
    """Whether a command refuses a file; it then names it."""
    capsys.readouterr()
    status, said = command([]), capsys.readouterr().err.strip()
    assert status in (0, 1)
    if status:
        assert name in said and said.isprintable() and len(said) <= 600, f"expected one line, got {said!r}"
    return bool(status)


def write_paths(words: list[str]) -> int:
    return command.main(["paths", *words], plain=True)


BROKEN = {
    "nothing": b"",
    "no UTF-8": b'{"a": "\xff"}',
    "deep": b'{"rows": ' + b"[" * 9999,
    "a list": b"[]",
    "no machine": b"{}",
    "a key twice": b'{"date": 1, "date": 2}',
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_result_is_named(folder, capsys, name):
    (folder / "bench" / "results" / "gpu-1.json").write_bytes(BROKEN[name])
    assert one_line(write_paths, capsys, "gpu-1.json") and one_line(report.main, capsys, "gpu-1.json")
    assert not paths.MODULE.exists()


def changed(result: dict) -> list[dict]:
    """The result without each of its keys, and with anything under it."""
    without = [{k: v for k, v in result.items() if k != name} for name in result]
    return without + [result | {name: value} for name in result for value in ANY]


def test_any_value_of_a_result_is_taken_or_named(folder, capsys):
    file = folder / "bench" / "results" / "gpu-1.json"
    results = changed(RESULT) + [RESULT | {"rows": [row]} for row in changed(ROW)]
    results += [RESULT | {"machine": machine} for machine in changed(RESULT["machine"])]
    refused = 0
    for result in results:
        file.write_text(json.dumps(result))
        refused += one_line(write_paths, capsys, "gpu-1.json")
        refused += one_line(report.main, capsys, "gpu-1.json")
    assert refused > len(results) / 2


KINDS = [
    "trainers",
    *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("conformance", "r1", "rollouts")),
]
KINDS += [pytest.param("gpu-rollouts", marks=pytest.mark.slow), "tune-sm_90"]


@pytest.mark.parametrize("kind", KINDS)
def test_any_value_of_a_run_is_taken_or_named(folder, capsys, kind):
    name, run = (
        f"{kind}-2026-01-01.json",
        {"kind": kind, **RESULT, "trainers": [], "scores": {}, "curves": []},
    )
    for value in ({}, run, *[run | {key: value} for key in run for value in ANY]):
        (folder / "bench" / "results" / name).write_text(json.dumps({"kind": kind} | value))
        one_line(report.main, capsys, name)


@pytest.mark.parametrize(("name", "part"), [("static.json", "builds"), ("candidates.json", "entries")])
def test_any_value_of_what_is_accepted_is_taken_or_named(folder, monkeypatch, capsys, name, part):
    file, module = folder / "bench" / name, static if part == "builds" else tune
    monkeypatch.setattr(static, "BASELINE", folder / "bench" / "static.json")
    monkeypatch.setattr(tune, "KEPT", folder / "bench" / "candidates.json")
    read = static.accepted_figures if module is static else tune.kept
    for value in (*ANY, {"a | b | bf16 | sm_90": [{}]}, {"a | b | sm_90": [{"tile": 3}]}):
        file.write_text(json.dumps({"triton": "3", part: value}))
        one_line(report.main, capsys, name)
        one_line(record.as_command(lambda _, read=read: len(read()) * 0), capsys, name)


def test_figures_of_r1_are_named(folder, capsys):
    for text in ("", "[]", "{}", '{"seeds": "x"}', '{"seeds": null}'):
        (folder / "figures.json").write_text(text)
        assert report.main(["--keep-r1", str(folder)]) == 1
        assert "figures.json" in capsys.readouterr().err


@control
def a_missing_key_is_named(module, folder, capsys) -> None:
    (folder / "bench" / "results" / "gpu-1.json").write_text("{}")
    with pytest.raises(InputError, match=r"gpu-1\.json"):
        module.main(module.Config())


def test_a_planted_fault_is_caught(folder, tmp_path, monkeypatch, capsys):
    """Without the block that names the file, a missing key is a KeyError."""
    (fault,) = faults_of(__file__)
    module = copy_of(fault.file, tmp_path, monkeypatch, fault)
    module.MODULE = paths.MODULE
    (folder / "bench" / "results" / "gpu-1.json").write_text(
        json.dumps({"machine": {"device": "GPU"}, "date": 1})
    )
    module.main(module.Config())
    with pytest.raises(KeyError):
        check_of(fault)(module, folder, capsys)
    a_missing_key_is_named(paths, folder, capsys)
