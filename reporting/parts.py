"""Parts of the page that its sections share."""

from dataclasses import dataclass, field

from reporting.charts import series_class
from reporting.markup import element


@dataclass(frozen=True)
class Options:
    """How a report is made. samples: most pictures of a run. metrics: {file: numbers} that belong to no run."""

    samples: int = 8
    metrics: dict = field(default_factory=dict)


PLAIN = Options()


def swatch(classes):
    """A spot of the colour of a line or a bar."""
    return element("span", class_=f"swatch {classes}", aria_hidden="true")


def name_run(runs, run):
    """The name of a run, with the colour of its curves where there are several."""
    spot = swatch(series_class(runs.index(run))) if len(runs) > 1 else None
    return element("span", spot, run.name, class_="run")


def list_missing(runs, what, has):
    """[A note that these runs lack something], or nothing."""
    lacking = [run.name for run in runs if not has(run)]
    if not lacking:
        return []
    where = ", ".join(lacking) if len(lacking) < len(runs) else "any run" if len(runs) > 1 else "this run"
    return [note(f"No {what} in {where}.")]


def table(caption, columns, rows, classes=None):
    """A table that scrolls by itself where it is too wide; the first cell of every row is the row's header."""
    head = element("tr", *(element("th", name, scope="col") for name in columns))
    body = [
        element("tr", element("th", first, scope="row"), *(element("td", cell) for cell in rest))
        for first, *rest in rows
    ]
    inner = element(
        "table", element("caption", caption), element("thead", head), element("tbody", *body), class_=classes
    )
    return element("div", inner, class_="scroll", role="region", aria_label=caption, tabindex="0")


def note(*words):
    """A remark, such as what is not there."""
    return element("p", *words, class_="note")


def fold(title, *children):
    """What is shown when its title is clicked."""
    return element("details", element("summary", title), *children)


def card(title, *children):
    """A box in a grid of them."""
    return element("article", element("h3", title), *children, class_="card")


def grid(cards):
    """Cards side by side, as many as have room."""
    return element("div", *cards, class_="grid")
