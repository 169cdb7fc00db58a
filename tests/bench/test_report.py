"""Generated parts are as their sources, and the generator says what it cannot make."""

import csv
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from burnish.bench import command, record
from burnish.bench.publish import highlights, pictures, proofs, report, times, whole_runs
from burnish.bench.publish.report import Config
from matplotlib.text import Text

ROW = {
    "case": "swiglu/elementwise",
    "dtype": "bf16",
    "provider": "burnish",
    "device_us": [9, 10, 11],
    "eager_us": [19, 20, 21],
    "floor_us": 8.0,
    "binds": "bytes",
    "share": 0.8,
    "memory_bytes": 1e6,
    "compile_s": 0.1,
    "accurate": True,
    "sets": 3,
    "note": "",
}

BUILD = {
    "kernel": "_k",
    "tile": "BLOCK=64",
    "registers": 1,
    "spills": 0,
    "stack": 0,
    "shared": 0,
    "blocks": 1,
    "matrix": 0,
    "matrix_kind": "",
    "load_bits": 128,
    "asynchronous": 0,
    "instructions": 9,
    "exponentials": 0,
    "overlapped": 0,
    "stores": 1,
    "source_stores": 1,
}
BUILDS = {
    "op/case | T=1 | bf16 | sm_90": [BUILD],
    "other/case | T=1 | bf16 | sm_90": [BUILD, BUILD | {"spills": 3}],
}


def keep_builds(builds: dict) -> Path:
    file = record.ROOT / "bench" / "static.json"
    record.write_whole(file, json.dumps({"triton": "3", "builds": builds}))
    return file


@pytest.fixture
def results(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """One GPU with an old and a new file, three shapes each."""
    monkeypatch.setattr(record, "ROOT", tmp_path)
    monkeypatch.setattr(record, "RESULTS", tmp_path / "bench" / "results")
    monkeypatch.setattr(pictures, "PICTURES", tmp_path / "docs" / "pictures")

    for date, p50 in (("2026-01-01", 99), ("2026-01-02", 10)):
        times_of = lambda scale, p50=p50: {"device_us": [p50, p50 * scale, p50 * scale * 1.1]}
        rows = [
            ROW | {"dims": {"T": t}, "pass": which, "provider": p} | times_of(scale)
            for t in (1, 2, 3)
            for which in ("forward", "forward+backward")
            for p, scale in (("burnish", 1), ("eager", 3), ("peer", 2))
        ]

        machine = {"device": "GPU", "torch": "2", "triton": "3", "driver": "1"}
        result = {"machine": machine, "date": date, "commit": "abc", "command": "run", "rows": rows}
        result |= {
            "ceilings": {"bandwidth_bytes_per_s": 3e12, "rate_per_s": 8e14, "dtype": "bf16"},
            "absent": {"x": "not installed"},
        }
        record.write_whole(record.RESULTS / f"gpu-{date}.json", json.dumps(result))
    keep_builds(BUILDS)


def test_what_is_committed_is_current():
    assert report.stale() == [], "burnish bench report"


def test_the_newest_file_is_quoted_and_named(results):
    text = times.speed()
    assert "bench/results/gpu-2026-01-02.json" in text and "2026-01-01" not in text
    assert (
        "| `swiglu/elementwise` | T=1 | forward | 10 [10, 11] | 30 | 20 (peer) | 3.00x | 80% | 1 / 1 |"
        in text
    )
    assert "Not measured: x: not installed." in text


def test_the_headline_is_the_largest_shape_with_both_passes(results):
    assert (
        "| `swiglu/elementwise` | T=3 | 10 us, 80% | 2.00x peer | 10 us, 80% | 2.00x peer |"
        in times.headlines()
    )


def test_a_faster_peer_outside_the_accuracy_rule_is_named(results):
    """The figure of README is over the fastest accurate peer; one that was left out for its errors stands beside it."""
    file = record.RESULTS / "gpu-2026-01-02.json"
    result = json.loads(file.read_text())
    shared = {"case": highlights.SHARED, "dims": {"T": 100, "P": 20, "R": 5}, "pass": "forward"}
    causal = {"case": "flash_attention/causal", "dims": {"T": 4000}, "pass": "forward"}
    timed = {"burnish": (10, True), "slow": (50, True), "wrong": (30, False), "slow and wrong": (90, False)}
    for of in (shared, causal):
        for provider, (p50, accurate) in timed.items():
            row = {"provider": provider, "accurate": accurate, "device_us": [p50, p50, p50]}
            result["rows"].append(ROW | of | row)
    file.write_text(json.dumps(result))

    text = highlights.highlights()
    assert "| attention of 16 answers of 5 tokens to one prompt of 20, " in text
    assert "| 5.0x forward; wrong, outside the accuracy rule: 3.0x forward | GPU, 2026-01-02 |" in text
    assert (
        "4,000 tokens took 0.20x as long as slow forward. The figures of the GPU are of the kernels at"
        in text
    )
    assert "Timed, but outside the accuracy rule" in times.speed() and "wrong at `flash" in times.speed()


def test_each_op_has_a_line_with_what_spills(results):
    builds = {f"swiglu/case | T=1 | bf16 | {chip}": [BUILD] for chip in proofs.CHIPS}
    builds["swiglu/other | T=2 | bf16 | sm_90"] = [BUILD, BUILD | {"kernel": "_k2", "spills": 3}]
    keep_builds(builds)
    assert (
        "| `swiglu` | 2 | 0 of 1 | 0 of 1 | 1 of 2 | 0 of 1 | 0 of 1 | 0 of 1 | no products |"
        in proofs.proven()
    )


def test_each_op_says_what_is_proven_of_it_on_each_card(results):
    half = BUILD | {"shared": proofs.CHIPS["sm_90"].shared_block // 2, "spills": 1}
    builds = {"swiglu/case | T=1 | bf16 | sm_90": [half], "geglu/case | T=1 | bf16 | sm_80": [BUILD]}
    keep_builds(builds)
    absent = "not compiled"
    assert f"| `swiglu` | {absent} | {absent} | 1 of 1; 50%; compiled only | {absent} |" in proofs.cards()
    assert f"| `geglu` | 0 of 1; 0%; compiled only | {absent} |" in proofs.cards()
    assert "Runs: none yet." in proofs.cards()

    for name, chip, card in (
        ("NVIDIA H200", "sm_90", "H200"),
        ("NVIDIA A100-SXM4-80GB", "sm_80", "A100"),
        ("NVIDIA A10", "sm_86", "A10"),
    ):
        path = record.RESULTS / "gpu-2026-01-02.json"
        result = json.loads(path.read_text())
        result["machine"]["device"] = name
        record.write_whole(path, json.dumps(result))
        (swiglu,) = [text for text in proofs.cards().splitlines() if text.startswith("| `swiglu`")]
        cells = dict(zip(proofs.CARDS, swiglu.removesuffix(" |").split(" | ")[1:], strict=True))
        ran = {c: cell for c, cell in cells.items() if "run on" in cell}
        built = "1 of 1; 50%" if chip == "sm_90" else absent
        assert ran == {chip: f"{built}; run on {card}, 2026-01-02"}
        assert cells["sm_90"].endswith("compiled only") == (chip != "sm_90")


def test_candidates_name_the_command_that_times_them(results):
    record.write_whole(record.ROOT / "bench" / "candidates.json", json.dumps({"triton": "3", "entries": {}}))
    untimed = "`burnish bench tune` has not timed the candidates on a GPU yet."
    assert proofs.candidates().startswith(f"From `bench/candidates.json`, Triton 3, bf16. {untimed}\n")

    run = {"machine": {"device": "NVIDIA H100"}, "rows": []}
    record.write_whole(record.RESULTS / "tune-sm_90-2026-01-02.json", json.dumps({"kind": "tune"} | run))
    timed = "`burnish bench tune` has timed candidates on NVIDIA H100 from `bench/results/tune-sm_90-2026-01-02.json`."
    assert timed in proofs.candidates()


def test_a_run_of_r1_is_kept_quoted_and_drawn(results, tmp_path, monkeypatch: pytest.MonkeyPatch):
    assert whole_runs.r1() == whole_runs.NO_RUN
    score = {"pass_at_1": 18.6, "majority": 5.5, "greedy": 0.0, "form": 99.9, "published": 15.6}
    figures = {
        "seeds": 2,
        "seconds": 9,
        "scores": {"base": score, "R1-Zero": score | {"published": None}},
        "curves": [{"zero": [0.1, 0.5]}, {"zero": [0.2, 0.6]}],
    }

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "figures.json").write_text(json.dumps(figures))
    monkeypatch.setattr(report, "DOCUMENTS", ())
    assert report.main(Config(keep_r1=tmp_path / "run")) == 0
    text = whole_runs.r1()
    assert "| base | 18.6 | 5.5 | 0.0 | 15.6 |" in text and "| R1-Zero | 18.6 | 5.5 | 0.0 |  |" in text
    assert "medians of 2 seeds; `burnish r1 --seeds 2` at commit" in text
    picture = (pictures.PICTURES / "r1.svg").read_text()
    assert "R1-Zero" in picture and "AIME 2024" in picture
    assert report.main(Config(check=True)) == 0


def test_a_stale_part_is_found_and_made_anew(results, tmp_path, monkeypatch: pytest.MonkeyPatch):
    document = tmp_path / "README.md"
    document.write_text("before\n<!-- generated: speed -->\nold\n<!-- /generated -->\nafter\n")
    monkeypatch.setattr(report, "DOCUMENTS", (document,))
    swiglu = [f"docs/pictures/swiglu-elementwise-{which}.svg" for which in ("forward", "forward-backward")]
    assert report.stale() == ["README.md", "docs/data/static.csv", "docs/pictures/roofline.svg", *swiglu]
    assert report.main(Config()) == 0
    assert report.stale() == []
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    for picture in pictures.PICTURES.glob("swiglu*.svg"):
        assert "peer" in picture.read_text()
    assert report.main(Config(check=True)) == 0


def test_without_a_run_of_the_trainers_the_table_says_so(results):
    assert whole_runs.trainers() == "No run is kept in `bench/results` yet.\n"


def test_a_conformance_run_is_quoted_with_what_was_found(results):
    assert whole_runs.conformance() == "No run is kept in `bench/results` yet.\n"
    outcomes = {"packing": ["does not hold", "off by 2"], "sharding": ["holds", ""]}
    trainer = {"name": "T", "version": "1", "outcomes": outcomes}
    result = {
        "kind": "conformance",
        "commit": "abc",
        "date": "2026-01-03",
        "command": "run",
        "trainers": [trainer],
    }
    record.write_whole(record.RESULTS / "conformance-2026-01-03.json", json.dumps(result))

    text = whole_runs.conformance()
    assert "| check | statement | T 1 |" in text and "1. T 1, packing: off by 2" in text
    assert re.search(r"\| packing \| .* \| does not hold \(1\) \|", text)
    assert "of KL(pi \\|\\| ref)" in text  # a bar would end the cell
    assert re.search(r"\| sharding \| .* \| holds \|", text)
    assert record.newest_results().keys() == {"bench/results/gpu-2026-01-02.json"}  # it is no kernel's


def test_an_unknown_part_is_refused():
    with pytest.raises(ValueError, match=r"generated: expected one of .*, got nothing"):
        report.fill("<!-- generated: nothing -->\n<!-- /generated -->")


# ---- every build


def test_the_data_file_holds_every_distinct_build():
    accepted = json.loads((record.ROOT / "bench" / "static.json").read_text())["builds"]
    expected: dict[frozenset, set[str]] = {}
    for key, builds in accepted.items():
        case, _, dtype, chip = key.split(" | ")
        for build in builds:
            line = {name: str(value) for name, value in build.items()} | {"chip": chip, "dtype": dtype}
            assert {*line, "ops"} == set(proofs.COLUMNS)
            expected.setdefault(frozenset(line.items()), set()).add(case.split("/")[0])

    with (record.ROOT / "docs" / "data" / "static.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert tuple(lines[0]) == proofs.COLUMNS and len(lines) == len(expected) > 1000
    assert all(
        expected[frozenset(line.items())] == set(ops.split()) for line in lines for ops in [line.pop("ops")]
    )


def test_a_build_of_several_ops_is_one_line(results):
    lines = list(csv.DictReader(io.StringIO(proofs.static_csv())))
    assert [(line["ops"], line["spills"]) for line in lines] == [("op other", "0"), ("other", "3")]
    assert "line for each of 2 distinct builds" in proofs.static()


def test_a_changed_figure_is_stale(results, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(report, "DOCUMENTS", ())
    assert report.main(Config()) == 0 and report.main(Config(check=True)) == 0
    for name in BUILD:
        changed = BUILD | {name: "other" if isinstance(BUILD[name], str) else BUILD[name] + 1}
        keep_builds(BUILDS | {"op/case | T=1 | bf16 | sm_90": [changed]})
        capsys.readouterr()
        assert report.main(Config(check=True)) == 1
        assert capsys.readouterr().err == "stale: docs/data/static.csv\n"
    keep_builds(BUILDS)
    assert report.main(Config(check=True)) == 0


def test_a_changed_figure_or_roof_or_drawing_is_another_picture(results, monkeypatch: pytest.MonkeyPatch):
    before = {picture.path.stem: picture.stamp for picture in pictures.pictures()}
    file = record.RESULTS / "gpu-2026-01-02.json"
    file.write_text(file.read_text().replace("0.8", "0.7", 1))
    after = {picture.path.stem: picture.stamp for picture in pictures.pictures()}
    assert [name for name in before if before[name] != after[name]] == ["swiglu-elementwise-forward"]

    monkeypatch.setitem(pictures.CHIPS, "sm_80", pictures.CHIPS["sm_90"])
    assert pictures.roofline().stamp != before["roofline"]
    monkeypatch.setattr(pictures, "CODE", [b"another"])
    assert not {picture.stamp for picture in pictures.pictures()} & set(after.values())


def test_rows_may_have_further_keys(results):
    def made() -> list[str]:
        drawn = [picture.draw().findobj(Text) for picture in pictures.pictures()]
        words = [text.get_text() for texts in drawn for text in texts if isinstance(text, Text)]
        return [times.speed(), times.headlines(), *words]

    before = made()
    file = record.RESULTS / "gpu-2026-01-02.json"
    result = json.loads(file.read_text())
    of_rounds = {"device": [[1, 2, 3]], "eager": [[1, 2, 3]]}
    for row in result["rows"]:
        row |= {"rounds_us": of_rounds, "ratio": {"eager": [1, 2, 3]}, "x": None}
    file.write_text(json.dumps(result))
    assert made() == before


# ---- the page


def test_the_page_holds_the_table_and_the_picture(results, tmp_path):
    assert command.main(["report", "--html", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "<td>_k</td>" in page and "<svg" in page and "H100" in page and "2 distinct builds" in page
    assert page.count("<tr>") == 3 and page.count("<button>") == len(proofs.COLUMNS)
    assert "prefers-color-scheme: dark" in page and "width=device-width" in page
    assert not re.search(r"(src|href)=", page.replace("xlink:href", "")) and "<?xml" not in page
    assert not (tmp_path / "docs").exists()


def test_the_page_takes_another_file_of_figures(results, tmp_path):
    file = tmp_path / "figures.json"
    kernel = BUILD | {"kernel": "<script>"}
    file.write_text(json.dumps({"triton": "4", "builds": {"op/case | T=1 | fp32 | sm_80": [kernel]}}))
    assert report.main(Config(html=tmp_path / "page.html", figures=file)) == 0
    page = (tmp_path / "page.html").read_text()
    assert "<td>&lt;script&gt;</td>" in page and "Triton 4" in page and "<td>_k</td>" not in page


@pytest.mark.parametrize(
    "words", ["--figures a.json", "--html a.html --check", "--html a.html --keep-r1 run"]
)
def test_flags_that_would_be_ignored_are_refused(results, capsys, words):
    assert command.main(["report", *words.split()]) == 1
    assert re.search(r"report: --(figures|html): expected it (beside|without) --", capsys.readouterr().err)


# ---- a machine with torch, triton and numpy alone

WITHOUT = """
import sys
from pathlib import Path
for name in sys.argv[2].split(): sys.modules[name] = None
from burnish.bench import command, record
from burnish.bench.publish import highlights, pictures, report
record.ROOT = root = Path(sys.argv[1])
record.RESULTS, pictures.PICTURES = root / "bench" / "results", root / "docs" / "pictures"
report.DOCUMENTS = (root / "README.md",)
print(*(command.main(["report", *words.split()], plain=True) for words in sys.argv[3:]))
"""


def without(missing: str, folder: Path, *commands: str) -> tuple[list[int], list[str]]:
    """The statuses of commands in a process that has not these packages, and the lines of their messages."""
    program = [sys.executable, "-c", WITHOUT, str(folder), missing, *commands]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    messages = [
        line.removeprefix("python -m burnish.bench report: ") for line in done.stderr.splitlines() if line
    ]
    return [int(status) for status in done.stdout.split()], messages


@pytest.mark.slow
def test_without_matplotlib_tables_are_made_and_a_sentence_says_what_pictures_need(
    results, tmp_path, monkeypatch: pytest.MonkeyPatch
):
    document, page = tmp_path / "README.md", tmp_path / "page.html"
    document.write_text("<!-- generated: speed -->\n<!-- /generated -->\n")
    statuses, messages = without("matplotlib tyro jinja2", tmp_path, "", "--check", f"--html {page}")
    assert statuses == [1, 1, 1] and messages == [
        "pictures need the package matplotlib, which is not installed: pip install matplotlib",
        "stale: docs/pictures/roofline.svg",
        "stale: docs/pictures/swiglu-elementwise-forward.svg",
        "stale: docs/pictures/swiglu-elementwise-forward-backward.svg",
        "the page needs the package jinja2, which is not installed: pip install jinja2",
    ]
    assert "20 (peer)" in document.read_text() and (tmp_path / "docs" / "data" / "static.csv").exists()
    assert not page.exists()

    monkeypatch.setattr(report, "DOCUMENTS", (document,))
    assert report.main(Config()) == 0  # with matplotlib
    assert without("matplotlib tyro jinja2", tmp_path, "--check") == ([0], [])


def test_without_what_a_table_or_a_page_imports_a_sentence_says_so(results, tmp_path):
    (tmp_path / "README.md").write_text("<!-- generated: conformance -->\n<!-- /generated -->\n")
    run = {"kind": "conformance", "commit": "a", "date": "b", "command": "c", "trainers": []}
    (record.RESULTS / "conformance-2026-01-03.json").write_text(json.dumps(run))
    statuses, messages = without("tokenizers matplotlib", tmp_path, "", f"--html {tmp_path / 'page.html'}")
    assert statuses == [1, 1] and messages == [
        "the conformance checks need tokenizers, which is not installed: pip install tokenizers",
        "pictures need the package matplotlib, which is not installed: pip install matplotlib",
    ]
    assert not (tmp_path / "page.html").exists()
