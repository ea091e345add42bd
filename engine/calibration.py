"""A few batches of latents to measure a network on: from encoded latents, or from pictures encoded on the fly."""

from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from engine.data import network_channels, open_latents
from engine.errors import InputError, flag_errors
from engine.file_settings import read_latents
from engine.images import PictureList, list_images, load_image
from engine.vae import LatentSpace


@dataclass(frozen=True)
class Calibration:
    """nsamples // batch_size batches of randomly chosen and mirrored images; the fields but `space` are settings."""

    data_path: str
    space: LatentSpace
    nsamples: int
    batch_size: int
    seed: int
    mirror: float

    @property
    def count(self):
        """Number of batches."""
        return self.nsamples // self.batch_size

    @cached_property
    def data(self):
        """The engine.images.PictureList or the LatentDataset in the folder. Raises InputError if there is neither."""
        if not read_latents(self.data_path):
            with suppress(InputError):
                return list_images(self.data_path)
        return open_latents(self.data_path, self.space)

    def digest(self):
        """A short digest of the data, encoded or not."""
        return self.data.digest()

    def batches(self, device, in_channels):
        """The batches (x, y) on `device`, for a network with so many input channels.

        Raises InputError, before the first batch, for unfit data.
        """
        rng = np.random.default_rng(self.seed)
        n = self.count * self.batch_size
        open_data = self._open_pictures if isinstance(self.data, PictureList) else self._open_latents
        total, read = open_data(device, in_channels)
        if total < n:
            raise InputError(f"--nsamples {self.nsamples}: --data-path {self.data_path} has {total} images; take fewer")
        order = rng.permutation(total)[:n].reshape(-1, self.batch_size)
        mirrored = rng.random(order.shape) < self.mirror
        return ([tensor.to(device) for tensor in read(*row)] for row in zip(order, mirrored, strict=True))

    def _open_latents(self, device, in_channels):
        """(number of images, (images, mirrored) -> latents and labels)."""
        dataset = self.data
        channels = network_channels(dataset, self.space)
        if channels != in_channels:
            raise InputError(
                f"--data-path {self.data_path}: latents have {channels} channels, the network takes {in_channels}"
            )
        return len(dataset), lambda images, mirrored: dataset.__getitems__(2 * images + mirrored)

    def _open_pictures(self, device, in_channels):
        """The same, encoding pictures."""
        space, size = self.space, self.space.image_size
        self.data.check_classes(self.data_path, space.num_classes)
        paths, labels, _ = self.data
        codec = space.load_codec(device)

        def read(images, mirrored):
            with flag_errors("--data-path", self.data_path):
                pictures = [load_image(paths[i], size) for i in images]
            pictures = [p.flip(-1) if flip else p for p, flip in zip(pictures, mirrored, strict=True)]
            noise = torch.randn(len(images), *codec.noise_shape(size), device=device)
            return codec.encode(torch.stack(pictures).to(device), noise), torch.tensor([labels[i] for i in images])

        return len(paths), read
