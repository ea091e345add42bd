"""The folder of a training run: config.json, log.txt, metrics.jsonl and the states it can continue from."""

import json
import logging
import os
import re
import sys
from pathlib import Path

from engine.checkpoint import read_state, save_state
from engine.errors import InputError, check_folder
from engine.files import plain, read_json, remove_partial_files, write_atomically, write_errors, write_json
from engine.lock import FolderLock
from engine.settings import TYPED

# Settings that may change when the same command resumes a run: they do not change its numbers.
FREE = {"device", "num_workers", "log_every", "ckpt_every", "resume", "save_model", "compile", "grad_checkpointing"}
FREE |= {"dry_run", "keep_checkpoints", "keep_every"}


class RunFolder:
    """A folder for a run with these settings; all but `log` is for the main process.

    about: {"settings": {name: value}, "origins": ..., "inputs": {what: digest}, ...}, which becomes config.json. facts:
    to record with every state, about the weights in it. resume: a state to continue from instead of the newest.
    keep_checkpoints: delete states but the newest so many, and those whose step is a multiple of `keep_every`.
    """

    def __init__(self, path, about, facts, resume=None, keep_checkpoints=None, keep_every=None):
        self.path, self.facts, self.resume_from = Path(path), facts, str(resume) if resume else None
        self.keep_checkpoints, self.keep_every = keep_checkpoints, keep_every
        self.about = plain({**about, "continues": self.resume_from})
        self.settings = comparable(self.about["settings"])
        self.logger = self.lock = None
        self.continued, self.state = None, None  # path and contents of the state to continue from

    def prepare(self):
        """Choose the state to continue from, and return remarks on it; nothing is written.

        Raises InputError if the folder holds states of a run with other settings or inputs, unless a state was named to
        continue from; its continuation, once begun, is a run like any other.
        """
        check_folder("--results-dir", self.path / "checkpoints")
        for path in (self.path / name for name in ("config.json", "log.txt", "metrics.jsonl")):
            if os.path.lexists(path) and not path.is_file():
                raise InputError(f"--results-dir {path}: is not a regular file; remove it, or take another --prefix")
        recorded = read_record(self.path / "config.json") if self._states() else {}
        difference = find_difference(self.path, recorded, self.about) if recorded else None
        goes_on = recorded and recorded.get("continues") == self.resume_from and not difference
        if self.resume_from and not goes_on:
            self.continued, self.state = self.resume_from, read_state(self.resume_from)
            return []
        if difference:
            raise InputError(difference)
        self.about["continues"] = recorded.get("continues")
        return self._choose_state()

    def _states(self):
        """States of this folder, the newest first."""
        found = [f for f in self.path.glob("checkpoints/*.pt") if re.fullmatch(r"\d{7,}", f.stem)]
        return sorted(found, key=lambda f: -int(f.stem))

    def _choose_state(self):
        """Take the newest intact state of this run, else the one it continues; returns remarks on what was passed over.

        States that another branch of the run left here, before `--resume`, are not of this run.
        """
        remarks = []
        for path in self._states():
            try:
                state = read_state(path)
            except InputError as error:
                remarks.append(f"passed over: {error}")
                continue
            known = plain(state.get("args"))
            known = comparable(known) if isinstance(known, dict) else {}
            if all(self.settings.get(name) == value for name, value in known.items()):
                self.continued, self.state = path, state
                return remarks
            remarks.append(f"passed over: {path} is of a run with other settings")
        base = self.about["continues"]
        if base:
            self.continued, self.state = base, read_state(base)
        elif remarks:
            raise InputError(
                f"--resume: no state in {self.path} can be continued ({'; '.join(remarks[:2])}); name another one, or "
                "delete these to begin again"
            )
        return remarks

    def open(self):
        """Make the folder, take it and start the log."""
        with write_errors(self.path):
            (self.path / "checkpoints").mkdir(parents=True, exist_ok=True)
            self.lock = FolderLock(self.path, "--results-dir")
            for folder in (self.path, self.path / "checkpoints"):
                remove_partial_files(folder)
            self.logger = open_log(self.path / "log.txt")

    def close(self):
        """Give the folder free."""
        if self.lock:
            self.lock.release()

    def write_config(self):
        """Write config.json, when the run is sure to go on: a failed start must not change what the folder is of."""
        write_json(self.path / "config.json", self.about)

    def log(self, text):
        """Write a line to the screen and to log.txt, from the main process."""
        if self.logger:
            self.logger.info(text)

    def save_state(self, state):
        """Write a training state to checkpoints/<step, 7 digits>.pt; its `ema` can be sampled from."""
        path = self.path / "checkpoints" / f"{state['train_steps']:07d}.pt"
        save_state(path, {**state, "args": self.settings}, **self.facts)
        self.log(f"saved {path}")
        if self.keep_checkpoints:
            for old in self._states()[self.keep_checkpoints :]:
                if not self.keep_every or int(old.stem) % self.keep_every:
                    old.unlink()
                    Path(f"{old}.json").unlink(missing_ok=True)

    def write_metrics(self, row):
        """Add a row to metrics.jsonl."""
        path = self.path / "metrics.jsonl"
        with write_errors(path), open(path, "a") as file:
            file.write(json.dumps(row) + "\n")

    def drop_metrics_after(self, step):
        """Forget the rows of steps that this run makes again, and what is no row."""
        path = self.path / "metrics.jsonl"
        if path.exists():
            lines = path.read_text(errors="replace").splitlines()
            kept = [line for line in lines if is_row_until(line, step)]
            if kept != lines:
                write_atomically(path, lambda temporary: temporary.write_text("".join(row + "\n" for row in kept)))


def read_record(path):
    """What config.json says of a run; nothing if it is not there."""
    if not path.exists():
        return {}
    recorded = read_json("--results-dir", path)
    # Flat in folders of earlier versions, which held the script too.
    recorded = recorded if isinstance(recorded.get("settings"), dict) else {"settings": recorded}
    return plain(recorded)


def comparable(settings):
    """Settings without those that may change."""
    return {name: value for name, value in settings.items() if name not in FREE | {"script"}}


def is_row_until(line, step):
    """Whether a line of metrics.jsonl is whole, and of a step up to this one."""
    try:
        return json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


class LogFile(logging.FileHandler):
    """A log on a disk, whose faults end the run as those of other files do."""

    def handleError(self, record):
        with write_errors(self.baseFilename):
            raise


def open_log(path):
    """A logger to the screen and to a file."""
    logger = logging.getLogger(str(path.parent))
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.handlers.clear()
    for handler in (logging.StreamHandler(sys.stdout), LogFile(path)):
        handler.setFormatter(logging.Formatter("[%(asctime)s] %(message)s", "%Y-%m-%d %H:%M:%S"))
        logger.addHandler(handler)
    return logger


def run_path(parent, prefix, model):
    """Path of a run folder: <parent>/<prefix>-<model>."""
    return Path(parent) / "-".join(filter(None, [prefix, model.replace("/", "-")]))


def find_difference(path, recorded, about):
    """How the run that is recorded in the folder `path` differs from `about` in settings or inputs, or None."""
    old, new, origins = comparable(recorded["settings"]), comparable(about["settings"]), about["origins"]
    different = [name for name in sorted(old) if old[name] != new.get(name)]
    # Settings that came later than the record are as they were, unless they were typed.
    different += [name for name in new if name not in old and origins.get(name) == TYPED]
    if different:
        name = different[0]
        return (
            f"--results-dir and --prefix: {path} holds a run with --{name.replace('_', '-')} "
            f"{old.get(name, 'not set')}, now it is {new.get(name)}; take another --prefix, or repeat the old command "
            "to resume"
        )
    known = recorded.get("inputs") if isinstance(recorded.get("inputs"), dict) else {}
    for name, digest in about["inputs"].items():
        if known.get(name, digest) != digest:
            return (
                f"--{name.replace('_', '-')} {about['settings'].get(name)}: has changed since the run in {path} began; "
                "bring back what it was, or take another --prefix"
            )
    return None
