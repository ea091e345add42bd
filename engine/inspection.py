"""What a file of weights holds, by its shapes and the facts with it, and which command goes on from there."""

import math
import os
import shlex
from contextlib import suppress
from pathlib import Path

from safetensors import safe_open

from engine.checkpoint import Weights, expected_shapes
from engine.diffusers_folder import find_transformer, list_files
from engine.errors import InputError
from engine.file_settings import read_told
from engine.files import load_json, plain
from engine.flags import TABLE
from engine.profile import count_macs
from engine.vae import read_autoencoder, shrink_factor
from engine.weight_files import GATES, open_weights
from families import FAMILIES, RELEASES, SHAPE_ARGUMENTS, describe_shapes, family_of, model_config
from pruning.patterns import format_pattern

NAMES = (  # of what is told of a file
    *("kind", "family", "model", "layers", "width", "parameters", "gmacs", "kept", "pattern", "source", "vae"),
    *(
        "num_classes",
        "latents",
        "image_size",
        "averaged",
        "step",
        "script",
        "gates",
        "dtype",
        "bytes",
        "url",
        "continue",
    ),
)
LEARNING, TRAINING, FOREIGN = "state of gate learning", "training state", "training checkpoint of another program"
PRUNED, WHOLE = "pruned weights", "weights"
SCRIPTS = {  # setting that a training script alone has -> the script
    "gate_lr": "prune_by_learning.py",
    "load_teacher": "train_masked_kd.py",
    "weight_decay": "train.py",
}


def open_network(name, average):
    """The Weights called `name`; the plain ones where the averages are no network's, such as those of gates alone."""
    weights = Weights(name, "FILE", average)
    if weights.opened and weights.opened.averaged and not list_fits(weights.opened.shapes):
        with suppress(InputError):
            plain = Weights(name, "FILE", average=False)
            return plain if list_fits(plain.opened.shapes) else weights
    return weights


def list_fits(shapes, model=None):
    """What shapes tell (families.describe_shapes), for every family that has such a network; or for that of `model`.

    Each with the `family`, the `config` to make the network with, and its own `shapes`, of which all have to be there.
    """
    found = []
    for name in [model] if model else FAMILIES:
        family = family_of(name)
        with suppress(ValueError):
            told = describe_shapes(shapes, name)
            config = {key: told[key] for key in SHAPE_ARGUMENTS if key in told}
            own = {key: shape for key, shape in shapes.items() if not key.startswith(GATES)}
            if told["model"]:  # else no name describes it
                own = expected_shapes(told["model"], config)
            if own.items() <= shapes.items():
                found.append({**told, "family": family.name, "config": config, "shapes": own})
    return found


def describe(name, average):
    """{"file": name, of NAMES: value or None} of weights. Raises InputError if they cannot be read."""
    weights = open_network(name, average)
    told, shapes = read_told(weights), list_shapes(weights)
    family = told.get("model") or name_family(weights)
    fits = list_fits(shapes, family)
    if not fits:
        model = weights.describe(family)["model"]
        raise InputError(f"FILE {name}: does not fit a {model}: its keys or shapes are others; take another file")
    first = fits[0]
    is_named = first["model"] and not family_of(first["model"]).find_model
    macs = count_macs(first["model"], first["config"]) if is_named else None
    found = {
        "family": " or ".join(fit["family"] for fit in fits),
        "model": " or ".join(fit["model"] for fit in fits) if first["model"] else None,
        "layers": list(first["depths"]),
        "width": first.get("hidden_size"),
        "parameters": sum(map(math.prod, first["shapes"].values())),
        "gmacs": macs and macs / 1e9,
        "kept": told.get("kept"),
        "pattern": find_pattern(weights, told, first),
        "source": weights.facts.get("source"),
        **describe_latents(first, told),
        **describe_state(weights, shapes),
        **describe_file(weights),
    }
    found["kind"] = found["kind"] or (PRUNED if found["kept"] else WHOLE)
    found["continue"] = shlex.join(CONTINUE[found["kind"]](weights, found))
    return plain({"file": weights.name} | {name: found.get(name) for name in NAMES})


def list_shapes(weights):
    """{key: shape} of the weights; of a published file, which is not opened, those of its model."""
    if weights.opened:
        return weights.opened.shapes
    told, latents = weights.facts, family_of(weights.facts["model"]).latents
    size = told["image_size"] // shrink_factor(told["vae"], latents)
    config = {"num_classes": told["num_classes"], "input_size": size, "in_channels": latents.channels}
    return expected_shapes(told["model"], config)


def name_family(weights):
    """A model, or else the family, that a training state or a folder of diffusers names; None if there is none."""
    if not weights.opened or not os.path.isdir(weights.path):
        return read_settings(weights).get("model")
    if weights.opened.model:
        return weights.name
    kind = load_json(find_transformer(weights.path) / "config.json")["_class_name"]
    exchanges = {family.name: family.exchange for family in FAMILIES.values() if family.exchange}
    return next(name for name, exchange in exchanges.items() if kind in exchange.classes)


def describe_latents(fit, told):
    """Classes, autoencoder, and the sizes of latents (C, h, w) and pictures, by that autoencoder.

    Where none is recorded, pictures are those of the family's usual one, which all scripts take, if it fits.
    """
    if "input_size" not in fit:  # of pictures of any size
        return {"num_classes": told.get("num_classes"), "vae": told.get("vae")}
    latents, size, channels = family_of(fit["family"]).latents, fit["input_size"], fit["in_channels"]
    vae, pixels = told.get("vae"), None
    with suppress(InputError):  # of a local autoencoder that is not here
        if vae or read_autoencoder(latents.usual, latents)[1] == channels:
            pixels = size * shrink_factor(vae or latents.usual, latents)
    return {"num_classes": fit["num_classes"], "vae": vae, "latents": [channels, size, size], "image_size": pixels}


def read_settings(weights):
    """The settings in a training state of ours, as JSON holds them, or {}."""
    settings = plain(weights.opened.checkpoint.get("args")) if weights.opened else None
    with suppress(ValueError):
        if isinstance(settings, dict) and model_config(str(settings.get("model"))):
            return settings
    return {}


def describe_state(weights, shapes):
    """What the training state around the weights tells, and whether there are gates among them."""
    around = weights.opened.checkpoint if weights.opened else {}
    steps, settings = around.get("train_steps"), read_settings(weights)
    script = next((script for name, script in SCRIPTS.items() if name in settings), None)
    gates = any(key.startswith(GATES) for key in shapes)
    is_ours = type(steps) is int and script and isinstance(around.get("opt"), dict)
    kind = (LEARNING if gates else TRAINING) if is_ours else FOREIGN if around else None
    return {
        "kind": kind,
        "averaged": (weights.opened and weights.opened.averaged) or (False if around else None),
        "step": steps if type(steps) is int else None,
        "script": script,
        "gates": gates,
    }


def find_pattern(weights, told, fit):
    """The N:M groups that weights were pruned by, or that their gates choose from; None if they are not known."""
    if weights.release:
        return family_of(fit["family"]).patterns.get(fit["model"])
    settings = read_settings(weights)
    groups = model_config(settings["model"]).get("groups") if settings else None
    return told.get("pattern") or settings.get("pattern") or (groups and format_pattern(groups))


def describe_file(weights):
    """Types of the numbers, and bytes on the disk; of a published file where it is."""
    if not weights.opened:
        return {"url": weights.release.url}
    is_folder = os.path.isdir(weights.path)
    files = list_files(find_transformer(weights.path), "FILE") if is_folder else [Path(weights.path)]
    kinds = {kind for file in files for kind in read_types(file, None if is_folder else weights.opened)}
    return {"dtype": ", ".join(sorted(kinds)), "bytes": sum(os.path.getsize(file) for file in files)}


def read_types(path, opened):
    """Types of the numbers in a file, as torch calls them; opened: it, if it is open already."""
    if not str(path).endswith(".safetensors"):
        state = (opened or open_weights(path, "FILE")).read()  # mapped into memory
        return {str(value.dtype).removeprefix("torch.") for value in state.values()}
    with safe_open(path, "pt") as file:
        kinds = {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
    return {kind.replace("BF", "bfloat").replace("F", "float") for kind in kinds}


def resume(weights, found):
    """Words of the command that goes on from a training state: that of its run, else one with all its settings."""
    world, recorded = weights.opened.checkpoint.get("world"), read_command(weights, found["script"])
    start = ["torchrun", f"--nproc_per_node={world}"] if isinstance(world, int) and world > 1 else ["python"]
    if recorded and is_newest(weights.path):
        return [*start, *recorded]
    words = recorded or [found["script"], *type_settings(read_settings(weights))]
    return [*start, *words, "--resume", weights.name]


def read_command(weights, script):
    """Words of the command in config.json of the run that a state is of, or None if that is not there."""
    branch, settings = plain(weights.opened.checkpoint.get("branch")), read_settings(weights)
    with suppress(ValueError, KeyError, TypeError, AttributeError, IndexError):  # whatever lies there
        about = load_json(Path(weights.path).parent.parent / "config.json")
        words = shlex.split(about["environment"]["command"])
        if words[0] == script and about.get("branch") == branch and settings.items() <= about["settings"].items():
            return words
    return None


def is_newest(path):
    """Whether no state of a later step lies beside the one at `path`."""
    return Path(path).stem >= max((file.stem for file in Path(path).parent.glob("*.pt")), default="")


def type_settings(settings):
    """Words of a command line that give settings, {name: value}, whatever the defaults are."""
    words = []
    for name, value in settings.items():
        word = name.replace("_", "-")
        is_switched_off = value is False and name in TABLE and TABLE[name].opposite
        if value is True or is_switched_off:
            words += [f"--no-{word}" if is_switched_off else f"--{word}"]
        elif value is not None and value is not False and value != []:
            words += [f"--{word}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return words


def learn(weights, found):
    """Words of the command that learns which layers of a network to keep."""
    pattern = "1:2" if all(depth % 2 == 0 for depth in found["layers"]) else "N:M"
    words = ["python", "prune_by_learning.py", "--model", choose_model(found), "--pattern", pattern]
    return [*words, "--load-weight", weights.name, *keep_average(weights), "--data-path", "FOLDER", "--delta-w"]


def recover(weights, found):
    """Words of the command that recovers a pruned network, from the one that it was cut out of."""
    teacher, source = [], str(found["source"] or "TEACHER")
    if os.path.exists(source) or source in RELEASES:  # else its model is not known here
        with suppress(InputError):
            fits = list_fits(list_shapes(open_network(source, average=True)), found["family"].split()[0])
            teacher = ["--teacher", fits[0]["model"]] if fits and fits[0]["model"] else []
    words = ["python", "train_masked_kd.py", "--model", choose_model(found), "--load-weight", weights.name]
    return [*words, *keep_average(weights), "--load-teacher", source, *teacher, "--data-path", "FOLDER"]


def choose_model(found):
    """The model for a command, the first that it may be."""
    return (found["model"] or "MODEL").partition(" or ")[0]


def keep_average(weights):
    """Words that take the same of the averaged and the plain weights."""
    return [] if weights.average else ["--no-ema"]


CONTINUE = {LEARNING: resume, TRAINING: resume, PRUNED: recover, WHOLE: learn, FOREIGN: learn}
