"""HTML and SVG as text. What was not made here is escaped: names and values of files cannot become part of a page."""

from html import escape

WITHOUT_END = {"img", "link", "meta"}


class Markup(str):
    """Text that is HTML already."""


def element(name, /, *children, **attributes):
    """<name ...>children</name>.

    Attributes are named like keywords: class_, stroke_width. None and False leave one out, True gives no value.
    """
    shown = "".join(write_attribute(key, value) for key, value in attributes.items())
    end = "" if name in WITHOUT_END else f"</{name}>"
    return Markup(f"<{name}{shown}>{join(children)}{end}")


def write_attribute(key, value):
    if value is None or value is False:
        return ""
    key = key.rstrip("_").replace("_", "-")
    return f" {key}" if value is True else f' {key}="{escape(str(value))}"'


def join(parts):
    """The parts one after the other; plain text is escaped, None is nothing."""
    return Markup(
        "".join(part if isinstance(part, Markup) else escape(str(part)) for part in parts if part is not None)
    )
