"""A GPU's run gives a verdict: what fails, dies, hangs or is not reached is named, and ends nobody else's test."""

import os
import shlex
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from burnish.algorithms.run.parsing import parsed
from burnish.bench import command, flags, record
from burnish.bench.cases.registry import CASES
from burnish.bench.runs import crew as crews
from burnish.bench.runs import gpu
from burnish.bench.runs.crew import Crew, Plan
from burnish.bench.runs.verdict import Verdict
from burnish.bench.runs.worker import RAN, End, placed
from burnish.kernels._chip import INTERPRET
from burnish.model.errors import InputError
from burnish.model.files.text_files import read_object

pytestmark = pytest.mark.skipif(INTERPRET, reason="nothing of it is interpreted")

PLANTED = """
import os, signal, sys, time, types

def test_passes(): pass
def test_fails(): assert 1 == 2, "one is not two\\nand more"
def test_crashes(): os.kill(os.getpid(), signal.SIGSEGV)
def test_hangs(): time.sleep(600)

def test_loses_the_device():
    def synchronize(): raise RuntimeError("an illegal memory access was encountered\\nand more")
    cuda = types.SimpleNamespace(is_initialized=lambda: True, synchronize=synchronize)
    sys.modules["torch"] = types.SimpleNamespace(cuda=cuda)

def test_after(): assert "torch" not in sys.modules
"""


@pytest.fixture
def crew(tmp_path):
    """crew(seconds, source): the verdict on a file of tests."""

    def run(seconds: float, source: str, **changes) -> Verdict:
        (tmp_path / "test_planted.py").write_text(source)
        (tmp_path / "pytest.ini").touch()
        verdict = Verdict(tmp_path / "verdict.json", {"kind": "tests"})
        settings = {"chip": None, "arguments": [str(tmp_path)], "processes": 2, "patience": 1.0} | changes
        Crew(verdict, **settings).run(time.monotonic() + seconds)
        return verdict

    return run


@pytest.mark.slow
def test_whatever_happens_is_named_and_ends_nothing_else(crew, tmp_path, capsys):
    (tmp_path / "test_broken.py").write_text("import no_such_module")
    verdict = crew(60, PLANTED)
    found = verdict.ops["planted"]
    assert found["passed"] == 2 and not found["not_reached"] and verdict.status == 1
    rows = {row["test"].split("::")[-1]: row for row in found["failed"]}
    assert {name: row["why"] for name, row in rows.items()} == {
        "test_fails": "AssertionError: one is not two",
        "test_crashes": "its process died: signal SIGSEGV",
        "test_hangs": "did not end within 1 s: signal SIGABRT",
        "test_loses_the_device": "the device is lost: an illegal memory access was encountered",
    }

    # the details, and a file that could not be collected
    assert (
        "in test_crashes" in rows["test_crashes"]["detail"]
        and "in test_hangs" in rows["test_hangs"]["detail"]
    )
    (broken,) = verdict.ops["collection"]["failed"]
    assert broken["test"] == "test_broken.py" and "no_such_module" in broken["detail"]
    assert read_object(tmp_path / "verdict.json")["ops"] == verdict.ops

    verdict.print_all()
    out = capsys.readouterr().out
    assert out.count("          AssertionError: one is not two\n") == 1  # where it ended
    assert "FAILED test_planted.py::test_hangs: did not end" in out
    assert out.splitlines()[-1] == "tests: 2 passed, 0 skipped, 5 failed, 0 not reached"


@pytest.mark.slow
def test_what_is_not_reached_is_named(crew):
    source = "import time\ndef test_one(): pass\ndef test_two(): time.sleep(600)\ndef test_three(): pass\n"
    begun = time.monotonic()
    verdict = crew(5, source, processes=1, patience=600)
    assert time.monotonic() - begun < 12 and verdict.status == 3
    assert verdict.ops["planted"]["passed"] == 1
    assert verdict.ops["planted"]["not_reached"] == [
        "test_planted.py::test_two",
        "test_planted.py::test_three",
    ]


@pytest.mark.slow
def test_tests_that_ignore_everything_do_not_hold_up_the_end(crew, monkeypatch: pytest.MonkeyPatch):
    """Each that hangs may have its last words; together they would take longer than is left."""
    monkeypatch.setattr(crews, "LAST_WORDS", 600.0)
    source = """
import signal, time
def hang():
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGABRT])
    time.sleep(600)
def test_one(): hang()
def test_two(): hang()
"""
    begun = time.monotonic()
    verdict = crew(8, source, patience=0.5)
    assert time.monotonic() - begun < 14
    assert verdict.total("failed") == verdict.total("not_reached") == 1


@pytest.mark.slow
def test_workers_that_do_not_start_end_the_run(crew, tmp_path):
    verdict = crew(60, "", arguments=[str(tmp_path), "--no-such-flag"], processes=1)
    failed = verdict.ops["collection"]["failed"]
    assert len(failed) == crews.STARTS and verdict.status == 1
    assert "--no-such-flag" in failed[0]["detail"]


# ---- order


def taken(plan: Plan, seconds: dict[str, float]) -> str:
    """The ops in the order in which one worker gets their tests, each of so many seconds."""
    ops = []
    while test := plan.take([]):
        ops.append(test.op)
        plan.spent[test.op] += seconds[test.op]
    return " ".join(ops)


def test_one_shape_of_each_op_then_each_its_share():
    tests = [
        crews.Test(f"{op} {wave} {n}", op, wave)
        for op in ("glu", "moe")
        for wave in (4, 3, 0)
        for n in range(2)
    ]
    order = taken(Plan(tests), {"glu": 1, "moe": 4})
    assert (
        order == "moe glu glu moe glu glu moe glu glu moe moe moe"
    )  # four seconds of weight 2 are as one and one of 1
    plan = Plan(tests)
    first = [plan.take([]), plan.take([("moe", 0.0)])]
    assert [test and test.name for test in first] == ["moe 0 0", "glu 0 0"]


def item(case=None, dtype=None, name="test_accuracy", file="test_cases.py", **parameters):
    parameters |= {"case": case} if case else {}
    parameters |= {"dtype": dtype} if dtype else {}
    return SimpleNamespace(
        nodeid="", path=Path(file), originalname=name, callspec=SimpleNamespace(params=parameters)
    )


def test_where_a_test_stands():
    first, other = [c for c in CASES if c.op == "flash_attention"][:2]
    norm = next(c for c in CASES if c.name == "rms_norm/heads")
    bf16 = torch.bfloat16
    assert placed(item(first, bf16, dims=first.shapes[1])).wave == 0
    assert placed(item(other, bf16, dims=other.shapes[1]))[1:] == ("attention", 1)
    assert placed(item(norm, bf16, dims=norm.shapes[1]))[1:] == ("norm", 2)
    assert placed(item(first, name="test_accuracy_in_shipped_tiles", dims=first.configurations[0])).wave == 1
    assert placed(item(first, bf16, dims=first.shapes[0])).wave == 3
    assert placed(item(first, torch.float16, dims=first.shapes[1])).wave == 4
    assert placed(item(file="test_moe.py"))[1:] == ("moe", 3)
    kernels = Path(__file__).parents[1] / "kernels"
    assert placed(item(file=kernels / "test_attention_packed.py"))[1:] == ("attention", 3)
    assert placed(item(file=kernels / "test_wrong_calls.py"))[1:] == ("wrong_calls", 3)


def test_every_op_has_a_place():
    homes = {placed(item(c)).op for c in CASES}
    assert homes == set(crews.WEIGHTS) and set(RAN) < homes
    assert set(gpu.OPS) <= {c.op for c in CASES}
    ordered = gpu.ordered_ops()
    assert sorted(ordered) == sorted({c.op for c in CASES}) and ordered[: len(gpu.OPS)] == gpu.OPS


def test_the_steps_share_the_time():
    assert dict(gpu.step_ends(["tests", "bench", "tune"], 10, 100)) == pytest.approx(
        {"tests": 60, "bench": 95, "tune": 110}
    )
    assert dict(gpu.step_ends(["tests"], 10, 100)) == {"tests": 110}


# ---- the other steps


def test_a_command_is_ended_in_time():
    begun = time.monotonic()
    assert gpu.run_watched(["-c", "import time; time.sleep(600)"], begun + 0.5) is None
    assert time.monotonic() - begun < 5
    assert gpu.run_watched(["-c", "raise SystemExit(7)"], time.monotonic() + 60) == 7


def test_a_command_that_writes_nothing_is_ended(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu, "PATIENCE", 0.5)
    begun = time.monotonic()
    assert gpu.run_watched(["-c", "import time; time.sleep(600)"], begun + 60, tmp_path / "none.json") is None
    assert time.monotonic() - begun < 10


def test_a_benchmark_that_dies_is_begun_again(tmp_path, monkeypatch: pytest.MonkeyPatch):
    statuses = [-11, None, 0, 0]  # a crash, a hang, the rest; then the table of paths
    commands = []
    last = time.monotonic() + 100

    def run_watched(words, end, written=None):
        assert end <= last - gpu.GRACE if written else end <= last  # the table of paths has the last seconds
        commands.append(words)
        return statuses.pop(0)

    monkeypatch.setattr(gpu, "run_watched", run_watched)
    assert gpu.benchmark(last, tmp_path / "r.json", "abc") == 0
    assert {words[1] for words in commands} == {"burnish.bench"}
    assert [words[2] for words in commands] == ["moe_mlp"] * 3 + ["paths"]
    assert {"--peers", "--resume", str(tmp_path / "r.json"), "moe_mlp"} <= set(commands[0])
    statuses[:] = [1, 0]
    assert gpu.benchmark(last, tmp_path / "r.json", "abc") == 1
    statuses[:] = [0]
    assert gpu.benchmark(time.monotonic(), tmp_path / "r.json", "abc") == 1  # nothing was timed


# ---- the machine


def test_without_a_gpu_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="--rehearse sm_90"):
        gpu.main(gpu.Config())


@pytest.mark.parametrize(
    "words, message",
    [
        ("--rehearse sm_91", "--rehearse: expected one of sm_80, "),
        ("--rehearse sm_90 --steps bench", "--rehearse: expected --steps tests, or none, got bench"),
        ("--steps bench tune --json r.json", "--json, arguments for pytest: expected tests among --steps"),
        ("--steps tune -- tests/kernels", "--json, arguments for pytest: expected tests among --steps"),
        ("--seconds nan", "--seconds: expected a number between 0.001 and 1e+06, got nan"),
        ("--patience 0", "--patience: expected a number between 0.001 and 1e+06, got 0.0"),
        ("--processes 0", "--processes: expected a number at least 1, got 0"),
    ],
)
def test_no_argument_is_ignored(words, message, capsys):
    assert command.main(["gpu", *words.split()], plain=True) == 1
    assert message in capsys.readouterr().err


DOORS = {
    "tyro": lambda words: parsed("gpu", gpu, words),
    "argparse": lambda words: flags.parse("gpu", gpu.Config, words, ""),
}


@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
def test_arguments_for_pytest_stand_behind_two_dashes(door):
    tests, expression = "tests/kernels/test_attention.py", "-k swiglu/ and not clamped"
    for arguments, words in (
        ((tests,), f"--steps tests --seconds 120 -- {tests}".split()),
        ((tests, *expression.split(" ", 1)), ["--steps", "tests", "--", tests, *expression.split(" ", 1)]),
        (("-x", "--", "a"), ["--processes", "2", "--", "-x", "--", "a"]),
        ((), ["--processes", "2"]),
    ):
        cfg = door(words)
        assert cfg.arguments == arguments and cfg.steps == (("tests",) if "tests" in words else ())
        assert door(shlex.split(flags.spelled("", cfg))) == cfg


def test_a_step_without_a_name_is_refused(capsys):
    with pytest.raises(SystemExit):
        flags.parse("gpu", gpu.Config, ["--steps"], "")
    assert "--steps: expected at least one argument" in capsys.readouterr().err


def test_sigterm_ends_what_was_started():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended, gpu.ended_by_sigterm():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
    assert ended.value.code == 143 and signal.getsignal(signal.SIGTERM) == before


def test_a_driver_that_hangs_is_unknown(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(record, "PATIENCE", 0.2)
    assert record.run_text("sleep", "60") == "unknown"


@pytest.mark.parametrize(
    "statuses, expected", [((0, 0, 0), 0), ((3, 0, 0), 3), ((3, 1, 0), 1), ((0, 0, 1), 1)]
)
def test_every_step_counts(statuses, expected, tmp_path, monkeypatch: pytest.MonkeyPatch):
    """On a machine that says it has a GPU; the steps are answered."""
    outcome = {0: "passed", 3: "skipped"}[statuses[0]]

    def run(crew, end):
        crew.verdict.add(crews.Test("a test", "moe", 0), End(outcome), 1.0)
        crew.verdict.write({})

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "machine", lambda device: {"device": f"A {device} GPU"})
    monkeypatch.setattr(gpu, "clocks", lambda device: "")
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(Crew, "run", run)
    monkeypatch.setattr(gpu, "benchmark", lambda end, path, commit: statuses[1])
    monkeypatch.setattr(gpu, "tune", lambda end, commit: statuses[2])
    assert gpu.main(gpu.Config(commit="abc")) == expected
    (file,) = tmp_path.glob("tests-a-cuda-gpu-*.json")
    report = read_object(file)
    assert report["kind"] == "tests" and report["ops"]["moe"][outcome] == 1 and report["commit"] == "abc"
    assert gpu.main(gpu.Config(steps=("tune",), commit="abc")) == statuses[2]


@pytest.mark.slow
def test_a_rehearsal_compiles(tmp_path, capsys):
    """The accuracy tests of one op, for a chip that is not there."""
    tests = ("tests/kernels/test_cases.py", "-k", "test_accuracy and swiglu/ and not clamped")
    file = tmp_path / "r.json"
    cfg = gpu.Config(rehearse="sm_90", processes=2, seconds=120, json=file, arguments=tests)
    assert gpu.main(cfg) == 0

    report = read_object(file)
    found = report["ops"]["glu"]
    assert found["passed"] > 10 and found["seconds"] > 1
    assert report["command"].endswith(
        "-- tests/kernels/test_cases.py -k 'test_accuracy and swiglu/ and not clamped'"
    )
    out = capsys.readouterr().out
    assert out.index("T=5 F=101-torch.bfloat16") < out.index("T=5 F=101-torch.float32")
