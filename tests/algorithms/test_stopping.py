"""SIGTERM: the step under way ends, a checkpoint is written, the status is 143, and the run can go on."""

import dataclasses
import json
import os
import signal
import threading
import time

import pytest
import torch
from burnish.algorithms import grpo, sft
from burnish.algorithms.run import stopping
from burnish.algorithms.run.checks import CHECKPOINT
from burnish.algorithms.run.loop import Run
from burnish.model.errors import InputError
from crash import in_a_process
from crash_runs import content, make_tasks

STATUS = 143


@pytest.fixture
def tasks(tmp_path):
    torch.set_num_threads(1)
    return make_tasks(tmp_path)


@pytest.fixture
def cfg(tasks, tmp_path):
    """Four steps of sft without a checkpoint."""
    return dataclasses.replace(tasks["sft"].config, steps=4, save_every=0, keep=None, output=tmp_path / "out")


def terminate(times: int = 1, pause: float = 0.0) -> None:
    for _ in range(times):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(pause)


def at_step(monkeypatch, step: int, act=terminate) -> None:
    """Act in the middle of a step, once its metrics are logged."""
    log = Run.log

    def log_and_act(self, *given):
        log(self, *given)
        if self._step == step:
            act()

    monkeypatch.setattr(Run, "log", log_and_act)


@pytest.mark.parametrize("save_every", [0, 2, 3])
def test_a_step_ends_and_is_saved(cfg, monkeypatch, save_every):
    cfg = dataclasses.replace(cfg, save_every=save_every)
    whole = dataclasses.replace(cfg, output=cfg.output.with_name("whole"))
    sft.train(whole)
    with monkeypatch.context() as patch:
        at_step(patch, 1)
        ended = in_a_process(lambda: sft.train(cfg), cfg.output)
    assert ended.status == STATUS
    (line,) = [line for line in ended.output.splitlines() if "SIGTERM" in line]
    assert line.endswith(
        f"stopped after 2 of 4 steps; to go on, repeat the command with --output {cfg.output} --resume"
    )
    assert len((cfg.output / "metrics.jsonl").read_text().splitlines()) == 2
    assert not list(cfg.output.glob(".*")) and (cfg.output / CHECKPOINT).exists()

    sft.train(dataclasses.replace(cfg, resume=True))
    found, expected = content(cfg.output), content(whole.output)
    if not save_every:
        found.pop(CHECKPOINT)
    assert found == expected


def test_the_last_step_is_saved_too(cfg, monkeypatch):
    with monkeypatch.context() as patch:
        at_step(patch, 3)
        assert in_a_process(lambda: sft.train(cfg), cfg.output).status == STATUS
    assert sft.train(dataclasses.replace(cfg, resume=True)).is_dir()


def test_a_sigterm_while_the_model_is_saved_lets_it_be_saved(cfg, monkeypatch):
    save = Run.save
    monkeypatch.setattr(Run, "save", lambda self: (terminate(), save(self))[1])
    ended = in_a_process(lambda: sft.train(cfg), cfg.output)
    assert ended.status == STATUS and "all its results are saved" in ended.output
    assert (cfg.output / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize("place", ["load_tokenizer", "load_trainee", "Learner"])
def test_before_the_first_step_nothing_is_left(cfg, monkeypatch, place):
    function = getattr(sft, place)
    monkeypatch.setattr(sft, place, lambda *given: (terminate(), function(*given)))
    output = cfg.output / "new" / "run"
    ended = in_a_process(lambda: sft.train(dataclasses.replace(cfg, output=output)), cfg.output)
    assert ended.status == STATUS and not cfg.output.exists()


def test_a_sigterm_while_a_reward_file_is_loaded_is_no_error_of_the_file(tasks, tmp_path):
    (tmp_path / "odd.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\n")
    cfg = dataclasses.replace(tasks["grpo"].config, output=tmp_path / "out")
    ended = in_a_process(lambda: grpo.train(cfg), cfg.output)
    assert ended.status == STATUS and not cfg.output.exists()


def test_a_sigterm_in_a_function_before_the_first_step_is_no_error_of_the_function(tasks, tmp_path):
    """The untrained model is evaluated: a SIGTERM comes while a function judges its samples."""
    (tmp_path / "odd.py").write_text(
        "import os, signal\n"
        "def odd(completions, **_):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return [1.0] * len(completions)\n"
    )
    cfg = tasks["grpo"].config
    cfg = dataclasses.replace(cfg, eval_data=cfg.data, output=tmp_path / "out")
    ended = in_a_process(lambda: grpo.train(cfg), cfg.output)
    assert ended.status == STATUS and not cfg.output.exists()


def test_a_sigterm_just_before_the_first_step_takes_back_what_was_written(cfg, monkeypatch):
    monkeypatch.setattr(Run, "steps", lambda self: terminate())
    assert in_a_process(lambda: sft.train(cfg), cfg.output).status == STATUS
    assert not cfg.output.exists()


def test_events_written_before_the_first_step_are_taken_back_too(cfg, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.setattr(Run, "steps", lambda self: terminate())
    cfg = dataclasses.replace(cfg, log_to="tensorboard")
    assert in_a_process(lambda: sft.train(cfg), cfg.output).status == STATUS
    assert not cfg.output.exists()


def test_a_resumed_run_that_has_not_begun_a_step_keeps_all(cfg, monkeypatch):
    sft.train(dataclasses.replace(cfg, save_every=2))
    before = content(cfg.output)
    monkeypatch.setattr(Run, "steps", lambda self: terminate())
    again = dataclasses.replace(cfg, save_every=2, steps=6, resume=True)
    assert in_a_process(lambda: sft.train(again), cfg.output).status == STATUS
    assert content(cfg.output) == before


def test_a_second_sigterm_ends_at_once(cfg, monkeypatch):
    at_step(monkeypatch, 1, lambda: terminate(2))
    ended = in_a_process(lambda: sft.train(cfg), cfg.output)
    assert ended.status == -signal.SIGTERM and not (cfg.output / CHECKPOINT).exists()


def test_several_processes_take_two_within_a_moment_for_one(cfg, monkeypatch):
    """A scheduler and torchrun send one each."""
    monkeypatch.setattr(stopping, "world", lambda: 2)
    with monkeypatch.context() as patch:
        at_step(patch, 1, lambda: terminate(2))
        assert in_a_process(lambda: sft.train(cfg), cfg.output).status == STATUS
    monkeypatch.setattr(stopping, "SAME", 0.01)
    at_step(monkeypatch, 1, lambda: terminate(2, pause=0.02))
    again = dataclasses.replace(cfg, output=cfg.output.with_name("again"))
    assert in_a_process(lambda: sft.train(again), again.output).status == -signal.SIGTERM


def test_a_full_disk_at_sigterm_is_one_sentence(cfg, monkeypatch):
    """No message of success, and the status of wrong input."""
    full = lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    monkeypatch.setattr("burnish.algorithms.run.checkpoint.save_file", full)
    at_step(monkeypatch, 1)

    def train():
        with pytest.raises(InputError, match=r"cannot be written.*No space left"):
            sft.train(cfg)

    ended = in_a_process(train, cfg.output)
    assert ended.status == 0 and "SIGTERM" not in ended.output


def test_workers_of_a_reward_function_end_by_sigterm(tasks, tmp_path):
    """A pool that ends its workers by SIGTERM waits for their end."""
    reward = tmp_path / "workers.py"
    reward.write_text(
        "import os, signal, time\n"
        "def workers(completion_ids, **_):\n"
        "    pid = os.fork()\n"
        "    if pid == 0:\n"
        "        time.sleep(9)\n"
        "        os._exit(0)\n"
        "    os.kill(pid, signal.SIGTERM)\n"
        "    assert os.waitpid(pid, 0)[1] == signal.SIGTERM\n"
        "    return [float(i) for i in range(len(completion_ids))]\n"
    )

    changes = {"reward": (f"{reward}:workers",), "steps": 1, "output": tmp_path / "out"}
    started = time.monotonic()
    assert grpo.train(dataclasses.replace(tasks["grpo"].config, **changes)).is_dir()
    assert time.monotonic() - started < 8


def test_the_handler_is_put_back(cfg, monkeypatch):
    seen = []

    def earlier(number, frame):
        seen.append(number)

    before = signal.signal(signal.SIGTERM, earlier)
    try:
        sft.train(dataclasses.replace(cfg, steps=1))
        assert signal.getsignal(signal.SIGTERM) is earlier
        with pytest.raises(InputError):
            sft.train(dataclasses.replace(cfg, steps=1))
        assert signal.getsignal(signal.SIGTERM) is earlier
        terminate()
        assert seen == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_thread_and_a_process_that_ignores_it_are_left_alone(cfg, monkeypatch):
    handlers = []
    monkeypatch.setattr(Run, "save", lambda self: handlers.append(signal.getsignal(signal.SIGTERM)))
    runs = iter(range(9))
    train = lambda: sft.train(dataclasses.replace(cfg, steps=1, output=cfg.output / str(next(runs))))
    thread = threading.Thread(target=train)
    thread.start()
    thread.join()

    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        train()
    finally:
        signal.signal(signal.SIGTERM, before)
    train()
    assert handlers == [before, signal.SIG_IGN, stopping._handle]


def test_ctrl_c_is_as_it_was(cfg, monkeypatch):
    at_step(monkeypatch, 1, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        sft.train(cfg)
    assert not (cfg.output / CHECKPOINT).exists()
    assert [json.loads(line)["step"] for line in (cfg.output / "metrics.jsonl").read_text().splitlines()] == [
        0,
        1,
    ]
