"""Token ids that a model has no row for: refused where they occur, not where they exist.

Published tokenizers have a few ids more than their model has rows: gemma-3-1b 262,145 for 262,144 (<image_soft_token>),
Llama-2's folders a <pad> at 32,000 for 32,000. Nothing here is padded, and such an id is never drawn (vocabulary.py),
so it does no harm until a row holds it.
"""

import sys
from collections.abc import Iterable, Sequence
from typing import Protocol

from ...model.errors import InputError
from ...model.scalar import ScalarModel
from ...model.text.tokenizer import Tokenizer
from ...model.transformer import Transformer
from ...model.vocabulary import say_what_never_ends
from .processes import rank

FOREIGN = 0.1  # share of a tokenizer's ids beyond the rows from which on it is called another model's


class Item(Protocol):
    """A row's ids, as an Example, a Prompt or a pair has them."""

    @property
    def where(self) -> str: ...  # the file and line

    @property
    def sequences(self) -> Sequence[Sequence[int]]: ...  # of ids, all that a model is to read of it


def check_model(
    model: Transformer | ScalarModel,
    tokenizer: Tokenizer,
    items: Iterable[Item],
    longest: int,
    name: str = "the model",
) -> None:
    """Refuse items with ids that the model, called `name`, has no row for; no such id is drawn from then on.

    Warns where a stop token is one, and where sequences are longer than the model was trained on.
    """
    rows = model.config.vocab_size
    check_ids(items, tokenizer, rows, name)
    tokenizer.keep_below(rows)
    say_what_never_ends(tokenizer.stop_ids, rows, name)
    if longest > model.config.max_position_embeddings and rank() == 0:
        limit = model.config.max_position_embeddings
        print(
            f"warning: sequences of up to {longest} tokens; the model was trained on up to {limit}",
            file=sys.stderr,
        )


def check_ids(items: Iterable[Item], tokenizer: Tokenizer, rows: int, name: str = "the model") -> None:
    """Raises InputError for the first item with an id of `rows` or more, which the model called `name` cannot read."""
    if tokenizer.vocabulary.end > rows:
        for item in items:
            for ids in item.sequences:
                if max(ids, default=0) >= rows:
                    check_sequence(item.where, ids, tokenizer, rows, name)


def check_sequence(where: str, ids: Sequence[int], tokenizer: Tokenizer, rows: int, name: str) -> None:
    """Raises InputError where `ids`, the sequence that stands at `where`, hold one of `rows` or more."""
    wrong = next((token for token in ids if token >= rows), None)
    if wrong is None:
        return
    beyond = ids_beyond(tokenizer, rows)
    every = len(tokenizer.backend.get_vocab())
    way_out = (
        f"{len(beyond)} of the tokenizer's {every} ids are beyond them: the two do not belong together"
        if len(beyond) > FOREIGN * every
        else "take it out of the text, or use a model that has it"
    )
    token = tokenizer.backend.id_to_token(wrong)
    raise InputError(
        f"{where}: token {token!r:.60}: {name} has no row for its id {wrong}, expected ids below {rows}; {way_out}"
    )


def ids_beyond(tokenizer: Tokenizer, rows: int) -> list[int]:
    """The tokenizer's ids of `rows` or more, in order."""
    return sorted(id for id in tokenizer.backend.get_vocab().values() if id >= rows)
