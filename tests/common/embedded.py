"""Runs of an embedded model and of the plain one, side by side."""

import torch
import torch.nn.functional as F
from burnish.model import embed, embedding

DENSE = ["llama", "llama-tied-llama3rope", "llama-yarn", "qwen2", "qwen3", "mistral-sw", "smollm3"]
ROUTED = ["mixtral", "qwen3_moe", "gpt_oss"]
LAYERS = {
    "use_sliding_window": True,
    "sliding_window": 5,
    "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
}
WINDOWS = {  # what gives a model sliding windows that its files do not
    "qwen2": LAYERS,
    "qwen3": LAYERS,
    "mixtral": {"sliding_window": 5},
    "qwen3_moe": {"use_sliding_window": True, "sliding_window": 5},
}
OPS = {  # of each part, and the file that calls them
    "attention": (embedding.attention, ["flash_attention", "decode_attention"]),
    "rope": (embedding.layers, ["apply_rope"]),
    "norm": (embedding.layers, ["rms_norm"]),
    "swiglu": (embedding.layers, ["swiglu"]),
    "experts": (embedding.experts, ["moe_mlp"]),
    "head": (embedding.operands, ["token_logprobs"]),
}


def close(got, want):
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5)


def train(model, ids, keep, **inputs):
    """The logits at the positions to keep, and the gradients of their mean log-probability of the next token."""
    model.zero_grad()
    logits = model(ids, use_cache=False, **inputs).logits
    scored = keep[:, :-1] & keep[:, 1:]
    loss = F.cross_entropy(logits[:, :-1][scored], ids[:, 1:][scored])
    loss.backward()
    gradients = (torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters())
    return [logits[keep].detach(), *gradients]


def embedded_and_plain(model, run, **parts):
    """The same run after apply() and before."""
    before = run()
    embed.apply(model, **parts)
    return run(), before


def count(monkeypatch):
    calls = {op: 0 for _, ops in OPS.values() for op in ops}

    def counted(op, original):
        def call(*args, **kwargs):
            calls[op] += 1
            return original(*args, **kwargs)

        return call

    for file, ops in OPS.values():
        for op in ops:
            monkeypatch.setattr(file, op, counted(op, getattr(file, op)))
    return calls


def loss_and_gradients(wrapped, ids):
    wrapped.zero_grad()
    loss = wrapped(input_ids=ids, labels=ids).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in wrapped.parameters() if p.grad is not None)]
