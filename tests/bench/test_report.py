"""Generated parts are as their sources, and the generator says what it cannot make."""

import json
import re

import pytest
from burnish.bench import record
from burnish.bench.ops import static
from burnish.bench.publish import pictures, report

ROW = {
    "case": "swiglu/elementwise", "dtype": "bf16", "provider": "burnish", "device_us": [9, 10, 11],
    "eager_us": [19, 20, 21], "floor_us": 8.0, "binds": "bytes", "share": 0.8, "memory_bytes": 1e6, "compile_s": 0.1,
    "accurate": True, "sets": 3, "note": "",
}  # fmt: skip

BUILD = {
    "kernel": "_k", "tile": "BLOCK=64", "registers": 1, "spills": 0, "stack": 0, "shared": 0, "blocks": 1,
    "matrix": 0, "matrix_kind": "", "load_bits": 128, "asynchronous": 0,
}  # fmt: skip


@pytest.fixture
def results(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """One GPU with an old and a new file, three shapes each."""
    monkeypatch.setattr(record, "ROOT", tmp_path)
    monkeypatch.setattr(record, "RESULTS", tmp_path / "bench" / "results")
    monkeypatch.setattr(pictures, "PICTURES", tmp_path / "docs" / "pictures")
    for date, p50 in (("2026-01-01", 99), ("2026-01-02", 10)):
        rows = [
            ROW
            | {
                "dims": {"T": t},
                "pass": which,
                "provider": p,
                "device_us": [p50, p50 * scale, p50 * scale * 1.1],
            }
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


def test_what_is_committed_is_current():
    assert report.stale() == [], "python -m burnish.bench report"


def test_the_newest_file_is_quoted_and_named(results):
    text = report.speed()
    assert "bench/results/gpu-2026-01-02.json" in text and "2026-01-01" not in text
    assert (
        "| `swiglu/elementwise` | T=1 | forward | 10 [10, 11] | 30 | 20 (peer) | 3.00x | 80% | 1 / 1 |"
        in text
    )
    assert "Not measured: x: not installed." in text


def test_the_headline_is_the_largest_shape_with_both_passes(results):
    assert (
        "| `swiglu/elementwise` | T=3 | 10 us, 80% | 2.00x peer | 10 us, 80% | 2.00x peer |"
        in report.headlines()
    )


def test_each_op_has_a_line_with_what_spills(results):
    builds = {f"swiglu/case | T=1 | bf16 | {chip}": [BUILD] for chip in report.CHIPS}
    builds["swiglu/other | T=2 | bf16 | sm_90"] = [BUILD, BUILD | {"kernel": "_k2", "spills": 3}]
    record.write_whole(record.ROOT / "bench" / "static.json", json.dumps({"triton": "3", "builds": builds}))
    assert (
        "| `swiglu` | 2 | 0 of 1 | 0 of 1 | 1 of 2 | 0 of 1 | 0 of 1 | 0 of 1 | no products |"
        in report.proven()
    )


def test_each_op_says_what_is_proven_of_it_on_each_card(results):
    half = BUILD | {"shared": report.CHIPS["sm_90"].shared_block // 2, "spills": 1}
    builds = {"swiglu/case | T=1 | bf16 | sm_90": [half], "geglu/case | T=1 | bf16 | sm_80": [BUILD]}
    record.write_whole(record.ROOT / "bench" / "static.json", json.dumps({"triton": "3", "builds": builds}))
    absent = "not compiled"
    assert f"| `swiglu` | {absent} | {absent} | 1 of 1; 50% | {absent} |" in report.cards()
    assert f"| `geglu` | 0 of 1; 0% | {absent} |" in report.cards()
    assert "found it accurate: nowhere yet" in report.cards()
    for name, chip in (("NVIDIA H200", "sm_90"), ("NVIDIA A100-SXM4-80GB", "sm_80"), ("NVIDIA A10", "sm_86")):
        path = record.RESULTS / "gpu-2026-01-02.json"
        result = json.loads(path.read_text())
        result["machine"]["device"] = name
        record.write_whole(path, json.dumps(result))
        (swiglu,) = [text for text in report.cards().splitlines() if text.startswith("| `swiglu`")]
        cells = swiglu.split(" | ")[1:]
        assert [c for c, cell in zip(report.CARDS, cells, strict=True) if "**run 2026-01-02**" in cell] == [
            chip
        ]


def test_a_run_of_r1_is_kept_quoted_and_drawn(results, tmp_path, monkeypatch: pytest.MonkeyPatch):
    assert report.r1() == report.NO_RUN
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
    assert report.main(["--keep-r1", str(tmp_path / "run")]) == 0
    text = report.r1()
    assert "| base | 18.6 | 5.5 | 0.0 | 15.6 |" in text and "| R1-Zero | 18.6 | 5.5 | 0.0 |  |" in text
    assert "medians of 2 seeds; `burnish r1 --seeds 2` at commit" in text
    picture = (pictures.PICTURES / "r1.svg").read_text()
    assert "R1-Zero" in picture and "AIME 2024" in picture
    assert report.main(["--check"]) == 0


def test_a_stale_part_is_found_and_made_anew(results, tmp_path, monkeypatch: pytest.MonkeyPatch):
    document = tmp_path / "README.md"
    document.write_text("before\n<!-- generated: speed -->\nold\n<!-- /generated -->\nafter\n")
    monkeypatch.setattr(report, "DOCUMENTS", (document,))
    assert "README.md" in report.stale() and len(report.stale()) == 4  # and three pictures
    assert report.main([]) == 0
    assert report.stale() == []
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    for picture in pictures.PICTURES.glob("swiglu*.svg"):
        assert "peer" in picture.read_text()
    assert report.main(["--check"]) == 0


def test_without_a_run_of_the_trainers_the_table_says_so(results):
    assert report.trainers() == "No run is kept in `bench/results` yet.\n"


def test_a_conformance_run_is_quoted_with_what_was_found(results):
    assert report.conformance() == "No run is kept in `bench/results` yet.\n"
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
    text = report.conformance()
    assert "| check | statement | T 1 |" in text and "1. T 1, packing: off by 2" in text
    assert re.search(r"\| packing \| .* \| does not hold \(1\) \|", text)
    assert "of KL(pi \\|\\| ref)" in text  # a bar would end the cell
    assert re.search(r"\| sharding \| .* \| holds \|", text)
    assert record.newest_results().keys() == {"bench/results/gpu-2026-01-02.json"}  # it is no kernel's


def test_an_unknown_part_is_refused():
    with pytest.raises(ValueError, match=r"generated: expected one of .*, got nothing"):
        report.fill("<!-- generated: nothing -->\n<!-- /generated -->")


def test_the_page_holds_the_table_and_the_picture():
    page = static.static_page({"op/case | T=1 | bf16 | sm_90": [BUILD]})
    assert "<td>_k</td>" in page and "<svg" in page and "H100" in page
