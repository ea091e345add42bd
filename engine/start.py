"""How a run starts: what it says of its settings and sizes, what config.json records, and where a dry run stops."""

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from engine.data import TrainingData, open_latents
from engine.distributed import agree, on_main
from engine.errors import InputError, nearest_folder
from engine.optim import share_of_start
from engine.run import Run
from engine.run_folder import RunFolder, run_path
from engine.trackers import check_trackers
from engine.vae import LatentSpace
from engine.watch import Watch

ROOT = Path(__file__).resolve().parent.parent
DRY_RUN = "dry run: all checks passed, nothing was written"
PACKAGES = ("torch", "numpy", "timm", "diffusers")


def print_start(settings, run, **digests):
    """Print the settings that are not plain defaults, each with its origin; with --dry-run, that all is checked.

    digests: of inputs besides weights, and what else has to be the same, by name. Raises RunError on all processes if
    they were started differently.
    """
    weights = {name: each.digest for name, each in settings.weights.items()}
    agree({**describe_for_others(settings, run), **weights, **digests})
    for line in describe_settings(settings):
        run.print(line)
    if settings.values.get("dry_run"):
        run.print(DRY_RUN)


def describe_settings(settings):
    """A line per setting that is not a plain default, and notes on flags without effect."""
    lines = [f"{name} {value} ({origin})" for name, value, origin in settings.notable()]
    return lines + [f"note: {flag} has no effect" for flag in settings.unused]


# Settings that may differ between hosts: what matters of the files that they name is compared by itself.
OF_THE_HOST = {
    "device",
    "num_workers",
    "data_path",
    "load_weight",
    "load_teacher",
    "ckpt",
    "vae",
    "inception",
    "resume",
}


def describe_for_others(settings, run):
    """{what: value} of what has to be the same in all processes."""
    own = {name: value for name, value in settings.values.items() if name not in OF_THE_HOST}
    versions = {name: find_version(name) for name in PACKAGES}
    code = {"script": os.path.basename(sys.argv[0]), "code": digest_code()}
    return {**code, **own, "device": run.device.type, "precision": run.precision, **versions}


def digest_code():
    """A short digest of the project's Python files."""
    digest = hashlib.sha256()
    for part in ("", "engine", "families", "pruning", "diffusion", "evaluation"):
        for path in sorted((ROOT / part).glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def check_room(path, size):
    """Raise InputError unless the disk of a folder to be has room for `size` bytes."""
    free = shutil.disk_usage(nearest_folder(path)).free
    if free < size:
        raise InputError(
            f"--results-dir {path}: a training state takes {size / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free; make "
            "room or take another folder"
        )


def describe_environment(run):
    """What a run depends on besides its settings, for config.json."""
    return {
        "command": shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]]),
        "device": str(run.device),
        "precision": run.precision,
        "processes": run.world,
        "commit": read_commit(),
        "versions": {"python": platform.python_version()} | {name: find_version(name) for name in PACKAGES},
    }


def read_commit():
    """The commit of the project's folder, or None where there is no git."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        return None
    done = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def find_version(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def describe_sizes(data, networks, state_bytes, ckpt_every):
    """Sizes of a training run, for config.json: data, networks, steps, and the disk that its states take."""
    return {
        "images": len(data.images),
        "steps": data.total_steps,
        "steps_per_epoch": data.steps_per_epoch,
        "parameters": {word: start.count_parameters() for word, start in networks.items()},
        "state_bytes": state_bytes,
        "states": -(-data.total_steps // ckpt_every),
    }


def describe_size_lines(sizes, batch):
    """The same for people."""
    networks = ", ".join(f"{name} {count:,} parameters" for name, count in sizes["parameters"].items())
    gigabytes = sizes["state_bytes"] / 1e9
    return [
        f"data: {sizes['images']:,} images; {sizes['steps']:,} steps of {batch}, {sizes['steps_per_epoch']:,} an epoch",
        f"networks: {networks}",
        f"checkpoints: {sizes['states']} of {gigabytes:.3g} GB, {sizes['states'] * gigabytes:.3g} GB in all",
    ]


def make_run(settings, command):
    """The engine.run.Run of a training script."""
    how = {"default_precision": command.precision, "sharded": settings.shard}
    return Run(settings.device, settings.precision, settings.global_seed, **how)


def open_data(settings):
    """What the network of a training run works on, a LatentSpace, and its checked TrainingData."""
    space = settings.make(LatentSpace, latents=settings.family.latents)
    return space, settings.make(TrainingData, dataset=open_latents(settings.data_path, space))


def make_watch(settings, run, data, space):
    """What looks at the network while it is trained; raises InputError for flags that do not fit together."""
    objective = settings.make_objective().to(run.device)
    return settings.make(Watch, run=run, data=data, space=space, objective=objective, own=settings.own("sample"))


def start_training(settings, run, data, networks, sketch, facts):
    """Open the RunFolder of a training run and say in its log how it starts.

    networks: {word: engine.networks.NetworkStart}. sketch: the engine.networks.StateSketch of its states. facts: to
    record with every state. With --dry-run all of it is printed, nothing is written, and None is returned. Raises
    InputError for a folder that holds another run, or a state of another network.
    """
    sizes = describe_sizes(data, networks, sketch.count_bytes(), settings.ckpt_every)
    about = {
        "settings": settings.values,
        "origins": settings.origins,
        "environment": describe_environment(run),
        "sizes": sizes,
    }
    inputs = {"data_path": data.dataset.digest(), **{name: each.digest for name, each in settings.weights.items()}}
    about["inputs"] = inputs
    agree({**describe_for_others(settings, run), **inputs})
    path = run_path(settings.results_dir, settings.prefix, settings.model)
    keep = (settings.keep_checkpoints, settings.keep_every)
    folder = RunFolder(path, about, facts, settings.resume, *keep, log_to=settings.log_to)

    def prepare():
        check_trackers(settings.log_to)
        remarks = folder.prepare()
        if folder.state:
            sketch.check(folder.state, folder.continued)
        done = folder.state["train_steps"] if folder.state else 0
        if done > data.total_steps:
            raise InputError(
                f"--resume {folder.continued}: is of step {done}, but --epochs ends at {data.total_steps}; take "
                "another file"
            )
        if done < data.total_steps:
            check_room(path, sketch.count_bytes())
        return remarks

    remarks = on_main(prepare, patient=True)
    compiled = ", compiled (the first steps take long)" if run.compiles(settings.compile) else ""
    lines = [
        f"command: {about['environment']['command']}",
        f"{run.world} process(es), {run.device.type}, {run.precision}{compiled}, folder {path}",
        *describe_settings(settings),
        *describe_size_lines(sizes, settings.global_batch_size),
        *remarks,
    ]
    if settings.dry_run:
        run.print("\n".join([*lines, DRY_RUN]))
        return None
    on_main(folder.open)
    for line in lines:
        folder.log(line)
    return folder


def note_early_average(run, weights):
    """Say if these are averaged weights that still are, for more than a hundredth, those that training started from."""
    steps, settings = (weights.file.checkpoint.get(name) for name in ("train_steps", "args"))
    if not weights.file.averaged or not isinstance(steps, int) or not isinstance(settings, dict):
        return
    decay = settings.get("ema_decay", 0.9999)
    if not isinstance(decay, float) or not 0 <= decay <= 1:
        return
    share = share_of_start(steps, decay, settings.get("ema_warmup", False))
    if share >= 0.01:
        run.print(
            f"note: after {steps:,} steps these averaged weights are {share:.0%} the weights that training started "
            "from; --no-ema takes the plain ones, and --ema-warmup in training lets the average follow sooner"
        )
