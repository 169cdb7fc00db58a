"""Training never holds the logits: `Transformer.score` is the only way from hidden states to a loss."""

import torch
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
