"""Pictures: folders of them, cropping, tensors in [-1, 1] to files and back, and packing into .npz."""

import hashlib
import os
import re
import zipfile
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from engine.errors import InputError, one_line
from engine.files import PICTURE_SUFFIXES, is_picture, write_atomically
from engine.threads import map_ahead


class PictureList(NamedTuple):
    """Pictures of a folder: their paths and class numbers, and the names of the classes."""

    paths: list
    labels: list
    classes: list

    def check_classes(self, folder, num_classes):
        """Raise InputError if --data-path, the folder of these, has more subfolders than `num_classes`."""
        if len(self.classes) > num_classes:
            raise InputError(f"--num-classes {num_classes}: --data-path {folder} has {len(self.classes)} classes")

    def digest(self):
        """A short digest of the pictures' names and labels and of the sizes of 256 files; not of the folder's name."""
        if not self.paths:
            return ""
        root = os.path.commonpath([path.parent for path in self.paths])
        names = [f"{os.path.relpath(path, root)} {label}" for path, label in zip(self.paths, self.labels, strict=True)]
        looked_at = self.paths[:: max(1, len(self.paths) // 256)]
        sizes = [str(path.stat().st_size) if path.is_file() else "" for path in looked_at]
        return hashlib.sha256("\n".join(names + sizes).encode(errors="surrogateescape")).hexdigest()[:16]


def list_images(folder):
    """The PictureList of --data-path, a folder with one subfolder per class, all in sorted order.

    Raises InputError for a folder without pictures.
    """
    folder = Path(folder)
    # Hidden folders, such as .cache, are no classes: one would shift the labels of all others.
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    classes = [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    paths, labels = [], []
    for label, name in enumerate(classes):
        found = sorted(f for f in (folder / name).rglob("*") if is_picture(f) and not is_hidden(f, folder))
        paths += found
        labels += [label] * len(found)
    if not paths:
        expected = f"one subfolder per class with files such as {', '.join(PICTURE_SUFFIXES)}"
        raise InputError(f"--data-path {folder}: no images; expected {expected}")
    return PictureList(paths, labels, classes)


def is_hidden(path, folder):
    """Whether a path leads through hidden folders below `folder`."""
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def center_crop(image, size):
    """Shrink a PIL image (box filter by halves, then bicubic) and cut out its centre: size x size pixels."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


@contextmanager
def open_picture(path):
    """The PIL image in a file. Raises ValueError, naming the file, if that or what is done with it fails."""
    try:
        if not os.path.isfile(path):
            raise ValueError("not a regular file")
        with Image.open(path) as image:
            yield image
    except Exception as error:  # it may be any: Pillow's readers compute with what they find
        raise ValueError(f"corrupt image {path}: {one_line(error)}; repair or remove it") from None


def load_pixels(path, size):
    """One picture as a uint8 tensor (size, size, 3). Raises ValueError for a file that cannot be read."""
    with open_picture(path) as image:
        pixels = np.asarray(center_crop(image.convert("RGB"), size))
    return torch.from_numpy(pixels.copy())


def from_uint8(pixels):
    """Pixels (..., H, W, 3) uint8 -> tensor (..., 3, H, W) in [-1, 1]."""
    return pixels.movedim(-1, -3).float() / 127.5 - 1


def load_image(path, size):
    """One picture as a tensor (3, size, size) in [-1, 1]. Raises ValueError for a file that cannot be read."""
    return from_uint8(load_pixels(path, size))


def keep_batch(batch):
    """A collate_fn for data sets whose `__getitems__` makes whole batches; DataLoader sends functions by name."""
    return batch


class Pictures(Dataset):
    """Pictures by number, a batch at a time: those that can be read, their pixels, and what is wrong with the others.

    Pixels are an array (n, size, size, 3) of uint8, or None if n is 0: a quarter of the bytes to send between
    processes, and no tensor, which would be sent through /dev/shm. That is small in many containers.
    """

    def __init__(self, paths, size):
        self.paths, self.size = paths, size

    def __getitems__(self, numbers):
        good, pixels, errors = [], [], []
        for i in numbers:
            try:
                pixels.append(load_pixels(self.paths[i], self.size))
                good.append(i)
            except ValueError as error:
                errors.append(str(error))
        return good, torch.stack(pixels).numpy() if good else None, errors


def picture_loader(paths, size, batches, workers, device):
    """Batches of Pictures in the order of `batches` (lists of numbers), read ahead by that many processes."""
    return DataLoader(
        Pictures(paths, size),
        batch_sampler=batches,
        collate_fn=keep_batch,
        num_workers=min(workers, len(batches), os.cpu_count() or 1),
        pin_memory=device.type == "cuda",
    )


def to_uint8(images):
    """Tensor (N, 3, H, W) in [-1, 1] -> array (N, H, W, 3) uint8, clamped and truncated as in the published sampler."""
    pixels = (127.5 * images.float() + 128.0).clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


def save_image(path, pixels, of_many=False):
    """Write one (H, W, 3) uint8 array as PNG; nobody sees half a file.

    of_many: one of the pictures in a sample folder. These are not brought to the disk one by one: a power cut may leave
    some without their bytes, which are then found and made again.
    """
    alone = not of_many
    write_atomically(
        path, lambda file: Image.fromarray(pixels).save(file, format="PNG"), durable=alone, make_folder=alone
    )


def is_intact(path, size):
    """Whether a file is a whole PNG of size x size pixels: its checksums are right; pixels are not decoded."""
    try:
        with open_picture(path) as image:
            fits = image.size == (size, size) and image.format == "PNG"
            image.verify()
    except ValueError:
        return False
    return fits


def save_grid(path, images, columns=4, gap=2):
    """Write tensors (N, 3, H, W) in [-1, 1] as one picture, `columns` per row."""
    columns = min(len(images), columns)
    cells = np.pad(to_uint8(images), ((0, -len(images) % columns), (gap, 0), (gap, 0), (0, 0)))
    _, height, width, _ = cells.shape
    sheet = cells.reshape(-1, columns, height, width, 3).swapaxes(1, 2).reshape(-1, columns * width, 3)
    save_image(path, np.pad(sheet, ((0, gap), (0, gap), (0, 0))))


def numbered_images(folder):
    """The pictures of a folder in the order of the numbers in their names."""
    found = [file for file in Path(folder).iterdir() if is_picture(file)]
    return sorted(found, key=lambda file: ([int(part) for part in re.findall(r"\d+", file.stem)], file.name))


def pack_npz(path, files, labels=None):
    """Write pictures as `arr_0` (N, H, W, 3) uint8, in the given order, few of them in memory; labels as `arr_1`.

    All cores decode.
    Raises ValueError if there is none, one cannot be read or their sizes differ.
    """
    if not files:
        raise ValueError("no images to pack")
    with open_picture(files[0]) as first:
        width, height = first.size
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(files), height, width, 3)}

    def read(file):
        with open_picture(file) as image:
            size, pixels = image.size, image.convert("RGB").tobytes()
        if size != (width, height):
            raise ValueError(f"{file} is {size[0]}x{size[1]}, not {width}x{height} like {files[0]}")
        return pixels

    def write(temporary):
        with zipfile.ZipFile(temporary, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                for pixels in map_ahead(read, files, os.cpu_count() or 1):
                    member.write(pixels)
            if labels is not None:
                with archive.open("arr_1.npy", "w") as member:
                    np.lib.format.write_array(member, np.asarray(labels))

    write_atomically(path, write)
    return os.fspath(path)
