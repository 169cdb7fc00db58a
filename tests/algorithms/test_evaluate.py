"""`burnish evaluate` on a tiny model, its figures against enumeration, and the verifiers on real solutions."""

import dataclasses
import itertools
import json
import math

import pytest
import torch
from burnish.algorithms import evaluate
from burnish.algorithms.data.examples import sft_examples
from burnish.algorithms.data.rows import read_rows
from burnish.algorithms.search.votes import (
    majority_is_right,
    pass_at_k,
    standard_error,
    standard_error_of_ratio,
)
from burnish.algorithms.verifiers import gsm8k, last_number, number
from burnish.model.checkpoint import load_model, load_scalar_model, save_model
from burnish.model.errors import InputError
from burnish.model.packed import pack
from burnish.model.text.tokenizer import Tokenizer


@pytest.mark.parametrize("num_right", range(6))
@pytest.mark.parametrize("k", [1, 2, 5])
def test_pass_at_k_is_the_share_of_all_subsets(num_right, k):
    samples = [i < num_right for i in range(5)]
    subsets = list(itertools.combinations(samples, k))
    assert pass_at_k(5, num_right, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_majority_vote():
    assert majority_is_right(["7", "8", "7"], [True, False, True])
    assert not majority_is_right(["8", "8", "7"], [False, False, True])
    assert majority_is_right([None, None, "7"], [False, False, True])  # no answer casts no vote
    assert not majority_is_right([None, None], [False, False])
    assert majority_is_right(["7", "8"], [True, False])  # the earliest of equally frequent ones


def test_the_error_of_a_ratio_is_that_of_its_draws():
    """Against the spread of the ratio itself over many draws; with equal denominators it is that of a mean."""
    draws = torch.randn(4000, 200, 2, generator=torch.Generator().manual_seed(0)).double()
    numerators, denominators = 3 + draws[..., 0] + draws[..., 1], 2 + 0.5 * draws[..., 1]
    spread = (numerators.sum(1) / denominators.sum(1)).std().item()
    found = [
        standard_error_of_ratio(x, y)
        for x, y in zip(numerators[:400].tolist(), denominators[:400].tolist(), strict=True)
    ]
    assert sum(found) / 400 == pytest.approx(spread, rel=0.03)
    values = numerators[0].tolist()
    assert standard_error_of_ratio(values, [2] * 200) == pytest.approx(standard_error(values) / 2)
    assert standard_error_of_ratio([1.0], [2]) == standard_error([1.0]) == 0


@pytest.mark.parametrize(
    ("text", "reference", "strict", "flexible"),
    [
        ("so #### 18", "It is 9 * 2 = <<9*2=18>>18\n#### 18", 1.0, 1.0),
        ("#### 1,234.50", "#### 1234.5", 1.0, 1.0),
        ("#### $18", "18", 1.0, 1.0),
        ("#### -3", "#### -3", 1.0, 1.0),
        ("#### 3", "#### -3", 0.0, 0.0),
        ("The answer is 18.", "#### 18", 0.0, 1.0),
        ("18, and then 5 more", "#### 18", 0.0, 0.0),
        ("#### 18 eggs in 7 days", "#### 18", 1.0, 0.0),
        ("#### 17\n#### 18", "#### 18", 1.0, 1.0),
        ("no number", "#### 18", 0.0, 0.0),
        ("", "#### 18", 0.0, 0.0),
    ],
)
def test_verifiers(text, reference, strict, flexible):
    message = [{"role": "assistant", "content": text}]
    for completion in (text, message):
        assert gsm8k([completion], answer=[reference]) == [strict]
        assert last_number([completion], answer=[reference]) == [flexible]


def test_an_answer_is_what_is_behind_the_mark():
    assert number(["#### 18.0 in 7 days", "in 7 days 18", "none"]) == ["18", "18", None]
    assert number(["#### 0 (not 5)", "#### 0.0, 5 tried", "5, so 0"]) == ["0", "0", "0"]  # zero is an answer


def test_verifier_agrees_with_graded_real_solutions(shared_data):
    graded = [
        json.loads(line)
        for line in (shared_data / "gsm8k" / "example_model_solutions.jsonl").read_text().splitlines()
    ]
    solutions = [
        (row[name]["solution"], row["ground_truth"], row[name]["is_correct"])
        for row in graded
        for name in row
        if isinstance(row[name], dict)
    ]
    texts, references, labels = zip(*solutions, strict=True)
    given = last_number(list(texts), answer=list(references))
    agreeing = sum(bool(verdict) == label for verdict, label in zip(given, labels, strict=True))
    assert len(labels) == 4 * 1319 and agreeing / len(labels) > 0.99


@pytest.fixture
def cfg(model_folder, prompts, tmp_path):
    return evaluate.Config(
        model=model_folder,
        data=prompts,
        reward=("burnish.algorithms.recipes.sums:accuracy", "burnish.algorithms.recipes.sums:form"),
        output=tmp_path / "out",
        samples=4,
        k=(1, 2, 4, 8),
        max_new_tokens=6,
        device="cpu",
    )


def test_answers_are_judged_and_written(cfg, tmp_path, capsys):
    answers = tmp_path / "answers.py"
    answers.write_text(
        "def first(completions, **_):\n    return [text[:1] or None for text in completions]\n"
        "def starts_even(completions, **_):\n    return [float(text[:1] in tuple('02468')) for text in completions]\n"
    )
    cfg = dataclasses.replace(cfg, reward=(f"{answers}:starts_even",), answer=f"{answers}:first")

    figures = evaluate.evaluate(cfg)
    records = [json.loads(line) for line in (cfg.output / "samples.jsonl").read_text().splitlines()]
    greedy, sampled = records[:32], records[32:]
    assert (
        len(sampled) == 32 * 4 and all(r["greedy"] for r in greedy) and not any(r["greedy"] for r in sampled)
    )

    assert figures["greedy"] == pytest.approx(100 * sum(r["right"] for r in greedy) / 32)
    assert figures["pass@1"] == pytest.approx(100 * sum(r["right"] for r in sampled) / 128)
    groups = [sampled[i : i + 4] for i in range(0, 128, 4)]
    assert figures["pass@4"] == pytest.approx(100 * sum(any(r["right"] for r in g) for g in groups) / 32)
    shares = [100 * sum(r["right"] for r in g) / 4 for g in groups]
    assert figures["pass@1_error"] == pytest.approx(torch.tensor(shares).std().item() / math.sqrt(32))
    assert 0 < figures["pass@1"] < figures["pass@2"] < figures["pass@4"] < 100
    assert "pass@8" not in figures and 0 <= figures["majority"] <= 100

    assert all(r["right"] == (r["completion"][:1] in tuple("02468")) for r in records)
    result = json.loads((cfg.output / "result.json").read_text())
    assert result["figures"] == figures and result["config"]["samples"] == 4
    assert "pass@4" in capsys.readouterr().out


def test_at_temperature_0_the_greedy_answer_is_the_only_one(cfg, tmp_path, capsys):
    answers = tmp_path / "answers.py"
    answers.write_text(
        "def first(completions, **_):\n    return [text[:1] or None for text in completions]\n"
        "def even(prompts, **_):\n    return [float(sum(map(ord, text)) % 2 == 0) for text in prompts]\n"
    )
    cfg = dataclasses.replace(cfg, reward=(f"{answers}:even",))
    alone = dataclasses.replace(cfg, samples=0, output=tmp_path / "alone")
    expected = evaluate.evaluate(alone)
    assert "--temperature 0" not in capsys.readouterr().out and 0 < expected["greedy"] < 100

    cfg = dataclasses.replace(cfg, temperature=0.0, k=(2, 4), answer=f"{answers}:first")
    figures = evaluate.evaluate(cfg)
    assert figures["pass@1"] == figures["greedy"] == expected["greedy"]
    assert figures["pass@1_error"] == figures["greedy_error"] and "majority" in figures
    assert "pass@2" not in figures and figures["length"] == expected["length"]
    records, of_alone = (
        [json.loads(line) for line in (each.output / "samples.jsonl").read_text().splitlines()]
        for each in (cfg, alone)
    )
    assert len(records) == 32 and all(record["greedy"] for record in records)
    assert [r["completion"] for r in records] == [r["completion"] for r in of_alone]
    assert "--temperature 0: each sample would be the greedy answer" in capsys.readouterr().out

    for flag in ("top_p", "top_k"):
        wrong = dataclasses.replace(cfg, output=tmp_path / "wrong", **{flag: 1})
        with pytest.raises(InputError, match=f"--{flag.replace('_', '-')}: expected --temperature above 0"):
            evaluate.evaluate(wrong)
    with pytest.raises(InputError, match="--temperature: expected a number between 0 and 1000, got -1"):
        evaluate.evaluate(dataclasses.replace(cfg, output=tmp_path / "wrong", temperature=-1.0))


def test_it_is_evaluated_in_4_bits(cfg, reward_model, pairs, demonstrations, tmp_path):
    def figure(name, **flags):
        output = tmp_path / f"{name}-{len([*tmp_path.iterdir()])}"
        return evaluate.evaluate(dataclasses.replace(cfg, output=output, reward=(), **flags))[name]

    rows = {"data": demonstrations, "name": "nats"}
    four = figure(**rows, base_4bit=True)
    model = load_model(cfg.model, base_4bit=True)
    save_model(model, tmp_path / "four", Tokenizer.load(cfg.model))
    assert four == pytest.approx(figure(**rows, model=tmp_path / "four"), abs=1e-6)
    assert abs(four - figure(**rows)) > 1e-4

    scores = {"model": reward_model, "data": pairs, "name": "margin"}
    assert figure(**scores, base_4bit=True) != figure(**scores)


def test_what_functions_log_is_beside_the_samples(cfg, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(
        "async def mine(completions, log_metric, log_extra, trainer_state):\n"
        "    log_metric('completions', len(completions) * trainer_state.global_step / trainer_state.max_steps)\n"
        "    log_metric('loss', 5)\n"
        "    log_metric('loss_error', 7)\n"
        "    log_extra('first', [text[:1] or None for text in completions])\n"
        "    return [None for _ in completions]\n"
        "async def answer(completions, log_extra):\n"
        "    log_extra('length', map(len, completions))\n"
        "    return [float('nan') if not text else (text[0], len(text)) for text in completions]\n"
    )
    path = f"{tmp_path}/mine.py"

    figures = evaluate.evaluate(dataclasses.replace(cfg, reward=(f"{path}:mine",), answer=f"{path}:answer"))
    assert figures["metric/completions"] == 32 * 4 and figures["majority"] == 0
    for record in map(json.loads, (cfg.output / "samples.jsonl").read_text().splitlines()):
        text = record["completion"]
        assert record["extra"] == {"first": text[:1] or None, "length": len(text)}
        assert record["answer"] == ([text[0], len(text)] if text else None)

    printed = capsys.readouterr().out
    assert "reward mine: None for every sample: it has judged nothing" in printed
    lines = [line.split() for line in printed.splitlines()]
    assert ["metric/loss", "5"] in lines and ["metric/loss_error", "7"] in lines
    result = (cfg.output / "result.json").read_text()
    assert json.loads(result)["figures"]["reward/mine"] is None and "NaN" not in result


def test_the_same_seed_gives_the_same_figures(cfg, tmp_path):
    again = dataclasses.replace(cfg, output=tmp_path / "again", batch_size=7)
    assert evaluate.evaluate(cfg) == evaluate.evaluate(again)


def test_a_file_is_packed_as_its_turn_comes(cfg, demonstrations, most_packed):
    evaluate.evaluate(dataclasses.replace(cfg, reward=(), data=demonstrations, micro_batch_tokens=50))
    assert 1 <= most_packed() <= 2


def test_perplexity_is_that_of_the_trained_tokens(cfg, demonstrations):
    cfg = dataclasses.replace(cfg, reward=(), data=demonstrations, micro_batch_tokens=50)
    figures = evaluate.evaluate(cfg)
    tokenizer, model = Tokenizer.load(cfg.model), load_model(cfg.model)
    examples, _ = sft_examples(read_rows(demonstrations), tokenizer, max_length=64, train_on="completion")

    nats, tokens = 0.0, 0
    with torch.no_grad():
        for example in examples:
            logprobs = model.logits(model(pack([example.tokens]))).double().log_softmax(-1)
            for t in range(1, len(example.tokens)):
                if example.mask[t]:
                    nats -= logprobs[t - 1, example.tokens[t]].item()
                    tokens += 1

    assert figures["tokens"] == tokens
    assert figures["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    records = [json.loads(line) for line in (cfg.output / "samples.jsonl").read_text().splitlines()]
    assert len(records) == 64 and sum(record["tokens"] for record in records) == tokens


@pytest.fixture
def reward_model(model_folder, tmp_path):
    save_model(
        load_scalar_model(model_folder, seed=1), tmp_path / "reward-model", Tokenizer.load(model_folder)
    )
    return tmp_path / "reward-model"


def test_a_reward_model_is_judged_on_pairs(cfg, reward_model, pairs, tmp_path, capsys):
    cfg = dataclasses.replace(cfg, model=reward_model, data=pairs, reward=(), micro_batch_tokens=100)
    figures = evaluate.evaluate(cfg)

    model, tokenizer = load_scalar_model(reward_model), Tokenizer.load(reward_model)
    right, margins = [], []
    for row in map(json.loads, pairs.read_text().splitlines()):
        texts = (
            tokenizer.encode(row["prompt"] + row[name]) + [tokenizer.eos_id]
            for name in ("chosen", "rejected")
        )
        chosen, rejected = (model.values(pack([t]), torch.tensor([len(t) - 1])).item() for t in texts)
        right.append(float(chosen > rejected))
        margins.append(chosen - rejected)

    p = sum(right) / 64
    assert 0 < p < 1 and figures["pairs"] == 64
    assert figures["accuracy"] == pytest.approx(100 * p)
    assert figures["accuracy_error"] == pytest.approx(100 * math.sqrt(p * (1 - p) / 63))
    assert figures["margin"] == pytest.approx(sum(margins) / 64, abs=1e-5)
    assert figures["margin_error"] == pytest.approx(torch.tensor(margins).std().item() / 8, abs=1e-5)

    records = [json.loads(line) for line in (cfg.output / "samples.jsonl").read_text().splitlines()]
    assert [record["right"] for record in records] == right
    assert json.loads((cfg.output / "result.json").read_text())["figures"] == figures
    assert "accuracy" in capsys.readouterr().out

    # the same pairs the other way round
    swapped = [json.loads(line) for line in pairs.read_text().splitlines()]
    swapped = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in swapped]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in swapped))
    again = evaluate.evaluate(dataclasses.replace(cfg, output=tmp_path / "swapped"))
    assert again["accuracy"] == pytest.approx(100 * (1 - p)) and again["margin"] == pytest.approx(
        -figures["margin"]
    )


def test_a_reward_model_that_always_says_the_same_is_never_right(cfg, reward_model, pairs):
    model = load_scalar_model(reward_model)
    torch.nn.init.zeros_(model.score.weight)
    save_model(model, reward_model, Tokenizer.load(reward_model))
    figures = evaluate.evaluate(dataclasses.replace(cfg, model=reward_model, data=pairs, reward=()))
    assert figures["accuracy"] == 0 and figures["margin"] == 0


def test_a_reward_model_answers_no_prompts(cfg, reward_model):
    with pytest.raises(InputError, match=r"--reward: .*reward-model is a reward model"):
        evaluate.evaluate(dataclasses.replace(cfg, model=reward_model))


def test_wrong_flags_are_named(cfg, tmp_path):
    with pytest.raises(InputError, match="--answer: expected --reward"):
        evaluate.evaluate(dataclasses.replace(cfg, reward=(), answer="x.py:f"))
    with pytest.raises(InputError, match="--k: expected numbers of at least 1"):
        evaluate.evaluate(dataclasses.replace(cfg, k=(0,)))

    short = tmp_path / "short.py"
    short.write_text("def f(completions, **_):\n    return completions[1:]\n")
    with pytest.raises(InputError, match="--answer: expected 32 answers"):
        evaluate.evaluate(dataclasses.replace(cfg, answer=f"{short}:f"))
    short.write_text("def f(completions, solution):\n    return completions\n")
    with pytest.raises(
        InputError, match="--answer: expected a column 'solution' for its argument; the data has ans"
    ):
        evaluate.evaluate(dataclasses.replace(cfg, answer=f"{short}:f"))

    short.write_text(
        "def f(completions, log_extra):\n"
        "    log_extra('x', completions)\n"
        "    return [0 for _ in completions]\n"
    )
    functions = {"reward": (f"{short}:f",), "answer": f"{short}:f"}
    with pytest.raises(
        InputError, match="--answer: log_extra: expected a new column, got 'x', which a reward function logs"
    ):
        evaluate.evaluate(dataclasses.replace(cfg, **functions))

    with pytest.raises(InputError, match="--reward-timeout: expected a number between"):
        evaluate.evaluate(dataclasses.replace(cfg, reward_timeout=math.inf))
    short.write_text("import time\ndef f(completions):\n    time.sleep(60)\n")
    with pytest.raises(InputError, match=r"--answer: expected to return within 0\.05 s"):
        evaluate.evaluate(dataclasses.replace(cfg, answer=f"{short}:f", reward_timeout=0.05))
