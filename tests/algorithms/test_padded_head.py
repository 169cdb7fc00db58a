"""Ids that no token has: never drawn, and not among what a drawn token is scored.

A head with such rows has to do what the head without them does. So each model here has a twin whose tokens are the
rows; the rows of ids that are missing have logits above all others, which a fault cannot overlook.
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
from burnish.algorithms.recipes.sums import VOCABULARY, make_tokenizer
from burnish.model.adapter import add_lora
from burnish.model.batch import Chooser
from burnish.model.checkpoint import load_model, save_model
from burnish.model.config import ModelConfig
from burnish.model.errors import InputError
from burnish.model.generate import Sample, generate, stream
from burnish.model.head import Head
from burnish.model.packed import pack
from burnish.model.text.tokenizer import Tokenizer
from burnish.model.transformer import Transformer
from burnish.model.vocabulary import Vocabulary
from safetensors.torch import load_file
from tokenizers import Tokenizer as Backend

ALGORITHMS = Path(__file__).parents[2] / "algorithms"
ROWS = 24  # of the heads with missing ids
TOKENS = len(VOCABULARY)  # 17
IDS = {
    "padded": list(range(TOKENS)),
    "holes": [i + 2 * (i > 2) + (i > 9) for i in range(TOKENS)],  # 3, 4 and 12 are missing, and 20 to 23
}
CONFIG = ModelConfig(
    *(TOKENS, 16, 24, 2, 2),  # V, C, F, layers, H
    eos_token_id=0,
    initializer_range=0.3,
)


class Twins(NamedTuple):
    """Two folders of one model."""

    dense: Path  # a row for each token
    other: Path  # ROWS rows, some of ids that are missing
    ids: list[int]  # the tokens', of the other


def tokenizer_of(ids: list[int]) -> Tokenizer:
    settings = json.loads(make_tokenizer().to_str())
    settings["model"]["vocab"] = dict(zip(VOCABULARY, ids, strict=True))
    return Tokenizer(Backend.from_str(json.dumps(settings)), eos="<eos>")


@torch.no_grad()
def twins_of(kind: str, folder: Path, seed: int, rows: int = ROWS) -> Twins:
    ids, tied = IDS[kind], kind == "holes"
    dense = Transformer(dataclasses.replace(CONFIG, tie_word_embeddings=tied), seed)
    dense.embed_tokens.weight[:, 0] = 2.0  # so the hidden states of all tokens have the first axis in common
    for layer in dense.layers:
        layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0.0

    other = Transformer(dataclasses.replace(dense.config, vocab_size=rows), seed)
    for (name, source), (_, target) in zip(dense.named_parameters(), other.named_parameters(), strict=True):
        if name in ("embed_tokens.weight", "lm_head.weight"):
            target.zero_()
            target[:, 0] = 60.0
            target[ids] = source
        else:
            target.copy_(source)

    save_model(dense, folder / "dense", tokenizer_of(list(range(TOKENS))))
    save_model(other, folder / "other", tokenizer_of(ids))
    return Twins(folder / "dense", folder / "other", ids)


@pytest.fixture(params=IDS)
def twins(request, tmp_path) -> Twins:
    return twins_of(request.param, tmp_path, seed=1)


@pytest.fixture
def holes(tmp_path) -> Twins:
    return twins_of("holes", tmp_path, seed=1)


# ---- the set


def test_a_vocabulary_is_a_set_and_no_count():
    whole, holes = Vocabulary.of([2, 0, 1, 1]), Vocabulary.of([5, 0, 3])
    assert (whole.end, whole.size, whole.ids) == (3, 3, None)
    assert holes.ids is not None
    assert (holes.end, holes.size, holes.ids.tolist()) == (6, 3, [0, 3, 5])
    assert whole.within(3) is None and whole.within(2) is None and whole.within(4) is whole
    assert holes.within(6) is holes
    shorter = holes.within(5)
    assert shorter is not None and shorter.ids is not None and shorter.ids.tolist() == [0, 3]
    assert Vocabulary.of([0, 1, 9]).within(2) is None

    x = torch.arange(12).view(2, 6)
    assert whole.select(x, 1).tolist() == [[0, 1, 2], [6, 7, 8]]
    assert holes.select(x, 1).tolist() == [[0, 3, 5], [6, 9, 11]]

    rows = torch.tensor([2, -1, 0], dtype=torch.int32)
    assert holes.ids_of(rows).tolist() == [5, -1, 0] and holes.ids_of(rows).dtype == torch.int32
    assert holes.rows_of(torch.tensor([3, 4, 5, 9])).tolist() == [1, 3, 2, 3]
    assert whole.ids_of(rows) is rows and whole.rows_of(rows) is rows
    assert holes.has(torch.tensor([-1, 0, 1, 5, 6])).tolist() == [False, True, False, True, False]
    assert whole.has(torch.tensor([-1, 0, 2, 3])).tolist() == [False, True, True, False]


def test_the_ids_are_the_tokenizers_added_ones_included():
    holes = tokenizer_of(IDS["holes"]).vocabulary
    assert holes.ids is not None and holes.ids.tolist() == IDS["holes"] and holes.end == 20
    backend = make_tokenizer()
    backend.add_special_tokens(["<extra>"])
    assert backend.get_vocab_size(with_added_tokens=False) == 17
    assert Tokenizer(backend, eos="<eos>").vocabulary.end == 18


# ---- drawn, and scored

PROMPTS = ["1+2+3=", "4+", "7"]
WAYS = [
    {"temperature": 0},
    {},
    {"temperature": 1.5},
    {"top_k": 5},
    {"top_k": 20},  # of 17
    {"top_p": 0.8, "temperature": 1.3},
    {"min_p": 0.2},
]


def draw(folder: Path, **how: Any) -> list[Sample]:
    """Six samples a prompt, from the tokenizer's ids unless told otherwise."""
    model, tokenizer = load_model(folder), Tokenizer.load(folder)
    how = {"samples_per_prompt": 6, "max_new_tokens": 6, "vocabulary": tokenizer.vocabulary, **how}
    return generate(model, [tokenizer.encode(text) for text in PROMPTS], **how)


@pytest.mark.parametrize("how", WAYS, ids=str)
def test_what_is_drawn_is_what_the_twin_draws(twins, how):
    """Ids, log-probabilities, supports; the scorer agrees, the stream is the sample."""
    model, tokenizer = load_model(twins.other), Tokenizer.load(twins.other)
    found = draw(twins.other, **how)

    for ours, twin in zip(found, draw(twins.dense, **how), strict=True):
        assert ours.tokens == [twins.ids[token] for token in twin.tokens]
        torch.testing.assert_close(ours.logprobs, twin.logprobs, atol=1e-5, rtol=0)
        if twin.support is not None:
            ids = torch.tensor([*twins.ids, -1])[twin.support.long()]
            assert torch.equal(ours.support.long(), ids)

        prompt = tokenizer.encode(PROMPTS[ours.prompt_index])
        rows = torch.arange(len(prompt), len(prompt) + len(ours.tokens))
        scored = model.score(
            pack([prompt + ours.tokens]),
            rows,
            temperature=how.get("temperature", 1.0) or 1.0,
            support=ours.support,
            vocabulary=ours.vocabulary,
        )[0]
        assert (scored - ours.logprobs).abs().max() < 1e-4

    prompt = tokenizer.encode(PROMPTS[0])
    options = {"max_new_tokens": 6, "vocabulary": tokenizer.vocabulary, **how}
    assert list(stream(model, prompt, **options)) == found[0].tokens


def test_without_a_vocabulary_missing_ids_are_drawn(twins):
    """The control of the test above: these models want nothing else."""
    for sample in draw(twins.other, vocabulary=None):
        assert not set(sample.tokens) & set(twins.ids)


def test_a_prompt_may_hold_a_missing_id(twins):
    model, vocabulary = load_model(twins.other), Tokenizer.load(twins.other).vocabulary
    (sample,) = generate(model, [[0, 23, 5]], max_new_tokens=6, vocabulary=vocabulary)
    assert set(sample.tokens) <= set(twins.ids)


def test_a_vocabulary_of_the_whole_head_is_nothing(twins):
    """The same op on the same weight, without a copy."""
    model, tokens = load_model(twins.dense), Tokenizer.load(twins.dense).vocabulary
    packed, rows = pack([[1, 2, 3]]), torch.tensor([1, 2])
    choose, width = Chooser.of(model, tokens, top_k=5)
    assert choose.func.__name__ == "sample_tokens" and width == 5
    whole = model.before_head(packed, rows)[1].weight
    assert model.before_head(packed, rows, tokens)[1].weight is whole
    for found, expected in zip(
        model.score(packed, rows, vocabulary=tokens), model.score(packed, rows), strict=True
    ):
        assert torch.equal(found, expected)


def test_a_missing_row_has_a_gradient_from_given_text_alone(twins):
    model, tokens = load_model(twins.other), Tokenizer.load(twins.other).vocabulary
    missing = sorted(set(range(ROWS)) - set(twins.ids))
    packed, rows = pack([[0, *twins.ids[5:9]]]), torch.arange(1, 5)
    logprob, lse, entropy = model.score(packed, rows, vocabulary=tokens)
    (logprob + 0.3 * lse + 0.2 * entropy).sum().backward()
    assert not model.head.grad[missing].any() and model.head.grad[twins.ids].any(1).all()
    weights = [p for p in model.parameters() if p is not model.embed_tokens.weight or p is model.head]
    log_p = model.logits(model(packed)[:-1]).log_softmax(-1)
    given, plain = (-model.score(packed, rows)[0].mean(), -log_p.gather(1, packed.tokens[rows, None]).mean())
    torch.testing.assert_close(given, plain, atol=1e-5, rtol=1e-6)
    gradients = (torch.autograd.grad(loss, weights) for loss in (given, plain))
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    (gradient,) = torch.autograd.grad(-model.score(packed, rows)[0].mean(), model.head)
    assert gradient[missing].any(1).all()


def test_an_adapter_of_the_head_has_rows_for_tokens_alone():
    model, tokens = Transformer(dataclasses.replace(CONFIG, vocab_size=ROWS)), Vocabulary.of(IDS["holes"])
    add_lora(model, 2, targets=("lm_head",))
    assert model.lm_head is not None and model.lm_head.lora is not None
    torch.nn.init.normal_(model.lm_head.lora.b)
    packed, rows = pack([[0, 5, 13, 19]]), torch.arange(1, 4)
    logprob, _, _ = model.score(packed, rows, vocabulary=tokens)
    log_p = tokens.select(model.logits(model(packed)[:-1]), 1).log_softmax(-1)
    expected = log_p.gather(1, torch.tensor([[3], [10], [16]])).squeeze(1)
    torch.testing.assert_close(logprob, expected, atol=1e-5, rtol=0)


def test_a_target_that_is_no_token_is_refused(holes):
    model, tokens = load_model(holes.other), Tokenizer.load(holes.other).vocabulary
    with pytest.raises(ValueError, match="targets: row 0 is 17, outside a vocabulary of 17"):
        model.score(pack([[0, 3]]), torch.tensor([1]), vocabulary=tokens)


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
    """All ids of its own samples, and refuses one more."""
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
    """Whatever rows of its head are no tokens."""
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
    calls = [
        (file.name, node)
        for file in sorted(ALGORITHMS.rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("generate", "stream")
    ]
    assert {name for name, _ in calls} >= {"groups.py", "chat.py", "evaluate.py", "parts.py"}
    for name, node in calls:
        assert "vocabulary" in {keyword.arg for keyword in node.keywords}, f"{name}:{node.lineno}"


def test_lessons_with_an_id_that_is_missing_are_refused(tmp_path):
    tokenizer, file = tokenizer_of(IDS["holes"]), tmp_path / "lessons.safetensors"
    lesson = Lesson([0, 5], [False, True], torch.tensor([[5, 3]]).int(), torch.tensor([[-0.5, -1.0]]))
    write_lessons(file, [lesson], tokenizer, 1.0)
    with pytest.raises(
        InputError, match="ids: expected the tokenizer's ids, 0 to 19, got 3, which is none of them"
    ):
        read_lessons(file, tokenizer, 1.0)


# ---- controls


def _over_the_tokens_alone(token_logprobs):
    """As the likeliest token is scored there."""
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
    return lambda *a, vocabulary, **options: generate(*a, **options)


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


@pytest.mark.parametrize(
    "name, target, attribute, plant, check", FAULTS, ids=lambda x: getattr(x, "__name__", x)
)
def test_a_planted_fault_is_found(
    name, target, attribute, plant, check, holes, prompts, tmp_path, monkeypatch
):
    place = place_of(holes, "holes", prompts, tmp_path)
    monkeypatch.setattr(target, attribute, plant(getattr(target, attribute)))
    with pytest.raises(
        (AssertionError, ValueError, IndexError), match=r"expected|outside a vocabulary|out of bounds"
    ):
        check(place)
