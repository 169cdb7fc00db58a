"""The conformance suite: what Burnish and TRL hold to, and that every check can fail."""

import importlib.util
import json
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from burnish.algorithms import dpo as dpo_module
from burnish.algorithms.run.user_files import load_function
from burnish.bench import record
from burnish.bench.conformance import KL, Batch, NotApplicable, Step, Toy, Trainer
from burnish.bench.runs import conformance
from burnish.bench.runs.checks import CHECKS, ROWS, distributions, make_toy
from burnish.bench.runs.conformance import Outcome, run
from burnish.model import InputError
from burnish.model.adapter import adapter_disabled

HERE = Path(__file__).parent
DOCUMENT = HERE.parents[1] / "docs" / "conformance.md"


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return make_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def burnish() -> Trainer:
    return load_function(f"{HERE / 'burnish_adapter.py'}:adapter")()


@pytest.mark.parametrize("name", CHECKS)
def test_burnish(name: str, toy: Toy, burnish: Trainer):
    assert run(burnish, toy, (name,))[name] == Outcome("holds")


@pytest.mark.slow
@pytest.mark.skipif(
    any(importlib.util.find_spec(package) is None for package in ("trl", "peft")),
    reason="trl and peft are not both installed",
)
def test_trl_is_as_the_kept_table_says(toy: Toy):
    trl = load_function(f"{HERE / 'trl_adapter.py'}:adapter")()
    kept = json.loads(max(record.RESULTS.glob("conformance-*.json")).read_text())["trainers"]
    by_name = {trainer["name"]: trainer for trainer in kept}
    if trl.version != by_name["TRL"]["version"]:
        pytest.skip(f"the kept table is of TRL {by_name['TRL']['version']}, installed is {trl.version}")
    found = {name: outcome.status for name, outcome in run(trl, toy).items()}
    assert found == {name: status for name, (status, _) in by_name["TRL"]["outcomes"].items()}


# ---- controls


class Fault(NamedTuple):
    check: str
    name: str
    plant: Callable[[Trainer], dict[str, Any]]  # the callables that are replaced
    around: Callable[[], AbstractContextManager[Any]] = nullcontext


def sft_with(change: Callable[[Any, Toy, Batch], Step]) -> Callable[[Trainer], dict[str, Any]]:
    return lambda trainer: {"sft": lambda toy, batch: change(trainer.sft, toy, batch)}


def mean_of(steps: list[Step]) -> Step:
    return Step(mean(step.loss for step in steps), torch.stack([step.gradient for step in steps]).mean(0))


def parts(rows: list[Any], size: int) -> list[list[Any]]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def mean_of_parts(sft: Any, toy: Toy, batch: Batch) -> Step:
    return mean_of([sft(toy, Batch(rows, len(rows))) for rows in parts(batch.rows, batch.rows_at_once)])


def mean_of_ranks(sft: Any, toy: Toy, batch: Batch) -> Step:
    return mean_of([sft(toy, Batch(batch.rows[r :: batch.ranks], 6)) for r in range(batch.ranks)])


def one_long_row(sft: Any, toy: Toy, batch: Batch) -> Step:
    if not batch.packed:
        return sft(toy, batch)
    first, *rest = batch.rows
    words = " ".join([first["completion"], *(row["prompt"] + row["completion"] for row in rest)])
    return sft(toy, Batch([{"prompt": first["prompt"], "completion": words}], 1))


def counts_the_cut_row(sft: Any, toy: Toy, batch: Batch) -> Step:
    step = sft(toy, batch)
    return Step(step.loss * 39 / 43, step.gradient) if len(batch.rows) > len(ROWS) else step


def trains_padding(sft: Any, toy: Toy, batch: Batch) -> Step:
    if toy.pad == "<pad>":
        return sft(toy, batch)
    lengths = [len(row["completion"].split()) for row in batch.rows]
    rows = [
        row | {"completion": row["completion"] + " <eos>" * (max(lengths) - n)}
        for row, n in zip(batch.rows, lengths, strict=True)
    ]
    return sft(toy, replace(batch, rows=rows))


def ends_the_cut(sft: Any, toy: Toy, batch: Batch) -> Step:
    room = [batch.max_length - 1 - len(row["prompt"].split()) for row in batch.rows]
    rows = [
        row | {"completion": " " + " ".join(row["completion"].split()[:n])}
        for row, n in zip(batch.rows, room, strict=True)
    ]
    return sft(toy, Batch(rows, len(rows)))


def one_off(trainer: Trainer) -> dict[str, Any]:
    return {"score": lambda *asked: [x.roll(1) for x in trainer.score(*asked)]}


def reference(logprobs: Callable[..., torch.Tensor]) -> Callable[[], AbstractContextManager[Any]]:
    return lambda: mock.patch.object(dpo_module, "over_completions", logprobs)


def no_reference(_: Any, pairs: list[Any], *__: Any) -> torch.Tensor:
    return torch.zeros(len(pairs), 2)


real_logprobs = dpo_module.over_completions


def bare_reference(model: Any, *asked: Any) -> torch.Tensor:
    with adapter_disabled(model):
        return real_logprobs(model, *asked)


def mean_of_pairs(trainer: Trainer) -> dict[str, Any]:
    def dpo(toy: Toy, pairs: list[Any], at_once: int, steps: int, rate: float, lora: str | None):
        first = mean_of([trainer.dpo(toy, p, len(p), 1, 0.0, lora)[0] for p in parts(pairs, at_once)])
        return [first, *trainer.dpo(toy, pairs, at_once, steps, rate, lora)[1:]]

    return {"dpo": dpo}


def moving_reference(trainer: Trainer) -> dict[str, Any]:
    return {"dpo": lambda *asked: [trainer.dpo(*asked)[0]] * 2}


def scored_at(temperature: float, sampled_at: float | None = None) -> Callable[[Trainer], dict[str, Any]]:
    """Whole distributions at a temperature, whatever the samples had."""

    def plant(trainer: Trainer) -> dict[str, Any]:
        def rollout(toy: Toy, prompt: list[int], count: int, asked: float, top_k: int | None):
            ids, _ = trainer.rollout(toy, prompt, count, sampled_at or asked, top_k)
            return ids, distributions(toy, prompt, temperature)[-1][ids]

        return {"rollout": rollout}

    return plant


def policy(loss: Callable[..., torch.Tensor]) -> Callable[[Trainer], dict[str, Any]]:
    return lambda _: {"policy_loss": loss}


def clipped(logprob, old, advantage, mask, n, bound=20.0):
    ratio = (logprob - old).clamp(-bound, bound).exp()
    gain = advantage[:, None]
    return -(torch.min(ratio * gain, ratio.clamp(0.8, 1.2) * gain) * mask).sum() / n


def no_gradient(logprob, old, advantage, mask, n):
    return clipped(logprob.detach(), old, advantage, mask, n) + 0 * logprob.sum()


def own_denominator(logprob, old, advantage, mask, _):
    return clipped(logprob, old, advantage, mask, mask.sum().clamp(min=1))


def unmasked(logprob, old, advantage, mask, n):
    return clipped(logprob, old, advantage, torch.ones_like(mask), max(n, 1))


def divided_by_nothing(logprob, old, advantage, mask, n):
    return clipped(logprob, old, advantage, mask, torch.tensor(n))


def unbounded(logprob, old, advantage, mask, n):
    return clipped(logprob, old, advantage, mask, n, bound=1e9)


def k1(logprob, ref):
    return (logprob - ref).mean()


def kl_term(loss: Callable[..., torch.Tensor], gradient: Any) -> Callable[[Trainer], dict[str, Any]]:
    return lambda _: {"kl": {"planted": KL(loss, gradient)}}


def rewards_of(change: Callable[..., torch.Tensor]) -> Callable[[Trainer], dict[str, Any]]:
    return lambda _: {"shaped_rewards": change}


def k3_in_the_reward(score, logprob, ref, mask, beta):
    d = logprob - ref
    return -beta * (torch.exp(-d) + d - 1) * mask


def kl_paid(score, logprob, ref, mask, beta):
    return beta * (logprob - ref) * mask


def score_at_the_width(score, logprob, ref, mask, beta):
    reward = torch.zeros(mask.shape)
    reward[:, -1] = score
    return reward


def discounted(trainer: Trainer) -> dict[str, Any]:
    return {"advantages": lambda rewards, mask: trainer.advantages(rewards, mask) * 0.99}


def mean_of_rows(sft: Any, toy: Toy, batch: Batch) -> Step:
    return mean_of_parts(sft, toy, replace(batch, rows_at_once=1))


def the_other_kl(trainer: Trainer) -> dict[str, Any]:
    return {"kl": {"k3": replace(trainer.kl["k3"], gradient="KL(pi || ref)")}}


FAULTS = [
    Fault("denominator", "mean of rows' means", sft_with(mean_of_rows)),
    Fault("accumulation", "mean of micro-batches' means", sft_with(mean_of_parts)),
    Fault("sharding", "mean of ranks' means", sft_with(mean_of_ranks)),
    Fault("packing", "rows attend to one another", sft_with(one_long_row)),
    Fault("masked rows", "counted in the denominator", sft_with(counts_the_cut_row)),
    Fault("end token", "padding trained where it is eos", sft_with(trains_padding)),
    Fault("truncation", "an end token on what was cut", sft_with(ends_the_cut)),
    Fault("padding side", "the shift off by one", one_off),
    Fault("preference start", "no reference", lambda _: {}, reference(no_reference)),
    Fault("preference accumulation", "mean of micro-batches' means", mean_of_pairs),
    Fault("reference fresh adapter", "the reference moves", moving_reference),
    Fault("reference loaded adapter", "the bare base", lambda _: {}, reference(bare_reference)),
    Fault("sampler temperature", "scored at temperature 1", scored_at(1.0)),
    Fault("sampler temperature", "sampled at temperature 1", scored_at(2.0, sampled_at=1.0)),
    Fault("sampler support", "scored over all ids", scored_at(1.0)),
    Fault("policy start", "no gradient", policy(no_gradient)),
    Fault("policy accumulation", "the part's own denominator", policy(own_denominator)),
    Fault("policy mask", "no mask", policy(unmasked)),
    Fault("policy mask", "0 / 0", policy(divided_by_nothing)),
    Fault("bounded weights", "not clamped", policy(unbounded)),
    Fault("kl term", "k1", kl_term(k1, "KL(pi || ref)")),
    Fault("kl term", "k3 for the other KL", the_other_kl),
    Fault("kl in the reward", "k3", rewards_of(k3_in_the_reward)),
    Fault("kl in the reward", "the wrong sign", rewards_of(kl_paid)),
    Fault("score placement", "at the padded width", rewards_of(score_at_the_width)),
    Fault("returns are the score", "a discount", discounted),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.check}: {fault.name}")
def test_a_planted_fault_is_found(fault: Fault, toy: Toy, burnish: Trainer):
    with fault.around():
        outcome = run(replace(burnish, **fault.plant(burnish)), toy, (fault.check,))[fault.check]
    assert outcome.status == "does not hold"


def test_every_check_has_a_control():
    assert {fault.check for fault in FAULTS} == set(CHECKS)


# ---- the command


def test_the_documented_adapter_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """The example of docs/conformance.md, its file and its command; what it prints is what the page shows."""
    monkeypatch.chdir(tmp_path)
    text = DOCUMENT.read_text()
    found = re.search(r"```python\n(.*?)```.*?```text\n(.*?)```", text, re.DOTALL)
    assert found is not None
    Path("my_adapter.py").write_text(found[1])
    assert conformance.main(conformance.Config(adapters=("my_adapter.py:adapter",))) == 0
    without_figures = lambda text: [line.partition(":")[0] for line in text.splitlines()]
    assert without_figures(capsys.readouterr().out) == without_figures(found[2])


def test_outcomes_are_kept_as_json(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    adapter = tmp_path / "small.py"
    adapter.write_text(
        "from burnish.bench.conformance import Trainer\n\n\ndef adapter():\n"
        "    absent = {'sft': 'nothing here'}\n"
        "    return Trainer('Small', '1', advantages=lambda rewards, mask: rewards, absent=absent)\n"
    )
    monkeypatch.setattr(record, "RESULTS", tmp_path)

    # in a file that is named, and under their usual name
    file = tmp_path / "there" / "outcomes.json"
    conformance.main(conformance.Config(adapters=(f"{adapter}:adapter",), keep=True, json=file))
    (path,) = tmp_path.glob("conformance-*.json")
    kept = json.loads(path.read_text())
    assert kept == json.loads(file.read_text()) and path.name == f"conformance-{kept['date']}.json"
    assert kept["command"] == f"burnish bench conformance {adapter}:adapter --json {file} --keep"

    (trainer,) = kept["trainers"]
    assert (trainer["name"], trainer["version"]) == ("Small", "1")
    assert trainer["outcomes"]["packing"] == ["not applicable", "nothing here"]
    assert trainer["outcomes"]["policy mask"] == ["not applicable", "the adapter has no policy_loss"]
    assert trainer["outcomes"]["returns are the score"][0] == "does not hold"


def test_an_input_that_a_trainer_does_not_have_is_not_applicable(toy: Toy, burnish: Trainer):
    def sft(toy: Toy, batch: Batch) -> Step:
        raise NotApplicable("no packing here")

    assert run(replace(burnish, sft=sft), toy, ("packing",))["packing"] == (
        "not applicable",
        "no packing here",
    )


def test_a_run_without_an_adapter_is_refused():
    with pytest.raises(InputError, match="expected one adapter or more"):
        conformance.main(conformance.Config())
