"""Ops whose arguments are records: what make_op tells torch of them, and the gradients that come back by name."""

from typing import Any, NamedTuple

import pytest
import torch
from burnish.kernels._layout import Layout, hints_of
from burnish.kernels._op import like_saved, make_op, make_path
from torch import Tensor


class Scale(NamedTuple):
    factor: Tensor
    shift: Tensor | None
    power: float


class Layer(NamedTuple):
    weight: Tensor
    bias: Tensor | None
    scale: float
    sizes: list[int] = []  # noqa: RUF012


class Inputs(NamedTuple):
    x: Tensor
    scale: Scale
    name: str


class ScaleGradients(NamedTuple):
    x: Tensor | None
    scale_factor: Tensor | None
    scale_shift: Tensor | None


def scaled(x: Tensor, scale: Scale, name: str) -> tuple[Tensor, Tensor]:
    """power x factor + shift, and a statistic without a gradient."""
    y = scale.power * x * scale.factor
    return (y if scale.shift is None else y + scale.shift), x.detach().sum(-1)


def scaled_shapes(x, scale, name):
    return torch.empty_like(x), x.new_empty(x.shape[:-1])


def scaled_save(outputs, x, scale, name):
    return Inputs(x, scale, name)


def scaled_backward(saved: Inputs, needs: Any, dy: Tensor) -> ScaleGradients:
    x, (factor, shift, power), name = saved
    assert name == "kept", "numbers and texts come back as they were"
    dx = power * dy * factor if needs.x else None
    return ScaleGradients(dx, power * dy * x, dy.clone() if shift is not None else None)


def scaled_gradients(saved, needs, dy):
    shift = None if saved.scale.shift is None else torch.empty_like(saved.scale.shift)
    return ScaleGradients(
        torch.empty_like(saved.x) if needs.x else None, torch.empty_like(saved.scale.factor), shift
    )


class Named(NamedTuple):
    function: Tensor
    make: Scale


class NamedGradient(NamedTuple):
    function: Tensor | None


class Layers(NamedTuple):
    x: Tensor
    layers: list[Layer]


class LayersGradients(NamedTuple):
    x: Tensor | None
    layers_weight: list[Tensor] | None
    layers_bias: list[Tensor] | None


def applied(x: Tensor, layers: list[Layer]) -> tuple[list[Tensor], Tensor]:
    """Each x W^T scale + bias, and a statistic."""
    outs = [layer.scale * x @ layer.weight.T for layer in layers]
    outs = [out if b.bias is None else out + b.bias for out, b in zip(outs, layers, strict=True)]
    return outs, x.detach().sum(-1)


def applied_shapes(x, layers):
    return [x.new_empty(x.shape[0], layer.weight.shape[0]) for layer in layers], x.new_empty(x.shape[0])


def applied_save(outputs, x, layers):
    return Layers(x, layers)


def applied_backward(saved: Layers, needs: Any, douts: list[Tensor]) -> LayersGradients:
    x, layers = saved
    pairs = list(zip(douts, layers, strict=True))
    dx = sum(layer.scale * dout @ layer.weight for dout, layer in pairs) if needs.x else None
    dws = [layer.scale * dout.T @ x for dout, layer in pairs] if needs.layers_weight else None
    dbs = [dout.sum(0) for dout in douts] if needs.layers_bias else None
    return LayersGradients(dx, dws, dbs)  # pyright: ignore[reportArgumentType]


SCALED = make_op("test_scaled", scaled, scaled_shapes, scaled_save, scaled_backward, scaled_gradients)
APPLIED = make_op("test_applied", applied, applied_shapes, applied_save, applied_backward, like_saved)


def compare(call, reference, leaves: list[Tensor]) -> None:
    """The same results and gradients; None where nothing depends on a leaf."""
    found = torch.autograd.grad(call(), leaves, allow_unused=True)
    expected = torch.autograd.grad(reference(), leaves, allow_unused=True)
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b)


# ---- laid out flat


def test_a_record_is_laid_out_flat_and_back():
    layout = Layout(hints_of(applied) | hints_of(scaled))
    assert layout.schema == (
        "Tensor x, Tensor[] layers_weight, Tensor?[] layers_bias, float[] layers_scale, SymInt[] layers_sizes, "
        "Tensor scale_factor, Tensor? scale_shift, float scale_power, str name"
    )
    layers = [Layer(torch.zeros(1), None, 1.0, [3, 4]), Layer(torch.ones(1), torch.ones(2), 2.0)]
    arguments = (torch.zeros(2), layers, Scale(torch.ones(3), None, 2.0), "kept")
    flat = layout.flat(*arguments)
    assert flat[2:5] == ([None, layers[1].bias], [1.0, 2.0], [2, 3, 4, 0]) and len(flat) == 9
    assert layout.nested(*flat) == arguments


def test_an_argument_may_have_any_name():
    def forward(function: Tensor, make: Scale) -> Tensor:
        return function * make.factor

    def backward(saved: Named, needs: Any, dy: Tensor) -> NamedGradient:
        return NamedGradient(dy * saved.make.factor)

    op = make_op(
        "test_named", forward, lambda x, _: torch.empty_like(x), lambda _, *inputs: Named(*inputs), backward
    )
    x, scale = torch.randn(3, requires_grad=True), Scale(torch.randn(3), None, 1.0)
    torch.testing.assert_close(torch.autograd.grad(op(x, scale).sum(), x)[0], scale.factor)
    assert Layout(hints_of(forward)).nested(x, *scale) == (x, scale)


def test_two_records_of_one_name_are_found():
    """The generated functions know a record by its name."""

    class Other(NamedTuple):
        factor: Tensor

    Other.__name__ = "Scale"
    with pytest.raises(AssertionError, match="two records are named Scale"):
        Layout({"a": Scale, "b": Other})


def test_an_argument_of_another_type_is_found_when_the_op_is_made():
    def forward(x: Tensor, table: dict[str, Tensor]) -> Tensor:
        raise AssertionError

    with pytest.raises(KeyError):
        make_op("test_wrong", forward, forward)


# ---- gradients


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("how", ["eager", "graph"])
def test_a_record_has_the_gradients_of_its_tensors(how, shifted):
    x, factor = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    shift = torch.randn(3, 4, requires_grad=True) if shifted else None

    def call(x, factor, shift):
        return SCALED(x, Scale(factor, shift, 3.0), "kept")[0].sin().sum()

    op = torch.compile(call, fullgraph=True, backend="aot_eager") if how == "graph" else call
    reference = lambda: scaled(x, Scale(factor, shift, 3.0), "kept")[0].sin().sum()
    leaves = [t for t in (x, factor, shift) if t is not None]
    compare(lambda: op(x, factor, shift), reference, leaves)


@pytest.mark.parametrize("biases", ["none", "all"])
@pytest.mark.parametrize("frozen", ["nothing", "x", "one weight", "all weights"])
@pytest.mark.parametrize("how", ["eager", "graph"])
def test_a_list_of_records_has_the_gradients_of_its_tensors(how, frozen, biases):
    x = torch.randn(3, 4, requires_grad=frozen != "x")
    weights = [torch.randn(5, 4), torch.randn(2, 4)]
    for i, weight in enumerate(weights):
        weight.requires_grad_(frozen != "all weights" and (frozen, i) != ("one weight", 0))
    given = [torch.randn(len(w), requires_grad=True) for w in weights] if biases == "all" else [None, None]

    def layers(weights, biases):
        return [Layer(w, b, s) for w, b, s in zip(weights, biases, (2.0, 3.0), strict=True)]

    def call(x, weights, biases):
        return sum(out.sin().sum() for out in APPLIED(x, layers(weights, biases))[0])

    op = torch.compile(call, fullgraph=True, backend="aot_eager") if how == "graph" else call
    reference = lambda: sum(out.sin().sum() for out in applied(x, layers(weights, given))[0])
    leaves = [t for t in (x, *weights, *given) if t is not None and t.requires_grad]
    compare(lambda: op(x, weights, given), reference, leaves)


def test_a_list_that_is_partly_none_has_its_gradients_or_raises():
    """torch.library would take it in a graph for no list of tensors, and pass no gradient on."""
    x, weights = torch.randn(3, 4, requires_grad=True), [torch.randn(5, 4, requires_grad=True) for _ in "ab"]
    bias = torch.randn(5, requires_grad=True)

    def call(x, weights, bias):
        layers = [Layer(weights[0], bias, 2.0), Layer(weights[1], None, 3.0)]
        return sum(out.sin().sum() for out in APPLIED(x, layers)[0])

    fake = torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True)
    with fake, pytest.raises(NotImplementedError, match="got some of each"):
        call(x, weights, bias)


def test_a_loss_of_one_output_of_a_list():
    x, weights = torch.randn(3, 4, requires_grad=True), [torch.randn(5, 4, requires_grad=True) for _ in "ab"]
    layers = [Layer(w, None, 2.0) for w in weights]
    dx, dw = torch.autograd.grad(APPLIED(x, layers)[0][1].sum(), (x, weights[1]))
    torch.testing.assert_close((dx, dw), (2 * weights[1].sum(0).expand(3, 4), 2 * x.sum(0).expand(5, 4)))


def test_what_has_no_gradient_has_none():
    x, factor = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
    y, statistic = SCALED(x, Scale(factor, None, 3.0), "kept")
    assert y.requires_grad and not statistic.requires_grad
    outs, statistic = APPLIED(x, [Layer(torch.randn(5, 4), None, 2.0)])
    assert outs[0].requires_grad and not statistic.requires_grad
    assert not SCALED(factor, Scale(factor, None, 3.0), "kept")[0].requires_grad
    with torch.no_grad():
        assert not SCALED(x, Scale(factor, None, 3.0), "kept")[0].requires_grad


def test_a_gradient_that_a_backward_forgets_is_found():
    """The controls of the comparison above: a field dropped, and two that changed places."""

    def forgetful(saved: Inputs, needs: Any, dy: Tensor) -> ScaleGradients:
        return scaled_backward(saved, needs, dy)._replace(scale_factor=None)

    def swapped(saved: Inputs, needs: Any, dy: Tensor) -> ScaleGradients:
        right = scaled_backward(saved, needs, dy)
        return right._replace(x=right.scale_factor, scale_factor=right.x)

    for i, wrong in enumerate((forgetful, swapped)):
        op = make_op(f"test_wrong_{i}", scaled, scaled_shapes, scaled_save, wrong, scaled_gradients)
        x, factor = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
        scale = Scale(factor, None, 3.0)
        with pytest.raises(AssertionError):
            compare(
                lambda op=op, x=x, scale=scale: op(x, scale, "kept")[0].sum(),
                lambda x=x, scale=scale: scaled(x, scale, "kept")[0].sum(),
                [x, factor],
            )


# ---- what torch is told


@pytest.mark.parametrize("shifted", [False, True])
def test_registration_of_a_record(shifted):
    x, factor, shift = (torch.randn(3, 4, requires_grad=True) for _ in range(3))
    arguments = (x, factor, shift if shifted else None, 3.0, "kept")
    torch.library.opcheck(torch.ops.burnish.test_scaled.default, arguments)


@pytest.mark.parametrize("biases", ["none", "all"])
def test_registration_of_a_list_of_records(biases):
    x, *weights = (torch.randn(3, 4, requires_grad=True) for _ in range(3))
    given = [torch.randn(3, requires_grad=True) for _ in weights] if biases == "all" else [None, None]
    arguments = (x, weights, given, [2.0, 3.0], [2, 3, 4, 0])
    torch.library.opcheck(torch.ops.burnish.test_applied.default, arguments)


@pytest.mark.parametrize("needs", [[True, False, False], [False, True, False], [False, True, True]])
def test_a_gradient_that_nobody_needs_is_empty(needs):
    """It is what torch was told, also where a backward makes it nevertheless."""

    def gradients(saved: Inputs, needs: Any, dy: Tensor) -> ScaleGradients:
        return scaled_backward(saved, needs._replace(x=True), dy)

    make_op("test_unneeded", scaled, scaled_shapes, scaled_save, gradients, like_saved)
    op = torch.ops.burnish.test_unneeded_backward.default
    arguments = (*(torch.randn(3, 4) for _ in range(3)), 3.0, "kept", torch.randn(3, 4), needs)
    assert [grad.numel() > 0 for grad in op(*arguments)] == needs
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


def test_a_backward_that_is_no_op_is_seen_through():
    op = make_op("test_composite", scaled, scaled_shapes, scaled_save, scaled_backward)
    assert not hasattr(torch.ops.burnish, "test_composite_backward")
    x, factor = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    call = torch.compile(
        lambda x, f: op(x, Scale(f, None, 3.0), "kept")[0].sum(), fullgraph=True, backend="aot_eager"
    )
    compare(
        lambda: call(x, factor),
        lambda: scaled(x, Scale(factor, None, 3.0), "kept")[0].sum(),
        [x, factor],
    )


@pytest.mark.parametrize("op", [SCALED, APPLIED], ids=["record", "list of records"])
def test_the_derivative_of_a_gradient_raises(op):
    x, w = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    out = op(x, Scale(w, None, 3.0), "kept")[0] if op is SCALED else op(x, [Layer(w, None, 3.0)])[0][0]
    (dx,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="only first derivatives"):
        dx.sum().backward()


def test_a_path_with_records():
    """A path that reads numbers of its tensors: itself when eager, one op in a graph."""

    def path(x: Tensor, scale: Scale, parts: list[int]) -> Tensor:
        assert int(x.detach().sum()) is not None
        return torch.cat([part * scale.power * scale.factor.sum() for part in x.split(parts)])

    op = make_path("test_path", path, lambda x, scale, parts: torch.empty_like(x))
    x, factor = torch.randn(5, requires_grad=True), torch.randn(2, requires_grad=True)
    call = torch.compile(lambda x, f: op(x, Scale(f, None, 3.0), [2, 3]), fullgraph=True, backend="aot_eager")
    reference = lambda: path(x, Scale(factor, None, 3.0), [2, 3]).sin().sum()
    compare(lambda: call(x, factor).sin().sum(), reference, [x, factor])
    compare(lambda: op(x, Scale(factor, None, 3.0), [2, 3]).sin().sum(), reference, [x, factor])
