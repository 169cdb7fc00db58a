"""The page of a run, report.html: figures, curves, samples and flags, made from the files of its folder alone.

It has no script and loads nothing from the network. While the run goes on, the page reloads itself.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from time import strftime
from typing import Any, NamedTuple

from ...model.errors import InputError
from ...model.files.replacing import replacing
from .advice import next_commands
from .curve import Series, draw, training_series
from .metrics import ERROR, HELD_OUT, LOWER, METHODS, UNKNOWN, held_out_names, main_metrics, method_of, unit
from .page import PAGE
from .records import Records, ends, errors_of, read_records
from .style import STYLE
from .text import harmless, number

REPORT = "report.html"
RELOAD = 10  # seconds between reloads of the page of a running run
MOST_CURVES = 60  # in "All other metrics"; a reward function may log any number of them
SHORT, LONG = 600, 8000  # characters of a text before it is folded, and before it is cut
NEWEST, FIRST = 4, 3  # samples shown
MOST_HELD_OUT = 30  # rows of the table of held-out figures


class Status(NamedTuple):
    """The state of a run. word: "running", "finished" or "stopped", which is also its colour."""

    word: str
    text: str  # the whole line, such as "stopped early by patience"
    details: str = ""


def write_report(
    folder: Path, status: Status | None = None, defaults: Mapping[str, Any] | None = None
) -> Path:
    """Read the files of a run folder, write report.html into it, and return its path.

    status: how the run stands; by default as its files tell. defaults: the values of flags that were not given; by
    default unknown, and all flags are shown alike. Raises InputError if `folder` holds no run or cannot be written.
    """
    records = read_records(folder)
    text = rendered(records, status or status_of(records), defaults or {})
    with replacing(folder / REPORT) as beside:
        beside.write_text(text, encoding="utf-8", errors="backslashreplace")  # half of a surrogate pair
    return folder / REPORT


def status_of(records: Records) -> Status:
    """Return how a run stands, as far as its files tell: a saved model means that it has ended."""
    done, total = records.last_step + 1, records.flags.get("steps")
    if records.flags.get("epochs") is not None:  # steps then stands at its default
        total = None
    of_total = f"step {done:,} of {total:,}" if isinstance(total, int) else f"step {done:,}"
    if not (records.folder / "model").is_dir():
        return Status("stopped", f"not finished: {of_total}")
    return ended(done, total if isinstance(total, int) else done, bool(records.flags.get("patience")))


def ended(done: int, total: int, patience: bool) -> Status:
    """Return the status of a run that saved its model after `done` of `total` steps."""
    if done >= total:
        return Status("finished", "finished", f"{done:,} steps")
    reason = "stopped early by patience" if patience else "stopped early"
    return Status("finished", reason, f"after step {done:,} of {total:,}")


def rendered(records: Records, status: Status, defaults: Mapping[str, Any]) -> str:
    """Return the text of the page."""
    method = method_of(records.flags)
    title = METHODS.get(method, UNKNOWN).title
    flags = {name: _shown(value) for name, value in records.flags.items()}
    changed = [name for name in flags if name in defaults and _shown(defaults[name]) != flags[name]]
    changed += [name for name in flags if name not in defaults and defaults]  # flags without a default
    main, others, left_out = _pictures(records, method)
    figures = _figures(records, method)
    pairs = lambda names: [(f"--{name.replace('_', '-')}", flags[name]) for name in names]
    order = sorted(changed, key=lambda name: (name not in ("model", "data"), name != "model"))

    return _template().render(
        style=STYLE,
        reload=RELOAD,
        status=status,
        title=f"{title}: {_name(flags.get('model', ''))} on {_name(flags.get('data', ''))}",
        subtitle=harmless(str(records.folder)),
        written=f"written {strftime('%Y-%m-%d %H:%M:%S')}"
        + (f", reloads every {RELOAD} s" if status.word == "running" else ""),
        notes=[harmless(note) for note in records.notes],
        figures=figures,
        has_best=any(row["best"] for row in figures),
        averaged=_averaged(records),
        held_out=_held_out(records),
        main=main,
        others=others,
        left_out=left_out,
        samples=_samples(records),
        changed=pairs(order),
        defaults=pairs(name for name in flags if name not in changed),
        versions=[(harmless(str(name)), _shown(value)) for name, value in records.versions.items()],
        model=_where(records, status),
        commands=[harmless(command) for command in next_commands(records.folder, method, records.flags)],
    )


@cache
def _template() -> Any:
    try:
        import jinja2
    except ImportError as error:
        raise InputError("the report: expected jinja2 to be installed: pip install jinja2") from error
    return jinja2.Environment(autoescape=True, trim_blocks=False).from_string(PAGE)


def _shown(value: Any) -> str:
    """Return the text of a flag's value. Paths and tuples stand in config.json as texts and lists."""
    if isinstance(value, list | tuple):
        return ", ".join(map(_shown, value)) or "none"
    return harmless("none" if value is None else str(value))[:2000]


def _name(path: str) -> str:
    return harmless(Path(path).name or path)[:100] or "?"


def _where(records: Records, status: Status) -> str:
    model = records.folder / "model"
    if model.is_dir():
        best = records.folder / "best"
        of_best = f"; the best one by --keep-best: {harmless(str(best))}" if best.is_dir() else ""
        return f"The trained model: {harmless(str(model))}{of_best}"
    if status.word == "running":
        return f"The run goes on. It will write its model to {harmless(str(model))}"
    kept = (records.folder / "checkpoint.safetensors").is_file()
    return "The run has not saved its model." + " It can be continued by --resume." * kept


# ---- figures


def _figures(records: Records, method: str) -> list[dict[str, str]]:
    """Return a row for each main metric and each held-out metric: its first and last values, and the best one."""
    rows = []
    for name in main_metrics(method, records.columns):
        first, last, _ = ends(records.columns[name])
        rows.append(_row(name, method, first, last, ""))
    best_of = f"{HELD_OUT}{records.flags.get('keep_best')}"
    for name in held_out_names(records.columns):
        values = [value for _, value in records.columns[name] if value is not None]
        best = min if name.removeprefix(HELD_OUT) in LOWER else max
        rows.append(
            _row(name, method, values[0], values[-1], number(best(values)) if name == best_of else "")
        )
    return rows


def _row(name: str, method: str, first: float, last: float, best: str) -> dict[str, str]:
    of_metric = {"name": harmless(name), "unit": unit(method, name)}
    return of_metric | {"first": number(first), "last": number(last), "best": best}


def _averaged(records: Records) -> str:
    count = max((ends(points)[2] for points in records.columns.values()), default=1)
    if count == 1:
        return "Values of the first and the last step."
    return f"Means over the first and the last {count} steps; held-out values are single evaluations."


def _held_out(records: Records) -> tuple[list[str], list[list[str]]]:
    """Return the names of the entries of held_out.json, such as before and after, and a row for each figure."""
    is_error = lambda key: key.endswith((ERROR, "standard_error"))
    names = [key for entry in records.held_out.values() for key in entry if not is_error(key)]
    rows = []
    for name in list(dict.fromkeys(names))[:MOST_HELD_OUT]:
        cells = [harmless(name)]
        for entry in records.held_out.values():
            error = entry.get(f"{name}{ERROR}", entry.get("standard_error") if name == "accuracy" else None)
            text = number(entry[name]) if name in entry else ""
            cells.append(text if error is None else f"{text} ± {error:.2g}")
        rows.append(cells)
    return [harmless(label) for label in records.held_out], rows


# ---- curves


def _pictures(records: Records, method: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]], int]:
    """Return the pictures of the main metrics, those of the others, and how many metrics have none."""
    columns, held_out = records.columns, held_out_names(records.columns)
    main = main_metrics(method, columns)
    counterparts = {name.removeprefix(HELD_OUT) for name in held_out}
    main += [name for name in columns if name in counterparts and name not in main]
    alone = [name for name in held_out if name.removeprefix(HELD_OUT) not in columns]
    errors = {f"{name}{ERROR}" for name in held_out}
    rest = [name for name in columns if name not in {*main, *held_out, *errors}]

    pictures = [_picture(records, method, name) for name in (*main, *alone)]
    others = [_picture(records, method, name) for name in rest[:MOST_CURVES]]
    return pictures, others, len(rest[MOST_CURVES:])


def _picture(records: Records, method: str, name: str) -> dict[str, Any]:
    """Return one picture: a metric over the steps, and the held-out points of its counterpart."""
    columns, held_out = records.columns, held_out_names(records.columns)
    evaluation = name if name in held_out else f"{HELD_OUT}{name}"
    series = [] if evaluation == name else training_series(columns[name])
    if evaluation in held_out:
        errors = errors_of(columns, evaluation)
        label = "held out, ± standard error" if errors else "held out"
        series.append(Series(label, columns[evaluation], errors=errors, colour=1, line=False))
    name = harmless(name)
    return {"name": name, "unit": unit(method, name), "svg": draw(name, series), "series": series}


# ---- samples


def _samples(records: Records) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return the newest samples and the first ones, with the parts of each as text."""
    first, newest = records.samples
    count = min(NEWEST, max(0, len(newest) - FIRST))
    return [
        ("Newest samples", [_sample(record) for record in newest[:count]]),
        ("First samples", [_sample(record) for record in first[:FIRST]]),
    ]


def _sample(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts, the prompt and the completion of a line of samples.jsonl."""
    facts = [
        f"{key} {_fact(record[key])}" for key in ("step", "reward", "length") if record.get(key) is not None
    ]
    rewards = record.get("rewards")
    if isinstance(rewards, dict):
        facts += [f"{name} {_fact(value)}" for name, value in list(rewards.items())[:20]]
    return {
        "facts": harmless(" · ".join(facts)),
        "prompt": _folded(record.get("prompt")),
        "completion": _folded(record.get("completion")),
    }


def _fact(value: Any) -> str:
    return number(value) if isinstance(value, float) else str(value)[:100]


def _folded(value: Any) -> dict[str, str]:
    """Return a text as its start and the rest, which is folded away. A conversation has a line for each message."""
    text = harmless(as_text(value))
    cut = "\n... (cut)" if len(text) > LONG else ""
    return {"start": text[:SHORT], "rest": text[SHORT:LONG] + cut if len(text) > SHORT else ""}


def as_text(value: Any) -> str:
    """Return a prompt or completion as text: a text itself, or the messages of a conversation, one after another."""
    if isinstance(value, list):
        turns: Sequence[Any] = [turn for turn in value if isinstance(turn, dict)]
        return "\n".join(f"{turn.get('role', '')}: {turn.get('content', '')}" for turn in turns)
    return "" if value is None else str(value)
