"""Algorithms on a model with ids that no token has: each does what it does on a model without them.

So each model here has a twin whose tokens are the rows (tests/common/twins.py); the rows of ids that are missing have
logits above all others, which a fault cannot overlook.
"""

import ast
import contextlib
import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from burnish.algorithms import chat, distill, evaluate, grpo, ppo, teach
from burnish.algorithms.data import groups as groups_file
from burnish.algorithms.data.lessons import Lesson, read_lessons, write_lessons
from burnish.model.checkpoint import load_model
from burnish.model.errors import InputError
from burnish.model.head import Head
from burnish.model.packed import pack
from burnish.model.transformer import Transformer
from burnish.model.vocabulary import Vocabulary
from safetensors.torch import load_file
from twins import IDS, ROWS, TOKENS, Twins, tokenizer_of, twins_of

ALGORITHMS = Path(__file__).parents[2] / "algorithms"


# ---- algorithms: each on both twins


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "second" not in k} for line in lines]


def same(found: Any, expected: Any) -> None:
    assert found == pytest.approx(expected, rel=2e-4, abs=1e-5), "expected the twin's numbers"


class Place(NamedTuple):
    twins: Twins
    teachers: Twins
    prompts: Path
    folder: Path


@pytest.fixture
def place(twins, prompts, tmp_path) -> Place:
    return place_of(twins, "holes" if twins.ids == IDS["holes"] else "padded", prompts, tmp_path)


def place_of(twins: Twins, kind: str, prompts: Path, folder: Path) -> Place:
    (folder / "rewards.py").write_text(
        "def digits(completions, **_):\n    return [float(sum(map(str.isdigit, c))) for c in completions]\n"
    )
    return Place(twins, twins_of(kind, folder / "teachers", 5, rows=30), prompts, folder)


def of_both(place: Place, train: Callable, config: type, **flags: Any) -> list[dict[str, Any]]:
    """Metrics, which the two have in common."""
    found = []
    for name in ("dense", "other"):
        cfg = config(
            model=getattr(place.twins, name),
            data=place.prompts,
            output=place.folder / f"{name}-{len(list(place.folder.iterdir()))}",
            device="cpu",  # fp32 throughout
            **{
                key: getattr(value, name) if isinstance(value, Twins) else value
                for key, value in flags.items()
            },
        )
        train(cfg)
        found.append(metrics_of(cfg.output))

    for dense, other in zip(*found, strict=True):
        assert dense.keys() == other.keys()
        for name in dense:
            same(other[name], dense[name])

    missing = sorted(set(range(ROWS)) - set(place.twins.ids))
    before, after = load_model(place.twins.other).head, load_model(cfg.output / "model").head
    assert torch.equal(before[missing], after[missing]), "expected no gradient of missing rows"
    assert not torch.equal(before, after), "expected an update"
    return found[1]


RL = {"steps": 2, "prompts_per_step": 3, "group_size": 4, "max_new_tokens": 6, "learning_rate": 1e-3}


def grpo_is_the_twins(place: Place, **flags: Any) -> None:
    reward = (f"{place.folder}/rewards.py:digits",)
    first, *_ = of_both(place, grpo.train, grpo.Config, reward=reward, kl_coefficient=0.1, **RL, **flags)
    assert first["ratio"] == 1 and abs(first["kl"]) < 1e-6 and first["mismatch"] < 1e-4, "expected on policy"


def ppo_is_the_twins(place: Place) -> None:
    reward = (f"{place.folder}/rewards.py:digits",)
    flags = {"reward": reward, "epochs_per_rollout": 1, "minibatches": 1, **RL}
    first, *_ = of_both(place, ppo.train, ppo.Config, **flags)
    same(first["first_ratio"], 1)
    assert abs(first["kl"]) < 1e-5 and first["mismatch"] < 1e-4, "expected on policy"


def distill_is_the_twins(place: Place, **flags: Any) -> None:
    own = {"student_samples": 1.0, "max_new_tokens": 6, "batch_size": 6, "steps": 2, "warmup_steps": 0}
    of_both(place, distill.train, distill.Config, teacher=place.teachers, **own, learning_rate=1e-3, **flags)


def policy_gradient_is_the_twins(place: Place) -> None:
    distill_is_the_twins(place, loss="policy_gradient", temperature=1.3)


def teach_is_the_twins(place: Place) -> None:
    """Check that all ids of its own samples are stored, and one more is refused."""
    stored = []
    for name in ("dense", "other"):
        flags = {
            "model": getattr(place.twins, name),
            "data": place.prompts,
            "samples": 2,
            "max_new_tokens": 5,
        }
        output = place.folder / f"taught-{name}"
        cfg = teach.Config(**flags, output=output, top_k=TOKENS, device="cpu")
        stored.append(load_file(teach.teach(cfg)))
        with pytest.raises(InputError, match="--top-k: expected at most the vocabulary, 17, got 18"):
            teach.teach(dataclasses.replace(cfg, output=place.folder / "none", top_k=TOKENS + 1))

    dense, other = stored
    for name in ("tokens", "ids"):
        expected = torch.tensor(place.twins.ids)[dense[name].long()]
        assert torch.equal(other[name].long(), expected), "expected the twin's lessons"

    model, start = load_model(place.twins.other), 0
    for tokens, trained in zip(
        *(other[name].split(other["lengths"].tolist()) for name in ("tokens", "trained")), strict=True
    ):  # ids are tokens, log-probabilities over the whole head
        logprobs = model.logits(model(pack([tokens.tolist()]))).log_softmax(-1)[trained.nonzero()[:, 0] - 1]
        end = start + len(logprobs)
        expected = logprobs.gather(1, other["ids"][start:end].long())
        same(other["logprobs"][start:end].flatten().tolist(), expected.flatten().tolist())
        start = end


def evaluate_is_the_twins(place: Place) -> None:
    found = []
    for name in ("dense", "other"):
        flags = {"samples": 4, "k": (1, 4), "max_new_tokens": 6, "limit": 8, "device": "cpu"}
        flags |= {"reward": (f"{place.folder}/rewards.py:digits",), "output": place.folder / f"judged-{name}"}
        model = getattr(place.twins, name)
        found.append(evaluate.evaluate(evaluate.Config(model=model, data=place.prompts, **flags)))
    same(found[1], found[0])


def chat_is_the_twins(place: Place) -> None:
    answers = []
    for folder in (place.twins.dense, place.twins.other):
        with contextlib.redirect_stdout(io.StringIO()) as answer:
            chat.main(
                chat.Config(model=folder, prompt="1+2+", temperature=1.0, max_new_tokens=9, device="cpu")
            )
        answers.append(answer.getvalue())
    assert answers[0] == answers[1] != "\n", "expected the twin's answer"


@pytest.mark.parametrize("flags", [{}, {"top_k": 5, "top_p": 0.9, "temperature": 0.8}], ids=str)
def test_grpo(place, flags):
    grpo_is_the_twins(place, **flags)


def test_ppo(place):
    ppo_is_the_twins(place)


def test_distill(place):
    distill_is_the_twins(place, beta=0.5)
    policy_gradient_is_the_twins(place)


def test_teach(place):
    teach_is_the_twins(place)


@pytest.mark.parametrize("samples", [0, 2], ids=["given text", "own answers"])
@pytest.mark.parametrize("top_k", [3, TOKENS])
def test_a_model_has_nothing_to_learn_from_its_own_lessons(place, demonstrations, samples, top_k):
    """The divergence is 0, whatever rows of its head are no tokens."""
    model, device = place.twins.other, "cpu"
    data = place.prompts if samples else demonstrations
    flags = {"samples": samples, "top_k": top_k, "max_new_tokens": 5}
    taught = teach.Config(model=model, data=data, output=place.folder / "taught", device=device, **flags)
    lessons, output = teach.teach(taught), place.folder / "out"
    own = distill.Config(model=model, data=lessons, output=output, steps=1, warmup_steps=0, device=device)
    distill.train(own)
    (line,) = metrics_of(output)
    assert abs(line["divergence"]) < 1e-6 and line["grad_norm"] < 1e-4


def test_evaluate(place):
    evaluate_is_the_twins(place)


def test_chat(place):
    chat_is_the_twins(place)


def test_every_algorithm_says_what_it_draws_from():
    """Recipes, too, which no test here runs."""
    samplers = [
        (file.name, function)
        for file in sorted(ALGORITHMS.rglob("*.py"))
        for function in ast.walk(ast.parse(file.read_text()))
        if isinstance(function, ast.FunctionDef) and any(map(samples, ast.walk(function)))
    ]
    assert {name for name, _ in samplers} >= {"groups.py", "chat.py", "evaluate.py", "parts.py"}
    for name, function in samplers:
        assert any(map(names_a_vocabulary, ast.walk(function))), f"{name}:{function.lineno}"


def samples(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("generate", "stream")


def names_a_vocabulary(node: ast.AST) -> bool:
    """Tell whether a node is the keyword of a call, or the key of a dict of keywords."""
    return getattr(node, "arg", "") == "vocabulary" or getattr(node, "value", "") == "vocabulary"


def test_lessons_with_an_id_that_is_missing_are_refused(tmp_path):
    tokenizer, file = tokenizer_of(IDS["holes"]), tmp_path / "lessons.safetensors"
    lesson = Lesson([0, 5], [False, True], torch.tensor([[5, 3]]).int(), torch.tensor([[-0.5, -1.0]]))
    write_lessons(file, [lesson], tokenizer, 1.0)
    with pytest.raises(
        InputError, match="ids: expected the tokenizer's ids, 0 to 19, got 3, which no token has"
    ):
        read_lessons(file, tokenizer, 1.0)


# ---- controls


def _over_the_tokens_alone(token_logprobs):
    """Each id as a row of the tokens alone, over which the likeliest token is scored."""
    tokens = torch.tensor(IDS["holes"])

    def fault(head, hidden, ids, **options):
        rows = torch.searchsorted(tokens, ids)
        return token_logprobs(Head(head.weight[tokens]), hidden, rows, **options)

    return fault


def _given_text(make_batches):
    def fault(*a):
        batches = make_batches(*a)
        batches[:] = [dataclasses.replace(batch, vocabulary=None) for batch in batches]
        return batches

    return fault


def _from_the_whole_head(generate):
    return lambda model, prompts, params, **options: generate(
        model, prompts, dataclasses.replace(params, vocabulary=None), **options
    )


def _a_count(_):
    return lambda ids: Vocabulary(len(set(ids)))


def _unmapped(_):
    return lambda vocabulary, x: x


def _of_given_text(score):
    return lambda model, *a, vocabulary=None, **options: score(model, *a, **options)


FAULTS = [
    ("sampled from the whole head", groups_file, "generate", _from_the_whole_head, grpo_is_the_twins),
    ("scored over the whole head", Transformer, "score", _of_given_text, grpo_is_the_twins),
    ("scored over the whole head", Transformer, "score", _of_given_text, ppo_is_the_twins),
    ("a count in place of the set", Vocabulary, "of", _a_count, grpo_is_the_twins),
    ("a count in place of the set", Vocabulary, "of", _a_count, teach_is_the_twins),
    ("a row is taken for its id", Vocabulary, "ids_of", _unmapped, grpo_is_the_twins),
    ("an id is taken for its row", Vocabulary, "rows_of", _unmapped, grpo_is_the_twins),
    ("an id is taken for its row", Vocabulary, "rows_of", _unmapped, policy_gradient_is_the_twins),
    ("taken for given text", distill, "make_batches", _given_text, policy_gradient_is_the_twins),
    ("taken for given text", distill, "make_batches", _given_text, distill_is_the_twins),
    ("stored over the tokens alone", Head, "token_logprobs", _over_the_tokens_alone, teach_is_the_twins),
    ("sampled from the whole head", evaluate, "generate", _from_the_whole_head, evaluate_is_the_twins),
    ("sampled from the whole head", chat, "stream", _from_the_whole_head, chat_is_the_twins),
]


@pytest.fixture
def place_with_holes(holes, prompts, tmp_path) -> Place:
    return place_of(holes, "holes", prompts, tmp_path)


@pytest.mark.parametrize(
    "name, target, attribute, plant, check", FAULTS, ids=lambda x: getattr(x, "__name__", x)
)
def test_a_planted_fault_is_found(name, target, attribute, plant, check, place_with_holes, monkeypatch):
    monkeypatch.setattr(target, attribute, plant(getattr(target, attribute)))
    with pytest.raises(
        (AssertionError, ValueError, IndexError), match=r"expected|outside a vocabulary|out of bounds"
    ):
        check(place_with_holes)
