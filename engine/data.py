"""Latents on disk: one memory-mapped array written by index, read by whole batches in an order fixed by the seed."""

import hashlib
import io
import math
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from engine.distributed import world_size
from engine.errors import InputError, one_line
from engine.files import load_json, parse_array_header, write_atomically, write_json
from engine.images import keep_batch

PENDING, DONE, CORRUPT = 0, 1, 2
READ_AGAIN = "run extract_features.py on it again"
MAKE_AGAIN = "delete it and run extract_features.py again"
STORE_ERRORS = (OSError, ValueError, KeyError, TypeError, SyntaxError, RecursionError, OverflowError, EOFError)


class LatentStore:
    """A folder with features.npy (images, 2, C, h, w), labels.npy, status.npy and metadata.json, memory-mapped.

    Version 0 of an image is the picture, version 1 its mirror. Raises ValueError, KeyError, TypeError or OSError for
    files that are damaged or do not belong together.
    """

    def __init__(self, folder, mode="r"):
        self.folder = Path(folder)
        self.metadata = load_json(self.folder / "metadata.json")
        self.shape = tuple(self.metadata["shape"])
        if len(self.shape) != 3 or not all(type(size) is int and size > 0 for size in self.shape):
            raise ValueError(f"metadata.json has shape {self.metadata['shape']}; expected three sizes")
        for name in ("features", "labels", "status"):
            check_length(self.folder / f"{name}.npy")
        self.features, self.labels, self.status = (
            np.load(self.folder / f"{name}.npy", mmap_mode=mode) for name in ("features", "labels", "status")
        )
        n = self.labels.size
        for name, kind, shape in (
            ("features", "f4", (n, 2, *self.shape)),
            ("labels", "i8", (n,)),
            ("status", "u1", (n,)),
        ):
            found = getattr(self, name)
            if (found.dtype, found.shape) != (np.dtype(kind), shape):
                raise ValueError(f"{name}.npy holds {found.dtype} {found.shape}, expected {np.dtype(kind)} {shape}")
        if n and self.status.max() > CORRUPT:
            raise ValueError("status.npy holds other values than 0, 1 and 2")

    @classmethod
    def create(cls, folder, labels, metadata):
        """Make an empty store for len(labels) images, or keep the one that is there.

        Room for all latents is taken at once: a full disk shows itself here, and not after hours.
        """
        folder = Path(folder)
        n, target = len(labels), folder / "metadata.json"
        if not os.path.lexists(target):
            folder.mkdir(parents=True, exist_ok=True)
            shape = (n, 2, *metadata["shape"])
            allocate_array(folder / "features.npy", shape, np.float32)
            allocate_array(folder / "status.npy", (n,), np.uint8)
            write_array(folder / "labels.npy", np.asarray(labels, np.int64))
            write_json(target, metadata, make_folder=False)
        return cls(folder, "r+")


def allocate_array(path, shape, dtype):
    """Write an .npy file of zeros, to a folder that is there, whose disk space is taken."""

    def write(temporary):
        np.lib.format.open_memmap(temporary, "w+", dtype, shape).flush()
        with open(temporary, "r+b") as file:
            if hasattr(os, "posix_fallocate"):  # macOS has none
                os.posix_fallocate(file.fileno(), 0, os.path.getsize(temporary))

    write_atomically(path, write, make_folder=False)


def write_array(path, array):
    """Write an .npy file, to a folder that is there, whole or not at all."""

    def write(temporary):
        with open(temporary, "wb") as file:
            np.save(file, array)

    write_atomically(path, write, make_folder=False)


def read_header(path):
    """(shape, dtype, where the data begin) of an .npy file. Raises ValueError for another file."""
    if not os.path.isfile(path):
        raise ValueError(f"{path} is missing, or not a file")
    with open(path, "rb") as file:
        _, shape, _, dtype, start = parse_array_header(file, Path(path).name)
    return shape, dtype, start


def check_length(path):
    """Raise ValueError unless an .npy file is as long as its header says; numpy would fill up a shorter one."""
    shape, dtype, start = read_header(path)
    compare_length(os.path.getsize(path), shape, dtype, start, Path(path).name)


def compare_length(found, shape, dtype, start, name):
    """Raise ValueError unless an .npy file of `found` bytes is as long as its header says."""
    expected = start + math.prod(shape) * dtype.itemsize
    if found != expected:
        raise ValueError(f"{name} has {found:,} bytes, expected {expected:,}")


class LatentDataset(Dataset):
    """Latents of a folder, ours or the original's. Item `2 * image + version`; whole batches by `__getitems__`.

    mapped: reading a batch is one copy out of a memory map, rather than opening files.
    """

    def __init__(self, folder):
        self.folder, self.mapped = folder, os.path.isfile(os.path.join(folder, "metadata.json"))
        self.source = MappedLatents(folder) if self.mapped else PublishedLatents(folder)
        self.metadata, self.labels = self.source.metadata, self.source.labels

    def __len__(self):
        return len(self.labels)

    def name_images(self, images):
        """What tells these images apart in the folder: rows of features.npy, or names of files."""
        return self.source.name_images(images)

    def digest(self):
        """A short digest of sizes, labels, and the latents of 64 images."""
        images = np.linspace(0, len(self) - 1, 64).astype(int)
        x, _ = self.__getitems__(2 * images)
        parts = (str(self.metadata["shape"]).encode(), np.ascontiguousarray(self.labels), x.numpy())
        return hashlib.sha256(b"".join(bytes(part) for part in parts)).hexdigest()[:16]

    def __getitems__(self, items, pin_memory=False):
        """Latents (N, C, h, w) float32 and labels (N,), read straight into pinned memory if a GPU will fetch them."""
        items = np.asarray(items)
        images, versions = items // 2, items % 2
        x = torch.empty(len(items), *self.metadata["shape"], pin_memory=pin_memory)
        self.source.read(images, versions, out=x.numpy())
        y = torch.from_numpy(self.labels[images])
        return x, y.pin_memory() if pin_memory else y

    def __getitem__(self, item):
        x, y = self.__getitems__([item])
        return x[0], y[0]


class MappedLatents:
    """Our layout: `labels` of the images that were encoded, and `read` of their latents."""

    def __init__(self, folder):
        try:
            store = LatentStore(folder)
        except STORE_ERRORS as error:
            raise InputError(f"--data-path {folder}: damaged latents ({one_line(error)}); {MAKE_AGAIN}") from None
        pending = int((store.status == PENDING).sum())
        if pending:
            raise InputError(
                f"--data-path {folder}: {pending} of {len(store.status)} images are not encoded yet; {READ_AGAIN}"
            )
        self.metadata, self.rows_of = store.metadata, np.flatnonzero(store.status == DONE)
        self.labels = np.array(store.labels[self.rows_of])
        self.rows = store.features.reshape(-1, *store.shape)  # a view, in the order of 2 * image + version

    def name_images(self, images):
        """Rows of features.npy."""
        return self.rows_of[images].tolist()

    def read(self, images, versions, out):
        """Write the latents of these images, in these versions, to `out` (N, C, h, w)."""
        rows = 2 * self.rows_of[images] + versions
        np.take(self.rows, rows, axis=0, out=out, mode="clip")  # "raise" would copy everything twice


class PublishedLatents:
    """The original's layout: <any>_features/<n>.npy of (1 or 2, C, h, w) and <any>_labels/<n>.npy of (1,)."""

    def __init__(self, folder):
        found = {kind: next(Path(folder).glob(f"*_{kind}"), None) for kind in ("features", "labels")}
        if None in found.values():
            raise InputError(
                f"--data-path {folder}: no latents (metadata.json or *_features and *_labels); {READ_AGAIN}"
            )
        self.files, labels = (list_arrays(path) for path in found.values())
        unpaired = sorted(set(self.files) ^ set(labels))
        if unpaired or not self.files:
            detail = f"{unpaired[0]}.npy is in one of *_features and *_labels only" if unpaired else "no files"
            raise InputError(f"--data-path {folder}: {detail}; {READ_AGAIN}")
        self.names = sorted(self.files, key=lambda name: (len(name), name))
        try:
            self.labels = np.array([read_label(labels[name]) for name in self.names])
            looked_at = self.names[:: max(1, len(self.names) // 100)]  # opening all of a million files takes minutes
            shapes = {map_published(self.files[name]).shape[1:] for name in looked_at}
        except STORE_ERRORS as error:
            raise InputError(f"--data-path {folder}: damaged latents ({one_line(error)}); {MAKE_AGAIN}") from None
        if len(shapes) > 1:
            raise InputError(f"--data-path {folder}: files of several shapes: {shapes}; {READ_AGAIN}")
        self.metadata = {"shape": list(shapes.pop())}

    def name_images(self, images):
        """Names of files."""
        return [self.names[image] for image in images]

    def read(self, images, versions, out):
        """Write the latents of these images, in these versions, to `out` (N, C, h, w)."""
        for row, image, version in zip(out, images, versions, strict=True):
            path = self.files[self.names[image]]
            try:
                pair = map_published(path)
                row[:] = pair[min(version, len(pair) - 1)]
            except STORE_ERRORS as error:  # only some files were looked at when the folder was opened
                raise InputError(f"--data-path {path}: damaged latents ({one_line(error)}); {MAKE_AGAIN}") from None


def read_label(path):
    """The label in a file of the original's layout. Raises ValueError unless it is one whole number."""
    data = Path(path).read_bytes()  # once: there are a million of these
    _, shape, _, dtype, start = parse_array_header(io.BytesIO(data), path)
    compare_length(len(data), shape, dtype, start, path)
    found = np.frombuffer(data, dtype, offset=start)
    if len(found) != 1 or found.dtype.kind not in "iuf" or int(found[0]) != found[0]:
        raise ValueError(f"{path} holds {found.dtype} {found.shape}; expected one whole number")
    return int(found[0])


def map_published(path):
    """The latents (1 or 2, C, h, w) in a file of the original's layout; raises ValueError for another array."""
    with open(path, "rb") as file:
        _, shape, is_fortran, dtype, start = parse_array_header(file, path)
    if len(shape) != 4 or not shape[0] or dtype.kind != "f":
        raise ValueError(f"{path} holds {dtype} {shape}; expected floating-point (2, C, h, w)")
    return np.memmap(path, dtype, "r", start, shape, "F" if is_fortran else "C")


def list_arrays(folder):
    """{name without suffix: path} of the .npy files in a folder; none if it is no folder."""
    if not os.path.isdir(folder):
        return {}
    with os.scandir(folder) as entries:
        return {Path(e.name).stem: Path(e.path) for e in entries if e.name.endswith(".npy") and e.is_file()}


def open_latents(folder, space):
    """The latents of a folder, checked against the engine.vae.LatentSpace they should be of.

    Raises InputError for damaged or unfinished ones, another size, or labels that are not classes.
    """
    dataset = LatentDataset(folder)
    if not len(dataset):
        raise InputError(f"--data-path {folder}: holds no image that could be encoded; {READ_AGAIN}")
    recorded = dataset.metadata.get("vae", space.vae)
    if (recorded == "none") != (space.vae == "none"):
        raise InputError(f"--vae {space.vae}: the latents of --data-path {folder} were made with {recorded}; take that")
    height, width = dataset.metadata["shape"][1:]
    if (height, width) != (space.size, space.size):
        raise InputError(
            f"--image-size {space.image_size}: needs latents of {space.size}x{space.size} with --vae {space.vae}, but "
            f"--data-path {folder} has {height}x{width}"
        )
    highest, lowest = int(dataset.labels.max()), int(dataset.labels.min())
    if highest >= space.num_classes or lowest < 0:
        raise InputError(
            f"--num-classes {space.num_classes}: --data-path {folder} has labels {lowest}..{highest}, "
            f"expected 0..{space.num_classes - 1}; give --num-classes {highest + 1} or other data"
        )
    return dataset


def network_channels(dataset, space):
    """Channels that the network works on: half of the stored ones if these are moments."""
    stored = dataset.metadata["shape"][0]
    is_moments = space.latents.moments and stored == 2 * space.latents.channels
    return stored // 2 if is_moments else stored


def network_config(dataset, space):
    """Constructor arguments of a network for these latents."""
    channels = network_channels(dataset, space)
    return {"input_size": space.size, "num_classes": space.num_classes, "in_channels": channels}


class BatchOrder:
    """Which items this process reads at each step: a function of seed, step and rank, so any run can continue anywhere.

    Every epoch is a permutation, incomplete batches are dropped. The global batch does not depend on the process count.
    """

    def __init__(self, images, batch, seed, mirror, steps, rank=0, world=1):
        self.images, self.batch, self.seed, self.mirror, self.steps = images, batch, seed, mirror, steps
        self.part = slice(rank * (batch // world), (rank + 1) * (batch // world))

    def __len__(self):
        return len(self.steps)

    def __iter__(self):
        per_epoch, epoch = len(self.images) // self.batch, None
        for step in self.steps:
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                order = self.images[np.random.default_rng([self.seed, 0, epoch]).permutation(len(self.images))]
            start = step % per_epoch * self.batch
            version = np.random.default_rng([self.seed, 1, step]).random(self.batch) < self.mirror
            yield (2 * order[start : start + self.batch] + version)[self.part].tolist()


def read_ahead(read, order, depth=2):
    """read(items) for each element of `order`, in its order; a thread keeps up to `depth` results ready."""
    with ThreadPoolExecutor(1) as pool:
        ready = deque()
        for items in order:
            ready.append(pool.submit(read, items))
            if len(ready) > depth:
                yield ready.popleft().result()
        while ready:
            yield ready.popleft().result()


@dataclass(frozen=True)
class TrainingData:
    """Latents, and how a run goes through them; the fields but `dataset` are settings of these names.

    eval_split: of the images, how many are held out: a share below 1, or a number of them. Raises InputError, when it
    is made, unless the global batch divides by processes and parts and the data fill one.
    """

    dataset: LatentDataset
    epochs: int
    global_batch_size: int
    global_seed: int = 0
    mirror: float = 0.5
    num_workers: int = 0
    grad_accumulation: int = 1
    eval_split: float = 0.0

    def __post_init__(self):
        self._hold_out()
        n, batch, world, parts = len(self.images), self.global_batch_size, world_size(), self.grad_accumulation
        if batch % world:
            raise InputError(f"--global-batch-size {batch}: not divisible by {world} processes; take a multiple")
        if batch // world % parts:
            raise InputError(f"--grad-accumulation {parts}: {batch // world} images a process do not divide by it")
        if n < batch:
            raise InputError(f"--global-batch-size {batch}: larger than the data ({n} images); take {n} or less")

    def _hold_out(self):
        """Set `images`, which are trained on, and `held_out`, which are not: ascending, and functions of the seed."""
        n, asked = len(self.dataset), self.eval_split
        count = round(asked * n) if asked < 1 else int(asked)
        if asked and not 0 < count < n:
            raise InputError(f"--eval-split {asked:g}: holds out {count} of {n} images; give a share, or fewer images")
        order = np.random.default_rng([self.global_seed, 2]).permutation(n)
        for name, part in (("held_out", order[:count]), ("images", order[count:])):
            object.__setattr__(self, name, np.sort(part))  # the dataclass is frozen

    @property
    def steps_per_epoch(self):
        return len(self.images) // self.global_batch_size

    @property
    def total_steps(self):
        return self.epochs * self.steps_per_epoch

    def order(self, steps, rank=0, world=1):
        """The items, 2 * image + version, that this process reads at each of these steps."""
        batch, seed, mirror = self.global_batch_size, self.global_seed, self.mirror
        return BatchOrder(self.images, batch, seed, mirror, steps, rank, world)

    def batches(self, steps, rank=0, world=1, pin_memory=False):
        """Batches (x, y) of this process for a range of steps, read while the step before them is computed.

        By `num_workers` processes if every image is a file. Sending a batch between processes takes longer than copying
        it out of a memory map: there, one thread does it for any number of workers, and with none the caller itself.
        """
        order = self.order(steps, rank, world)
        if self.dataset.mapped:
            read = partial(self.dataset.__getitems__, pin_memory=pin_memory)
            return read_ahead(read, order) if self.num_workers else map(read, order)
        return DataLoader(
            self.dataset,
            batch_sampler=order,
            collate_fn=keep_batch,
            num_workers=self.num_workers,
            pin_memory=pin_memory,
        )
