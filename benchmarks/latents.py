"""Latents per second from the page cache: one process and a memory map, against one file per image and two workers.

Batches of 256 latents (4, 32, 32) through the loader that training uses. Every call of ours opens the folder anew: each
page of a large data set is touched once per epoch, so a map that has been read before would flatter us.
"""

import tempfile
from functools import cache, partial
from pathlib import Path

import numpy as np

from benchmarks.measure import Case, Side, main
from engine.data import DONE, LatentDataset, LatentStore, TrainingData

SHAPE, IMAGES, BATCH = (4, 32, 32), 32_768, 256


def make_loader(folder, workers, steps, batch):
    """Batches of the first steps of a training run on the latents in a folder, which is opened here."""
    data = TrainingData(LatentDataset(folder), epochs=1, global_batch_size=batch, num_workers=workers)
    return data.batches(range(steps))


def random_pairs(n):
    """Latents of n pictures and their mirrors, the same for both layouts."""
    rng = np.random.default_rng(0)
    return (rng.standard_normal((2, *SHAPE), dtype=np.float32) for _ in range(n))


def write_store(folder, n):
    store = LatentStore.create(folder, [i % 1000 for i in range(n)], {"shape": SHAPE})
    for i, pair in enumerate(random_pairs(n)):
        store.features[i] = pair
    store.status[:] = DONE


def write_files(folder, n):
    kinds = [Path(folder) / f"imagenet256_{kind}" for kind in ("features", "labels")]
    for kind in kinds:
        kind.mkdir()
    for i, pair in enumerate(random_pairs(n)):
        for kind, array in zip(kinds, (pair, np.array([i % 1000])), strict=True):
            np.save(kind / f"{i}.npy", array)


@cache
def make_folder(write, n):
    """A folder of n images that is removed when the process ends."""
    folder = tempfile.TemporaryDirectory()
    write(folder.name, n)
    return folder


def build(setup, write, workers, reopen):
    """One epoch of a folder."""
    n, batch = (64, 8) if setup.tiny else (IMAGES, BATCH)
    folder = make_folder(write, n).name
    loader = None if reopen else make_loader(folder, workers, n // batch, batch)

    def run():
        for x, _ in loader or make_loader(folder, workers, n // batch, batch):
            last = x
        return last

    return Side(run, items=n)


def compare(batches):
    return {"same": len({batch.numpy().tobytes() for batch in batches.values()}) == 1}


SIDES = {
    "a file each, 2 workers": partial(build, write=write_files, workers=2, reopen=False),
    "map, no workers": partial(build, write=write_store, workers=0, reopen=True),
    "map, reading thread": partial(build, write=write_store, workers=2, reopen=True),
}
BARS = [("rate", "map, no workers", ">=", 60_000), ("speedup", "map, no workers", ">=", 10)]
CASES = [Case("latents", SIDES, BARS, compare, memory=False)]  # pages of the files would count

if __name__ == "__main__":
    main(__spec__.name, __doc__, CASES)
