"""jinja's filters and tests, and the methods of texts and lists, charged to the budget of a rendering.

Each call charges for the values that it reads and returns. Some results may be larger than their arguments (join,
replace, center, indent, formats). Their size is computed first, and a result that is too large is refused.
"""

import json
import re
import string
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jinja2

from ..errors import shown
from .meter import SIZED, STEP, Meter, MeteredContext, check_growth
from .refusals import OverBudget

# these read at most the slots of a list, not the contents of its values
SHALLOW = frozenset(
    ("abs", "attr", "count", "length", "d", "default", "first", "float", "int", "items", "last", "list")
    + ("random", "reverse", "safe")
)
FLOAT_DIGITS = 400  # more than the digits of 1e308 written in full
LAZY = frozenset(("map", "select", "reject", "selectattr", "rejectattr"))
FAST = frozenset(
    ("capitalize", "e", "escape", "forceescape", "lower", "replace", "string", "trim", "upper", "join")
)
QUADRATIC = frozenset(("pprint", "striptags", "urlize", "wordwrap"))  # their time, in the length of the text
CONSTANT_TESTS = frozenset(
    ("odd", "even", "defined", "undefined", "none", "boolean", "false", "true", "integer")
    + ("float", "string", "mapping", "number", "sequence", "iterable", "callable", "sameas", "escaped")
)


def settled(value: Any) -> Any:
    """Return the value, or a list of an iterator's values, because an iterator can be read only once."""
    return list(value) if hasattr(type(value), "__next__") else value


def _metered(meter: Meter, values: Iterable[Any], cost: int) -> Iterator[Any]:
    for value in values:
        meter.charge(cost)
        yield value


def _with_context(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter or test as a function of the template's context, the value and the arguments."""
    wants = getattr(getattr(function, "jinja_pass_arg", None), "name", None)
    if wants == "context":
        return function
    if wants == "eval_context":
        return lambda context, *args, **options: function(context.eval_ctx, *args, **options)
    if wants == "environment":
        return lambda context, *args, **options: function(context.environment, *args, **options)
    return lambda context, *args, **options: function(*args, **options)


def bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the filter with its costs charged to the rendering's budget."""
    inner = _with_context(function)

    @jinja2.pass_context
    def bounded(context: MeteredContext, value: Any, *args: Any, **options: Any) -> Any:
        meter = context.meter
        given = [*args, *options.values()]
        place = STEP

        if name in LAZY:
            texts = args[:1] if name.endswith("attr") else [options.get("attribute")]
            if value and hasattr(type(value), "__iter__"):
                value = _metered(meter, value, STEP * (16 + 4 * sum(map(meter.size, texts))))
        elif name in SHALLOW:
            meter.charge(4 * STEP + sum(map(meter.read, given)))
            if name == "int" and isinstance(value, str) and (args[1:] or "base" in options):
                check_growth(len(value) * 2**12)  # with a base, Python reads a number of any length
            if isinstance(value, SIZED):
                meter.charge(len(value))

            if name == "list" and not isinstance(value, list | tuple):
                place = 4 * STEP  # each slot holds a new text or number
        else:
            value = settled(value)
            if name == "replace":
                given = [*args, *(options.get(key, "") for key in ("old", "new")[len(args) :])]
            _check_filter(name, meter, value, given)

        return meter.made(inner(context, value, *args, **options), place)

    return bounded


def _check_filter(name: str, meter: Meter, value: Any, given: list[Any]) -> None:
    """Charge the budget for a filter that reads the whole value. Raises OverBudget if its result would be too large."""
    meter.charge((64 if name in QUADRATIC else 8) * STEP)
    size = meter.read(value)
    texts = sum(map(meter.read, given))

    if name == "replace" and isinstance(value, str) and len(given) > 1:
        old, new = (str(text) for text in given[:2])
        check_growth(size + value.count(old) * len(new))
    elif name == "join":
        check_growth(size + (len(value) if isinstance(value, SIZED) else 1) * texts)
    elif name == "round":
        check_growth(_numbers(given) * 2**12)  # round computes 10 to the power of the precision
    elif name == "format":
        check_percent(meter, str(value), given)
    else:
        lines = value.count("\n") + 1 if isinstance(value, str) else 1
        check_growth(grown := size * (1 + texts) + lines * _numbers(given))
        meter.charge(grown)

    if name not in FAST:
        meter.charge(size * (STEP + (size // 2**8 if name in QUADRATIC else 0)))
    if name == "sum" and any(isinstance(start, list | tuple) for start in given):  # it concatenates lists
        meter.charge(size * len(value) // 4)


def bounded_test(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the test with its costs charged to the rendering's budget."""
    inner = _with_context(function)

    @jinja2.pass_context
    def bounded(context: MeteredContext, value: Any, *args: Any, **options: Any) -> Any:
        for operand in (value, *args, *options.values()):
            if not (name == "in" and isinstance(operand, dict) and operand is not value):
                context.meter.read(operand)
        return inner(context, value, *args, **options)

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
    """Write a value as JSON. Jinja's own filter escapes <, > and & for HTML, and models were not trained on that."""
    meter = context.meter
    check_growth(size := meter.read(value))
    meter.charge(32 * STEP + 2 * size)
    given = [each for each in (indent, *(separators or ())) if each is not None]
    if any((each if isinstance(each, int) else len(each)) > 64 for each in given):
        raise OverBudget("asks tojson for more than 64 characters of white space")

    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    if indent is None:
        return meter.made(encoder.encode(value))
    return "".join(meter.made(piece) for piece in encoder.iterencode(value))


# ---- methods and formats

# these may read a text once for each character of their arguments
READ_AGAIN = frozenset(("rfind", "rindex", "rsplit", "rpartition", "strip", "lstrip", "rstrip"))
ANY_SIZE = frozenset(("to_bytes", "from_bytes", "fromhex"))


def check_method(meter: Meter, receiver: Any, name: str, given: list[Any]) -> None:
    """Charge the budget for a method of a built-in type. Raises OverBudget if its result would be too large."""
    texts = sum([meter.read(value) for value in given])
    if isinstance(receiver, list | tuple):
        meter.read(receiver) if name in ("count", "index") else meter.charge(STEP * len(receiver))
    elif isinstance(receiver, str | bytes):
        _check_text_method(meter, receiver, name, given, texts)
    if name in ANY_SIZE:
        raise OverBudget(f"calls {name}, which can make numbers and bytes of any size")


def _check_text_method(meter: Meter, receiver: Any, name: str, given: list[Any], texts: int) -> None:
    length = len(receiver)
    meter.charge(length)
    if name in READ_AGAIN:
        meter.charge(length * texts // 4)
    elif name in ("center", "ljust", "rjust", "zfill"):
        check_growth(length + _numbers(given))
    elif name in ("expandtabs", "translate"):
        check_growth(length * (1 + _numbers(given) + texts))
    elif name == "replace" and len(given) > 1:
        check_growth(length + receiver.count(given[0]) * len(given[1]))
    elif name == "join" and given and isinstance(given[0], SIZED):
        check_growth(texts + length * len(given[0]))
    elif name in ("format", "format_map"):
        _check_format(meter, receiver, texts)


def _numbers(given: list[Any]) -> int:
    return sum(abs(number) for number in given if isinstance(number, int))


def _check_format(meter: Meter, text: Any, given: int) -> None:
    """Charge the budget for '{:>10}'.format(...). Raises OverBudget if the result may be too large.

    given: the number of characters in the arguments of format.
    """
    meter.charge(64 * STEP + 8 * STEP * text.count("{"))
    fields = widest = 0
    for _, field, width, _ in string.Formatter().parse(text):
        fields += field is not None
        if width and ("{" in width or re.search(r"\d{5}", width)):
            raise OverBudget(f"writes a field of the width {shown(width)}")
        widest = max(widest, _largest_number(width or ""))
    check_growth(len(text) + fields * (given + widest + FLOAT_DIGITS))


def check_percent(meter: Meter, text: Any, given: Any) -> None:
    """Charge the budget for '%10s' % given. Raises OverBudget if the result may be too large."""
    size = meter.read(given)
    plain = text.decode("latin-1") if isinstance(text, bytes) else text
    meter.charge(len(plain))
    if re.search(r"[%)][-#0 +]*\d{5}|%[-#0 +]*\*|%[^%a-zA-Z]*\.(\*|\d{5})|\)[-#0 +\d]*\.\d{5}", plain):
        raise OverBudget("writes a field of more than 9,999 characters")
    meter.charge(STEP * (fields := plain.count("%")))
    check_growth(len(plain) + fields * (size + _largest_number(plain) + FLOAT_DIGITS))


def _largest_number(text: str) -> int:
    """Return the largest number in a format, which bounds its widths and precisions. Numbers have at most 4 digits."""
    return max(map(int, re.findall(r"\d{1,4}", text)), default=0)
