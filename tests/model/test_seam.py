"""Training never holds the logits: `Transformer.score` is the only way from hidden states to a loss."""

import time
from statistics import median

import pytest
import torch
from burnish.bench.ops.clocks import peak_growth
from burnish.model.config import ModelConfig
from burnish.model.packed import pack
from burnish.model.transformer import Transformer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returned."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.numel())
        return out


def test_no_tensor_of_a_training_step_has_tokens_times_vocabulary_elements():
    config = ModelConfig(
        vocab_size=30_011,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )

    model = Transformer(config)
    packed = pack([torch.randint(0, config.vocab_size, (512,)).tolist() for _ in range(2)])
    rows = (packed.predictors >= 0).nonzero().squeeze(1)
    with Largest() as largest:
        logprob, lse, entropy = model.score(packed, rows)
        (logprob + 1e-3 * lse + 1e-3 * entropy).sum().backward()

    logits = rows.numel() * config.vocab_size
    assert config.vocab_size * config.hidden_size <= largest.elements < logits / 4
    with Largest() as naive:  # the check sees logits where they exist
        model.logits(model(packed)[packed.predictors[rows]]).log_softmax(-1).sum().backward()
    assert naive.elements == logits


@pytest.mark.slow
def test_a_shared_prompt_costs_its_tokens():
    """A training pass at P=512, C=128, G=8: 1,536 tokens instead of 5,120, the same results for less. -s prints it."""
    torch.set_num_threads(1)
    sizes = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = Transformer(ModelConfig(vocab_size=4096, num_key_value_heads=2, **sizes), seed=0)
    P, C, G = 512, 128, 8
    prompt, *completions = (torch.randint(4096, (n,)).tolist() for n in [P] + [C] * G)
    ends = [torch.arange(i * (P + C) + P, (i + 1) * (P + C)) for i in range(G)]
    batches = {
        "shared": (pack([prompt, *completions], [-1] + [0] * G), torch.arange(P, P + G * C)),
        "unshared": (pack([prompt + completion for completion in completions]), torch.cat(ends)),
    }

    def step(name):
        model.zero_grad(set_to_none=False)
        logprob = model.score(*batches[name])[0]
        logprob.mean().backward()
        return [logprob.detach(), *(p.grad.clone() for p in model.parameters())]

    for ours, theirs in zip(step("shared"), step("unshared"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    seconds = {name: [] for name in batches}
    for _ in range(5):
        for name in batches:
            started = time.process_time()
            step(name)
            seconds[name].append(time.process_time() - started)
    cost = {
        name: (median(seconds[name]), peak_growth(lambda name=name: step(name), "cpu")) for name in batches
    }
    print(cost)
    for shared, unshared in zip(cost["shared"], cost["unshared"], strict=True):
        assert shared < 0.5 * unshared
