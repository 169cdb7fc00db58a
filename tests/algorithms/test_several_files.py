"""Several files for --data: their order and weights, what is counted and what is refused."""

import dataclasses
import itertools
import json
import math
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from burnish.algorithms import distill, dpo, evaluate, grpo, kto, ppo, reward, sft, teach
from burnish.algorithms.data.examples import load_examples
from burnish.algorithms.data.groups import load_prompts
from burnish.algorithms.data.items import Items
from burnish.algorithms.data.lessons import load_lessons
from burnish.algorithms.data.rewards import Rewards
from burnish.algorithms.data.tokenizer import load_tokenizer
from burnish.algorithms.run.command import parsed
from burnish.algorithms.run.data_files import data_files
from burnish.algorithms.run.learner import Learner
from burnish.algorithms.run.loop import Run
from burnish.algorithms.run.order import Part, epochs, rows_per_epoch, with_steps
from burnish.model.checkpoint import load_model
from burnish.model.errors import InputError
from burnish.model.text.tokenizer import Tokenizer
from conversations import ASSISTANT, TEMPLATE, USER
from faults import check_of, control, faults_of
from planted import copy_of


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def metrics_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def write(path: Path, *rows: dict) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def halves(path: Path) -> tuple[Path, Path]:
    """The file's rows in two files: of three rows the first, and the rest."""
    lines = path.read_text().splitlines(keepends=True)
    found = path.with_name("first.jsonl"), path.with_name("rest.jsonl")
    found[0].write_text("".join(lines[: len(lines) // 3]))
    found[1].write_text("".join(lines[len(lines) // 3 :]))
    return found


# ---- the order of rows


def epoch_batches(parts, batch_size: int) -> int:
    return math.ceil(rows_per_epoch(parts) / batch_size)


def first_epochs(epochs, parts, count: int, seed: int = 3) -> list[list[int]]:
    """The rows of the first epochs."""
    batches = epochs(parts, 4, seed)
    return [
        list(itertools.chain.from_iterable(itertools.islice(batches, epoch_batches(parts, 4))))
        for _ in range(count)
    ]


def test_without_weights_the_order_is_one_permutation_an_epoch():
    """The same for one file, for several, and for a number of rows: of torch's generator alone."""
    generator = torch.Generator().manual_seed(3)
    expected = [torch.randperm(11, generator=generator).tolist() for _ in range(3)]
    for rows in (11, [Part(11)], [Part(4), Part(7)], [Part(4, 1.0), Part(7, 1)]):
        assert first_epochs(epochs, rows, 3) == expected


@pytest.mark.parametrize("weight", [0.5, 0.3, 0.05, 1.5, 2.75])
def test_a_share_of_the_rows_is_another_one_in_each_epoch(weight):
    parts = [Part(5), Part(10, weight)]
    share = max(1, round(10 * (weight % 1)))
    found = first_epochs(epochs, parts, 20)
    for epoch in found:
        counts = Counter(epoch)
        assert all(counts[i] == 1 for i in range(5))
        assert sorted(counts[i] - int(weight) for i in range(5, 15)) == [0] * (10 - share) + [1] * share
    drawn = [{i for i, count in Counter(epoch).items() if i >= 5 and count > int(weight)} for epoch in found]
    assert len(set(map(frozenset, drawn))) > 1

    # after any number of epochs no row has come twice more often than another
    for count in range(1, 20):
        total = Counter(i for epoch in drawn[:count] for i in epoch)
        most, least = (f(total[i] for i in range(5, 15)) for f in (max, min))
        assert most - least <= 1
    assert first_epochs(epochs, parts, 3) == found[:3] != first_epochs(epochs, parts, 3, seed=4)


def test_a_resumed_run_draws_the_rows_that_follow():
    parts = [Part(5, 2), Part(7, 0.4)]
    whole, rest = epochs(parts, 3, seed=1), epochs(parts, 3, seed=1, skip=9)
    for _ in range(9):
        next(whole)
    assert [next(whole) for _ in range(20)] == [next(rest) for _ in range(20)]


def test_epochs_count_the_rows_as_often_as_they_come(tmp_path):
    cfg = sft.Config(model=tmp_path, data=tmp_path, batch_size=5, epochs=2)
    assert rows_per_epoch([Part(10, 1.5), Part(10, 0.25)]) == 17
    assert with_steps(cfg, [Part(10, 2), Part(10, 0.5)]).steps == 10
    assert with_steps(cfg, [Part(10)]).steps == with_steps(cfg, 10).steps == 4


def test_first_items_are_taken_as_often_as_they_come():
    items = Items(range(60), [Part(20, 2), Part(40, 0.5)])
    assert items.first(12) == [*range(8), *range(20, 24)]
    assert Items(range(60)).first(12) == [*range(12)] and Items(range(3)).first(12) == [0, 1, 2]


# ---- loading


def config(folder: Path, data, **flags) -> sft.Config:
    return sft.Config(model=folder, data=data, output=folder / "out", device="cpu", **flags)


def test_each_file_is_counted_and_names_its_own_columns_and_shape(tmp_path, folder, capsys):
    one = write(
        tmp_path / "a.jsonl", {"prompt": "1", "completion": "2", "odd": 1}, {"prompt": "1", "completion": ""}
    )
    two = write(tmp_path / "b.jsonl", {"text": "a text", "other": 1})

    tokenizer = Tokenizer.load(folder)
    cfg = config(folder, (one, two), data_weights=(1.0, 2.5))
    examples = load_examples(cfg, tokenizer)
    assert [example.where for example in examples] == [f"{one} line 1", f"{two} line 1"]
    assert examples.parts == [Part(1, 1.0), Part(1, 2.5)]
    assert capsys.readouterr().out.splitlines() == [
        f"{one}: 2 rows, 1 examples, 1 dropped: no token to train on",
        f"{one}: columns not used: odd",
        f"{two}: 1 rows, 1 examples",
        f"{two}: columns not used: other",
        f"an epoch has 4: 1 of {one}, 3 of {two}",
    ]

    # a line of either that is wrong is named
    with open(two, "a") as file:
        file.write("{}\n")
    with pytest.raises(InputError, match=re.escape(f"{two} line 2: expected the columns")):
        load_examples(cfg, tokenizer)


def test_a_flag_of_the_template_may_have_its_effect_in_any_of_the_files(tmp_path, folder):
    text = write(tmp_path / "a.jsonl", {"text": "a text"})
    talk = write(tmp_path / "b.jsonl", {"messages": [USER, ASSISTANT]})
    (tmp_path / "own.jinja").write_text(TEMPLATE)
    flags = {"chat_template": str(tmp_path / "own.jinja"), "chat_template_kwargs": '{"mood": "calm"}'}
    for data in ((text, talk), (talk, text)):
        cfg = config(folder, data, **flags)
        assert len(load_examples(cfg, load_tokenizer(cfg))) == 2
    cfg = config(folder, (text, text), **flags)
    with pytest.raises(InputError, match="--chat-template-kwargs: the rows are plain texts"):
        load_examples(cfg, load_tokenizer(cfg))


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 2.0, 3.0)])
def test_weights_are_as_many_as_the_files(tmp_path, folder, weights):
    one = write(tmp_path / "a.jsonl", {"text": "a"})
    message = f"--data-weights: expected 2, one per argument of --data, got {len(weights)}"
    with pytest.raises(InputError, match=re.escape(message)):
        load_examples(config(folder, (one, one), data_weights=weights), Tokenizer.load(folder))


@pytest.mark.parametrize("weight", [0.0, -1.0, math.inf, math.nan, 1001.0])
def test_a_weight_is_a_positive_number(tmp_path, folder, weight):
    cfg = config(folder, (tmp_path, tmp_path), data_weights=(1.0, weight))
    with pytest.raises(InputError, match="--data-weights: expected a number between 1e-06 and 1000, got"):
        sft.train(cfg)


def test_the_command_line_takes_one_file_or_several(tmp_path):
    flags = ["--model", "m", "--steps", "3"]
    one = parsed("burnish sft", sft, ["--data", "a.jsonl", *flags])
    assert one.data == Path("a.jsonl") and one.data_weights == ()
    two = parsed("burnish sft", sft, ["--data", "a.jsonl", "b.jsonl", "--data-weights", "1", "0.5", *flags])
    assert two.data == (Path("a.jsonl"), Path("b.jsonl")) and two.data_weights == (1.0, 0.5)
    for module in (dpo, kto, reward, ppo, distill):
        assert parsed("x", module, ["--data", "a", "b", "--data-weights", "1", "2", *flags]).data_weights
    for module in (teach, evaluate):
        assert len(parsed("x", module, ["--data", "a", "b", "--model", "m"]).data) == 2
    with pytest.raises(InputError, match="--data: expected at least one file, got none"):
        data_files(parsed("burnish sft", sft, ["--data", *flags]).data)


# ---- training


def test_two_files_train_as_one_file_of_the_same_rows(model_folder, demonstrations, tmp_path):
    flags = {"model": model_folder, "steps": 3, "batch_size": 24, "learning_rate": 1e-2, "device": "cpu"}
    files = halves(demonstrations)
    one = sft.train(sft.Config(data=demonstrations, output=tmp_path / "one", **flags))
    two = sft.train(sft.Config(data=files, output=tmp_path / "two", data_weights=(1.0, 1.0), **flags))
    for a, b in zip(load_model(one).parameters(), load_model(two).parameters(), strict=True):
        assert torch.equal(a, b)
    written = json.loads((tmp_path / "two" / "config.json").read_text())
    assert written["data"] == [str(file) for file in files] and written["data_weights"] == [1.0, 1.0]


def test_a_stopped_run_with_weights_goes_on(model_folder, demonstrations, tmp_path):
    whole = sft.Config(
        model=model_folder,
        data=halves(demonstrations),
        data_weights=(1.5, 0.3),
        output=tmp_path / "whole",
        **{"steps": 6, "batch_size": 16, "save_every": 3, "learning_rate": 1e-2, "device": "cpu"},
    )
    sft.train(whole)
    cut = dataclasses.replace(whole, steps=3, output=tmp_path / "cut")
    sft.train(cut)
    sft.train(dataclasses.replace(cut, steps=6, resume=True))

    one, other = metrics_of(whole.output), metrics_of(cut.output)
    assert [line["trained_tokens"] for line in one] == [line["trained_tokens"] for line in other]
    other_seed = dataclasses.replace(whole, output=tmp_path / "seed", seed=1)
    sft.train(other_seed)
    assert [line["loss"] for line in one] != [line["loss"] for line in metrics_of(other_seed.output)]


FROZEN = {"steps": 9, "batch_size": 16, "learning_rate": 0.0, "warmup_steps": 0, "device": "cpu"}


@pytest.mark.parametrize("weights", [(1.0, 0.3), (2.0, 1.0), (0.5, 1.5)])
def test_every_pair_has_its_reference_before_training(model_folder, pairs, tmp_path, weights):
    """While nothing is learned, every step's loss is log 2, also for rows that only a later epoch draws."""
    flags = {"model": model_folder, "data": halves(pairs), "data_weights": weights, **FROZEN}
    dpo.train(dpo.Config(output=tmp_path / "dpo", **flags))
    losses = [line["loss"] for line in metrics_of(tmp_path / "dpo")]
    assert losses == pytest.approx([math.log(2)] * 9, abs=1e-6)
    if max(weights) <= 1:  # the sums of the first step are those of the reference, in the same order
        assert metrics_of(tmp_path / "dpo")[0]["margin"] == 0

    kto.train(kto.Config(output=tmp_path / "kto", **flags))
    for line in metrics_of(tmp_path / "kto"):
        assert line["loss"] == pytest.approx(0.5, abs=1e-6) and line["kl"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("steps", [1, 4, 40])
def test_first_batches_hold_every_row_that_is_drawn_and_no_other(model_folder, demonstrations, steps):
    cfg = config(model_folder, demonstrations, steps=steps, batch_size=4)
    parts = [Part(9), Part(20, 0.3), Part(3, 2)]
    run = Run(cfg, Tokenizer.load(model_folder), rows=parts, model=Learner(cfg, load_model(model_folder)))
    found = list(run.first_batches())
    drawn = list(itertools.islice(epochs(parts, 4, cfg.seed), steps))
    assert {i for batch in found for i in batch} == {i for batch in drawn for i in batch}
    assert found[min(steps, epoch_batches(parts, 4)) - 1] == drawn[0]
    later = [i for batch in found[epoch_batches(parts, 4) :] for i in batch]
    assert len(later) == len(set(later)) and all(len(batch) <= 4 for batch in found)
    assert (steps == 40) == (len({i for batch in found for i in batch}) == 32)


# ---- rewards


def prompts_of(folder: Path, files: tuple[Path, ...], *functions) -> Items:
    cfg = grpo.Config(model=folder, data=files, reward=("x:y",), output=folder / "out", device="cpu")
    rewards = Rewards({f.__name__: f for f in functions}, (1.0,) * len(functions))
    return load_prompts(cfg, Tokenizer.load(folder), rewards)


def test_a_function_needs_its_column_in_every_file(tmp_path, model_folder):
    sums = write(tmp_path / "sums.jsonl", {"prompt": "1+1=", "answer": "2"})
    code = write(tmp_path / "code.jsonl", {"prompt": "1+2=", "tests": ["x"]}, {"prompt": "2+2="})

    def right(completions, answer):
        return [0.0 for _ in completions]

    def passes(completions, tests=None, answer=None):
        return [0.0 for _ in completions]

    for files in ((sums, code), (code, sums)):
        with pytest.raises(InputError, match=re.escape(f"{code}: reward right: ")) as refused:
            prompts_of(model_folder, files, right, passes)
        assert "answer" in str(refused.value)

    # with a default for its argument it gets None where a file has no such column
    prompts = prompts_of(model_folder, (sums, code), passes)
    assert [prompt.columns for prompt in prompts] == [
        {"answer": "2", "tests": None},
        {"answer": None, "tests": ["x"]},
        {"answer": None, "tests": None},
    ]


def test_prompts_of_two_files_are_sampled_and_judged_together(tmp_path, model_folder, prompts):
    one, two = halves(prompts)
    rows = [json.loads(line) | {"hint": "h"} for line in two.read_text().splitlines()]
    write(two, *rows)
    judge = tmp_path / "judge.py"
    judge.write_text(
        "def hints(completions, trainer_state, hint=None, **_):\n"
        "    assert trainer_state.num_train_epochs == 2, trainer_state\n"
        "    return [float(h is not None) for h in hint]\n"
    )

    grpo.train(
        grpo.Config(
            model=model_folder,
            data=(one, two),
            data_weights=(1.0, 0.5),
            reward=(f"{judge}:hints",),
            output=tmp_path / "out",
            **{"steps": 6, "prompts_per_step": 7, "group_size": 2, "max_new_tokens": 4, "device": "cpu"},
        )
    )
    rewards = [line["reward"] for line in metrics_of(tmp_path / "out")]
    # an epoch has 10 rows of the first file, and 11 of the 22 of the second
    assert [sum(part) * 7 for part in (rewards[:3], rewards[3:])] == pytest.approx([11, 11], abs=1e-4)


def test_evaluation_reads_several_files(tmp_path, model_folder, demonstrations):
    flags = {"model": model_folder, "device": "cpu"}
    files = halves(demonstrations)
    one = evaluate.evaluate(evaluate.Config(data=demonstrations, output=tmp_path / "one", **flags))
    two = evaluate.evaluate(evaluate.Config(data=files, output=tmp_path / "two", **flags))
    assert one == two
    few = evaluate.evaluate(evaluate.Config(data=files, output=tmp_path / "few", limit=2, **flags))
    first = [line for file in files for line in file.read_text().splitlines()[:2]]
    (tmp_path / "four.jsonl").write_text("\n".join(first))
    assert few == evaluate.evaluate(
        evaluate.Config(data=tmp_path / "four.jsonl", output=tmp_path / "four", **flags)
    )


# ---- lessons


def test_lessons_of_several_files_need_one_width_and_no_rows(tmp_path, model_folder, demonstrations, capsys):
    one, two = halves(demonstrations)
    taught = [
        teach.teach(
            teach.Config(model=model_folder, data=data, output=tmp_path / name, top_k=k, device="cpu")
        )
        for name, data, k in (("both", (one, two), 3), ("one", one, 3), ("two", two, 3), ("wide", two, 4))
    ]
    cfg = distill.Config(
        model=model_folder, data=tuple(taught[1:3]), data_weights=(1.0, 0.5), steps=2, device="cpu"
    )

    tokenizer = Tokenizer.load(model_folder)
    load = lambda cfg: load_lessons(cfg, tokenizer, prompts_alone=False, temperature=1.0)
    lessons, whole = load(cfg), load(dataclasses.replace(cfg, data=taught[0], data_weights=()))
    assert [lesson.tokens for lesson in lessons] == [lesson.tokens for lesson in whole]
    assert lessons.parts == [Part(21, 1.0), Part(43, 0.5)]
    assert f"{taught[1]}: 21 lessons" in capsys.readouterr().out
    distill.train(dataclasses.replace(cfg, output=tmp_path / "out"))

    with pytest.raises(InputError, match=r"wide.* lesson 1: expected 3 ids for each token, as in .*, got 4"):
        load(dataclasses.replace(cfg, data=(taught[1], taught[3])))
    for data in ((taught[1], one), (one, taught[1])):
        with pytest.raises(InputError, match="--data: expected files of lessons or files of rows, got"):
            distill.train(dataclasses.replace(cfg, data=data, output=tmp_path / "mixed"))


# ---- planted faults


@control
def shares_are_fair(module, folder: Path) -> None:
    """Each row once before any twice; a half of the rows differs from epoch to epoch; whole weights repeat rows."""
    parts = [module.Part(6, 0.5), module.Part(2, 2.0), module.Part(10, 0.3)]
    found = first_epochs(module.epochs, parts, 12)
    for epoch in found:
        counts = Counter(epoch)
        sizes = [sum(counts[i] for i in part) for part in (range(6), range(6, 8), range(8, 18))]
        assert sizes == [3, 4, 3], f"expected 3, 4 and 3 rows, got {sizes}"
        assert max(counts[i] for i in range(8, 18)) == 1, f"expected a row once in an epoch, got {counts}"
    for start in range(0, 12, 2):
        counts = Counter(i for epoch in found[start : start + 2] for i in epoch if i < 6)
        assert set(counts.values()) == {1} and len(counts) == 6, f"expected each row once, got {counts}"
    for count in range(12):
        counts = Counter(i for epoch in found[:count] for i in epoch if i >= 8)
        most, least = max(counts.values(), default=0), min(counts[i] for i in range(8, 18))
        assert most - least <= 1, f"expected all rows before any again, got {counts}"
    assert len({frozenset(i for i in epoch if i < 6) for epoch in found}) > 2, "expected other halves"


@pytest.mark.parametrize("fault", faults_of(__file__), ids=lambda fault: fault.id)
def test_a_planted_fault_is_caught(fault, tmp_path, monkeypatch):
    module = copy_of(fault.file, tmp_path, monkeypatch, fault)
    with pytest.raises(AssertionError, match="expected"):
        check_of(fault)(module, tmp_path)


def test_a_faithful_copy_passes(tmp_path, monkeypatch):
    shares_are_fair(copy_of("algorithms/run/order", tmp_path, monkeypatch), tmp_path)
