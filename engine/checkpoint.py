"""Files of weights and of training state: read safely, checked against the model, written atomically."""

import argparse
import json
import os
import pickle
import time
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from engine.errors import InputError, blame
from engine.vae import shrink_factor
from families import FAMILIES, TOLD, create_model, describe_weights, expected_shapes, family_of, model_config

ENTRIES = ("ema", "model_ema", "model")  # of a training checkpoint, in order of preference


def read_file(path, flag):
    """Tensors and plain values of a checkpoint, memory-mapped where the format allows; never executes foreign code.

    Raises InputError for what is missing, truncated, no checkpoint, or holds other Python objects than tensors and
    plain containers (an argparse.Namespace, as in published training checkpoints, is read).
    """
    if not os.path.isfile(path):
        raise InputError(f"{flag} {path}: no such file; expected a file of weights")
    try:
        if str(path).endswith(".safetensors"):
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        reason = str(error).lower()
        with open(path, "rb") as file:
            head = file.read(2)
        is_pickle = head[:1] == b"\x80" and head[1] <= pickle.HIGHEST_PROTOCOL
        if "global" in reason or ("unsupported operand" in reason and is_pickle):
            raise InputError(
                f"{flag} {path}: refused, since opening it would run foreign code; expected tensors and plain values"
            ) from None
        raise _damaged(flag, path) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, SafetensorError):
        raise _damaged(flag, path) from None


def _damaged(flag, path):
    return InputError(
        f"{flag} {path}: no checkpoint, or a truncated one; expected a .pt or .safetensors file of weights"
    )


def read_weights(path, flag, prefer_ema=True):
    """The state dict of a file: its entry `ema`, `model_ema` or `model` (not prefer_ema: `model`), or all of it."""
    checkpoint = read_file(path, flag)
    for entry in ENTRIES if prefer_ema else ("model",):
        if isinstance(checkpoint, dict) and isinstance(checkpoint.get(entry), dict):
            checkpoint = checkpoint[entry]
            break
    if not isinstance(checkpoint, dict) or not all(isinstance(v, torch.Tensor) for v in checkpoint.values()):
        wanted = "an entry ema or model" if prefer_ema else "an entry model"
        raise InputError(f"{flag} {path}: holds no weights; expected a state dict or {wanted}")
    return checkpoint


def facts_path(path):
    return Path(f"{path}.json")


def read_facts(path):
    """What was recorded with a file of weights (model, kept layers, pattern, source, ...), or an empty dict."""
    try:
        facts = json.loads(facts_path(path).read_text())
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def write_atomically(path, write):
    """Call write(temporary path), then rename: nobody ever sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_weights(path, state, **facts):
    """Write a plain state dict (.pt, or .safetensors by suffix) and, beside it, its facts as <path>.json."""
    if str(path).endswith(".safetensors"):
        write_atomically(path, lambda file: save_file({k: v.contiguous() for k, v in state.items()}, file))
    else:
        write_atomically(path, lambda file: torch.save(state, file))
    write_facts(path, facts)


def save_state(path, state, **facts):
    """Write a training state (tensors and plain values) and, beside it, facts about its weights."""
    write_atomically(path, lambda file: torch.save(state, file))
    write_facts(path, facts)


def write_facts(path, facts):
    write_atomically(facts_path(path), lambda file: file.write_text(json.dumps(facts, indent=1)))


def told_by_weights(path, flag, vae, prefer_ema=True):
    """Settings that a file of weights tells by facts or shapes: model, image_size, num_classes, perhaps vae.

    vae: the value of --vae, which settles how many pixels a latent stands for; its default gives way to the facts.
    """
    if not path or not os.path.isfile(path):
        return {}
    facts = read_facts(path)
    with blame(flag, path):
        shapes = describe_weights(read_weights(path, flag, prefer_ema))
    told = {name: facts.get(name) or shapes[name] for name in ("model", "num_classes")}
    if facts.get("vae"):
        told["vae"] = facts["vae"]
    latents = family_of(told["model"] or "DiT").latents
    usual = {next(iter(family.latents.hub)) for family in FAMILIES.values()}  # defaults, of whichever family
    vae = told.get("vae", next(iter(latents.hub))) if vae in usual else vae
    told["image_size"] = shapes["input_size"] * shrink_factor(vae, latents)
    return {name: value for name, value in told.items() if value is not None}


def check_fit(state, flag, path, name, option="--model", **config):
    """Raise InputError unless `state` holds exactly the weights of the model `name`; says which model would fit."""
    with torch.device("meta"):
        expected = expected_shapes(create_model(name, **config))
    found = {k: v.shape for k, v in state.items() if not k.startswith("gumbel_gates.")}
    if found == expected:
        return
    with blame(flag, path):
        shapes = describe_weights(state, name)
    asked = {**model_config(name), **config}
    depth, width = sum(shapes["depths"]), shapes["hidden_size"]
    for key, setting in (("num_classes", "--num-classes"), ("in_channels", "--vae"), ("input_size", "--image-size")):
        if key in asked and asked[key] != shapes[key] and shapes["model"] == name:
            raise InputError(f"{flag} {path}: has {key} {shapes[key]}, expected {asked[key]}; change {setting}")
    stacks = family_of(name).stacks(asked)
    if (shapes["depths"], width) != (stacks, asked["hidden_size"]):
        advice = f"take {option} {shapes['model']}" if shapes["model"] else "no registered model has this width"
        raise InputError(
            f"{flag} {path}: has {depth} layers of width {width}, but {option} {name} has "
            f"{sum(stacks)} of width {asked['hidden_size']}; {advice}"
        )
    different = sorted(set(found.items()) ^ set(expected.items()))
    raise InputError(
        f"{flag} {path}: does not fit {option} {name}: keys or shapes differ, the first is {different[0][0]}"
    )


def read_checked(path, flag, name, prefer_ema=True):
    """Weights that fit the model called `name`, and the constructor arguments that their shapes tell."""
    state = read_weights(path, flag, prefer_ema)
    with blame(flag, path):
        shapes = describe_weights(state, name)
    config = {key: shapes[key] for key in TOLD if key in shapes}
    check_fit(state, flag, path, name, **config)
    return state, config


def build_network(name, state, device, **config):
    """The network called `name` in float32 on `device`, with the weights of a checked state dict (copied)."""
    with torch.device("meta"):
        net = create_model(name, **config)
    weights = {k: v.to(device, torch.float32, copy=True) for k, v in state.items() if not k.startswith("gumbel_gates.")}
    net.load_state_dict(weights, strict=False, assign=True)
    return net.to(device)


def fetch(name, flag, family):
    """Path of a file of weights: `name`, or the published file of that name, fetched once into torch's cache."""
    if os.path.isfile(name) or name not in family.releases:
        return name
    return download(family.releases[name], name, flag)


def download(url, name, flag):
    """Path of `url` in torch's cache, as `name`; fetched if it is not there, by the first process of a machine."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    while int(os.environ.get("LOCAL_RANK", 0)) and not path.is_file():
        time.sleep(1)  # the first process of this machine downloads; the launcher ends us if it fails
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path))
        except (OSError, RuntimeError) as error:
            raise InputError(f"{flag} {name}: cannot be fetched from {url} ({error})") from None
    return str(path)
