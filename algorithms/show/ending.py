"""The text at the end of a run: the model's path, the main figures, a few samples, and what to do next."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from .advice import next_commands
from .metrics import main_metrics, method_of
from .records import Records, ends, read_records
from .report import REPORT, as_text
from .text import harmless, number, one_line

SAMPLES, WIDTH = 3, 300  # samples printed, and the characters of each text
_brief: ContextVar[bool] = ContextVar("brief", default=False)


@contextmanager
def brief_endings() -> Iterator[None]:
    """Print one line alone at the end of each run inside the block, for runs that are stages of a recipe."""
    token = _brief.set(True)
    try:
        yield
    finally:
        _brief.reset(token)


def ending(folder: Path, has_report: bool = True) -> str:
    """Return the text for a run that has saved its model. has_report: whether its report could be written."""
    written = f"written: {folder / 'model'}"
    if _brief.get():
        return written
    records = read_records(folder)
    method = method_of(records.flags)
    lines = [written, *_figures(records, method), *_samples(records)]
    if has_report:
        lines.append(f"report: {folder / REPORT}")
    if commands := next_commands(folder, method, records.flags):
        lines += ["next:", *(f"    {command}" for command in commands)]
    return "\n".join(map(harmless, lines))


def _figures(records: Records, method: str) -> list[str]:
    """Return one line with the first and the last values of the main metrics. Held-out figures are printed before."""
    columns = records.columns
    found = {name: ends(columns[name]) for name in main_metrics(method, columns)}
    if not found:
        return []
    texts = [f"{name} {number(first)} -> {number(last)}" for name, (first, last, _) in found.items()]
    count = max(count for _, _, count in found.values())
    means = f" (means over the first and the last {count} steps)" if count > 1 else ""
    return [", ".join(texts) + means]


def _samples(records: Records) -> list[str]:
    """Return the newest samples, each on a line or two."""
    lines: list[str] = []
    for sample in records.samples[1][:SAMPLES]:
        lines.append(f"sample of step {sample.get('step')}{_reward(sample)}: {_text(sample, 'prompt')}")
        lines.append(f"    -> {_text(sample, 'completion')}")
    return lines


def _reward(sample: Mapping[str, Any]) -> str:
    reward = sample.get("reward")
    return f", reward {number(reward)}" if isinstance(reward, int | float) else ""


def _text(sample: Mapping[str, Any], key: str) -> str:
    return one_line(as_text(sample.get(key)), WIDTH)
