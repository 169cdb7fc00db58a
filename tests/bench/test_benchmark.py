"""The benchmark's own honesty, on a case small enough to time in a test."""

import csv
import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from burnish.bench import record
from burnish.bench.cases.case import Work, assert_accurate, make_inputs
from burnish.bench.cases.registry import CASES
from burnish.bench.ops import clocks, contest, roofline, speed
from burnish.bench.ops.output import print_rows
from burnish.bench.ops.peers import PEERS, Unsuitable
from burnish.bench.ops.speed import Config, main
from burnish.kernels._chip import INTERPRET

pytestmark = pytest.mark.skipif(INTERPRET, reason="interpreted kernels have no speed")

CASE = next(c for c in CASES if c.name == "swiglu/elementwise")
SMALL = replace(
    CASE, bench={d: ({"B": 1, "T": 8, "F": 64}, {"B": 1, "T": 16, "F": 64}) for d in ("cpu", "cuda")}
)
PEERS_SHAPES = {
    "flash_attention/shared prompt": {"T": 31, "P": 13, "R": 9, "H": 2, "G": 1, "D": 16},  # whole completions
    "moe_mlp/swiglu": {"T": 19, "C": 32, "F": 16, "E": 3, "K": 2},  # grouped_mm: rows of 16 bytes
}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(speed, "CASES", (SMALL,))
    monkeypatch.setattr(contest, "PEERS", {})
    monkeypatch.setattr(contest, "SLICE", 1e-4)
    monkeypatch.setattr(roofline, "measure", lambda device, dtype: roofline.Ceilings(1e10, 1e11))


def test_a_run_is_written_whole(tmp_path, capsys):
    path = tmp_path / "result.json"
    assert main(Config(ops=("swiglu",), json=path)) == 0
    report = json.loads(path.read_text())
    assert {
        "machine",
        "date",
        "commit",
        "command",
        "ceilings",
        "clocks_before",
        "clocks_after",
    } <= report.keys()
    assert report["machine"]["torch"] == torch.__version__ and "swiglu" in report["command"]

    assert len(report["rows"]) == 2 * 2 * 2  # shapes, passes, contestants
    for row in report["rows"]:
        p20, p50, p80 = row["eager_us"]
        assert 0 < p20 <= p50 <= p80
        assert row["share"] == pytest.approx(
            row["floor_us"] / (row["device_us"] or row["eager_us"])[1], abs=1e-3
        )

    forward = next(r for r in report["rows"] if r["pass"] == "forward" and r["provider"] == "burnish")
    assert forward["floor_us"] == pytest.approx(
        3 * 8 * 64 * torch.finfo(speed.DTYPES[forward["dtype"]]).bits / 8 / 1e4, abs=0.01
    )
    assert "share" in capsys.readouterr().out
    assert not [*path.parent.glob(".*")]


def test_a_red_case_is_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path):
    wrong = replace(SMALL, fused=lambda gate, up: CASE.fused(gate, up) * 1.01)
    monkeypatch.setattr(speed, "CASES", (wrong,))
    assert main(Config(json=tmp_path / "r.json")) == 1
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["rows"] == [] and "output 0" in report["red"][0]


def test_peers_that_are_absent_or_wrong_are_shown(monkeypatch: pytest.MonkeyPatch, tmp_path, capsys):
    def missing(case):
        raise ImportError

    peers = {"missing": missing, "wrong": lambda case: lambda gate, up: CASE.eager(gate, up) * 1.01}
    monkeypatch.setattr(contest, "PEERS", {"swiglu": peers})
    assert main(Config(peers=True, json=tmp_path / "r.json")) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["absent"] == {"missing": "not installed"}
    assert {r["accurate"] for r in report["rows"] if r["provider"] == "wrong"} == {False}
    assert "outside the accuracy rule" in capsys.readouterr().out


@pytest.mark.parametrize("op, name", [(op, name) for op, peers in PEERS.items() for name in peers])
def test_a_peer_computes_what_the_op_does(op: str, name: str, device: str):
    """On a CPU those that have a path for one; they are held to the rule that the op is held to."""
    if name in ("torch.compile", "flex_attention") and device == "cpu":
        pytest.skip("compiled C++ takes longer than this test may")

    ran = 0
    for case in (c for c in CASES if c.op == op):
        try:
            peer = PEERS[op][name](case)
            torch.manual_seed(0)
            dims = PEERS_SHAPES.get(case.name) or case.shapes[min(1, len(case.shapes) - 1)]
            assert_accurate(
                replace(case, fused=peer), make_inputs(case, case.check(dims), torch.float32, device)
            )

        # what is not installed, and what a peer cannot do
        except ImportError as error:
            pytest.skip(str(error))
        except Unsuitable:
            continue
        except RuntimeError as error:
            if device == "cpu" and re.search("No viable backend|from the 'CPU' backend", str(error)):
                pytest.skip("no path on a CPU")
            raise
        ran += 1
    assert ran > 0


def test_what_cannot_be_captured_is_noted_and_ends_nothing(monkeypatch: pytest.MonkeyPatch):
    def broken(calls):
        if calls[0]() is WAITS:
            raise RuntimeError("called a synchronizing CUDA operation\nand more")
        return SimpleNamespace(replay=calls[0])

    WAITS = object()
    monkeypatch.setattr(contest, "capture", broken)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(clocks, "sync", lambda device: None)
    monkeypatch.setattr(contest, "peak_growth", lambda work, device: 0)
    monkeypatch.setattr(contest, "event_seconds", lambda work: 1e-3)
    monkeypatch.setattr(contest, "call", lambda op, case, inputs, backward: op())
    entrants = [contest.Contestant("peer", lambda: WAITS), contest.Contestant("burnish", lambda: None)]
    sets = [contest.prepare(SMALL, SMALL.bench["cpu"][0], torch.float32, "cpu")]
    contest.time_pass(SMALL, sets, entrants, "cuda", backward=False)
    peer, ours = entrants
    assert peer.note == "not capturable: called a synchronizing CUDA operation" and peer.eager
    assert peer.device == [] and ours.device and ours.note == ""


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch):
    """A run as on a GPU: its branches with tensors of a CPU, and clocks that tell 2 ms of ours, 3 of all others."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(clocks, "sync", lambda device: None)
    monkeypatch.setattr(record, "machine", lambda device: {"device": f"a {device}", "torch": "2"})
    for module, name, at in (
        *((speed, "make_inputs", 3), (contest, "make_inputs", 3)),
        *((speed, "prepare_sets", 3), (contest, "peak_growth", 1)),
    ):
        whole = getattr(module, name)
        moved = lambda *a, whole=whole, at=at: whole(*a[:at], "cpu", *a[at + 1 :])
        monkeypatch.setattr(module, name, moved)

    def captured(calls):
        contestant, _ = calls[0].__defaults__
        return SimpleNamespace(replay=lambda: [one() for one in calls] and contestant.kind)

    event = lambda replay: 2e-3 if replay() == contest.OURS else 3e-3
    monkeypatch.setattr(contest, "event_seconds", event)
    monkeypatch.setattr(contest, "capture", captured)


def test_a_run_on_a_gpu_is_told_by_the_devices_clock(on_a_gpu, tmp_path, capsys):
    assert main(Config(json=tmp_path / "r.json", csv=tmp_path / "r.csv", dtype="fp32")) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["machine"]["device"] == "a cuda" and len(report["rows"]) == 2 * 2 * 2
    for row in report["rows"]:
        us = 2e3 if row["provider"] == "burnish" else 3e3
        assert row["device_us"] == pytest.approx([us / row["sets"]] * 3, abs=0.01) and row["eager_us"]
        assert [len(row["rounds_us"][clock]) for clock in ("device", "eager")] == [contest.ROUNDS] * 2
        assert row["ratio"] == (None if row["provider"] == "burnish" else [1.5, 1.5, 1.5])
        assert row["share"] == pytest.approx(row["floor_us"] / row["device_us"][1], abs=1e-3)
    lines = [*csv.DictReader((tmp_path / "r.csv").open())]
    assert all(float(line["device_us_p50"]) > 0 for line in lines)
    assert "device us" in capsys.readouterr().out


def test_a_call_that_is_long_or_large_has_no_graph(on_a_gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(contest, "LARGE", -1)
    monkeypatch.setattr(contest, "capture", None)
    assert main(Config(json=tmp_path / "r.json", dtype="fp32")) == 0
    for row in json.loads((tmp_path / "r.json").read_text())["rows"]:
        assert row["note"] == "no graph: the call is long or large" and row["device_us"]


def test_who_loses_the_device_while_it_is_timed_is_named(on_a_gpu, tmp_path, monkeypatch):
    died = []

    def dies(gate, up):
        if died:
            raise RuntimeError("an illegal memory access")
        return CASE.eager(gate, up)

    monkeypatch.setattr(contest, "PEERS", {"swiglu": {"peer": lambda case: dies}})
    loop_of = contest.loop_of
    monkeypatch.setattr(contest, "loop_of", lambda c, *a: died.append(c.name == "peer") or loop_of(c, *a))
    for module in (speed, contest):
        monkeypatch.setattr(module, "lost", lambda device: "illegal" if any(died) else "")
    assert main(Config(peers=True, json=tmp_path / "r.json", dtype="fp32")) == speed.LOST
    report = json.loads((tmp_path / "r.json").read_text())
    assert (
        "peer raises RuntimeError: an illegal memory access" in report["red"][0] and len(report["begun"]) == 1
    )


def test_a_note_hides_no_verdict(capsys):
    """A peer that is wrong, and whose call is too long for a graph."""
    ours = {"provider": "burnish", "note": "", "accurate": True, "pass": "forward", "floor_us": 1.0}
    ours |= {"binds": "bytes", "device_us": [1, 2, 3], "eager_us": None, "ratio": None}
    ours |= {"share": 0.5, "memory_bytes": 0, "compile_s": 0}
    print_rows([ours, ours | {"provider": "peer", "note": "no graph", "accurate": False}], "cuda")
    out = capsys.readouterr().out
    assert [x.strip() for x in out.splitlines()[-2:]] == ["no graph", "outside the accuracy rule"]
    assert "plain torch" not in out


def test_a_table_of_a_cpu_says_that_our_op_is_plain_torch(capsys):
    """Its one column of times is not named like the contestant eager."""
    assert main(Config(ops=("swiglu",), dtype="fp32", forward_only=True)) == 0
    lines = [x.strip() for x in capsys.readouterr().out.splitlines()]
    on_cpu = not torch.cuda.is_available()
    assert sum(line.startswith("burnish (plain torch on a CPU, no Triton) ") for line in lines) == 2 * on_cpu
    (head, *_) = [line.split("  ") for line in lines if line.startswith("provider")]
    assert "host us" in map(str.strip, head) and not any("eager" in name for name in head)


def test_a_shape_that_breaks_is_red_and_the_others_are_timed(monkeypatch: pytest.MonkeyPatch, tmp_path):
    prepare = contest.prepare

    def breaks(case, dims, dtype, device):
        if dims["T"] == 8:
            raise RuntimeError("out of memory")
        return prepare(case, dims, dtype, device)

    monkeypatch.setattr(speed, "prepare", breaks)
    assert main(Config(json=tmp_path / "r.json")) == 1
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["red"] == ["swiglu/elementwise B=1 T=8 F=64: RuntimeError: out of memory"]
    assert {row["dims"]["T"] for row in report["rows"]} == {16}


def test_a_run_that_died_is_resumed_behind_the_shape_it_died_at(monkeypatch: pytest.MonkeyPatch, tmp_path):
    path, whole, calls = tmp_path / "r.json", speed.Bench.bench_shape, []

    def dies(bench, case, dims):
        calls.append(dims["T"])
        if calls == [8, 16]:
            raise KeyboardInterrupt
        whole(bench, case, dims)

    monkeypatch.setattr(speed.Bench, "bench_shape", dies)
    with pytest.raises(KeyboardInterrupt):
        main(Config(json=path))
    before = json.loads(path.read_text())
    assert before["running"] == "swiglu/elementwise B=1 T=16 F=64" and len(before["rows"]) == 2 * 2

    third = replace(
        SMALL, bench={d: (*shapes, {"B": 1, "T": 4, "F": 64}) for d, shapes in SMALL.bench.items()}
    )
    monkeypatch.setattr(speed, "CASES", (third,))
    assert main(Config(json=path, resume=True)) == 1
    after = json.loads(path.read_text())
    assert calls == [8, 16, 4] and after["red"] == [f"{before['running']}: the process died"]
    assert [row["dims"]["T"] for row in after["rows"]] == [8] * 4 + [4] * 4 and "running" not in after
    assert after["ceilings"] == before["ceilings"]
    monkeypatch.setattr(speed, "fingerprint", lambda: "another")
    assert main(Config(json=path, resume=True)) == 0
    assert calls[3:] == [8, 16, 4]  # of other code: all anew


def test_a_lost_device_ends_the_process(monkeypatch: pytest.MonkeyPatch, tmp_path):
    monkeypatch.setattr(speed.Bench, "bench_shape", lambda *_: None)
    monkeypatch.setattr(speed, "lost", lambda device: "an illegal memory access was encountered")
    assert main(Config(json=tmp_path / "r.json")) == speed.LOST
    report = json.loads((tmp_path / "r.json").read_text())
    assert len(report["red"]) == 1 and "T=8" in report["red"][0] and "illegal" in report["red"][0]


def test_ops_are_timed_in_the_order_named(monkeypatch: pytest.MonkeyPatch):
    order = []
    monkeypatch.setattr(speed, "CASES", (SMALL, replace(SMALL, op="geglu")))
    monkeypatch.setattr(speed.Bench, "bench_shape", lambda _, case, dims: order.append((case.op, dims["T"])))
    assert main(Config(ops=("geglu", "swiglu"))) == 0
    assert order == [("geglu", 8), ("swiglu", 8), ("geglu", 16), ("swiglu", 16)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a graph is captured on a GPU")
def test_a_capture_that_fails_leaves_the_machine_as_it_was():
    x = torch.ones(8, device="cuda")
    with pytest.raises(RuntimeError, match="synchroniz"):
        clocks.capture([lambda: x.sum().item()])
    passes = iter([True, True])  # through the trials, not through the capture itself
    with pytest.raises(RuntimeError):
        clocks.capture([lambda: x.sum() if next(passes, False) else x.sum().item()])
    assert torch.randn(8, device="cuda").isfinite().all()
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    y = torch.empty_like(x)
    clocks.capture([lambda: y.copy_(x * 2)]).replay()
    torch.cuda.synchronize()
    assert torch.equal(y, x * 2)


def test_a_budget_ends_the_run_with_what_it_has(tmp_path):
    assert main(Config(budget=0, json=tmp_path / "r.json")) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["rows"] == [] and set(report["absent"].values()) == {"out of time"}


def test_shapes_come_in_turn():
    other = replace(SMALL, family="other", bench={"cpu": SMALL.bench["cpu"][:1]})
    order = [(c.family, d["T"]) for c, d in speed.in_turn([SMALL, other], "cpu")]
    assert order == [("elementwise", 8), ("other", 8), ("elementwise", 16)]


def test_peak_growth_counts_what_lives_together(device: str):
    x = torch.zeros(1 << 20, device=device)

    def work():
        a = x + 1
        b = a * 2  # two at once
        del a
        return b.sum() + (b + 1).sum()  # two at once again

    assert clocks.peak_growth(work, device) == pytest.approx(2 * x.nbytes, rel=0.01)


def test_the_floor_is_the_longer_of_two():
    top = roofline.Ceilings(bandwidth=100, rate=1000)
    assert top.floor(Work(flops=10, bytes=100)) == 1 and top.binds(Work(10, 100)) == "bytes"
    assert top.floor(Work(flops=5000, bytes=100)) == 5 and top.binds(Work(5000, 100)) == "operations"
