"""Candidates are ranked by the rule, refused when wrong, timed beside the shipped tile, and kept as they come."""

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from burnish.bench.cases.registry import CASES
from burnish.bench.ops import tune
from burnish.kernels._chip import INTERPRET
from burnish.model.errors import InputError

pytestmark = pytest.mark.skipif(INTERPRET, reason="interpreted kernels have no speed")

FORWARD = tune.SLOTS[0]
SWIGLU = next(c for c in CASES if c.name == "swiglu/elementwise")


def figures(tile, **changes):
    sound = {"registers": 100, "spills": 0, "stack": 0, "shared": 1, "blocks": 2, "matrix": "HGMMA"}
    return {"tile": list(tile)} | sound | changes


@pytest.mark.slow
def test_a_tile_that_spills_ranks_last():
    """On an H100's compiled code; the shipped one does not spill."""
    slot = replace(FORWARD, cases=FORWARD.cases[:1])
    tiles = (64, 64, 1, 2), slot.shipped(slot, "sm_90", 64)
    spilled, shipped = (tune.examine(slot, "sm_90", 64, tile) for tile in tiles)
    assert spilled["spills"] > 0 == shipped["spills"] and shipped["matrix"] == "HGMMA"
    assert tune.rank(slot, "sm_90", [spilled, shipped]) == [shipped, spilled]
    assert tune.sound(shipped) and not tune.sound(spilled)


def test_the_rule_of_the_ranking():
    best_first = [
        figures((64, 128, 4, 3)),
        figures((64, 128, 4, 2)),  # the deeper pipeline is before
        figures((128, 64, 4, 3)),  # as many pairs, a narrower walked side
        figures((64, 64, 4, 3)),  # fewer pairs in a step
        figures((128, 128, 2, 3)),  # four warps resident
        figures((128, 128, 8, 3), blocks=1),
        figures((128, 128, 8, 3), matrix="HMMA"),
        figures((128, 128, 8, 3), spills=2),
        figures((128, 128, 8, 3), blocks=0),
    ]
    assert tune.rank(FORWARD, "sm_90", best_first[::-1]) == best_first
    held_keys = next(slot for slot in tune.SLOTS if slot.name == "dkdv")
    assert tune.rank(held_keys, "sm_90", best_first[1:3]) == best_first[2:0:-1]


def test_a_search_keeps_the_best_and_the_shipped(monkeypatch: pytest.MonkeyPatch):
    """Here every second tile of the grid spills, and the shipped one, too, in a call that the first does not show."""
    shipped = FORWARD.shipped(FORWARD, "sm_90", 128)
    bad = {tile[:-1] for n, tile in enumerate(FORWARD.grid(FORWARD, "sm_90", 128)) if n % 2}

    def examine(slot, chip, width, tile, cases=None):
        spilled = tile[:-1] in bad or (tile == shipped and cases is None)
        return figures(tile, spills=int(spilled))

    monkeypatch.setattr(tune, "examine", examine)
    key, ranked = tune.search(("flash_attention", "fwd", "sm_90", 128))
    assert key == "flash_attention fwd | D=128 | sm_90"
    assert sum(map(tune.sound, ranked)) == tune.KEEP
    assert ranked[-1]["tile"] == list(shipped) and [c["shipped"] for c in ranked] == [False] * 6 + [True]


def test_what_is_kept_is_of_the_table_at_hand():
    """A tile table that changes wants a new search."""
    kept = tune.kept()
    entries = {
        slot.key(chip, width): (slot, chip, width)
        for slot in tune.SLOTS
        for chip in tune.OWN
        for width in tune.WIDTHS
    }
    assert kept.keys() <= entries.keys()
    for key, ranked in kept.items():
        slot, chip, width = entries[key]
        (shipped,) = [c for c in ranked if c["shipped"]]
        assert tuple(shipped["tile"]) == slot.shipped(slot, chip, width), key
        assert tune.rank(slot, chip, ranked) == ranked, key


def test_keeping_leaves_the_other_entries(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tune, "KEPT", tmp_path / "candidates.json")
    tune.keep({"b": [figures((1, 2, 3, 4))], "c": []})
    tune.keep({"a": [figures((1, 2, 3, 4))] * 2, "c": [figures((5, 6, 7, 8))]})
    assert [(key, len(ranked)) for key, ranked in tune.kept().items()] == [("a", 2), ("b", 1), ("c", 1)]


@pytest.fixture
def slot():
    """A slot over a kernel that torch plays: swiglu, which a tile of (2, ...) gets wrong and one of (3, ...) fails."""
    module = SimpleNamespace(tile=(1, 1, 4, 2))

    class Kernel:
        def __getitem__(self, grid):
            def launch(gate, up):
                if module.tile[0] == 3:
                    raise RuntimeError("out of resources\nand more")
                return SWIGLU.fused(gate, up) * (1.01 if module.tile[0] == 2 else 1)

            return launch

    module.kernel = Kernel()
    case = replace(SWIGLU, fused=lambda gate, up: module.kernel[(1,)](gate, up))

    @contextmanager
    def placed(slot, tile):
        before, module.tile = module.tile, tile
        try:
            yield
        finally:
            module.tile = before

    timed = lambda slot, width: [(case, {"B": 1, "T": t, "F": width}) for t in (8, 16)]
    return replace(FORWARD, module=module, kernel="kernel", placed=placed, timed=timed)


def test_a_wrong_tile_is_refused_and_the_others_are_timed(slot, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tune, "import_module", lambda module: module)
    kernel = slot.module.kernel
    tiles = [(1, 1, 4, 2), (2, 1, 4, 2), (3, 1, 4, 2), (4, 1, 4, 2)]

    rows = list(tune.measure(slot, 32, tiles, tiles[0], torch.float32, "cpu"))
    assert [(row["dims"]["T"], tuple(row["tile"])) for row in rows] == [
        (t, x) for t in (8, 16) for x in tiles
    ]

    # the second tile computes wrongly, the third does not fit
    for row in rows:
        if row["tile"][0] in (1, 4):
            assert row["us"] > 0 and row["shipped_us"] > 0 and "refused" not in row
        else:
            assert "us" not in row
    assert {row["refused"].split(":")[0] for row in rows if row["tile"][0] == 2} == {"AssertionError"}
    assert {row["refused"] for row in rows if row["tile"][0] == 3} == {"RuntimeError: out of resources"}

    assert [row["shipped"] for row in rows[:4]] == [True, False, False, False]
    assert slot.module.kernel is kernel and slot.module.tile == (1, 1, 4, 2)


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path):
    """Answers to what the command asks of the machine; nothing is compiled."""
    monkeypatch.setattr(tune.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune.torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(tune, "machine", lambda device: {"device": "GPU"})
    monkeypatch.setattr(tune, "clocks", lambda device: "")
    monkeypatch.setattr(tune, "ProcessPoolExecutor", lambda processes, **_: ThreadPoolExecutor(processes))
    monkeypatch.setattr(
        tune, "examine", lambda slot, chip, width, tile: figures(tile, spills=int(tile[0] == 32))
    )
    monkeypatch.setattr(tune, "KEPT", tmp_path / "candidates.json")
    tiles = ((64, 64, 4, 3), (32, 64, 4, 2), (128, 32, 4, 2))
    ranked = [figures(tile) | {"shipped": n == 0} for n, tile in enumerate(tiles)]
    tune.keep({FORWARD.key("sm_90", width): ranked for width in (128, 64)})
    return tmp_path / "times.json"


def rows_of(slot, width, tiles, shipped, dtype, device):
    for tile in tiles:
        yield {
            "case": "flash_attention/causal",
            "dims": {"T": 8},
            "tile": list(tile),
            "us": 1.0,
            "shipped_us": 2.0,
        } | {"shipped": tile == shipped}


def test_on_a_gpu_what_spills_nowhere_is_timed_and_written(on_a_gpu, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(tune, "measure", rows_of)
    assert tune.main(tune.Config(ops=("flash_attention",), json=on_a_gpu)) == 0
    report = json.loads(on_a_gpu.read_text())
    assert report["kind"] == "tune" and report["chip"] == "sm_90" and "--json" in report["command"]
    assert [tuple(row["tile"]) for row in report["rows"]] == [(128, 32, 4, 2), (64, 64, 4, 3)][::-1] * 2
    assert [c["tile"][0] for c in report["ranked"]["flash_attention fwd | D=64 | sm_90"]] == [64, 128, 32]
    assert "0.500  64x64" in capsys.readouterr().out


def test_a_run_cut_short_keeps_its_rows(on_a_gpu, monkeypatch: pytest.MonkeyPatch):
    def breaks(*args):
        yield next(iter(rows_of(*args)))
        raise KeyboardInterrupt

    monkeypatch.setattr(tune, "measure", breaks)
    with pytest.raises(KeyboardInterrupt):
        tune.main(tune.Config(json=on_a_gpu))
    assert len(json.loads(on_a_gpu.read_text())["rows"]) == 1
    monkeypatch.setattr(tune, "measure", rows_of)
    assert tune.main(tune.Config(json=on_a_gpu, budget=0)) == 0
    assert json.loads(on_a_gpu.read_text())["rows"] == []


def test_without_a_gpu_the_ranking_is_printed(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(tune.torch.cuda, "is_available", lambda: False)
    assert tune.main(tune.Config(ops=("flash_attention",), chip="sm_90")) == 0
    out = capsys.readouterr().out
    assert (
        out.count("  shipped\n") == sum(key.endswith("sm_90") for key in tune.kept()) and "sm_80" not in out
    )
    assert "flash_attention dkdv | D=128 | sm_90\n   1  " in out and "nothing was timed" in out


def test_what_is_kept_has_the_usual_name(on_a_gpu, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tune, "measure", rows_of)
    monkeypatch.setattr(tune, "RESULTS", on_a_gpu.parent / "results")
    assert tune.main(tune.Config(keep=True, json=on_a_gpu)) == 0
    (kept,) = (on_a_gpu.parent / "results").glob("tune-sm_90-????-??-??.json")
    assert kept.read_text() == on_a_gpu.read_text()


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"ops": ("nothing",)}, r"op: expected one of \['flash_attention'\], got \['nothing'\]"),
        ({"accept": True}, "--accept: expected --search beside it"),
        ({"chip": "sm_86"}, "--chip: expected one of sm_80, sm_90, sm_100, gfx942, got sm_86"),
        ({"chip": "sm_90", "keep": True}, "--keep, .*: expected neither --search nor --chip"),
        ({"search": True, "budget": 9}, "--budget, .*: expected neither --search nor --chip"),
        ({"json": Path("times.json")}, "--json, .*: expected a GPU that torch can use"),
    ],
)
def test_wrong_flags(flags, message, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tune.torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=message):
        tune.main(tune.Config(**flags))
