"""Rules that stand once for all ops: the device that a launch runs on, and what autocast gives an operand."""

import inspect
import math
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from importlib import import_module
from pkgutil import iter_modules
from threading import Event
from types import SimpleNamespace

import burnish.kernels
import numpy as np
import pytest
import torch
from burnish.bench.cases.case import Case, Dims, make_inputs, make_upstream, run, tensor
from burnish.bench.cases.registry import CASES
from burnish.kernels import flash_attention, glu, sample_tokens, topk_logprobs
from burnish.kernels._chip import INTERPRET, autocast_dtype, without_autocast
from burnish.kernels._op import on_its_device
from torch import Tensor


def smallest(case: Case) -> Dims:
    return min(case.shapes, key=lambda dims: math.prod(dims.values()))


# ---- the device guard


class OnGpu(Tensor):
    """A tensor of a CPU that says it is on a GPU."""

    index = 1

    @property
    def is_cuda(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return True

    @property
    def device(self) -> torch.device:  # pyright: ignore[reportIncompatibleVariableOverride]
        return torch.device("cuda", self.index)

    def get_device(self) -> int:
        return self.index


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stands under torch.cuda.device: which device is current, and how often another one was asked for."""
    driver = SimpleNamespace(current=0, exchanges=0)

    def exchange(index: int) -> int:
        before, driver.current = driver.current, index
        driver.exchanges += 1
        return before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: driver.current)
    monkeypatch.setattr(torch.cuda, "_exchange_device", exchange)
    monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", exchange)
    return driver


x, y = torch.zeros(1), torch.zeros(1).as_subclass(OnGpu)


LISTS = (None, [None, y], [y]), ([], "a", [1, 2], y)


@pytest.mark.parametrize(
    "arguments, at",
    [((y, 2.0), 1), ((None, 3, y), 1), *((lists, 1) for lists in LISTS), ((x,), 0), ((None, 1.0), 0)],
)
def test_a_launch_runs_on_the_device_of_its_tensors(driver, arguments, at):
    launch = on_its_device(lambda *given: (driver.current, given))
    current, given = launch(*arguments)
    assert current == at and given == arguments and driver.current == 0
    assert driver.exchanges == 2 * at


def test_the_current_device_costs_no_exchange(driver):
    driver.current = 1
    assert on_its_device(lambda _: driver.current)(y) == 1 and not driver.exchanges


def test_the_device_is_restored_after_an_exception(driver):
    def launch(_):
        raise RuntimeError(f"on {driver.current}")

    with pytest.raises(RuntimeError, match="on 1"):
        on_its_device(launch)(y)
    assert driver.current == 0


@pytest.fixture
def launches_are_guarded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch fails that has no frame of `on_its_device` below it."""
    if not INTERPRET:
        pytest.skip("it is the interpreter that sees launches")
    from triton.runtime.interpreter import GridExecutor

    execute = GridExecutor.__call__

    def checked(self, *args, **kwargs):
        below = {frame.function for frame in inspect.stack(0)}
        assert "guarded" in below, f"{self.fn.__name__} is launched outside of the guard"
        return execute(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", checked)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_launch_is_guarded(case, launches_are_guarded):
    tensors = make_inputs(case, smallest(case), torch.float32, "cpu")
    run(case.fused, case, tensors, make_upstream(case, tensors))


def test_a_launch_outside_of_the_guard_is_found(launches_are_guarded):
    with pytest.raises(AssertionError, match="_glu_fwd is launched outside"):
        glu._forward(torch.ones(2, 3), torch.ones(2, 3), 1.0, 0.0, None, 0.0)


# ---- one device


def arguments_of(case: Case) -> set[str]:
    """The names that a message may begin with: the op's own, and the tensors that an NF4Weight is made of."""
    ops = (
        (case.op, "lora_linear") if case.op == "lora_linears" else (case.op,)
    )  # which it calls a layer's operands by
    named = {name for op in ops for name in inspect.signature(getattr(burnish.kernels, op)).parameters}
    return named | {part.name for part in fields(burnish.kernels.NF4Weight)}


TENSORS = [
    pytest.param(case, name, id=f"{case.name}-{name}")
    for case in CASES
    for name, given in make_inputs(case, smallest(case), torch.float32, "cpu").items()
    if given is not None and name != "like"  # which only says what a Case multiplies out for
]


@pytest.mark.parametrize("case, name", TENSORS)
def test_tensors_on_two_devices_are_named(case, name):
    """Each tensor in turn is elsewhere: on a GPU its address would be read as one of the other device."""
    tensors = make_inputs(case, smallest(case), torch.float32, "cpu")
    elsewhere = {**tensors, name: tensor(tensors, name).to("meta")}
    if len([t for t in tensors.values() if t is not None]) == 1:
        return  # it is the only one
    with pytest.raises(ValueError, match=r"expected .*\bon (meta|cpu), got .*\bon (meta|cpu)") as raised:
        case.fused(**elsewhere, **case.options)
    named = re.split(r"[.\[: ]", str(raised.value))[0]
    assert named in arguments_of(case), f"{named} is no argument of {case.op}"


# ---- autocast


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int8]
)
@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16])
def test_autocast_gives_an_operand_what_torch_gives_it(dtype, to):
    x = torch.ones(2, 2, dtype=dtype)
    assert autocast_dtype(x) == dtype
    with torch.autocast("cpu", dtype=to):
        assert autocast_dtype(x) == (x @ x).dtype
        assert autocast_dtype(x.to("meta")) == dtype  # which has no autocast
        with torch.autocast("cpu", enabled=False):
            assert autocast_dtype(x) == dtype


FIRST = {case.op: case for case in reversed(CASES)}
# under the interpreter the other Cases of an op are slow
ONE_EACH = [
    pytest.param(
        case, marks=pytest.mark.slow if INTERPRET and case is not FIRST[case.op] else [], id=case.name
    )
    for case in CASES
]

CAST = {  # operands that an op casts itself, as torch casts those of a matmul; others are their caller's
    "lora_linear": ("x",),
    "lora_linears": ("x",),
    "nf4_linear": ("x",),
    "token_logprobs": ("hidden",),
    "token_divergence": ("hidden", "teacher_hidden"),
    "topk_logprobs": ("hidden",),
    "topk_divergence": ("hidden",),
}


@pytest.mark.parametrize("case", ONE_EACH)
def test_an_op_casts_its_products_or_nothing_under_autocast(case, device):
    """Bit for bit: on both paths an op returns what it would without autocast, its operands cast before."""
    tensors = make_inputs(case, smallest(case), torch.float32, device)
    expected = run(
        case.fused, case, {n: t.half() if n in CAST.get(case.op, ()) else t for n, t in tensors.items()}
    )
    with torch.autocast(device, torch.float16):
        found = run(case.fused, case, tensors)
    for name in expected:
        assert found[name].dtype == expected[name].dtype, name
        assert torch.equal(found[name], expected[name]), name


def test_autocast_of_a_thread_is_left_alone_by_another():
    """Both are inside of the same function when the first leaves it."""
    inside, leave = Event(), Event()

    @without_autocast
    def compute(wait: bool) -> bool:
        inside.set()
        return torch.is_autocast_enabled("cpu") or (wait and not leave.wait(20))

    def other() -> tuple[bool, bool]:
        return compute(True), torch.is_autocast_enabled("cpu")

    with ThreadPoolExecutor(1) as pool, torch.autocast("cpu", torch.bfloat16):
        plain = pool.submit(other)
        assert inside.wait(20) and not compute(False)
        leave.set()
        assert plain.result() == (False, False) and torch.is_autocast_enabled("cpu")


def test_no_op_shares_the_state_of_its_autocast():
    names = [info.name for info in iter_modules(burnish.kernels.__path__)]
    functions = [f for name in names for f in vars(import_module(f"burnish.kernels.{name}")).values()]
    codes = [getattr(f, "__code__", None) for f in functions]
    shared = [code for code in codes if code is not None and code.co_name == "decorate_autocast"]
    assert not shared, "without_autocast is safe among threads, torch.autocast as a decorator is not"


# ---- numbers


@pytest.mark.parametrize("whole", [int, np.int32, np.int64])
def test_whole_numbers_may_be_of_numpy(whole, device):
    """A number of ids or of bytes that was read from an array."""
    x, noise = torch.randn(3, 5, device=device), torch.rand(3, dtype=torch.float64, device=device)
    assert sample_tokens(x, noise, top_k=whole(2))[0].shape == (3,)
    assert topk_logprobs(x, x, whole(2), memory_budget=whole(100))[0].shape == (3, 2)
    q = x[None, :, None, :4]
    assert flash_attention(q, q, q, window=whole(2)).shape == (1, 3, 1, 4)
