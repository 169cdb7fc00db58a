"""The budget of one rendering of a template, counted in characters. sandbox.py lists the charges.

A step costs STEP characters. A step is a node of the template that runs, or a slot of a list. Text costs its length.
"""

from typing import Any, NoReturn

from jinja2.runtime import Context
from jinja2.utils import Namespace

from .refusals import OverBudget

STEP = 16  # copying or reading this many characters takes less time than a step
MOST_STEPS = 10_000_000  # of a rendering: about a second
STEPS_EACH, MOST_STEPS_OF_ALL = (
    50_000,
    20_000_000,
)  # steps for each message, since some templates read all messages for each message
WIDE = (
    2**14
)  # the size of an integer above 64 bits: it has many digits, and Python's hash of it is predictable
LARGEST = 2**24  # characters of one text, or STEP for each slot of a list
MOST_DEPTH = 200  # of nested lists and objects, because comparing and writing them recurses

CONTAINERS = (list, tuple, dict, set, frozenset, range, type({}.keys()), type({}.values()), type({}.items()))
SIZED = (str, bytes, *CONTAINERS)
ATOMS = frozenset((bool, float, type(None)))


class Meter:
    """The remaining budget of a rendering, in characters."""

    __slots__ = ("left", "steps")

    def __init__(self, messages: int = 0) -> None:
        self.steps = min(MOST_STEPS + STEPS_EACH * messages, MOST_STEPS_OF_ALL)
        self.left = self.steps * STEP

    def refuse(self) -> NoReturn:
        raise OverBudget(f"takes more than {self.steps:,} steps")

    def charge(self, characters: int) -> None:
        """Subtract a cost from the budget. Raises OverBudget if the budget is used up."""
        self.left -= characters
        if self.left < 0:
            self.refuse()

    def size(self, value: Any) -> int:
        """Return the number of characters in a text, or in all that a list or an object contains.

        Raises OverBudget if the value is too large or nested too deeply.
        """
        if isinstance(value, str | bytes):
            return len(value)
        if type(value) is int:
            return WIDE if value.bit_length() > 64 else 0
        if type(value) in ATOMS:
            return 0

        # level by level, because recursion would fail on deep values
        total, level = 0, [value]
        for _ in range(MOST_DEPTH):
            # the size of this level, and the next one
            children: list[Any] = []
            for each in level:
                if isinstance(each, str | bytes):
                    total += len(each)
                elif type(each) is int:
                    total += WIDE if each.bit_length() > 64 else 0
                elif type(each) in ATOMS:
                    continue
                elif isinstance(each, dict | Namespace):
                    entries = each if isinstance(each, dict) else each._Namespace__attrs
                    children += entries.keys()
                    children += entries.values()
                elif isinstance(each, CONTAINERS):
                    children += each

                # refused before the whole next level is collected
                if total + 2 * STEP * len(children) > self.left:
                    self.refuse()

            total += 2 * STEP * len(level)
            if not children:
                return total
            level = children
        raise OverBudget(f"nests lists and objects more than {MOST_DEPTH} deep")

    def read(self, value: Any) -> int:
        """Charge the budget for a value that is read as a whole, and return its size."""
        size = len(value) if type(value) is str else self.size(value)
        self.left -= STEP + size
        if self.left < 0:
            self.refuse()
        return size

    def made(self, value: Any, place: int = STEP) -> Any:
        """Charge the budget for the memory of a new value, and return the value.

        place: the charge for each slot of a list.
        """
        if type(value) is str or isinstance(value, str | bytes):
            self.left -= len(value) if value.isascii() else 4 * len(value)
        elif isinstance(value, CONTAINERS):
            self.left -= place * len(value) * (4 if isinstance(value, dict) else 1)
        if self.left < 0:
            self.refuse()
        return value


def check_growth(characters: int) -> None:
    """Raise OverBudget if a text or list of this size, which is about to be made, would be too large."""
    if characters > LARGEST:
        raise OverBudget(f"makes a text or list of more than {LARGEST:,} characters")


class MeteredContext(Context):
    """A rendering's context with its meter. Contexts that jinja derives from it share the meter."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        messages = self.parent.get("messages")
        self.meter = Meter(len(messages) if isinstance(messages, list) else 0)

    def derived(self, locals: dict[str, Any] | None = None) -> "MeteredContext":
        context = super().derived(locals)
        assert isinstance(context, MeteredContext)
        context.meter = self.meter
        return context
