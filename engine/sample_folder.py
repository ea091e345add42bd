"""A folder of numbered pictures that were all made alike, and the .npz that the evaluator reads."""

import os
from pathlib import Path

from engine.errors import InputError, RunError, flag_errors
from engine.files import plain, read_json, write_errors, write_json
from engine.images import is_intact, pack_npz
from engine.lock import take_folder
from engine.sampling import ImageDraws


class SampleFolder:
    """<parent>/<name> for pictures made with `settings` ({name: value}); size: theirs, in pixels.

    earlier: what records of earlier versions hold of the weights, instead of the digest in `settings`.
    usual: values of settings that are not recorded, and that a record without them stands for.
    """

    def __init__(self, parent, name, settings, size, earlier=None, usual=None):
        self.parent, self.path, self.size = parent, Path(parent) / name, size
        self.usual, self.earlier, self.lock = plain(usual or {}), plain(earlier or {}), None
        self.settings = plain(settings)

    def prepare(self):
        """Make the folder, take it, and record what its pictures depend on; in the main process.

        Raises InputError if it holds some that were made otherwise.
        """
        record = self.path / "sampling.json"
        if os.path.lexists(record):
            self._compare(plain(read_json("--sample-dir", record)))
        elif any(self.path.glob("*.png")):
            raise InputError(
                f"--sample-dir {self.parent}: {self.path} holds images, but no sampling.json that says how they were "
                "made; delete that folder or take another --sample-dir"
            )
        self.lock = take_folder(self.path, "--sample-dir")
        try:
            with write_errors(self.path):
                for partial in self.path.parent.glob(f".{self.path.name}.npz.*.part"):
                    partial.unlink(missing_ok=True)
            write_json(record, self._to_record(), make_folder=False)
        except RunError:
            self.close()
            raise

    def _to_record(self):
        """The settings without those that have their usual value."""
        return {k: value for k, value in self.settings.items() if k not in self.usual or self.usual[k] != value}

    def _compare(self, old):
        """Raise InputError if the record of the pictures says something else; what it leaves out is not compared."""
        new, old = self.settings if "weights" in old else {**self.settings, **self.earlier}, {**self.usual, **old}
        different = [name for name in new if name in old and old[name] != new[name]]
        if different:
            raise InputError(
                f"--sample-dir {self.parent}: {self.path} holds images with {different[0]} {old[different[0]]}, now "
                f"{new[different[0]]}; delete that folder or take another --sample-dir"
            )

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
