"""Sets of images as the evaluator reads them: .npz files, folders of pictures, shards; never all images in memory."""

import glob
import hashlib
import io
import math
import os
import re
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from engine.files import PICTURE_SUFFIXES, parse_array_header

OPAQUE = {"RGB", "L", "P", "1", "CMYK", "YCbCr"}  # modes that turn into RGB without a choice
ZIP = "not an .npz file (a zip archive)"
MAX_PIXELS = 1 << 24  # of one picture: a small file may claim any number, for which memory would be taken
MIN_CHECKED = 1 << 20  # bytes asked for at once, from which the size of the file is looked at
DEFLATE_LIMIT = 1100  # no file gets smaller than by this factor
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

    @property
    def paths(self):
        """The files and folders that were named."""
        return [part.path for part in self.parts]

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
        version, shape, fortran, dtype, self.offset = _read_header(archive, "arr_0.npy")
        check_layout(self.path, shape, dtype)
        if archive.getinfo("arr_0.npy").file_size != self.offset + math.prod(shape):
            raise ValueError(f"{self.path}: arr_0 is truncated; its header says {shape[0]} images")
        if version not in ((1, 0), (2, 0)) or fortran:
            self.whole = _read_array(archive, "arr_0.npy")
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
            with _open_picture(file) as image:
                mode, size, kind = image.mode, (image.height, image.width), image.format
                opaque = mode in OPAQUE and "transparency" not in image.info
            self.lossy |= kind == "JPEG"
            self.size = self.size or size
            if size[0] * size[1] > MAX_PIXELS:
                raise ValueError(f"{file}: {size[0]}x{size[1]} pixels; expected {MAX_PIXELS:,} or fewer")
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
    if min(shape) < 1:
        raise ValueError(f"{found}: empty")


def find_parts(source):
    """Paths of the files and folders that `source` names, shards in the order of the numbers in their names."""
    words = [source] if os.path.exists(source) else [word for word in source.split(",") if word.strip()]
    found = []
    for word in words:
        paths = [word] if os.path.exists(word) else sorted(glob.glob(word), key=_order)
        found += [part for path in paths for part in _list_parts(path)]
        if not paths:
            raise ValueError(f"{word}: no such file or folder; expected an .npz file or a folder of images")
    if not found:
        raise ValueError("names no file; expected an .npz file or a folder of images")
    return found


def _list_parts(path):
    """The .npz files of a folder, or what is named itself. Raises ValueError for what can be neither."""
    if os.path.isfile(path):
        return [path]
    if not os.path.isdir(path):
        raise ValueError(f"{path}: not a regular file; expected an .npz file or a folder of images")
    shards = _below(path, {".npz"})
    if shards and _below(path, PICTURE_SUFFIXES):
        raise ValueError(f"{path}: holds pictures and {shards[0]}, it is unclear what is meant; move either away")
    return shards or [path]


def _read_statistics(archive, path):
    """mu and sigma, and mu_s and sigma_s if they are there, as float64 arrays of the expected shapes."""
    found, names = {}, set(archive.namelist())
    for first, second in (("mu", "sigma"), ("mu_s", "sigma_s")):
        if not {f"{first}.npy", f"{second}.npy"} & names:
            continue
        for key in (first, second):
            if f"{key}.npy" not in names:
                raise ValueError(f"{path}: {key} is missing beside {first if key == second else second}")
            _, shape, _, dtype, _ = _read_header(archive, f"{key}.npy")
            fits = shape == STATISTICS[key] and dtype.kind == "f"
            value = _read_array(archive, f"{key}.npy").astype(np.float64) if fits else None
            if not fits or not np.isfinite(value).all():
                raise ValueError(f"{path}: {key} is not {STATISTICS[key]} finite numbers, but {dtype} {shape}")
            if value.ndim == 2 and np.diagonal(value).min() < 0:
                raise ValueError(f"{path}: {key} has negative variances on its diagonal")
            found[key] = value
    return found


def _read_header(archive, name):
    """(version, shape, whether in Fortran's order, dtype, where the data begin) of an .npy file in an archive.

    Raises ValueError if that is damaged, or says that it holds more than an archive of this size can.
    """
    info = archive.getinfo(name)
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name} is compressed in a way that numpy does not use")
    if info.file_size > DEFLATE_LIMIT * os.path.getsize(archive.filename):
        raise ValueError(f"{name} is truncated: the file is too small for its {info.file_size:,} bytes")
    with archive.open(name) as member:
        return parse_array_header(member, name)


def _read_array(archive, name):
    """The array of an .npy file in an archive, whose header was checked."""
    with archive.open(name) as member:
        return np.lib.format.read_array(member, allow_pickle=False)


@contextmanager
def _damage_errors(path, kind):
    """Turn what zipfile, numpy and Pillow raise for damaged files into a ValueError that names the file."""
    try:
        yield
    except ValueError as error:
        raise error if str(path) in str(error) else ValueError(f"{path}: {error}") from None
    except MemoryError:
        raise
    except Exception as error:  # it may be any: Pillow's readers compute with what they find
        raise ValueError(f"{path}: {kind}, or a truncated or damaged one ({error})") from None


class _Bounded(io.BufferedReader):
    """A file that takes no memory for more bytes than it has, whatever number is asked for."""

    def read(self, size=-1):
        return super().read(size if size is None or size < MIN_CHECKED else min(size, os.fstat(self.fileno()).st_size))


@contextmanager
def _open_picture(file):
    """The picture in a file."""
    if not os.path.isfile(file):
        raise ValueError(f"{file}: not a regular file; remove it")
    with _damage_errors(file, "not a picture"), _Bounded(io.FileIO(file)) as source, Image.open(source) as image:
        yield image


def _read_pixels(file):
    """One picture as an array (height, width, 3) uint8."""
    with _open_picture(file) as image:
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
