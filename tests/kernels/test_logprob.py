import math
import subprocess
import sys

import pytest
import torch
from burnish.kernels import token_logprobs
from burnish.kernels._chip import INTERPRET
from burnish.kernels.head import blocks, logprob
from burnish.kernels.head.logprob import token_logprobs_reference
from burnish.kernels.tiles import Tile
from faults import check_of, control, faults_of

# bf16 under the interpreter: tests/kernels/test_cases.py
DTYPES = [torch.float32, torch.float16] if INTERPRET else [torch.float32, torch.float16, torch.bfloat16]
BLOCKS = 8000  # bytes: some 700 logits at a time, so that most shapes below fall into several blocks
OUTPUTS = ("logprob", "lse", "entropy")
FEATURES = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 3.0},
    "temperature": {"temperature": 0.7},
    "temperatures": {"temperature": "each"},
    "ignored": {"ignored": True},
    "support": {"support": 6},
    "everything": {"bias": True, "softcap": 3.0, "temperature": "each", "ignored": True},
    "everything supported": {
        "bias": True,
        "softcap": 3.0,
        "temperature": "each",
        "ignored": True,
        "support": 6,
    },
}
every_feature = pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES.keys())


def make(
    shape,
    device,
    dtype=torch.float32,
    *,
    bias=False,
    temperature=1.0,
    ignored=False,
    support=0,
    softcap=None,
):
    """Leaves (hidden, weight, bias), targets at both ends of the vocabulary, and the rest of the arguments."""
    T, C, V = shape
    leaves = [
        torch.randn(T, C, device=device).to(dtype),
        (torch.randn(V, C, device=device) / C**0.5).to(dtype),
    ]
    leaves.append(torch.randn(V, device=device).to(dtype) if bias else None)
    targets = torch.randint(V, (T,), device=device)
    targets[0], targets[-1] = V - 1, 0
    if ignored:
        targets[1::3] = -100

    options = {"softcap": softcap, "temperature": temperature}
    if temperature == "each":
        options["temperature"] = torch.rand(T, device=device) + 0.5
    if support:
        ids = torch.rand(T, V, device=device).argsort(-1)[:, : min(support, V)].int()
        others = torch.where(ids == targets[:, None], -1, ids)[:, 1:]
        others[::2, support // 2 :] = -1
        first = torch.where(targets < 0, -1, targets)[:, None].int()
        options["support"] = torch.cat([others, first], 1)  # (tokens, K_max), the target last
    return leaves, targets, options


def eager(
    hidden, weight, targets, *, bias=None, temperature=1.0, softcap=None, support=None, memory_budget=None
):
    """Log-probabilities as torch users have them: logits in the dtype of the inputs, and the rest in fp32."""
    z = hidden @ weight.T
    z = (z if bias is None else z + bias).float()
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    u = z / (temperature[:, None] if isinstance(temperature, torch.Tensor) else temperature)
    dropped = torch.zeros_like(u, dtype=torch.bool)
    if support is not None:
        dropped = ~(support[:, :, None] == torch.arange(u.shape[1], device=u.device)).any(1)
    log_p = torch.log_softmax(u.masked_fill(dropped, -torch.inf), -1)
    logprob = log_p.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    lse = torch.logsumexp(u.masked_fill(dropped, -torch.inf), -1)
    entropy = -(log_p.exp() * log_p.masked_fill(dropped, 0)).sum(-1)
    return tuple(torch.where(targets < 0, 0, x) for x in (logprob, lse, entropy))


def run(op, leaves, targets, options, upstream, outputs=OUTPUTS):
    """The outputs, and the gradient of every leaf when a loss reads `outputs`."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in leaves]
    got = op(leaves[0], leaves[1], targets, bias=leaves[2], **options)
    wanted = {name: i for i, name in enumerate(OUTPUTS) if name in outputs}
    loss = sum((got[i] * upstream[i]).sum() for i in wanted.values())
    grads = torch.autograd.grad(loss, [x for x in leaves if x is not None])
    return dict(
        zip((*OUTPUTS, "dhidden", "dweight", "dbias"), [x.detach() for x in got] + list(grads), strict=False)
    )


def widen(x, wide):
    return x.to(wide) if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def assert_as_accurate(leaves, targets, options, outputs=OUTPUTS, memory_budget=BLOCKS):
    """At most twice the eager composition's error in the same dtype, plus 1e-5 (1 + max|truth|)."""
    wide = torch.float64 if leaves[0].dtype == torch.float32 else torch.float32
    upstream = torch.randn(3, len(targets), device=targets.device)
    exact = {name: widen(x, wide) for name, x in options.items()}
    truth = run(
        token_logprobs_reference, [widen(x, wide) for x in leaves], targets, exact, upstream.to(wide), outputs
    )
    usual = run(eager, leaves, targets, options, upstream, outputs)
    ours = run(
        token_logprobs, leaves, targets, {**options, "memory_budget": memory_budget}, upstream, outputs
    )
    assert ours.keys() == truth.keys()
    for name, t in truth.items():
        allowed = 2 * (usual[name].to(wide) - t).abs().max() + 1e-5 * (1 + t.abs().max())
        error = (ours[name].to(wide) - t).abs().max()
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


# ---- right


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_feature
def test_every_feature_matches_the_reference(features, dtype, device):
    V = 67 if "support" in features else 601  # the interpreter pays for each id of a support's vocabulary
    assert_as_accurate(*make((7, 24, V), device, dtype, **features))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 2), (5, 3, 2), (17, 33, 257)], ids=str)
def test_any_shape(shape, dtype, device):
    assert_as_accurate(*make(shape, device, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_large_vocabulary(dtype, device, monkeypatch):
    if INTERPRET:  # it pays for each tile
        monkeypatch.setattr(logprob, "tile_of", lambda h: Tile(16, 65_536, 16))
    assert_as_accurate(*make((2, 8, 262_145), device, dtype), memory_budget=2**22)


@pytest.mark.parametrize("outputs", [("logprob",), ("lse",), ("entropy",), ("logprob", "lse")], ids=str)
@pytest.mark.parametrize(
    "features", [FEATURES["everything"], FEATURES["everything supported"]], ids=["dense", "supported"]
)
def test_each_output_has_its_own_gradient(outputs, features, device):
    assert_as_accurate(
        *make((5, 6, 67 if "support" in features else 300), device, **features), outputs=outputs
    )


@pytest.mark.parametrize("memory_budget", [1, 5_000, 30_000, None], ids=str)
@pytest.mark.parametrize(
    "features", [FEATURES["everything"], FEATURES["everything supported"]], ids=["dense", "supported"]
)
def test_any_budget(memory_budget, features, device):
    assert_as_accurate(
        *make((5, 8, 67 if "support" in features else 601), device, **features), memory_budget=memory_budget
    )


@pytest.mark.parametrize("scale", [1e-3, 30, 3000])
def test_tiny_and_huge_logits(scale, device):
    leaves, targets, options = make((6, 16, 300), device, ignored=True)
    leaves[0] *= scale
    assert_as_accurate(leaves, targets, options)


@pytest.mark.parametrize("scale", [30, 1000, 3e4])
@pytest.mark.parametrize("outputs", [(name,) for name in OUTPUTS], ids=str)
def test_ids_that_tie_far_from_zero(outputs, scale, device):
    """The rounding of a log-sum-exp of this size must not be in probabilities that are neither 0 nor 1."""
    leaves, targets, options = make((6, 16, 300), device)
    size = 2.0 ** round(math.log2(scale))  # few bits each, so that products have no rounding
    hidden, weight, _ = leaves = [None if x is None else (x * 15).round() / 16 for x in leaves]
    hidden *= size
    for row in range(4):
        weight[100 + row] = weight[(hidden[row] @ weight.T).argmax()]
        targets[row] = 100 + row if row % 2 else 5
    assert_as_accurate(leaves, targets, options, outputs)


@every_feature
def test_reference_gradients_by_finite_differences(features):
    leaves, targets, options = make((4, 3, 7), "cpu", torch.float64, **features)
    given = [x.requires_grad_() for x in leaves if x is not None]

    def op(hidden, weight, bias=None):
        return token_logprobs_reference(hidden, weight, targets, bias=bias, **options)

    assert torch.autograd.gradcheck(op, given)


@pytest.mark.skipif(INTERPRET, reason="the kernels take no fp64")
@every_feature
def test_blocks_have_the_reference_gradients_in_fp64(features):
    leaves, targets, options = make((4, 3, 400), "cpu", torch.float64, **features)
    upstream = torch.randn(3, 4, dtype=torch.float64)
    want = run(token_logprobs_reference, leaves, targets, options, upstream)
    got = run(token_logprobs, leaves, targets, {**options, "memory_budget": BLOCKS}, upstream)
    for name, x in want.items():
        torch.testing.assert_close(got[name], x, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("memory_budget", [BLOCKS, None], ids=str)
def test_known_values(memory_budget, device):
    V = 601
    hidden, targets = torch.zeros(3, 4, device=device), torch.tensor([0, 300, V - 1], device=device)
    weight = torch.randn(V, 4, device=device)
    for got, want in zip(
        token_logprobs(hidden, weight, targets, memory_budget=memory_budget),
        (-math.log(V), math.log(V), math.log(V)),
        strict=True,
    ):
        torch.testing.assert_close(got, torch.full_like(got, want))
    certain = torch.zeros(V, device=device)
    certain[300] = 50.0
    scores = token_logprobs(hidden, weight, targets, bias=certain, memory_budget=memory_budget)
    for got, want in zip(scores, ([-50.0, 0.0, -50.0], [50.0] * 3, [0.0] * 3), strict=True):
        torch.testing.assert_close(got, torch.tensor(want, device=device))


def test_a_support_of_everything_is_no_support(device):
    leaves, targets, options = make((5, 8, 40), device, bias=True, softcap=3.0)
    upstream = torch.randn(3, 5, device=device)
    whole = torch.arange(40, device=device, dtype=torch.int32).expand(5, 40)
    want = run(token_logprobs, leaves, targets, options, upstream)
    got = run(
        token_logprobs, leaves, targets, {**options, "support": whole, "memory_budget": BLOCKS}, upstream
    )
    for name, x in want.items():
        torch.testing.assert_close(got[name], x, msg=lambda m, n=name: f"{n}: {m}")


def test_shared_ids_gather_their_gradient(device):
    leaves, targets, options = make((40, 5, 67), device)
    targets[:] = 7
    options["support"] = torch.tensor([[7, 66, -1, 0]], device=device, dtype=torch.int32).expand(40, 4)
    assert_as_accurate(leaves, targets, options)


@pytest.mark.parametrize("memory_budget", [BLOCKS, None], ids=str)
@pytest.mark.parametrize("support", [0, 6])
def test_all_ignored_is_a_finite_zero_with_a_gradient_path(memory_budget, support, device):
    leaves, targets, options = make((5, 8, 67 if support else 300), device, bias=True, support=support)
    targets[:] = -100
    leaves[0] *= 1e4
    got = run(
        token_logprobs,
        leaves,
        targets,
        {**options, "memory_budget": memory_budget},
        torch.randn(3, 5, device=device),
    )
    for name, x in got.items():
        assert torch.equal(x, torch.zeros_like(x)), name


@pytest.mark.parametrize("support", [0, 6])
def test_no_tokens(support, device):
    hidden = torch.zeros(0, 8, device=device, requires_grad=True)
    weight = torch.randn(300, 8, device=device, requires_grad=True)
    ids = torch.zeros(0, support, device=device, dtype=torch.int32) if support else None
    scores = token_logprobs(
        hidden, weight, torch.zeros(0, device=device, dtype=torch.int64), support=ids, memory_budget=1
    )
    sum(x.sum() for x in scores).backward()
    assert [x.shape for x in scores] == [(0,)] * 3
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_any_strides(device):
    leaves, targets, options = make((6, 8, 67), device, bias=True, temperature="each", support=6)
    strided = [torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0] for x in leaves]
    targets = torch.stack([targets, targets], -1)[:, 0]
    spread = {
        n: torch.stack([x, x], -1)[..., 0] if isinstance(x, torch.Tensor) else x for n, x in options.items()
    }
    assert_as_accurate(strided, targets, spread)
    assert_as_accurate(strided, targets, {**spread, "support": None})


def test_a_wide_head_has_a_wide_gradient(device):
    leaves, targets, options = make((6, 16, 300), device, torch.float16)
    leaves[1] = leaves[1].float()
    got = run(
        token_logprobs, leaves, targets, {**options, "memory_budget": BLOCKS}, torch.ones(3, 6, device=device)
    )
    assert (got["dhidden"].dtype, got["dweight"].dtype) == (torch.float16, torch.float32)
    want = run(token_logprobs_reference, leaves, targets, options, torch.ones(3, 6, device=device))
    for name, x in want.items():
        torch.testing.assert_close(got[name], x, rtol=5e-3, atol=5e-3, msg=lambda m, n=name: f"{n}: {m}")


# ---- lean


def test_a_frozen_head_costs_no_product(device, monkeypatch):
    (hidden, weight, _), targets, _ = make((5, 8, 600), device)
    products = []

    def counted(product):
        return lambda *a: (products.append(1), product(*a))[1]

    for name in ("product", "accumulate"):
        monkeypatch.setattr(blocks, name, counted(getattr(blocks, name)))
    counts = {}
    for frozen in (True, False):
        products.clear()
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)
        token_logprobs(*leaves, targets, memory_budget=BLOCKS)[0].sum().backward()
        counts[frozen] = len(products)
        assert (leaves[1].grad is None) == frozen
    assert counts[False] == 2 * counts[True] > 0  # dhidden and, for a trained head, dweight


MEASURE = """
import sys, torch
from burnish.kernels import token_logprobs
torch.set_num_threads(1)
T, C, V = map(int, sys.argv[1:4])
def resident(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) * 1024 / 1e6
def step(hidden, weight, targets):
    scores = token_logprobs(hidden, weight, targets, support=None)
    (scores[0].sum() + 0.1 * scores[2].sum()).backward()
weight = torch.randn(V, C, requires_grad=True)
step(torch.randn(4, C, requires_grad=True), weight[:999].detach().requires_grad_(), torch.arange(4))  # warms up
hidden, targets = torch.randn(T, C, requires_grad=True), torch.randint(V, (T,))
open("/proc/self/clear_refs", "w").write("5")  # the peak is counted from here
before = resident("VmRSS")
step(hidden, weight, targets)
print(resident("VmHWM") - before)
"""


def grown(T, C, V):
    """MB by which one forward and backward raises the peak of a process, gradients included."""
    command = [sys.executable, "-c", MEASURE, *map(str, (T, C, V))]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(INTERPRET or sys.platform != "linux", reason="measures the CPU path by Linux's counters")
def test_memory_does_not_hold_the_logits():
    logits, dweight = 4 * 1024 * 32_768 / 1e6, 4 * 32_768 * 16 / 1e6
    assert grown(1024, 16, 32_768) < dweight + 60 < logits / 2


@pytest.mark.slow
@pytest.mark.skipif(INTERPRET or sys.platform != "linux", reason="measures the CPU path by Linux's counters")
@pytest.mark.parametrize(
    "shape, limit", [((2048, 256, 32_768), 100), ((2048, 1024, 32_768), 4 * 32_768 * 1024 / 1e6 + 80)]
)
def test_memory_holds_to_its_budget(shape, limit):
    assert grown(*shape) <= limit


@pytest.mark.skipif(not torch.cuda.is_available(), reason="counts the GPU's memory")
@pytest.mark.parametrize("memory_budget", [2**26, 2**28])
def test_gpu_memory_holds_to_its_budget(memory_budget):
    T, C, V = 4096, 256, 151_936
    hidden = torch.randn(T, C, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(V, C, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(V, (T,), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    token_logprobs(hidden, weight, targets, memory_budget=memory_budget)[0].sum().backward()
    gradients = 2 * (T + V) * C + 4 * T * C
    assert torch.cuda.max_memory_allocated() - before <= memory_budget + gradients + 2**24


# ---- torch


def test_autocast_takes_products_in_its_dtype(device):
    (hidden, weight, _), targets, _ = make((6, 16, 300), device)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    with torch.autocast(device, dtype=torch.float16):
        scores = token_logprobs(*leaves, targets, memory_budget=BLOCKS)
    grads = torch.autograd.grad(sum(x.sum() for x in scores), leaves)
    assert [x.dtype for x in (*scores, *grads)] == [torch.float32] * 5
    want = token_logprobs_reference(hidden, weight, targets)
    for got, x in zip(scores, want, strict=True):
        assert not torch.equal(got, x)
        torch.testing.assert_close(got, x, rtol=5e-3, atol=5e-3)


# ---- refusals


ROWS = {  # targets, the first of which or of whose support is wrong, and the support
    "target 2^32 + 1": ([2**32 + 1, 0], None),
    "target 2^40": ([2**40, 0], None),
    "support 9": ([1, 0], [[1, 9], [0, 3]]),
}


@control
def a_wrong_row_is_nan(op, targets, support, device) -> None:
    arguments = torch.ones(2, 4, device=device), torch.ones(9, 4, device=device)
    targets = torch.tensor(targets, device=device)
    support = None if support is None else torch.tensor(support, device=device)
    found = op(*arguments, targets, support=support)[0]
    assert found.isnan().tolist() == [True, False]


@pytest.mark.skipif(
    not (INTERPRET or torch.cuda.is_available()), reason="what is promised of the Triton path"
)
@pytest.mark.parametrize("fault", faults_of(__file__), ids=lambda fault: fault.id)
def test_a_wrong_row_is_nan_and_not_without_its_line(fault, device, copy_of):
    a_wrong_row_is_nan(token_logprobs, *ROWS[fault.on], device)
    module = copy_of(fault.file, fault, "head/logprob")
    with pytest.raises(AssertionError):
        check_of(fault)(module.token_logprobs, *ROWS[fault.on], device)
