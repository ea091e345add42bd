"""One row of a command line, and the kinds of values that flags take. Without torch: --help reads it."""

from collections.abc import Callable
from dataclasses import dataclass

# Groups of --help, in their order.
NEEDED = "input and output"
METHOD = "method"
FAMILY = "flags that not all families have"
TRAINING = "training"
SYSTEM = "system"
UNUSED = "accepted for compatibility, without effect"
GROUPS = (NEEDED, METHOD, FAMILY, TRAINING, SYSTEM, UNUSED)


@dataclass(frozen=True)
class Flag:
    """A flag: `name` without dashes, its help and its default.

    type: text -> value, raising ValueError for text that does not do. switch: takes no value and is False by default.
    opposite: a switch that also has a form --no-NAME. positional: a word of its own. shown: the default in words, where
    it depends on something.
    """

    name: str
    help: str
    default: object = None
    type: Callable | None = None
    choices: tuple | None = None
    nargs: int | str | None = None
    switch: bool = False
    opposite: bool = False
    positional: bool = False
    required: bool = False
    shown: str = ""
    metavar: str | None = None
    group: str = METHOD

    @property
    def dest(self):
        """Its name among the settings."""
        return self.name.replace("-", "_")

    @property
    def option(self):
        """As it is typed."""
        return self.name if self.positional else f"--{self.name}"


def switch(name, help, **options):
    """A flag without a value, off by default."""
    return Flag(name, help, default=False, switch=True, **options)


def path_flag(name, help, default=None, metavar="FILE", group=NEEDED, **options):
    """A flag that names a file or, with another metavar, a folder."""
    return Flag(name, help, default, metavar=metavar, group=group, **options)


def number(convert, low, high=None):
    """A type for numbers from `low` to `high`, both included."""

    def checked(text):
        value = convert(text)
        if not (value >= low and (high is None or value <= high)):
            raise ValueError(f"{text}: expected {low}{' or more' if high is None else f' to {high}'}")
        return value

    return checked


count = number(int, 1)
whole = number(int, 0)
share = number(float, 0, 1)
amount = number(float, 0)


def above_zero(text):
    """A type for numbers above 0."""
    value = float(text)
    if not value > 0:
        raise ValueError(f"{text}: expected a number above 0")
    return value


def integer_list(text):
    """[0, 2, 4] or 0,2,4 -> list of int."""
    try:
        return [int(part) for part in text.strip().removeprefix("[").removesuffix("]").split(",")]
    except ValueError:
        raise ValueError(f"{text!r} is not a list of integers such as [0, 2, 4]") from None
