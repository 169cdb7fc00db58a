import math
import subprocess
import sys

import pytest
import torch
from burnish.bench.cases.divergence import kl_div, token_divergence_eager
from burnish.bench.cases.logprob import without_budget
from burnish.bench.cases.topk import topk_divergence_eager
from burnish.kernels import (
    _op,
    token_divergence,
    token_logprobs,
    topk_divergence,
    topk_logprobs,
)
from burnish.kernels._chip import INTERPRET
from burnish.kernels.head import divergence
from burnish.kernels.head.topk import topk_divergence_reference, topk_logprobs_reference
from burnish.kernels.plain.divergence import token_divergence_reference
from burnish.kernels.tiles import Tile
from torch.utils._python_dispatch import TorchDispatchMode

BLOCKS = 20_000  # bytes: most shapes below fall into several blocks
every_beta = pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])


def make(T, C, V, device, dtype=torch.float32, teacher=6):
    """hidden, weight, teacher_hidden, teacher_weight."""
    shapes = (T, C), (V, C), (T, teacher), (V, teacher)
    return [(torch.randn(*shape, device=device) * shape[1] ** -0.5).to(dtype) for shape in shapes]


def run(op, tensors, upstream, **options):
    """The divergence, and the gradients of the student's hidden states and head."""
    leaves = [x.detach().requires_grad_() for x in tensors[:2]]
    got = op(*leaves, *tensors[2:], **options)
    return got.detach(), *torch.autograd.grad((got * upstream).sum(), leaves)


def assert_as_accurate(tensors, **options):
    """At most twice the eager composition's error in fp32, plus 1e-5 (1 + max|truth|)."""
    upstream = torch.randn(len(tensors[0]), device=tensors[0].device)
    truth = run(
        without_budget(token_divergence_reference),
        [x.double() for x in tensors],
        upstream.double(),
        **options,
    )
    usual = run(without_budget(token_divergence_eager), tensors, upstream, **options)
    ours = run(token_divergence, tensors, upstream, **options)
    for t, u, o in zip(truth, usual, ours, strict=True):
        allowed = 2 * (u.double() - t).abs().max() + 1e-5 * (1 + t.abs().max())
        assert (o.double() - t).abs().max() <= allowed


# ---- right


@pytest.mark.parametrize("beta", [0.0, pytest.param(0.3, marks=pytest.mark.slow), 1.0])
def test_a_large_vocabulary(beta, device, monkeypatch):
    if INTERPRET:  # it pays for each tile
        monkeypatch.setattr(divergence, "_tile", lambda *_: Tile(16, 65_536, 16))
    assert_as_accurate(make(2, 8, 262_145, device), beta=beta, memory_budget=2**23)


@every_beta
@pytest.mark.parametrize("scale", [1e-3, 100])
def test_tiny_and_huge_logits(scale, beta, device):
    tensors = make(6, 16, 301, device)
    tensors[0], tensors[2] = tensors[0] * scale, tensors[2] * scale
    assert_as_accurate(tensors, beta=beta, memory_budget=BLOCKS)


def exact(tensors, scale):
    """Few bits each, so that products have no rounding, which would be the larger error and another one each time."""
    size = 2.0 ** round(math.log2(scale))
    return [(x * 15).round() / 16 * (size if i % 2 == 0 else 1) for i, x in enumerate(tensors)]


@every_beta
@pytest.mark.parametrize("scale", [1e3, 4e3, 3e4])
def test_logits_in_the_thousands(scale, beta, device):
    """Distributions of one id each, or of two that tie: a gradient is small, and no difference of such numbers."""
    tensors = exact(make(6, 16, 301, device), scale)
    for row, (hidden, weight) in enumerate([tensors[:2], tensors[2:], tensors[:2]]):
        weight[150 + row] = weight[(hidden[row] @ weight.T).argmax()]
    tensors[0][5] = 0  # all ids tie
    assert_as_accurate(tensors, beta=beta, memory_budget=BLOCKS)


@every_beta
@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_stored_logits_of_any_size(scale, beta, device):
    hidden, weight, *teacher = exact(make(6, 16, 301, device), scale)
    ids, logprobs = topk_logprobs(*teacher, 5, memory_budget=BLOCKS)
    for row in range(6):  # where the student is sure of an id of the tail, it ties with another
        weight[150 + row] = weight[(hidden[row] @ weight.T).argmax()]
    upstream, options = torch.randn(6, device=device), {"beta": beta, "memory_budget": BLOCKS}
    exactly = [hidden.double(), weight.double(), ids, logprobs.double()]
    truth = run(without_budget(topk_divergence_reference), exactly, upstream.double(), **options)
    tensors = [hidden, weight, ids, logprobs]
    eager = without_budget(topk_divergence_eager)
    usual, ours = (run(op, tensors, upstream, **options) for op in (eager, topk_divergence))
    for t, u, o in zip(truth, usual, ours, strict=True):
        assert (o.double() - t).abs().max() <= 2 * (u.double() - t).abs().max() + 1e-5 * (1 + t.abs().max())


@every_beta
@pytest.mark.parametrize("memory_budget", [BLOCKS, None], ids=str)
def test_all_masked_is_a_finite_zero_with_a_gradient_path(memory_budget, beta, device):
    tensors = make(5, 8, 301, device)
    tensors[0] = tensors[0] * 1e4
    mask = torch.zeros(5, dtype=torch.bool, device=device)
    options = {"beta": beta, "mask": mask, "memory_budget": memory_budget}
    for x in run(token_divergence, tensors, torch.ones(5, device=device), **options):
        assert torch.equal(x, torch.zeros_like(x))
    ids, logprobs = topk_logprobs(*tensors[2:], 3)
    for x in run(topk_divergence, [*tensors[:2], ids, logprobs], torch.ones(5, device=device), **options):
        assert torch.equal(x, torch.zeros_like(x))


@every_beta
def test_the_same_distribution_is_no_distance(beta, device):
    hidden, weight, *_ = make(5, 8, 301, device)
    got = token_divergence(hidden, weight, hidden, weight, beta=beta, memory_budget=BLOCKS)
    torch.testing.assert_close(got, torch.zeros_like(got), rtol=0, atol=3e-6)


def test_biases_may_be_strided(device):
    """A column of a matrix, of the student's head and of the teacher's."""
    hidden, teacher_hidden = torch.randn(5, 16, device=device), torch.randn(5, 24, device=device)
    weight, teacher_weight = torch.randn(37, 16, device=device), torch.randn(37, 24, device=device)
    biases = torch.randn(37, 2, device=device)
    heads, options = (hidden, weight, teacher_hidden, teacher_weight), {"beta": 1.0, "memory_budget": 1000}
    strided = {"bias": biases[:, 0], "teacher_bias": biases[:, 1]}
    found = token_divergence(*heads, **strided, **options)
    packed = {name: bias.contiguous() for name, bias in strided.items()}
    torch.testing.assert_close(found, token_divergence(*heads, **packed, **options), rtol=0, atol=0)


def test_the_ends_of_beta_are_the_two_kls(device):
    hidden, weight, teacher_hidden, teacher_weight = make(5, 8, 301, device)
    log_s, log_t = (hidden @ weight.T).log_softmax(-1), (teacher_hidden @ teacher_weight.T).log_softmax(-1)
    student, teacher = (hidden, weight), (teacher_hidden, teacher_weight)

    def of(a, b, beta):
        return token_divergence(*a, *b, beta=beta, memory_budget=BLOCKS)

    torch.testing.assert_close(of(student, teacher, 0.0), kl_div(log_t, log_s, 0.0, None))
    torch.testing.assert_close(of(student, teacher, 1.0), of(teacher, student, 0.0))
    torch.testing.assert_close(of(student, teacher, 0.3), of(teacher, student, 0.7))
    assert (of(student, teacher, 0.5) <= math.log(2)).all()  # as any Jensen-Shannon divergence


@pytest.mark.skipif(INTERPRET, reason="the references are plain torch: once is enough")
@every_beta
def test_reference_gradients_by_finite_differences(beta):
    tensors = make(3, 4, 7, "cpu", torch.float64)
    options = {"beta": beta, "temperature": 0.7, "softcap": 3.0, "teacher_softcap": 2.0}
    leaves = [x.requires_grad_() for x in tensors[:2]]
    assert torch.autograd.gradcheck(
        lambda h, w: token_divergence_reference(h, w, *tensors[2:], **options), leaves
    )
    stored = topk_logprobs_reference(*tensors[2:], 3)
    assert torch.autograd.gradcheck(lambda h, w: topk_divergence_reference(h, w, *stored, beta=beta), leaves)


# ---- top k


@every_beta
def test_a_tail_is_never_negative_and_has_a_gradient(beta, device):
    """A student that is sure of what the teacher is sure of, too, differs in the tails alone."""
    hidden, weight, teacher_hidden, teacher_weight = make(6, 8, 301, device)
    ids, logprobs = topk_logprobs(teacher_hidden * 3, teacher_weight, 4, memory_budget=BLOCKS)
    got = run(topk_divergence, [hidden, weight, ids, logprobs], torch.ones(6, device=device), beta=beta)
    exact = token_divergence(hidden, weight, teacher_hidden * 3, teacher_weight, beta=beta)
    assert (got[0] >= -1e-6).all() and (got[0] <= exact + 1e-5).all()  # fewer buckets are never further apart
    assert got[1].isfinite().all() and (got[2].abs().sum(1) > 0).all()  # each id of the tail


def test_a_sure_student_keeps_the_digits_of_its_tail(device):
    """A tail of e^-40, which 1 - sum of the listed probabilities would round to nothing."""
    weight = torch.eye(4, device=device)
    hidden = torch.tensor([[40.0, 0.0, -torch.inf, -torch.inf]], device=device).nan_to_num(neginf=-1e4)
    ids, logprobs = torch.tensor([[0]], device=device), torch.tensor([[math.log(0.9)]], device=device)
    got, dhidden, _ = run(topk_divergence, [hidden, weight, ids, logprobs], torch.ones(1, device=device))
    want = 0.9 * math.log(0.9) + 0.1 * (math.log(0.1) + 40)
    torch.testing.assert_close(got, torch.full_like(got, want))
    torch.testing.assert_close(dhidden[0, :2], torch.tensor([0.1, -0.1], device=device))


def test_the_likeliest_ids_of_an_adapters_head(device):
    hidden, weight, *_ = make(5, 8, 601, device)
    adapter = {"lora_a": torch.randn(3, 8, device=device), "lora_b": torch.randn(601, 3, device=device)}
    ids, logprobs = topk_logprobs(hidden, weight, 9, **adapter, scaling=0.5, memory_budget=BLOCKS)
    want_ids, want = topk_logprobs_reference(hidden, weight, 9, **adapter, scaling=0.5)
    assert torch.equal(ids, want_ids) and not torch.equal(ids, topk_logprobs(hidden, weight, 9)[0])
    torch.testing.assert_close(logprobs, want)


@every_beta
def test_all_ids_are_no_tail(beta, device):
    tensors = make(5, 8, 67, device)
    stored = topk_logprobs(*tensors[2:], 67)
    upstream = torch.randn(5, device=device)
    want = run(token_divergence_reference, tensors, upstream, beta=beta)
    got = run(topk_divergence, [*tensors[:2], *stored], upstream, beta=beta, memory_budget=5000)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_the_likeliest_ids_are_those_of_all_logits(device):
    hidden, weight, *_ = make(5, 8, 601, device)
    temperature = torch.rand(5, device=device) + 0.5
    ids, logprobs = topk_logprobs(hidden, weight, 9, temperature=temperature, memory_budget=BLOCKS)
    want_ids, want = topk_logprobs_reference(hidden, weight, 9, temperature=temperature)
    assert ids.dtype == torch.int32 and torch.equal(ids, want_ids)
    torch.testing.assert_close(logprobs, want)
    scored = token_logprobs(hidden, weight, ids[:, 0], temperature=temperature)[0]
    torch.testing.assert_close(logprobs[:, 0], scored)


# ---- lean

MEASURE = """
import sys, torch
from burnish.kernels import token_divergence, topk_divergence, topk_logprobs
torch.set_num_threads(1)
def resident(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) * 1024 / 1e6
T, C, V = 1024, 16, 32_768
def step(T, V):
    hidden, weight = torch.randn(T, C, requires_grad=True), torch.randn(V, C, requires_grad=True)
    teacher = torch.randn(T, C), torch.randn(V, C)
    open("/proc/self/clear_refs", "w").write("5")  # the peak is counted from here
    before = resident("VmRSS")
    if sys.argv[1] == "top k":
        topk_divergence(hidden, weight, *topk_logprobs(*teacher, 8)).sum().backward()
    else:
        token_divergence(hidden, weight, *teacher, beta=float(sys.argv[1])).sum().backward()
    return resident("VmHWM") - before
step(4, 999)  # warms up
print(step(T, V))
"""


@pytest.mark.skipif(INTERPRET or sys.platform != "linux", reason="measures the CPU path by Linux's counters")
@pytest.mark.parametrize(
    "which, limit",
    [("0.5", 66), *(pytest.param(which, 40, marks=pytest.mark.slow) for which in ("0.0", "1.0", "top k"))],
)
def test_memory_does_not_hold_the_logits(which, limit):
    """MB, of which the budget is 8.4, of a mixture 33.6; one copy of the logits is 134."""
    command = [sys.executable, "-c", MEASURE, which]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(out.stdout) < limit < 4 * 1024 * 32_768 / 1e6 / 2


class Products(TorchDispatchMode):
    """Multiplications in matrix products, and the largest tensor."""

    def __init__(self):
        super().__init__()
        self.taken = self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.default, torch.ops.aten.mm.out, torch.ops.aten.addmm_.default):
            (M, K), (_, N) = (x.shape for x in args[-2:])
            self.taken += M * K * N
        if isinstance(out, torch.Tensor):
            self.elements = max(self.elements, out.numel())
        return out


@pytest.fixture
def products(monkeypatch):
    if INTERPRET or torch.cuda.is_available():
        pytest.skip("counts what torch computes on a CPU")
    monkeypatch.setattr(_op, "is_in_torch_dispatch_mode", lambda: False)  # a registered op hides its inside
    return Products()


@every_beta
@pytest.mark.parametrize("frozen", [False, True])
def test_each_product_is_taken_as_rarely_as_no_logits_allow(frozen, beta, products):
    """2 T V C of the forward, 2 again in the backward, then dhidden and dW: 1.5 of the 4 that have to be."""
    T, C, V = 24, 4, 2048
    hidden, weight, *teacher = make(T, C, V, "cpu", teacher=C)
    hidden.requires_grad_()
    weight.requires_grad_(not frozen)
    with products:
        token_divergence(hidden, weight, *teacher, beta=beta, memory_budget=2**17).sum().backward()
    assert products.taken == (5 if frozen else 6) * T * C * V
    assert products.elements <= T * V / 2  # and no logits of all tokens


def test_stored_top_k_never_make_the_logits(products):
    T, C, V = 64, 8, 4096
    hidden, weight, *teacher = make(T, C, V, "cpu")
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    with products:
        ids, logprobs = topk_logprobs(*teacher, 8, memory_budget=2**17)
        topk_divergence(*leaves, ids, logprobs, memory_budget=2**17).sum().backward()
    assert products.taken == 4 * T * C * V + 6 * T * V  # the student's, and the teacher's of width 6
    assert V * C <= products.elements < T * V / 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="counts the GPU's memory")
@pytest.mark.parametrize("which", ["0.0", "0.5", "1.0", "top k"])
def test_gpu_memory_holds_to_its_budget(which):
    T, C, V, budget = 4096, 256, 151_936, 2**28
    leaves = [torch.randn(n, C, device="cuda", dtype=torch.bfloat16, requires_grad=True) for n in (T, V)]
    teacher = [torch.randn(n, C, device="cuda", dtype=torch.bfloat16) for n in (T, V)]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    if which == "top k":
        stored = topk_logprobs(*teacher, 8, memory_budget=budget)
        topk_divergence(*leaves, *stored, memory_budget=budget).sum().backward()
    else:
        token_divergence(*leaves, *teacher, beta=float(which), memory_budget=budget).sum().backward()
    gradients, statistics = 2 * (T + V) * C + 4 * T * C, 24 * T * V // 128
    assert torch.cuda.max_memory_allocated() - before <= budget + gradients + statistics + 2**25


def test_the_teacher_has_no_gradient(device):
    leaves = [x.requires_grad_() for x in make(5, 8, 301, device)]
    token_divergence(*leaves, memory_budget=BLOCKS).sum().backward()
    assert [x.grad is None for x in leaves] == [False, False, True, True]


# ---- refusals
