"""The registry covers the public ops, its formulas are what the tensors say, and a Case can say what it takes."""

import random
import re
from itertools import permutations

import pytest
import torch
from burnish import kernels
from burnish.bench.cases import registry, shapes
from burnish.bench.cases.case import Case, Dims, label, leaves, make_inputs, run
from burnish.bench.cases.divergence import token_divergence_eager
from burnish.bench.cases.registry import CASES
from burnish.bench.cases.shapes import describe, letters
from burnish.bench.ops.shapes import check_dims
from burnish.model.errors import InputError
from torch.fx.experimental import _config as meta


def test_every_public_op_has_a_case():
    ops = {n for n, value in vars(kernels).items() if callable(value) and not isinstance(value, type)}
    assert ops - {"moe_route", "gives_way"} == {
        c.op for c in CASES
    }  # that one is plain torch, its own reference


def test_cases_stand_under_the_name_of_their_kernel_file():
    files = {name: file for name, file in vars(registry).items() if hasattr(file, "CASES")}
    assert sum(len(file.CASES) for file in files.values()) == len(CASES)
    for name, file in files.items():
        homes = {getattr(kernels, case.op).__module__.split(".")[-1] for case in file.CASES}
        assert homes == {name}


def test_names_are_unique():
    assert len({c.name for c in CASES}) == len(CASES)


@pytest.mark.parametrize(
    "case, dims",
    [pytest.param(c, d, id=f"{c.name}-{label(d)}") for c in CASES for d in c.bench.get("cuda", ())[:1]],
)
def test_bytes_are_each_operand_once(case: Case, dims: Dims):
    """On tensors without storage: forward reads inputs and writes outputs, backward at least rewrites the gradients."""
    tensors = make_inputs(case, dims, torch.bfloat16, "meta")
    op = case.eager if case.reads_values else case.reference
    with meta.patch(meta_nonzero_assume_all_nonzero=True):  # a loop over experts asks which rows are theirs
        outputs = run(op, case, tensors)
    moved = sum(t.nbytes for t in (*tensors.values(), *outputs.values()) if t is not None)
    if case.op == "quantize_nf4":  # whose Case returns absmax alone
        moved += dims["C"] * dims["F"] // 2
    forward, backward = case.work(dims, 2)
    assert forward.bytes == pytest.approx(moved, rel=0.02)
    assert backward.bytes >= sum(
        t.nbytes for n, t in tensors.items() if n in leaves(case, tensors) and t is not None
    )


def test_scales_touch_what_they_should():
    case = next(c for c in CASES if c.name == "rms_norm/hidden")
    torch.manual_seed(0)
    plain = make_inputs(case, case.shapes[1], torch.float32, "cpu")
    for scale, x_factor, weight_factor in ((30, 30, 1), (1e-3, 1e-3, 1e-3)):
        torch.manual_seed(0)
        scaled = make_inputs(case, case.shapes[1], torch.float32, "cpu", scale)
        for name, factor in (("x", x_factor), ("weight", weight_factor)):
            a, b = plain[name], scaled[name]
            assert a is not None and b is not None and torch.equal(a * factor, b)


# ---- a composition takes no argument that it does not read


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_an_unknown_argument_is_an_error(case: Case):
    tensors = make_inputs(case, case.shapes[0], torch.float32, "cpu")
    for name in (
        "nonsense",
        "biass",
        "teacher_biass",
        "gate_up_biass",
        "down_",
        "down",
        "weight_9",
        "absmax_",
    ):
        for op in (case.eager, case.reference, case.fused) if name not in tensors else ():
            with pytest.raises((TypeError, ValueError)):
                op(**tensors, **case.options, **{name: torch.ones(1)})


def test_half_an_adapter_is_an_error():
    hidden, weight = torch.ones(1, 2), torch.ones(3, 2)
    for half in ("lora_a", "lora_b", "teacher_lora_a", "teacher_lora_b"):
        with pytest.raises(AssertionError, match="lora_a, lora_b: expected both or neither"):
            token_divergence_eager(hidden, weight, hidden, weight, **{half: torch.ones(3, 2)})


# ---- letters, and what a shape is refused for


def of(name: str) -> Case:
    return next(c for c in CASES if c.name == name)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_all_shapes_have_the_same_letters(case: Case):
    known = letters(case)
    assert set(case.optional) <= set(known) and set(case.optional.values()) <= set(known)
    benched = [dims for shapes in case.bench.values() for dims in shapes]
    for dims in (*case.shapes, *case.empty, *case.configurations, *benched):
        assert tuple(dims) in (known, tuple(n for n in known if n not in case.optional)), dims
        assert tuple(case.check(dims)) == tuple(dims)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_every_letter_counts(case: Case):
    """An optional one that is left out has the size it says, and no letter is there for nothing."""
    dims = {letter: shapes.SIZES[letter][0] for letter in letters(case)}
    torch.manual_seed(0)
    before = make_inputs(case, dims, torch.bfloat16, "meta")
    for letter in dims:
        other = make_inputs(case, dims | {letter: shapes.SIZES[letter][2]}, torch.bfloat16, "meta")
        assert [t is None or t.shape for t in before.values()] != [
            t is None or t.shape for t in other.values()
        ]
    for letter, same in case.optional.items():
        short = {n: size for n, size in dims.items() if n != letter}
        full = make_inputs(case, dims | {letter: dims[same]}, torch.bfloat16, "meta")
        for name, t in make_inputs(case, short, torch.bfloat16, "meta").items():
            assert getattr(t, "shape", None) == getattr(full[name], "shape", None)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_its_own_shapes_are_taken_in_any_order(case: Case):
    for dims in (*case.shapes, *case.empty, *case.configurations):
        mixed = dict(sorted(dims.items()))
        assert list(check_dims(case, mixed, torch.float32, "cpu").items()) == list(dims.items())
        torch.manual_seed(0)
        tensors = case.inputs(dims, torch.float32, "meta")
        assert [*map(str, tensors.values())] == [
            *map(str, case.inputs(mixed, torch.float32, "meta").values())
        ]


def wrong_and_odd(case: Case) -> list[Dims]:
    rng, base = random.Random(case.name), min(case.shapes, key=lambda dims: sum(dims.values()))
    sizes = (-1, 0, 2, 7, 1 << 20, 10**12, 10**30)
    one = [base | {letter: size} for letter in base for size in (*sizes, base[letter] + 1)]
    some = [{letter: rng.choice((1, 2, 3, 4, 5, 8, 17)) for letter in base} for _ in range(8)]
    missing = [{n: size for n, size in base.items() if n != letter} for letter in base]
    return [*one, *some, *missing, base | {"X": 3}, base | {"t": 3}, {}]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_a_shape_is_taken_and_runs_or_is_refused_in_a_sentence(case: Case):
    taken = 0
    for dims in wrong_and_odd(case):
        try:
            checked = check_dims(case, dims, torch.float32, "cpu")
        except InputError as error:
            assert str(error).startswith(case.name) and "\n" not in str(error)
            continue
        if max(dims.values()) > 1000:
            continue
        taken += 1
        case.work(checked, 2)
        tensors = make_inputs(case, case.check(checked), torch.float32, "cpu")
        for op in (case.fused, case.eager, case.reference):
            run(op, case, tensors)
    assert taken > 3


@pytest.mark.parametrize(
    "name, wrong, sentence",
    [
        ("swiglu/elementwise", {"F": None}, "expected sizes of B T F, got no F"),
        ("swiglu/elementwise", {"S": 4}, "expected sizes of B T F, got S=4"),
        ("flash_attention/causal", {"X": 4}, "expected sizes of B T [S] H G D, got X=4"),
        ("swiglu/elementwise", {"T": 0}, "expected a whole number from 1 to 281474976710656 for T, got 0"),
        ("swiglu/elementwise", {"B": -1}, "expected a whole number from 0 to 281474976710656 for B, got -1"),
        (
            "swiglu/elementwise",
            {"B": 1.5},
            "expected a whole number from 0 to 281474976710656 for B, got 1.5",
        ),
        (
            "flash_attention/causal",
            {"H": 3, "G": 2},
            "q: expected a multiple of the 2 key/value heads, got 3",
        ),
        ("flash_attention/causal", {"D": 257}, "q: expected a head dimension of 1 to 256, got 257"),
        ("flash_attention/shared prompt", {"P": 99}, "P: expected at most T=45, got 99"),
        ("moe_mlp/swiglu", {"K": 4}, "K: expected at most E=3, got 4"),
        ("topk_divergence/beta 0.0", {"K": 1032}, "K: expected at most V=1031, got 1032"),
        ("token_logprobs/support", {"K": 102}, "K: expected at most V=101, got 102"),
        ("apply_rope/half", {"D": 35}, "D: expected an even size, got 35"),
        ("apply_rope/partial", {"rotary": 9}, "rotary: expected an even size, got 9"),
        ("apply_rope/partial", {"rotary": 36}, "cos: expected at most D/2 = 17 columns, got 18"),
        ("nf4_linear/bias", {"C": 3, "F": 5}, "C, F: expected an even number of weights, got C F = 15"),
        ("moe_mlp/4-bit experts, adapters", {"F": 47}, "expected whole blocks of 64 weights in each expert"),
    ],
)
def test_a_refusal_names_what_was_expected(name: str, wrong: dict, sentence: str):
    case = of(name)
    dims = case.shapes[1 % len(case.shapes)] | wrong
    with pytest.raises(InputError, match=re.escape(sentence)):
        check_dims(case, {n: size for n, size in dims.items() if size is not None}, torch.float32, "cpu")


def test_what_does_not_fit_is_refused_before_it_is_made(monkeypatch):
    with pytest.raises(
        InputError, match=r"at B=1 T=1000000000 C=1000000: expected operands of at most [\d.,]+ GB"
    ):
        check_dims(of("rms_norm/hidden"), {"B": 1, "T": 10**9, "C": 10**6}, torch.bfloat16, "cpu")
    with pytest.raises(InputError, match="expected tensors whose elements 64 bits can count"):
        check_dims(of("rms_norm/hidden"), {"B": 1, "T": 10**12, "C": 10**12}, torch.bfloat16, "cpu")

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5_000_000_000, 80_000_000_000))
    fits, large = ({"B": 1, "T": t, "F": 1 << 14} for t in (1 << 16, 1 << 17))
    check_dims(of("swiglu/elementwise"), fits, torch.bfloat16, "cuda")
    sentence = "expected operands of at most 5.0 GB, the free memory of cuda, got 8.6 GB"
    with pytest.raises(InputError, match=re.escape(sentence)):
        check_dims(of("swiglu/elementwise"), large, torch.bfloat16, "cuda")
    monkeypatch.setattr(
        "burnish.bench.ops.shapes._free_bytes", lambda device: None
    )  # a system that does not tell
    check_dims(of("swiglu/elementwise"), large, torch.bfloat16, "cpu")


# ---- what it is called with


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_a_description_is_what_the_inputs_are(case: Case, dtype: torch.dtype):
    dims = case.shapes[1 % len(case.shapes)]
    found = describe(case, dims, dtype)
    tensors = make_inputs(case, dims, dtype, "cpu")
    assert {o.name: (o.shape, o.dtype) for o in found.arguments} == {
        n: (tuple(t.shape), t.dtype) for n, t in tensors.items() if t is not None
    }
    assert [o.name for o in found.arguments if o.gradient] == leaves(case, tensors)
    assert found.options == {n: None for n, t in tensors.items() if t is None} | case.options
    assert {o.name: (o.shape, o.dtype) for o in found.outputs} == {
        n: (tuple(t.shape), t.dtype) for n, t in run(case.fused, case, tensors).items()
    }


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_axes_are_told_by_letters(case: Case):
    """Letters give the lengths at every other shape; numbers are left for tables, and for what values decide."""
    found = describe(case, case.shapes[0], torch.float32)
    for dims in (*case.shapes, *case.configurations):
        again = describe(case, dims, torch.float32)
        for operand in (*again.arguments, *again.outputs):
            if operand.name not in ("cu_seqlens", "parents"):
                optional = {} if set(case.optional) & set(dims) else case.optional
                assert operand.axes == tuple(optional.get(axis, axis) for axis in found.axes(operand.name))
                assert operand.shape == tuple(length(axis, dims) for axis in operand.axes)


def length(axis: str, dims: Dims) -> int:
    """ "2 F", "B + 1", "C F / 64", or "16"."""
    product, over = (*axis.split(" / "), "1")[:2]
    factors, plus = (*product.split(" + "), "0")[:2]
    n = int(plus)
    product = 1
    for factor in factors.split():
        product *= int(factor) if factor.isdigit() else dims[factor]
    return -(-(n + product) // int(over))


def test_no_two_letters_are_alike():
    """No size of one is, at all three shapes, a form of another's: 2 P would be taken for D."""
    for a, b in permutations(shapes.SIZES, 2):
        for form in shapes.FORMS:
            assert shapes.SIZES[a] != tuple(length(form.format(b), {b: n}) for n in shapes.SIZES[b]), (a, b)


def test_descriptions_of_large_shapes_take_no_memory(monkeypatch):
    monkeypatch.setattr("burnish.bench.ops.shapes._free_bytes", lambda device: None)
    for case in CASES:
        for dims in case.bench.get("cuda", ())[:1]:
            found = describe(case, check_dims(case, dims, torch.bfloat16, "cpu"), torch.bfloat16)
            assert all(len(line) < 120 for line in found.text().splitlines())


def test_a_description_reads_as_a_table():
    case = of("moe_mlp/clamped, biases")
    found = describe(case, case.bench.get("cuda", case.shapes)[-1], torch.bfloat16)
    assert found.axes("gradient of gate_up") == ("E", "2 F", "C") and found.axes("output 9") == ()
    assert found.text().splitlines() == [
        "x             (T, C)       (19, 20)     bfloat16  gradient",
        "gate_up       (E, 2 F, C)  (3, 70, 20)  bfloat16  gradient",
        "down          (E, C, F)    (3, 20, 35)  bfloat16  gradient",
        "weights       (T, K)       (19, 2)      float32   gradient",
        "indices       (T, K)       (19, 2)      int64",
        "gate_up_bias  (E, 2 F)     (3, 70)      bfloat16  gradient",
        "down_bias     (E, C)       (3, 20)      bfloat16  gradient",
        "options       activation='clamped_swiglu'",
        "output 0      (T, C)       (19, 20)     bfloat16",
    ]
