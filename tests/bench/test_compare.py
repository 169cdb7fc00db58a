"""`burnish bench --compare`: what is marked, what is not, and when the exit status is 1."""

import json
import random
from math import comb, log
from pathlib import Path

import pytest
from burnish.bench.ops.compare import Change, changes_of, compare, key, span
from burnish.bench.ops.contest import SURE, interval, ratio
from burnish.bench.ops.speed import Config, main
from burnish.model.errors import InputError

MACHINE = {"device": "a card", "torch": "2.13.0"}


def row(provider: str, rounds: list[float], name: str = "rms_norm/hidden", **more) -> dict:
    """A row of the benchmark on a CPU: rounds are microseconds."""
    middle = sorted(rounds)[len(rounds) // 2]
    return {
        "case": name,
        "dims": {"B": 1, "T": 300, "C": 777},
        "dtype": "fp32",
        "pass": "forward",
        "provider": provider,
        "device_us": None,
        "eager_us": [min(rounds), middle, max(rounds)],
        "rounds_us": {"device": [], "eager": rounds},
        "accurate": True,
    } | more


def file(path: Path, *rows: dict, **more) -> Path:
    result = {"machine": MACHINE, "commit": path.stem, "date": "2026-11-29", "red": [], "rows": rows}
    path.write_text(json.dumps(result | more))
    return path


def around(middle: float, share: float, seed: int = 0) -> list[float]:
    """Five rounds, each within a share of the middle."""
    draw = random.Random(seed)
    return [middle * (1 + draw.uniform(-share, share)) for _ in range(5)]


def marks(first: list[dict], second: list[dict]) -> list[str]:
    tables = [{key(r): r for r in rows} for rows in (first, second)]
    return [change.mark for change in changes_of(*tables)]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("factor, mark", [(1.3, "slower"), (0.7, "faster"), (1.0, "")])
def test_a_change_beyond_noise_is_marked(factor, mark, seed):
    first = [row("burnish", around(50, 0.05, seed)), row("eager", around(90, 0.05, seed + 100))]
    second = [
        row("burnish", around(50 * factor, 0.05, seed + 200)),
        row("eager", around(90, 0.05, seed + 300)),
    ]
    assert marks(first, second) == [mark]


@pytest.mark.parametrize("seed", range(20))
def test_a_machine_that_is_slower_is_no_change(seed):
    """Eager, the same code in both, took as much longer; without it nobody could know."""
    first = [row("burnish", around(50, 0.05, seed)), row("eager", around(90, 0.05, seed + 100))]
    second = [row("burnish", around(100, 0.05, seed + 200)), row("eager", around(180, 0.05, seed + 300))]
    assert marks(first, second) == [""]
    assert marks(first[:1], second[:1]) == ["slower"]


def test_ours_that_is_faster_on_a_slower_machine_is_not_marked_slower():
    first = [row("burnish", around(50, 0.02)), row("eager", around(90, 0.02))]
    second = [row("burnish", around(60, 0.02)), row("eager", around(180, 0.02))]
    assert marks(first, second) == [""]


def test_a_change_within_noise_is_not_marked():
    assert marks([row("burnish", around(50, 0.3))], [row("burnish", around(55, 0.3, 1))]) == [""]


def test_what_is_wrong_is_not_compared():
    assert marks([row("mine.py:f", [50.0] * 5)], [row("mine.py:f", [90.0] * 5, accurate=False)]) == []


def test_device_time_is_compared_where_both_have_it():
    first, second = (row("burnish", [50.0] * 5) for _ in range(2))
    first |= {"device_us": [9.9, 10, 10.1], "rounds_us": {"device": [10.0] * 5, "eager": [50.0] * 5}}
    second |= {"device_us": [19.9, 20, 20.1], "rounds_us": {"device": [20.0] * 5, "eager": [50.0] * 5}}
    (change,) = changes_of({key(first): first}, {key(second): second})
    assert (change.before, change.after, change.ratio, change.mark) == (10, 20, 2, "slower")
    second["device_us"] = None
    (change,) = changes_of({key(first): first}, {key(second): second})
    assert change.ratio == 1


def test_files_without_rounds_are_compared_by_their_percentiles():
    first, second = row("burnish", [48.0, 50.0, 52.0]), row("burnish", [66.0, 70.0, 75.0])
    del first["rounds_us"], second["rounds_us"]
    (change,) = changes_of({key(first): first}, {key(second): second})
    assert (change.low, change.high) == pytest.approx((66 / 52, 75 / 48)) and change.mark == "slower"


def test_the_span_is_that_of_any_two_rounds():
    before, after = around(3, 0.5), around(4, 0.5, 1)
    each = [b / a for a in before for b in after]
    assert span(before, after) == pytest.approx((min(each), max(each)))


@pytest.mark.parametrize("n", [5, 6, 9, 15, 30])
def test_an_interval_holds_the_median_as_often_as_it_says(n):
    """It is the narrowest of those that do, and a thousand draws of a skewed distribution agree."""
    outside = lambda k: 2 * sum(comb(n, i) for i in range(k + 1)) / 2**n
    draw, hits, k = random.Random(n), 0, 0
    for _ in range(1000):
        values = [draw.expovariate(1) for _ in range(n)]
        low, high = interval(values)
        hits += low <= log(2) <= high
        k = sorted(values).index(low)
    assert 1 - outside(k) >= SURE > 1 - outside(k + 1)
    assert abs(hits / 1000 - (1 - outside(k))) < 0.03


def test_a_ratio_is_over_ours_of_the_same_round():
    """A round that is slow slows both: the ratio does not see it."""
    assert ratio([20.0, 200.0, 20.0], [10.0, 100.0, 10.0]) == (2, 2, 2)
    assert ratio([20.0, 30.0, 10.0], [10.0, 10.0, 10.0]) == (2, 1, 3)


# ---- the command


def test_the_exit_status_is_that_of_fail_above(tmp_path, capsys):
    first = file(tmp_path / "a.json", row("burnish", around(50, 0.02)), row("eager", around(90, 0.02)))
    second = file(tmp_path / "b.json", row("burnish", around(60, 0.02)), row("eager", around(90, 0.02)))
    assert main(Config(compare=(first, second))) == 0
    out = capsys.readouterr().out
    assert "slower" in out and "1 compared: 1 slower, 0 faster beyond noise" in out and "FAILED" not in out
    assert main(Config(compare=(first, second), fail_above=1.1)) == 1
    assert "FAILED: rms_norm/hidden B=1 T=300 C=777 fp32 forward burnish: 1.2" in capsys.readouterr().out
    assert main(Config(compare=(first, second), fail_above=1.3)) == 0
    assert main(Config(compare=(second, first), fail_above=1.1)) == 0


def test_noise_that_hides_a_change_is_told(tmp_path, capsys):
    first = file(tmp_path / "a.json", row("burnish", around(50, 0.4)), row("eager", around(90, 0.02)))
    second = file(tmp_path / "b.json", row("burnish", around(75, 0.4, 1)), row("eager", around(90, 0.02)))
    assert main(Config(compare=(first, second), fail_above=1.1)) == 0
    assert "UNCLEAR: rms_norm/hidden" in capsys.readouterr().out


def test_a_slower_machine_does_not_make_a_change_larger(tmp_path, capsys):
    """Ours took 1.3 times as long beside eager, 2.6 times as it is."""
    first = file(tmp_path / "a.json", row("burnish", around(50, 0.02)), row("eager", around(90, 0.02)))
    second = file(tmp_path / "b.json", row("burnish", around(130, 0.02)), row("eager", around(180, 0.02)))
    assert main(Config(compare=(first, second), fail_above=1.5)) == 0
    assert main(Config(compare=(first, second), fail_above=1.1)) == 1
    assert "forward burnish: 1.3" in capsys.readouterr().out


def test_red_in_the_second_file_fails(tmp_path, capsys):
    first = file(tmp_path / "a.json", row("burnish", [50.0] * 5))
    second = file(
        tmp_path / "b.json", row("burnish", [50.0] * 5), red=["swiglu/elementwise: output 0: wrong"]
    )
    assert compare(first, second, 1.1) == 1
    assert "swiglu/elementwise: output 0: wrong" in capsys.readouterr().out
    assert compare(second, first, 1.1) == 0


def test_a_users_function_that_became_wrong_fails(tmp_path, capsys):
    first = file(
        tmp_path / "a.json", row("burnish", [50.0] * 5), row("mine.py:f", [50.0] * 5, kind="against")
    )
    why = {"provider": "mine.py:f", "case": "rms_norm/hidden", "dims": {"B": 1}, "why": "output 0: error 1"}
    second = file(tmp_path / "b.json", row("burnish", [50.0] * 5), wrong=[why])
    assert compare(first, second, 1.1) == 1 and compare(second, first, 1.1) == 0
    assert "rms_norm/hidden B=1: mine.py:f: output 0: error 1" in capsys.readouterr().out


@pytest.mark.parametrize("kind, status", [("ours", 1), ("against", 1), ("peer", 0), (None, 0)])
def test_a_peer_that_is_slower_is_marked_and_fails_nothing(kind, status, tmp_path, capsys):
    more = {} if kind is None else {"kind": kind}
    first, second = (file(tmp_path / f"{t}.json", row("x", [t] * 5, **more)) for t in (50.0, 70.0))
    assert compare(first, second, 1.1) == status and "1 slower" in capsys.readouterr().out


def test_a_forward_that_saves_is_not_compared_with_one_that_does_not(tmp_path):
    first = file(tmp_path / "a.json", row("burnish", [50.0] * 5))
    second = file(tmp_path / "b.json", row("burnish", [50.0] * 5), asked={"forward_only": True})
    with pytest.raises(InputError, match="--forward-only in both or in neither"):
        compare(first, second, None)


def test_what_one_file_alone_has_is_counted(tmp_path, capsys):
    rows = [row("burnish", [50.0] * 5), row("burnish", [50.0] * 5, "geglu/elementwise")]
    first, second = file(tmp_path / "a.json", *rows), file(tmp_path / "b.json", rows[0])
    assert compare(first, second, None) == 0
    assert f"only in {first}: 1 of its 2 rows" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"machine": 1}',
        '{"machine": {"device": "x"}, "commit": 1, "date": 1, "red": [], "rows": [1]}',
    ],
)
def test_a_file_that_is_no_result_is_one_sentence(text, tmp_path):
    good, bad = file(tmp_path / "a.json", row("burnish", [50.0] * 5)), tmp_path / "bad.json"
    bad.write_text(text)
    for pair in ((good, bad), (bad, good)):
        with pytest.raises(InputError, match=r"bad\.json: \S"):
            compare(*pair, None)


@pytest.mark.parametrize(
    "change",
    [
        *(
            {"eager_us": None},
            {"eager_us": [1, 2]},
            {"eager_us": [0, 0, 0]},
            {"eager_us": [1, 2, float("nan")]},
        ),
        *({"rounds_us": {"eager": "x"}}, {"rounds_us": {"eager": [1, -1]}}, {"rounds_us": []}, {"dims": 1}),
    ],
)
def test_a_row_that_is_none_is_one_sentence(change, tmp_path):
    good = file(tmp_path / "a.json", row("burnish", [50.0] * 5))
    bad = file(tmp_path / "bad.json", row("burnish", [50.0] * 5) | change)
    for pair in ((good, bad), (bad, good)):
        with pytest.raises(InputError, match=r"bad\.json"):
            compare(*pair, None)


def test_files_that_share_nothing_are_one_sentence(tmp_path):
    first = file(tmp_path / "a.json", row("burnish", [50.0] * 5))
    second = file(tmp_path / "b.json", row("burnish", [50.0] * 5, dtype="bf16"))
    with pytest.raises(InputError, match="have no case, shape, dtype and provider in common"):
        compare(first, second, None)


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ({"compare": (Path("a"),)}, "--compare: expected two files, got 1"),
        ({"compare": (Path("a"), Path("b")), "ops": ("rms_norm",)}, "--compare: expected no --ops beside it"),
        ({"compare": (Path("a"), Path("b")), "peers": True}, "--compare: expected no --peers beside it"),
        ({"fail_above": 1.1}, "--fail-above: expected --compare beside it"),
        ({"list": True, "json": Path("x")}, "--list: expected no --json beside it"),
        ({"compare": (Path("a"), Path("b"))}, "a: no such file"),
    ],
)
def test_flags_that_would_be_ignored_are_refused(flags, sentence):
    with pytest.raises(InputError, match=sentence):
        main(Config(**flags))


def test_a_mark_that_heeds_no_noise_is_caught():
    """The planted fault: a mark by the ratio alone."""
    noisy = Change(("c", "s", "d", "p", "burnish"), 50, 55, 1.1, 0.8, 1.5, None)
    by_ratio = "slower" if noisy.ratio > 1 else ""
    assert noisy.mark == "" != by_ratio
