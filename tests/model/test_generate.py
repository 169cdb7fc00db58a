"""Sampling: against transformers' greedy tokens, the uncached model, and the distribution that is asked for."""

import json
from dataclasses import replace

import pytest
import torch
from burnish.bench.ops.static import compile_only
from burnish.model import Cache, InputError, ModelConfig, Transformer, Vocabulary, pack, rope
from burnish.model.adapter import add_lora, quantize_base
from burnish.model.batch import Batch, Chooser, Request
from burnish.model.cache import cache_bytes
from burnish.model.checkpoint import load_model
from burnish.model.generate import SamplingParams, generate, stream
from folders import GOLDEN
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

everywhere = pytest.mark.parametrize("architecture", GOLDEN)

TINY = ModelConfig(
    *(31, 16, 24, 2, 2),  # V, C, F, layers, H
    initializer_range=0.5,
    tie_word_embeddings=True,
)
PROMPTS = [[4, 9, 1, 30, 7], [3], [12, 13, 14], [9, 9]]


@pytest.fixture(scope="module")
def tiny():
    return Transformer(TINY, seed=3)


def calls(monkeypatch, model, name) -> list[int]:
    """Tokens of each call of model.<name>, recorded."""
    sizes: list[int] = []
    method = getattr(model, name)

    def recorded(tokens, cache):
        sizes.append(tokens.numel() if isinstance(tokens, torch.Tensor) else tokens.tokens.numel())
        return method(tokens, cache)

    monkeypatch.setattr(model, name, recorded)
    return sizes


def score(model, sample, temperature=1.0):
    """The sample's log-probabilities without a cache."""
    prompt = PROMPTS[sample.prompt_index]
    rows = torch.arange(len(prompt), len(prompt) + len(sample.tokens))
    packed = pack([prompt + sample.tokens])
    return model.score(packed, rows, temperature=temperature, support=sample.support)[0].detach()


# ---- greedy


@everywhere
def test_greedy_tokens_are_those_of_transformers(data, architecture):
    folder = data / "tiny-hf" / architecture
    greedy = load_file(folder / "expected.safetensors")["greedy"][0].tolist()
    (sample,) = generate(
        load_model(folder), [greedy[:6]], SamplingParams(max_new_tokens=len(greedy) - 6, temperature=0)
    )
    assert sample.tokens == greedy[6:]


def test_greedy_text_of_a_real_model_is_that_of_transformers(data, shared_data):
    golden = json.loads((data / "stories260k-greedy.json").read_text())["golden"]
    model = load_model(shared_data / "stories260k" / "hf")
    samples = generate(
        model,
        [story["prompt"] for story in golden],
        SamplingParams(max_new_tokens=100, temperature=0, stop_ids={2}),
    )
    for sample, story in zip(samples, golden, strict=True):
        assert sample.tokens == story["tokens"]


# ---- the cache


@everywhere
def test_cached_decoding_is_uncached_decoding(data, architecture):
    """Three sequences of different lengths, two of one prompt, past the window of mistral-sw (5)."""
    model = load_model(data / "tiny-hf" / architecture)
    sequences = [[5, 6, 7, 8, 9, 10, 11, 30], [5, 6, 7, 8, 9, 10, 12, 31], [40, 41, 42, 43]]
    packed = pack([sequences[0][:2], sequences[2][:1]])
    cache = Cache(model.config, prompts=2, prompt_capacity=3, slots=3, capacity=6, dtype=torch.float32)
    cache.open(packed, [1, 0])

    with torch.no_grad():
        whole = model(packed)
        torch.testing.assert_close(model.prefill(packed, cache), whole[[1, 2]], atol=1e-5, rtol=0)

        cache.begin(slice(3), torch.tensor([1, 1, 0]))
        for step in range(3):
            tokens = [sequences[0][2 + step], sequences[1][2 + step], sequences[2][1 + step]]
            hidden = model.decode(torch.tensor(tokens), cache)
        assert cache.keep(torch.tensor([1])) == [1]
        for token in sequences[1][5:]:
            last = model.decode(torch.tensor([token]), cache)

        uncached = [model(pack([sequence[:n]]))[-1] for sequence, n in zip(sequences, (5, 5, 4), strict=True)]
        torch.testing.assert_close(hidden, torch.stack(uncached), atol=1e-5, rtol=0)
        torch.testing.assert_close(last[0], model(pack([sequences[1]]))[-1], atol=1e-5, rtol=0)


@everywhere
@pytest.mark.parametrize(
    "how",
    [{}, {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.6}, {"top_k": 9, "top_p": 0.8, "temperature": 1.5}],
)
def test_log_probabilities_are_the_scorers(data, architecture, how):
    model = load_model(data / "tiny-hf" / architecture)
    params = SamplingParams(samples_per_prompt=3, max_new_tokens=9, stop_ids={0, 1, 2, 3}, **how)
    for sample in generate(model, PROMPTS, params):
        assert (sample.support is not None) == ("top_k" in how or "top_p" in how)
        expected = score(model, sample, how.get("temperature", 1.0))
        torch.testing.assert_close(sample.logprobs, expected, atol=1e-5, rtol=0)


def test_a_group_runs_its_prompt_once(tiny, monkeypatch):
    prefills, steps = calls(monkeypatch, tiny, "prefill"), calls(monkeypatch, tiny, "decode")
    generate(tiny, [*PROMPTS, PROMPTS[0]], SamplingParams(samples_per_prompt=4, max_new_tokens=3))
    assert prefills == [sum(map(len, PROMPTS))]  # the repeated prompt is not run again either
    assert steps == [20, 20]  # the last id drawn is not run


def test_sequences_that_ended_leave_and_the_batch_fills_up_again(tiny, monkeypatch):
    prefills, steps = calls(monkeypatch, tiny, "prefill"), calls(monkeypatch, tiny, "decode")
    prompts = [[*prompt, i] for i in range(8) for prompt in PROMPTS]
    samples = generate(tiny, prompts, SamplingParams(max_new_tokens=30, stop_ids=set(range(4))), batch_size=8)
    assert max(steps) == 8 and len(prefills) > 4
    drawn = sum(len(sample.tokens) for sample in samples)
    assert drawn - 32 <= sum(steps) < 1.2 * drawn  # few steps are spent on sequences that have ended
    every = generate(tiny, prompts, SamplingParams(max_new_tokens=30, stop_ids=set(range(4))))
    assert [sample.tokens for sample in samples] == [sample.tokens for sample in every]


def test_large_prefills_are_cut_into_portions(tiny, monkeypatch):
    whole = generate(tiny, PROMPTS, SamplingParams(samples_per_prompt=2, max_new_tokens=4))
    prefills = calls(monkeypatch, tiny, "prefill")
    monkeypatch.setattr("burnish.model.batch.PREFILL_TOKENS", {"cpu": 4})
    assert [
        s.tokens for s in generate(tiny, PROMPTS, SamplingParams(samples_per_prompt=2, max_new_tokens=4))
    ] == [s.tokens for s in whole]
    assert prefills == [1 + 2 + 3, 5]  # the shortest first: what runs together is of about one length


def test_a_batch_of_one_at_a_time_runs_each_prompt_once(tiny, monkeypatch):
    prefills = calls(monkeypatch, tiny, "prefill")
    generate(tiny, PROMPTS, SamplingParams(samples_per_prompt=3, max_new_tokens=2), batch_size=1)
    assert prefills == [len(prompt) for prompt in PROMPTS]


@pytest.mark.parametrize("architecture", ["qwen3", "deepseek_v3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_computed_is_what_the_cache_takes(data, architecture, dtype):
    config = load_model(data / "tiny-hf" / architecture).config
    cache = Cache(config, 3, 7, 5, 11, dtype)
    allocated = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in cache.keys}
    for buffers in (cache.values, cache.prompt_keys, cache.prompt_values):
        allocated |= {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in buffers}
    assert cache_bytes(config, 3, 7, 5, 11, dtype) == sum(allocated.values()) == cache.nbytes


def test_the_budget_sizes_the_cache_and_changes_no_sample(tiny, monkeypatch):
    params = SamplingParams(samples_per_prompt=4, max_new_tokens=6, stop_ids={1, 2, 3})
    reference = generate(tiny, PROMPTS, params)
    sizes: list[int] = []
    monkeypatch.setattr(
        "burnish.model.batch.Cache",
        lambda *a: sizes.append((cache := Cache(*a)).nbytes) or cache,
    )
    token = cache_bytes(TINY, 0, 0, 1, 1, torch.float32)
    least = (5 + 6) * token  # the longest prompt, and one answer
    for budget in (least, 3 * least, 10**9):
        samples = generate(tiny, PROMPTS, params, memory_budget=budget)
        assert [s.tokens for s in samples] == [s.tokens for s in reference]
    # 2 slots with 2 prompts would be 22 tokens, 3 with 2 prompts 28, 4 with 2 prompts 34 and one too many
    assert sizes == [least, 28 * token, (4 * 5 + 16 * 6) * token]
    with pytest.raises(
        InputError, match=rf"memory_budget: expected at least the {least} bytes .* got {least - 1}"
    ):
        generate(tiny, PROMPTS, params, memory_budget=least - 1)


# ---- what is returned


def test_samples_come_in_order_with_their_ends(tiny):
    samples = generate(
        tiny, PROMPTS, SamplingParams(samples_per_prompt=8, max_new_tokens=6, stop_ids={5, 6, 7, 8, 9})
    )
    assert [sample.prompt_index for sample in samples] == [i for i in range(4) for _ in range(8)]
    ends = {True: 0, False: 0}
    for sample in samples:
        ends[sample.ended] += 1
        assert sample.ended == (sample.tokens[-1] in {5, 6, 7, 8, 9})
        assert sample.ended or len(sample.tokens) == 6
        assert not {5, 6, 7, 8, 9} & set(sample.tokens[:-1])
        assert sample.logprobs.shape == (len(sample.tokens),) and sample.logprobs.dtype == torch.float32
        assert not sample.logprobs.requires_grad
    assert ends[True] > 4 and ends[False] > 0


def test_a_stop_token_in_the_last_place_is_an_end(tiny):
    (whole,) = generate(tiny, PROMPTS[:1], SamplingParams(max_new_tokens=6))
    assert not whole.ended
    last = {whole.tokens[5]} - set(whole.tokens[:5])
    (sample,) = generate(tiny, PROMPTS[:1], SamplingParams(max_new_tokens=6, stop_ids=last))
    assert sample.ended and sample.tokens == whole.tokens


def test_the_seed_decides_and_the_batch_does_not(tiny):
    params = SamplingParams(samples_per_prompt=4, max_new_tokens=12, stop_ids={0}, seed=7)

    def draw(prompts=PROMPTS, batch_size=None, **changes):
        samples = generate(tiny, prompts, replace(params, **changes), batch_size=batch_size)
        return [sample.tokens for sample in samples]

    reference = draw()
    assert len(set(map(tuple, reference[:4]))) == 4  # the samples of a group differ
    assert draw() == reference
    assert draw(seed=8) != reference
    for batch_size in (1, 3, 5, 16):
        assert draw(batch_size=batch_size) == reference
    assert draw(PROMPTS[:2]) == reference[:8]

    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert draw() == reference
    assert torch.equal(torch.get_rng_state(), state)


def test_progress_counts_every_sample(tiny):
    seen = []
    generate(
        tiny,
        PROMPTS,
        SamplingParams(max_new_tokens=4, stop_ids={1, 2}),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen[-1] == (4, 4)
    assert seen == sorted(set(seen)) and {total for _, total in seen} == {4}


def test_nothing_asked_nothing_returned(tiny):
    assert generate(tiny, [], SamplingParams(max_new_tokens=4)) == []


def test_checkpointed_training_does_not_reach_sampling(tiny):
    model = Transformer(TINY, seed=3)
    model.checkpoint_activations = True
    with torch.inference_mode():
        inside = generate(model, PROMPTS, SamplingParams(max_new_tokens=5))
    assert [s.tokens for s in inside] == [
        s.tokens for s in generate(tiny, PROMPTS, SamplingParams(max_new_tokens=5))
    ]
    model.score(pack([[1, 2]]), torch.tensor([1]))[
        0
    ].sum().backward()  # and inference mode leaves nothing behind


@pytest.mark.parametrize(
    "change, message",
    [
        ({"prompts": [[1], []]}, "prompt 1: expected at least one token"),
        ({"prompts": [[1], [2, 31]]}, "prompt 1: expected token ids below 31, got 2 to 31"),
        ({"prompts": [[-1]]}, "prompt 0: expected token ids"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected at least 1, got 0"),
        ({"samples_per_prompt": 0}, "samples_per_prompt"),
        ({"batch_size": 0}, "batch_size"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"min_p": 1.1}, "min_p"),
        ({"temperature": -1.0}, "temperature"),
    ],
)
def test_what_cannot_be_sampled_is_refused(tiny, change, message):
    with pytest.raises(InputError if "prompts" in change else ValueError, match=message):
        prompts = change.pop("prompts", PROMPTS)
        outer = {name: change.pop(name) for name in ("batch_size",) if name in change}
        generate(tiny, prompts, SamplingParams(**{"max_new_tokens": 4, **change}), **outer)


def test_the_stream_is_the_sample_as_it_comes(tiny):
    for how in ({"temperature": 0}, {"seed": 4}, {"seed": 5, "top_p": 0.7}, {"temperature": 2.0, "top_k": 9}):
        for stop_ids in (frozenset(), frozenset(range(5))):
            params = SamplingParams(max_new_tokens=15, stop_ids=stop_ids, **how)
            (sample,) = generate(tiny, PROMPTS[:1], params)
            drawn = stream(tiny, PROMPTS[0], params)
            first = next(drawn)
            assert torch.is_grad_enabled()  # between two ids, too
            assert [first, *drawn] == sample.tokens
    with pytest.raises(InputError, match="prompt 0: expected at least one token"):
        next(stream(tiny, [], SamplingParams(max_new_tokens=4)))
    with pytest.raises(ValueError, match="samples_per_prompt: expected 1 in a stream, got 2"):
        next(stream(tiny, PROMPTS[0], SamplingParams(max_new_tokens=4, samples_per_prompt=2)))


# ---- adapters and 4 bits


@pytest.mark.parametrize(
    "four_bit, options", [(True, None), (True, {}), (False, {"rslora": True}), (False, {"dora": True})]
)
def test_adapters_and_four_bits_through_the_cache(four_bit, options):
    """Shared prompts, and slots that others take over: the tokens and log-probabilities of whole forward passes."""
    config = replace(TINY, hidden_size=64, intermediate_size=128, initializer_range=0.2)
    model = Transformer(config, seed=4)
    if four_bit:
        quantize_base(model)
    if options is not None:
        plain = generate(model, PROMPTS, SamplingParams(max_new_tokens=9))
        add_lora(model, 3, **options)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("lora.b"):
                    parameter.normal_(generator=torch.Generator().manual_seed(len(name)), std=0.3)
        adapted = generate(model, PROMPTS, SamplingParams(max_new_tokens=9))
        assert [s.tokens for s in plain] != [s.tokens for s in adapted]

    every = {"samples_per_prompt": 3, "max_new_tokens": 9, "stop_ids": {1, 2, 3, 4, 5}}
    for temperature in (0.0, 1.0):
        params = SamplingParams(temperature=temperature, **every)
        samples = generate(model, PROMPTS, params, batch_size=5)
        together = generate(model, PROMPTS, params)
        assert [s.tokens for s in samples] == [s.tokens for s in together]
        for sample in samples:
            torch.testing.assert_close(sample.logprobs, score(model, sample), atol=1e-5, rtol=0)
    assert len({len(sample.tokens) for sample in samples}) > 3  # they left at different times

    # greedily, beside the most likely of a whole pass
    (greedy,) = generate(model, PROMPTS[:1], SamplingParams(max_new_tokens=9, temperature=0))
    rows = pack([PROMPTS[0] + greedy.tokens])
    with torch.no_grad():
        likely = model.logits(model(rows)).argmax(-1).tolist()
    assert likely[len(PROMPTS[0]) - 1 : -1] == greedy.tokens


# ---- a step on a GPU, without one


class NoHostRead(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}, func
        return func(*args, **(kwargs or {}))


WAYS = [(0.0, None, None), (0.7, None, None), (1.0, None, 0.9), (1.0, 5, 0.9)]  # temperature, top_k, top_p
VOCABULARIES = {"padded": Vocabulary(90), "holes": Vocabulary.of([*range(7), *range(9, 90)])}
OTHERS = ["mistral-sw", "qwen3_moe", "deepseek_v3", "gpt_oss", "gemma3_text"]


@pytest.mark.parametrize(
    "architecture, how, vocabulary",
    [
        *(("llama", how, None) for how in WAYS),
        *((name, WAYS[-1], None) for name in OTHERS),
        *(("llama", how, vocabulary) for how in WAYS[1::2] for vocabulary in VOCABULARIES),
    ],
    ids=str,
)
def test_a_step_can_be_recorded_as_a_graph(data, architecture, how, vocabulary, monkeypatch):
    """The GPU's path on tensors without values: what asks for one, or has a shape that depends on one, raises."""
    # uncached: other tests would be given angles without values
    monkeypatch.setattr(rope, "rope_frequencies", rope.rope_frequencies.__wrapped__)
    model = load_model(data / "tiny-hf" / architecture)
    config = model.config
    with compile_only("sm_90"), FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        temperature, top_k, top_p = how
        chooser = Chooser.of(
            model, VOCABULARIES.get(vocabulary), temperature=temperature, top_k=top_k, top_p=top_p
        )

        request = Request(PROMPTS, max_new_tokens=5, samples_per_prompt=2, stop_ids={1, 2})
        batch = Batch(model, request, chooser, batch_size=8, memory_budget=10**9)
        batch.last = torch.zeros(4, config.hidden_size)
        batch.hidden = torch.zeros(8, config.hidden_size)
        kept = {name: x for name, x in vars(batch).items() if isinstance(x, torch.Tensor)}

        with NoHostRead():
            for rows in (4, 8):
                batch._draw(rows)
                batch._advance(rows)
        assert all(getattr(batch, name) is x for name, x in kept.items())  # where the graph will find them
        with pytest.raises(Exception, match=r"aten\._local_scalar_dense"):
            batch.draw()  # the host's read, which is not part of it


def test_free_rows_in_a_step_change_nothing(tiny, monkeypatch):
    """A GPU runs powers of two: the rows behind the live ones hold what has left, or nothing yet."""
    options = {"samples_per_prompt": 3, "max_new_tokens": 9, "stop_ids": {1, 2, 3, 4}, "top_k": 20}
    reference = generate(tiny, PROMPTS, SamplingParams(**options))
    rounded: list[int] = []
    recorded: dict = {}

    def run(self, function, rows):
        rounded.append(rows)
        recorded[function.__name__, rows] = None
        function(rows)

    init = Batch.__init__

    def with_graphs(self, *arguments):
        init(self, *arguments)
        self.graphs = lambda function, rows: run(self, function, rows)

    monkeypatch.setattr(Batch, "__init__", with_graphs)
    for batch_size in (None, 7):
        samples = generate(tiny, PROMPTS, SamplingParams(**options), batch_size=batch_size)
        for a, b in zip(samples, reference, strict=True):
            assert a.tokens == b.tokens and torch.equal(a.support, b.support)
            torch.testing.assert_close(a.logprobs, b.logprobs, atol=1e-5, rtol=0)
    assert {4, 7, 8, 12} <= set(rounded) <= {1, 2, 4, 7, 8, 12}


# ---- the distribution


def test_min_p_log_probabilities_are_the_scorers(tiny):
    params = SamplingParams(max_new_tokens=8, temperature=1.3, top_k=12, min_p=0.1, seed=2)
    for sample in generate(tiny, PROMPTS, params):
        assert (sample.logprobs - score(tiny, sample, 1.3)).abs().max() < 1e-4


def test_greedy_tokens_and_log_probabilities_are_those_without_neighbours(tiny):
    params = SamplingParams(max_new_tokens=12, temperature=0)
    together = generate(tiny, PROMPTS, params, batch_size=2)  # slots are reused
    for sample, prompt in zip(together, PROMPTS, strict=True):
        (alone,) = generate(tiny, [prompt], params)
        assert sample.tokens == alone.tokens
        torch.testing.assert_close(sample.logprobs, alone.logprobs, rtol=0, atol=1e-5)


def test_a_window_and_a_shared_cache_under_many_samples():
    """The same tokens with a window in half the layers, whatever the batch: compaction moves whole sequences."""
    model = Transformer(replace(TINY, windows=(3, None)), seed=1)
    params = SamplingParams(samples_per_prompt=6, max_new_tokens=20, stop_ids={0, 1, 2, 3, 4, 5})
    reference = generate(model, PROMPTS, params)
    again = generate(model, PROMPTS, params, batch_size=5)
    assert [s.tokens for s in reference] == [s.tokens for s in again]
    for sample in reference:
        torch.testing.assert_close(sample.logprobs, score(model, sample), atol=1e-5, rtol=0)
