"""The transformer against golden files of transformers 5.22.2, and its packed form against itself."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from burnish.kernels import token_logprobs
from burnish.kernels.head import blocks
from burnish.model import ModelConfig, Rope, Transformer, attention, pack, transformer
from burnish.model.adapter import add_lora
from burnish.model.checkpoint import load_model
from burnish.model.rope import rope_frequencies
from folders import GOLDEN
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

everywhere = pytest.mark.parametrize("architecture", GOLDEN)

TINY = ModelConfig(
    vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
)


@pytest.fixture
def golden(data, architecture):
    return load_file(data / "tiny-hf" / architecture / "expected.safetensors")


@pytest.fixture
def model(data, architecture):
    return load_model(data / "tiny-hf" / architecture)


def rows_of(golden) -> list[list[int]]:
    """The golden batch without its padding."""
    return [
        ids[mask == 1].tolist()
        for ids, mask in zip(golden["input_ids"], golden["attention_mask"], strict=True)
    ]


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: weight.grad for name, weight in model.named_parameters()}


def backward_of(model, packed, rows) -> torch.Tensor:
    """Log-probabilities of rows; the gradients of an uneven mean are left in the model."""
    model.zero_grad()
    logprob, _, _ = model.score(packed, rows)
    (logprob * torch.linspace(0.5, 1.5, len(rows), dtype=logprob.dtype)).mean().backward()
    return logprob.detach()


# ---- against transformers


@everywhere
def test_logits_are_those_of_transformers(model, golden):
    packed = pack(rows_of(golden))
    expected = golden["logits"][golden["attention_mask"] == 1]  # (41, V)
    torch.testing.assert_close(model.logits(model(packed)), expected, atol=1e-5, rtol=0)


def padded_attention(mask):
    """Transformers' eager attention with left padding: a padded query weighs every key alike."""
    B, T = mask.shape

    def attend(q, k, v, *, window, cu_seqlens, parents, scale, sinks):
        D = q.shape[-1]
        q, k, v = (x.view(B, T, -1, D).transpose(1, 2) for x in (q, k, v))  # (B, H or G, T, D)
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        i, j = torch.arange(T)[:, None], torch.arange(T)
        visible = (j <= i) & (j > i - (window or T)) & (mask == 1)[:, None, None]  # (B, 1, T, T)

        # added: masked scores keep their gradient
        hidden = torch.zeros(()).masked_fill(~visible, torch.finfo(q.dtype).min)
        scores = q @ k.transpose(2, 3) * (scale or D**-0.5) + hidden
        if sinks is not None:
            scores = torch.cat([scores, sinks[:, None, None].expand(B, -1, T, 1)], -1)
        return (scores.softmax(-1)[..., :T] @ v).transpose(1, 2).flatten(0, 1)

    return attend


@everywhere
def test_loss_and_embedding_gradient_are_those_of_transformers(model, golden, monkeypatch):
    """The golden loss also scores row 1's first token, from a padded position: padded rows are laid out as segments."""
    ids, mask = golden["input_ids"], golden["attention_mask"]
    packed = pack(ids.tolist())
    model.embed_tokens.padding_idx = model.config.pad_token_id  # transformers gives this row no gradient
    scored = F.pad(mask[:, 1:] == 1, (1, 0)).flatten().nonzero()[:, 0]
    monkeypatch.setattr(attention, "flash_attention", padded_attention(mask))
    logprob, _, _ = model.score(packed, scored)
    (-logprob.mean()).backward()
    torch.testing.assert_close(-logprob.mean(), golden["loss"][0], atol=1e-5, rtol=0)
    torch.testing.assert_close(model.embed_tokens.weight.grad, golden["grad_embed"], atol=1e-5, rtol=0)


@everywhere
def test_packed_and_padded_agree_in_every_gradient(model, golden, monkeypatch):
    """Without the token that padding scores, the packed form gives what transformers' padded form gives."""
    ids, mask = golden["input_ids"], golden["attention_mask"]
    lengths = mask.sum(1).tolist()
    real = [i for i in range(sum(lengths)) if i not in (0, lengths[0])]
    packed_logprob = backward_of(model, pack(rows_of(golden)), torch.tensor(real))
    packed_gradients = gradients(model)
    scored = F.pad(mask[:, :-1] * mask[:, 1:] == 1, (1, 0)).flatten().nonzero()[:, 0]
    monkeypatch.setattr(attention, "flash_attention", padded_attention(mask))
    padded_logprob = backward_of(model, pack(ids.tolist()), scored)
    torch.testing.assert_close(packed_logprob, padded_logprob, atol=1e-5, rtol=0)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(packed_gradients[name], gradient, atol=1e-5, rtol=1e-5, msg=name)


def test_rope_frequencies_are_those_of_transformers(data):
    file = json.loads((data / "rope.json").read_text())
    for golden in file["golden"]:
        parameters = {"original_max_position_embeddings": 4096, **golden["rope_parameters"]}
        inv_freq, factor = rope_frequencies(Rope(**parameters), 128, torch.device("cpu"))
        expected = torch.tensor(golden["inv_freq"])
        torch.testing.assert_close(inv_freq, expected, rtol=2e-6, atol=0, msg=str(parameters))
        assert factor == pytest.approx(golden["attention_factor"], rel=1e-12)


# ---- packing


@everywhere
def test_packed_sequences_do_not_see_each_other(model):
    model.double()
    sequences = [[5, 6, 7, 8, 9, 10, 11, 12], [3], [20, 21, 22, 23, 24, 25]]
    together = model.logits(model(pack(sequences)))
    alone = torch.cat([model.logits(model(pack([sequence]))) for sequence in sequences])
    assert together.dtype == torch.float64
    torch.testing.assert_close(together, alone, atol=1e-12, rtol=0)


@everywhere
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_a_shared_prompt_scores_as_an_unshared_batch(model, dtype, bound):
    """Two groups, of three and of one; completions longer than the window of mistral-sw (5), one of a single token."""
    model.to(dtype)
    groups = [([5, 6, 7, 8, 9, 10, 11], [[12, 13, 14, 15, 16, 17], [18], [19, 20]]), ([30], [[31, 32, 33]])]
    shared, parents, shared_rows, unshared, unshared_rows = [], [], [], [], []
    for prompt, completions in groups:
        parent = len(shared)
        shared.append(prompt)
        parents.append(-1)
        for completion in completions:
            start = sum(map(len, shared))
            shared.append(completion)
            parents.append(parent)
            shared_rows += range(start, start + len(completion))
            start = sum(map(len, unshared)) + len(prompt)
            unshared.append(prompt + completion)
            unshared_rows += range(start, start + len(completion))

    packed, plain = pack(shared, parents), pack(unshared)
    shared_rows, unshared_rows = torch.tensor(shared_rows), torch.tensor(unshared_rows)
    with torch.no_grad():
        hidden, plain_hidden = model(packed), model(plain)
    difference = model.logits(hidden)[shared_rows] - model.logits(plain_hidden)[unshared_rows]
    assert difference.abs().max() < bound

    logprob = backward_of(model, packed, shared_rows)
    shared_gradients = gradients(model)
    plain_logprob = backward_of(model, plain, unshared_rows)
    torch.testing.assert_close(logprob, plain_logprob, atol=bound, rtol=0)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(shared_gradients[name], gradient, atol=bound, rtol=bound, msg=name)


def test_an_empty_batch_passes():
    assert Transformer(TINY)(pack([])).shape == (0, 16)


# ---- score


def test_score_is_of_the_rows_own_token_given_those_before():
    model = Transformer(TINY, seed=1).double()
    sequence = [4, 9, 1, 30, 7]
    log_p = model.logits(model(pack([sequence]))).log_softmax(-1)  # (5, V)
    rows = torch.tensor([4, 1, 2])
    logprob, lse, entropy = model.score(pack([sequence]), rows)
    expected = torch.stack([log_p[3, 7], log_p[0, 9], log_p[1, 1]])
    torch.testing.assert_close(logprob, expected, atol=1e-12, rtol=0)
    before = log_p[rows - 1]
    torch.testing.assert_close(entropy, -(before.exp() * before).sum(-1), atol=1e-12, rtol=0)
    assert lse.shape == (3,)


def test_score_passes_temperature_and_support_on():
    model = Transformer(TINY, seed=1)
    packed, rows = pack([[4, 9, 1, 30]]), torch.tensor([1, 2, 3])
    temperature = torch.tensor([0.5, 1.0, 2.0])
    support = torch.tensor([[9, 2, -1], [1, 0, 3], [30, -1, -1]], dtype=torch.int32)
    hidden = model(packed)
    expected = token_logprobs(
        hidden[:3], model.head, packed.tokens[1:], temperature=temperature, support=support
    )
    scored = model.score(packed, rows, temperature=temperature, support=support)
    for ours, theirs in zip(scored, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert scored[0][2] == 0  # a support of one id


def test_the_first_token_of_a_sequence_cannot_be_scored():
    with pytest.raises(ValueError, match="first token"):
        Transformer(TINY).score(pack([[1, 2], [3, 4]]), torch.tensor([1, 2]))


def test_where_numbers_cannot_be_read_it_is_scored_as_nan(monkeypatch):
    model, packed, rows = Transformer(TINY), pack([[1, 2], [3, 4]]), torch.tensor([1, 3])
    want = model.score(packed, rows)
    monkeypatch.setattr(transformer, "readable", lambda x: False)
    for found, right in zip(model.score(packed, torch.tensor([1, 2, 3])), want, strict=True):
        assert found[1].isnan() and torch.equal(found[[0, 2]], right)


# ---- weights


def test_weights_follow_the_seed_and_leave_the_global_generator_alone():
    state = torch.get_rng_state()
    config = replace(TINY, vocab_size=512, hidden_size=128, initializer_range=0.05, qkv_bias=True)
    one, same, other = (Transformer(config, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.head, other.head)
    for name, weight in one.named_parameters():
        if weight.dim() == 2:
            assert weight.std().item() == pytest.approx(0.05, rel=0.1), name
            assert abs(weight.mean().item()) < 0.005, name
        else:
            assert (weight == (0 if name.endswith("bias") else 1)).all(), name


def test_a_tied_head_is_the_embedding():
    tied, untied = Transformer(replace(TINY, tie_word_embeddings=True)), Transformer(TINY)
    assert tied.head is tied.embed_tokens.weight
    assert untied.head is not untied.embed_tokens.weight
    assert "lm_head.weight" not in tied.state_dict()


# ---- training


def test_activation_checkpointing_runs_layers_again_and_changes_no_gradient(monkeypatch):
    model = Transformer(TINY).double()
    packed, rows = pack([[1, 2, 3], [4, 5], [6]], [-1, 0, 0]), torch.tensor([1, 2, 3, 4, 5])
    runs = []
    forward = transformer.Layer.forward
    monkeypatch.setattr(transformer.Layer, "forward", lambda *args: runs.append(1) or forward(*args))
    plain_logprob = backward_of(model, packed, rows)
    plain = gradients(model)
    assert len(runs) == 2
    model.checkpoint_activations = True
    logprob = backward_of(model, packed, rows)
    assert len(runs) == 2 + 4
    torch.testing.assert_close(logprob, plain_logprob, atol=0, rtol=0)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(plain[name], gradient, atol=1e-15, rtol=0)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_autocast_keeps_fp32_weights_and_comes_close(model, golden):
    sequence = rows_of(golden)[0]
    packed, rows = pack([sequence]), torch.arange(1, len(sequence))
    expected = backward_of(model, packed, rows)
    exact = model.embed_tokens.weight.grad

    with torch.autocast("cpu", dtype=torch.bfloat16):
        logprob = backward_of(model, packed, rows)
        logits = model.logits(model(packed))
    assert logprob.dtype == logits.dtype == torch.float32
    from_logits = logits[:-1].log_softmax(-1).gather(1, packed.tokens[1:, None])[:, 0]
    torch.testing.assert_close(
        from_logits, logprob, atol=1e-5, rtol=0
    )  # the sampler's figures are the trainer's
    assert 0 < (logprob - expected).abs().max() < 0.1

    gradient = model.embed_tokens.weight.grad
    assert gradient.dtype == torch.float32
    assert (gradient - exact).norm() < 0.05 * exact.norm()


class OnGPU(torch.Tensor):
    """Its numbers are on the CPU."""

    is_cuda = True


class Casts(TorchDispatchMode):
    """The elements of each tensor that was made in another dtype."""

    def __init__(self):
        super().__init__()
        self.sizes = [0]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten._to_copy:
            self.sizes.append(found.numel())
        return found


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("on_gpu", [False, True])
def test_logits_of_a_half_precision_head_copy_no_head(on_gpu, adapted, monkeypatch):
    """A GPU multiplies it into fp32, a CPU a part of it at a time: what the whole head in fp32 gives."""
    monkeypatch.setattr(blocks, "CAST", 64)
    model = Transformer(replace(TINY, initializer_range=0.5, tie_word_embeddings=not adapted))
    if adapted:
        add_lora(model, rank=2, targets=("lm_head",))
        torch.nn.init.normal_(model.get_parameter("lm_head.lora.b"))
    model, hidden = model.bfloat16(), torch.randn(2, 3, 16).bfloat16()
    want = model.logits(hidden)  # a gradient is asked
    into: list[tuple[torch.dtype, torch.dtype]] = []

    def mm(a, b, *, out_dtype=None, out):
        into.append((b.dtype, out_dtype))
        return out.copy_(a.double() @ b.double())

    def addmm(x, a, b, *, out_dtype=None, out):
        into.append((b.dtype, out_dtype))
        return out.copy_(x + a.double() @ b.double())

    if on_gpu:
        monkeypatch.setattr(torch, "mm", mm)
        monkeypatch.setattr(torch, "addmm", addmm)
        hidden = hidden.as_subclass(OnGPU)
    with torch.no_grad(), Casts() as casts:
        logits = model.logits(hidden)
    assert into == on_gpu * (1 + adapted) * [(torch.bfloat16, torch.float32)]
    assert on_gpu or max(casts.sizes) < model.head.numel() // 4
    assert logits.shape == (2, 3, 31) and logits.dtype == torch.float32 and want.requires_grad
    torch.testing.assert_close(logits.as_subclass(torch.Tensor), want, atol=2e-2 if adapted else 1e-5, rtol=0)
