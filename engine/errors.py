"""The two errors that end a script with a message instead of a traceback, and checks of output paths."""

import os
import tempfile
from contextlib import contextmanager
from pathlib import Path

from engine import PICTURE_SUFFIXES

INPUTS = (*PICTURE_SUFFIXES, ".npy", ".npz", ".safetensors", ".bin")  # ends of names of files in folders that are read
LONGEST_NAME = 180  # of a file: disks take 255 bytes, and a temporary name is longer


class InputError(ValueError):
    """Something a user gave does not work: names the flag, the value, what was expected and what to do."""


class RunError(RuntimeError):
    """A run cannot go on, for a reason that lies in the run and not in the code."""


class StoppedError(RunError):
    """A run was told to stop by a signal, and has saved what it had."""

    def __init__(self, message, signal):
        super().__init__(message)
        self.signal = signal


@contextmanager
def flag_errors(flag, value):
    """Turn a ValueError into an InputError that names the flag and its value, unless it names one itself."""
    try:
        yield
    except InputError:
        raise
    except ValueError as error:
        reason = str(error).removeprefix(f"{value}: ")  # some name the file themselves
        raise InputError(reason if reason.startswith("--") else f"{flag} {value}: {reason}") from None


def check_writable(flag, path, **inputs):
    """Raise InputError unless a file can be made at `path` that is none of the inputs; makes nothing that stays.

    inputs: {setting: path, list of paths, or None}: files that must stay, with their facts, and folders with all files
    that are in them.
    """
    if not path:
        raise InputError(f"{flag}: missing; name the file to write")
    path = Path(path)
    with path_errors(flag, path):
        if path.is_dir() or not path.name:
            raise InputError(f"{flag} {path}: is a folder; name a file in it")
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise InputError(f"{flag} {path}: is a link or a device, which would be replaced; name a file")
        check_apart(flag, path, inputs)
        if len(os.fsencode(path.name)) > LONGEST_NAME:
            raise InputError(f"{flag} {path}: the name is too long; take {LONGEST_NAME} characters or less")
        check_folder(flag, path.absolute().parent)


def check_apart(flag, path, inputs):
    """Raise InputError if `path` is one of the inputs, see check_writable, or belongs to one."""
    for name, given in inputs.items():
        others = given if isinstance(given, list) else [given]
        for other in filter(None, others):
            if is_part_of(path, other):
                option = name if name.isupper() else f"--{name.replace('_', '-')}"
                raise InputError(f"{flag} {path}: belongs to {option} {other}; give another path")


def is_part_of(path, other):
    """Whether a path is the file `other`, the facts beside it, or named like an input in the folder `other`."""
    path, facts, other = (os.path.realpath(name) for name in (path, f"{other}.json", other))
    is_input = path.endswith(INPUTS) or os.path.basename(path) in ("metadata.json", "config.json")
    return path in (other, facts) or (is_input and path.startswith(os.path.join(other, "")))


@contextmanager
def path_errors(flag, path):
    """Turn what the system says of an impossible path into an InputError."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{flag} {show_path(path)}: {reason}; give another path") from None


def one_line(error):
    """What an error says, in one line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else text[0] if text else repr(error)


def show_path(path):
    """A path as text that can be printed, names that are no UTF-8 included."""
    return str(path).encode(errors="backslashreplace").decode()


def nearest_folder(path):
    """The path, or the nearest of its parents, that is there."""
    nearest = Path(path).absolute()
    while not nearest.exists() and not nearest.is_symlink() and nearest != nearest.parent:
        nearest = nearest.parent
    return nearest


def check_folder(flag, path):
    """Raise InputError unless the folder `path` exists or can be made, and can be written to."""
    if not str(path):
        raise InputError(f"{flag}: is empty; name a folder")
    with path_errors(flag, path):
        nearest = nearest_folder(path)
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise InputError(f"{flag} {path}: cannot be written ({error.strerror}); give another path") from None
