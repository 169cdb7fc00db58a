"""Functions of a user's, as their file has them: what is wrong with each, and words of what is said of it."""

HEAD = """
    import torch

    def right(x, weight, eps=1e-6):
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight
"""

WRONG = {  # what is wrong with a function -> its source, and words of what is said
    "scaled": ("def f(x, weight):\n    return right(x, weight) * 1.01", ["output 0", "30", "77"]),
    "last columns": (
        "def f(x, weight):\n    y = right(x, weight)\n    return torch.cat((y[..., :64], y[..., 64:] * 1.1), -1)",
        ["output 0", "64:77"],
    ),
    "one element": (
        "def f(x, weight):\n    y = right(x, weight).clone()\n    y[0, 29, 5] += 0.5\n    return y",
        ["output 0", "1 of 2,310"],
    ),
    "gradient alone": (
        "class F(torch.autograd.Function):\n"
        "    @staticmethod\n"
        "    def forward(ctx, x, w):\n        ctx.save_for_backward(x, w)\n        return right(x, w)\n"
        "    @staticmethod\n"
        "    def backward(ctx, dy):\n"
        "        x, w = (t.detach().requires_grad_() for t in ctx.saved_tensors)\n"
        "        with torch.enable_grad():\n            dx, dw = torch.autograd.grad(right(x, w), (x, w), dy)\n"
        "        return dx, dw * 1.5\n"
        "def f(x, weight):\n    return F.apply(x, weight)",
        ["gradient of weight"],
    ),
    "no gradient": ("def f(x, weight):\n    return right(x.detach(), weight.detach())", ["--forward-only"]),
    "one gradient": ("def f(x, weight):\n    return right(x, weight.detach())", ["gradient of weight"]),
    "dtype": ("def f(x, weight):\n    return right(x, weight).double()", ["output 0", "float64"]),
    "shape": ("def f(x, weight):\n    return right(x, weight)[0]", ["output 0", "shape"]),
    "nothing": ("def f(x, weight):\n    right(x, weight)", ["None"]),
    "other arguments": ("def f(input, w):\n    return right(input, w)", ["(x, weight)", "(input, w)"]),
    "too few": ("def f(x):\n    return x", ["(x, weight)", "(x)"]),
    "an exception": ("def f(x, weight):\n    raise KeyError('block')", ["KeyError", "mine.py:"]),
    "an exit": ("def f(x, weight):\n    raise SystemExit(3)", ["SystemExit", "mine.py:"]),
    "in place": (
        "def f(x, weight):\n    y = right(x, weight)\n    x.detach().copy_(y)\n    return y",
        ["writes to its input x"],
    ),
    "in the backward": (
        "class F(torch.autograd.Function):\n"
        "    @staticmethod\n"
        "    def forward(ctx, x, w):\n        ctx.save_for_backward(x, w)\n        return right(x, w)\n"
        "    @staticmethod\n"
        "    def backward(ctx, dy):\n"
        "        x, w = (t.detach().clone().requires_grad_() for t in ctx.saved_tensors)\n"
        "        with torch.enable_grad():\n            dx, dw = torch.autograd.grad(right(x, w), (x, w), dy)\n"
        "        ctx.saved_tensors[0].detach().copy_(dx)\n"
        "        return dx, dw\n"
        "def f(x, weight):\n    return F.apply(x, weight)",
        ["writes to its input x"],
    ),
    "NaN": (
        "def f(x, weight):\n    y = right(x, weight).clone()\n    y[0, 3] = float('nan')\n    return y",
        ["output 0", "NaN"],
    ),
    "one buffer": (
        "KEPT = []\n"
        "class F(torch.autograd.Function):\n"
        "    @staticmethod\n"
        "    def forward(ctx, x, w):\n"
        "        ctx.save_for_backward(x, w)\n"
        "        KEPT.append(right(x, w)) if not KEPT or KEPT[0].shape != x.shape else KEPT[0].copy_(right(x, w))\n"
        "        return KEPT[0].detach()\n"
        "    @staticmethod\n"
        "    def backward(ctx, dy):\n"
        "        x, w = (t.detach().requires_grad_() for t in ctx.saved_tensors)\n"
        "        with torch.enable_grad():\n            return torch.autograd.grad(right(x, w), (x, w), dy)\n"
        "def f(x, weight):\n    return F.apply(x, weight)",
        ["a later call changes what an earlier one returned", "output 0"],
    ),
    "saved for all": (
        "SAVED = {}\n"
        "class F(torch.autograd.Function):\n"
        "    @staticmethod\n"
        "    def forward(ctx, x, w):\n        SAVED.update(x=x, w=w)\n        return right(x, w)\n"
        "    @staticmethod\n"
        "    def backward(ctx, dy):\n"
        "        x, w = (SAVED[n].detach().requires_grad_() for n in 'xw')\n"
        "        with torch.enable_grad():\n            return torch.autograd.grad(right(x, w), (x, w), dy)\n"
        "def f(x, weight):\n    return F.apply(x, weight)",
        ["a later call changes what an earlier one returned or saved", "gradient of x"],
    ),
    "an output too many": (
        "def f(x, weight):\n    return right(x, weight), None",
        ["expected 1 output, got 2"],
    ),
    "no GPU": ("def f(x, weight):\n    raise RuntimeError('0 active drivers ([]).')", ["TRITON_INTERPRET=1"]),
    "a memory": (
        "def f(x, weight):\n"
        "    if not hasattr(x, 'seen'):\n        x.seen = right(x, weight).detach()\n"
        "    return x.seen",
        ["wrong on others at the same addresses"],
    ),
    "a memory by address": (  # where an earlier call's memory is used anew, the first answer is wrong already
        "SEEN = {}\n"
        "def f(x, weight):\n"
        "    if x.data_ptr() not in SEEN:\n        SEEN[x.data_ptr()] = right(x, weight)\n"
        "    return SEEN[x.data_ptr()]",
        ["output 0"],
    ),
    "a memory by tensor": (
        "import functools\n@functools.lru_cache\ndef f(x, weight):\n    return right(x, weight)",
        ["wrong on others at the same addresses"],
    ),
    "a memory by version": (
        "SEEN = {}\n"
        "def f(x, weight):\n"
        "    key = (x.data_ptr(), x._version, weight.data_ptr())\n"
        "    if key not in SEEN:\n        SEEN[key] = right(x, weight)\n"
        "    return SEEN[key]",
        ["output 0"],
    ),
    "a graph used twice": (
        "import functools\n@functools.lru_cache\ndef f(x, weight):\n    return right(x, weight)",
        ["raises RuntimeError", "backward through the graph a second time"],
    ),
}
