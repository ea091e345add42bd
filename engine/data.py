"""Latents on disk: one memory-mapped array written by index, read by whole batches in an order fixed by the seed."""

import json
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from engine.checkpoint import told_by_weights, write_atomically
from engine.distributed import world_size
from engine.errors import InputError
from engine.images import as_it_is
from engine.vae import latent_size
from families import family_of

PENDING, DONE, CORRUPT = 0, 1, 2
READ_AGAIN = "run extract_features.py on it again"


class LatentStore:
    """A folder with features.npy (images, 2, C, h, w), labels.npy, status.npy and metadata.json.

    Version 0 of an image is the picture, version 1 its mirror. Any number of processes write, each its own indices.
    """

    def __init__(self, folder, mode="r"):
        self.folder = Path(folder)
        self.metadata = json.loads((self.folder / "metadata.json").read_text())
        self.shape = tuple(self.metadata["shape"])
        self.features, self.labels, self.status = (
            np.load(self.folder / f"{name}.npy", mmap_mode=mode) for name in ("features", "labels", "status")
        )

    @classmethod
    def create(cls, folder, labels, metadata):
        """Make an empty store for len(labels) images, or keep the one that has the same metadata."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        n, target = len(labels), folder / "metadata.json"
        if not target.exists():
            shapes = {"features": ((n, 2, *metadata["shape"]), np.float32), "status": ((n,), np.uint8)}
            for name, (shape, dtype) in shapes.items():
                np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, shape).flush()
            np.save(folder / "labels.npy", np.asarray(labels, np.int64))
            write_atomically(target, lambda file: file.write_text(json.dumps(metadata, indent=1)))
        return cls(folder, "r+")


class LatentDataset(Dataset):
    """Latents of a folder, ours or the original's. Item `2 * image + version`; whole batches by `__getitems__`.

    mapped: reading a batch is one copy out of a memory map, rather than opening files.
    """

    def __init__(self, folder):
        self.mapped = os.path.isfile(os.path.join(folder, "metadata.json"))
        opened = _open_store(folder) if self.mapped else _open_published(folder)
        self.metadata, self.images, self.labels, self.read = opened

    def __len__(self):
        return len(self.images)

    def __getitems__(self, items, pin_memory=False):
        """Latents (N, C, h, w) float32 and labels (N,), read straight into pinned memory if a GPU will fetch them."""
        items = np.asarray(items)
        positions = items // 2
        x = torch.empty(len(items), *self.metadata["shape"], pin_memory=pin_memory)
        self.read(self.images[positions], items % 2, out=x.numpy())
        y = torch.from_numpy(self.labels[positions])
        return x, y.pin_memory() if pin_memory else y

    def __getitem__(self, item):
        x, y = self.__getitems__([item])
        return x[0], y[0]


def _open_store(folder):
    try:
        store = LatentStore(folder)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"--data-path {folder}: damaged latents ({error!r}); {READ_AGAIN}") from None
    n, found = len(store.labels), (store.features.shape, store.features.dtype)
    if not (len(store.status) == n and found == ((n, 2, *store.shape), np.float32)):
        raise InputError(f"--data-path {folder}: features, labels and metadata do not match; {READ_AGAIN}")
    pending = int((store.status == PENDING).sum())
    if pending:
        raise InputError(
            f"--data-path {folder}: {pending} of {len(store.status)} images are not encoded yet; {READ_AGAIN}"
        )
    images = np.flatnonzero(store.status == DONE)
    rows = store.features.reshape(-1, *store.shape)  # a view, in the order of 2 * image + version

    def read(images, versions, out):
        np.take(rows, 2 * images + versions, axis=0, out=out, mode="clip")  # "raise" would copy everything twice

    return store.metadata, images, np.array(store.labels[images]), read


def _open_published(folder):
    """The original's layout: <any>_features/<n>.npy of (1 or 2, C, h, w) and <any>_labels/<n>.npy of (1,)."""
    found = {kind: next(Path(folder).glob(f"*_{kind}"), None) for kind in ("features", "labels")}
    if None in found.values():
        raise InputError(f"--data-path {folder}: no latents (metadata.json or *_features and *_labels); {READ_AGAIN}")
    files = {kind: {f.stem: f for f in path.glob("*.npy")} for kind, path in found.items()}
    unpaired = sorted(set(files["features"]) ^ set(files["labels"]))
    if unpaired or not files["features"]:
        detail = f"{unpaired[0]}.npy is in one of *_features and *_labels only" if unpaired else "no files"
        raise InputError(f"--data-path {folder}: {detail}; {READ_AGAIN}")
    names = sorted(files["features"], key=lambda name: (len(name), name))
    try:
        labels = np.array([int(np.load(files["labels"][name]).reshape(-1)[0]) for name in names])
        looked_at = names[:: max(1, len(names) // 100)]  # opening all of a million files would take minutes
        shapes = {np.load(files["features"][name], mmap_mode="r").shape[1:] for name in looked_at}
    except (OSError, ValueError, IndexError) as error:
        raise InputError(f"--data-path {folder}: damaged latents ({error}); {READ_AGAIN}") from None
    if len(shapes) > 1 or len(next(iter(shapes))) != 3:
        raise InputError(f"--data-path {folder}: expected files of (2, C, h, w), found {shapes}; {READ_AGAIN}")

    def read(images, versions, out):
        pictures = (np.load(files["features"][names[i]], mmap_mode="r") for i in images)
        chosen = [pair[min(version, len(pair) - 1)] for pair, version in zip(pictures, versions, strict=True)]
        np.stack(chosen, out=out)

    return {"shape": list(shapes.pop())}, np.arange(len(names)), labels, read


def told_by_latents(folder, told=None):
    """Settings that encoded latents tell (image_size, num_classes, vae), joined to what the weights told.

    The latents know best how they were made; the weights, how many classes there are: data may hold only some of them.
    """
    told = dict(told or {})
    try:
        metadata = json.loads((Path(folder) / "metadata.json").read_text())
        told |= {name: metadata[name] for name in ("image_size", "vae")}
        told.setdefault("num_classes", metadata["num_classes"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # the original's layout tells nothing; a damaged file is reported when the latents are opened
    return told


def told_by_inputs(args):
    """Settings for `engine.cli.parse` that --data-path and --load-weight tell."""
    return told_by_latents(args.data_path, told_by_weights(args.load_weight, "--load-weight", args.vae))


def check_latents(dataset, args, size):
    """Raise InputError unless the latents are square of `size` and their labels are classes; returns their channels."""
    channels, *space = dataset.metadata["shape"]
    if space != [size, size]:
        raise InputError(
            f"--image-size {args.image_size}: needs latents of {size}x{size} with --vae {args.vae}, but "
            f"--data-path {args.data_path} has {space[0]}x{space[1]}"
        )
    highest, lowest = int(dataset.labels.max()), int(dataset.labels.min())
    if highest >= args.num_classes or lowest < 0:
        raise InputError(
            f"--num-classes {args.num_classes}: --data-path {args.data_path} has labels {lowest}..{highest}, "
            f"expected 0..{args.num_classes - 1}; give --num-classes {highest + 1} or other data"
        )
    return channels


def open_latents(args):
    """The latents of --data-path, checked against the flags, and the network arguments that they ask for."""
    size = latent_size(args, family_of(args.model).latents)
    dataset = LatentDataset(args.data_path)
    check_batch(len(dataset), args.global_batch_size, world_size(), args.grad_accumulation)
    channels = check_latents(dataset, args, size)
    config = {"input_size": size, "num_classes": args.num_classes}
    return dataset, config | {"in_channels": network_channels(channels, family_of(args.model).latents)}


def network_channels(stored, latents):
    """Channels that the network works on: half of the stored ones if these are moments."""
    return stored // 2 if latents.moments and stored == 2 * latents.channels else stored


def check_batch(n, batch, world, parts=1):
    """Raise InputError unless the global batch divides by the processes and their parts, and the data fill one."""
    if batch % world:
        raise InputError(f"--global-batch-size {batch}: not divisible by {world} processes; take a multiple")
    if batch // world % parts:
        raise InputError(f"--grad-accumulation {parts}: {batch // world} images a process do not divide by it")
    if n < batch:
        raise InputError(f"--global-batch-size {batch}: larger than the data ({n} images); take {n} or less")


class BatchOrder:
    """Which items this process reads at each step: a function of seed, step and rank, so any run can continue anywhere.

    Every epoch is a permutation, incomplete batches are dropped. The global batch does not depend on the process count.
    """

    def __init__(self, n, batch, seed, mirror, steps, rank=0, world=1):
        self.n, self.batch, self.seed, self.mirror, self.steps = n, batch, seed, mirror, steps
        self.part = slice(rank * (batch // world), (rank + 1) * (batch // world))

    def __len__(self):
        return len(self.steps)

    def __iter__(self):
        per_epoch, epoch = self.n // self.batch, None
        for step in self.steps:
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                order = np.random.default_rng([self.seed, 0, epoch]).permutation(self.n)
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


def latent_loader(dataset, args, run, steps):
    """Batches (x, y) of this process for the given range of steps, read while the step before them is computed.

    By --num-workers processes if every image is a file. Sending a batch between processes takes longer than copying it
    out of a memory map: there, one thread does it for any number of workers, and with none the caller itself.
    """
    order = BatchOrder(len(dataset), args.global_batch_size, args.global_seed, args.mirror, steps, run.rank, run.world)
    pin_memory = run.device.type == "cuda"
    if dataset.mapped:
        read = partial(dataset.__getitems__, pin_memory=pin_memory)
        return read_ahead(read, order) if args.num_workers else map(read, order)
    return DataLoader(
        dataset, batch_sampler=order, collate_fn=as_it_is, num_workers=args.num_workers, pin_memory=pin_memory
    )
