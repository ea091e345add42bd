"""Encoding pictures into latents: the store that all processes write to, and the encoder that fills it."""

import os

import numpy as np
import torch
from tqdm import tqdm

from engine.data import CORRUPT, DONE, MAKE_AGAIN, PENDING, STORE_ERRORS, LatentStore, read_header, write_array
from engine.distributed import barrier, on_main
from engine.errors import InputError, RunError, one_line
from engine.files import write_errors
from engine.images import from_uint8, picture_loader
from engine.lock import check_shared, take_folder
from engine.sampling import ImageDraws
from engine.vae import encode_pictures

SHARD = 1024  # images, about, after which what was encoded is brought to the disk and marked


class Extraction:
    """A folder of latents in the making, of an engine.images.PictureList: one owner, any number of processes.

    Every process writes rows of its own to features.npy, and files `status-<first image>.npy` of what it has done,
    which the main process joins to status.npy. Raises InputError if the folder holds something else.
    """

    def __init__(self, folder, run, pictures, space, codec):
        self.run, self.pictures, self.space, self.codec = run, pictures, space, codec
        metadata = {
            "images": len(pictures.labels),
            "shape": [codec.stored_channels, space.size, space.size],
            "num_classes": len(pictures.classes),
            "classes": pictures.classes,
            "image_size": space.image_size,
            "vae": space.vae,
            "scale": codec.scale,
            "seed": run.seed,
            "precision": run.precision,
        }
        self.folder, self.lock = folder, None
        on_main(lambda: self._prepare(metadata), patient=True)
        check_shared("--features-path", folder)
        self.store = self._open()

    def _prepare(self, metadata):
        """Take the folder, make or check the store, and join what earlier processes have left."""
        self.lock = take_folder(self.folder, "--features-path")
        try:
            self._make_or_check(metadata)
        except BaseException:
            self.close()
            raise

    def _make_or_check(self, metadata):
        if not os.path.lexists(os.path.join(self.folder, "metadata.json")):
            with write_errors(self.folder):
                LatentStore.create(self.folder, self.pictures.labels, metadata)
        store = self._open()
        found = {"precision": "fp32", **store.metadata}  # the only one there was before it was recorded
        different = [name for name, value in metadata.items() if found.get(name) != value]
        if different or store.labels.tolist() != self.pictures.labels:
            what = different[0] if different else "labels"
            raise InputError(
                f"--features-path {self.folder}: holds latents of other data ({what} differ); take another"
            )
        self._join_status(store)

    def _open(self):
        try:
            return LatentStore(self.folder)
        except STORE_ERRORS as error:
            raise InputError(f"--features-path {self.folder}: damaged ({one_line(error)}); {MAKE_AGAIN}") from None

    def _join_status(self, store):
        """Bring the marks of all processes into status.npy."""
        with write_errors(store.folder):
            parts = sorted(store.folder.glob("status-*.npy"))
            if not parts:
                return
            status = np.array(store.status)
            for part in parts:
                numbers, marks = read_marks(part, len(status))
                status[numbers] = marks
            write_array(store.folder / "status.npy", status)
            for part in parts:
                part.unlink()

    def encode(self, size, workers):
        """Encode what is missing, in batches of `size` pictures, each process a range; returns the numbers left out.

        Batches are the same for any number of processes, and so is the noise of each picture: so are the latents.
        """
        n = len(self.pictures.paths)
        batches = [range(i, min(i + size, n)) for i in range(0, n, size)]
        # The main process says what is missing: other hosts may not see its latest marks yet.
        missing = on_main(lambda: [k for k, batch in enumerate(batches) if (self.store.status[batch] != DONE).any()])
        rank, world = self.run.rank, self.run.world
        mine = [batches[k] for k in missing[len(missing) * rank // world : len(missing) * (rank + 1) // world]]
        images = picture_loader(self.pictures.paths, self.space.image_size, mine, workers, self.run.device)
        bar = tqdm(images, desc="encoding batches", disable=not self.run.is_main)
        writer = ShardWriter(self.store, max(1, SHARD // size))
        for batch, (good, pixels, errors) in zip(mine, bar, strict=True):
            for error in errors:
                tqdm.write(error)
            latents = self._encode_batch(good, pixels) if good else None
            writer.write(batch, good, latents)
        writer.close()
        barrier()
        on_main(lambda: self._join_status(self.store), patient=True)
        return on_main(self._list_corrupt)

    def _list_corrupt(self):
        """Numbers of the pictures that cannot be read. Raises RunError if one was not looked at."""
        status = self._open().status
        if (status == PENDING).any():
            raise RunError(f"--features-path {self.folder}: not all pictures were encoded; repeat the command")
        return np.flatnonzero(status == CORRUPT).tolist()

    def _encode_batch(self, numbers, pixels):
        draws = ImageDraws(self.run.seed, numbers, self.codec.noise_shape(self.space.image_size), self.run.device)
        pictures = from_uint8(torch.from_numpy(pixels).to(self.run.device))
        latents = encode_pictures(self.codec, self.run, pictures, draws).cpu().numpy()
        are_finite = np.isfinite(latents).all(axis=(1, 2, 3, 4))
        if not are_finite.all():
            bad = self.pictures.paths[numbers[int(are_finite.argmin())]]
            raise RunError(f"the latents of {bad} are not finite; see --vae, or take --precision fp32")
        return latents

    def close(self):
        """Give the folder free."""
        if self.lock:
            self.lock.release()


def read_marks(path, n):
    """Numbers of pictures, of n, and what became of each, both (k,), out of a status-*.npy file."""
    try:
        found = np.load(path, allow_pickle=False)
        if found.ndim != 2 or len(found) != 2 or found.dtype.kind != "i":
            raise ValueError(f"it holds {found.dtype} {found.shape}")
        if not ((found[0] >= 0) & (found[0] < n)).all() or not np.isin(found[1], (DONE, CORRUPT)).all():
            raise ValueError("numbers or marks are out of range")
    except STORE_ERRORS as error:
        raise InputError(
            f"--features-path {path}: damaged ({one_line(error)}); remove that file, and its pictures are encoded again"
        ) from None
    return found


class ShardWriter:
    """Writes rows of features.npy at their places, and marks them as done once they are on the disk.

    No page is shared by two processes but at the borders of their ranges: hosts cannot undo each other's writes.
    """

    def __init__(self, store, batches):
        self.store, self.batches = store, batches
        self.path = store.folder / "features.npy"
        shape, dtype, self.start = read_header(self.path)
        self.row = dtype.itemsize * int(np.prod(shape[1:]))
        with write_errors(self.path):
            self.file = os.open(self.path, os.O_WRONLY)
        self.numbers, self.marks, self.count = [], [], 0

    def write(self, batch, good, latents):
        """Latents (len(good), 2, C, h, w) of the `good` ones among the numbers of a batch; the others are corrupt."""
        with write_errors(self.path):
            for number, pair in zip(good, latents if good else (), strict=True):
                write_at(self.file, pair.tobytes(), self.start + number * self.row)
        self.numbers += batch
        self.marks += [DONE if number in good else CORRUPT for number in batch]
        self.count += 1
        if self.count == self.batches:
            self._finish_shard()

    def _finish_shard(self):
        if self.numbers:
            with write_errors(self.path):
                os.fsync(self.file)
            write_array(self.store.folder / f"status-{self.numbers[0]:08d}.npy", np.array([self.numbers, self.marks]))
        self.numbers, self.marks, self.count = [], [], 0

    def close(self):
        """Mark the rest."""
        self._finish_shard()
        os.close(self.file)


def write_at(file, data, start):
    """Write all bytes at a place of an open file."""
    view = memoryview(data)
    while view:
        written = os.pwrite(file, view, start)
        view, start = view[written:], start + written
