"""A folder of numbered pictures that were all made alike, and the .npz that the evaluator reads."""

import json
import os
from pathlib import Path

from engine.errors import InputError
from engine.files import plain, write_json
from engine.images import pack_npz
from engine.sampling import ImageDraws


class SampleFolder:
    """<parent>/<name> for pictures made with `settings` ({name: value}), from the weights in the file `ckpt`.

    Raises InputError if it holds some that were made otherwise; made by `prepare` in the main process.
    """

    def __init__(self, parent, name, settings, ckpt):
        self.path, info = Path(parent) / name, os.stat(ckpt)
        record = self.path / "sampling.json"
        self.settings = plain({**settings, "ckpt": str(ckpt), "ckpt_size": info.st_size, "ckpt_changed": info.st_mtime})
        old = plain(json.loads(record.read_text())) if record.exists() else self.settings
        different = [name for name in self.settings if old.get(name) != self.settings[name]]
        if different:
            raise InputError(
                f"--sample-dir {parent}: {self.path} holds images with {different[0]} {old.get(different[0])}, now "
                f"{self.settings[different[0]]}; delete that folder or take another --sample-dir"
            )

    def prepare(self):
        """Make the folder, and the record of what its pictures depend on."""
        write_json(self.path / "sampling.json", self.settings)

    def file(self, number):
        """Where picture `number` is or will be."""
        return self.path / f"{number:06d}.png"

    def pack(self, n, seed, num_classes):
        """Write pictures 0..n - 1 and their labels, in the order of their numbers; returns the path of the .npz."""
        # Labels are drawn before the noise, so its shape does not matter.
        labels = [ImageDraws(seed, [i], (1,), "cpu").labels(num_classes).item() for i in range(n)]
        return pack_npz(f"{self.path}.npz", [self.file(i) for i in range(n)], "--sample-dir", labels)
