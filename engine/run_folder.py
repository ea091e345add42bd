"""The folder of a training run: config.json, log.txt, metrics.jsonl and the states it can continue from."""

import json
import logging
import re
import sys
from pathlib import Path

from engine import distributed
from engine.checkpoint import save_state
from engine.errors import InputError, check_folder
from engine.files import plain, write_atomically, write_json
from engine.settings import TYPED

# Settings that may change when the same command resumes a run: they do not change its numbers.
FREE = {"device", "num_workers", "log_every", "ckpt_every", "resume", "save_model", "compile", "grad_checkpointing"}
FREE |= {"dry_run"}


class RunFolder:
    """A folder for a run with these settings; `open` makes or reopens it, and the log in it.

    about: {"settings": {name: value}, ...}, which becomes config.json. facts: to record with every state, about the
    weights in it. resume: a state to continue from instead of the newest. Raises InputError if the folder holds a run
    with other settings, unless `resume` is given.
    """

    def __init__(self, path, about, facts, resume=None):
        self.path, self.facts, self.resume_from, self.logger = Path(path), facts, resume, None
        self.about = plain(about)
        self.settings = {name: value for name, value in self.about["settings"].items() if name not in FREE}
        check_folder("--results-dir", self.path / "checkpoints")
        if not resume:
            check_same_settings(self.path / "config.json", self.settings, self.about["origins"])

    def open(self):
        """Make the folder and start the log, from the main process."""
        distributed.barrier()
        if distributed.is_main():
            (self.path / "checkpoints").mkdir(parents=True, exist_ok=True)
            self.logger = open_log(self.path / "log.txt")
        distributed.barrier()

    def write_config(self):
        """Write config.json, from the main process; when the run is sure to go on, or it would refuse the right one."""
        if distributed.is_main():
            write_json(self.path / "config.json", self.about)

    def log(self, text):
        """Write a line to the screen and to log.txt, from the main process."""
        if self.logger:
            self.logger.info(text)

    def newest_state(self):
        """Path of the training state to continue from: the one that was asked for, else the newest here, else None."""
        if self.resume_from:
            return Path(self.resume_from)
        found = [f for f in self.path.glob("checkpoints/*.pt") if re.fullmatch(r"\d{7,}", f.stem)]
        return max(found, key=lambda f: int(f.stem), default=None)

    def save_state(self, state):
        """Write a training state to checkpoints/<step, 7 digits>.pt; its `ema` can be sampled from."""
        path = self.path / "checkpoints" / f"{state['train_steps']:07d}.pt"
        save_state(path, {**state, "args": self.settings}, **self.facts)
        self.log(f"saved {path}")

    def write_metrics(self, row):
        """Add a row to metrics.jsonl, from the main process."""
        if distributed.is_main():
            with open(self.path / "metrics.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")

    def drop_metrics_after(self, step):
        """Forget the rows of steps that a resumed run makes again."""
        path = self.path / "metrics.jsonl"
        if distributed.is_main() and path.exists():
            rows = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= step]
            write_atomically(path, lambda temporary: temporary.write_text("".join(row + "\n" for row in rows)))


def open_log(path):
    """A logger to the screen and to a file."""
    logger = logging.getLogger(str(path.parent))
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.handlers.clear()
    for handler in (logging.StreamHandler(sys.stdout), logging.FileHandler(path)):
        handler.setFormatter(logging.Formatter("[%(asctime)s] %(message)s", "%Y-%m-%d %H:%M:%S"))
        logger.addHandler(handler)
    return logger


def run_path(parent, prefix, model):
    """Path of a run folder: <parent>/<prefix>-<model>."""
    return Path(parent) / "-".join(filter(None, [prefix, model.replace("/", "-")]))


def check_same_settings(path, settings, origins):
    """Raise InputError if config.json at `path` records a run with other settings."""
    if not path.exists():
        return
    recorded = json.loads(path.read_text())
    old = plain(recorded.get("settings", recorded))  # flat in folders of earlier versions, which held the script too
    old.pop("script", None)
    different = [name for name in sorted(old) if name not in FREE and old[name] != settings.get(name)]
    # Settings that came later than the record are as they were, unless they were typed.
    different += [name for name in settings if name not in old and origins.get(name) == TYPED]
    if different:
        name = different[0]
        raise InputError(
            f"--results-dir and --prefix: {path.parent} holds a run with --{name.replace('_', '-')} "
            f"{old.get(name, 'not set')}, now it is {settings.get(name)}; take another --prefix, or repeat the old "
            "command to resume"
        )
