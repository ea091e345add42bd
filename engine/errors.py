"""The two errors that end a script with a message instead of a traceback, and checks of output paths."""

import tempfile
from contextlib import contextmanager
from pathlib import Path


class InputError(ValueError):
    """Something a user gave does not work: names the flag, the value, what was expected and what to do."""


class RunError(RuntimeError):
    """A run cannot go on, for a reason that lies in the run and not in the code."""


@contextmanager
def flag_errors(flag, value):
    """Turn a ValueError of code that knows no flags into an InputError that names the flag and its value."""
    try:
        yield
    except InputError:
        raise
    except ValueError as error:
        reason = str(error).removeprefix(f"{value}: ")  # some name the file themselves
        raise InputError(f"{flag} {value}: {reason}") from None


def check_writable(flag, path):
    """Raise InputError unless a file can be made at `path`; makes nothing that stays."""
    if not path:
        raise InputError(f"{flag}: missing; name the file to write")
    path = Path(path)
    if path.is_dir() or not path.name:
        raise InputError(f"{flag} {path}: is a folder; name a file in it")
    check_folder(flag, path.absolute().parent)


def check_folder(flag, path):
    """Raise InputError unless the folder `path` exists or can be made, and can be written to."""
    nearest = Path(path).absolute()
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise InputError(f"{flag} {path}: cannot be written ({error.strerror}); give another path") from None
