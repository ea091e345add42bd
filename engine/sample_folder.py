"""A folder of numbered pictures that were all made alike, and the .npz that the evaluator reads."""

import os
from pathlib import Path

from engine.errors import InputError, flag_errors
from engine.files import plain, read_json, remove_partial_files, write_errors, write_json
from engine.images import is_intact, pack_npz
from engine.lock import FolderLock
from engine.sampling import ImageDraws


class SampleFolder:
    """<parent>/<name> for pictures made with `settings` ({name: value}); size: theirs, in pixels."""

    def __init__(self, parent, name, settings, size):
        self.parent, self.path, self.size = parent, Path(parent) / name, size
        self.settings, self.lock = plain(settings), None

    def prepare(self):
        """Make the folder, take it, and record what its pictures depend on; in the main process.

        Raises InputError if it holds some that were made otherwise.
        """
        record = self.path / "sampling.json"
        old = plain(read_json("--sample-dir", record)) if os.path.lexists(record) else self.settings
        # What was not recorded by earlier versions is not compared.
        different = [name for name in self.settings if name in old and old[name] != self.settings[name]]
        if different:
            raise InputError(
                f"--sample-dir {self.parent}: {self.path} holds images with {different[0]} {old[different[0]]}, now "
                f"{self.settings[different[0]]}; delete that folder or take another --sample-dir"
            )
        with write_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = FolderLock(self.path, "--sample-dir")
            remove_partial_files(self.path)
            for partial in self.path.parent.glob(f".{self.path.name}.npz.*.part"):
                partial.unlink(missing_ok=True)
        write_json(record, self.settings)

    def close(self):
        """Give the folder free."""
        if self.lock:
            self.lock.release()

    def file(self, number):
        """Where picture `number` is or will be."""
        return self.path / f"{number:06d}.png"

    def find_missing(self, numbers):
        """Those of the numbers whose pictures are not there, or damaged."""
        return [number for number in numbers if not is_intact(self.file(number), self.size)]

    def pack(self, n, seed, num_classes):
        """Write pictures 0..n - 1 and their labels, in the order of their numbers; returns the path of the .npz."""
        # Labels are drawn before the noise, so its shape does not matter.
        labels = [ImageDraws(seed, [i], (1,), "cpu").labels(num_classes).item() for i in range(n)]
        with flag_errors("--sample-dir", self.parent):
            return pack_npz(f"{self.path}.npz", [self.file(i) for i in range(n)], labels)
