"""jinja2's immutable sandbox with a budget for each rendering: no template goes on for ever or fills the memory.

One account is kept, in characters. A step is STEP characters: a node of the template that runs, a call, a place in a
list. Text costs its length where it is made, read or written, and what can grow is measured before it is made.

    {% for %}, macros, blocks          a charge at the start of each body, for all of its nodes and its own text
    what is written, a ~ b, a[1:2]     a charge for its length; lists and objects are walked first
    a == b, a in b, {a: b}, a[b]       a charge for the operands, unless one is a short constant
    + * ** %                           jinja's interception, which also keeps them from running while compiling
    calls, filters, tests              a charge for what they read and return; those that can grow are bounded

Charges stand in the compiled template as filters whose names no template can write. All filters take the context, so
jinja runs none of them while it compiles.
"""

import json
import re
import string
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial, wraps
from types import BuiltinMethodType
from typing import Any, NoReturn

import jinja2
import jinja2.sandbox
from jinja2 import nodes
from jinja2.runtime import BlockReference, Context, LoopContext, Macro
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from .errors import InputError, shown

STEP = 16  # characters that are copied, or read, in less than the time of a step
MOST_STEPS = 10_000_000  # of a rendering
LARGEST = 2**24  # characters of one text, or STEP for each place of a list
MOST_SOURCE = 2**18  # characters of a template; the longest published ones have 2**15
MOST_DEPTH = 200  # of lists and objects in one another: comparing and writing them recurses
MOST_BITS = 2**14  # of an integer
MOST_WRITTEN = 2**20  # characters of a rendering, and 100 for each character that it is given

CONTAINERS = (list, tuple, dict, set, frozenset, type({}.keys()), type({}.values()), type({}.items()))
SIZED = (str, bytes, *CONTAINERS)
ATOMS = frozenset((int, bool, float, type(None)))


class OverBudget(InputError):
    """A template takes too long, or makes too much."""


class Meter:
    """What is left of a rendering's budget, in characters."""

    __slots__ = ("left",)

    def __init__(self) -> None:
        self.left = MOST_STEPS * STEP

    def charge(self, characters: int) -> None:
        self.left -= characters
        if self.left < 0:
            refuse_steps()

    def size(self, value: Any) -> int:
        """The characters of a text; of a list or an object all that is in it. Raises OverBudget."""
        if isinstance(value, str | bytes):
            return len(value)
        if type(value) in ATOMS:
            return 0
        total, level = 0, [value]
        for _ in range(MOST_DEPTH):
            children: list[Any] = []
            for each in level:
                if isinstance(each, str | bytes):
                    total += len(each)
                elif type(each) in ATOMS:
                    continue
                elif isinstance(each, dict | Namespace):
                    entries = each if isinstance(each, dict) else each._Namespace__attrs
                    children += entries.keys()
                    children += entries.values()
                elif isinstance(each, CONTAINERS):
                    children += each
                if total + STEP * len(children) > self.left:
                    refuse_steps()
            total += STEP * len(level)
            if not children:
                return total
            level = children
        raise OverBudget(f"nests lists and objects more than {MOST_DEPTH} deep")

    def read(self, value: Any) -> int:
        """Charge for a value that is read as a whole, and return its size."""
        size = self.size(value)
        self.charge(STEP + size)
        return size

    def made(self, value: Any, place: int = STEP) -> Any:
        """Charge for a value that was made; place: for each place of a list."""
        if isinstance(value, str | bytes):
            self.charge(len(value))
        elif isinstance(value, CONTAINERS):
            self.charge(place * len(value))
        return value


def refuse_steps() -> NoReturn:
    raise OverBudget(f"takes more than {MOST_STEPS:,} steps")


def check_growth(characters: int) -> None:
    if characters > LARGEST:
        raise OverBudget(f"makes a text or list of more than {LARGEST:,} characters")


def check_written(text: str, given: Callable[[], int]) -> None:
    """A rendering is not out of all proportion to what it was given, a number of characters. Raises OverBudget."""
    if len(text) > MOST_WRITTEN and len(text) > (most := MOST_WRITTEN + 100 * given()):
        raise OverBudget(f"writes {len(text):,} characters, expected at most {most:,}")


class MeteredContext(Context):
    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.meter = Meter()

    def derived(self, locals: dict[str, Any] | None = None) -> "MeteredContext":
        context = super().derived(locals)
        assert isinstance(context, MeteredContext)
        context.meter = self.meter
        return context


class BoundedEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Raises OverBudget, or InputError, where a template has no end, while it is compiled and while it runs."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))
    context_class = MeteredContext

    def __init__(self, **options: Any):
        super().__init__(**options)
        del self.globals["lipsum"]
        self.filters |= {name: bounded_filter(name, filter) for name, filter in self.filters.items()}
        self.filters |= HOOKS
        self.filters["tojson"] = tojson
        for name in self.tests.keys() - CONSTANT_TESTS:
            self.tests[name] = _bounded_test(name, self.tests[name])

    def compiled(self, source: str, change: Callable[[nodes.Template], None] | None = None) -> Any:
        """Returns (tree, program); change: alters the tree first. Raises InputError where it is no template.

        Parser and compiler recurse, and fail on what is too deep in ways of their own.
        """
        if len(source) > MOST_SOURCE:
            raise InputError(f"expected at most {MOST_SOURCE:,} characters, got {len(source):,}")
        try:
            tree = self.parse(source)
            if change is not None:
                change(tree)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Python's, about code that jinja wrote
                return tree, self.from_string(tree)
        except jinja2.TemplateError as error:
            line = getattr(error, "lineno", "?")
            raise InputError(f"cannot be parsed: line {line}: {error}") from error
        except RecursionError:
            raise InputError("cannot be parsed: nested too deeply") from None
        except Exception as error:  # Python's own compiler reads what jinja makes of it
            raise InputError(f"cannot be parsed: {type(error).__name__}: {error}") from error

    def _generate(self, source: nodes.Template, *args: Any, **options: Any) -> str:
        return super()._generate(_Charges().visit(source), *args, **options)

    def call_filter(self, name: str, *args: Any, **options: Any) -> Any:
        if name in HOOKS:  # `map` takes a name as text
            raise jinja2.TemplateRuntimeError(f"No filter named {name!r}.")
        return super().call_filter(name, *args, **options)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        assert isinstance(context, MeteredContext)
        meter = context.meter
        meter.charge(STEP)
        if operator == "%" and isinstance(left, str | bytes):
            check_percent(meter, left, right)
        elif isinstance(left, int) and isinstance(right, int):
            if operator == "**" and right > 0 and left.bit_length() * right > MOST_BITS:
                raise OverBudget(f"makes a number of more than {MOST_BITS} bits")
            if left.bit_length() + right.bit_length() > MOST_BITS:
                raise OverBudget(f"makes a number of more than {MOST_BITS} bits")
        elif operator == "*":
            many, times = (right, left) if isinstance(left, int) else (left, right)
            if isinstance(times, int) and isinstance(many, str | bytes | list | tuple):
                place = 1 if isinstance(many, str | bytes) else STEP
                check_growth(place * len(many) * times)
        return meter.made(self.binop_table[operator](left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        assert isinstance(__context, MeteredContext)
        meter = __context.meter
        meter.charge(4 * STEP)
        if isinstance(__obj, Macro | LoopContext | BlockReference):  # these charge for themselves
            return super().call(__context, __obj, *args, **kwargs)
        args = tuple(map(_settled, args))
        given = [
            *args,
            *(value for name, value in kwargs.items() if name not in ("_loop_vars", "_block_vars")),
        ]
        method = getattr(__obj, "__wrapped__", __obj)  # jinja wraps str.format
        place = STEP
        if isinstance(method, BuiltinMethodType):
            _check_method(meter, method.__self__, method.__name__, given)
            place = 4 * STEP if isinstance(method.__self__, str | bytes) else STEP
        else:
            for value in given:
                meter.read(value)
        return meter.made(super().call(__context, __obj, *args, **kwargs), place)


# ---- charges in the compiled template


def _cost(node: nodes.Node) -> int:
    """The charge for running a node once, without the bodies that charge for themselves."""
    if isinstance(node, nodes.TemplateData):
        return STEP + len(node.data)
    if isinstance(node, nodes.Const):
        return STEP + (len(node.value) if isinstance(node.value, str) else 0)
    bodies = isinstance(node, nodes.For | nodes.Macro | nodes.CallBlock | nodes.Block)
    children = node.iter_child_nodes(exclude=("body",) if bodies else None)
    return STEP * (4 if isinstance(node, nodes.Dict | nodes.List | nodes.Tuple) else 1) + sum(
        map(_cost, children)
    )


def _charge(hook: str, node: nodes.Expr, *args: Any) -> nodes.Filter:
    found = nodes.Filter(node, hook, list(args), [], None, None, lineno=node.lineno)
    return found.set_environment(node.environment)  # type: ignore


def _is_short(node: nodes.Node) -> bool:
    """Whether to compare with it takes no time, whatever the other side is."""
    if isinstance(node, nodes.List | nodes.Tuple):
        return len(node.items) < STEP and all(map(_is_short, node.items))
    return isinstance(node, nodes.Const)


class _Charges(NodeTransformer):
    """Puts the charges into a template's tree."""

    def _body(self, node: Any) -> Any:
        lineno, cost = node.lineno, sum(map(_cost, node.body))
        test = getattr(node, "test", None)
        tests = _cost(test) if test is not None else 0
        self.generic_visit(node)

        def step(cost: int) -> nodes.Filter:
            const = nodes.Const(STEP + cost, lineno=lineno)
            return _charge("a step", const.set_environment(node.environment))  # type: ignore

        node.body.insert(0, nodes.ExprStmt(step(cost), lineno=lineno))
        if test is not None:
            node.test = nodes.And(step(tests), node.test, lineno=lineno).set_environment(node.environment)
        return node

    visit_For = visit_Macro = visit_CallBlock = visit_Block = _body

    def _written(self, node: Any) -> Any:
        self.generic_visit(node)
        constant = (nodes.Const, nodes.TemplateData)
        node.nodes = [
            child if isinstance(child, constant) else _charge("a text", child) for child in node.nodes
        ]
        return node

    visit_Output = visit_Concat = _written

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        operands = [node.expr, *(operand.expr for operand in node.ops)]
        searched = [False, *(operand.op in ("in", "notin") for operand in node.ops)]
        if len(operands) == 2 and (_is_short(operands[1]) or (_is_short(operands[0]) and not searched[1])):
            return node
        charged = [
            each if _is_short(each) else _charge("a search" if within else "an operand", each)
            for each, within in zip(operands, searched, strict=True)
        ]
        node.expr = charged[0]
        for operand, expr in zip(node.ops, charged[1:], strict=True):
            operand.expr = expr
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            return _charge("a part", node)
        if not isinstance(node.arg, nodes.Const):
            node.arg = _charge("an operand", node.arg)
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        self.generic_visit(node)
        if not isinstance(node.key, nodes.Const):
            node.key = _charge("an operand", node.key)
        return node


@jinja2.pass_context
def _step(context: MeteredContext, cost: int) -> bool:
    meter = context.meter
    meter.left -= cost
    if meter.left < 0:
        refuse_steps()
    return True


@jinja2.pass_context
def _text(context: MeteredContext, value: Any) -> Any:
    """What is written, or joined: a list or an object as its text."""
    meter = context.meter
    if isinstance(value, CONTAINERS) or type(value) is Namespace:
        meter.read(value)
        value = str(value)
    if isinstance(value, str):
        check_growth(len(value))
        meter.charge(STEP + len(value))
    return value


@jinja2.pass_context
def _operand(context: MeteredContext, value: Any) -> Any:
    context.meter.read(value)
    return value


@jinja2.pass_context
def _searched(context: MeteredContext, value: Any) -> Any:
    """What is on the right of `in`: a key is found without looking at the others."""
    if not isinstance(value, dict):
        context.meter.read(value)
    return value


@jinja2.pass_context
def _part(context: MeteredContext, value: Any) -> Any:
    return context.meter.made(value)


HOOKS = {"a step": _step, "a text": _text, "an operand": _operand, "a search": _searched, "a part": _part}


# ---- filters and tests

# what these read of a list is its places at most
SHALLOW = frozenset(
    ("abs", "attr", "count", "length", "d", "default", "first", "float", "int", "items", "last", "list")
    + ("random", "reverse", "safe")
)
LAZY = frozenset(("map", "select", "reject", "selectattr", "rejectattr"))
FAST = frozenset(
    ("capitalize", "e", "escape", "forceescape", "lower", "replace", "string", "trim", "upper", "join")
)
QUADRATIC = frozenset(("pprint", "striptags", "urlize", "wordwrap"))  # in the length of the text
CONSTANT_TESTS = frozenset(
    ("odd", "even", "divisibleby", "defined", "undefined", "none", "boolean", "false", "true", "integer")
    + ("float", "string", "mapping", "number", "sequence", "iterable", "callable", "sameas", "escaped")
)


def _settled(value: Any) -> Any:
    """A list in place of an iterator, which could be read only once."""
    return list(value) if isinstance(value, Iterator) else value


def _metered(meter: Meter, values: Iterable[Any], cost: int) -> Iterator[Any]:
    for value in values:
        meter.charge(cost)
        yield value


def _with_context(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter or test as a function of the context, the value and the arguments."""
    wants = getattr(getattr(function, "jinja_pass_arg", None), "name", None)
    if wants == "context":
        return function
    if wants == "eval_context":
        return lambda context, *args, **options: function(context.eval_ctx, *args, **options)
    if wants == "environment":
        return lambda context, *args, **options: function(context.environment, *args, **options)
    return lambda context, *args, **options: function(*args, **options)


def bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter under the rendering's budget."""
    inner = _with_context(function)
    check = partial(_check_filter, name)

    @jinja2.pass_context
    @wraps(function, assigned=("__doc__", "__name__"), updated=())
    def bounded(context: MeteredContext, value: Any = "", *args: Any, **options: Any) -> Any:
        meter = context.meter
        given = [*args, *options.values()]
        if name in LAZY:
            texts = args[:1] if name.endswith("attr") else [options.get("attribute")]
            if isinstance(value, Iterable) and value:
                value = _metered(meter, value, STEP * (1 + sum(map(meter.size, texts))))
        elif name in SHALLOW:
            meter.charge(2 * STEP)
            if name == "int" and isinstance(value, str) and given[1:]:
                check_growth(len(value) * 2**12)  # a number of any length, where a base is given
            if isinstance(value, SIZED):
                meter.charge(len(value))
        else:
            value = _settled(value)
            check(meter, value, given)
        return meter.made(inner(context, value, *args, **options))

    return bounded


def _check_filter(name: str, meter: Meter, value: Any, given: list[Any]) -> None:
    size = meter.read(value)
    texts = sum(map(meter.read, given))
    numbers = sum(abs(number) for number in given if isinstance(number, int))
    if name == "replace" and isinstance(value, str) and len(given) > 1:
        old, new = (str(text) for text in given[:2])
        check_growth(size + value.count(old) * len(new))
    elif name == "join":
        check_growth(size + (len(value) if isinstance(value, SIZED) else 1) * texts)
    elif name == "format":
        check_percent(meter, str(value), given)
    else:
        lines = value.count("\n") + 1 if isinstance(value, str) else 1
        check_growth(grown := size * (1 + texts) + lines * numbers)
        meter.charge(grown)
    if name not in FAST:
        meter.charge(size * (STEP + (size // 2**8 if name in QUADRATIC else 0)))
    if name == "sum" and given[1:]:  # of lists, one behind the other
        meter.charge(size * len(value) // 4)


def _bounded_test(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    inner = _with_context(function)

    @jinja2.pass_context
    def bounded(context: MeteredContext, value: Any, *args: Any) -> Any:
        for operand in (value, *args):
            if not (name == "in" and isinstance(operand, dict) and operand is not value):
                context.meter.read(operand)
        return inner(context, value, *args)

    return bounded


@jinja2.pass_context
def tojson(
    context: MeteredContext,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes <, > and & for HTML, which no model was trained on."""
    meter = context.meter
    size = meter.read(value)
    meter.charge(2 * size)
    widths = (indent, *(separators or ()))
    if any(
        width > 64 if isinstance(width, int) else len(width) > 64 for width in widths if width is not None
    ):
        raise OverBudget("asks tojson for more than 64 characters of white space")
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    if indent is None:
        return meter.made(encoder.encode(value))
    return "".join(meter.made(piece) for piece in encoder.iterencode(value))


# ---- methods and formats


def _check_method(meter: Meter, receiver: Any, name: str, given: list[Any]) -> None:
    """A method of Python's own types. Raises OverBudget where its result would be too large."""
    texts = sum(map(meter.read, given))
    if isinstance(receiver, list | tuple):
        meter.read(receiver) if name in ("count", "index") else meter.charge(STEP * len(receiver))
    if name in ("to_bytes", "from_bytes", "fromhex"):
        raise OverBudget(f"calls {name}, which makes numbers and bytes of any size")
    if not isinstance(receiver, str | bytes):
        return
    length = len(receiver)
    meter.charge(length)
    numbers = sum(abs(number) for number in given if isinstance(number, int))
    if name in (
        "rfind",
        "rindex",
        "rsplit",
        "rpartition",
        "strip",
        "lstrip",
        "rstrip",
    ):  # read again and again
        meter.charge(length * texts // 4)
    elif name in ("center", "ljust", "rjust", "zfill"):
        check_growth(length + numbers)
    elif name in ("expandtabs", "translate"):
        check_growth(length * (1 + numbers + texts))
    elif name == "replace" and len(given) > 1:
        check_growth(length + receiver.count(given[0]) * len(given[1]))
    elif name == "join" and given and isinstance(given[0], SIZED):
        check_growth(texts + length * len(given[0]))
    elif name in ("format", "format_map"):
        _check_format(receiver, texts)


def _check_format(text: Any, given: int) -> None:
    """'{:>10}'.format(...)"""
    fields = 0
    for _, field, width, _ in string.Formatter().parse(text):
        fields += field is not None
        if width and ("{" in width or re.search(r"\d{5}", width)):
            raise OverBudget(f"writes a field of the width {shown(width)}")
    check_growth(len(text) + fields * given)


def check_percent(meter: Meter, text: Any, given: Any) -> None:
    """'%10s' % ..."""
    size = meter.read(given)
    plain = text.decode("latin-1") if isinstance(text, bytes) else text
    meter.charge(len(plain))
    if re.search(r"[%)][-#0 +]*\d{5}|%[-#0 +]*\*|%[^%a-zA-Z]*\.(\*|\d{5})|\)[-#0 +\d]*\.\d{5}", plain):
        raise OverBudget("writes a field of more than 9,999 characters")
    check_growth(len(plain) + plain.count("%") * size)
