"""Where a run's numbers and pictures also go: TensorBoard and Weights & Biases, imported only if they are asked for."""

import secrets
from importlib.util import find_spec

from engine.errors import InputError, RunError, one_line


class TensorBoard:
    """Event files in the run folder's `tensorboard`."""

    package = "tensorboard"

    def __init__(self, folder, title, settings, step):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(folder / "tensorboard", purge_step=step + 1 if step else None)

    def log(self, step, numbers, texts):
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)
        for name, text in texts.items():
            self.writer.add_text(name, text, step)
        self.writer.flush()

    def show(self, step, path):
        import numpy as np
        from PIL import Image

        self.writer.add_image("samples", np.asarray(Image.open(path).convert("RGB")), step, dataformats="HWC")
        self.writer.flush()

    def close(self):
        self.writer.close()


class WandB:
    """A run of Weights & Biases; WANDB_PROJECT, WANDB_MODE and the like are its own. A resumed run goes on there."""

    package = "wandb"

    def __init__(self, folder, title, settings, step):
        import wandb

        name = folder / "wandb_id"
        if step and name.exists():
            identity = name.read_text()
        else:
            identity = secrets.token_hex(4)
            name.write_text(identity)
        self.library = wandb
        self.run = wandb.init(id=identity, name=title, dir=folder, config=settings, resume="allow")

    def log(self, step, numbers, texts):
        self.run.log({**numbers, **texts}, step=step)

    def show(self, step, path):
        self.run.log({"samples": self.library.Image(str(path))}, step=step)

    def close(self):
        self.run.finish()


TRACKERS = {"tensorboard": TensorBoard, "wandb": WandB}


def check_trackers(names):
    """Raise InputError for one whose package is not installed."""
    for name in names:
        package = TRACKERS[name].package
        if not find_spec(package):
            raise InputError(f"--log-to {name}: needs the package {package}; pip install {package}, or leave it out")


class Trackers:
    """All that a run logs to besides its folder, in the main process.

    step: that the run goes on from. Raises RunError if one cannot be opened.
    """

    def __init__(self, names, folder, settings, step):
        self.opened = []
        for name in names:
            try:
                self.opened.append(TRACKERS[name](folder, folder.name, settings, step))
            except Exception as error:  # it may be any: of accounts, networks and disks
                self.close()
                raise RunError(f"--log-to {name}: cannot be opened ({one_line(error):.300})") from None

    def log(self, row):
        """Add a row of metrics: numbers, lists of real numbers as one series each, the rest as text."""
        numbers, texts = split_row(row)
        self._tell(lambda tracker: tracker.log(row["step"], numbers, texts))

    def show(self, step, path):
        """Add a picture."""
        self._tell(lambda tracker: tracker.show(step, path))

    def close(self):
        self._tell(lambda tracker: tracker.close())

    def _tell(self, do):
        """do(tracker) for each; one that fails is left out from there on, as the run itself is in its folder."""
        for tracker in list(self.opened):
            try:
                do(tracker)
            except Exception as error:  # it may be any: of networks, accounts and disks
                self.opened.remove(tracker)
                print(f"note: --log-to {tracker.package} fails, and gets no more ({one_line(error):.300})", flush=True)


def split_row(row):
    """({name: number}, {name: text}) of a row of metrics."""
    numbers, texts = {}, {}
    for name, value in row.items():
        if isinstance(value, list) and any(isinstance(each, float) for each in value):
            numbers |= {f"{name}/{i:02d}": each for i, each in enumerate(value)}
        elif isinstance(value, int | float):
            numbers[name] = value
        else:
            texts[name] = str(value)
    numbers.pop("step", None)
    return numbers, texts
