"""Wrong calls of token_logprobs, token_divergence, topk_logprobs and topk_divergence.

A wrong row gives NaN on the Triton path, and the rows beside it what they give without it.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from burnish.kernels import token_divergence, token_logprobs, topk_divergence, topk_logprobs
from torch import Tensor
from wrong import Wrong, calling, equals, finite, meta, of_shapes, randn, shape, tensors_of

NAN, INF = math.nan, math.inf
T, C, V = 3, 4, 9
H, W, BIAS = randn(T, C), randn(V, C, seed=1), randn(V, seed=2)
TARGETS = torch.tensor([5, 0, 8])
SUPPORT = torch.tensor([[5, 1, -1], [0, 3, 4], [2, 8, -1]], dtype=torch.int32)
TEACHER, TEACHER_W = randn(T, 5, seed=3), randn(V, 5, seed=4)
IDS = torch.tensor([[1, 2], [0, -1], [7, 8]], dtype=torch.int32)
A, B = randn(2, C, seed=5), randn(V, 2, seed=6)
NO_SCALE = (0.0, -1.0, NAN, INF)
BY_BLOCKS = {"memory_budget": 1}  # on a CPU, too, where small logits would be autograd's


logprobs = calling(token_logprobs, {"hidden": H, "weight": W, "targets": TARGETS})
divergence = calling(
    token_divergence, {"hidden": H, "weight": W, "teacher_hidden": TEACHER, "teacher_weight": TEACHER_W}
)
likeliest = calling(topk_logprobs, {"hidden": H, "weight": W, "k": 2})
listed = calling(
    topk_divergence,
    {"hidden": H, "weight": W, "teacher_ids": IDS, "teacher_logprobs": torch.full((T, 2), -2.0)},
)


def with_gradients(call: Callable[..., Callable[[], Any]], **changed: Any) -> Callable[[], list[Tensor]]:
    """The op's outputs, and the gradients of hidden and weight of their sum."""

    def run() -> list[Tensor]:
        hidden, weight = (t.clone().requires_grad_() for t in (H, W))
        found = tensors_of(call(hidden=hidden, weight=weight, **changed)())
        total = sum(t.sum() for t in found if t.requires_grad)
        return [*found, *torch.autograd.grad(total, (hidden, weight))]

    return run


def nan_in(row: int, call: Callable[..., Callable[[], Any]]) -> Callable[[Any], None]:
    """NaN in one row of the first output; in the others what the right call has."""

    def check(found: Any) -> None:
        got, want = tensors_of(found)[0].detach(), tensors_of(call()())[0]
        assert got[row].isnan().all(), f"expected NaN in row {row}, got {got}"
        others = [i for i in range(len(got)) if i != row]
        torch.testing.assert_close(got[others], want[others])

    return check


def with_id(ids: Tensor, row: int, value: int) -> Tensor:
    """Another id in the row's last place."""
    ids = ids.long().clone()
    ids[row, -1] = value
    return ids


def with_row(x: Tensor, row: int, value: float) -> Tensor:
    """The same number in all places of a row: what pads a batch."""
    return x.index_fill(0, torch.tensor([row]), value)


# ---- what is wrong with a head is wrong for every op on one

HEAD = {
    "3 dimensions": ({"hidden": H[:, None]}, r"hidden: expected shape \(tokens, hidden\), got \(3, 1, 4\)"),
    "width 0": ({"hidden": H[:, :0], "weight": W[:, :0]}, r"hidden: expected shape \(tokens, hidden\), got"),
    "other width": (
        {"weight": randn(V, 5)},
        r"weight: expected shape \(vocabulary, hidden=4\), got \(9, 5\)",
    ),
    "no vocabulary": ({"weight": W[:0]}, r"weight: expected shape \(vocabulary, hidden=4\), got \(0, 4\)"),
    "int64 hidden": ({"hidden": H.long()}, "hidden: expected dtype .*, got torch.int64"),
    "int32 weight": ({"weight": W.int()}, "weight: expected dtype .*, got torch.int32"),
    "fp8 weight": (
        {"weight": W.to(torch.float8_e4m3fn)},
        "weight: expected dtype .*, got torch.float8_e4m3fn",
    ),
    "weight on meta": ({"weight": W.to("meta")}, "weight: expected on cpu, got on meta"),
    "hidden on meta": ({"hidden": H.to("meta")}, "weight: expected on meta, got on cpu"),
    "bias on meta": ({"bias": BIAS.to("meta")}, "bias: expected on cpu, got on meta"),
    "short bias": ({"bias": BIAS[:4]}, r"bias: expected shape \(vocabulary=9\), got \(4,\)"),
    "bool bias": ({"bias": BIAS > 0}, "bias: expected dtype .*, got torch.bool"),
    "half an adapter": ({"lora_b": B}, "lora_a, lora_b: expected both or neither"),
    "flat lora_a": ({"lora_a": H[0], "lora_b": B}, r"lora_a: expected shape \(rank, hidden\), got \(4,\)"),
    "lora_a": (
        {"lora_a": randn(2, 5), "lora_b": B},
        r"lora_a: expected shape \(rank=2, hidden=4\), got \(2, 5\)",
    ),
    "lora_b": ({"lora_a": A, "lora_b": W}, r"lora_b: expected shape \(vocabulary=9, rank=2\), got \(9, 4\)"),
    "lora_a on meta": ({"lora_a": A.to("meta"), "lora_b": B}, "lora_a: expected on cpu, got on meta"),
    "int lora_b": ({"lora_a": A, "lora_b": B.int()}, "lora_b: expected dtype .*, got torch.int32"),
    "scaling NaN": ({"scaling": NAN}, "scaling: expected a finite number, got nan"),
    "scaling inf": ({"lora_a": A, "lora_b": B, "scaling": INF}, "scaling: expected a finite number, got inf"),
    "two temperatures": ({"temperature": H[:2, 0]}, r"temperature: expected shape \(tokens=3\), got \(2,\)"),
    "int temperatures": ({"temperature": torch.ones(T).int()}, "temperature: expected a floating dtype, got"),
    "temperatures on meta": (
        {"temperature": H[:, 0].to("meta")},
        "temperature: expected on cpu, got on meta",
    ),
    "temperatures' gradient": (
        {"temperature": torch.ones(T).requires_grad_()},
        "temperature: it has no gradient",
    ),
    **{
        f"softcap {x}": ({"softcap": x}, f"softcap: expected a finite number above 0, got {x}")
        for x in NO_SCALE
    },
    **{
        f"temperature {x}": ({"temperature": x}, f"temperature: expected a finite number above 0, got {x}")
        for x in NO_SCALE
    },
    **{
        f"budget {x}": (
            {"memory_budget": x},
            f"memory_budget: expected a whole number of bytes above 0, got {x}",
        )
        for x in (0, -1, 1e6)
    },
}
HEADS = (
    ("token_logprobs", logprobs),
    ("token_divergence", divergence),
    ("topk_logprobs", likeliest),
    ("topk_divergence", listed),
)
EVERY_HEAD = tuple(
    Wrong(f"{op}: {name}", call(**changed), message)
    for op, call in HEADS
    for name, (changed, message) in HEAD.items()
) + tuple(
    Wrong(
        f"{op}: temperature {value} in a row",
        call(temperature=torch.tensor([1.0, value, 1.0]), **how),
        f"temperature: expected each row finite and above 0, got {value} in row 1",
        nan_in(1, call),
    )
    for op, call in HEADS[:2] + HEADS[3:]
    for value in (0.0, -1.0, NAN)
    for how in (BY_BLOCKS if value else {},)
)

# ---- token_logprobs

LOGPROBS = (
    *(
        Wrong(
            f"token_logprobs: target {target}",
            logprobs(targets=with_id(TARGETS[None], 0, target)[0]),
            f"targets: row 2 is {target}, outside a vocabulary of 9",
            nan_in(2, logprobs),
        )
        for target in (V, -1, 2**40, 2**32 + 5, -(2**32) + 5)
    ),
    Wrong(
        "token_logprobs: a target too many",
        logprobs(targets=IDS[:, 0][:2]),
        r"targets: expected shape \(tokens=3\)",
    ),
    Wrong(
        "token_logprobs: float targets",
        logprobs(targets=H[:, 0]),
        "targets: expected int32 or int64, got torch.float32",
    ),
    Wrong(
        "token_logprobs: targets on meta",
        logprobs(targets=TARGETS.to("meta")),
        "targets: expected on cpu, got on meta",
    ),
    Wrong(
        "token_logprobs: support on meta",
        logprobs(support=SUPPORT.to("meta")),
        "support: expected on cpu, got on meta",
    ),
    Wrong(
        "token_logprobs: rows of support",
        logprobs(support=SUPPORT[:2]),
        r"support: expected shape \(tokens=3, K_max\), got \(2, 3\)",
    ),
    Wrong(
        "token_logprobs: empty support",
        logprobs(support=SUPPORT[:, :0]),
        r"support: expected shape \(tokens=3, K_max\), got \(3, 0\)",
    ),
    Wrong(
        "token_logprobs: float support",
        logprobs(support=SUPPORT.float()),
        "support: expected int32 or int64, got torch.float32",
    ),
    Wrong(
        "token_logprobs: support without the target",
        logprobs(support=with_id(SUPPORT, 0, 2), targets=torch.tensor([6, 0, 8])),
        "support: row 0 does not hold its target 6",
        nan_in(0, lambda: logprobs(support=SUPPORT)),
    ),
    *(
        Wrong(
            f"token_logprobs: support id {name}",
            with_gradients(logprobs, support=with_id(SUPPORT, 0, value), **more),
            f"support: id {value} is outside a vocabulary of 9",
            nan_in(0, lambda more=more: logprobs(support=SUPPORT, **more)),
        )
        for name, value, more in (
            ("V", V, {}),
            ("99 with a bias", 99, {"bias": BIAS}),
            ("2^31", 2**31, {}),
            ("2^40 with an adapter", 2**40, {"lora_a": A, "lora_b": B, "temperature": torch.ones(T)}),
        )
    ),
    Wrong(
        "token_logprobs: support twice",
        logprobs(support=with_id(SUPPORT, 0, 1)),
        "support: row 0 has id 1 twice",
        finite,
    ),
    Wrong(
        "token_logprobs: ids twice in a row that is ignored",
        with_gradients(
            logprobs, support=with_row(SUPPORT, 1, 0), targets=torch.tensor([5, -100, 8]), **BY_BLOCKS
        ),
        finite,
    ),
    Wrong("token_logprobs: all ignored", logprobs(targets=torch.full((T,), -100)), equals(0.0)),
    Wrong(
        "token_logprobs: no rows", logprobs(hidden=H[:0], targets=TARGETS[:0]), of_shapes((0,), (0,), (0,))
    ),
    Wrong("token_logprobs: other dtypes", logprobs(weight=W.double().half(), bias=BIAS.half()), finite),
    Wrong(
        "token_logprobs: all on meta",
        logprobs(**meta(hidden=H, weight=W, targets=TARGETS)),
        of_shapes((T,), (T,), (T,)),
    ),
    Wrong(
        "token_logprobs: all on meta, in blocks",
        logprobs(**meta(hidden=H, weight=W, targets=TARGETS, bias=BIAS), **BY_BLOCKS),
        of_shapes((T,), (T,), (T,)),
    ),
    Wrong(
        "token_logprobs: support on meta, too",
        logprobs(**meta(hidden=H, weight=W, targets=TARGETS, support=SUPPORT), **BY_BLOCKS),
        of_shapes((T,), (T,), (T,)),
    ),
    Wrong(
        "token_logprobs: NaN in a row",
        logprobs(hidden=H.index_fill(0, torch.tensor([1]), NAN)),
        nan_in(1, logprobs),
    ),
)

# ---- token_divergence

DIVERGENCE = (
    Wrong(
        "token_divergence: tokens",
        divergence(teacher_hidden=TEACHER[:2]),
        "teacher_hidden: expected 3 tokens, as hidden has, got 2",
    ),
    Wrong(
        "token_divergence: vocabularies",
        divergence(teacher_weight=TEACHER_W[:8]),
        "teacher_weight: expected a vocabulary of 9, as weight has, got 8",
    ),
    Wrong(
        "token_divergence: teacher's width",
        divergence(teacher_weight=W),
        r"teacher_weight: expected shape \(vocabulary, hidden=5\), got \(9, 4\)",
    ),
    Wrong(
        "token_divergence: teacher on meta",
        divergence(**meta(teacher_hidden=TEACHER, teacher_weight=TEACHER_W)),
        "teacher_hidden: expected on cpu, got on meta",
    ),
    Wrong(
        "token_divergence: teacher's weight on meta",
        divergence(**meta(teacher_weight=TEACHER_W)),
        "teacher_weight: expected on cpu, got on meta",
    ),
    Wrong(
        "token_divergence: int64 teacher",
        divergence(teacher_hidden=TEACHER.long()),
        "teacher_hidden: expected dtype .*, got torch.int64",
    ),
    Wrong(
        "token_divergence: teacher's softcap",
        divergence(teacher_softcap=-1.0),
        "teacher_softcap: expected a finite number above 0, got -1.0",
    ),
    Wrong(
        "token_divergence: teacher's scaling",
        divergence(teacher_scaling=NAN),
        "teacher_scaling: expected a finite number, got nan",
    ),
    Wrong(
        "token_divergence: teacher's adapter",
        divergence(teacher_lora_a=A, teacher_lora_b=B),
        r"teacher_lora_a: expected shape \(rank=2, hidden=5\), got \(2, 4\)",
    ),
    Wrong(
        "token_divergence: other dtypes",
        divergence(teacher_hidden=TEACHER.half(), teacher_weight=TEACHER_W.half()),
        finite,
    ),
    Wrong("token_divergence: no rows", divergence(hidden=H[:0], teacher_hidden=TEACHER[:0]), shape(0)),
    *(
        Wrong(
            f"token_divergence: all on meta, beta {beta}",
            divergence(
                **meta(hidden=H, weight=W, teacher_hidden=TEACHER, teacher_weight=TEACHER_W), beta=beta, **how
            ),
            shape(T),
        )
        for beta, how in ((0.0, {}), (0.5, BY_BLOCKS))
    ),
    *(
        Wrong(
            f"token_divergence: NaN in a teacher's row, beta {beta}",
            divergence(teacher_hidden=TEACHER.index_fill(0, torch.tensor([1]), NAN), beta=beta),
            nan_in(1, lambda beta=beta: divergence(beta=beta)),
        )
        for beta in (0.0, 0.5, 1.0)
    ),
)
OF_TOKENS = tuple(
    Wrong(f"{op}: {name}", call(**changed), message)
    for op, call in (HEADS[1], HEADS[3])
    for name, changed, message in (
        *(
            (f"beta {beta}", {"beta": beta}, f"beta: expected a number from 0 to 1, got {beta}")
            for beta in (-0.1, 2, NAN, INF)
        ),
        ("int mask", {"mask": torch.ones(T, dtype=torch.int64)}, "mask: expected bool, got torch.int64"),
        ("short mask", {"mask": torch.ones(2) > 0}, r"mask: expected shape \(tokens=3\), got \(2,\)"),
        ("mask on meta", {"mask": torch.ones(T, device="meta") > 0}, "mask: expected on cpu, got on meta"),
    )
)

# ---- topk_logprobs, topk_divergence

TOPK = (
    *(
        Wrong(
            f"topk_logprobs: k {k}",
            likeliest(k=k),
            f"k: expected a whole number from 1 to vocabulary=9, got {k}",
        )
        for k in (0, -1, 10, 2.0, None)
    ),
    Wrong("topk_logprobs: no rows", likeliest(hidden=H[:0]), of_shapes((0, 2), (0, 2))),
    Wrong("topk_logprobs: all on meta", likeliest(**meta(hidden=H, weight=W)), of_shapes((T, 2), (T, 2))),
    Wrong(
        "topk_divergence: rows of ids",
        listed(teacher_ids=IDS[:2]),
        r"teacher_ids: expected shape \(tokens=3, K\), got \(2, 2\)",
    ),
    Wrong(
        "topk_divergence: float ids",
        listed(teacher_ids=IDS.float()),
        "teacher_ids: expected int32 or int64, got torch.float32",
    ),
    Wrong(
        "topk_divergence: ids on meta",
        listed(teacher_ids=IDS.to("meta")),
        "teacher_ids: expected on cpu, got on meta",
    ),
    Wrong(
        "topk_divergence: other K",
        listed(teacher_logprobs=H),
        r"teacher_logprobs: expected shape \(tokens=3, K=2\), got \(3, 4\)",
    ),
    Wrong(
        "topk_divergence: int logprobs",
        listed(teacher_logprobs=IDS),
        "teacher_logprobs: expected a floating dtype, got torch.int32",
    ),
    *(
        Wrong(
            f"topk_divergence: id {value}",
            with_gradients(listed, teacher_ids=with_id(IDS, 2, value), **BY_BLOCKS),
            f"teacher_ids: id {value} is outside a vocabulary of 9",
            nan_in(2, listed),
        )
        for value in (V, 2**31, 2**40)
    ),
    Wrong(
        "topk_divergence: id twice",
        listed(teacher_ids=with_id(IDS, 2, 7)),
        "teacher_ids: row 2 has id 7 twice",
        finite,
    ),
    Wrong(
        "topk_divergence: zeros in a row that does not count",
        with_gradients(
            listed,
            teacher_ids=with_row(IDS, 1, 0),
            teacher_logprobs=with_row(torch.full((T, 2), -2.0), 1, 0),
            mask=torch.tensor([True, False, True]),
        ),
        finite,
    ),
    Wrong(
        "topk_divergence: NaN in a row that does not count",
        listed(
            teacher_logprobs=with_row(torch.full((T, 2), -2.0), 1, NAN),
            mask=torch.tensor([True, False, True]),
        ),
        "teacher_logprobs: expected each row to sum to a probability of at most 1, got nan in row 1",
        finite,
    ),
    *(
        Wrong(
            f"topk_divergence: logprobs {value}",
            listed(teacher_logprobs=torch.full((T, 2), value)),
            f"teacher_logprobs: expected each row to sum to a probability of at most 1, got {mass}.* in row 0",
            equals(NAN) if math.isnan(value) else finite,
        )
        for value, mass in ((2.0, "14.77"), (-0.1, "1.80"), (NAN, "nan"))
    ),
    Wrong("topk_divergence: no ids", listed(teacher_ids=IDS[:, :0], teacher_logprobs=H[:, :0]), equals(0.0)),
    Wrong(
        "topk_divergence: no rows",
        listed(hidden=H[:0], teacher_ids=IDS[:0], teacher_logprobs=H[:0, :2]),
        shape(0),
    ),
    *(
        Wrong(
            f"topk_divergence: all on meta{name}",
            listed(**meta(hidden=H, weight=W, teacher_ids=IDS, teacher_logprobs=H[:, :2]), **how),
            shape(T),
        )
        for name, how in (("", {}), (", in blocks", BY_BLOCKS))
    ),
)

CALLS = (*EVERY_HEAD, *LOGPROBS, *DIVERGENCE, *OF_TOKENS, *TOPK)
