"""Negative controls: faults planted in copies of distill, sft and lessons, each caught by the named check.

The checks are those of the tests beside this file in their smallest form. A faithful copy must pass them all.
"""

import dataclasses
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from burnish.algorithms import distill
from burnish.algorithms.run.batch import make_batches
from burnish.algorithms.run.flags import SamplingFlags
from burnish.model.checkpoint import load_model, save_model
from burnish.model.packed import pack
from burnish.model.text.tokenizer import Tokenizer
from burnish.model.transformer import Transformer
from controlled import Place, assert_a_stopped_run_goes_on, assert_caught, assert_faithful, metrics_of, same
from faults import Fault, control, faults_of


def distill_config(module: ModuleType, place: Place, **changes: Any) -> Any:
    folder = place.output.parent
    rows = [json.loads(line) for line in place.data.read_text().splitlines()]
    texts = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    common = {"model": place.model, "data": folder / "texts.jsonl", "output": place.output, "device": "cpu"}
    if hasattr(module, "divergence_loss"):
        common |= {"teacher": teacher_of(place)}
    flags = {"steps": 1, "batch_size": 5, "learning_rate": 1e-2, "warmup_steps": 0, "schedule": "constant"}
    return module.Config(**{**common, **flags, **changes})


def teacher_of(place: Place) -> Path:
    folder = place.output.parent / "teacher"
    if not folder.exists():
        config = dataclasses.replace(load_model(place.model).config, initializer_range=0.3)
        save_model(Transformer(config, seed=7), folder, Tokenizer.load(place.model))
    return folder


# ---- the checks


@control
def a_stopped_run_of_it_goes_on(module: ModuleType, place: Place) -> None:
    """A run of distillation, within the module's Run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distill, "Run", module.Run)
        assert_a_stopped_run_goes_on(distill, distill_config, place)


@control
def one_step_is_one_sum(module: ModuleType, place: Place) -> None:
    """However it is cut up, on its rows or on the student's own samples."""
    own = {"student_samples": 1.0, "max_new_tokens": 6} if hasattr(module, "divergence_loss") else {}
    for i, flags in enumerate([{}, own]):
        found = []
        for tokens in (10**6, 20):
            output = place.output / f"{i}-{tokens}"
            module.train(distill_config(module, place, micro_batch_tokens=tokens, output=output, **flags))
            found.append(metrics_of(output)[0])
        for name in ("loss", "grad_norm"):
            same(found[0][name], found[1][name], 1e-4)


@control
def the_divergence_is_that_of_the_models(module: ModuleType, place: Place) -> None:
    """The loss, written out over the whole distributions at each token of the completions."""
    student, teacher = load_model(place.model), load_model(teacher_of(place))
    tokenizer = Tokenizer.load(place.model)
    settings = [(0.0, 1.0, False), (1.0, 2.0, True), (0.3, 2.0, False)]

    for i, (beta, temperature, squared) in enumerate(settings):
        output = place.output / str(i)
        flags = {"beta": beta, "temperature": temperature, "temperature_squared": squared}
        cfg = distill_config(module, place, batch_size=12, output=output, **flags)
        module.train(cfg)

        total, count = 0.0, 0
        for row in map(json.loads, cfg.data.read_text().splitlines()):
            given = tokenizer.encode(row["prompt"])
            tokens = given + tokenizer.encode(row["completion"], continues=True) + [tokenizer.eos_id]
            packed = pack([tokens])

            # (completion, V): a row predicts a token of the completion
            log_s, log_t = (
                (model.logits(model(packed))[len(given) - 1 : -1] / temperature).log_softmax(-1)
                for model in (student, teacher)
            )

            if beta in (0, 1):
                one, other = (log_t, log_s) if beta == 0 else (log_s, log_t)
                found = one.exp() * (one - other)
            else:
                log_m = (beta * log_t.exp() + (1 - beta) * log_s.exp()).log()
                found = beta * log_t.exp() * (log_t - log_m) + (1 - beta) * log_s.exp() * (log_s - log_m)

            total, count = total + found.sum().item(), count + len(log_s)
        same(metrics_of(output)[0]["loss"], total / count * (temperature**2 if squared else 1), 1e-5)


@control
def the_gradient_points_to_the_teacher(module: ModuleType, place: Place) -> None:
    logprob, teacher = torch.tensor([-1.0, -3.0], requires_grad=True), torch.tensor([-2.0, -1.0])
    loss = module.policy_gradient_loss(logprob, teacher, 4)
    same(loss.item(), (1.0 - 2.0) / 4)
    for found, expected in zip(torch.autograd.grad(loss, logprob)[0].tolist(), (0.25, -0.5), strict=True):
        same(found, expected)
    same(module.sequence_loss(logprob, 4).item(), 1.0)


@control
def the_share_of_own_samples_is_kept(module: ModuleType, place: Place) -> None:
    module.train(distill_config(module, place, student_samples=0.5, max_new_tokens=1, batch_size=1, steps=20))
    share = sum(line["student_samples"] for line in metrics_of(place.output)) / 20
    assert 0.2 < share < 0.8, f"expected about half of the steps on own samples, got {share}"


@control
def lessons_are_what_they_should_be(module: ModuleType, place: Place) -> None:
    """Answers behind their prompts, trained to the end token; trained tokens beside what was stored for them."""
    model, tokenizer = load_model(place.model), Tokenizer.load(place.model)
    prompts = [tokenizer.encode("1+2+3="), tokenizer.encode("4+5=")]
    lessons, ended = module.answered(model, tokenizer, prompts, SamplingFlags(max_new_tokens=30), seed=0)
    assert any(ended), "expected an end"
    for lesson, prompt in zip(lessons, prompts, strict=True):
        assert lesson.prefix == prompt, "expected the prompt"
        assert all(lesson.mask[len(prompt) :]), "expected all of the answer, and its end, to be trained"

    ids = torch.arange(6).view(3, 2).int()
    stored = [
        module.Lesson([1, 2, 3], [False, True, True], ids[:2], -ids[:2].float()),
        module.Lesson([4, 5], [False, True], ids[2:], -ids[2:].float()),
    ]

    file = place.output.with_suffix(".safetensors")
    module.write_lessons(file, stored, tokenizer, 1.0)
    back = module.read_lessons(file, tokenizer, 1.0)
    (one,) = make_batches(back, 100, "cpu")
    assert one.packed.tokens[one.rows].tolist() == [2, 3, 5], "expected the trained tokens"
    assert one.teacher_ids.tolist() == ids.tolist(), "expected what was stored"
    assert one.teacher_logprobs.tolist() == (-ids).tolist(), "expected what was stored"


# ---- planted faults

FAULTS = faults_of(__file__)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.id)
def test_fault_is_caught(fault: Fault, place: Place, monkeypatch):
    assert_caught(fault, place, monkeypatch)


@pytest.mark.parametrize("file", sorted({fault.file for fault in FAULTS}))
def test_a_faithful_copy_passes(file: str, place: Place, monkeypatch):
    assert_faithful(file, FAULTS, place, monkeypatch)
