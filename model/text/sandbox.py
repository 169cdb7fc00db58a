"""jinja2's immutable sandbox with a budget for each rendering: no template runs for ever or fills the memory.

The budget is counted in characters. A step costs STEP characters: a node of the template that runs, a call, a slot of a
list. Text costs its length when it is made, read or written. The size of a value that may grow is computed before it is
made.

    {% for %}, macros, blocks          a charge at the start of each body, for all of its nodes and its own text
    output, a ~ b, a[1:2]              a charge for its length; lists and objects are walked first
    a == b, a in b, {a: b}, a[b]       a charge for the operands, unless one is a short constant
    + - * ** // %                      jinja's interception, which also keeps them from running while compiling
    calls, filters, tests              a charge for their arguments and results; the result's size is bounded

In the compiled template, charges are filters with names that no template can write. All filters take the context, so
jinja runs none of them while it compiles.
"""

import warnings
from collections.abc import Callable
from datetime import datetime
from types import BuiltinMethodType
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.sandbox
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.runtime import BlockReference, Context, LoopContext, Macro
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer
from markupsafe import escape

from ..errors import InputError
from .bounded import (
    CONSTANT_TESTS,
    bounded_filter,
    bounded_test,
    check_method,
    check_percent,
    settled,
    tojson,
)
from .meter import ATOMS, CONTAINERS, STEP, Meter, MeteredContext, check_growth
from .refusals import OverBudget

MOST_SOURCE = 2**17  # characters of a template; the longest published ones have 2**15
MOST_SCOPES = 2**20  # blocks times names in a template, because jinja copies all names for each block
MOST_BITS = 2**14  # of an integer
PLAIN = frozenset((str, dict, list, Namespace, LoopContext))
ROOM = 2**18  # words of Python's stack: 1,000 calls of 250 words each
CHARGING = frozenset((Macro, LoopContext, BlockReference))  # callables whose bodies have charges
SCOPES = (nodes.If, nodes.For, nodes.Macro, nodes.CallBlock, nodes.FilterBlock, nodes.With, nodes.Block)
SCOPES += (nodes.Scope, nodes.AssignBlock, nodes.ScopedEvalContextModifier)


class RoomyTemplate(jinja2.Template):
    """A template whose calls find enough room on Python's stack, which makes renderings faster.

    Python's stack grows in chunks of 16 kB. A call that does not fit into the current chunk maps a new one, and unmaps
    it on return. If the innermost calls of a rendering do this, the rendering takes 8 times as long (Python 3.11). A
    frame of ROOM words makes Python map a chunk of twice that size, and all calls within the frame fit into the rest.
    """

    def render(self, *args: Any, **variables: Any) -> str:
        return super().render(*args, **variables)

    render.__code__ = render.__code__.replace(co_stacksize=ROOM)


class BoundedEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """jinja2's environment for untrusted templates.

    A template that does not end is refused when it is compiled or rendered. The errors are InputError and its subclass
    OverBudget.
    """

    intercepted_binops = frozenset(("+", "-", "*", "**", "//", "%"))
    context_class = MeteredContext
    template_class = RoomyTemplate

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.answers: dict[tuple[type, str], bool] = {}
        del self.globals["lipsum"]
        self.filters |= {name: bounded_filter(name, filter) for name, filter in self.filters.items()}
        self.filters |= HOOKS
        self.filters["tojson"] = tojson
        for name in self.tests.keys() - CONSTANT_TESTS:
            self.tests[name] = bounded_test(name, self.tests[name])

    def compiled(self, source: str, change: Callable[[str], str] | None = None) -> Any:
        """Return (syntax tree, compiled program) of a template.

        change: a function applied to each text outside of expressions.

        The parser and the compiler recurse, so deep nesting makes them fail in their own ways. Raises InputError if the
        source is not a valid template.
        """
        if len(source) > MOST_SOURCE:
            raise InputError(f"expected at most {MOST_SOURCE:,} characters, got {len(source):,}")

        try:
            tree = self.parse(source)
            names = {node.name for node in tree.find_all(nodes.Name)}
            blocks = sum(1 for _ in tree.find_all(SCOPES))
            if len(names) * blocks > MOST_SCOPES:
                raise jinja2.TemplateError(f"{blocks:,} blocks of {len(names):,} names are too many")
            if change is not None:
                for text in tree.find_all(nodes.TemplateData):
                    text.data = change(text.data)

            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Python's warnings about code that jinja generated
                return tree, self.from_string(tree)
        except jinja2.TemplateError as error:
            line = getattr(error, "lineno", "?")
            raise InputError(f"cannot be parsed: line {line}: {error}") from error
        except RecursionError:
            raise InputError("cannot be parsed: nested too deeply") from None
        except Exception as error:  # from Python's own compiler, which compiles jinja's output
            raise InputError(f"cannot be parsed: {type(error).__name__}: {error}") from error

    def names_read(self, tree: nodes.Template) -> set[str]:
        """Return the names that a template reads but does not set itself, and all globals that it reads.

        Raises InputError if the template is nested too deeply.
        """
        try:
            names = jinja2.meta.find_undeclared_variables(tree)
        except RecursionError:
            raise InputError("cannot be parsed: nested too deeply") from None
        loaded = {node.name for node in tree.find_all(nodes.Name) if node.ctx == "load"}
        return names | (loaded & self.globals.keys())

    def null(self, name: str) -> jinja2.Undefined:
        """Return a placeholder for the variable `name`, whose value is null, in a strict environment."""
        return Null(name=name)

    def _generate(self, source: nodes.Template, *args: Any, **options: Any) -> str:
        return super()._generate(_Charges().visit(source), *args, **options)

    def call_filter(self, name: str, *args: Any, **options: Any) -> Any:
        if name in HOOKS:  # `map` takes a filter's name as text, so a template could name a hook
            raise jinja2.TemplateRuntimeError(f"No filter named {name!r}.")
        return super().call_filter(name, *args, **options)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        kind = type(obj)
        if kind not in PLAIN:
            return super().is_safe_attribute(obj, attr, value)
        found = self.answers.get((kind, attr))
        if found is None:  # for these types, jinja's answer depends only on the type and the name
            found = super().is_safe_attribute(obj, attr, value)
            if len(self.answers) < 10_000:
                self.answers[kind, attr] = found
        return found

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        meter: Meter = context.meter  # type: ignore
        meter.charge(2 * STEP)
        if operator == "+" and type(left) is str:
            return meter.made(left + right)

        if operator == "%" and isinstance(left, str | bytes):
            check_percent(meter, left, right)
        elif isinstance(left, int) and isinstance(right, int):
            meter.charge(meter.size(left) + meter.size(right))
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
        meter: Meter = __context.meter  # type: ignore
        kind = type(__obj)
        slow = kind is BlockReference or __obj is Namespace
        meter.charge(((32 if slow else 16) + 4 * len(args)) * STEP)
        if kind in CHARGING:
            return super().call(__context, __obj, *args, **kwargs)

        args = tuple([settled(value) for value in args])
        given = [*args, *(kwargs[name] for name in kwargs if name not in ("_loop_vars", "_block_vars"))]
        # jinja wraps str.format
        method = __obj if kind is BuiltinMethodType else getattr(__obj, "__wrapped__", __obj)
        place = STEP
        if isinstance(method, BuiltinMethodType):
            check_method(meter, method.__self__, method.__name__, given)
            place = 4 * STEP if isinstance(method.__self__, str | bytes) else STEP
        else:
            for value in given:
                meter.read(value)
        return meter.made(super().call(__context, __obj, *args, **kwargs), place)


# ---- charges in the compiled template


def _cost(node: nodes.Node) -> int:
    """Return the cost of running a node of the syntax tree once. Bodies inside it are charged separately."""
    if isinstance(node, nodes.TemplateData):
        return STEP + len(node.data)
    if isinstance(node, nodes.Const):
        return STEP + (len(node.value) if isinstance(node.value, str) else 0)
    bodies = isinstance(node, nodes.For | nodes.Macro | nodes.CallBlock | nodes.Block)
    children = node.iter_child_nodes(exclude=("body",) if bodies else None)
    steps = 4 if isinstance(node, nodes.Dict | nodes.List | nodes.Tuple) else 1
    steps = 32 if isinstance(node, nodes.Scope) else steps
    return STEP * steps + sum(map(_cost, children))


def _charge(hook: str, node: nodes.Expr, *args: Any) -> nodes.Filter:
    found = nodes.Filter(node, hook, list(args), [], None, None, lineno=node.lineno)
    return found.set_environment(node.environment)  # type: ignore


def _is_short(node: nodes.Node) -> bool:
    """Return whether comparing any value with this node takes negligible time."""
    if isinstance(node, nodes.List | nodes.Tuple):
        return len(node.items) < STEP and all(map(_is_short, node.items))
    return isinstance(node, nodes.Const)


class _Charges(NodeTransformer):
    """A visitor that inserts the charges into a template's syntax tree."""

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

    visit_Output = _written

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        return _charge("a part", self._written(node))  # if one text is safe HTML, the others are escaped

    def visit_Const(self, node: nodes.Const) -> nodes.Const:
        if isinstance(node.value, int) and node.value.bit_length() > MOST_BITS:
            raise jinja2.TemplateSyntaxError(f"a number of more than {MOST_BITS} bits", node.lineno)
        return node

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


# the functions of the hooks: each makes its charge, and returns its value


@jinja2.pass_context
def _step(context: MeteredContext, cost: int) -> bool:
    meter = context.meter
    meter.left -= cost
    if meter.left < 0:
        meter.refuse()
    return True


@jinja2.pass_context
def _text(context: MeteredContext, value: Any) -> Any:
    """Charge the budget for a value that is written or joined. Return it, with a list or an object turned into text."""
    meter = context.meter
    meter.charge(2 * STEP)
    if type(value) is not str and isinstance(value, (*CONTAINERS, Namespace)):
        check_growth(meter.read(value))
        value = str(value)
    if context.eval_ctx.autoescape:
        value = escape(value)
    meter.made(value)
    return value


@jinja2.pass_context
def _operand(context: MeteredContext, value: Any) -> Any:
    """Charge the budget for a value that is compared or used as a key, and return the value."""
    if type(value) not in ATOMS:
        context.meter.read(value)
    return value


@jinja2.pass_context
def _searched(context: MeteredContext, value: Any) -> Any:
    """Charge the budget for the right side of `in`, and return it.

    An object costs nothing, because a key is found without a search.
    """
    if not isinstance(value, dict):
        context.meter.read(value)
    return value


@jinja2.pass_context
def _part(context: MeteredContext, value: Any) -> Any:
    """Charge the budget for a new value, such as a slice or a joined text, and return the value."""
    return context.meter.made(value)


HOOKS = {"a step": _step, "a text": _text, "an operand": _operand, "a search": _searched, "a part": _part}


# ---- what templates have beside jinja's own


class GenerationBlock(jinja2.ext.Extension):
    """The block `{% generation %}...{% endgeneration %}` around the assistant's text.

    It writes the variables span_start and span_end around that text. If the caller does not want marks, they are
    undefined, and therefore empty.
    """

    tags = {"generation"}  # noqa: RUF012 (jinja's own declaration)

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        start, end = (nodes.Output([nodes.Name(name, "load")]) for name in ("span_start", "span_end"))
        return nodes.Scope([start, *body, end]).set_lineno(lineno)


class Null(jinja2.Undefined):
    """The value of a template variable that is null. A template can test for it, but printing it is an error."""

    def __str__(self) -> str:
        raise jinja2.TemplateError(f"'{self._undefined_name}' is null: test for it with {{% if ... %}}")


def environment(strict: bool) -> BoundedEnvironment:
    """Return an environment for untrusted templates.

    strict: a name without a value is an error, and lines keep their white space. Otherwise such a name is empty, and
    the lines of blocks leave no white space, as in transformers.
    """
    options = (
        {"undefined": jinja2.StrictUndefined} if strict else {"trim_blocks": True, "lstrip_blocks": True}
    )
    made = BoundedEnvironment(extensions=[GenerationBlock, jinja2.ext.loopcontrols], **options)
    made.globals["raise_exception"] = _raise_exception
    made.globals["strftime_now"] = _strftime_now
    if strict:
        made.tests["none"] = lambda value: value is None or isinstance(value, Null)
    return made


def _strftime_now(format: str) -> str:
    if len(format) > 200:
        raise jinja2.TemplateError(f"strftime_now: expected at most 200 characters, got {len(format):,}")
    return datetime.now().strftime(format)


def _raise_exception(message: object) -> None:
    raise jinja2.TemplateError(str(message) or "it gives no reason")  # str raises for an undefined message
