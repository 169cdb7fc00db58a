"""Text for terminals and pages: numbers, times, and other people's text without its control characters."""

import re

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def harmless(text: str) -> str:
    """Return a model's text with its control characters escaped, except line breaks and tabs, for a terminal."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def one_line(text: str, most: int) -> str:
    """Return the text on one line of at most `most` characters, with line breaks as spaces."""
    line = harmless(" ".join(text[: 4 * most].split()))
    return line if len(line) <= most and len(text) <= 4 * most else f"{line[: most - 3]}..."


def number(value: float) -> str:
    """Return a metric in at most four significant digits: 0.8312, 12,345, 2e-05."""
    if abs(value) >= 999.5 and abs(value) < 1e7:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def duration(seconds: float) -> str:
    """Return a time as m:ss, or h:mm:ss from an hour on."""
    minutes, rest = divmod(round(max(seconds, 0.0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
