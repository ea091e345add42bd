"""The two errors that end a script with a message instead of a traceback."""

from contextlib import contextmanager


class InputError(ValueError):
    """Something a user gave does not work: names the flag, the value, what was expected and what to do."""


class RunError(RuntimeError):
    """A run cannot go on, for a reason that lies in the run and not in the code."""


@contextmanager
def blame(flag, value):
    """Turn a ValueError of code that knows no flags into an InputError that names the flag and its value."""
    try:
        yield
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{flag} {value}: {error}") from None
