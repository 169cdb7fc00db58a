"""A user's own function beside ours: what is refused, by which words, and that what is right is timed."""

import csv
import json
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from burnish.bench.cases.case import make_inputs
from burnish.bench.cases.registry import CASES
from burnish.bench.cases.shapes import describe
from burnish.bench.ops import contest, roofline, speed, theirs
from burnish.bench.ops.speed import Config, main
from burnish.kernels._chip import INTERPRET
from burnish.model.errors import InputError
from own_kernels import HEAD, WRONG

pytestmark = pytest.mark.skipif(INTERPRET, reason="interpreted kernels have no speed")

SHAPE = "B=1 T=30 C=77"
ALONE = (
    "a memory",
    "a memory by address",
)  # asked for the forward pass alone: their answers have no backward
CASE = next(c for c in CASES if c.name == "rms_norm/hidden")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(contest, "SLICE", 1e-4)
    monkeypatch.setattr(contest, "COLD_BYTES", {"cpu": 1 << 16, "cuda": 1 << 16})
    monkeypatch.setattr(roofline, "measure", lambda device, dtype: roofline.Ceilings(1e10, 1e11))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def write_file(tmp_path: Path):
    """Write a file of functions behind HEAD, and return its path."""

    def write(source: str) -> Path:
        path = tmp_path / "mine.py"
        path.write_text(textwrap.dedent(HEAD) + textwrap.dedent(source))
        return path

    return write


def report_of(path: Path, name: str, tmp_path: Path, **flags) -> tuple[int, dict]:
    flags = {"ops": ("rms_norm",), "shape": (SHAPE,), "json": tmp_path / "out.json"} | flags
    status = main(Config(against=(f"{path}:{name}",), **flags))
    return status, json.loads((tmp_path / "out.json").read_text())


def why(path: Path, name: str, tmp_path: Path, **flags) -> str:
    """The words about a function that takes no part; it is not timed, ours is."""
    status, report = report_of(path, name, tmp_path, **flags)
    (wrong,) = report["wrong"]
    assert status == 1 and wrong["provider"] == f"mine.py:{name}"
    assert {row["provider"] for row in report["rows"]} == {"burnish", "eager"}
    return wrong["why"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_what_is_right_is_timed_beside_ours(write_file, tmp_path, capsys, dtype):
    table = tmp_path / "out.csv"
    status, report = report_of(write_file(""), "right", tmp_path, csv=table, dtype=dtype)
    assert status == 0 and report["wrong"] == []
    assert len(report["rows"]) == 2 * 3
    for row in report["rows"]:
        assert row["dims"] == {"B": 1, "T": 30, "C": 77} and row["dtype"] == dtype
        assert len(row["rounds_us"]["eager"]) == contest.ROUNDS
        if row["provider"] == "burnish":
            assert row["ratio"] is None
            ours = row
            continue
        each = [a / b for a, b in zip(row["rounds_us"]["eager"], ours["rounds_us"]["eager"], strict=True)]
        middle, low, high = row["ratio"]
        assert (middle, low, high) == pytest.approx((sorted(each)[2], min(each), max(each)), rel=1e-2)

    lines = [*csv.DictReader(table.open())]
    assert [line["provider"] for line in lines] == ["burnish", "eager", "mine.py:right"] * 2
    assert all(float(line["eager_us_p50"]) > 0 for line in lines) and {line["shape"] for line in lines} == {
        SHAPE
    }
    assert "mine.py:right" in capsys.readouterr().out


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_is_told_and_not_timed(kind, write_file, tmp_path, capsys):
    source, words = WRONG[kind]
    reason = why(write_file(source), "f", tmp_path, forward_only=kind.startswith("a memory"))
    assert all(word in reason for word in words), reason
    assert len(reason.splitlines()) <= 4 and "Traceback" not in reason
    assert reason.splitlines()[0] in capsys.readouterr().out


def test_a_forward_alone_is_compared_where_it_is_asked_for(write_file, tmp_path):
    path = write_file("def f(x, weight):\n    return right(x.detach(), weight.detach())")
    status, report = report_of(path, "f", tmp_path, forward_only=True)
    assert status == 0 and {row["pass"] for row in report["rows"]} == {"forward"}
    assert [row["provider"] for row in report["rows"]] == ["burnish", "eager", "mine.py:f"]


def test_what_writes_while_it_is_timed_wins_nothing(write_file, tmp_path, capsys):
    """It behaves in the check, and writes to its input from the tenth call on."""
    path = write_file(
        """
        CALLS = []
        def f(x, weight):
            CALLS.append(1)
            y = right(x, weight)
            if len(CALLS) > 10:
                x.detach().add_(1)
            return y
        """
    )
    reason = why(path, "f", tmp_path)
    assert "writes to its input x" in reason and reason in capsys.readouterr().out


def test_what_one_writes_is_no_fault_of_another(write_file, tmp_path, monkeypatch):
    """The others are timed on the inputs as they were."""
    path, given, seen = write_file(""), [], []
    (tmp_path / "writer.py").write_text(
        f"{textwrap.dedent(HEAD)}\nCALLS = []\ndef f(x, weight):\n    CALLS.append(1)\n"
        "    y = right(x, weight)\n    x.detach().add_(len(CALLS) > 10)\n    return y\n"
    )
    prepare = contest.prepare

    def kept(*arguments):
        inputs = prepare(*arguments)
        given.append((inputs.tensors["x"], inputs.tensors["x"].detach().clone()))
        return inputs

    monkeypatch.setattr("burnish.bench.ops.speed.prepare", kept)
    ask_again = speed.Bench.ask_again
    monkeypatch.setattr(speed.Bench, "ask_again", lambda *a: seen.append(a[1].name) or ask_again(*a))
    contestants = (f"{tmp_path / 'writer.py'}:f", f"{path}:right")
    assert main(Config(ops=("rms_norm",), shape=(SHAPE,), against=contestants, json=tmp_path / "o.json")) == 1
    report = json.loads((tmp_path / "o.json").read_text())
    assert [wrong["provider"] for wrong in report["wrong"]] == ["writer.py:f"]
    rows = [row for row in report["rows"] if row["provider"] == "mine.py:right"]
    assert len(rows) == 2 and all(row["accurate"] and row["ratio"] for row in rows)
    assert seen == ["mine.py:right"] and all(torch.equal(x, before) for x, before in given)


def test_what_is_right_at_first_and_wrong_later_wins_nothing(write_file, tmp_path):
    path = write_file(
        """
        CALLS = []
        def f(x, weight):
            CALLS.append(1)
            return right(x, weight) if len(CALLS) < 20 else x * weight
        """
    )
    reason = why(path, "f", tmp_path)
    assert reason.startswith("right at first, wrong after it was timed: output 0: error")


def test_inputs_are_copied_where_a_function_of_a_users_is_timed_alone(write_file, tmp_path, monkeypatch):
    """A copy of what is large costs its memory once more."""
    copies = []
    monkeypatch.setattr(speed, "copied", lambda tensors: copies.append(1) or theirs.copied(tensors))
    assert main(Config(ops=("rms_norm",), shape=(SHAPE,))) == 0 and not copies
    report_of(write_file(""), "right", tmp_path)
    assert copies == [1]


def test_a_function_that_loses_the_device_is_named(write_file, tmp_path, monkeypatch):
    path, broken = write_file("def f(x, weight):\n    raise RuntimeError('an illegal memory access')"), []
    monkeypatch.setattr(speed, "lost", lambda device: "illegal" if broken else "")
    monkeypatch.setattr(speed, "raises", lambda error: broken.append(error) or f"raises {error}")
    status, report = report_of(path, "f", tmp_path)
    assert status == speed.LOST and report["rows"] == []
    assert "mine.py:f raises an illegal memory access" in report["red"][0] and "lost" in report["red"][1]


def test_what_breaks_while_it_is_timed_ends_nobody_elses_run(write_file, tmp_path):
    path = write_file(
        """
        CALLS = []
        def f(x, weight):
            CALLS.append(1)
            if len(CALLS) > 20:
                raise RuntimeError("out of luck")
            return right(x, weight)
        """
    )
    reason = why(path, "f", tmp_path, forward_only=True)
    assert "RuntimeError: out of luck" in reason and "mine.py:" in reason


def test_nothing_is_timed_with_check_only(write_file, tmp_path, capsys):
    status, report = report_of(write_file(""), "right", tmp_path, check_only=True)
    assert status == 0 and report["rows"] == [] and report["red"] == report["wrong"] == []
    assert [row["provider"] for row in report["right"]] == ["burnish", "eager", "mine.py:right"]
    assert "mine.py:right" in capsys.readouterr().out
    bad = write_file("def f(x, weight):\n    return x")
    status, report = report_of(bad, "f", tmp_path, check_only=True)
    assert status == 1 and len(report["wrong"]) == 1


def test_what_was_checked_alone_has_its_line_in_the_csv(write_file, tmp_path):
    flags = {"shape": (SHAPE,), "csv": tmp_path / "t.csv", "check_only": True}
    bad = write_file("def f(x, weight):\n    return x")
    assert main(Config(ops=("rms_norm",), against=(f"{bad}:f", f"{bad}:right"), **flags)) == 1
    lines = {line["provider"]: line["accurate"] for line in csv.DictReader((tmp_path / "t.csv").open())}
    assert lines == {"burnish": "True", "eager": "True", "mine.py:right": "True", "mine.py:f": "False"}


def test_more_rounds_are_taken_where_they_are_asked_for(write_file, tmp_path):
    status, report = report_of(write_file(""), "right", tmp_path, rounds=9)
    assert status == 0 and {len(row["rounds_us"]["eager"]) for row in report["rows"]} == {9}


def test_a_kernel_that_is_wrong_at_the_end_of_many_heads_is_told_where(write_file, tmp_path):
    """A shape that the reference can hold is checked as it is."""
    path = write_file(
        """
        def f(q, k, v):
            heads = [x.transpose(1, 2) for x in (q, k, v)]
            out = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
            out = out.transpose(1, 2).clone()
            out[2, :, 7] *= 1.5
            return out
        """
    )
    flags = {"ops": ("flash_attention/causal",), "shape": ("B=3 T=33 H=8 G=4 D=16",), "check_only": True}
    _, report = report_of(path, "f", tmp_path, **flags)
    reason = report["wrong"][0]["why"]
    assert "of 12,672" in reason and "B=2" in reason and "H=7" in reason


def test_several_functions_and_shapes(write_file, tmp_path):
    path = write_file("def f(x, weight):\n    return right(x, weight)")
    shapes = (SHAPE, "T=2 C=8 B=3")  # in any order
    status = main(
        Config(
            ops=("rms_norm",), shape=shapes, against=(f"{path}:right", f"{path}:f"), csv=tmp_path / "t.csv"
        )
    )
    lines = [*csv.DictReader((tmp_path / "t.csv").open())]
    assert status == 0
    assert {(line["shape"], line["provider"]) for line in lines if "mine" in line["provider"]} == {
        (shape, f"mine.py:{name}") for shape in (SHAPE, "B=3 T=2 C=8") for name in ("right", "f")
    }


def test_what_is_wrong_has_a_line_in_the_csv(write_file, tmp_path):
    path = write_file("def f(x, weight):\n    return x")
    assert (
        main(Config(ops=("rms_norm",), shape=(SHAPE,), against=(f"{path}:f",), csv=tmp_path / "t.csv")) == 1
    )
    (line,) = [line for line in csv.DictReader((tmp_path / "t.csv").open()) if "mine" in line["provider"]]
    assert line["accurate"] == "False" and line["eager_us_p50"] == "" and "output 0" in line["note"]


@pytest.mark.parametrize(
    "call", ["set_grad_enabled(False)", "set_default_dtype(torch.float64)", "set_num_threads(2)"]
)
@pytest.mark.parametrize("calls", [0, 12])
def test_what_one_sets_for_the_whole_program_is_put_back(call, calls, write_file, tmp_path):
    """It is put back behind the check and behind the timing; with no effect on its own result it is no fault."""
    path = write_file(
        f"""
        CALLS = []
        def f(x, weight):
            CALLS.append(1)
            if len(CALLS) > {calls}:
                torch.{call}
            return right(x, weight)
        """
    )

    before = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads()
    flags = {"against": (f"{path}:f", f"{path}:right"), "json": tmp_path / "o.json"}
    main(Config(ops=("rms_norm",), shape=(SHAPE,), **flags))
    assert before == (torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads())
    report = json.loads((tmp_path / "o.json").read_text())
    timed = [row["provider"] for row in report["rows"] if row["provider"] != "mine.py:f"]
    assert timed == ["burnish", "eager", "mine.py:right"] * 2 and report["red"] == []


def interrupted(bench, case, dims):
    raise KeyboardInterrupt


def test_figures_that_were_taken_are_written_when_a_run_is_interrupted(write_file, tmp_path, monkeypatch):
    table, whole = tmp_path / "t.csv", speed.Bench.bench_shape
    first = lambda bench, case, dims: (whole if dims["C"] == 77 else interrupted)(bench, case, dims)
    monkeypatch.setattr(speed.Bench, "bench_shape", first)
    flags = {"shape": (SHAPE, "B=1 T=2 C=8"), "csv": table, "json": tmp_path / "o.json"}
    with pytest.raises(KeyboardInterrupt):
        main(Config(ops=("rms_norm",), against=(f"{write_file('')}:right",), **flags))
    rows = json.loads((tmp_path / "o.json").read_text())["rows"]
    assert len(rows) == 6 == len([*csv.DictReader(table.open())])


@pytest.mark.parametrize(
    "change", ["another function", "another text", "check_only", "forward_only", "dtype", "rounds"]
)
def test_figures_of_other_contestants_are_not_resumed(change, write_file, tmp_path, capsys):
    """An answer to what was asked before is none to what is asked now."""
    path, values = write_file(""), {"dtype": "bf16", "rounds": 7}
    other = {} if "another" in change else {change: values.get(change, True)}
    report_of(path, "right", tmp_path, **other)

    if change == "another text":
        path.write_text(path.read_text() + "\n")
    elif change == "another function":
        path = write_file("def f(x, weight):\n    return right(x, weight)")
        report_of(path, "f", tmp_path)
    status, report = report_of(path, "right", tmp_path, resume=True)
    assert (
        status == 0
        and [row["provider"] for row in report["rows"]] == ["burnish", "eager", "mine.py:right"] * 2
    )
    assert "begun anew" in capsys.readouterr().out
    again = report_of(path, "right", tmp_path, resume=True)[1]
    assert again["rows"] == report["rows"] and "begun anew" not in capsys.readouterr().out


def test_a_file_of_something_else_is_not_resumed_over(tmp_path):
    path = tmp_path / "o.json"
    path.write_text('{"begun": 3}')
    with pytest.raises(InputError, match="expected figures as the benchmark keeps them"):
        main(Config(ops=("rms_norm",), shape=(SHAPE,), json=path, resume=True))
    assert path.read_text() == '{"begun": 3}'


@pytest.mark.parametrize(
    "given, sentence",
    [
        ("mine.py", "--against mine.py: expected FILE.py:function"),
        ("gone.py:f", "--against gone.py:f: no file gone.py"),
        ("{path}:g", "has no function 'g'"),
        ("{path}:HEAD", "has no function 'HEAD'"),
        ("{broken}:f", "cannot be imported: ZeroDivisionError"),
    ],
)
def test_a_function_that_is_not_there_is_one_sentence(given, sentence, write_file, tmp_path):
    (tmp_path / "broken.py").write_text("1 / 0\n")
    given = given.format(path=write_file(""), broken=tmp_path / "broken.py")
    with pytest.raises(InputError, match=sentence):
        main(Config(ops=("rms_norm",), shape=(SHAPE,), against=(given,)))


def test_a_function_named_twice_is_refused(write_file):
    path = write_file("")
    with pytest.raises(InputError, match="expected each function once"):
        main(Config(ops=("rms_norm",), shape=(SHAPE,), against=(f"{path}:right", f"{path}:right")))


# ---- planted faults in the check itself


def wrong_of(kind: str, write_file, monkeypatch: pytest.MonkeyPatch) -> str:
    (contestant,) = theirs.against((f"{write_file(WRONG[kind][0])}:f",))
    dims = {"B": 1, "T": 30, "C": 77}
    draws = [make_inputs(CASE, dims, torch.float32, "cpu") for _ in range(2)]
    case = replace(CASE, fixed=("x", "weight"))  # forward alone
    return theirs.why_not(contestant.op, case, draws, describe(CASE, dims, torch.float32))


@pytest.mark.parametrize(
    "kind, name, looks_away",
    [
        ("a memory", "remembers", lambda *_: ""),
        ("other arguments", "misfit", lambda *_: ""),
        ("in place", "same", lambda *_: True),
        ("scaled", "verdicts", lambda *_: []),
    ],
)
def test_a_check_that_looks_away_is_seen(kind, name, looks_away, write_file, monkeypatch):
    """Each part of the check finds what no other finds, or says so otherwise."""
    reason = wrong_of(kind, write_file, monkeypatch)
    assert any(word in reason for word in WRONG[kind][1])
    monkeypatch.setattr(theirs, name, looks_away)
    assert wrong_of(kind, write_file, monkeypatch) != reason
