"""`burnish distill` and `burnish teach` as a user runs them: values, invariants, and what a teacher's file holds."""

import dataclasses
import json
import math

import pytest
import torch
from burnish.algorithms import distill, sft, teach
from burnish.algorithms.__main__ import main
from burnish.algorithms.data.lessons import Lesson, load_lessons, read_lessons, write_lessons
from burnish.model.checkpoint import load_model, save_model
from burnish.model.config import ModelConfig
from burnish.model.errors import InputError
from burnish.model.packed import pack
from burnish.model.text.tokenizer import Tokenizer
from burnish.model.transformer import Transformer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

OWN = {"student_samples": 1.0, "max_new_tokens": 8}


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def teacher(model_folder, tmp_path):
    """Wider than the student, and drawn so that it has preferences."""
    tokenizer = Tokenizer.load(model_folder)
    config = ModelConfig(
        vocab_size=tokenizer.vocabulary.end,
        hidden_size=24,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=0,
        initializer_range=0.3,
    )
    save_model(Transformer(config, seed=5), tmp_path / "teacher", tokenizer)
    return tmp_path / "teacher"


@pytest.fixture
def cfg(model_folder, teacher, demonstrations, tmp_path):
    return distill.Config(
        model=model_folder,
        teacher=teacher,
        data=demonstrations,
        output=tmp_path / "out",
        steps=3,
        batch_size=12,
        learning_rate=1e-2,
        warmup_steps=0,
        device="cpu",  # fp32 throughout
    )


@pytest.fixture
def lessons(teacher, demonstrations, tmp_path):
    """Lessons on the demonstrations, with all the ids that there are."""
    return teach.teach(
        teach.Config(model=teacher, data=demonstrations, output=tmp_path / "taught", top_k=17, device="cpu")
    )


def same_weights(one, other, tolerance):
    for a, b in zip(load_model(one).parameters(), load_model(other).parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


# ---- a step


MODES = [
    {},
    {"beta": 0.5, "temperature": 2.0, "temperature_squared": True},
    {"beta": 1.0, **OWN},
    {"loss": "policy_gradient", **OWN},
    {"loss": "sequence", "teacher": None},
]


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_gradients_do_not_depend_on_micro_batches(cfg, tmp_path, mode):
    """All at once, ragged, and one by one; the denominator is the whole step's."""
    trained = []
    for tokens in (10**6, 40, 1):
        output = tmp_path / f"out-{tokens}"
        run = dataclasses.replace(cfg, steps=1, micro_batch_tokens=tokens, output=output, **mode)
        trained.append(distill.train(run))
        ours, first = metrics_of(output)[0], metrics_of(tmp_path / f"out-{10**6}")[0]
        for name in ("loss", "grad_norm", "trained_tokens"):
            assert ours[name] == pytest.approx(first[name], rel=1e-5)
    same_weights(trained[0], trained[1], 2e-5)
    same_weights(trained[0], trained[2], 2e-5)


def test_the_loss_is_the_kl_of_the_two_models_over_completions(cfg):
    distill.train(dataclasses.replace(cfg, steps=1, batch_size=64))
    student, teacher, tokenizer = load_model(cfg.model), load_model(cfg.teacher), Tokenizer.load(cfg.model)
    total, count = 0.0, 0
    for example in load_lessons(cfg, tokenizer, prompts_alone=False, temperature=None):
        packed = pack([example.tokens])
        log_s, log_t = (model.logits(model(packed)).log_softmax(-1)[:-1] for model in (student, teacher))
        trained = torch.tensor(example.mask[1:])
        total += (log_t.exp() * (log_t - log_s)).sum(-1)[trained].sum().item()
        count += int(trained.sum())
        assert example.tokens[-1] == tokenizer.eos_id and example.mask[-1]  # the end token is trained
    (line,) = metrics_of(cfg.output)
    assert line["trained_tokens"] == count and line["loss"] == pytest.approx(total / count, rel=1e-5)
    assert line["divergence"] == line["loss"]


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode.get("loss") != "sequence"], ids=str)
def test_a_teacher_that_is_the_student_has_nothing_to_teach(cfg, mode):
    distill.train(dataclasses.replace(cfg, teacher=cfg.model, steps=1, **mode))
    (line,) = metrics_of(cfg.output)
    assert line["loss"] == pytest.approx(0, abs=1e-6) and line["grad_norm"] < 1e-5


def test_the_square_of_the_temperature_scales_the_loss_alone(cfg, tmp_path):
    lines = []
    for squared in (False, True):
        output = tmp_path / str(squared)
        distill.train(
            dataclasses.replace(cfg, temperature=2.0, temperature_squared=squared, output=output, steps=1)
        )
        lines += metrics_of(output)
    assert lines[1]["loss"] == pytest.approx(4 * lines[0]["loss"], rel=1e-6)
    assert lines[1]["grad_norm"] == pytest.approx(4 * lines[0]["grad_norm"], rel=1e-5)
    assert lines[1]["divergence"] == lines[0]["divergence"] == lines[0]["loss"]


def test_sequence_level_is_sft_to_the_bit(cfg, tmp_path):
    by_sequence = distill.train(dataclasses.replace(cfg, loss="sequence", teacher=None))
    plain = sft.train(
        sft.Config(
            model=cfg.model,
            data=cfg.data,
            output=tmp_path / "sft",
            steps=3,
            batch_size=12,
            learning_rate=1e-2,
            warmup_steps=0,
            device="cpu",
        )
    )
    same_weights(by_sequence, plain, 0)


def test_the_students_own_samples_are_scored_as_they_were_sampled(cfg, monkeypatch):
    """The samples stand behind their prompts, up to the end token, at the temperature of sampling."""
    seen, whole = [], distill.make_batches
    monkeypatch.setattr(distill, "make_batches", lambda given, *a: seen.append(given) or whole(given, *a))
    cfg = dataclasses.replace(cfg, loss="policy_gradient", temperature=1.5, learning_rate=0.0, **OWN)
    distill.train(cfg)

    model, tokenizer = load_model(cfg.model), Tokenizer.load(cfg.model)
    prompts = {
        tuple(lesson.prefix) for lesson in load_lessons(cfg, tokenizer, prompts_alone=True, temperature=None)
    }

    for line, batch in zip(metrics_of(cfg.output), seen, strict=True):
        entropies = []
        for lesson in batch:
            length = sum(lesson.mask)
            assert tuple(lesson.prefix) in prompts and all(lesson.mask[-length:]) and length <= 8
            assert length == 8 or lesson.tokens[-1] in tokenizer.stop_ids
            rows = torch.arange(len(lesson.prefix), len(lesson.tokens))
            _, _, entropy = model.score(pack([lesson.tokens]), rows, temperature=1.5)
            entropies.append(entropy)
        assert line["entropy"] == pytest.approx(torch.cat(entropies).mean().item(), rel=1e-5)
        lasts = [lesson.tokens[-1] in tokenizer.stop_ids for lesson in batch]
        assert line["ended"] == pytest.approx(sum(lasts) / len(lasts)) and 0 < line["ended"] < 1
        assert line["length"] * len(batch) == pytest.approx(line["trained_tokens"])


def test_the_share_of_own_samples_is_gkds_lambda(cfg):
    """A coin for each step, the same when it is thrown again."""
    cfg = dataclasses.replace(cfg, student_samples=0.4, max_new_tokens=2, batch_size=2, steps=40)
    distill.train(cfg)
    own = [line["student_samples"] for line in metrics_of(cfg.output)]
    assert set(own) == {0, 1} and 0.2 < sum(own) / 40 < 0.6
    assert all(("ended" in line) == bool(line["student_samples"]) for line in metrics_of(cfg.output))


def test_paddings_of_the_vocabulary_are_no_tokens(cfg, teacher, tmp_path):
    """Two families pad their embeddings to different widths: ids that no text has do not take part."""
    tokenizer, model = Tokenizer.load(teacher), load_model(teacher)
    wide = Transformer(dataclasses.replace(model.config, vocab_size=24), seed=9)
    for weight, target in zip(model.parameters(), wide.parameters(), strict=True):
        with torch.no_grad():
            target[: weight.shape[0]] = weight
    save_model(wide, tmp_path / "wide", tokenizer)
    distill.train(cfg)
    distill.train(dataclasses.replace(cfg, teacher=tmp_path / "wide", output=tmp_path / "padded"))
    for one, other in zip(metrics_of(cfg.output), metrics_of(tmp_path / "padded"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)


# ---- lessons


def test_all_ids_stored_are_the_teacher_itself(cfg, lessons, tmp_path):
    with_teacher = distill.train(dataclasses.replace(cfg, beta=0.5))
    stored = dataclasses.replace(cfg, beta=0.5, teacher=None, data=lessons, output=tmp_path / "stored")
    without = distill.train(stored)
    for one, other in zip(metrics_of(cfg.output), metrics_of(stored.output), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=2e-4)
    same_weights(with_teacher, without, 2e-3)


def test_a_teacher_tells_where_its_lessons_are_and_what_they_are_for(capsys, lessons):
    assert capsys.readouterr().out.endswith(f"written: {lessons}, which is --data of burnish distill\n")


def test_fewer_ids_and_a_tail_are_a_lower_bound_that_rises(cfg, teacher, tmp_path):
    """Ids taken as one can only hide a difference: the divergence falls with K, and is never negative."""
    found = []
    for k in (1, 3, 8, 17):
        folder = tmp_path / f"taught-{k}"
        file = teach.teach(teach.Config(model=teacher, data=cfg.data, output=folder, top_k=k, device="cpu"))
        run = dataclasses.replace(
            cfg, teacher=None, data=file, output=tmp_path / f"out-{k}", steps=1, learning_rate=0.0
        )
        distill.train(run)
        found += [metrics_of(run.output)[0]["divergence"]]
    assert 0 < found[0] < found[1] < found[2] < found[3]


def test_a_teacher_packs_a_file_as_its_turn_comes(teacher, cfg, tmp_path, most_packed):
    folder = tmp_path / "taught"
    teach.teach(
        teach.Config(
            model=teacher, data=cfg.data, output=folder, top_k=3, device="cpu", micro_batch_tokens=50
        )
    )
    assert 1 <= most_packed() <= 2


def test_a_lesson_holds_the_teachers_most_likely_ids(teacher, lessons):
    model, tokenizer = load_model(teacher), Tokenizer.load(teacher)
    for lesson in read_lessons(lessons, tokenizer, 1.0)[:3]:
        log_p = model.logits(model(pack([lesson.tokens]))).log_softmax(-1)
        rows = torch.tensor(lesson.mask).nonzero().squeeze(1) - 1
        assert lesson.ids is not None and lesson.logprobs is not None
        torch.testing.assert_close(log_p[rows].gather(1, lesson.ids.long()), lesson.logprobs)
        assert (lesson.logprobs.diff(dim=1) <= 0).all() and lesson.ids.shape[0] == sum(lesson.mask)


def test_a_teachers_answers_are_kept_as_ids(teacher, model_folder, prompts, tmp_path):
    """Sequence-level distillation: the tokens that were sampled, not the text read anew."""
    taught = teach.Config(
        model=teacher,
        data=prompts,
        output=tmp_path / "taught",
        samples=2,
        top_k=0,
        max_new_tokens=6,
        device="cpu",
    )

    file, tokenizer = teach.teach(taught), Tokenizer.load(teacher)
    lessons = read_lessons(file, tokenizer, None)
    assert len(lessons) == 64 and all(0 < sum(lesson.mask) <= 6 for lesson in lessons)
    assert all(lessons[i].prefix == lessons[i + 1].prefix for i in range(0, 64, 2))
    assert lessons[0].tokens != lessons[1].tokens and lessons[0].ids is None

    run = distill.Config(
        model=model_folder,
        data=file,
        loss="sequence",
        output=tmp_path / "out",
        steps=30,
        learning_rate=1e-2,
        warmup_steps=0,
        device="cpu",
    )

    distill.train(run)
    losses = [line["loss"] for line in metrics_of(run.output)]
    assert losses[-1] < losses[0] - 0.1
    with pytest.raises(InputError, match="holds no log-probabilities: expected --teacher DIR"):
        distill.train(dataclasses.replace(run, loss="divergence", output=tmp_path / "none"))


def test_lessons_are_written_whole_and_read_as_they_were(model_folder, tmp_path):
    tokenizer, file = Tokenizer.load(model_folder), tmp_path / "x.safetensors"
    ids, logprobs = torch.tensor([[3, 1], [2, 0], [1, 2]]).int(), -torch.rand(3, 2)
    given = [
        Lesson([1, 2, 3], [False, True, True], ids[:2], logprobs[:2]),
        Lesson([4, 5], [False, True], ids[2:], logprobs[2:]),
    ]
    write_lessons(file, given, tokenizer, 2.0)
    for one, other in zip(given, read_lessons(file, tokenizer, 2.0), strict=True):
        assert (one.tokens, one.mask) == (other.tokens, other.mask)
        assert torch.equal(one.ids, other.ids) and torch.equal(one.logprobs, other.logprobs)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["x.safetensors"]


# ---- wrong input


def damaged(lessons, change):
    tensors, text = load_file(lessons), safe_open(lessons, "pt").metadata()["lessons"]
    about = json.loads(text)
    change(tensors, about)
    save_file(tensors, lessons, {"lessons": json.dumps(about)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, a: t.pop("tokens"), "not a file of lessons (burnish teach): KeyError: 'tokens'"),
        (lambda t, a: a.pop("tokenizer"), "not a file of lessons (burnish teach): KeyError: 'tokenizer'"),
        (lambda t, a: a.update(tokenizer="other"), "expected the tokenizer of --model, got a teacher's"),
        (
            lambda t, a: a.update(temperature=2.0),
            "expected --temperature 2, that of its log-probabilities, got 1",
        ),
        (lambda t, a: t.update(lengths=t["lengths"][1:]), "the number of tokens"),
        (lambda t, a: t.update(ids=t["ids"][1:]), "ids and logprobs: expected (trained tokens, K)"),
        (lambda t, a: t["ids"].fill_(17), "ids: expected the tokenizer's ids, 0 to 16, got 17"),
        (lambda t, a: t["tokens"][:1].fill_(-1), "tokens: expected the tokenizer's ids, 0 to 16, got -1"),
        (lambda t, a: t.pop("logprobs"), "ids and logprobs: expected (trained tokens, K)"),
    ],
)
def test_a_file_that_does_not_fit_is_one_line(cfg, lessons, capsys, change, message):
    damaged(lessons, change)
    arguments = ["--model", cfg.model, "--data", lessons, "--output", cfg.output, "--device", "cpu"]
    assert main(["distill", *map(str, arguments)]) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("burnish distill: ") and message in error and len(error.splitlines()) == 1
    assert not cfg.output.exists()


def test_a_broken_file_and_one_that_is_not_there(cfg, lessons, tmp_path):
    lessons.write_bytes(lessons.read_bytes()[:100])
    for file, message in ((lessons, "not a file of lessons"), (tmp_path / "no.safetensors", "no such file")):
        with pytest.raises(InputError, match=message):
            distill.train(dataclasses.replace(cfg, teacher=None, data=file))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": None}, "expected --teacher DIR, or as --data a file that burnish teach wrote"),
        ({"beta": 1.5}, "--beta: expected a number between 0 and 1, got 1.5"),
        ({"student_samples": -0.1}, "--student-samples: expected a number between 0 and 1"),
        ({"loss": "policy_gradient"}, "--loss policy_gradient: expected --student-samples 1"),
        ({"loss": "policy_gradient", **OWN, "beta": 0.5}, "--beta: --loss policy_gradient has none"),
        ({"loss": "sequence"}, "--teacher: --loss sequence reads its text from --data"),
        (
            {"loss": "sequence", "teacher": None, "temperature": 2.0},
            "--temperature: --loss sequence has none",
        ),
        ({"loss": "sequence", "teacher": None, **OWN}, "--student-samples: --loss sequence"),
        ({"loss": "sequence", "teacher": None, "temperature_squared": True}, "--temperature-squared: --loss"),
        ({"base_4bit": True}, "--base-4bit: expected --lora-rank, too"),
    ],
)
def test_a_flag_that_would_be_ignored_is_refused(cfg, changes, message):
    with pytest.raises(InputError, match=message):
        distill.train(dataclasses.replace(cfg, **changes))
    assert not cfg.output.exists()


def test_own_samples_need_the_teacher_itself(cfg, lessons):
    with pytest.raises(
        InputError, match="--student-samples: stored lessons do not cover the student's samples"
    ):
        distill.train(dataclasses.replace(cfg, teacher=None, data=lessons, student_samples=0.5))


def test_a_teacher_of_another_tokenizer_is_refused(cfg):
    tokenizer = json.loads((cfg.teacher / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["8"], vocabulary["9"] = vocabulary["9"], vocabulary["8"]
    (cfg.teacher / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(InputError, match=r"--teacher .*: expected the tokenizer of --model, got another"):
        distill.train(cfg)
    assert not cfg.output.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 18}, "--top-k: expected at most the vocabulary, 17, got 18"),
        ({"top_k": 0}, "--top-k 0: expected --samples beside it"),
        ({"samples": -1}, "--samples: expected a number between 0 and 65536"),
        ({"temperature": math.nan}, "--temperature: expected a number between"),
    ],
)
def test_wrong_flags_of_teach(teacher, demonstrations, tmp_path, changes, message):
    cfg = teach.Config(model=teacher, data=demonstrations, output=tmp_path / "taught", device="cpu")
    with pytest.raises(InputError, match=message):
        teach.teach(dataclasses.replace(cfg, **{"top_k": 4, **changes}))
    assert not cfg.output.exists()
