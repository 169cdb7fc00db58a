"""A kept file of figures with anything in it is one line that names the file, and status 1."""

import json
from importlib import import_module

import pytest
from burnish.algorithms.run.command import status_of
from burnish.bench import command, record
from burnish.bench.ops import paths, static, tune
from burnish.bench.publish import drawings, pictures, report
from burnish.bench.publish.report import Config
from burnish.model.errors import InputError
from faults import check_of, control, faults_of
from matplotlib.figure import Figure
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

    for draw in ("roofline_figure", "speed_figure", "r1_figure"):
        monkeypatch.setattr(drawings, draw, lambda *_: Figure())
    for module in (report, pictures.sheet):
        monkeypatch.setattr(module, "svg", lambda _: "<svg/>")
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


def one_line(run, capsys, name: str) -> bool:
    """Whether a command refuses a file, which it then names: a command's name, or a function that reads the file."""
    capsys.readouterr()
    status = command.main([run], plain=True) if isinstance(run, str) else status_of("reading", run)
    found = capsys.readouterr().err.strip()
    assert status in (0, 1)
    if status:
        assert name in found and found.isprintable() and len(found) <= 600, (
            f"expected one line, got {found!r}"
        )
    return bool(status)


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
    assert one_line("paths", capsys, "gpu-1.json") and one_line("report", capsys, "gpu-1.json")
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
        refused += one_line("paths", capsys, "gpu-1.json")
        refused += one_line("report", capsys, "gpu-1.json")
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
        one_line("report", capsys, name)


@pytest.mark.parametrize(("name", "part"), [("static.json", "builds"), ("candidates.json", "entries")])
def test_any_value_of_what_is_accepted_is_taken_or_named(folder, monkeypatch, capsys, name, part):
    file, module = folder / "bench" / name, static if part == "builds" else tune
    monkeypatch.setattr(static, "BASELINE", folder / "bench" / "static.json")
    monkeypatch.setattr(tune, "KEPT", folder / "bench" / "candidates.json")
    read = static.accepted_figures if module is static else tune.kept
    for value in (*ANY, {"a | b | bf16 | sm_90": [{}]}, {"a | b | sm_90": [{"tile": 3}]}):
        file.write_text(json.dumps({"triton": "3", part: value}))
        one_line("report", capsys, name)
        one_line(lambda read=read: len(read()) * 0, capsys, name)


def test_any_figures_of_a_page_are_taken_or_named(folder, capsys):
    file, key = folder / "figures.json", "op/case | T=1 | bf16 | sm_90"
    pages = [{}, *({"triton": "3", "builds": value} for value in ANY)]
    pages += [{"triton": "3", "builds": {key: value}} for value in ANY]
    for page in pages:
        file.write_text(json.dumps(page))
        config = Config(html=folder / "page.html", figures=file)
        one_line(lambda config=config: report.main(config), capsys, "figures.json")


def test_figures_of_r1_are_named(folder):
    for text in ("", "[]", "{}", '{"seeds": "x"}', '{"seeds": null}'):
        (folder / "figures.json").write_text(text)
        with pytest.raises(InputError, match=r"figures\.json"):
            report.main(Config(keep_r1=folder))


# ---- planted faults: without the block that names the file, a missing key is a KeyError


@control
def paths_name_a_file(module, folder) -> None:
    (folder / "bench" / "results" / "gpu-1.json").write_text("{}")
    with pytest.raises(InputError, match=r"gpu-1\.json"):
        module.main(module.Config())


@control
def sources_name_a_file(module, folder) -> None:
    figures = {"machine": {"device": "GPU"}, "date": 1}
    (folder / "bench" / "results" / "gpu-1.json").write_text(json.dumps(figures))
    with pytest.raises(InputError, match=r"gpu-1\.json"):
        module.of_machines(lambda _, result: result["rows"])


@pytest.mark.parametrize("fault", faults_of(__file__), ids=lambda fault: fault.id)
def test_a_planted_fault_is_caught(fault, folder, tmp_path, monkeypatch):
    module = import_module(f"burnish.{fault.file.replace('/', '.')}")
    check_of(fault)(module, folder)
    copy = copy_of(fault.file, tmp_path, monkeypatch, fault)
    if module is paths:
        copy.MODULE = paths.MODULE  # that of the test's folder
    with pytest.raises(KeyError):
        check_of(fault)(copy, folder)
