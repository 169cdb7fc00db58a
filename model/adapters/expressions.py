"""Regular expressions from other people's files, matched in bounded time.

Python's `re` tries one path through an expression after another. Even an expression of 20 characters may have more
paths than there is time for, and `re` cannot be stopped. So `re` runs only the expressions whose paths can be counted
and are few, as in most expressions that people write. For any other expression, all paths are followed at once. Each
step is counted, and too many steps are refused.

    ends of "a|ab" in "abc", begun at 0:    {1, 2} as the bits of an integer, 0b110

Source: Thompson 1968, https://doi.org/10.1145/363347.363387; the parse tree is that of Python's own `re`
"""

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from math import inf
from typing import Any

from ..errors import InputError, shown

op: Any = import_module("re._constants")
parser: Any = import_module("re._parser")

MOST_CHARACTERS = 10_000  # of an expression; Unsloth's have about 500
MOST_WAYS = 30_000  # the most paths that `re` may try on one name
MOST_STEPS = 500_000  # for all expressions of one adapter: about a second; Unsloth's takes 90 steps a name
NAME_LENGTH = 128  # paths are counted for names up to this length; a module's name has about 40 characters
_PLAIN = re.compile(r"[\w.]*")  # a plain name has a single path
_ONE = {op.LITERAL, op.NOT_LITERAL, op.ANY, op.IN}  # nodes that match one character
_NOT = {op.CATEGORY_NOT_DIGIT: op.CATEGORY_DIGIT, op.CATEGORY_NOT_SPACE: op.CATEGORY_SPACE}
_NOT |= {op.CATEGORY_NOT_WORD: op.CATEGORY_WORD}


def is_word(character: str) -> bool:
    return character.isalnum() or character == "_"


_CATEGORIES = {op.CATEGORY_DIGIT: str.isdecimal, op.CATEGORY_SPACE: str.isspace, op.CATEGORY_WORD: is_word}


@dataclass
class Steps:
    """The number of steps left, shared by several expressions."""

    left: int = field(default_factory=lambda: MOST_STEPS)


class Expression:
    """A regular expression from a file: `before`, `text` and `after` joined. Only `text` comes from the file.

    key: the name of the text in messages.
    steps: the budget that the expression shares with others.

    Raises InputError if it is not a valid expression, or has a part that cannot be followed: a backreference, an atomic
    group or a possessive repeat.
    """

    def __init__(
        self,
        text: str,
        key: str = "expression",
        before: str = "",
        after: str = "",
        steps: Steps | None = None,
    ):
        self.arguments, self.key = (text, key, before, after), key
        self.text, self.whole, self.steps = text, f"{before}{text}{after}", steps or Steps()
        self.known: dict[str, int] = {}  # name -> the result of `ends`
        self.fits: dict[tuple[int, int, str], bool] = {}  # (id of a node, flags, character)

        if len(text) > MOST_CHARACTERS:
            raise InputError(f"{key}: expected at most {MOST_CHARACTERS} characters, got {len(text)}")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                plain = _PLAIN.fullmatch(text) is not None
                if not plain:
                    parser.parse(text)  # alone, since "a)(b" would be valid within brackets
                self.tree = None if plain else parser.parse(self.whole)
                few = self.tree is None or _ways(self.tree) <= MOST_WAYS
                self.pattern = re.compile(self.whole) if few else None
        except (re.error, OverflowError, RecursionError, ValueError) as error:
            raise InputError(
                f"{key}: expected a regular expression, got {shown(repr(text))}: {error}"
            ) from None

    def __reduce__(self) -> Any:  # a copy is built anew, because the nodes of a copied tree have other ids
        return Expression, self.arguments

    def matches(self, name: str) -> bool:
        """Return whether the expression matches the whole name, like re.fullmatch. name: not empty, on one line."""
        if self.pattern is not None and (self.tree is None or len(name) <= NAME_LENGTH):
            return self.pattern.fullmatch(name) is not None
        return bool(self.ends(name) >> len(name) & 1)

    def ends(self, name: str) -> int:
        """Return the end positions of all matches that begin at the start of the name.

        The result is a set of bits: bit i is 1 if a match ends just before character i.
        """
        if self.tree is None:
            self.tree = parser.parse(self.whole)
        if name not in self.known:
            self.known[name] = _Walk(self, name).follow(self.tree, 1, self.tree.state.flags)
        return self.known[name]

    def count(self, steps: int) -> None:
        self.steps.left -= steps
        if self.steps.left < 0:
            raise InputError(
                f"{self.key}: expected a regular expression that matches quickly, got {shown(repr(self.text))}"
            )

    def takes(self, node: Any, character: str, flags: int) -> bool:
        """Return whether a one-character node of the parse tree, such as [a-z], matches this character."""
        key = id(node), flags, character
        if key not in self.fits:
            positive, negated = _positive(node)
            cases = (str.lower, str.upper, str) if flags & re.IGNORECASE else (str,)
            found = [case(character) for case in cases]
            self.fits[key] = any(_is(positive, c, flags) for c in found if len(c) == 1) != negated
        return self.fits[key]


def _ways(tree: Any) -> float:
    """Return the number of paths that `re` may try on one name.

    Raises ValueError for a part that _Walk cannot follow, such as a backreference.
    """
    ways = 1.0
    for kind, value in tree:
        if kind in (op.GROUPREF, op.GROUPREF_EXISTS, op.ATOMIC_GROUP, op.POSSESSIVE_REPEAT):
            raise ValueError(f"{str(kind).lower()} is not read")
        inside = [_ways(part) for part in _parts(kind, value)]
        if kind is op.BRANCH:
            ways *= sum(inside)
        elif kind in (op.MAX_REPEAT, op.MIN_REPEAT):
            one = len(value[2]) == 1 and value[2][0][0] in _ONE
            ways *= 1 + inside[0] if value[1] == 1 else NAME_LENGTH if one else inf
        elif kind in (op.ASSERT, op.ASSERT_NOT):
            ways = inf
        elif inside:
            ways *= inside[0]
    return ways


def _parts(kind: Any, value: Any) -> Sequence[Any]:
    if kind is op.BRANCH:
        return value[1]
    if kind in (op.MAX_REPEAT, op.MIN_REPEAT, op.SUBPATTERN, op.ASSERT, op.ASSERT_NOT):
        return [value[-1]]
    return []


class _Walk:
    """A match of one expression against one name.

    A set of positions is an integer: its bit i stands for the position just before character i.
    """

    def __init__(self, expression: Expression, name: str):
        self.expression, self.name = expression, name
        self.at: dict[str, int] = {}  # character -> its positions in the name
        for i, c in enumerate(name):
            self.at[c] = self.at.get(c, 0) | 1 << i
        self.masks: dict[tuple[int, int], int] = {}  # (id of a node, flags) -> positions that it matches
        words = [False, *map(is_word, name), False]
        self.borders = sum(1 << i for i in range(len(name) + 1) if words[i] != words[i + 1])

    def follow(self, tree: Any, starts: int, flags: int) -> int:
        """Return the end positions of all matches of a parse tree that begin at one of `starts`."""
        for node in tree:
            if not starts:
                break
            self.expression.count(1)
            if node[0] in _ONE:
                starts = (starts & self.mask(node, flags)) << 1
            else:
                starts = self.step(node[0], node[1], starts, flags)
        return starts

    def step(self, kind: Any, value: Any, starts: int, flags: int) -> int:
        """Return the end positions of all matches of a parse-tree node that begin at one of `starts`.

        kind, value: the node, which may match any number of characters.
        """
        match kind:
            case op.BRANCH:
                ends = 0
                for branch in value[1]:
                    ends |= self.follow(branch, starts, flags)
                return ends
            case op.SUBPATTERN:
                _, add, remove, tree = value
                return self.follow(tree, starts, flags & ~remove | add)

            case op.MAX_REPEAT | op.MIN_REPEAT:
                return self.repeat(value, starts, flags)
            case op.AT:
                return starts & self.places(value, flags)
            case op.ASSERT | op.ASSERT_NOT:
                found = self.seen(value, starts, flags)
                return found if kind is op.ASSERT else starts & ~found
        raise AssertionError(kind)

    def repeat(self, value: Any, starts: int, flags: int) -> int:
        least, most, tree = value
        longest = len(self.name) + 1  # the most rounds: a further round would change nothing
        for _ in range(min(least, longest)):
            starts = self.follow(tree, starts, flags)
        mask = self.mask(tree[0], flags) if len(tree) == 1 and tree[0][0] in _ONE else None
        ends = new = starts
        for _ in range(min(most - least, longest)):
            new = (self.follow(tree, new, flags) if mask is None else (new & mask) << 1) & ~ends
            if not new:
                break
            ends |= new
            self.expression.count(1)
        return ends

    def places(self, where: Any, flags: int) -> int:
        """Return the positions at which an anchor, such as ^ or $, holds."""
        last, breaks = 1 << len(self.name), self.at.get("\n", 0)
        lines = bool(flags & re.MULTILINE)
        match where:
            case op.AT_BEGINNING | op.AT_BEGINNING_STRING:
                return 1 | (breaks << 1 if lines and where is op.AT_BEGINNING else 0)
            case op.AT_END:
                return last | (breaks if lines else breaks & last >> 1)
            case op.AT_END_STRING:
                return last
            case op.AT_BOUNDARY:
                return self.borders
            case op.AT_NON_BOUNDARY:
                return ~self.borders
        raise AssertionError(where)

    def seen(self, value: Any, starts: int, flags: int) -> int:
        """Return the positions in `starts` at which a look-ahead or a look-behind finds a match.

        value: (direction, tree), where the direction is 1 for a look-ahead and -1 for a look-behind.
        """
        direction, tree = value
        width = tree.getwidth()[0] if direction < 0 else 0
        found = 0
        for i in range(width, starts.bit_length()):
            if starts >> i & 1:
                ends = self.follow(tree, 1 << i - width, flags)
                found |= bool(ends >> i & 1 if direction < 0 else ends) << i
        return found

    def mask(self, node: Any, flags: int) -> int:
        """Return the positions at which a one-character node of the parse tree, such as [a-z], matches."""
        kind, value = node
        if kind is op.LITERAL and not flags & re.IGNORECASE:
            return self.at.get(chr(value), 0)
        key = id(node), flags
        if key not in self.masks:
            takes = self.expression.takes
            self.masks[key] = sum(places for c, places in self.at.items() if takes(node, c, flags))
        return self.masks[key]


def _positive(node: Any) -> tuple[Any, bool]:
    """Strip the negation from a one-character node of the parse tree: [^a] becomes [a].

    Returns (node, negated), where negated tells whether the node had a negation.
    """
    kind, value = node
    if kind is op.NOT_LITERAL:
        return (op.LITERAL, value), True
    if kind is op.IN and value[0][0] is op.NEGATE:
        return (op.IN, value[1:]), True
    return node, False


def _is(node: Any, character: str, flags: int) -> bool:
    """Return whether a node of the parse tree that stands for one character matches this character.

    The node is not negated.
    """
    kind, value = node
    match kind:
        case op.ANY:
            return character != "\n" or bool(flags & re.DOTALL)
        case op.LITERAL:
            return ord(character) == value
        case op.RANGE:
            return value[0] <= ord(character) <= value[1]
        case op.CATEGORY if value in _NOT:
            return not _CATEGORIES[_NOT[value]](character)
        case op.CATEGORY:
            return _CATEGORIES[value](character)
        case op.IN:
            return any(_is(each, character, flags) for each in value)
    raise AssertionError(kind)
