"""The items that training takes from --data: read from each of its files, counted, and weighted.

    examples = load_items(cfg, tokenizer, convert)
    examples.parts                                     the items of each argument of --data, for the order of rows

Each argument of --data is converted by itself, so its rows may have another shape than those of the other arguments.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from ...model.errors import InputError
from ...model.text.tokenizer import Tokenizer
from ..run.data_files import Source, data_sources
from ..run.order import Part, rows_per_epoch
from .row import Row
from .rows import Tally, check_rendered, read_source, report_counts

Item = TypeVar("Item")


class Items(list[Item]):
    """The items of all arguments of --data, in their order.

    parts: for each argument the number of its items, and their weight.
    """

    def __init__(self, items: Iterable[Item] = (), parts: Sequence[Part] | None = None):
        super().__init__(items)
        self.parts = [Part(len(self))] if parts is None else list(parts)

    def first(self, count: int) -> list[Item]:
        """Return about `count` items: the first of each part, as many as its share of an epoch."""
        total, start, found = sum(part.rows_per_epoch for part in self.parts), 0, []
        for part in self.parts:
            found += self[start : start + min(part.rows, round(count * part.rows_per_epoch / total))]
            start += part.rows
        return found


def load_items(
    cfg: Any,
    tokenizer: Tokenizer,
    convert: Callable[[list[Row]], tuple[list[Item], Tally]],
) -> Items[Item]:
    """Return the items made of the rows of --data, and print how many rows were used and dropped.

    cfg: the flags; only data, data_weights and row_template are read. convert: a function of an argument's rows that
    returns (items, counts).
    Raises InputError as `collected`, `read_source` and `convert` do.
    """
    tallies: list[Tally] = []

    def read(source: Source) -> tuple[list[Item], Tally]:
        found, counts = convert(read_source(source, cfg.row_template))
        tallies.append(counts)
        return found, counts

    items = collected(cfg, read)
    check_rendered(tallies, tokenizer)
    return items


def collected(cfg: Any, read: Callable[[Source], tuple[list[Item], Mapping[str, int]]]) -> Items[Item]:
    """Return the items of all arguments of --data, and print the counts of each. Arguments as in `load_items`.

    read: a function of an argument's files that returns (items, counts).
    Raises InputError as `data_sources` does, and if --data-weights does not fit the arguments.
    """
    sources = data_sources(cfg.data)
    weights = check_data_weights(getattr(cfg, "data_weights", ()), len(sources))

    items: list[Item] = []
    parts: list[Part] = []
    for source, weight in zip(sources, weights, strict=True):
        found, counts = read(source)
        several = f" ({len(source.files)} files)" if len(source.files) > 1 else ""
        report_counts(source.name + several, counts)
        items += found
        parts.append(Part(len(found), weight))

    if any(part.weight != 1 for part in parts):
        names = [source.name for source in sources]
        of_each = [f"{part.rows_per_epoch} of {name}" for name, part in zip(names, parts, strict=True)]
        print(f"an epoch has {rows_per_epoch(parts)}: {', '.join(of_each)}")
    return Items(items, parts)


def check_data_weights(weights: Sequence[float], count: int) -> Sequence[float]:
    """Return the weights, 1 by default. Raises InputError unless `weights` is empty or has `count` numbers."""
    if weights and len(weights) != count:
        raise InputError(f"--data-weights: expected {count}, one per argument of --data, got {len(weights)}")
    return weights or (1.0,) * count
