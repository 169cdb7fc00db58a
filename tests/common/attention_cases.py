"""Tensors and options for the tests of attention, and its gradients."""

import torch
from burnish.kernels._chip import INTERPRET


def draw(*shape, dtype=torch.float32, device="cpu"):
    return torch.randn(shape, dtype=torch.float32).to(device, dtype)


def lay(lengths, device="cpu", first=0):
    """cu_seqlens of segments of these lengths, after `first` rows of none."""
    return torch.tensor([first, *lengths], device=device).cumsum(0).to(torch.int32)


def table(parents, device="cpu"):
    return torch.tensor(parents, dtype=torch.int32, device=device)


PACKED = {"cu_seqlens": [7, 0, 17, 1, 6]}
GROUPS = {"cu_seqlens": [9, 4, 6, 1, 5, 8, 7], "parents": [-1, 0, 0, -1, -1, 4, 4]}
GROUP = {"cu_seqlens": [3, 14, 0, 8], "parents": [-1, 0, 0, 0], "window": 9, "softcap": 3.0, "sinks": True}

# name: (shape of q, key length or None when packed, G, Dv, the op's options)
CASES = {
    "causal": ((2, 17, 4, 16), 17, 4, 16, {}),
    "not causal": ((2, 17, 4, 16), 17, 4, 16, {"causal": False}),
    "gqa": ((2, 17, 6, 16), 17, 2, 16, {}),
    "more keys": ((1, 5, 2, 16), 23, 1, 16, {}),
    "more queries": ((1, 23, 2, 16), 5, 1, 16, {}),
    "odd dimensions": ((1, 19, 2, 5), 19, 1, 24, {"scale": 0.3}),
    "window": ((1, 33, 2, 8), 33, 1, 8, {"window": 7}),
    "window, more queries": ((1, 23, 2, 8), 5, 1, 8, {"window": 3}),
    "softcap": ((1, 19, 2, 8), 19, 1, 8, {"softcap": 2.0}),
    "sinks": ((1, 19, 4, 8), 19, 2, 8, {"sinks": True}),
    "sinks, more queries": ((1, 23, 4, 8), 5, 2, 8, {"sinks": True}),
    "no keys": ((1, 3, 2, 8), 0, 1, 8, {"causal": False}),
    "one": ((1, 1, 1, 1), 1, 1, 1, {}),
    "empty": ((0, 3, 2, 8), 3, 1, 8, {}),
    "packed": ((31, 4, 8), None, 2, 8, PACKED),
    "packed, not causal": ((31, 4, 8), None, 2, 8, PACKED | {"causal": False}),
    "packed window": ((31, 4, 8), None, 2, 8, PACKED | {"window": 4}),
    "packed nothing": ((0, 4, 8), None, 2, 8, {"cu_seqlens": [0, 0]}),
    "parents": ((40, 4, 8), None, 2, 8, GROUPS),
    "parents, window": ((40, 4, 8), None, 2, 8, GROUPS | {"window": 6}),
    "parents, all": ((25, 4, 8), None, 2, 4, GROUP),
    "padded": ((75, 4, 8), None, 2, 8, {"cu_seqlens": [7, 0, 17], "first": 3}),
    "padded, not causal": ((31, 4, 8), None, 2, 8, {"cu_seqlens": [7, 0, 17], "causal": False}),
    "padded, all": ((33, 4, 8), None, 2, 4, GROUP | {"first": 2}),
}


# compiled tiles are larger: lengths past their edges
STRETCH = 9 if torch.cuda.is_available() and not INTERPRET else 1


def make(name, dtype=torch.float32, device="cpu"):
    """The tensors and options of a case."""
    shape, S, G, Dv, options = CASES[name]
    stretch = STRETCH if device == "cuda" and name != "one" else 1
    lead = (shape[0] * stretch,) if S is None else (shape[0], S * stretch)
    q_shape = (*lead, *shape[1:]) if S is None else (shape[0], shape[1] * stretch, *shape[2:])
    options = dict(options)
    tensors = {
        "q": draw(*q_shape, dtype=dtype, device=device),
        "k": draw(*lead, G, shape[-1], dtype=dtype, device=device),
        "v": draw(*lead, G, Dv, dtype=dtype, device=device),
    }

    # lengths grow with the tiles
    if options.pop("sinks", False):
        tensors["sinks"] = draw(shape[-2], dtype=dtype, device=device)
    if "window" in options:
        options["window"] *= stretch
    if "cu_seqlens" in options:
        lengths, first = options["cu_seqlens"], options.pop("first", 0)
        options["cu_seqlens"] = lay([length * stretch for length in lengths], device, first * stretch)
    if "parents" in options:
        options["parents"] = table(options["parents"], device)
    return tensors, options


def grads(op, tensors, options, dout, dlse=None):
    """[out, lse, dq, dk, dv, dsinks]; without dlse the lse is not asked for, and not returned."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in tensors.items()}
    if dlse is None:
        outs = [op(**leaves, **options)]
        ups = [dout.to(outs[0].dtype)]
    else:
        outs = list(op(**leaves, **options, return_lse=True))
        ups = [dout.to(outs[0].dtype), dlse.to(outs[1].dtype)]
    found = torch.autograd.grad(outs, list(leaves.values()), ups, allow_unused=True)
    zeros = [torch.zeros_like(x) for x in leaves.values()]
    return outs + [z if g is None else g for g, z in zip(found, zeros, strict=True)]
