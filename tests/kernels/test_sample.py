"""Drawing tokens: against the reference, by hand, and the distribution that is asked for."""

import pytest
import torch
from burnish.kernels import sample_tokens, token_logprobs
from burnish.kernels._chip import INTERPRET
from burnish.kernels.plain.sample import sample_tokens_reference
from burnish.kernels.records import TOP_P_WIDTH
from faults import check_of, control, faults_of

TRITON = INTERPRET or torch.cuda.is_available()
DTYPES = [torch.float32, torch.float16] if INTERPRET else [torch.float32, torch.float16, torch.bfloat16]
WAYS = [
    {},
    {"temperature": 0.0, "top_k": 3},
    {"temperature": 0.7},
    {"top_k": 1},
    {"top_k": 5, "temperature": 2.0},
    {"top_k": 20, "top_p": 0.7},
    {"top_p": 0.9, "temperature": 0.5},
    {"top_p": 1e-9},
    {"min_p": 0.1},
    {"top_k": 33, "top_p": 0.9, "min_p": 0.05, "temperature": 1.3},
    {"top_k": 1500, "top_p": 0.9},
    {"top_k": 10**6, "top_p": 1.0, "min_p": 0.0},
]
SIZES = [1, 2, 7, 1031, 4096, 5003]  # a piece is 4,096
slow = [pytest.mark.slow] if INTERPRET else []  # a tenth of a second for each row


def every_way(*fast):
    """Those at the places `fast` wherever tests run."""
    ways = [pytest.param(how, marks=[] if i in fast else slow, id=str(how)) for i, how in enumerate(WAYS)]
    return pytest.mark.parametrize("how", ways)


def make(B, V, dtype=torch.float32, device="cpu"):
    B = min(B, 2) if INTERPRET else B  # a program at a time
    return 3 * torch.randn(B, V, device=device).to(dtype), torch.rand(B, dtype=torch.float64, device=device)


def place(ids, token):
    """An id's place in the order that cumulative probabilities follow."""
    return token if ids is None else (ids == token[:, None]).int().argmax(1)


def assert_drawn(logits, noise, **how):
    """The reference draws the same in fp64; a number within 1e-6 of a border may fall on either side of it."""
    token, logprob, support = sample_tokens(logits, noise, **how)
    wide = logits.double()
    (_, _, ids), *around = (
        sample_tokens_reference(wide, (noise + shift).clamp(0, 1 - 2**-53), **how)
        for shift in (0, -1e-6, 1e-6)
    )
    low, high = (place(ids, token) for token, _, _ in around)
    at = place(support, token)
    assert token.dtype == torch.int64 and ((low <= at) & (at <= high)).all()

    if ids is None:
        assert support is None
        kept = torch.ones_like(wide, dtype=torch.bool)
    else:
        assert support is not None and support.dtype == torch.int32 and support.shape == ids.shape
        assert torch.equal(support < 0, ids < 0)
        if logits.is_cuda or INTERPRET:
            assert torch.equal(support, ids)
        most, want = (wide.gather(1, x.clamp(min=0).long()) for x in (support, ids))
        assert torch.equal(most[ids >= 0], want[ids >= 0])  # on a CPU ties are kept in any order

        columns = torch.where(support < 0, logits.shape[1], support).long()
        kept = torch.zeros(len(wide), logits.shape[1] + 1, dtype=torch.bool, device=wide.device)
        kept = kept.scatter_(1, columns, True)[:, :-1]
        assert torch.equal(kept.sum(1), (support >= 0).sum(1))  # each once

    u = (wide / (how.get("temperature", 1.0) or 1.0)).masked_fill(~kept, -torch.inf)
    want = u.log_softmax(-1).gather(1, token[:, None]).squeeze(1)
    assert logprob.dtype == torch.promote_types(logits.dtype, torch.float32)
    torch.testing.assert_close(logprob.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("V", [pytest.param(V, marks=[] if V == 5003 else slow) for V in SIZES])
@pytest.mark.parametrize("how", WAYS, ids=str)
def test_draws_as_the_reference_does(how, V, device):
    for dtype in DTYPES if V == 1031 else DTYPES[:1]:
        assert_drawn(*make(1 if INTERPRET else 6, V, dtype, device), **how)


def kept(logits, temperature, top_k, top_p) -> list[int]:
    """Ids that truncation keeps of one row, by its definition."""
    p = (logits / temperature).softmax(-1).tolist()
    order = sorted(range(len(p)), key=lambda i: -p[i])[:top_k]
    total = sum(p[i] for i in order) if top_k else 1.0
    ids, mass = [], 0.0
    for i in order:
        if top_p is not None and mass >= top_p:
            break
        ids.append(i)
        mass += p[i] / total
    return ids


@pytest.mark.parametrize("temperature", [2.0, *(pytest.param(t, marks=slow) for t in (0.5, 1.0))])
@pytest.mark.parametrize(
    "top_k, top_p",
    [
        (None, None),
        *(
            pytest.param(*limits, marks=slow)
            for limits in ((5, 0.7), (3, None), (None, 0.7), (1, None), (None, 1e-9), (50, 0.999))
        ),
    ],
)
def test_ids_are_drawn_as_often_as_they_are_likely(temperature, top_k, top_p, device):
    """A regular grid of numbers: each id is drawn as often as it is likely, to one number at each of its borders."""
    n = 8 if INTERPRET else 10_000
    logits = torch.tensor([[0.3, 2.0, -1.0, 1.1, -40.0, 0.9, 1.9]], device=device)
    noise = (torch.arange(n, dtype=torch.float64, device=device) + 0.5) / n
    token, logprob, support = sample_tokens(
        logits.expand(n, 7), noise, temperature=temperature, top_k=top_k, top_p=top_p
    )

    ids = kept(logits[0], temperature, top_k, top_p)
    if support is None:
        assert (top_k, top_p) == (None, None)
    else:
        assert [i for i in support[0].tolist() if i >= 0] == ids
    expected, _, _ = token_logprobs(
        logits[:, :1].new_ones(n, 1),
        logits.T.contiguous(),
        token,
        temperature=temperature,
        support=support,
    )
    torch.testing.assert_close(logprob, expected, atol=1e-5, rtol=0)

    weights = (logits[0, ids] / temperature).softmax(-1)
    counts = token.bincount(minlength=7)
    assert counts[ids].sum() == n
    assert ((counts[ids] - n * weights).abs() <= 1 + 1e-6 * n).all()


@pytest.mark.parametrize("V", [1000, 1500, 9000])
def test_a_number_near_1_draws_what_is_likely(V, device):
    """A sum in fp32 is off by 6e-8, one in fp64 is not: what falls between them draws no last id."""
    logits, at = (
        torch.randn(8, V, device=device),
        torch.full((8,), 1 - 1e-9, dtype=torch.float64, device=device),
    )
    logits[:, V - V // 3 :] = -30.0  # 1e-13 beside the others
    token, want = (op(logits, at)[0] for op in (sample_tokens, sample_tokens_reference))
    assert torch.equal(token, want) and (want < V - V // 3).all()


@control
def near_1_likely_ids_are_drawn(op, device) -> None:
    logits, at = (
        torch.randn(8, 1500, device=device),
        torch.full((8,), 1 - 1e-9, dtype=torch.float64, device=device),
    )
    logits[:, 1000:] = -30.0
    assert (op(logits, at)[0] < 1000).all()


def test_near_1_the_share_of_a_sum_is_what_counts(device, copy_of):
    """The control: without the line that carries a number into a piece or a block, the same rows draw a last id."""
    (fault,) = (fault for fault in faults_of(__file__) if (fault.path == "triton") == TRITON)
    module = copy_of(fault.file, fault, "sample")
    near_1_likely_ids_are_drawn(sample_tokens, device)
    with pytest.raises(AssertionError):
        check_of(fault)(module.sample_tokens, device)


def test_min_p_keeps_what_is_likely_beside_the_most_likely(device):
    p, noise = (
        torch.tensor([[0.05, 0.4, 0.3, 0.15, 0.1]]).to(device),
        torch.tensor([0.4], dtype=torch.float64),
    )
    _, logprob, support = sample_tokens(p.log(), noise.to(device), min_p=0.3)
    assert support is not None and support.tolist() == [[1, 2, 3, -1, -1]]
    torch.testing.assert_close(logprob.cpu(), torch.tensor([0.4 / 0.85]).log())


def test_the_example_of_the_file(device):
    p, noise = (
        torch.tensor([[0.05, 0.4, 0.3, 0.15, 0.1]]).to(device),
        torch.tensor([0.6], dtype=torch.float64),
    )
    for op in (sample_tokens, sample_tokens_reference):
        token, logprob, support = op(p.log(), noise.to(device), top_p=0.8)
        assert support is not None and support.tolist() == [[1, 2, 3, -1, -1]] and token.tolist() == [2]
        torch.testing.assert_close(logprob.cpu(), torch.tensor([0.3 / 0.85]).log())


def test_top_p_alone_chooses_among_a_bounded_number_of_ids(device):
    logits, noise = torch.zeros(1, 3 * TOP_P_WIDTH, device=device), torch.tensor([0.5], dtype=torch.float64)
    token, logprob, support = sample_tokens(logits, noise.to(device), top_p=0.99)
    assert support is not None and support.shape == (1, TOP_P_WIDTH) and (support >= 0).all()
    assert logprob.item() == pytest.approx(-torch.tensor(float(TOP_P_WIDTH)).log().item(), abs=1e-5)
    assert token.item() in support


@every_way(0, 9)
def test_of_equally_likely_ids_the_lower_comes_first(how, device):
    logits, noise = make(4, 300, device=device)
    logits = logits.round()  # twenty values
    if TRITON or how.get("temperature") == 0.0:
        want = sample_tokens_reference(logits, noise, **how)
        for a, b in zip(sample_tokens(logits, noise, **how), want, strict=True):
            if a is None or b is None or not a.is_floating_point():
                assert a is b or torch.equal(a, b)
    assert_drawn(logits, noise, **how)


@every_way(0)
def test_what_is_impossible_is_never_drawn(how, device):
    """Numbers at both ends and on the borders, where ids of probability 0 stand first, last and between."""
    logits = torch.full((7, 1300), -torch.inf, device=device)
    logits[:, [3, 130, 131, 869]] = 1.5
    noise = torch.tensor([0, 0.25, 0.5, 0.75, 1 - 2**-53, 0.25 - 2**-54, 2**-60], dtype=torch.float64)
    token, logprob, _ = sample_tokens(logits, noise.to(device), **how)
    assert (logits.gather(1, token[:, None]) == 1.5).all() and logprob.isfinite().all()
    if not how:
        assert token.tolist() == [3, 130, 131, 869, 869, 3, 3]


@every_way(0)
def test_logits_as_large_as_they_get(how, device):
    for dtype, largest in ((torch.float16, 6e4), (torch.float32, 3e37)):
        logits = torch.full((3, 70), -largest, dtype=dtype, device=device)
        logits[:, 66], logits[1, 5] = largest, largest
        noise = torch.tensor([0.3, 0.7, 0.999], dtype=torch.float64, device=device)
        token, logprob, _ = sample_tokens(logits, noise, **how)
        one = how.get("top_k") == 1 or how.get("top_p") == 1e-9  # and of two either, on a CPU
        first = {5} if one or how.get("temperature") == 0.0 else {66}
        assert token[0] == token[2] == 66 and int(token[1]) in (first if TRITON else {5, 66})
        want = [0.0, 0.0 if one else -0.6931472, 0]
        torch.testing.assert_close(logprob.cpu(), torch.tensor(want), atol=1e-6, rtol=0)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@every_way(0, 9)
def test_a_row_that_is_no_distribution_gives_an_id_and_leaves_the_others_alone(how, device):
    logits, noise = torch.randn(7, 1031, device=device), torch.rand(7, device=device).double()
    want = sample_tokens(logits, noise, **how)
    logits[1], logits[2, 500], logits[3], logits[4], logits[5, 7] = (
        *(float("nan"), float("nan"), -torch.inf, torch.inf, torch.inf),
    )
    got = sample_tokens(logits, noise, **how)
    assert ((got[0] >= 0) & (got[0] < 1031)).all()
    for a, b in zip(got, want, strict=True):
        assert a is b or torch.equal(a[[0, 6]], b[[0, 6]])


@every_way(0)
def test_same_bits_twice_and_on_any_strides(how, device):
    logits, noise = make(5, 700, device=device)
    wide = logits.new_full((*logits.shape, 2), torch.nan)
    wide[..., 0] = logits
    want = sample_tokens(logits, noise, **how)
    for x in (logits, wide[..., 0], logits.T.contiguous().T):
        for a, b in zip(sample_tokens(x, noise, **how), want, strict=True):
            assert a is b or torch.equal(a, b)


@pytest.mark.skipif(not TRITON, reason="what is promised of the Triton path")
@every_way(0)
def test_same_bits_alone_and_in_any_batch(how, device):
    logits, noise = make(5, 1500, device=device)
    together = sample_tokens(logits, noise, **how)
    order = torch.tensor([1, 0, 1], device=device)
    for rows in (slice(1, 2), order):
        for a, b in zip(sample_tokens(logits[rows], noise[rows], **how), together, strict=True):
            assert a is b or torch.equal(a, b[rows])


def test_an_empty_batch_says_how_wide_a_support_is(device):
    logits, noise = torch.empty(0, 2000, device=device), torch.empty(0, dtype=torch.float64, device=device)
    for how, width in (
        ({}, None),
        ({"top_k": 7}, 7),
        ({"top_p": 0.5}, TOP_P_WIDTH),
        ({"temperature": 0, "top_k": 7}, None),
    ):
        token, logprob, support = sample_tokens(logits, noise, **how)
        assert (
            token.shape == logprob.shape == (0,) and (None if support is None else support.shape[1]) == width
        )


def test_refuses_a_gradient(device):
    logits, noise = make(2, 5, device=device)
    logits.requires_grad_()
    with pytest.raises(NotImplementedError, match="train through token_logprobs"):
        sample_tokens(logits, noise)
    with torch.no_grad():
        sample_tokens(logits, noise)
