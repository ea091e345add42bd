"""Sets of images as the evaluator reads them: .npz files, folders of pictures, shards; never all images in memory."""

import glob
import hashlib
import os
import re
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from engine.files import PICTURE_SUFFIXES

OPAQUE = {"RGB", "L", "P", "1", "CMYK", "YCbCr"}  # modes that turn into RGB without a choice
ZIP = "not an .npz file (a zip archive)"
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
STATISTICS = {"mu": (2048,), "sigma": (2048, 2048), "mu_s": (2023,), "sigma_s": (2023, 2023)}


def open_images(source):
    """A reference or sample: an .npz, a folder of pictures or of .npz, a comma list or a glob of these.

    Everything but the pixels is checked here; raises ValueError, naming the file.
    """
    return Images([(FolderImages if os.path.isdir(path) else NpzImages)(path) for path in find_parts(str(source))])


class Images:
    """n images of height x width, in file order, and the statistics stored with them (mu, sigma, mu_s, sigma_s)."""

    def __init__(self, parts):
        self.parts, self.n = parts, sum(part.n for part in parts)
        self.height, self.width = parts[0].size
        self.statistics, self.lossy = parts[0].statistics, any(part.lossy for part in parts)
        first = f"{_pixels(parts[0].size)} in {parts[0].path}"
        for part in parts[1:]:
            if part.size != parts[0].size:
                raise ValueError(f"{part.path}: images of {_pixels(part.size)}, but {first}")
        if len(parts) > 1 and any(part.statistics for part in parts):
            raise ValueError("several files, and one holds statistics: it is unclear of what; give that file alone")

    def batches(self, size, start=0, stop=None):
        """Images start..stop as uint8 arrays (b, height, width, 3), b <= size; the next one is read meanwhile."""
        return _ahead(self._batches(size, start, self.n if stop is None else stop))

    def _batches(self, size, start, stop):
        for part in self.parts:
            if start < min(stop, part.n):
                yield from part.batches(size, max(start, 0), min(stop, part.n))
            start, stop = start - part.n, stop - part.n

    def digest(self):
        """SHA-256 of the contents of all files, in order."""
        total = hashlib.sha256()
        for path in (path for part in self.parts for path in part.files):
            total.update(digest(path).encode())
        return total.hexdigest()


class NpzImages:
    """The member `arr_0` (n, height, width, 3) of an .npz file, read as a stream, and its stored statistics."""

    lossy = False

    def __init__(self, path):
        self.path, self.files, self.whole, self.n, self.size = path, [path], None, 0, (None, None)
        with _damage_errors(path, ZIP), zipfile.ZipFile(path) as archive:
            names = set(archive.namelist())
            self.statistics = _read_statistics(archive, path) if "mu.npy" in names else {}
            if "arr_0.npy" in names:
                self._read_header(archive)
            elif not self.statistics:
                held = ", ".join(sorted(name.removesuffix(".npy") for name in names)) or "nothing"
                raise ValueError(f"{path}: missing arr_0 (images) and mu (statistics); it holds {held}")

    def _read_header(self, archive):
        with archive.open("arr_0.npy") as member:
            read = HEADERS.get(np.lib.format.read_magic(member))
            if read:
                shape, fortran, dtype = read(member)
                self.offset = member.tell()
        if not read or fortran or dtype.hasobject:
            with archive.open("arr_0.npy") as member:
                self.whole = np.lib.format.read_array(member, allow_pickle=False)
            shape, dtype = self.whole.shape, self.whole.dtype
        check_layout(self.path, shape, dtype)
        if self.whole is None and archive.getinfo("arr_0.npy").file_size != self.offset + int(np.prod(shape)):
            raise ValueError(f"{self.path}: arr_0 is truncated; its header says {shape[0]} images")
        self.n, self.size = shape[0], shape[1:3]

    def batches(self, size, start, stop):
        shape = (*self.size, 3)
        if self.whole is not None:
            yield from (np.ascontiguousarray(self.whole[i : min(i + size, stop)]) for i in range(start, stop, size))
            return
        with _damage_errors(self.path, ZIP), zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as member:
            member.seek(self.offset + start * int(np.prod(shape)))
            for i in range(start, stop, size):
                batch = np.empty((min(size, stop - i), *shape), np.uint8)
                if member.readinto(memoryview(batch).cast("B")) != batch.nbytes:
                    raise EOFError("the data end early")
                yield batch
            if stop == self.n:
                member.read(1)  # the end of the member: its check sum is compared here


class FolderImages:
    """All pictures below a folder, in the order of the numbers in their names."""

    statistics = {}  # noqa: RUF012

    def __init__(self, path):
        self.path, self.files, self.lossy, self.size = path, _below(path, PICTURE_SUFFIXES), False, None
        self.n = len(self.files)
        if not self.files:
            raise ValueError(f"{path}: no images; expected {', '.join(sorted(PICTURE_SUFFIXES))} files, or .npz files")
        for file in self.files:
            with _damage_errors(file, "not a picture"), Image.open(file) as image:
                mode, size, kind = image.mode, (image.height, image.width), image.format
                opaque = mode in OPAQUE and "transparency" not in image.info
            self.lossy |= kind == "JPEG"
            self.size = self.size or size
            if not opaque:
                raise ValueError(f"{file}: mode {mode}; expected opaque pictures with 8 bits a channel (RGB)")
            if size != self.size:
                other = f"{_pixels(self.size)} in {self.files[0]}"
                raise ValueError(f"{file}: {_pixels(size)} pixels, but {other}; all images need the same size")

    def batches(self, size, start, stop):
        with ThreadPoolExecutor(4) as pool:
            for i in range(start, stop, size):
                yield np.stack(list(pool.map(_read_pixels, self.files[i : min(i + size, stop)])))


def digest(path):
    """SHA-256 of the contents of a file."""
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            total.update(block)
    return total.hexdigest()


def check_layout(path, shape, dtype):
    """Raise ValueError unless an array is (n, height, width, 3) of uint8, with at least one pixel."""
    found = f"{path}: arr_0 is {dtype} {tuple(shape)}"
    if len(shape) != 4:
        raise ValueError(f"{found}; expected four dimensions (images, height, width, 3)")
    if shape[3] != 3:
        kind = {4: "RGBA (drop the alpha channel)", 1: "grey (repeat the channel)"}.get(shape[3])
        kind = "NCHW (transpose to NHWC)" if shape[1] == 3 else kind
        raise ValueError(f"{found}{', that is ' + kind if kind else ''}; expected (images, height, width, 3)")
    if dtype != np.uint8:
        raise ValueError(f"{found}; expected uint8 images from 0 to 255, not rescaled")
    if not np.prod(shape):
        raise ValueError(f"{found}: empty")


def find_parts(source):
    """Paths of the files and folders that `source` names, shards in the order of the numbers in their names."""
    words = [source] if os.path.exists(source) else [word for word in source.split(",") if word.strip()]
    found = []
    for word in words:
        paths = [word] if os.path.exists(word) else sorted(glob.glob(word), key=_order)
        for path in paths:
            found += (os.path.isdir(path) and _below(path, {".npz"})) or [path]
        if not paths:
            raise ValueError(f"{word}: no such file or folder; expected an .npz file or a folder of images")
    if not found:
        raise ValueError("names no file; expected an .npz file or a folder of images")
    return found


def _read_statistics(archive, path):
    """mu and sigma, and mu_s and sigma_s if they are there, as float64 arrays of the expected shapes."""
    found, names = {}, set(archive.namelist())
    for first, second in (("mu", "sigma"), ("mu_s", "sigma_s")):
        if not {f"{first}.npy", f"{second}.npy"} & names:
            continue
        for key in (first, second):
            if f"{key}.npy" not in names:
                raise ValueError(f"{path}: {key} is missing beside {first if key == second else second}")
            with archive.open(f"{key}.npy") as member:
                value = np.lib.format.read_array(member, allow_pickle=False)
            shape = STATISTICS[key]
            if value.shape != shape or value.dtype.kind != "f" or not np.isfinite(value).all():
                raise ValueError(f"{path}: {key} is not {shape} finite numbers, but {value.dtype} {value.shape}")
            found[key] = value.astype(np.float64)
    return found


@contextmanager
def _damage_errors(path, kind):
    """Turn what zipfile, numpy and Pillow raise for damaged files into a ValueError that names the file."""
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError, SyntaxError) as error:
        raise ValueError(f"{path}: {kind}, or a truncated or damaged one ({error})") from None
    except ValueError as error:
        raise error if str(path) in str(error) else ValueError(f"{path}: {error}") from None


def _read_pixels(file):
    """One picture as an array (height, width, 3) uint8."""
    with _damage_errors(file, "not a picture"), Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


def _ahead(batches):
    """The same batches; the next one is read while one is used."""
    with ThreadPoolExecutor(1) as pool:
        batches = iter(batches)
        following = pool.submit(next, batches, None)
        while (batch := following.result()) is not None:
            following = pool.submit(next, batches, None)
            yield batch


def _below(folder, suffixes):
    """Files below a folder with one of the suffixes, ordered by the numbers in their names."""
    found = (path for path in Path(folder).rglob("*") if path.suffix.lower() in suffixes and path.name[0] != ".")
    return sorted(map(str, found), key=_order)


def _order(path):
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path)]


def _pixels(size):
    return "x".join(map(str, size))
