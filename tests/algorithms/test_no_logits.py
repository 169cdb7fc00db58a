"""No (tokens, V) tensor exists anywhere in training: the largest that one step makes, inside our ops and out."""

from dataclasses import replace

import pytest
import torch
from burnish.algorithms import distill, dpo, grpo, ppo, sft
from burnish.kernels import _op
from burnish.kernels.head.logprob import token_logprobs_reference
from burnish.kernels.plain.divergence import token_divergence_reference
from burnish.model import head
from burnish.model.checkpoint import load_model, save_model
from burnish.model.text.tokenizer import Tokenizer
from burnish.model.transformer import Transformer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

V = 32_768


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return out


@pytest.fixture
def configs(model_folder, demonstrations, prompts, pairs, tmp_path):
    """One step of each, with far more words than tokens in a step; RL scores among the tokenizer's words alone."""
    folder = tmp_path / "wide"
    narrow, tokenizer = load_model(model_folder).config, Tokenizer.load(model_folder)
    tokenizer.backend.add_tokens([f"<unused{i}>" for i in range(V - narrow.vocab_size)])
    save_model(Transformer(replace(narrow, vocab_size=V), seed=0), folder, tokenizer)
    (tmp_path / "reward.py").write_text(
        "def odd(completion_ids, **_):\n    return [float(sum(i % 2 for i in ids)) for ids in completion_ids]\n"
    )

    common = {"model": folder, "steps": 1, "device": "cpu", "output": tmp_path / "out"}
    rl = common | {"data": prompts, "reward": (f"{tmp_path / 'reward.py'}:odd",), "max_new_tokens": 16}
    divergence = common | {"data": demonstrations, "teacher": folder, "batch_size": 64}
    return {
        "sft": sft.Config(data=demonstrations, batch_size=64, **common),
        "dpo": dpo.Config(data=pairs, batch_size=32, **common),
        "grpo": grpo.Config(prompts_per_step=5, group_size=4, **rl),
        "ppo": ppo.Config(prompts_per_step=20, epochs_per_rollout=1, **rl),
        "distill": distill.Config(**divergence),
        "distill by JSD": distill.Config(beta=0.5, **divergence),
    }


TRAINERS = {"sft": sft, "dpo": dpo, "grpo": grpo, "ppo": ppo, "distill": distill, "distill by JSD": distill}


def largest(name, cfg, monkeypatch):
    monkeypatch.setattr(_op, "is_in_torch_dispatch_mode", lambda: False)  # a registered op hides its inside
    with Largest() as seen:
        TRAINERS[name].train(cfg)
    return seen.elements


@pytest.mark.parametrize(
    "name", [n if n in ("sft", "grpo") else pytest.param(n, marks=pytest.mark.slow) for n in TRAINERS]
)
def test_no_tensor_of_a_step_is_as_large_as_the_logits(name, configs, monkeypatch, tmp_path):
    ours = largest(name, configs[name], monkeypatch)
    monkeypatch.setattr(head, "token_logprobs", token_logprobs_reference)  # and where logits are made:
    monkeypatch.setattr(head, "token_divergence", token_divergence_reference)
    naive = largest(name, replace(configs[name], output=tmp_path / "again"), monkeypatch)
    assert naive % V == 0 and naive >= 150 * V  # they are seen
    assert V * 16 <= ours < naive / 2  # the head itself, or a block
