"""Folders of several processes: one owner, by a lock that ends with its process, and the same disk for all."""

import errno
import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

from engine.distributed import gather, on_main, shared_error
from engine.errors import InputError, RunError
from engine.files import remove_partial_files, write_errors

NAME = ".lock"
HELD = set()  # open files of the locks that this process holds


class FolderLock:
    """Holds <folder>/.lock until `release`, or until the process is gone.

    The file says who holds it, for the message. Disks that know no locks are used without one. Raises InputError,
    naming `flag`, if another process holds it.
    """

    def __init__(self, folder, flag):
        self.path = Path(folder) / NAME
        self.file = self._take(flag)

    def _take(self, flag):
        try:
            import fcntl  # Windows has none
        except ImportError:
            return None
        while True:
            file = open(self.path, "a+")  # noqa: SIM115  (open is what holds the lock)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                file.seek(0)
                owner = read_owner(file.read())
                file.close()
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    return None
                raise InputError(
                    f"{flag} {self.path.parent}: in use {describe_owner(owner)}; wait for its end, stop it, or take "
                    "another folder"
                ) from None
            if self._is_still_there(file):
                break
            file.close()  # its owner has removed it since we opened it
        try:
            write_owner(file)
        except OSError:
            with suppress(OSError):
                self.path.unlink()  # before the lock ends: afterwards it could be another's
            with suppress(OSError):
                file.close()
            raise
        HELD.add(file)
        return file

    def _is_still_there(self, file):
        try:
            return os.path.samestat(os.fstat(file.fileno()), os.stat(self.path))
        except FileNotFoundError:
            return False

    def release(self):
        """Give the folder free, and leave nothing behind."""
        if self.file:
            with suppress(OSError):  # the disk may be what has ended the run
                self.path.unlink()
            HELD.discard(self.file)
            self.file.close()
            self.file = None


def take_folder(folder, flag):
    """Make a folder, lock it, and remove what killed processes have left half written in it; returns the FolderLock."""
    with write_errors(folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        lock = FolderLock(folder, flag)
        try:
            remove_partial_files(folder)
        except OSError:
            lock.release()
            raise
    return lock


def write_owner(file):
    """Say in the open file of a lock that this process holds it."""
    about = {"host": socket.gethostname(), "process": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    file.truncate(0)
    os.write(file.fileno(), json.dumps(about).encode())


def read_owner(text):
    """Who holds a lock, from the contents of its file; empty if it does not say."""
    try:
        about = json.loads(text)
        return {name: about[name] for name in ("since", "process", "host")}
    except (ValueError, KeyError, TypeError):
        return {}


def describe_owner(owner):
    """The same as text."""
    return f"since {owner['since']} by process {owner['process']} on {owner['host']}" if owner else "by another process"


def forget_locks():
    """Close a forked process's copies of the locks: a loader process must not hold the folder of a dead owner."""
    for file in HELD:
        file.close()
    HELD.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=forget_locks)


def check_shared(flag, folder):
    """Raise RunError on all processes unless all of them see the main one's files in a folder."""
    name = on_main(lambda: _write_token(folder))
    path = Path(folder) / name
    seen = gather(path.exists())
    on_main(lambda: _remove_token(path))
    if not all(seen):
        raise shared_error(
            RunError(
                f"{flag} {folder}: process {seen.index(False)} does not see what the main process writes there; take a "
                "folder on a disk that all hosts share"
            )
        )


def _write_token(folder):
    """Make a file with a name that was never there before, which no host can have in its memory."""
    name = f".shared.{socket.gethostname()}.{os.getpid()}.{time.time_ns()}"
    with write_errors(Path(folder) / name):
        (Path(folder) / name).touch()
    return name


def _remove_token(path):
    with write_errors(path):
        path.unlink()
