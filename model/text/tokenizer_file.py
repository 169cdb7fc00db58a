"""The reader of tokenizer.json: it returns a tokenizer that encodes, decodes and can be saved, or raises an error.

The `tokenizers` package also accepts files that it cannot use: files with two tokens on one id, with an id that makes
it allocate gigabytes, or with a normalizer on which it panics. In Python, a panic is not a subclass of Exception, and
Rust writes its message to standard error.
"""

import base64
import binascii
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import tokenizers

from ..errors import InputError, shown
from ..files.text_files import parse_json, read_text
from ..vocabulary import Vocabulary

MOST_IDS = 2**24  # the package makes a list of all ids up to the last one when it saves
SMALL = 2**20  # characters; a tokenizer file up to this size is saved and read again as a check
MOST_GROWTH = 1000  # the largest factor by which a normalizer or another part may lengthen a text
PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
PROBE = "Hello, wörld! 12  \n\t再见 🎉 <a> "


def read_backend(file: Path) -> tuple[tokenizers.Tokenizer, Vocabulary]:
    """Return the tokenizer of a file, and the vocabulary of its ids.

    Truncation, padding and dropout are switched off, because they would change ids silently. Raises InputError if the
    file is not a tokenizer, or if the tokenizer cannot be used, or cannot be saved and read again.
    """
    text = read_text(file)

    # errors that would crash or exhaust the package are found before it reads the file
    if len(text) < SMALL or re.search(r'":\s*\d{8,}', text):
        _check_ids(found := parse_json(text, str(file)), file)
        parts = [found.get(name) for name in PARTS] if isinstance(found, dict) else []
    else:
        starts = re.finditer(rf'"(?:{"|".join(PARTS)})"\s*:\s*(?=\{{)', text)
        parts = [_object_at(text, start.end()) for start in starts]
    for part in parts:
        if isinstance(part, dict) and _growth(part) > MOST_GROWTH:
            raise InputError(
                f"{file}: {shown(part.get('type'))}: expected to make a text at most {MOST_GROWTH} times as long"
            )
    if '"precompiled_charsmap"' in text:
        for charsmap in re.findall(r'"precompiled_charsmap"\s*:\s*"([^"\\]*)"', text):
            _check_charsmap(charsmap, file)

    with _without_panics():
        try:
            backend = tokenizers.Tokenizer.from_str(text)
            plain(backend)
            vocabulary = distinct_ids(backend)
            _check_loaded(backend, text)
        except InputError as error:
            raise InputError(f"{file}: {error}") from None
        except BaseException as error:  # includes panics; `_reason` raises any other non-Exception again
            raise InputError(
                f"{file}: not a tokenizer.json that `tokenizers` can read: {_reason(error)}"
            ) from error
    return backend, vocabulary


def plain(backend: tokenizers.Tokenizer) -> None:
    """Switch off truncation, padding and dropout, which a tokenizer.json may enable."""
    backend.no_truncation()
    backend.no_padding()
    if getattr(backend.model, "dropout", None):
        backend.model.dropout = None  # type: ignore


def encoding_of(
    backend: tokenizers.Tokenizer, text: str, *, add_special_tokens: bool = False
) -> tokenizers.Encoding:
    """Encode a text. Raises InputError for half of a surrogate pair, and for a text on which the tokenizer fails."""
    try:
        return backend.encode(text, add_special_tokens=add_special_tokens)
    except TypeError:  # the package raises it for half of a surrogate pair
        raise InputError(f"expected text in valid Unicode, got {text[:40]!a}") from None
    except BaseException as error:  # a panic
        raise InputError(f"the tokenizer fails on {text[:40]!r}: {_reason(error)}") from error


def text_of(backend: tokenizers.Tokenizer, ids: Sequence[int], skip_special_tokens: bool) -> str:
    """Decode ids. Raises InputError if the decoder fails."""
    try:
        return backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
    except BaseException as error:  # a panic
        raise InputError(f"the tokenizer's decoder fails on {list(ids[:8])}: {_reason(error)}") from error


def continuing(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Return the same tokenizer, but without the space that some tokenizers put before every text."""
    settings = json.loads(backend.to_str())
    parts = {name: _without_prefix_space(settings[name]) for name in ("normalizer", "pre_tokenizer")}
    if parts.items() <= settings.items():
        return backend
    return tokenizers.Tokenizer.from_str(json.dumps(settings | parts))


def _without_prefix_space(part: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return a normalizer or pre-tokenizer of tokenizer.json without the part that changes the start of a text."""
    if part is None or part["type"] == "Prepend":
        return None
    part = dict(part)
    for members in ("normalizers", "pretokenizers"):
        if members in part:
            part[members] = [kept for member in part[members] if (kept := _without_prefix_space(member))]
    if part["type"] == "Metaspace":
        part["prepend_scheme"] = "never"
    if part["type"] == "ByteLevel":
        part["add_prefix_space"] = False
    return part


# ---- checks


def _check_ids(found: Any, file: Path) -> None:
    """Raise InputError for a negative id, or for an id so large that `tokenizers` would end the process."""
    model = found.get("model") if isinstance(found, dict) else None
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    ids = list(vocabulary.items()) if isinstance(vocabulary, dict) else []
    added = found.get("added_tokens") if isinstance(found, dict) else None
    for token in added if isinstance(added, list) else ():
        if isinstance(token, dict):
            ids.append((token.get("content"), token.get("id")))
    for token, token_id in ids:
        if isinstance(token_id, int) and not 0 <= token_id < MOST_IDS:
            raise InputError(
                f"{file}: the token {shown(token)}: expected an id from 0 to {MOST_IDS - 1}, got {shown(token_id)}"
            )


def _object_at(text: str, start: int) -> Any:
    try:
        return json.JSONDecoder().raw_decode(text, start)[0]
    except (ValueError, RecursionError):  # the package raises its own error for this later
        return None


def _growth(part: Any) -> float:
    """Return the approximate largest factor by which a part of tokenizer.json lengthens a text.

    part: a normalizer, pre-tokenizer, post-processor or decoder.
    """
    if not isinstance(part, dict):
        return 1.0

    # for a sequence of parts: the product of their factors
    grown = 1.0
    for name in ("normalizers", "pretokenizers", "processors", "decoders"):
        members = part.get(name)
        for member in members if isinstance(members, list) else ():
            grown = min(grown * _growth(member), 2.0 * MOST_GROWTH)

    content, pattern = part.get("content"), part.get("pattern")
    if part.get("type") == "Replace" and isinstance(content, str):
        found = pattern.get("String") if isinstance(pattern, dict) else None
        least = len(found) if isinstance(found, str) else int(not _finds_nothing(pattern))
        grown *= max(1.0, len(content) / least) if least else 1 + len(content)
    if part.get("type") == "Prepend" and isinstance(part.get("prepend"), str):
        grown *= 1 + len(part["prepend"]) / 100
    if part.get("type") == "TemplateProcessing":
        grown *= max(_pieces(part, "single"), _pieces(part, "pair"))
    return grown


def _finds_nothing(pattern: Any) -> bool:
    """Return whether a pattern may match an empty text, so that its replacement is inserted everywhere.

    The result is True if Python cannot read the pattern.
    """
    try:
        return re.search(pattern["Regex"], "") is not None
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError, re.error):
        return True


def _pieces(part: dict[str, Any], name: str) -> float:
    """Return the factor by which a post-processor's template lengthens a text.

    The factor is how often the template writes the text, plus 0.01 for each id that it adds. An added id counts little,
    because it is short beside a text.
    name: the template, single or pair.
    """
    tokens, written = part.get("special_tokens"), 0.0
    for piece in part[name] if isinstance(part.get(name), list) else ():
        added = piece.get("SpecialToken") if isinstance(piece, dict) else None
        key = added.get("id") if isinstance(added, dict) else None
        token = tokens.get(key) if isinstance(tokens, dict) and isinstance(key, str) else None
        ids = token.get("ids") if isinstance(token, dict) else None
        written += 1.0 if added is None else (len(ids) if isinstance(ids, list) else 1) / 100
    return max(1.0, written)


def _check_charsmap(encoded: str, file: Path) -> None:
    """Raise InputError if a normalizer's precompiled_charsmap is shorter than its first four bytes state.

    `tokenizers` would allocate the stated length without a check.
    """
    try:
        raw = base64.b64decode(encoded, validate=True)
    except binascii.Error:
        raw = b""
    if len(raw) < 4 or int.from_bytes(raw[:4], "little") > len(raw) - 4:
        raise InputError(
            f"{file}: precompiled_charsmap: expected a length and that many bytes, got {len(raw)} bytes in all"
        )


def _check_loaded(backend: tokenizers.Tokenizer, text: str) -> None:
    """Raise InputError, or an error of `tokenizers`, if the tokenizer that was read from `text` cannot be used."""
    found = re.search(r'"added_tokens"\s*:\s*(?=\[)', text)
    for token in json.JSONDecoder().raw_decode(text, found.end())[0] if found else ():
        if (token_id := backend.token_to_id(token["content"])) != token["id"]:
            raise InputError(
                f"added_tokens: {shown(token['content'])}: expected its id in the vocabulary or the next free one, "
                f"got {token['id']}, which `tokenizers` changes to {token_id}"
            )
    ids = _probe(backend)
    backend.encode("")  # including the special tokens of the post-processor
    if len(text) < SMALL:
        _probe(continuing(backend))
        again = tokenizers.Tokenizer.from_str(backend.to_str())
        if _probe(again) != ids or again.get_vocab() != backend.get_vocab():
            raise InputError("expected the same tokens after `tokenizers` saves and reads it, got others")


def _probe(backend: tokenizers.Tokenizer) -> list[int] | None:
    """Encode and decode a test text, and return its ids. Return None if the tokenizer has no ids for some character."""
    try:
        ids = backend.encode(PROBE, add_special_tokens=False).ids
    except Exception:  # the package raises it for a text without ids
        return None
    backend.decode(ids)
    return ids


def distinct_ids(backend: tokenizers.Tokenizer) -> Vocabulary:
    """Return the ids that have a token, including added tokens. Raises InputError if an id has two tokens.

    In most files n tokens have the ids from 0 to n - 1. Then no id can have two tokens, and no search is needed.
    """
    count = backend.get_vocab_size(with_added_tokens=True)
    if all(backend.id_to_token(i) is not None for i in range(count)):
        return Vocabulary(count)
    tokens: dict[int, str] = {}
    for token, token_id in sorted(backend.get_vocab(with_added_tokens=True).items()):
        if token_id in tokens:
            raise InputError(
                f"the id {token_id} has two tokens, {shown(tokens[token_id])} and {shown(token)}: expected one"
            )
        tokens[token_id] = token
    return Vocabulary.of(tokens)


# ---- panics


def _reason(error: BaseException) -> str:
    """Return the message of an error that `tokenizers` raised, an Exception or a Rust panic.

    Any other BaseException, such as KeyboardInterrupt, is raised again.
    """
    if not isinstance(error, Exception) and type(error).__module__ != "pyo3_runtime":
        raise error
    return str(error)


@contextmanager
def _without_panics() -> Iterator[None]:
    """Keep Rust's messages about a panic out of standard error.

    If the block fails, everything that it wrote to standard error is dropped.
    """
    try:
        sys.stderr.flush()
        written, saved = tempfile.TemporaryFile(), os.dup(2)  # noqa: SIM115 (closed below)
    except (OSError, ValueError, AttributeError):  # no standard error, or no room for a temporary file
        yield
        return

    with written:
        os.dup2(written.fileno(), 2)
        failed = True
        try:
            yield
            failed = False
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            written.seek(0)

            if not failed:
                with suppress(OSError):  # standard error may be full, or its terminal may be closed
                    os.write(2, written.read())
