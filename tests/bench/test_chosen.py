"""Ops and shapes by name: what a command line takes, and the one sentence for all else."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from burnish.bench import command
from burnish.bench.cases.case import label
from burnish.bench.cases.registry import CASES
from burnish.bench.cases.shapes import letters
from burnish.bench.ops.chosen import chosen, expected, left_out, read_shape, shaped
from burnish.bench.ops.listing import details, listing
from burnish.bench.ops.speed import Config, check, main, shapes_of
from burnish.kernels._chip import INTERPRET
from burnish.model.errors import InputError

pytestmark = pytest.mark.skipif(INTERPRET, reason="interpreted kernels have no speed")


def names_of(*names: str) -> list[str]:
    return [case.name for case in chosen(CASES, names)]


def test_an_op_is_all_its_cases_and_a_case_is_itself():
    assert names_of("rms_norm/heads") == ["rms_norm/heads"]
    assert set(names_of("rms_norm")) == {case.name for case in CASES if case.op == "rms_norm"}
    assert names_of("swiglu", "rms_norm/heads", "swiglu") == ["swiglu/elementwise", "rms_norm/heads"]
    assert names_of() == [case.name for case in CASES]


@pytest.mark.parametrize(
    "name, near", [("rms_nrom", "rms_norm"), ("flash_attention/casual", "flash_attention/causal")]
)
def test_an_op_that_is_not_there_is_told_what_is_near(name, near):
    with pytest.raises(InputError, match=rf"op: expected one of --list, such as .*{near}.*, got {name}"):
        chosen(CASES, [name])


def shapes(name: str, *texts: str) -> list[tuple[str, dict[str, int]]]:
    found = shaped(chosen(CASES, [name]), [name], texts, torch.float32, "cpu")
    return [(case.name, dims) for case, dims in found]


def test_a_shape_is_of_the_cases_with_its_letters():
    assert shapes("rms_norm", "B=1 T=300 C=777") == [("rms_norm/hidden", {"B": 1, "T": 300, "C": 777})]
    assert shapes("rms_norm", "B=1 T=2 H=3 D=4") == [("rms_norm/heads", {"B": 1, "T": 2, "H": 3, "D": 4})]
    assert shapes("rms_norm/unit offset", "T=3, B=1, C=7")[0][0] == "rms_norm/unit offset"
    assert list(shapes("rms_norm", "C=7 T=3 B=1")[0][1]) == ["B", "T", "C"]


def test_every_shape_goes_to_the_op_that_has_its_letters():
    names = ["rms_norm", "swiglu"]
    found = shaped(chosen(CASES, names), names, ["B=1 T=3 C=4", "B=1 T=3 F=4"], torch.float32, "cpu")
    assert [(case.name, label(dims)) for case, dims in found] == [
        ("rms_norm/hidden", "B=1 T=3 C=4"),
        ("swiglu/elementwise", "B=1 T=3 F=4"),
    ]
    with pytest.raises(InputError, match="expected one of swiglu's letters"):
        shaped(chosen(CASES, names), names, ["B=1 T=3 C=4"], torch.float32, "cpu")


def test_a_shape_that_has_lost_its_quotes_is_one_shape():
    assert shapes("rms_norm", "B=1", "T=300", "C=777") == shapes("rms_norm", "B=1 T=300 C=777")


def test_families_that_are_left_out_are_told():
    found = shaped(chosen(CASES, ["rms_norm"]), ["rms_norm"], ["B=1 T=3 C=4"], torch.float32, "cpu")
    assert left_out(CASES, ["rms_norm"], found) == ["rms_norm/unit offset"]
    assert left_out(CASES, ["rms_norm/hidden"], found) == []


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_every_case_takes_its_own_shapes_by_name(case):
    """Written as a person writes them, in another order."""
    for dims in case.shapes:
        text = " ".join(f"{letter}={size}" for letter, size in reversed(dims.items()))
        assert shapes(case.name, text) == [(case.name, dims)]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "  ",
        "B",
        "B=",
        "=3",
        "B=x",
        "B=1.5",
        "B=1 B=2",
        "B=1e3",
        "300x777",
        "B=１",
        "B=--1",
        "B=" + "9" * 30,
        "B:1",
    ],
)
def test_a_text_that_is_no_shape_is_one_sentence(text):
    with pytest.raises(InputError, match=r"^--shape.*expected") as refused:
        read_shape(text)
    assert len(str(refused.value)) < 200 and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "name, text",
    [
        *(
            ("rms_norm", "B=1 T=3"),
            ("rms_norm", "B=1 T=3 C=4 D=5"),
            ("rms_norm", "T=0 B=1 C=-1"),
            ("rms_norm", "B=1 T=0 C=8"),
        ),
        *(("swiglu", "B=1 T=3 C=4"), ("flash_attention/causal", "B=1 T=4 S=4 H=3 G=2 D=8")),
        *(("moe_mlp/swiglu", "T=4 C=8 F=8 E=2 K=3"), ("rms_norm", "B=1 T=1000000000 C=1000000")),
        *(
            ("apply_rope/partial", "B=1 T=4 H=2 G=1 D=8 rotary=10"),
            ("token_logprobs", "T=100000000 C=100000 V=1000000"),
        ),
    ],
)
@pytest.mark.parametrize("plain", [True, False])
def test_a_shape_that_an_op_cannot_take_is_one_sentence(name, text, plain, capsys):
    assert command.main([name, "--shape", text], plain) == 1
    err = capsys.readouterr().err.strip()
    door = "python -m burnish.bench" if plain else "burnish bench"
    assert err.startswith(f"{door}: ") and "\n" not in err and len(err) < 500 and "Traceback" not in err


def test_letters_that_are_missing_are_told():
    with pytest.raises(
        InputError, match=re.escape("letters of rms_norm: B T C (hidden, unit offset) or B T H D (heads)")
    ):
        shapes("rms_norm", "B=1 T=3")
    assert expected(chosen(CASES, ["swiglu"]), "swiglu") == "B T F (elementwise)"


def test_the_default_is_every_benchmark_shape():
    found = shapes_of(Config(), "cpu")
    assert len(found) == sum(len(case.bench.get("cpu", ())) for case in CASES)


def test_the_list_names_every_case_and_details_every_argument(capsys):
    assert main(Config(list=True)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(any(line.startswith(case.name) for line in lines) for case in CASES)
    details = listing(CASES, ["rms_norm/hidden"], "cpu")
    assert all(word in details for word in ("x", "weight", "gradient", "(B, T, C)", "--peers: torch.compile"))
    assert "burnish.kernels.rms_norm(x, weight, eps=1e-06, *, unit_offset=False)" in details
    assert "so the last query sees the last key" in listing(
        CASES, ["flash_attention/causal"], "cpu"
    )  # the op's own docstring
    assert listing(CASES, ["rms_norm"], "cpu").count("your function is called") == 3


@pytest.mark.parametrize(
    "name, meanings",
    [
        ("swiglu", "B: batch; T: tokens; F: feed-forward size"),
        ("rms_norm/heads", "B: batch; T: tokens; H: heads; D: head dimension"),
        ("quantize_nf4", "C: input features; F: output features"),
    ],
)
def test_the_list_explains_the_letters_of_an_op(name, meanings):
    assert meanings in listing(CASES, [name], "cpu").splitlines()
    for case in CASES:
        (line,) = [x for x in details(case).splitlines() if x.startswith(f"{letters(case)[0]}: ")]
        assert [x.split(": ")[0] for x in line.split("; ")] == list(letters(case))


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ({"shape": ("B=1",)}, "--shape: expected an op before it"),
        ({"check_only": True, "rounds": 9}, "--rounds: expected no --check-only"),
        ({"against": ("mine.py:f",)}, "--against: expected an op before it"),
        ({"resume": True}, "--resume: expected --json FILE or --keep"),
        ({"json": "x", "keep": True}, "--keep: expected no --json"),
        ({"keep": True, "check_only": True}, "--keep: expected whole passes"),
        ({"keep": True, "forward_only": True}, "--keep: expected whole passes"),
        ({"json": Path("x"), "csv": Path("x")}, "--csv: expected another file than --json x"),
        ({"commit": "abc"}, "--commit: expected --json FILE or --keep"),
        ({"list": True, "peers": True}, "--list: expected no --peers"),
    ],
)
def test_flags_that_contradict_one_another_are_refused(flags, sentence):
    with pytest.raises(InputError, match=sentence):
        check(Config(**flags))


def test_a_letter_too_many_is_found_where_the_check_is_blind(monkeypatch):
    """The planted fault: letters that are read from the shape itself accept whatever is given."""
    from burnish.bench.ops import chosen as module

    monkeypatch.setattr(module, "fits", lambda case, given: True)
    wrong = replace(CASES[0], fused=CASES[0].fused)
    assert not set("XYZ") & set(letters(wrong))
    with pytest.raises(InputError):  # the op's own check is the second net
        shapes("rms_norm/hidden", "X=1 Y=2 Z=3")
