"""A check for token ids without a row in the model's embedding. They are refused only if they occur in the data.

Some published tokenizers have more ids than their model has rows. In gemma-3-1b, <image_soft_token> has the id 262,144,
but the model has only 262,144 rows. In some folders of Llama-2, <pad> has the id 32,000 for 32,000 rows. Burnish never
pads, and never samples such an id (vocabulary.py), so the id does no harm unless the data contain this id.
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

FOREIGN = (
    0.1  # with a larger share of ids beyond the rows, the message says that the two do not belong together
)


class Item(Protocol):
    """The interface of data whose ids are checked: an Example, a Prompt or a Preference, for instance."""

    @property
    def where(self) -> str: ...  # file and line of the row

    @property
    def sequences(self) -> Sequence[Sequence[int]]: ...  # all token sequences that the model reads


def check_model(
    model: Transformer | ScalarModel,
    tokenizer: Tokenizer,
    items: Iterable[Item],
    longest: int,
    name: str = "the model",
) -> None:
    """Raise InputError if an item has an id for which the model has no row, and stop such ids from being sampled.

    Warns if a stop token is such an id, or if sequences of `longest` tokens are longer than the model was trained on.
    name: the words for the model in messages.
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
    """Raise InputError naming the first item with an id of `rows` or more.

    rows: the number of rows of the model's embedding. name: the words for the model in the message.
    """
    if tokenizer.vocabulary.end > rows:
        for item in items:
            for ids in item.sequences:
                if max(ids, default=0) >= rows:
                    check_sequence(item.where, ids, tokenizer, rows, name)


def check_sequence(where: str, ids: Sequence[int], tokenizer: Tokenizer, rows: int, name: str) -> None:
    """Raise InputError if the sequence `ids` contains an id of `rows` or more.

    where: the place of the sequence, for the message. rows: the number of rows of the model's embedding. name: the
    words for the model.
    """
    wrong = next((token for token in ids if token >= rows), None)
    if wrong is None:
        return
    beyond = ids_beyond(tokenizer, rows)
    every = len(tokenizer.backend.get_vocab())
    way_out = (
        f"{len(beyond)} of the tokenizer's {every} ids are too large: model and tokenizer do not belong together"
        if len(beyond) > FOREIGN * every
        else "take the token out of the text, or use a model that has a row for it"
    )
    token = tokenizer.backend.id_to_token(wrong)
    raise InputError(
        f"{where}: token {token!r:.60}: {name} has no row for its id {wrong}, expected ids below {rows}; {way_out}"
    )


def ids_beyond(tokenizer: Tokenizer, rows: int) -> list[int]:
    """Return the tokenizer's ids that are `rows` or more, in ascending order."""
    return sorted(id for id in tokenizer.backend.get_vocab().values() if id >= rows)
