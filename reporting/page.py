"""The page: a head, the sections in their order, and nothing that is fetched from anywhere."""

from pathlib import Path

from engine.files import write_atomically
from reporting import figures, tables
from reporting.markup import Markup, element, join
from reporting.parts import PLAIN

STYLE = Path(__file__).with_name("style.css")
# A browser then asks nobody for anything, whatever a file may have brought into the page.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
SECTIONS = (  # title, name of its place in the page, what makes it of runs and options
    ("Runs", "runs", tables.describe_runs),
    ("Before and after", "sizes", tables.compare_sizes),
    ("Metrics", "metrics", tables.list_metrics),
    ("Curves", "curves", figures.draw_curves),
    ("Decisions of the gates", "gates", figures.draw_gates),
    ("Samples", "samples", figures.show_samples),
    ("Settings", "settings", tables.list_settings),
    ("Weights and log", "files", tables.describe_files),
)


def write_page(path, title, runs, options=PLAIN, extras=()):
    """Write the report of `runs` (reporting.runs.Run) as one file; returns its size in bytes.

    extras: [(title, parts)] of sections that come first. Raises RunError if the file cannot be written.
    """
    text = build_page(title, runs, options, extras)
    data = text.encode("utf-8", "backslashreplace")  # names of files need not be UTF-8
    write_atomically(path, lambda temporary: temporary.write_bytes(data))
    return len(data)


def build_page(title, runs, options=PLAIN, extras=()):
    """The HTML of the report."""
    made = [(heading, f"extra-{k}", parts) for k, (heading, parts) in enumerate(extras)]
    made += [(heading, anchor, make(runs, options)) for heading, anchor, make in SECTIONS]
    links = [element("a", heading, href=f"#{anchor}") for heading, anchor, _ in made]
    body = [
        element("header", element("h1", title), element("nav", *links, aria_label="Sections")),
        element("main", *(write_section(*each) for each in made)),
    ]
    page = element("html", write_head(title), element("body", *body), lang="en")
    return f"<!DOCTYPE html>\n{page}\n"


def write_section(heading, anchor, parts):
    return element("section", element("h2", heading), *parts, id=anchor)


def write_head(title):
    parts = [
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("link", rel="icon", href="data:,"),
        element("style", Markup(STYLE.read_text())),
    ]
    return element("head", join(parts))
