"""One row of a command line, and the kinds of values that flags take. Without torch: --help reads it."""

import unicodedata
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

LARGEST = 10**15  # value of a flag: beyond any use, and exact as a float
MAX_PIXELS, MAX_CLASSES = 10**5, 10**6  # of a side, of a network: memory is taken for them


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


def own(name, help, default, **options):
    """A flag that not all families have."""
    return Flag(name, help, default, group=FAMILY, **options)


def path_flag(name, help, default=None, metavar="FILE", group=NEEDED, **options):
    """A flag that names a file or, with another metavar, a folder."""
    return Flag(name, help, default, type=path_text, metavar=metavar, group=group, **options)


def path_text(text):
    """A type for paths and names: text that a disk takes; an unset variable of the shell is empty."""
    if not text:
        raise ValueError("is empty; give a name, or leave the flag out")
    return name_text(text)


def name_text(text):
    """A type for parts of paths, which may be empty."""
    odd = [sign for sign in text if unicodedata.category(sign) in ("Cc", "Cs")]
    if odd:
        raise ValueError(f"{ascii(text)[:100]} has {odd[0]!a}, a control character or no UTF-8; rename it")
    if len(text) > 4000 or any(len(part.encode()) > 255 for part in text.split("/")):
        raise ValueError(f"{text[:60]}... is too long for a path")
    return text


def number(convert, low, high=LARGEST):
    """A type for numbers from `low` to `high`, both included."""

    def checked(text):
        try:
            value = convert(text)
        except ValueError:
            raise ValueError(f"{text!r} is not a{' whole' if convert is int else ''} number") from None
        if not low <= value <= high:
            end = " or more" if high >= LARGEST and not value > high else f" to {high}"
            raise ValueError(f"{text}: expected {low}{end}")
        return value

    return checked


count = number(int, 1)
whole = number(int, 0)
share = number(float, 0, 1)
amount = number(float, 0)
limit = number(float, 0, float("inf"))
pixels = number(int, 1, MAX_PIXELS)
classes = number(int, 1, MAX_CLASSES)


def above_zero(text):
    """A type for numbers above 0."""
    value = amount(text)
    if not value > 0:
        raise ValueError(f"{text}: expected a number above 0")
    return value


def all_or_count(text):
    """A type for how many: "all", or a whole number from 1."""
    try:
        return text if text == "all" else count(text)
    except ValueError as error:
        raise ValueError(f"{error}; or say all") from None


def expect(fits, option, value, expected):
    """Raise ValueError, naming a flag, unless its value fits what is asked with it."""
    if not fits:
        raise ValueError(f"--{option} {value}: expected {expected}")


def integer_list(text):
    """[0, 2, 4] or 0,2,4 -> list of int."""
    try:
        return [int(part) for part in text.strip().removeprefix("[").removesuffix("]").split(",")]
    except ValueError:
        raise ValueError(f"{text!r} is not a list of integers such as [0, 2, 4]") from None
