"""What files and families tell about settings: encoded latents, weights, and the family of the model they name."""

import os
from pathlib import Path

from engine.checkpoint import Weights
from engine.errors import InputError, flag_errors
from engine.files import read_json
from engine.settings import DEFAULT
from engine.vae import check_vae, shrink_factor
from families import family_of, model_config
from families.flags import MAX_CLASSES, MAX_PIXELS

HIGHEST = {"num_classes": MAX_CLASSES, "image_size": MAX_PIXELS}


def add_models(layers, command, typed):
    """Add what files and families tell; returns the opened Weights, {setting that names the file: Weights}."""
    defaults = command.defaults()
    weights = open_files(command, {**defaults, **typed}, typed)
    own = {name: each.name for name, each in weights.items() if not each.release}
    layers.add(own, "of the model's folder")
    model = typed.get("model") or next((each.facts.get("model") for each in weights.values()), None)
    told_by_prompts, told_by_folder = tell_settings(model or defaults["model"], typed)
    layers.add(told_by_prompts, "the number of prompts")
    if command.latents:
        folder = typed.get("data_path", defaults["data_path"])
        told = read_latents(folder)
        layers.add({name: told.get(name) for name in ("image_size", "vae")}, f"from {folder}/metadata.json")
    for position, (name, model) in enumerate(command.weights):
        if name in weights:
            add_weights(layers, weights[name], model, typed, is_first=position == 0)
    if command.latents:
        layers.add({"num_classes": told.get("num_classes")}, f"from {folder}/metadata.json")

    model = layers.values.get("model", defaults["model"])
    family = family_of(model)
    layers.add(told_by_folder, f"of {model}")
    if command.scratch and not weights:
        layers.add(family.scratch, f"{family.name} trained from scratch")
    usual = {name: value for name, value in family.defaults_for(command.name).items() if name in defaults}
    layers.add({name: value for name, value in usual.items() if value != defaults[name]}, f"default of {family.name}")
    own = {flag.dest: flag.default for flag in family.own_flags(command.kinds)}
    layers.add(own, DEFAULT)
    for flag in command.family_flags():
        if flag.dest in typed and flag.dest not in own:
            shown = typed[flag.dest] if flag.positional else flag.option
            owners = " and ".join(command.owners(flag))
            raise InputError(f"{shown}: is for {owners}, but --model {model} is a {family.name}")
    return weights


def tell_settings(model, typed):
    """What the folder of a model tells, see families.of_diffusers.tell_settings."""
    with flag_errors("--model", model):
        return family_of(str(model)).tell_settings(str(model), typed)


def open_files(command, values, typed):
    """The Weights that the command line names, or that its models have without, by their folders or as published."""
    average, opened = not values.get("no_ema"), {}
    for name, option in command.weights:
        path, flag = values.get(name), "--" + name.replace("_", "-")
        if not path and option in typed:
            with flag_errors(f"--{option}", typed[option]):
                path = family_of(typed[option]).own_weights(typed[option])
        if not path and name == "ckpt":
            path = default_release(values["model"], values["image_size"])
        if path:
            opened[name] = Weights(path, flag, average or name == "load_teacher")
    return opened


def default_release(model, image_size):
    """Name of the file that is published for a model. Raises InputError if there is none."""
    releases = family_of(model).default_releases
    if model not in releases:
        raise InputError(f"--ckpt: missing; give weights of --model {model}, for which none are published")
    return releases[model].format(image_size=image_size)


def read_latents(folder):
    """What metadata.json of encoded latents tells, or {}: the published layout has none.

    Raises InputError for a damaged file, and for values that cannot be.
    """
    path = Path(folder) / "metadata.json"
    if not os.path.lexists(path):
        return {}
    metadata = read_json("--data-path", path)
    told = {name: metadata[name] for name in ("image_size", "vae", "num_classes") if name in metadata}
    with flag_errors("--data-path", f"{folder}/metadata.json"):
        check_values(told)
    return told


def check_values(told):
    """Raise ValueError for a {setting: value} from a file whose type or range cannot be."""
    for name, value in told.items():
        if name in HIGHEST:
            highest = HIGHEST[name]
            expected, fits = f"a whole number from 1 to {highest:,}", type(value) is int and 0 < value <= highest
        elif name == "kept":
            expected, fits = "a list of layers", isinstance(value, list) and all(type(layer) is int for layer in value)
        else:
            expected, fits = "a name", isinstance(value, str) and value and value.isprintable()
        if not fits:
            raise ValueError(f"{name} is {value!r:.100}; expected {expected}")
    if "model" in told:
        model_config(told["model"])


def add_weights(layers, weights, option, typed, is_first):
    """Add what a file of weights tells; `option`: the setting that names its model. Only the first tells more."""
    named, facts = typed.get(option), read_told(weights)
    if named and "model" in facts and family_of(named) is not family_of(facts["model"]):
        asked, held = family_of(named).name, family_of(facts["model"]).name
        raise InputError(
            f"--{option} {named}: is a {asked}, but {weights.flag} {weights.name} holds a {held} "
            f"({facts['model']}, by what is known of it); take a model of {held}, or other weights"
        )
    keys = ("num_classes", "vae", "image_size") if is_first else ()
    origin = f"the published {weights.name}" if weights.release else f"from {weights.name}.json"
    layers.add({option: facts.get("model"), **{key: facts.get(key) for key in keys}}, origin)
    if weights.release:
        return
    told = weights.describe(named or facts.get("model"))
    family, origin = family_of(told["model"] or "DiT"), f"from the shapes of {weights.name}"
    # Only a SiT's weights look like those of another family.
    assumed = f", assumed to be a DiT's; for a SiT say --{option}" if family.name == "DiT" else ""
    layers.add({option: told["model"]}, origin + assumed)
    if is_first and "input_size" in told:
        latents = family_of(facts.get("model") or told["model"] or "DiT").latents
        vae = typed.get("vae") or facts.get("vae") or latents.usual
        with flag_errors("--vae" if typed.get("vae") else f"{weights.flag} {weights.name}.json, vae", vae):
            check_vae(vae, latents)
        size = told["input_size"] * shrink_factor(vae, latents)
        layers.add({"num_classes": told["num_classes"], "image_size": size}, origin)


def read_told(weights):
    """The facts beside a file that are settings, where they say something. Raises InputError for impossible ones."""
    if weights.release:
        return weights.facts
    names = ("model", "num_classes", "image_size", "vae", "kept", "pattern")
    told = {name: weights.facts[name] for name in names if weights.facts.get(name) is not None}
    with flag_errors(weights.flag, f"{weights.name}.json"):
        check_values(told)
    return told
