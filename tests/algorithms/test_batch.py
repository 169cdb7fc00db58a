"""The one Batch, beside a plain loop over what goes into it: nothing lost, nothing twice, no other gradient."""

import random
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from burnish.algorithms.run import batch
from burnish.algorithms.run.batch import Completion, Family
from burnish.model.config import ModelConfig
from burnish.model.transformer import Transformer
from faults import Fault, check_of, control, faults_of
from planted import copy_of


class Place(NamedTuple):
    """A completion's place: the ids before it, its own, and which of them are trained."""

    prompt: list[int]
    tokens: list[int]
    mask: list[bool]


def families(seed: int, count: int = 9) -> list[Family]:
    """Items with a prompt and without, of one to four completions, trained whole, in parts or not at all."""
    draw = random.Random(seed)
    found = []
    for i in range(count):
        prompt = [] if i % 3 == 2 else draw.choices(range(17), k=draw.randint(1, 7))
        completions = []
        for j in range(draw.randint(1, 4)):
            tokens = draw.choices(range(17), k=draw.randint(2, 8))
            mask = [draw.random() < (0, 0.5, 1)[(i + j) % 3] for _ in tokens]
            if not prompt:
                mask[0] = False  # nothing scores a sequence's first token

            n = sum(mask)
            sampled = torch.tensor([draw.uniform(-3, 0) for _ in range(n)])
            support = torch.randint(0, 17, (n, draw.randint(1, 3)), dtype=torch.int32)
            completions.append(Completion(tokens, mask, sampled_logprob=sampled, support=support))
        found.append(Family(prompt, completions))
    return found


def places(items: list[Family]) -> list[Place]:
    return [Place(item.prompt, c.tokens, c.mask) for item in items for c in item.completions]


def is_what_was_put_in(one: batch.Batch, items: list[Family]) -> None:
    """Every field, by a loop over the completions that the batch says it holds."""
    expected, row, of_token = places(items), 0, 0
    everything = [completion for item in items for completion in item.completions]
    firsts = [0]
    for place in expected:
        firsts.append(firsts[-1] + sum(place.mask))

    tokens, predictors = one.packed.tokens.tolist(), one.packed.predictors.tolist()
    starts = one.packed.cu_seqlens.tolist()
    for number, length, last in zip(
        one.completions.tolist(), one.lengths.tolist(), one.last.tolist(), strict=True
    ):
        place = expected[number]
        first = last + 1 - len(place.tokens)
        assert first in starts and tokens[first : last + 1] == place.tokens

        # the prompt stands in front of it, once for all its neighbours
        if place.prompt:
            end = predictors[first] + 1
            assert tokens[end - len(place.prompt) : end] == place.prompt
            assert end - len(place.prompt) in starts
        else:
            assert predictors[first] == -1

        # its trained tokens, in order, with what is known of them
        trained = [first + i for i, is_trained in enumerate(place.mask) if is_trained]
        assert one.rows.tolist()[row : row + length] == trained
        assert one.positions.tolist()[row : row + length] == list(range(firsts[number], firsts[number + 1]))
        completion = everything[number]
        assert torch.equal(one.sampled_logprob[row : row + length], completion.sampled_logprob)
        assert one.support is not None and completion.support is not None
        width = completion.support.shape[1]
        assert torch.equal(one.support[row : row + length, :width], completion.support)
        assert (one.support[row : row + length, width:] == -1).all()
        row, of_token = row + length, of_token + len(place.tokens)

    assert row == len(one.rows) == len(one.positions)
    roots = [i for i in one.members if items[i].prompt]
    assert len(tokens) == of_token + sum(len(items[i].prompt) for i in roots)


@control
def whole_items_are_packed(module: ModuleType) -> None:
    for seed in range(6):
        items = families(seed)
        for capacity in (1, 20, 45, 10**6):
            batches = module.make_batches(items, capacity, "cpu")
            for one in batches:
                is_what_was_put_in(one, items)
                sizes = [module.num_tokens(items[i]) for i in one.members]
                assert sum(sizes) <= capacity or len(sizes) == 1
                assert one.share == pytest.approx(sum(sizes) / batches.num_tokens)
            assert sorted(i for one in batches for i in one.members) == list(range(len(items)))
            counted(batches, items, [True] * len(places(items)))
            assert sum(one.share for one in batches) == pytest.approx(1)


def counted(batches: batch.Batches, items: list[Family], needed: list[bool]) -> None:
    """Each needed completion once, and the step's sums."""
    numbers = [number for one in batches for number in one.completions.tolist()]
    assert sorted(numbers) == [number for number, is_needed in enumerate(needed) if is_needed]
    trained = [sum(place.mask) for place in places(items)]
    assert batches.num_trained == sum(n for n, is_needed in zip(trained, needed, strict=True) if is_needed)
    assert batches.num_tokens == sum(
        len(item.prompt) + sum(len(c.tokens) for c in item.completions) for item in items
    )


@control
def split_items_are_packed(module: ModuleType) -> None:
    for seed in range(6):
        items = families(seed)
        draw = random.Random(seed)
        for capacity in (1, 12, 20, 45, 10**6):
            needed = [draw.random() < 0.7 for _ in places(items)]
            batches = module.make_split_batches(items, torch.tensor(needed), capacity, "cpu")
            for one in batches:
                is_what_was_put_in(one, items)
                assert one.packed.tokens.numel() <= capacity or len(one.completions) == 1
                assert one.share == pytest.approx(len(one.rows) / batches.num_trained)
            counted(batches, items, needed)
            assert sum(one.share for one in batches) == pytest.approx(1)


def test_whole_items_are_packed():
    whole_items_are_packed(batch)


def test_an_item_is_split_where_a_batch_ends():
    split_items_are_packed(batch)


def test_a_split_repeats_the_prompt_and_cuts_no_completion():
    item = Family([1, 2, 3], [Completion([4, 5], [True, True]), Completion([6, 7], [False, True])])
    one, other = batch.make_split_batches([item], torch.tensor([True, True]), 6, "cpu")
    assert one.packed.tokens.tolist() == [1, 2, 3, 4, 5] and other.packed.tokens.tolist() == [1, 2, 3, 6, 7]
    assert (one.share, other.share) == (2 / 3, 1 / 3) and other.rows.tolist() == [4]
    assert other.completions.tolist() == [1] and other.positions.tolist() == [2]


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_step_and_an_idle_one_keeps_pace(monkeypatch, processes):
    """A single item is one process's; the others run a token of which nothing is trained."""
    for module in ("run.batch", "run.processes"):
        monkeypatch.setattr(f"burnish.algorithms.{module}.world", lambda: processes)

    for items in (families(3), families(3)[:1]):
        needed = torch.ones(len(places(items)), dtype=torch.bool)
        for split in (False, True):
            by_rank = []
            for place in range(processes):
                for module in ("run.batch", "run.processes"):
                    monkeypatch.setattr(f"burnish.algorithms.{module}.rank", lambda place=place: place)
                monkeypatch.setattr("burnish.algorithms.run.batch.most", lambda count: max(count, 9))
                make = (
                    batch.make_split_batches(items, needed, 30, "cpu")
                    if split
                    else batch.make_batches(items, 30, "cpu")
                )
                by_rank.append(make)

            assert len({len(batches) for batches in by_rank}) == 1
            assert len({(batches.num_trained, batches.num_tokens) for batches in by_rank}) == 1

            every = [one for batches in by_rank for one in batches]
            for one in every:
                if one.members:
                    is_what_was_put_in(one, items)
                else:
                    assert one.packed.tokens.numel() == 1 and one.share == 0
                    assert not any(
                        map(len, (one.rows, one.lengths, one.last, one.positions, one.completions))
                    )

            numbers = sorted(n for one in every for n in one.completions.tolist())
            assert numbers == list(range(len(needed)))
            assert sum(one.share for one in every) == pytest.approx(1)


# ---- the numbers of a batch


@pytest.fixture(scope="module")
def model() -> Transformer:
    config = ModelConfig(
        vocab_size=17, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    return Transformer(config, seed=1)


def scored(item: Family) -> Family:
    """Without a support: drawn from the whole head."""
    return Family(item.prompt, [Completion(c.tokens, c.mask) for c in item.completions])


def gradients(model: Transformer, batches: batch.Batches) -> tuple[float, list[torch.Tensor]]:
    """A loss and its gradients, where each completion weighs otherwise, and each token as its completion does."""
    model.zero_grad()
    loss = 0.0
    for one in batches:
        weights = one.per_token(torch.linspace(-1, 2, 100))  # (tokens,)
        term = (one.score(model)[0] * weights).sum() / batches.num_trained
        term.backward()
        loss += term.item()
    return loss, [p.grad.clone() for p in model.parameters() if p.grad is not None]


@control
def splitting_changes_no_gradient(module: ModuleType, model: Transformer) -> None:
    items = [scored(item) for item in families(4)]
    needed = torch.ones(len(places(items)), dtype=torch.bool)
    loss, whole = gradients(model, module.make_batches(items, 10**6, "cpu"))
    for capacity in (1, 14, 40):
        for batches in (
            module.make_split_batches(items, needed, capacity, "cpu"),
            module.make_batches(items, capacity, "cpu"),
        ):
            other, parts = gradients(model, batches)
            assert other == pytest.approx(loss, abs=1e-6)
            for one, two in zip(whole, parts, strict=True):
                torch.testing.assert_close(one, two, atol=1e-6, rtol=0)


def test_splitting_changes_no_gradient(model):
    splitting_changes_no_gradient(batch, model)


def test_sums_and_means_are_those_of_a_loop(model):
    items = families(5)
    (one,) = batch.make_batches(items, 10**6, "cpu")
    values = torch.randn(len(one.rows))
    expected, start = [], 0
    for length in one.lengths.tolist():
        expected.append(values[start : start + length].sum())
        start += length
    torch.testing.assert_close(one.sums(values), torch.stack(expected))

    # each pair's scores, wherever its micro-batch was
    pairs = [scored(Family(item.prompt, [*item.completions, *item.completions][:2])) for item in items]
    score = lambda one: one.sums(one.score(model)[0])
    alone = batch.over_completions(model, pairs, score, 1)
    torch.testing.assert_close(alone, batch.over_completions(model, pairs, score, 10**6), atol=1e-5, rtol=0)
    assert alone.shape == (len(pairs), 2) and model.training


def test_a_pass_without_a_gradient_holds_few_batches_at_a_time(model, most_packed):
    """All micro-batches of a whole file would lie on the device at once."""
    pairs = [scored(Family(item.prompt, [*item.completions, *item.completions][:2])) for item in families(5)]
    batch.over_completions(model, pairs, lambda one: one.sums(one.score(model)[0]), 1)
    assert len(batch.LazyBatches(pairs, 1, "cpu")) == len(pairs) > 2 >= most_packed()


# ---- planted faults

FAULTS = faults_of(__file__)
FILE = "algorithms/run/batch"


def is_of_the_gradient(fault: Fault) -> bool:
    return check_of(fault) is splitting_changes_no_gradient


@pytest.mark.parametrize(
    "fault", [fault for fault in FAULTS if not is_of_the_gradient(fault)], ids=lambda fault: fault.id
)
def test_a_planted_fault_is_caught(fault, tmp_path, monkeypatch):
    module = copy_of(FILE, tmp_path, monkeypatch, fault)
    with pytest.raises((AssertionError, ValueError, RuntimeError)):
        check_of(fault)(module)


@pytest.mark.parametrize("fault", [*filter(is_of_the_gradient, FAULTS)], ids=lambda fault: fault.id)
def test_a_planted_fault_of_the_gradient_is_caught(fault, tmp_path, monkeypatch, model):
    """A completion that goes on in the next micro-batch without its prompt."""
    module = copy_of(FILE, tmp_path, monkeypatch, fault)
    with pytest.raises((AssertionError, ValueError)):
        check_of(fault)(module, model)


def test_a_faithful_copy_passes(tmp_path, monkeypatch, model):
    module = copy_of(FILE, tmp_path, monkeypatch)
    whole_items_are_packed(module)
    split_items_are_packed(module)
    splitting_changes_no_gradient(module, model)
