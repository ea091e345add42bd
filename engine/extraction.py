"""Encoding pictures into latents: the store that all processes write to, and the encoder that fills it."""

from tqdm import tqdm

from engine.data import CORRUPT, DONE, LatentStore
from engine.distributed import barrier
from engine.errors import InputError
from engine.images import from_uint8, picture_loader
from engine.sampling import ImageDraws
from engine.vae import encode_pictures


def open_store(folder, run, pictures, space, codec):
    """The store for latents of an engine.images.PictureList: made by the main process, opened by all.

    Raises InputError if the folder holds something else.
    """
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
    try:
        if run.is_main:
            LatentStore.create(folder, pictures.labels, metadata)
        barrier()
        store = LatentStore(folder, "r+")
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"--features-path {folder}: damaged ({error!r}); take another") from None
    found = {"precision": "fp32", **store.metadata}  # the only one there was before it was recorded
    different = [name for name, value in metadata.items() if found.get(name) != value]
    if different or store.labels.tolist() != pictures.labels:
        what = different[0] if different else "labels"
        raise InputError(f"--features-path {folder}: holds latents of other data ({what} differ); take another")
    return store


class Encoder:
    """Writes latents of pictures and their mirrors into a store; size: of the pictures, in pixels.

    Batches are the same for any number of processes, and so is the noise of each picture: so are the latents.
    """

    def __init__(self, run, codec, store, size):
        self.run, self.codec, self.store, self.size = run, codec, store, size

    def encode(self, paths, batches, workers):
        """Encode batches (lists of picture numbers), and mark the pictures that cannot be read."""
        pictures = picture_loader(paths, self.size, batches, workers, self.run.device)
        bar = tqdm(pictures, desc="encoding batches", disable=not self.run.is_main)
        for batch, (good, pixels, errors) in zip(batches, bar, strict=True):
            self.store.status[[i for i in batch if i not in good]] = CORRUPT
            for error in errors:
                tqdm.write(error)
            if good:
                self._write(good, pixels)
        self.store.features.flush()
        self.store.status.flush()

    def _write(self, numbers, pixels):
        draws = ImageDraws(self.run.seed, numbers, self.codec.noise_shape(self.size), self.run.device)
        latents = encode_pictures(self.codec, self.run, from_uint8(pixels.to(self.run.device)), draws)
        self.store.features[numbers] = latents.cpu().numpy()
        self.store.status[numbers] = DONE
