"""Files on disk: whole or not at all, fetched once, and which of them are pictures. Without torch and without flags."""

import errno
import hashlib
import http.client
import json
import math
import os
import socket
import time
import urllib.request
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from tqdm import tqdm

from engine import PICTURE_SUFFIXES
from engine.errors import RunError, flag_errors, one_line

TIMEOUT = 60  # seconds without an answer of a server
STARTED = time.time()


def write_atomically(path, write, durable=True, make_folder=True):
    """Call write(temporary path), then rename: nobody ever sees half a file, also not after a power cut if `durable`.

    make_folder: False for a folder that was there at the start: one that was removed since is not silently made again.
    Raises RunError, with the reason and what to do, if the file cannot be written; what was there before stays.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{socket.gethostname()[:30]}.{os.getpid()}.part")
    try:
        with write_errors(path, temporary):
            if make_folder:
                path.parent.mkdir(parents=True, exist_ok=True)
            if durable:
                remove_dead_partial_files(path)
            write(temporary)
            if durable:
                sync(temporary)
            os.replace(temporary, path)
            if durable:
                sync(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink()


def sync(path):
    """Bring a file, or the names in a folder, to the disk."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows does not open folders
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


ADVICE = {
    errno.ENOSPC: "make room and repeat the command",
    errno.EDQUOT: "make room in your quota and repeat the command",
    errno.ENOENT: "the folder is gone: repeat the command to begin again",
}


@contextmanager
def write_errors(path, partial=None):
    """Turn what Python and libraries raise when a file cannot be written into a RunError that names it.

    partial: where it was written to; libraries do not always tell the reason, which is then found by writing on there.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RunError):
            raise
        error = find_os_error(error, partial or path)
        advice = ADVICE.get(error.errno, "take another path, or mend this and repeat the command")
        raise RunError(f"{path}: cannot be written ({error.strerror or error}); {advice}") from None


def find_os_error(error, path):
    """The OSError behind an error of a library."""
    if getattr(error, "errno", None):
        return error
    try:
        with open(path, "ab") as file:
            file.write(bytes(1 << 20))
    except OSError as found:
        return found
    return OSError(str(error).splitlines()[0])


def remove_dead_partial_files(path):
    """Remove what processes of this host that are gone have left half written of a file."""
    start = f".{path.name}.{socket.gethostname()[:30]}."
    with os.scandir(path.parent) as entries:
        names = [entry.name for entry in entries if entry.name.startswith(start) and entry.name.endswith(".part")]
    for name in names:
        process = name.removeprefix(start).removesuffix(".part")
        if process.isdecimal() and not is_alive(int(process)):
            (path.parent / name).unlink(missing_ok=True)


def is_alive(process):
    """Whether a process of this host exists, as far as can be known."""
    if os.name == "nt":
        return True  # there os.kill would end it
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # of another user, or not to be known
        return True
    return True


def remove_partial_files(folder):
    """Remove what killed processes left half written in a folder of ours; others must not be writing there."""
    for path in Path(folder).glob(".*.part"):
        path.unlink(missing_ok=True)


def digest_file(path):
    """A short digest of a file; of a large one, for speed, of its size and of 64 parts spread over it.

    The last part of a file of torch.save holds the checksums of all tensors. In a large .safetensors file, which has
    none, a change between those parts is not seen.
    """
    size = os.path.getsize(path)
    digest = hashlib.sha256(str(size).encode())
    block = 1 << 20
    starts = range(0, size, block) if size <= 64 * block else [size * k // 64 for k in range(63)] + [size - block]
    with open(path, "rb") as file:
        for start in starts:
            file.seek(start)
            digest.update(file.read(block))
    return digest.hexdigest()[:16]


def plain(value):
    """The value as JSON holds it; numbers that JSON does not know, such as infinity, as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(name): plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return value if isinstance(value, int | float | bool | str | None) else str(value)


def write_json(path, values, make_folder=True):
    """Write `values` as valid JSON, see `plain`; make_folder as for `write_atomically`."""
    text = json.dumps(plain(values), indent=1, allow_nan=False)
    write_atomically(path, lambda temporary: temporary.write_text(text + "\n"), make_folder=make_folder)


def load_json(path):
    """The JSON object in a file. Raises ValueError, naming it, for a file that holds none."""
    try:
        if not os.path.isfile(path):
            raise OSError("not a regular file")
        value = json.loads(Path(path).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error}); mend it or remove it") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object; mend it or remove it")
    return value


def read_json(flag, path):
    """The same, but raises InputError, naming `flag`."""
    with flag_errors(flag, path):
        return load_json(path)


def parse_array_header(file, name):
    """(version, shape, whether in Fortran's order, dtype, where the data begin) of an open .npy file.

    Raises ValueError, with the `name`, for another file or a damaged one.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of headers that Python 2 wrote
        version = np.lib.format.read_magic(file)
        is_first = version == (1, 0)  # later versions differ in the characters that names of fields may have
        read = np.lib.format.read_array_header_1_0 if is_first else np.lib.format.read_array_header_2_0
        try:
            return version, *read(file), file.tell()
        except Exception as error:  # it may be any: numpy parses the header as Python
            raise ValueError(f"the header of {name} is damaged ({one_line(error):.200})") from None


def download(url, target, check=lambda path: None):
    """Fetch `url` as `target` unless it is there: once per machine, by its first process, and seen whole or not at all.

    check(path) raises ValueError for contents that are not what was expected. Raises ValueError if that happens, or if
    the file cannot be fetched.
    """
    target = Path(target)
    failed = target.with_name(f".{target.name}.failed")
    if int(os.environ.get("LOCAL_RANK", 0)):
        wait_for_file(target, failed)
    if target.is_file():
        return target
    failed.unlink(missing_ok=True)

    def fetch(temporary):
        with open(temporary, "wb") as file:
            for block in read_blocks(url, target.name):
                file.write(block)
        check(temporary)

    try:
        write_atomically(target, fetch)
    except ValueError as error:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            failed.write_text(str(error))
        raise ValueError(f"{url} cannot be fetched ({error})") from None
    return target


def wait_for_file(target, failed):
    """Wait until the first process of this machine has fetched a file. Raises ValueError if it says that it cannot."""
    while not target.is_file():
        if failed.exists() and failed.stat().st_mtime > STARTED - 5:  # not of an earlier run
            raise ValueError(f"{target.name} cannot be fetched ({failed.read_text()})")
        time.sleep(0.5)


def read_blocks(url, title):
    """The contents of `url` in blocks, with progress. Raises ValueError if they cannot be had."""
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as source:
            size = getattr(source, "length", None)
            with tqdm(total=size, desc=title, unit="B", unit_scale=True, disable=None, leave=False) as bar:
                while block := source.read(1 << 20):
                    yield block
                    bar.update(len(block))
    except (OSError, http.client.HTTPException) as error:
        raise ValueError(error) from None


def is_picture(path):
    """Whether a name has the suffix of a picture and is not hidden."""
    return path.suffix.lower() in PICTURE_SUFFIXES and not path.name.startswith(".")
