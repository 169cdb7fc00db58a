"""A run folder: claimed at once and by one run, swept when a run goes on, pruned by --keep, flushed to the disk."""

import dataclasses
import errno
import os
import signal
import stat
import time
from pathlib import Path

import pytest
import torch
from burnish.algorithms import distill, dpo, evaluate, grpo, kto, ppo, reward, sft
from burnish.algorithms.run import checkpoint as checkpoint_file
from burnish.algorithms.run import claim, folder
from burnish.algorithms.run.checkpoint import write_checkpoint
from burnish.algorithms.run.checks import CHECKPOINT, LOCK
from burnish.algorithms.run.flags import new_run_folder
from burnish.algorithms.run.folder import flush_logs, keep_newest
from burnish.model.errors import InputError
from crash import in_a_process
from crash_runs import content, make_tasks
from faults import check_of, control, faults_of
from planted import plant
from torch import nn

TRAINERS = (sft, reward, dpo, kto, ppo, grpo, distill)


@pytest.fixture
def cfg(tmp_path):
    torch.set_num_threads(1)
    return dataclasses.replace(make_tasks(tmp_path)["sft"].config, output=tmp_path / "out")


@pytest.fixture
def run(cfg):
    """A run of two steps that can go on."""
    sft.train(cfg)
    return dataclasses.replace(cfg, resume=True)


def whole_content(folder: Path) -> dict[str, bytes | None]:
    """Return the content of all files but the lock: closing that here would release it."""
    paths = [path for path in folder.rglob("*") if path.name != LOCK]
    return {str(path): path.read_bytes() if path.is_file() else None for path in paths}


def refusal(cfg) -> str:
    with pytest.raises(InputError) as caught:
        sft.train(cfg)
    return str(caught.value)


# ---- the claim


def in_another_process(cfg) -> str:
    """The message with which another process is refused."""

    def train():
        claim._claimed.clear()  # of this process, which is another's copy
        sft.train(cfg)

    ended = in_a_process(train, cfg.output)
    assert ended.status == 99, ended.output
    return ended.output


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_in_use_is_refused_and_left_alone(cfg, monkeypatch, resume):
    """The second run comes when the first has just begun, and in its last step."""
    if resume:
        sft.train(cfg)
    first = dataclasses.replace(cfg, resume=resume, steps=3)
    load, log, messages = sft.load_tokenizer, sft.Run.log, []

    def second() -> None:
        before = whole_content(cfg.output)
        again = dataclasses.replace(first, resume=(cfg.output / CHECKPOINT).exists())
        messages.append(in_another_process(again))
        assert "this process trains in it" in refusal(again)
        if again.resume:
            assert "found one in use" in refusal(dataclasses.replace(first, resume=False))
        assert whole_content(cfg.output) == before

    monkeypatch.setattr(sft, "load_tokenizer", lambda *given: (second(), load(*given))[1])
    monkeypatch.setattr(
        sft.Run, "log", lambda self, *given: (log(self, *given), second() if self._step == 2 else None)
    )
    sft.train(first)
    for text in messages:
        assert f"expected a folder that no other run uses, but process {os.getpid()} on " in text
    assert len(messages) == 2 and not (cfg.output / LOCK).exists()


@pytest.mark.parametrize("module", TRAINERS, ids=lambda module: module.__name__.rpartition(".")[2])
def test_every_trainer_claims_its_folder_first(module, tmp_path, monkeypatch):
    seen = []

    class Stop(Exception):
        pass

    def check(cfg, **_):
        seen.append(sorted(entry.name for entry in cfg.output.iterdir()))
        raise Stop

    monkeypatch.setattr(module, "check_flags", check)
    given = {"model": tmp_path, "data": tmp_path, "output": tmp_path / "new" / "run"}
    given |= {"reward": ("rewards.py:f",)} if module is grpo else {}
    with pytest.raises(Stop):
        module.train(module.Config(**given))
    assert seen == [[LOCK]] and not (tmp_path / "new").exists()


def test_a_refused_run_leaves_no_folder_that_it_made(cfg):
    wrong = dataclasses.replace(cfg, data=cfg.data.with_name("nothing"), output=cfg.output / "a" / "b")
    refusal(wrong)
    assert not cfg.output.exists()
    cfg.output.mkdir()
    refusal(wrong)
    refusal(dataclasses.replace(wrong, output=cfg.output))
    assert list(cfg.output.iterdir()) == []


def test_a_killed_run_leaves_a_folder_that_can_be_claimed(cfg):
    """Its lock has gone with it, although a worker that it forked lives on; the file may be there."""
    cfg.output.mkdir()

    def train_and_die():
        with claim._claim(cfg.output, False):
            if os.fork() == 0:
                time.sleep(5)
                os._exit(0)
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_a_process(train_and_die, cfg.output).status == -9
    assert (cfg.output / LOCK).exists()
    sft.train(cfg)
    assert not (cfg.output / LOCK).exists()


def test_a_lock_that_was_removed_meanwhile_is_taken_again(cfg, monkeypatch):
    """The run before has removed the file between our opening and our locking it."""
    lockf, times = claim.fcntl.lockf, []

    def slow(opened, how):
        times.append(opened)
        if len(times) == 1:
            (cfg.output / LOCK).unlink()
        return lockf(opened, how)

    monkeypatch.setattr(claim.fcntl, "lockf", slow)
    with claim._claim(cfg.output, False):
        assert len(times) == 2 and (cfg.output / LOCK).exists()
        assert "but process" in in_another_process(cfg)


def test_no_run_goes_on_without_the_lock(cfg):
    """A first run may write its checkpoint just after another has looked for it."""
    cfg.output.mkdir()
    with pytest.raises(InputError, match="holds no checkpoint"), claim._claim(cfg.output, True):
        pass


def test_the_end_of_a_moved_run_leaves_the_lock_of_another_in_its_place(cfg):
    with claim._claim(cfg.output, False):
        cfg.output.rename(cfg.output.with_name("moved"))
        cfg.output.mkdir()
        (cfg.output / LOCK).write_text("of another run")
    assert (cfg.output / LOCK).read_text() == "of another run"


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP, None])
def test_where_locks_do_not_work_a_sentence_says_so(cfg, monkeypatch, capsys, code):
    if code is None:
        monkeypatch.setattr(claim, "fcntl", None)
    else:
        fail = lambda *_: (_ for _ in ()).throw(OSError(code, os.strerror(code)))
        monkeypatch.setattr(claim.fcntl, "lockf", fail)
    sft.train(cfg)
    notes = [line for line in capsys.readouterr().err.splitlines() if "cannot be locked" in line]
    assert len(notes) == 1 and "start no other run with this --output" in notes[0]
    assert not (cfg.output / LOCK).exists() and (cfg.output / "model").is_dir()


def test_a_file_of_the_lock_s_name_is_not_harmed(cfg, tmp_path):
    (tmp_path / "kept").write_text("kept")
    cfg.output.mkdir()
    (cfg.output / LOCK).symlink_to(tmp_path / "kept")
    assert f"{LOCK}: expected the run's own file" in refusal(cfg)
    (cfg.output / LOCK).unlink()
    os.mkfifo(cfg.output / LOCK)
    assert f"{LOCK}: expected the run's own file" in refusal(cfg)
    (cfg.output / LOCK).unlink()

    (cfg.output / LOCK).write_text("theirs")
    (cfg.output / "notes").write_text("theirs")
    assert "found one in use" in refusal(cfg)
    assert (cfg.output / LOCK).read_text() == "theirs" and (tmp_path / "kept").read_text() == "kept"


def test_other_commands_refuse_a_folder_that_a_run_has_claimed(cfg):
    with claim._claim(cfg.output, False), pytest.raises(InputError, match="found one in use"):
        evaluate.evaluate(evaluate.Config(model=cfg.model, data=cfg.data, output=cfg.output, device="cpu"))


def test_runs_of_the_same_second_have_folders_of_their_own():
    assert len({new_run_folder("sft") for _ in range(20)}) > 15


# ---- what killed runs have left


def test_a_resumed_run_sweeps_its_folder(run, tmp_path):
    (run.output / ".checkpoint.safetensors.partial").write_bytes(b"half")
    (run.output / ".step-2.abcdefgh.partial").mkdir()
    (run.output / ".step-2.abcdefgh.partial" / "model.safetensors").write_bytes(b"half")
    (run.output / "model").rename(run.output / ".model.earlier")
    (run.output / "checkpoint-9-1-of-2.safetensors").write_bytes(b"of a checkpoint that was never completed")
    (run.output / "notes.partial").write_text("theirs")
    refusal(dataclasses.replace(run, batch_size=4))
    assert (run.output / ".model.earlier").exists()  # a refused run sweeps nothing

    sft.train(run)
    names = {entry.name for entry in run.output.iterdir()}
    shown = {"report.html", "versions.json"}
    assert names == {"config.json", "metrics.jsonl", CHECKPOINT, "model", "step-2", "notes.partial", *shown}


# ---- --keep


@control
def the_newest_stay(place: Path) -> None:
    """Only models are removed and counted, by number and not by name, and none of later steps."""
    for name in ("step-8", "step-9", "step-10", "step-11", "step-12", "best", "step-x", "step-1"):
        (place / name).mkdir()
        (place / name / "config.json").write_text("{}")
    (place / "step-9" / "notes.txt").write_text("theirs")

    keep_newest(place, None, 11)
    assert len(list(place.iterdir())) == 8
    keep_newest(place, 2, 11)
    assert {path.name for path in place.iterdir()} == {
        "step-9",
        "step-10",
        "step-11",
        "step-12",
        "best",
        "step-x",
    }
    keep_newest(place, 1, 11)
    assert {path.name for path in place.iterdir()} == {"step-9", "step-11", "step-12", "best", "step-x"}


def test_keep(cfg, tmp_path):
    the_newest_stay(_made(tmp_path / "models"))
    sft.train(dataclasses.replace(cfg, steps=4, keep=2))
    steps = lambda: sorted(path.name for path in cfg.output.glob("step-*"))
    assert steps() == ["step-3", "step-4"]
    sft.train(dataclasses.replace(cfg, steps=4, keep=1, resume=True))
    assert steps() == ["step-4"]
    assert refusal(dataclasses.replace(cfg, save_every=0, keep=1, output=tmp_path / "x")).startswith("--keep")


def test_an_older_model_is_removed_only_after_the_new_checkpoint(cfg, monkeypatch):
    save = checkpoint_file.save_file
    seen = []

    def saved(tensors, file, **given):
        seen.append(sorted(path.name for path in cfg.output.glob("step-*")))
        save(tensors, file, **given)

    monkeypatch.setattr(checkpoint_file, "save_file", saved)
    sft.train(dataclasses.replace(cfg, steps=3, keep=1))
    assert seen == [["step-1"], ["step-1", "step-2"], ["step-2", "step-3"]]


# ---- the disk


@control
def logs_before_the_checkpoint(place: Path) -> None:
    """The logs are flushed before the checkpoint is renamed, and the folder after it."""
    calls: list[str] = []
    fsync, rename = os.fsync, Path.replace
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            os,
            "fsync",
            lambda file: (calls.append(os.path.basename(os.readlink(f"/proc/self/fd/{file}"))), fsync(file)),
        )
        patch.setattr(
            Path, "replace", lambda file, to: (calls.append(f"rename {to.name}"), rename(file, to))[1]
        )

        for name in folder.LOGS:
            (place / name).write_text("{}\n")
        flush_logs(place)
        write_checkpoint(place / CHECKPOINT, {"model": nn.Linear(1, 1)}, {"step": 1})
    partial = f".{CHECKPOINT}.partial"
    assert calls == [*folder.LOGS, partial, f"rename {CHECKPOINT}", place.name]


def test_what_a_checkpoint_counts_on_is_on_the_disk_before_it(cfg, tmp_path, monkeypatch):
    logs_before_the_checkpoint(_made(tmp_path / "place"))
    calls, rename = [], Path.replace
    flush = flush_logs
    monkeypatch.setattr("burnish.algorithms.run.loop.flush_logs", lambda f: (calls.append("logs"), flush(f)))
    monkeypatch.setattr(Path, "replace", lambda file, to: (calls.append(to.name), rename(file, to))[1])
    sft.train(cfg)
    assert [name for name in calls if name in ("logs", CHECKPOINT, "config.json")] == (
        ["config.json"] + ["logs", CHECKPOINT] * 2
    )


def test_every_file_has_the_mode_of_the_umask(cfg):
    earlier = os.umask(0o027)
    try:
        sft.train(cfg)
    finally:
        os.umask(earlier)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in cfg.output.rglob("*") if path.is_file()}
    folders = {stat.S_IMODE(path.stat().st_mode) for path in cfg.output.rglob("*") if path.is_dir()}
    assert modes == {0o640} and folders == {0o750} and content(cfg.output)


def _made(place: Path) -> Path:
    place.mkdir()
    return place


# ---- planted faults


@pytest.mark.parametrize("fault", faults_of(__file__), ids=lambda fault: fault.id)
def test_a_planted_fault_is_caught(fault, tmp_path, monkeypatch):
    plant(fault, monkeypatch)
    with pytest.raises((AssertionError, OSError)):
        check_of(fault)(_made(tmp_path / "place"))
