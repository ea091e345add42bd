"""Files on disk: whole or not at all, fetched once, and which of them are pictures. Without torch and without flags."""

import http.client
import json
import math
import os
import time
import urllib.request
from pathlib import Path

from tqdm import tqdm

TIMEOUT = 60  # seconds without an answer of a server
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".tif", ".tiff")


def write_atomically(path, write):
    """Call write(temporary path), then rename: nobody ever sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def plain(value):
    """The value as JSON holds it; numbers that JSON does not know, such as infinity, as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(name): plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return value if isinstance(value, int | float | bool | str | None) else str(value)


def write_json(path, values):
    """Write `values` as valid JSON, see `plain`."""
    text = json.dumps(plain(values), indent=1, allow_nan=False)
    write_atomically(path, lambda temporary: temporary.write_text(text + "\n"))


def download(url, target, check=lambda path: None):
    """Fetch `url` as `target` unless it is there: once per machine, by its first process, and seen whole or not at all.

    check(path) raises ValueError for contents that are not what was expected. Raises ValueError if that happens, or if
    the file cannot be fetched.
    """
    target = Path(target)
    while int(os.environ.get("LOCAL_RANK", 0)) and not target.is_file():
        time.sleep(1)  # the first process of this machine fetches; the launcher ends us if it fails
    if target.is_file():
        return target

    def fetch(temporary):
        with urllib.request.urlopen(url, timeout=TIMEOUT) as source, open(temporary, "wb") as file:
            copy_with_progress(source, file, target.name)
        check(temporary)

    try:
        write_atomically(target, fetch)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise ValueError(f"{url} cannot be fetched ({error})") from None
    return target


def copy_with_progress(source, file, title):
    """Copy an open response to an open file."""
    size = getattr(source, "length", None)
    with tqdm(total=size, desc=title, unit="B", unit_scale=True, disable=None, leave=False) as bar:
        while block := source.read(1 << 20):
            file.write(block)
            bar.update(len(block))


def is_picture(path):
    """Whether a name has the suffix of a picture and is not hidden."""
    return path.suffix.lower() in PICTURE_SUFFIXES and not path.name.startswith(".")
