"""Charts as SVG: lines over steps, layers over steps, bars. Colours and fonts are those of style.css."""

import math
from dataclasses import dataclass
from itertools import groupby, pairwise

from reporting.markup import element
from reporting.values import is_drawable, show, show_tick, spread, thin

WIDTH, HEIGHT = 380, 210  # about those of a phone, so that letters are not scaled much
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 34
COLOURS = 8  # of lines, in style.css; the next ones are dashed
COLUMNS = 60  # of a map of layers


@dataclass(frozen=True)
class Axis:
    """Where values from `low` to `high` lie between the pixels `start` and `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def place(self, value):
        low, high, value = (math.log10(each) if self.log else each for each in (self.low, self.high, value))
        return self.start + (self.end - self.start) * (value - low) / (high - low)

    def ticks(self):
        """Round values on it."""
        return log_ticks(self.low, self.high) if self.log else even_ticks(self.low, self.high)


def make_axis(values, start, end, log=False):
    """The Axis of these numbers; as a logarithm, if that is wanted, where they are positive and far apart."""
    low, high = min(values), max(values)
    log = log and low > 0 and high > 10 * low
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-30):
        pad = 0.1 * abs(high) if abs(high) > 1e-30 else 1.0
        low, high = low - pad, high + pad
    return Axis(low, high, start, end, log)


def even_ticks(low, high, count=4):
    """About `count` multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.99)
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low, high):
    """Powers of ten, with some of their multiples where there are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        ticks = [factor * 10.0**power for power in powers for factor in factors if low <= factor * 10.0**power <= high]
        if len(ticks) >= 3:
            break
    return ticks[:: -(-len(ticks) // 6)]


def draw_frame(title, description, height, *children):
    """An SVG with what it is called and what is to be seen."""
    told = (element("title", title), element("desc", description))
    return element("svg", *told, *children, viewBox=f"0 0 {WIDTH} {height:g}", role="img", class_="chart")


def px(number):
    """A length or a place, to a tenth of a pixel."""
    return f"{round(number, 1):g}"


def label(text, x, y, anchor="middle"):
    return element("text", text, x=px(x), y=px(y), text_anchor=anchor)


def rule(x1, y1, x2, y2):
    return element("line", x1=px(x1), y1=px(y1), x2=px(x2), y2=px(y2), class_="rule")


def series_class(number):
    """CSS classes of the line of the run with this number."""
    dashes = number // COLOURS % 3
    return f"s{number % COLOURS}" + (f" dash{dashes}" if dashes else "")


def draw_lines(title, lines, log=False):
    """Curves over steps: lines: [(name, CSS classes, [(step, value)])]. None if no value can be drawn."""
    lines = [(name, classes, [each for each in points if is_drawable(each[1])]) for name, classes, points in lines]
    lines = [each for each in lines if each[2]]
    if not lines:
        return None
    everywhere = [point for _, _, points in lines for point in points]
    x = make_axis([step for step, _ in everywhere], LEFT, WIDTH - RIGHT)
    y = make_axis([value for _, value in everywhere], HEIGHT - BOTTOM, TOP, log)
    parts = [*draw_value_axis(y), *draw_step_axis(x)]
    parts += [draw_line(points, x, y, classes) for _, classes, points in lines]
    return draw_frame(title, describe_lines(lines, y.log), HEIGHT, *parts)


def draw_value_axis(axis):
    for tick in axis.ticks():
        height = axis.place(tick)
        yield rule(LEFT, height, WIDTH - RIGHT, height)
        yield label(show_tick(tick), LEFT - 6, height + 4, "end")
    if axis.log:
        yield label("logarithmic scale", LEFT, HEIGHT - 5, "start")


def draw_step_axis(axis):
    yield rule(LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, HEIGHT - BOTTOM)
    for tick in axis.ticks():
        if tick >= 0 and tick == round(tick):  # there are no half steps
            yield label(show_tick(tick), axis.place(tick), HEIGHT - BOTTOM + 14)
    yield label("step", WIDTH - RIGHT, HEIGHT - 5, "end")


def draw_line(points, x, y, classes):
    """One curve; a single point is a dot."""
    places = [(px(x.place(step)), px(y.place(value))) for step, value in thin(points)]
    if len(places) == 1:
        return element("circle", cx=places[0][0], cy=places[0][1], r=3, class_=f"dot {classes}")
    return element("polyline", points=" ".join(map(",".join, places)), class_=f"line {classes}")


def describe_lines(lines, log):
    """What curves show, in words."""
    told = []
    for name, _, points in lines:
        values = [value for _, value in points]
        told.append(
            f"{name}: {len(points)} values from step {show(points[0][0])} to {show(points[-1][0])}, "
            f"from {show(values[0])} to {show(values[-1])}, lowest {show(min(values))}, highest {show(max(values))}"
        )
    return ". ".join(told) + (". Logarithmic scale." if log else ".")


@dataclass(frozen=True)
class Rows:
    """The layers from top to bottom: their number and the pixels that each has."""

    depth: int

    @property
    def pitch(self):
        return min(14, max(1.5, 340 / self.depth))

    @property
    def bottom(self):
        return TOP + self.pitch * self.depth

    @property
    def every(self):
        """How many layers have one label."""
        return next(n for n in (1, 2, 4, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000) if n * self.pitch >= 11)

    def labels(self):
        for layer in range(0, self.depth, self.every):
            yield label(str(layer), LEFT - 6, TOP + self.pitch * (layer + 0.5) + 4, "end")
        middle = px((TOP + self.bottom) / 2)
        yield element("text", "layer", text_anchor="middle", transform=f"translate(14 {middle}) rotate(-90)")

    def bar(self, layer, x, width, classes, opacity=None):
        """A piece of a layer's row."""
        gap = 1 if self.pitch > 5 else 0
        size = {"width": px(max(width, 0.5)), "height": px(self.pitch - gap)}
        return element("rect", x=px(x), y=px(TOP + layer * self.pitch), **size, class_=classes, fill_opacity=opacity)


def draw_decisions(title, decisions, depth):
    """Layers over steps: coloured where a layer was kept, the fuller the more probable; None if nothing was decided."""
    shown = spread([each for each in decisions if each.kept is not None or each.probabilities], COLUMNS)
    if not shown or not depth:
        return None
    rows, width = Rows(depth), (WIDTH - LEFT - RIGHT) / len(shown)
    parts = list(rows.labels())
    for layer in range(depth):
        start = 0
        for (classes, opacity), same in groupby(shade(each, layer) for each in shown):
            count = len(list(same))
            if opacity:
                parts.append(rows.bar(layer, LEFT + start * width, count * width, classes, opacity))
            start += count
    for place in sorted({0, len(shown) // 2, len(shown) - 1}):
        parts.append(label(show_tick(shown[place].step), LEFT + (place + 0.5) * width, rows.bottom + 14))
    parts.append(label("step", WIDTH - RIGHT, rows.bottom + 29, "end"))
    return draw_frame(title, describe_decisions(shown), rows.bottom + BOTTOM, *parts)


def shade(decision, layer):
    """(CSS class, opacity) of a layer at a step."""
    is_kept = layer in (decision.kept or ())
    if not decision.probabilities:
        return ("kept", 1) if is_kept else ("dropped", 0)
    share = decision.probabilities[layer] if layer < len(decision.probabilities) else 0
    return ("kept" if is_kept else "dropped"), round(share * 20) / 20


def describe_decisions(decisions):
    """The decisions of the gates in words."""
    first, last = decisions[0], decisions[-1]
    changes = sum(before.kept != after.kept for before, after in pairwise(decisions))
    return (
        f"At step {show(first.step)} layers {first.kept or 'unknown'} were kept, at step {show(last.step)} "
        f"{last.kept or 'unknown'}; the choice changed {changes} time(s) between the {len(decisions)} steps shown."
    )


def draw_bars(title, shares, kept):
    """A bar for every layer: its probability to be kept, coloured if it is."""
    rows, full = Rows(len(shares)), WIDTH - LEFT - RIGHT - 36
    parts = list(rows.labels())
    for layer, share in enumerate(shares):
        parts.append(rows.bar(layer, LEFT, share * full, "kept" if layer in kept else "dropped"))
        if rows.every == 1:
            parts.append(label(f"{share:.2f}", LEFT + share * full + 5, TOP + rows.pitch * (layer + 0.5) + 4, "start"))
    for share in (0, 0.5, 1):
        parts.append(label(f"{share:g}", LEFT + share * full, rows.bottom + 14))
    parts.append(label("probability", WIDTH - RIGHT, rows.bottom + 29, "end"))
    told = ", ".join(f"layer {layer} {share:.2f}" for layer, share in enumerate(shares))
    return draw_frame(title, f"Probability to be kept: {told}.", rows.bottom + BOTTOM, *parts)
