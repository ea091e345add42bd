"""The folder of a training run: config.json, log.txt, metrics.jsonl and the states it can continue from."""

import json
import logging
import os
import re
import secrets
import sys
from pathlib import Path

from engine.checkpoint import check_state, read_state, save_state
from engine.errors import InputError, RunError, check_folder
from engine.files import plain, read_json, remove_partial_files, write_atomically, write_errors, write_json
from engine.lock import take_folder
from engine.settings import TYPED
from engine.trackers import Trackers
from engine.weight_files import read_file
from families import FAMILIES, short_name

# Settings that may change when the same command resumes a run: they do not change its numbers.
FREE = {"device", "num_workers", "log_every", "ckpt_every", "resume", "save_model", "compile", "grad_checkpointing"}
FREE |= {"dry_run", "shard", "dense", "keep_checkpoints", "keep_every", "init", "finalists", "log_to", "profile"}
FREE |= {"eval_every", "sample_every", "cfg_scale", "num_sampling_steps"}  # and those of families for what is written
for family in FAMILIES.values():  # some of a SiT's flags say what is trained, too
    trained, written = ({flag.dest for flag in family.own_flags(kinds)} for kinds in (["train"], ["sample", "prune"]))
    FREE |= written - trained


class RunFolder:
    """A folder for a run with these settings; all but `log` is for the main process.

    about: {"settings": {name: value}, "origins": ..., "inputs": {what: digest}, ...}, which becomes config.json. facts:
    to record with every state, about the weights in it. resume: a state to continue from instead of the newest.
    keep_checkpoints: delete states but the newest so many, and those whose step is a multiple of `keep_every`. log_to:
    names of engine.trackers, which get all numbers too.
    """

    def __init__(self, path, about, facts, resume=None, keep_checkpoints=None, keep_every=None, log_to=()):
        self.path, self.facts, self.resume_from = Path(path), facts, str(resume) if resume else None
        self.keep_checkpoints, self.keep_every = keep_checkpoints, keep_every
        self.about = plain({**about, "continues": self.resume_from, "branch": None})
        self.settings = comparable(self.about["settings"])
        self.logger = self.lock = self.trackers = None
        self.log_to = log_to
        self.own = []  # states of this branch of the run, which are here
        self.continued, self.state = None, None  # path and contents of the state to continue from

    def prepare(self):
        """Choose the state to continue from, and return remarks on what was passed over; nothing is written.

        `--resume` begins a branch: its states carry its name, and those that others have left here are not its own. A
        branch that was begun is continued by the same command, with --resume or without. Raises InputError if the
        folder holds states of a run with other settings or inputs, or none of its states can be used.
        """
        check_folder("--results-dir", self.path / "checkpoints")
        for path in (self.path / name for name in ("config.json", "log.txt", "metrics.jsonl")):
            if os.path.lexists(path) and not path.is_file():
                raise InputError(f"--results-dir {path}: is not a regular file; remove it, or take another --prefix")
        recorded, states = read_record(self.path / "config.json"), self._states()
        difference = find_difference(self.path, recorded, self.about) if recorded else None
        base = recorded.get("continues")
        if self.resume_from and (difference or base != self.resume_from):
            self.about["branch"] = secrets.token_hex(4)
            self.continued, self.state = self.resume_from, read_state(self.resume_from)
            return []
        if difference:
            if states:
                raise InputError(difference)
            return []  # a start that failed does not keep a folder
        self.about |= {"continues": base, "branch": recorded.get("branch")}
        return self._choose_state(states, base)

    def _choose_state(self, states, base):
        """Take the newest intact one of this branch's states, else the one it continues; returns remarks."""
        remarks = []
        for path in states:
            try:
                state = read_file(path, "--resume")
                if not self._is_own(state):
                    remarks.append(f"passed over: {path} is of another branch of this run")
                    continue
                if self.continued is None:
                    self.continued, self.state = path, check_state(state, path)
                self.own.append(path)
            except InputError as error:
                remarks.append(f"passed over: {error}")
        if self.continued is None and base:
            self.continued, self.state = base, read_state(base)
        elif self.continued is None and remarks:
            raise InputError(
                f"--resume: no state in {self.path} can be continued ({'; '.join(remarks[:2])}); name another one, or "
                "delete these to begin again"
            )
        return remarks

    def _is_own(self, state):
        """Whether what was read from a state is of this branch; states of earlier versions have only settings."""
        if not isinstance(state, dict):
            return True  # and is refused when it is looked at
        known = plain(state.get("args"))
        known = comparable(known) if isinstance(known, dict) else {}
        is_same = all(self.settings.get(name) == value for name, value in known.items())
        return state.get("branch") == self.about["branch"] and (is_same or self.about["branch"] is not None)

    def _states(self):
        """States in this folder, the newest first."""
        found = [f for f in self.path.glob("checkpoints/*.pt") if re.fullmatch(r"\d{7,}", f.stem)]
        return sorted(found, key=lambda f: -int(f.stem))

    def open(self):
        """Make the folder, take it and start the log."""
        self.lock = take_folder(self.path, "--results-dir")
        try:
            with write_errors(self.path):
                (self.path / "checkpoints").mkdir(exist_ok=True)
                remove_partial_files(self.path / "checkpoints")
                self.logger = open_log(self.path / "log.txt")
            step = self.state["train_steps"] if self.state else 0
            self.trackers = Trackers(self.log_to, self.path, self.about["settings"], step)
        except RunError:
            self.close()
            raise

    def close(self):
        """Give the folder free."""
        try:
            if self.trackers:
                self.trackers.close()
        finally:
            if self.lock:
                self.lock.release()

    def write_config(self):
        """Write config.json, when the run is sure to go on: a failed start must not change what the folder is of."""
        write_json(self.path / "config.json", self.about, make_folder=False)

    def log(self, text):
        """Write a line to the screen and to log.txt, from the main process."""
        if self.logger:
            self.logger.info(text)

    def state_path(self, step):
        """The file of the state after so many steps."""
        return self.path / "checkpoints" / f"{step:07d}.pt"

    def save_state(self, state):
        """Write a training state to its file; its `ema` can be sampled from."""
        path = self.state_path(state["train_steps"])
        save_state(path, {**state, "args": self.settings, "branch": self.about["branch"]}, **self.facts)
        self.log(f"saved {path}")
        self.own = [path, *(other for other in self.own if other != path)]
        if self.keep_checkpoints:
            self._delete_old_states()

    def _delete_old_states(self):
        """Delete states of this branch but the newest, and those of every so many steps."""
        for path in self.own[self.keep_checkpoints :]:
            if not self.keep_every or int(path.stem) % self.keep_every:
                self.own.remove(path)
                path.unlink(missing_ok=True)
                Path(f"{path}.json").unlink(missing_ok=True)

    def write_metrics(self, row):
        """Add a row to metrics.jsonl."""
        path = self.path / "metrics.jsonl"
        with write_errors(path), open(path, "a") as file:
            file.write(json.dumps(plain(row)) + "\n")
        if self.trackers:
            self.trackers.log(row)

    def show(self, step, path):
        """Say that a picture was drawn, and add it to the trackers."""
        self.log(f"wrote {path}")
        if self.trackers:
            self.trackers.show(step, path)

    def drop_metrics_after(self, step):
        """Forget the rows of steps that this run makes again, and what is no row."""
        path = self.path / "metrics.jsonl"
        if path.exists():
            lines = path.read_text(errors="replace").splitlines()
            kept = [line for line in lines if is_row_until(line, step)]
            if kept != lines:
                text = "".join(row + "\n" for row in kept)
                write_atomically(path, lambda temporary: temporary.write_text(text), make_folder=False)


def read_record(path):
    """What config.json says of a run; nothing if it is not there."""
    if not path.exists():
        return {}
    recorded = read_json("--results-dir", path)
    if "settings" not in recorded:
        recorded = {"settings": recorded}  # in folders of earlier versions, which held the script too
    if not isinstance(recorded["settings"], dict):
        raise InputError(f"--results-dir {path}: settings is no JSON object; mend it, or take another --prefix")
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
    return Path(parent) / "-".join(filter(None, [prefix, short_name(model)]))


def read_precision(about):
    """What a run computes in, by its record; None if it does not say."""
    environment = about.get("environment")
    return environment.get("precision") if isinstance(environment, dict) else None


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
    before, now = (read_precision(each) for each in (recorded, about))
    if before and before != now:
        return (
            f"--precision: the run in {path} was computed in {before}, now it would be in {now}; give --precision "
            f"{before}, or see whether the GPU is there"
        )
    known = recorded.get("inputs") if isinstance(recorded.get("inputs"), dict) else {}
    for name, digest in about["inputs"].items():
        if known.get(name, digest) != digest:
            return (
                f"--{name.replace('_', '-')} {about['settings'].get(name)}: has changed since the run in {path} began; "
                "bring back what it was, or take another --prefix"
            )
    return None
