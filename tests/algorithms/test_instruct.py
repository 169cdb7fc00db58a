"""The recipe: its judge, every stage runs and is reported (short), and reaches what it must (slow)."""

import contextlib
import io
import itertools
import json
import random
import re
from statistics import mean, median

import pytest
import torch
from burnish.algorithms.data.pairs import Judged
from burnish.algorithms.recipes import instruct, page
from burnish.algorithms.recipes.letters import (
    FOLLOWED,
    LENGTH,
    LETTERS,
    answer_row,
    gold,
    make_tokenizer,
    optimum,
    preference_row,
)
from burnish.algorithms.run.batch import over_completions
from burnish.model.checkpoint import load_scalar_model
from burnish.model.errors import InputError

STAGES = ["base", "SFT", "PPO", "PPO, no KL", "DPO"]
FOLDERS = ["base", "sft", "reward", "ppo", "ppo-no-kl", "dpo"]


def test_gold_rises_to_six_and_then_falls_twice_as_fast():
    texts = ["", "abab", "cccccc", "cccccca", "ccccccc", "c" * 12]
    assert gold(texts, letter=["c", "a", "c", "c", "c", "c"]) == [0, 2, 6, 6, 4, -6]


def test_demonstrations_follow_and_texts_do_not():
    noise = random.Random(0)
    for followed, expected in ((FOLLOWED, LENGTH * (FOLLOWED + (1 - FOLLOWED) / 8)), (0.0, LENGTH / 8)):
        rows = [answer_row("c", followed, noise) for _ in range(2000)]
        assert all(len(row["completion"]) == LENGTH and row["prompt"] == "c:" for row in rows)
        assert mean(row["completion"].count("c") for row in rows) == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize(("coin", "share"), [(False, 1 / (1 + 2.718281828**-1)), (True, 0.5)])
def test_the_judge_errs_with_the_odds_of_bradley_and_terry(coin, share):
    noise = random.Random(0)
    for first, second in (("ccab", "cabd"), ("cabd", "ccab")):  # gold 2 and 1, either first
        rows = [preference_row("c", first, second, noise, coin) for _ in range(4000)]
        assert mean(row["chosen"] == "ccab" for row in rows) == pytest.approx(share, abs=0.03)
        assert all({row["chosen"], row["rejected"]} == {"ccab", "cabd"} for row in rows)


def test_the_optimum_is_that_of_enumeration():
    """Over all answers of an alphabet of two symbols, the letter asked for or not, with their probabilities."""
    p, beta = FOLLOWED + (1 - FOLLOWED) / 8, 0.8
    answers = ["".join(letters) for letters in itertools.product("cx", repeat=LENGTH)]
    start = torch.tensor([p ** a.count("c") * (1 - p) ** a.count("x") for a in answers], dtype=torch.float64)
    golds = torch.tensor(gold(answers, letter=["c"] * len(answers)), dtype=torch.float64)
    best = (start.log() + golds / beta).softmax(0)
    expected = ((best * golds).sum().item(), (best * (best / start).log()).sum().item())
    assert optimum(beta) == pytest.approx(expected, rel=1e-9)
    assert optimum(0.01)[0] == pytest.approx(6) and optimum(1e6)[1] == pytest.approx(0, abs=1e-6)


def test_the_tokenizer_reads_back_what_it_wrote():
    tokenizer = make_tokenizer()
    assert (
        tokenizer.decode(tokenizer.encode("c:acfh").ids) == "c:acfh" and len(tokenizer.encode("c:acfh")) == 6
    )


def test_wins_count_ties_half():
    assert instruct.win_rate([1, 2, 3, 3], [0, 2, 3, 4]) == 50


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two seeds that is too short to learn: its config, recipes, report, and what it printed."""
    cfg = instruct.Config(
        output=tmp_path_factory.mktemp("runs") / "instruct",
        seeds=2,
        texts=64,
        base_steps=2,
        demonstrations=64,
        sft_steps=2,
        preferences=32,
        reward_steps=2,
        beta=0.7,
        ppo_steps=2,
        dpo_steps=2,
        evaluation_samples=10,
        device="cpu",
    )

    recipes, run = [], instruct.Recipe.run
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr(instruct.Recipe, "run", lambda recipe: recipes.append(run(recipe)) or recipe)
        report = instruct.train(cfg)
    return cfg, recipes, report.read_text(), printed.getvalue()


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.mark.slow
def test_every_stage_runs_and_is_reported(finished):
    cfg, recipes, page, printed = finished
    for stage in STAGES:
        gold_reward = median(recipe.scores[stage].gold for recipe in recipes)
        assert re.search(
            rf"<td>{stage}</td>\s*<td>\s*<span .*\s*<span class=\"number\">{gold_reward:.2f}<", page
        )
        assert re.search(rf"^{stage} +gold +{gold_reward:.2f}", printed.split("medians")[1], re.MULTILINE)

    assert "<svg" in page and not re.search(r"<script|(src|href)=\"http", page)
    assert sorted(path.name for path in cfg.output.iterdir()) == ["report.html", "seed-0", "seed-1"]
    for stage in FOLDERS:
        folder = cfg.output / "seed-1" / stage
        assert (folder / "model" / "model.safetensors").is_file() and (
            folder / "metrics.jsonl"
        ).stat().st_size

    with pytest.raises(InputError, match="expected a new or empty folder, found one in use"):
        instruct.train(cfg)


def test_the_stages_have_one_start_one_beta_and_one_set_of_preferences(finished):
    cfg, *_ = finished
    rm, ppo, no_kl, dpo = (config_of(cfg.output / "seed-1" / name) for name in FOLDERS[2:])
    for stage in (rm, ppo, no_kl, dpo):
        assert stage["model"] == str(cfg.output / "seed-1" / "sft" / "model") and stage["seed"] == 1
    assert rm["data"] == dpo["data"] and (ppo["kl_coefficient"], dpo["beta"]) == (0.7, 0.7)
    assert no_kl["kl_coefficient"] == 0 and ppo["reward_weights"] == no_kl["reward_weights"] == [0.0]


def test_figures_are_those_of_the_samples(finished):
    """SFT against itself: no KL, as many wins as losses up to noise; the proxy is shifted onto gold."""
    _, (recipe, _), *_ = finished
    sft = recipe.scores["SFT"]
    assert sft.kl == 0 and 30 < sft.wins < 70 and recipe.scores["PPO"].kl != 0
    assert sft.length == mean(len(sample.tokens) for sample in recipe.sample(recipe.sft, 10, seed=4))

    letters = [LETTERS[sample.prompt_index] for sample in recipe.opponents]
    prompts = [recipe.tokenizer.encode(f"{letter}:") for letter in letters]
    answers = map(instruct.as_completion, recipe.opponents)
    judged = [Judged(*item, True) for item in zip(prompts, answers, strict=True)]
    model = load_scalar_model(recipe.proxy)
    proxy = over_completions(model, judged, lambda batch: batch.scores(model), 10**6).mean().item()
    golds = gold(list(map(recipe.decode, recipe.opponents)), letter=letters)
    assert proxy + recipe.shift == pytest.approx(mean(golds), abs=1e-5)

    steps = [json.loads(line) for line in (recipe.folder / "ppo" / "metrics.jsonl").read_text().splitlines()]
    kl, golds, proxies = recipe.paths()["PPO"]
    assert golds == [step["reward/gold"] for step in steps] and kl == [step["kl"] for step in steps]
    assert proxies == pytest.approx([step["score"] + recipe.shift for step in steps])


def test_a_figure_has_a_line_a_seed_and_marks_a_single_step():
    paths = [{"PPO": ([0.0, 1.0], [2.0, 3.0], [2.0, 4.0]), "DPO": ([1.0], [3.0], [3.0])}] * 2
    series = page.rewards_series(paths)
    assert [one.label for one in series if one.label] == [
        "PPO, gold",
        "PPO, proxy",
        "DPO, gold",
        "DPO, proxy",
    ]
    assert len(series) == 8 and [one.line for one in series] == [True] * 4 + [False] * 4
    picture = page.draw("reward", series, x_label="KL")
    assert picture.count('class="line') == 4 and picture.count('class="marks') == 4
    assert picture.count('class="hole') == 2, "of the proxy, beside the gold reward"
    assert page.smooth([1.0, 2.0, 6.0], window=2) == [1.0, 1.5, 4.0]


@pytest.mark.slow
def test_the_recipe_reaches_what_it_must(tmp_path):
    torch.set_num_threads(1)
    cfg = instruct.Config(output=tmp_path / "instruct", device="cpu")
    run = instruct.Recipe(cfg, cfg.output, 0).run()
    base, sft, ppo, no_kl, dpo = (run.scores[stage] for stage in STAGES)
    assert base.gold + 0.5 < sft.gold < min(ppo.gold, dpo.gold) - 0.5
    assert no_kl.gold < sft.gold and no_kl.proxy > ppo.proxy  # over-optimised
    assert no_kl.kl > 4 * ppo.kl


@pytest.mark.slow
def test_preferences_that_say_nothing_teach_nothing(tmp_path):
    torch.set_num_threads(1)
    cfg = instruct.Config(
        output=tmp_path / "coin",
        texts=8000,
        base_steps=125,
        sft_steps=150,
        preferences=3200,
        labels="coin",
        reward_steps=100,
        ppo_steps=20,
        dpo_steps=50,
        device="cpu",
    )

    run = instruct.Recipe(cfg, cfg.output, 0).run()
    sft = run.scores["SFT"].gold
    assert run.scores["PPO"].gold < sft + 0.3 and run.scores["DPO"].gold < sft + 0.3
    accuracy, gold_itself = run.judged
    assert abs(accuracy - 50) < 6 and abs(gold_itself - 50) < 6
