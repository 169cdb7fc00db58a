"""Registration of ops with torch, built from plain functions whose arguments may be records (see _layout.py)."""

from collections.abc import Callable, Iterable
from functools import cache, partial, wraps
from typing import Any, get_args, get_origin, get_type_hints

import torch
from torch import Tensor
from torch._C import DispatchKey, _SetExcludeDispatchKeyGuard
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ._chip import NAMESPACE
from ._layout import Layout, compiled, flattened, hints_of, kind_of, nested

# ---- rules for every op

SEQUENCES = list, tuple  # a record is a tuple


def _first(args: Iterable[Any]) -> Tensor | None:
    """Return the first tensor among an op's arguments, also inside records and lists. Return None if there is none."""
    for value in args:
        if isinstance(value, Tensor):
            return value
        if isinstance(value, SEQUENCES) and (found := _first(value)) is not None:
            return found
    return None


def on_its_device(launch: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function that launches Triton kernels, so that they run on the device and stream of its tensors."""

    @wraps(launch)
    def guarded(*args: Any) -> Any:
        first = _first(args)
        if first is None or not first.is_cuda or first.get_device() == torch.cuda.current_device():
            return launch(*args)
        with torch.cuda.device(first.device):
            return launch(*args)

    return guarded


class _FirstOrder(torch.autograd.Function):
    """An identity on gradients. Differentiating its outputs raises NotImplementedError.

    origins: how many of the first inputs are not gradients, but the tensors that the gradients were computed from.
        These tensors are inputs only so that autograd connects the gradients to them.
    """

    @staticmethod
    def forward(ctx: Any, name: str, origins: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.name = name
        return tensors[origins:]

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(
            f"{ctx.name}: expected only first derivatives, got the derivative of a gradient; use the reference"
        )


class _Unpacked:
    """An autograd context whose saved tensors can be read twice. Activation checkpointing allows only one read."""

    def __init__(self, ctx: Any):
        self._ctx, self.saved_tensors = ctx, ctx.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


def _first_order(name: str, backward: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a backward so that a second derivative (create_graph) raises an error instead of being silently wrong."""

    def once(ctx: Any, *grads: Any) -> Any:
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        ctx = _Unpacked(ctx)
        with torch.no_grad():
            found = backward(ctx, *grads)
        origins = [t for t in (*flattened(grads)[0], *ctx.saved_tensors) if t is not None and t.requires_grad]
        flat, lengths = flattened(found)
        return tuple(nested(_FirstOrder.apply(name, len(origins), *origins, *flat), lengths))

    return once


def _recorded(first: Tensor | None) -> bool:
    """Return whether a call must go through the registered op: under torch.compile, a dispatch mode, or on "meta"."""
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return True
    return first is not None and first.is_meta


# ---- ops


def make_op(
    name: str,
    forward: Callable[..., Any],
    shapes: Callable[..., Any],
    save: Callable[..., Any] | None = None,
    backward: Callable[..., Any] | None = None,
    gradient_shapes: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Register the op burnish::name with torch, and return the function that the public op calls.

    forward(*arguments): returns a tensor, or a tuple of tensors and lists of tensors. Every argument is annotated, and
        is a tensor, a number, a record (a NamedTuple), or a list of these. Autograd is off inside.
    shapes(*arguments): returns empty tensors like forward's outputs. It works for tensors on "meta", too.
    save(outputs, *arguments): returns a record of the inputs, outputs and numbers that backward reads.
    backward(saved, needs, *upstream): returns the gradients as a record. Its fields have the flat names of the
        arguments that may have a gradient. The gradient of a list of tensors is a list. `needs` is the same record with
        a bool in each field. A gradient that is not needed may be None. `upstream` are the gradients of forward's first
        outputs; the others have none. An upstream annotated `Tensor | None` is None if no loss reads that output.
    gradient_shapes(saved, needs, *upstream): returns empty tensors like backward's gradients, as `like_saved` does.
        Without it the backward is not registered as an op, and torch traces the calls inside it.

    torch.compile and dispatch modes (FakeTensor, selective checkpointing) see the registered op. An eager call uses an
    autograd.Function around the same functions, at half the cost. With gradients off it calls only `forward`.
    Raises NotImplementedError when a gradient is differentiated.
    """
    layout = Layout(hints_of(forward))
    returns = _returns(get_type_hints(forward)["return"])
    registered = _registered(name, layout, returns, on_its_device(forward), shapes)
    differentiable = forward
    if save is not None and backward is not None:
        gradient = _Gradient(name, layout, returns, save, backward, gradient_shapes)
        registered.register_autograd(gradient.registered_backward(), setup_context=gradient.keep_flat)
        differentiable = _eager(forward, gradient)

    def guarded(*args: Any) -> Any:  # includes the code of on_its_device, which saves a microsecond
        first = _first(args)
        if _recorded(first):
            return registered(*_whole_lists(name, layout.flat(*args)))
        compute = differentiable if torch.is_grad_enabled() else forward
        if first is None or not first.is_cuda or first.get_device() == torch.cuda.current_device():
            return compute(*args)
        with torch.cuda.device(first.device):
            return compute(*args)

    return guarded


def _whole_lists(name: str, leaves: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return `leaves`, the flat arguments of an op, or raise NotImplementedError.

    The error is raised for a list that holds both tensors and None, because torch would lose some gradients.
    """
    for leaf in leaves:
        if isinstance(leaf, list) and 0 < sum(x is None for x in leaf) < len(leaf):
            raise NotImplementedError(
                f"{name}: expected a list of tensors or of None in a graph, got some of each"
            )
    return leaves


def _registered(
    name: str, layout: Layout, returns: str, compute: Callable[..., Any], shapes: Callable[..., Any]
) -> Any:
    """Register the op burnish::name with torch.library. It takes the arguments of `compute` in their flat form."""
    registered = torch.library.custom_op(
        f"{NAMESPACE}::{name}",
        lambda *flat: compute(*layout.nested(*flat)),
        mutates_args=(),
        schema=f"({layout.schema}) -> {returns}",
    )
    registered.register_fake(lambda *flat: shapes(*layout.nested(*flat)))
    return registered


def _returns(annotation: Any) -> str:
    kinds = get_args(annotation) if get_origin(annotation) is tuple else (annotation,)
    return f"({', '.join(map(kind_of, kinds))})"


def _eager(forward: Callable[..., Any], gradient: "_Gradient") -> Callable[..., Any]:
    """Return the function for eager calls, which applies an autograd.Function around `forward` and the gradient.

    The autograd.Function gets all arguments as one tuple, followed by the tensors that may have a gradient. It has no
    setup_context, because torch would then inspect the signature on every call.
    """
    plain, tensors = gradient.eager_forward(forward), gradient.tensors

    def forward_lists(ctx: Any, args: tuple[Any, ...], lengths: list[int | None], *_: Any) -> Any:
        flat, ctx.returned = flattened(plain(ctx, args))
        ctx.counts = [len(x) if isinstance(x, list) else None for x in gradient.whole(*args)]
        lengths += ctx.returned
        return tuple(flat)

    members = {
        "forward": staticmethod(forward_lists if gradient.lists else plain),
        "backward": staticmethod(gradient.eager_backward()),
    }
    apply = type(gradient.name, (torch.autograd.Function,), members).apply

    def call_lists(*args: Any) -> Any:
        lengths: list[int | None] = []
        return tuple(nested(apply(args, lengths, *tensors(*args)), lengths))

    return call_lists if gradient.lists else gradient.layout.call(apply, gradient.leaves)


class _Gradient:
    """The gradient of one op: the NamedTuple saved for the backward, and the backward in the forms that torch requires.

    `lists` is true if the op takes or returns lists of tensors. An autograd.Function cannot, so it gets their items.
    """

    def __init__(
        self,
        name: str,
        layout: Layout,
        returns: str,
        save: Callable[..., Any],
        backward: Callable[..., Any],
        shapes: Callable[..., Any] | None,
    ):
        hints = hints_of(backward)
        saved, _, *upstream = hints
        self.name, self.layout, self.save = name, layout, save
        self.saved, self.record = hints[saved], get_type_hints(backward)["return"]
        self.kinds = {argument: kind_of(hints[argument]) for argument in upstream}
        self.alone = [*self.kinds.values()] == ["Tensor"]

        # the leaves that may have a gradient
        named = {leaf.name: (place, leaf) for place, leaf in enumerate(layout.leaves)}
        self.places, self.leaves = zip(*(named[field] for field in self.record._fields), strict=True)
        self.whole, self.tensors = layout.pick(self.leaves), layout.pick(self.leaves, spread=True)
        self.lists = "[]" in returns or any(leaf.is_list for leaf in self.leaves)

        self.kept = _layout_of(self.saved)
        self.kept_lists = any(leaf.is_tensor and leaf.is_list for leaf in self.kept.leaves)
        self.keeping, self.rebuilt = self._keeping(returns)
        self.keep = compiled("keep(_ctx, _args, _output)", self.keeping, _save=save, _flattened=flattened)

        self.compute = on_its_device(backward) if shapes else backward
        self.registered = self._registered(shapes) if shapes else None

    def _keeping(self, returns: str) -> tuple[list[str], Callable[..., Any]]:
        """Return Python source that saves the backward's NamedTuple, and a function that rebuilds the NamedTuple.

        The source is made for its fields, because a loop over the fields would add microseconds to every eager call.
        """
        reads: dict[str, list[str]] = {"tensors": [], "others": []}
        places = []
        for leaf in self.kept.leaves:
            group = "tensors" if leaf.is_tensor else "others"
            places.append(f"{group}[{len(reads[group])}]")
            reads[group].append(leaf.read)
        rebuilt = self.kept.build("tensors, others", places, self.saved)

        # the record's fields become variables: no field begins with an underscore
        tensors, rest = ", ".join(reads["tensors"]), f"_output[{len(self.kinds)}:]"
        lines = [
            f"{', '.join(self.saved._fields)}, = _save(_output, *_args)",
            f"_ctx.others = [{', '.join(reads['others'])}]",
        ]
        if self.kept_lists:
            lines += [
                f"_tensors, _ctx.lengths = _flattened([{tensors}])",
                "_ctx.save_for_backward(*_tensors)",
            ]
        else:
            lines += [f"_ctx.save_for_backward({tensors})"]

        if returns.count("Tensor") > len(self.kinds):  # outputs without a gradient
            rest = f"_flattened({rest})[0]" if "[]" in returns else rest
            lines += [f"_ctx.mark_non_differentiable(*{rest})"]
        if self.alone or "Tensor?" in self.kinds.values():
            lines += ["_ctx.set_materialize_grads(False)"]
        return lines, rebuilt

    def keep_flat(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Save what the backward needs: the setup_context of the registered op, whose inputs are a flat list."""
        self.keep(ctx, self.layout.nested(*inputs), output)

    def eager_forward(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Return the forward of the eager autograd.Function. It reads only its first input.

        This input is a tuple of all arguments. The other inputs are tensors of this tuple, repeated for autograd.
        """
        lines = ["_output = _compute(*_args)", *self.keeping, "return _output"]
        known = {"_compute": forward, "_save": self.save, "_flattened": flattened}
        return compiled("forward(_ctx, _args, *_)", lines, **known)

    def derive(self, ctx: Any, needs: Any, upstream: tuple[Any, ...]) -> Any:
        """Compute the gradients in one backward pass. `needs` has a bool for each gradient."""
        if self.alone and upstream[0] is None:  # no loss reads the only output that has a gradient
            return self.record._make(None for _ in needs)
        tensors, upstream = ctx.saved_tensors, upstream[: len(self.kinds)]
        if self.kept_lists:
            tensors = nested(tensors, ctx.lengths)
        saved = self.rebuilt(tensors, ctx.others)
        if self.registered is None or not _recorded(_first(tensors)):
            return self.compute(saved, needs, *upstream)

        found = self.registered(*self.kept.flat(*saved), *upstream, list(needs))
        found = found if len(needs) > 1 else (found,)
        return self.record._make(grad if need else None for grad, need in zip(found, needs, strict=True))

    def eager_backward(self) -> Callable[..., Any]:
        """Return the backward of the eager autograd.Function. The gradient of the tuple of arguments is None."""
        if self.lists or self.kept_lists:
            return _first_order(self.name, self._backward_of_lists)

        compute, rebuilt, count = self.compute, self.rebuilt, len(self.kinds)
        needs_of, whole = partial(tuple.__new__, self.record), self.registered is not None

        def backward(ctx: Any, *grads: Any) -> Any:
            return None, *self.derive(ctx, needs_of(ctx.needs_input_grad[1:]), grads)

        def at_once(ctx: Any, *grads: Any) -> Any:
            """Compute the gradients in one Python call, which saves microseconds, unless a graph records the call."""
            if torch.is_grad_enabled() or (whole and _recorded(grads[0])) or grads[0] is None:
                return guarded(ctx, *grads)
            needs = needs_of(ctx.needs_input_grad[1:])
            return None, *compute(rebuilt(ctx.saved_tensors, ctx.others), needs, *grads[:count])

        guarded = _first_order(self.name, backward)
        return at_once

    def _backward_of_lists(self, ctx: Any, *grads: Any) -> Any:
        if not self.lists:  # only the saved record has lists
            return None, *self.derive(ctx, self.record._make(ctx.needs_input_grad[1:]), grads)
        flags = nested(ctx.needs_input_grad[2:], ctx.counts)
        found = self.derive(ctx, self._needs(flags), tuple(nested(grads, ctx.returned)))
        return None, None, *flattened(map(_spread, found, ctx.counts))[0]

    def _needs(self, flags: Iterable[Any]) -> Any:
        """Return a bool for each gradient: whether it is needed. A list is needed if any of its tensors is."""
        return self.record._make(any(flag) if isinstance(flag, list) else flag for flag in flags)

    def registered_backward(self) -> Callable[..., Any]:
        """Return the backward of the registered op, which returns one gradient (or list) for each flat argument."""

        def backward(ctx: Any, *grads: Any) -> Any:
            flags = ctx.needs_input_grad
            needs = self._needs(flags[place] for place in self.places)
            found = dict(zip(self.places, self.derive(ctx, needs, grads), strict=True))
            return tuple(
                _spread(found.get(place), len(flag) if isinstance(flag, list) else None)
                for place, flag in enumerate(flags)
            )

        return _first_order(self.name, backward)

    def _registered(self, shapes: Callable[..., Any]) -> Any:
        """Register the op burnish::name_backward. An op cannot return None: an empty tensor stands for no gradient."""
        upstream = [f"{kind} {argument}" for argument, kind in self.kinds.items()]
        kinds = [kind_of(kind).rstrip("?") for kind in get_type_hints(self.record).values()]
        count = len(self.kept.leaves)

        def whole(compute: Callable[..., Any], flat: tuple[Any, ...]) -> Any:
            saved, needs = self.saved._make(self.kept.nested(*flat[:count])), self.record._make(flat[-1])
            first = _first(flat)
            assert first is not None
            found = compute(saved, needs, *flat[count:-1])
            grads = tuple(
                grad if need and grad is not None else [] if leaf.is_list else first.new_empty(0)
                for grad, need, leaf in zip(found, needs, self.leaves, strict=True)
            )
            return grads if len(kinds) > 1 else grads[0]

        registered = torch.library.custom_op(
            f"{NAMESPACE}::{self.name}_backward",
            lambda *flat: whole(self.compute, flat),
            mutates_args=(),
            schema=f"({', '.join([self.kept.schema, *upstream, 'bool[] needs'])}) -> ({', '.join(kinds)})",
        )
        registered.register_fake(lambda *flat: whole(shapes, flat))
        return registered


def like_saved(saved: Any, needs: Any, *_: Any) -> Any:
    """Return empty gradients, each in the shape and dtype of the saved tensor of the same name."""
    layout = _layout_of(type(saved))
    kept = dict(zip((leaf.name for leaf in layout.leaves), layout.flat(*saved), strict=True))
    return needs._make(
        _like(kept[field]) if need else None for field, need in zip(needs._fields, needs, strict=True)
    )


@cache
def _layout_of(record: Any) -> Layout:
    return Layout(get_type_hints(record))


def _like(kept: Any) -> Any:
    return [_like(x) for x in kept] if isinstance(kept, list) else kept.new_empty(kept.shape)


def _spread(grad: Any, count: int | None) -> Any:
    """Return a gradient as torch takes it: a list of `count` items, or a tensor or None if `count` is None."""
    if count is None:
        return None if isinstance(grad, list) else grad
    return [None for _ in range(count)] if grad is None else grad


def make_path(
    name: str, path: Callable[..., Tensor | tuple[Tensor, ...]], shapes: Callable[..., Any]
) -> Callable[..., Any]:
    """Register plain torch code as the op burnish::name, because it reads tensor values, and a graph has none.

    path: the code, a function annotated like `forward` in `make_op`. It takes no lists of tensors, and its outputs are
        not views of its arguments. Eager calls run `path` itself under autograd. The op's backward runs `path` again.
    """
    layout = Layout(hints_of(path))

    def derive(grads: list[Tensor], needed: list[int], *leaves: Any) -> list[Tensor]:
        given = list(leaves)
        for place in needed:
            given[place] = leaves[place].detach().requires_grad_()
        wanted = [given[place] for place in needed]

        # Autograd is off inside an op. torch.func.vjp would turn it on, but crashes under a dispatch mode
        with torch.enable_grad(), _SetExcludeDispatchKeyGuard(DispatchKey.AutogradFunctionality, False):
            outs = path(*layout.nested(*given))
            outs = outs if isinstance(outs, tuple) else (outs,)
            live = [i for i, out in enumerate(outs) if out.requires_grad]
            outs, upstream = ([x[i] for i in live] for x in (outs, grads))
            found = torch.autograd.grad(outs, wanted, upstream, materialize_grads=True)
        return [torch.empty_like(leaf).copy_(d) for leaf, d in zip(wanted, found, strict=True)]

    backward = torch.library.custom_op(
        f"{NAMESPACE}::{name}_backward",
        derive,
        mutates_args=(),
        schema=f"(Tensor[] grads, SymInt[] needed, {layout.schema}) -> Tensor[]",
    )
    backward.register_fake(lambda grads, needed, *leaves: [torch.empty_like(leaves[i]) for i in needed])

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)))
        ctx.others = [None if isinstance(x, Tensor) else (x,) for x in inputs]

    def differentiate(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tensors = iter(ctx.saved_tensors)
        leaves = [next(tensors) if other is None else other[0] for other in ctx.others]
        needed = [place for place, need in enumerate(ctx.needs_input_grad) if need]
        found = dict(zip(needed, backward(list(grads), needed, *leaves), strict=True))
        return tuple(found.get(place) for place in range(len(leaves)))

    registered = _registered(name, layout, _returns(get_type_hints(path)["return"]), path, shapes)
    registered.register_autograd(_first_order(name, differentiate), setup_context=save)
    return lambda *args: registered(*layout.flat(*args)) if _recorded(_first(args)) else path(*args)
