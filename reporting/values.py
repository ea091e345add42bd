"""Values as files hold them, and as people read them: numbers, text of any length, and which of many are shown."""

import json
import math

DRAWABLE = 1e300  # largest size of a number in a chart: differences of larger ones are infinite
LONGEST = 300  # characters of a value that are shown
NOTHING = "–"


def as_number(value):
    """The float of a JSON number, or of text such as "inf" that stands for one; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def is_drawable(number):
    """Whether a float can be placed in a chart."""
    return abs(number) < DRAWABLE  # never for NaN


def as_dict(value):
    """The value if it is a JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}


def as_text(value):
    """A value as it is typed or recorded, in one line of bearable length."""
    if value is None:
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST else text[:LONGEST] + "…"


def show(value):
    """A measured value for people: 1,072,032, 0.01234, 1e-5; text such as nan for a number that is not finite."""
    number = None if isinstance(value, str) else as_number(value)
    if number is None:
        return as_text(value)
    if not math.isfinite(number):
        return str(number)
    if isinstance(value, int):
        return f"{value:,}"
    if 1000 <= abs(number) < 1e15:
        return f"{number:,.0f}"
    return trim_exponent(f"{number:.4g}")


def show_tick(number):
    """A round number beside an axis: 0.25, 1e-5, 20k, 1.5M."""
    for size, sign in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size <= abs(number) < 1e13:
            return f"{number / (1e3 if sign == 'k' else size):.6g}{sign}"
    return trim_exponent(f"{number:.6g}")


def trim_exponent(text):
    """1e-05 -> 1e-5."""
    digits, e, exponent = text.partition("e")
    return f"{digits}e{int(exponent)}" if e else text


def show_change(before, after):
    """The change between two numbers in per cent; nothing if there is none to tell."""
    before, after = as_number(before), as_number(after)
    if not before or after is None or not (is_drawable(before) and is_drawable(after)):
        return NOTHING
    return f"{after / before - 1:+.0%}".replace("-", "−")


def thin(points, limit=500):
    """At most `limit` of the points (x, y), with the lowest and the highest y of every stretch."""
    if len(points) <= limit:
        return points
    size, kept = -(-2 * len(points) // (limit - 4)), [points[0]]
    for start in range(1, len(points) - 1, size):
        stretch = range(start, min(start + size, len(points) - 1))
        ends = {min(stretch, key=lambda i: points[i][1]), max(stretch, key=lambda i: points[i][1])}
        kept += [points[i] for i in sorted(ends)]
    return [*kept, points[-1]]


def spread(items, limit):
    """At most `limit` of the items, evenly, with the first and the last; of one, the last."""
    if len(items) <= limit:
        return items
    if limit == 1:
        return items[-1:]
    return [items[round(i * (len(items) - 1) / (limit - 1))] for i in range(limit)]
