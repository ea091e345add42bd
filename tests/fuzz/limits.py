"""The property that every parser has: a value, or a ValueError that says something, in bounded time and memory."""

import resource
import signal
import time
import warnings
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

SECONDS = 30  # for one input, on a busy machine
MEMORY = 320 << 20  # bytes above what the process had before
STATUS = Path("/proc/self/statm")
TRIED = defaultdict(lambda: [0, 0, 0.0])  # parser -> inputs, accepted ones, seconds


class Hang(BaseException):
    """Raised when an input takes too long; no parser catches it."""


def give_up(*_):
    raise Hang


@contextmanager
def limited_memory():
    """Allow the block MEMORY more than there is, where the system can tell (Linux); it gets MemoryError beyond it."""
    if not STATUS.exists():
        yield
        return
    pages = int(STATUS.read_text().split()[5])
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (pages * resource.getpagesize() + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


@contextmanager
def limited_time():
    """Allow the block SECONDS; it gets Hang after them."""
    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def read_or_refuse(name, read, *args):
    """(whether the input was accepted, what `read` made of it or the message of its ValueError).

    Any other exception, a message without text, too much time or memory fail the test. name: of the parser, to count.
    """
    count, start, accepted = TRIED[name], time.perf_counter(), False
    try:
        with limited_time(), limited_memory(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found, accepted = read(*args), True
    except ValueError as error:
        found = str(error)
        assert found.strip(), f"{name}: a ValueError that says nothing"
    except Hang:
        raise AssertionError(f"{name}: an input takes longer than {SECONDS} seconds") from None
    count[0], count[1], count[2] = count[0] + 1, count[1] + accepted, count[2] + time.perf_counter() - start
    return accepted, found
