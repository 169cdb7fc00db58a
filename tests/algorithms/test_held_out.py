"""The evaluation on held-out rows during training: its figures in every trainer, the best model, and when to stop."""

import dataclasses
import itertools
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from burnish.algorithms import distill, dpo, evaluate, grpo, kto, ppo, reward, sft
from burnish.algorithms.recipes.sums import make_tokenizer
from burnish.algorithms.run import held_out, loop
from burnish.algorithms.run.held_out import Evaluation, Figure, as_numbers, higher_is_better, report_held_out
from burnish.algorithms.run.learner import Learner
from burnish.algorithms.run.loop import Run
from burnish.model.checkpoint import load_model, save_model
from burnish.model.errors import InputError
from burnish.model.text.tokenizer import Tokenizer
from burnish.model.transformer import Transformer
from faults import check_of, control, faults_of
from planted import copy_of

TRAIN = {"steps": 2, "eval_every": 1, "learning_rate": 1e-2, "warmup_steps": 0, "device": "cpu"}
WHOLE = {"batch_size": 64, "micro_batch_tokens": 400}  # a step takes every row, in several micro-batches
ONE_UPDATE = {"epochs_per_rollout": 1, "minibatches": 1}  # of ppo
RL = {"max_new_tokens": 6, "prompts_per_step": 4, "group_size": 2}


@pytest.fixture
def folder(model_folder: Path, demonstrations: Path, pairs: Path, prompts: Path, tmp_path: Path) -> Path:
    torch.set_num_threads(1)
    config = dataclasses.replace(load_model(model_folder).config, initializer_range=0.3)
    save_model(Transformer(config, seed=7), tmp_path / "teacher", Tokenizer.load(model_folder))
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    judged = [
        {"prompt": row["prompt"], "completion": row["chosen" if i % 3 else "rejected"], "label": i % 3 > 0}
        for i, row in enumerate(rows)
    ]
    (tmp_path / "judged.jsonl").write_text("".join(json.dumps(row) + "\n" for row in judged))
    (tmp_path / "rewards.py").write_text(
        "def odd(completion_ids, log_metric, **_):\n"
        "    log_metric('calls', len(completion_ids))\n"
        "    return [float(sum(i % 2 for i in ids)) for ids in completion_ids]\n"
    )
    return tmp_path


def config(module: ModuleType, folder: Path, data: str, **changes: Any) -> Any:
    """A short run whose held-out rows are its own."""
    file = folder / data
    common = {"model": folder / "random-model", "data": file, "eval_data": file, "output": folder / "run"}
    return module.Config(**{**common, **TRAIN, **changes})


def logged(cfg: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (cfg.output / "metrics.jsonl").read_text().splitlines()]


def results(cfg: Any) -> dict[str, dict[str, Any]]:
    return json.loads((cfg.output / "held_out.json").read_text())


# ---- every trainer's figures

SUPERVISED = {  # name: (method, data, flags, figures that the next step's metrics repeat, other figures)
    "sft": (sft, "demonstrations.jsonl", {}, {"loss": "loss"}, {"perplexity"}),
    "sft-dft": (sft, "demonstrations.jsonl", {"loss": "dft"}, {"dft_loss": "loss"}, {"loss", "perplexity"}),
    "reward": (
        reward,
        "pairs.jsonl",
        {"centering": 0.5},
        {"loss": "loss", "accuracy": "accuracy", "margin": "margin"},
        set(),
    ),
    "kto": (
        kto,
        "judged.jsonl",
        {"wanted_weight": 1.3, "beta": 1.0},
        {"loss": "loss", "kl": "kl", "margin": "margin"},
        {"accuracy"},
    ),
    "distill": (
        distill,
        "demonstrations.jsonl",
        {"teacher": "teacher", "temperature": 2.0, "temperature_squared": True, "beta": 0.3},
        {"loss": "loss", "divergence": "divergence"},
        set(),
    ),
    "distill-sequence": (distill, "demonstrations.jsonl", {"loss": "sequence"}, {"loss": "loss"}, set()),
}
OF_PAIRS = {"loss": "loss", "accuracy": "accuracy", "margin": "margin"}
for name in ("dpo", "ipo", "cpo", "simpo", "orpo"):
    of_logprobs = {"logprob_accuracy", "logprob_margin"}
    SUPERVISED[f"dpo-{name}"] = (dpo, "pairs.jsonl", {"loss": name, "beta": 0.5}, OF_PAIRS, of_logprobs)


@pytest.mark.parametrize("name", SUPERVISED)
def test_held_out_figures_are_those_of_the_next_step_on_the_same_rows(folder, name, capsys):
    """A step's metrics are from before its update, so the next step on all rows repeats the evaluation."""
    module, data, flags, repeated, others = SUPERVISED[name]
    flags = {**flags, **({"teacher": folder / "teacher"} if "teacher" in flags else {})}
    cfg = config(module, folder, data, **{**WHOLE, **flags})
    module.train(cfg)
    first, second = logged(cfg)
    before, after = results(cfg)["before"], results(cfg)["after"]
    for figure, metric in repeated.items():
        assert before[figure] == pytest.approx(first[metric], abs=2e-5), figure
        assert first[f"eval_{figure}"] == pytest.approx(second[metric], abs=2e-5), figure
        assert after[figure] == second[f"eval_{figure}"]
    assert second["eval_loss"] < first["eval_loss"] < before["loss"] and second["eval_loss_error"] > 0

    items = {"kto": "completions", "reward": "pairs"}.get(name, "pairs" if module is dpo else "rows")
    names = repeated.keys() | others
    assert before.keys() == after.keys() == {*names, *(f"{name}_error" for name in names), items}
    assert first.keys() == second.keys() and first["eval_seconds"] > 0 and after[items] == 64
    out = capsys.readouterr().out
    assert f"evaluates on 64 held-out {items} before training, every step and at the end\n" in out
    assert f"held out: loss {before['loss']:.4g} -> {after['loss']:.4g} +- {after['loss_error']:.2g}" in out


def test_figures_are_those_of_evaluate(folder):
    cfg = config(sft, folder, "demonstrations.jsonl", batch_size=16)
    model = sft.train(cfg)
    flags = {"model": model, "data": cfg.data, "output": folder / "evaluated", "device": "cpu"}
    found = evaluate.evaluate(evaluate.Config(**flags))
    after = results(cfg)["after"]
    names = {"nats": "loss", "nats_error": "loss_error", "perplexity": "perplexity"}
    assert {ours: after[ours] for ours in names.values()} == pytest.approx(
        {ours: found[theirs] for theirs, ours in names.items()}, rel=1e-6
    )

    cfg = config(reward, folder, "pairs.jsonl", batch_size=16, output=folder / "scores")
    model = reward.train(cfg)
    found = evaluate.evaluate(
        evaluate.Config(**flags | {"model": model, "data": cfg.data, "output": folder / "judged"})
    )
    after = results(cfg)["after"]
    assert 100 * after["accuracy"] == pytest.approx(found["accuracy"])
    assert 100 * after["accuracy_error"] == pytest.approx(found["accuracy_error"])
    assert after["margin"] == pytest.approx(found["margin"], abs=1e-5)


@pytest.mark.parametrize("module", [grpo, ppo])
def test_rl_samples_each_held_out_prompt_once_from_the_same_noise(folder, module):
    rewards = (f"{folder}/rewards.py:odd",)
    flags = RL | (ONE_UPDATE if module is ppo else {})
    cfg = config(module, folder, "prompts.jsonl", reward=rewards, **flags, learning_rate=0.0)
    module.train(cfg)
    first, second = logged(cfg)
    before, after = results(cfg)["before"], results(cfg)["after"]
    assert before == after and before["prompts"] == 32
    assert {name for name in before if "/" in name} == {"reward/odd", "metric/calls"}
    assert before["metric/calls"] == 8 and 0 < before["length"] <= 6 and 0 <= before["ended"] <= 1
    assert {name: value for name, value in first.items() if name.startswith("eval_r")} == {
        name: value for name, value in second.items() if name.startswith("eval_r")
    }
    if module is grpo:
        assert before["reward"] == before["reward/odd"] and before["reward_error"] > 0

    moved = config(module, folder, "prompts.jsonl", reward=rewards, **flags, output=folder / "moved")
    module.train(dataclasses.replace(moved, keep_best="reward/odd"))
    assert results(moved)["before"] == before != results(moved)["after"]


def test_ppos_figures_are_defined_as_in_training(folder):
    """Score of functions and reward model, reward with penalty and KL: those of the next rollout."""
    # 1. a reward model
    scores = reward.train(
        reward.Config(
            **{**TRAIN, "eval_every": 0},
            model=folder / "random-model",
            data=folder / "pairs.jsonl",
            output=folder / "scores",
        )
    )

    cfg = config(
        ppo,
        folder,
        "prompts.jsonl",
        reward=(f"{folder}/rewards.py:odd",),
        reward_model=scores,
        missing_end_penalty=0.5,
        kl_coefficient=0.2,
        temperature=1.3,
        **ONE_UPDATE,
        **{**RL, "prompts_per_step": 32, "group_size": 1, "steps": 3, "learning_rate": 3e-2},
    )

    # 2. the noise and the prompts of a rollout are those of the evaluation
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("burnish.algorithms.run.loop.Run.next", lambda run: [*range(32)])
        sample = ppo.Sampler.sample
        seed = (cfg.seed << 32) + 2**32 - 1
        patch.setattr(ppo.Sampler, "sample", lambda *given: sample(*given[:-1], seed))
        ppo.train(cfg)

    lines = logged(cfg)
    assert results(cfg)["before"]["kl"] == 0 and lines[-1]["eval_kl"] > 0
    for line, later in itertools.pairwise(lines):
        for name in ("score", "reward", "kl", "length", "ended"):
            assert line[f"eval_{name}"] == pytest.approx(later[name], abs=1e-4), name


def test_a_student_that_answers_is_evaluated_on_its_answers(folder):
    flags = {"teacher": folder / "teacher", "student_samples": 1.0, "max_new_tokens": 5, "batch_size": 8}
    cfg = config(distill, folder, "prompts.jsonl", loss="policy_gradient", keep_best="loss", **flags)
    distill.train(cfg)
    before, after = results(cfg)["before"], results(cfg)["after"]
    assert before.keys() == after.keys() >= {"loss", "loss_error", "length", "ended", "rows"}
    assert 0 < after["loss"] < before["loss"]  # an estimate of the reverse KL


# ---- figures


def test_a_model_that_has_diverged_is_saved_all_the_same(folder, monkeypatch):
    """The evaluation after the last step comes before the model is written."""
    cfg = config(sft, folder, "demonstrations.jsonl", steps=1)
    log = sft.Run.log

    def diverged(run, *given):
        next(iter(run._learners.values())).model.norm.weight.data.fill_(math.nan)
        log(run, *given)

    monkeypatch.setattr(sft.Run, "log", diverged)
    sft.train(cfg)
    assert results(cfg)["after"]["loss"] is None and (cfg.output / "model").is_dir()


def test_names_of_users_have_no_error_and_nan_is_none():
    figures = {"loss": Figure(math.nan, 0.5, 3), "reward/x": Figure(1.0, 2.0, 3)}
    assert as_numbers(figures, "eval_") == {"eval_loss": None, "eval_loss_error": 0.5, "eval_reward/x": 1.0}


def test_the_line_at_the_end(tmp_path, capsys):
    before = {"loss": Figure(2.31, 0.01, 200), "accuracy": Figure(0.51, 0.04, 200)}
    after = {"loss": Figure(1.87, 0.02, 200), "accuracy": Figure(0.745, 0.031, 200)}
    report_held_out(tmp_path, Evaluation("pairs", 200, dict), before, after)
    expected = "held out: loss 2.31 -> 1.87 +- 0.02, accuracy 51.0 -> 74.5 +- 3.1 %, 200 pairs\n"
    assert capsys.readouterr().out == expected


# ---- the best model, and the end

NAN = math.nan
COURSES = {  # (metric, values of the evaluations): steps at which it is the best so far
    ("loss", (3.0, 2.0, 2.0, 2.5, 1.0)): [1, 2, 5],
    ("reward/x", (-3.0, -2.0, -2.0, -2.5, -1.0)): [1, 2, 5],
    ("accuracy", (NAN, math.inf, 0.5, NAN, 0.4)): [3],
    ("kl", (NAN, NAN, NAN, NAN, NAN)): [],
}


@control
def the_best_is_the_first_of_the_best(module: ModuleType) -> None:
    for (metric, course), expected in COURSES.items():
        values: dict[str, Any] = {}
        found = [
            done
            for done, mean in enumerate(course, 1)
            if module.improved(metric, {metric: Figure(mean, 0.0, 1)}, values, done)
        ]
        assert found == expected, metric
        assert values.get("best_step") == (expected or [None])[-1]
        assert values["unimproved"] == 5 - (expected or [0])[-1]


def test_the_best_is_the_first_of_the_best():
    the_best_is_the_first_of_the_best(held_out)


@control
def patience_lasts_as_long_as_asked(module: ModuleType) -> None:
    cfg = sft.Config(model=Path("m"), data=Path("d"), patience=2)
    for count, expected in ((0, False), (1, False), (2, True), (3, True)):
        assert module.is_over(cfg, {"unimproved": count}) is expected, count
    assert not module.is_over(cfg, {})
    assert not module.is_over(dataclasses.replace(cfg, patience=None), {"unimproved": 9})


def test_patience_lasts_as_long_as_asked():
    patience_lasts_as_long_as_asked(held_out)


FAULTS = faults_of(__file__)


@pytest.mark.parametrize("fault", [f for f in FAULTS if f.file.endswith("held_out")], ids=lambda f: f.id)
def test_a_planted_fault_is_caught(fault, tmp_path, monkeypatch):
    module = copy_of(fault.file, tmp_path, monkeypatch, fault)
    with pytest.raises(AssertionError):
        check_of(fault)(module)


@pytest.mark.parametrize("fault", [f for f in FAULTS if f.file.endswith("loop")], ids=lambda f: f.id)
def test_a_planted_fault_of_the_loop_is_caught(fault, scripted, tmp_path, monkeypatch):
    module = copy_of(fault.file, tmp_path, monkeypatch, fault)
    with pytest.raises(AssertionError):
        check_of(fault)(module, scripted)


def follow(cfg: sft.Config, course: list[float], run_class: Any = Run) -> list[int]:
    """Train on nothing, with a loss of each evaluation as given: before training, then after steps 1, 2, ...

    Returns the steps that ran.
    """
    model = load_model(cfg.model)
    learner, tokenizer, place = Learner(cfg, model), Tokenizer(make_tokenizer(), eos="<eos>"), [0]
    measure = lambda: {"loss": Figure(course[place[0]], 0.1, 9), "length": Figure(1.0, 0.0, 9)}
    steps = []
    with run_class(cfg, tokenizer, rows=9, evaluation=Evaluation("rows", 9, measure), model=learner) as run:
        for step in run.steps():
            steps.append(step)
            place[0] = step + 1
            with torch.no_grad():
                model.norm.weight.fill_(step + 1.0)  # the saved model tells its step
            run.log({"loss": 0.0}, tokens=1)
        run.save()
    return steps


@pytest.fixture
def scripted(folder) -> sft.Config:
    cfg = config(sft, folder, "demonstrations.jsonl", keep_best="loss", save_every=1)
    return dataclasses.replace(cfg, steps=9, patience=3)


def best_step(cfg: sft.Config) -> float:
    return load_model(cfg.output / "best").norm.weight[0].item()


def test_patience_that_ends_with_the_last_step_stops_nothing_early(scripted, capsys):
    cfg = dataclasses.replace(scripted, steps=4)
    assert follow(cfg, [0.1, 5.0, 6.0, 6.0, 6.0]) == [*range(4)]
    assert "stopped early" not in capsys.readouterr().out


def test_the_best_model_is_kept_and_the_run_stops(scripted, capsys):
    """The untrained model is no candidate, though its loss is the lowest."""
    course = [0.1, 5.0, 4.0, 4.0, NAN, 3.0, 3.5, 3.0, 6.0, 1.0]
    assert follow(scripted, course) == [*range(8)]
    assert best_step(scripted) == 5
    out = capsys.readouterr().out
    assert "stopped early: 3 evaluations in a row without a better loss (--patience 3)\n" in out
    assert f"best: loss 3 after step 5: {scripted.output / 'best'}\n" in out
    assert results(scripted)["after"]["loss"] == 6 and len(logged(scripted)) == 8

    # it is over, and stays so
    assert follow(dataclasses.replace(scripted, resume=True), course) == []
    # and with more patience it goes on
    assert follow(dataclasses.replace(scripted, resume=True, patience=4), course) == [8]
    assert best_step(scripted) == 9


@control
def a_resumed_run_decides_alike(module: ModuleType, cfg: sft.Config) -> None:
    """The best figure and the evaluations since are those before the stop, and `before` is of the untrained model."""
    course = [9.0, 5.0, 4.0, 4.5, 4.5, 4.5, 1.0, 1.0, 1.0, 1.0]
    assert follow(dataclasses.replace(cfg, steps=3), course, module.Run) == [0, 1, 2]
    assert follow(dataclasses.replace(cfg, resume=True), course, module.Run) == [3, 4]
    assert best_step(cfg) == 2
    assert (results(cfg)["before"]["loss"], results(cfg)["after"]["loss"]) == (9.0, 4.5)


def test_a_resumed_run_decides_alike(scripted):
    a_resumed_run_decides_alike(loop, scripted)


def test_evaluation_is_due_where_the_flags_say(scripted):
    cfg = dataclasses.replace(scripted, steps=5, eval_every=2, patience=None)
    follow(cfg, [9.0, 8.0, 7.0, 6.0, 5.0, 4.0])
    found = [line.get("eval_loss") for line in logged(cfg)]
    assert found == [None, 7, None, 5, 4]  # the last step's, too
    assert results(cfg) == {
        "before": {"loss": 9.0, "loss_error": 0.1, "length": 1.0, "length_error": 0.0, "rows": 9},
        "after": {"loss": 4.0, "loss_error": 0.1, "length": 1.0, "length_error": 0.0, "rows": 9},
    }


def test_seconds_of_a_step_are_without_its_evaluation(scripted, monkeypatch):
    cfg = dataclasses.replace(scripted, steps=3, patience=None, save_every=0)
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    learner = Learner(cfg, load_model(cfg.model))
    tokenizer = Tokenizer(make_tokenizer(), eos="<eos>")

    def measure() -> dict[str, Figure]:
        clock[0] += 100.0
        return {"loss": Figure(1.0, 0.1, 9)}

    with Run(cfg, tokenizer, rows=9, evaluation=Evaluation("rows", 9, measure), model=learner) as run:
        for _ in run.steps():
            clock[0] += 2.0
            run.log({"loss": 0.0}, tokens=10)
    lines = logged(cfg)
    assert [line["seconds"] for line in lines] == [2.0] * 3
    assert [line["eval_seconds"] for line in lines] == [100.0] * 3
    assert [line["tokens_per_second"] for line in lines] == [5.0] * 3


# ---- wrong flags

REFUSED = {
    "--eval-every: expected --eval-data FILE": {"eval_data": None},
    "--keep-best: expected --eval-data FILE": {"eval_data": None, "eval_every": 0, "keep_best": "loss"},
    "--patience: expected --eval-data FILE": {"eval_data": None, "eval_every": 0, "patience": 1},
    "--keep-best: expected --eval-every N": {"eval_every": 0, "keep_best": "loss"},
    "--patience: expected --keep-best METRIC": {"patience": 2},
    "--keep-best: expected a metric of the evaluation, one of loss, perplexity, got accuracy": {
        "keep_best": "accuracy"
    },
}


@pytest.mark.parametrize("message", REFUSED)
def test_flags_that_have_no_effect_are_refused(folder, message):
    cfg = config(sft, folder, "demonstrations.jsonl", **REFUSED[message])
    with pytest.raises(InputError, match=message):
        sft.train(cfg)
    assert not cfg.output.exists()


def test_a_metric_that_is_neither_good_nor_bad_is_no_choice(scripted):
    with pytest.raises(InputError, match="one of loss, got length"):
        follow(dataclasses.replace(scripted, keep_best="length"), [1.0])
    assert [higher_is_better(name) for name in ("loss", "margin", "metric/x", "length")] == [
        False,
        True,
        True,
        None,
    ]


def test_wrong_held_out_rows_are_named_by_file_and_line(folder):
    file = folder / "bad.jsonl"
    file.write_text('{"prompt": "1+1=", "completion": "2"}\n{"prompt": "1+1="\n')
    with pytest.raises(InputError, match=r"bad.jsonl line 2"):
        sft.train(config(sft, folder, "demonstrations.jsonl", eval_data=file))
    flags = {"teacher": None, "loss": "sequence"}
    with pytest.raises(InputError, match=r"expected .*pairs.jsonl|pairs.jsonl line 1"):
        distill.train(
            config(distill, folder, "demonstrations.jsonl", eval_data=folder / "pairs.jsonl", **flags)
        )
