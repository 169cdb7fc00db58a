"""Embedded models under torch.compile: blocks, a training step and generation are one graph each."""

from itertools import product

import pytest
import torch
from burnish.model import embed, embedding
from embedded import ROUTED, WINDOWS, close

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.mark.parametrize(
    "name, which, backend",
    [
        *product(["llama", "qwen2", "qwen3", "mistral-sw", "smollm3", *ROUTED], [0], ["aot_eager"]),
        ("qwen3_moe", 1, "aot_eager"),  # the one with experts
        ("mixtral", 0, "inductor"),
    ],
)
def test_a_block_compiles_whole(load, ids, padding, name, which, backend):
    """Forward and backward, with padding and without; the mask is that of the forward pass around it."""
    model = load(name, **WINDOWS.get(name, {}))
    embed.apply(model)
    block, x = model.model.layers[which], torch.randn(*ids.shape, 32, requires_grad=True)
    angles = model.model.rotary_emb(x, torch.arange(13)[None])
    causal = transformers.masking_utils.causal_mask_function

    def run(block, mask):
        out = block(x, position_embeddings=angles, attention_mask=mask)
        return [out.detach(), *torch.autograd.grad(out.square().mean(), [x, *block.parameters()])]

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    for real in (None, padding["left"].bool()):
        mask = embedding.attention.mask(3, 13, 13, mask_function=causal, attention_mask=real)
        assert (mask is None) == (real is None)
        close(run(compiled, mask), run(block, mask))


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_a_training_step_compiles_whole(load, ids, padding, name):
    """The model around the blocks, too: the mask inside the graph, the loss without logits."""
    model = load(name)
    embed.apply(model)

    def run(call):
        model.zero_grad()
        more = {"attention_mask": padding["left"], "labels": ids.masked_fill(padding["left"] == 0, -100)}
        loss = call(ids, use_cache=False, **more).loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    model.train()
    torch._dynamo.reset()
    close(run(torch.compile(model, fullgraph=True, backend="aot_eager")), run(model))


def test_generate_compiles_whole(load, ids, padding):
    """transformers compiles a step with a static cache by itself on a GPU; here it is told to."""
    model = load("gpt_oss")
    embed.apply(model)
    whole = transformers.CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    whole._compile_all_devices = True

    def run(**how):
        out = model.generate(
            ids,
            attention_mask=padding["left"],
            max_new_tokens=4,
            do_sample=False,
            pad_token_id=0,
            cache_implementation="static",
            output_logits=True,
            return_dict_in_generate=True,
            **how,
        )
        return [out.sequences, *out.logits]

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    close(run(compile_config=whole), run(disable_compile=True))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_masks_compile_whole(load, ids, padding):
    """A traced mask has as many segments as there are tokens, where eager has as many as there are."""
    traced = torch.compile(embedding.attention.mask, fullgraph=True, backend="eager")
    causal = transformers.masking_utils.causal_mask_function
    for mask in padding.values():
        arguments = {"mask_function": causal, "attention_mask": mask.bool()}
        eager, whole = (f(3, 13, 13, **arguments) for f in (embedding.attention.mask, traced))
        whole = whole.flatten().unique()
        want = torch.arange(0, 40, 13) if eager is None else eager.flatten().unique()
        assert torch.equal(whole, want.int())
        cached = {**arguments, "q_offset": 12}
        eager, whole = (f(3, 1, 13, **cached) for f in (embedding.attention.mask, traced))
        assert eager is None or torch.equal(eager, whole)
