"""What a run folder tells: its settings, the numbers it measured, what its gates decided, its pictures and weights.

Everything but config.json may be missing or damaged; what could not be read is said in `remarks`.
"""

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from engine.files import load_json
from reporting.values import as_dict, as_number, is_drawable

GATES = ("kept", "confidence", "keep_probability")  # lists in a row of metrics.jsonl
MOST_LAYERS = 10_000  # a number from a file must not ask for more
TAIL = 1 << 16  # bytes at the end of a log that are read
TIME = re.compile(r"\[(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)\]")


@dataclass(frozen=True)
class Decision:
    """Of the gates at a step: layers kept, the probability of every layer to be kept, the confidence of every gate."""

    step: float
    kept: list | None
    probabilities: list | None
    confidence: list | None


@dataclass(eq=False)
class Run:
    """A run folder.

    curves: {name: [(step, value)]} in the order of the steps. samples: [(step, path)]. facts: {file of weights: what is
    recorded about it}, the pruned ones first. metrics: {file: numbers}. layers: of the network that was trained, if its
    name tells. log: the last lines; times: of the first and the last line.
    """

    path: Path
    name: str
    settings: dict
    origins: dict = field(default_factory=dict)
    environment: dict = field(default_factory=dict)
    sizes: dict = field(default_factory=dict)
    curves: dict = field(default_factory=dict)
    decisions: list = field(default_factory=list)
    samples: list = field(default_factory=list)
    facts: dict = field(default_factory=dict)
    metrics: dict = field(default_factory=dict)
    layers: int | None = None
    log: list = field(default_factory=list)
    times: tuple = ()
    remarks: list = field(default_factory=list)

    @property
    def steps(self):
        """The last step that a number was measured at, or None."""
        ends = [points[-1][0] for points in self.curves.values()] + [each.step for each in self.decisions[-1:]]
        return max(ends, default=None)

    @property
    def depth(self):
        """Layers that the gates choose from, by what they have decided and the name of the network."""
        widths = [len(each.probabilities or []) for each in self.decisions]
        widths += [1 + max(each.kept, default=-1) for each in self.decisions if each.kept]
        return max([*widths, self.layers or 0], default=0)


def read_run(path, count_layers=lambda model: None):
    """The Run of a folder; raises ValueError if it is not that of a run.

    count_layers: name of a model -> its layers, or None.
    """
    path = Path(path)
    config = read_config(path)
    told = {part: as_dict(config.get(part)) for part in ("settings", "origins", "environment", "sizes")}
    run = Run(path, path.absolute().name, **told)
    model = run.settings.get("model")
    run.layers = count_layers(model) if isinstance(model, str) else None
    read_metrics(run)
    run.samples = find_samples(path)
    read_facts(run)
    read_results(run)
    read_log(run)
    return run


def name_apart(runs):
    """Call runs by their paths where their folders are called alike."""
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = str(run.path)


def read_config(path):
    """What config.json records. Raises ValueError if the folder is not that of a run."""
    if not (path / "config.json").is_file():
        what = "has no config.json" if path.is_dir() else "is no folder" if path.exists() else "is not there"
        raise ValueError(f"{path}: {what}; name a folder that a training or pruning run has written")
    config = load_json(path / "config.json")
    if "settings" not in config and (path / "log.txt").is_file():
        return {"settings": config}  # as earlier versions wrote it
    if not isinstance(config.get("settings"), dict):
        raise ValueError(f"{path}: its config.json holds no settings of a run; name another folder")
    return config


def read_metrics(run):
    """Fill in curves and decisions from metrics.jsonl, but lines that are no rows, as a killed run leaves."""
    path, damaged = run.path / "metrics.jsonl", 0
    if not path.is_file():
        return
    with open(path, errors="replace") as lines:
        for line in lines:
            row = read_row(line)
            if row is None:
                damaged += bool(line.strip())
            else:
                add_row(run, row)
    for points in run.curves.values():
        points.sort(key=lambda point: point[0])
    run.decisions.sort(key=lambda decision: decision.step)
    if damaged:
        run.remarks.append(f"metrics.jsonl: {damaged} damaged line(s) passed over")


def read_row(line):
    """The JSON object in a line, if it has a step; else None."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = as_number(as_dict(row).get("step"))
    return row if step is not None and is_drawable(step) else None


def add_row(run, row):
    """Take in a row: every number is a point of the curve of its name."""
    step = as_number(row["step"])
    for name, value in row.items():
        number = as_number(value)
        if name not in ("step", *GATES) and number is not None:
            run.curves.setdefault(name, []).append((step, number))
    kept, confidence, probabilities = (row.get(name) for name in GATES)
    told = as_layers(kept), as_shares(probabilities), as_shares(confidence)
    if any(part is not None for part in told):
        run.decisions.append(Decision(step, *told))


def as_layers(value):
    """A list of layers, or None for anything else."""
    is_list = isinstance(value, list) and all(type(layer) is int and 0 <= layer < MOST_LAYERS for layer in value)
    return value if is_list else None


def as_shares(value):
    """A list of numbers from 0 to 1, or None for anything else; what is not finite counts as 0."""
    if not isinstance(value, list) or len(value) > MOST_LAYERS:
        return None
    numbers = [as_number(each) for each in value]
    if not numbers or None in numbers:
        return None
    return [min(max(number, 0.0), 1.0) if is_drawable(number) else 0.0 for number in numbers]


def find_samples(path):
    """[(step, file)] of the pictures that were sampled along the way."""
    found = [file for file in (path / "samples").glob("*.png") if re.fullmatch(r"[0-9]{1,18}", file.stem)]
    return sorted((int(file.stem), file) for file in found if file.is_file())


def read_facts(run):
    """Fill in what is recorded about pruned weights and about the newest state."""
    pruned, states = (
        sorted(run.path.glob(pattern), key=lambda file: (len(file.name), file.name))
        for pattern in ("pruned*.pt.json", "checkpoints/*.pt.json")
    )
    files = [*pruned, *states[-1:]]
    saved = run.settings.get("save_model")
    if isinstance(saved, str) and saved:
        files.insert(0, Path(f"{saved}.json"))
    for file in dict.fromkeys(files):
        told = try_json(run, file)
        if told is not None:
            run.facts[file.name.removesuffix(".json")] = told


def read_results(run):
    """Fill in the numbers that evaluator.py wrote into the folder."""
    for file in sorted(run.path.glob("*.json")):
        told = try_json(run, file) if file.name != "config.json" else None
        if told and "fid" in told:
            run.metrics[file.name] = told


def try_json(run, path):
    """The JSON object in a file; None if it is not there or, with a remark, not to be read."""
    try:
        return load_json(path) if os.path.isfile(path) else None
    except ValueError as error:
        run.remarks.append(str(error))
        return None


def read_log(run):
    """Fill in the last lines of log.txt, and when it was begun and ended."""
    path = run.path / "log.txt"
    if not path.is_file():
        return
    with open(path, "rb") as file:
        first = file.readline(TAIL)
        file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
        end = file.read()
    run.log = end.decode(errors="replace").splitlines()[-20:]
    stamps = TIME.findall(first.decode(errors="replace")) + TIME.findall("\n".join(run.log))
    run.times = (stamps[0], stamps[-1]) if stamps else ()
