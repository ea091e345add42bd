"""Files of weights and of training state: opened once, read safely, checked against a model, written whole."""

import argparse
import math
import os
import pickle
import zipfile
from collections.abc import Callable
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from engine.errors import InputError, flag_errors
from engine.files import digest_file, download, read_json, write_atomically, write_json
from families import RELEASES, SHAPE_ARGUMENTS, create_model, describe_shapes, family_of, model_config

ENTRIES = ("ema", "model_ema", "model")  # of a training checkpoint, in order of preference
GATES = "gumbel_gates."
FLOATS = {"F64", "F32", "F16", "BF16"}  # types of numbers in .safetensors that weights can have


class Weights:
    """Weights that a flag names: what is known of them at once, their tensors when they are asked for.

    name: a file, or the name of a published one, which is fetched only when its tensors are needed; until then its
    settings are those of the release. A file is opened once, here. average: take the averaged weights of a training
    checkpoint if there are any. Raises InputError for a file without weights.
    """

    def __init__(self, name, flag, average=True):
        self.name, self.flag, self.average = str(name), flag, average
        self.release = None if os.path.isfile(name) else RELEASES.get(self.name)
        self.facts = dict(self.release.settings) if self.release else read_facts(name, flag)
        self.opened = None if self.release else open_weights(self.name, flag, average)
        self.checked = False  # whether its numbers were looked at

    @cached_property
    def path(self):
        """Where the file is; a published one is fetched first, into torch's cache."""
        if not self.release:
            return self.name
        with flag_errors(self.flag, self.name):
            return str(download(self.release.url, Path(torch.hub.get_dir()) / "checkpoints" / self.name))

    @cached_property
    def file(self):
        """The opened file, see `Opened`."""
        return self.opened or open_weights(self.path, self.flag, self.average)

    @cached_property
    def digest(self):
        """A short digest of the file's contents."""
        return digest_file(self.path)

    @property
    def state(self):
        """The state dict, {key: tensor}; not kept here, so that a run does not hold it in memory to its end.

        Raises InputError if something in it has changed since it was written, or is no finite number.
        """
        self.check_numbers()
        return self.file.read()

    def check_numbers(self):
        """Raise InputError if something in the file has changed since it was written, or is no finite number."""
        if self.checked:
            return
        check_intact(self.path, self.flag)
        for key, value in self.file.read().items():
            if not key.startswith(GATES) and not value.float().isfinite().all():
                raise wrong_numbers(key, self.name, self.flag)
        self.checked = True

    def count_parameters(self):
        """Number of weights, those of gates left out."""
        return sum(math.prod(shape) for key, shape in self.file.shapes.items() if not key.startswith(GATES))

    def describe(self, model=None):
        """What the shapes tell, see families.describe_shapes; raises InputError for another family than `model`'s."""
        with flag_errors(self.flag, self.name):
            return describe_shapes(self.file.shapes, model)

    def read_config(self, model):
        """Constructor arguments of the network called `model` that the shapes tell."""
        told = self.describe(model)
        return {key: told[key] for key in SHAPE_ARGUMENTS if key in told}

    def check_fit(self, model, config, option="--model"):
        """Raise InputError unless these are the weights of the network `model` with constructor arguments `config`.

        option: the flag that names the model, for the message, which says what would fit.
        """
        told, asked, name = self.describe(model), {**model_config(model), **config}, f"{self.flag} {self.name}"
        for key, flag in (("num_classes", "--num-classes"), ("in_channels", "--vae"), ("input_size", "--image-size")):
            if key in asked and asked[key] != told[key] and told["model"] == model:
                raise InputError(f"{name}: has {key} {told[key]}, expected {asked[key]}; change {flag}")
        depths, width = family_of(model).stacks(asked), asked["hidden_size"]
        if (told["depths"], told["hidden_size"]) != (depths, width):
            advice = f"take {option} {told['model']}" if told["model"] else "no registered model has this width"
            raise InputError(
                f"{name}: has {sum(told['depths'])} layers of width {told['hidden_size']}, but {option} {model} has "
                f"{sum(depths)} of width {width}; {advice}"
            )
        found = {key: tuple(shape) for key, shape in self.file.shapes.items() if not key.startswith(GATES)}
        different = set(found.items()) ^ set(expected_shapes(model, config).items())
        if different:
            raise InputError(
                f"{name}: does not fit {option} {model}: keys or shapes differ, the first is {min(different)[0]}"
            )
        self.check_numbers()

    def build(self, model, config, device):
        """The network called `model` in float32 on `device`, with a copy of these weights, which fit."""
        with torch.device("meta"):
            net = create_model(model, **config)
        weights = {
            key: value.to(device, torch.float32, copy=True)
            for key, value in self.state.items()
            if not key.startswith(GATES)
        }
        net.load_state_dict(weights, strict=False, assign=True)
        return net.to(device)


class Opened(NamedTuple):
    """A file of weights that was opened: shapes at once, tensors by `read()`, and the checkpoint around them."""

    shapes: dict  # key -> shape
    read: Callable  # () -> state dict; memory-mapped where the format allows
    checkpoint: dict  # the other entries of a training checkpoint
    averaged: bool  # whether these are the averaged weights of it


def open_weights(path, flag, average=True):
    """Open the weights in a file: its entry `ema`, `model_ema` or `model` (not `average`: `model`), or all of it."""
    if str(path).endswith(".safetensors"):
        return open_safetensors(path, flag)
    checkpoint = weights = read_file(path, flag)
    found = None
    for entry in ENTRIES if average else ("model",):
        if isinstance(checkpoint, dict) and isinstance(checkpoint.get(entry), dict):
            found, weights = entry, checkpoint[entry]
            break
    items = weights.items() if isinstance(weights, dict) else [(None, None)]
    if not all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in items):
        wanted = "an entry ema or model" if average else "an entry model"
        raise InputError(f"{flag} {path}: holds no weights; expected a state dict or {wanted}")
    for key, value in weights.items():
        is_dense = value.layout == torch.strided and not value.is_meta
        if not key.startswith(GATES) and not (is_dense and value.is_floating_point()):
            raise wrong_numbers(key, path, flag)
    shapes = {key: tuple(value.shape) for key, value in weights.items()}
    around = {key: value for key, value in checkpoint.items() if key not in ENTRIES} if found else {}
    return Opened(shapes, lambda: weights, around, averaged=found in ENTRIES[:2])


def read_weights(path, flag, average=True):
    """The state dict in a file, see `open_weights`."""
    return open_weights(path, flag, average).read()


def open_safetensors(path, flag):
    """The same of a .safetensors file, whose header has all shapes."""
    if not os.path.isfile(path):
        raise missing_file(path, flag)
    with damage_errors(path, flag):
        file = safe_open(path, "pt")
        headers = {key: file.get_slice(key) for key in sorted(file.keys())}
        shapes = {key: tuple(header.get_shape()) for key, header in headers.items()}
        kinds = {key: header.get_dtype() for key, header in headers.items()}
    for key, kind in kinds.items():
        if kind not in FLOATS and not key.startswith(GATES):
            raise wrong_numbers(key, path, flag)

    def read():
        with damage_errors(path, flag):
            return {key: file.get_tensor(key) for key in shapes}

    return Opened(shapes, read, {}, averaged=False)


def read_file(path, flag):
    """Tensors and plain values of a checkpoint, memory-mapped where the format allows; never executes foreign code.

    Raises InputError for a file that is missing, truncated or not a checkpoint, or that holds other Python objects than
    tensors and plain containers (an argparse.Namespace, as in published training checkpoints, is read).
    """
    if not os.path.isfile(path):
        raise missing_file(path, flag)
    try:
        with damage_errors(path, flag), torch.serialization.safe_globals([argparse.Namespace]):
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
        raise damaged_file(path, flag) from None


@contextmanager
def damage_errors(path, flag):
    """Turn what torch and safetensors raise for damaged files into an InputError."""
    try:
        yield
    except pickle.UnpicklingError:
        raise
    except Exception:  # it may be any: torch computes with what it finds
        raise damaged_file(path, flag) from None


def missing_file(path, flag):
    return InputError(f"{flag} {path}: no such file; expected a checkpoint (.pt or .safetensors)")


def wrong_numbers(key, path, flag):
    return InputError(f"{flag} {path}: {key} does not hold finite floating-point numbers; take another file")


def damaged_file(path, flag):
    return InputError(f"{flag} {path}: truncated, or not a checkpoint; expected a .pt or .safetensors file of weights")


def expected_shapes(model, config):
    """{key: shape} of the weights that a network needs from a file: its state dict without gates."""
    with torch.device("meta"):
        net = create_model(model, **config)
    return {key: tuple(value.shape) for key, value in net.state_dict().items() if not key.startswith(GATES)}


def facts_path(path):
    return Path(f"{path}.json")


def read_facts(path, flag="facts"):
    """What was recorded with a file of weights (model, kept layers, pattern, source, ...), or an empty dict.

    Raises InputError for a file that is there and holds something else.
    """
    facts = facts_path(path)
    return read_json(flag, facts) if os.path.lexists(facts) else {}


def save_weights(path, state, **facts):
    """Write a plain state dict (.pt, or .safetensors by suffix) and, beside it, its facts as <path>.json."""
    # Facts first: weights without theirs would be taken for something else.
    write_json(facts_path(path), facts)
    if str(path).endswith(".safetensors"):
        contiguous = {key: value.contiguous() for key, value in state.items()}
        write_atomically(path, lambda temporary: save_file(contiguous, temporary))
    else:
        write_atomically(path, lambda temporary: torch.save(state, temporary))


def save_state(path, state, **facts):
    """Write a training state (tensors and plain values) and, beside it, facts about its weights, to a folder there."""
    write_json(facts_path(path), facts, make_folder=False)
    write_atomically(path, lambda temporary: torch.save(state, temporary), make_folder=False)


def read_state(path, flag="--resume"):
    """A training state of a run folder, whole and unchanged; raises InputError for any other file."""
    return check_state(read_file(path, flag), path, flag)


def check_state(state, path, flag="--resume"):
    """The training state read from a file; raises InputError if it is none, or has changed since it was written."""
    check_intact(path, flag)
    if not isinstance(state, dict) or type(state.get("train_steps")) is not int or state["train_steps"] < 0:
        raise InputError(f"{flag} {path}: not a training state; take a file of a run folder's checkpoints")
    return state


def check_intact(path, flag):
    """Raise InputError if a file of torch.save does not have the checksums that were written with it."""
    if not os.path.isfile(path):
        raise missing_file(path, flag)
    if not zipfile.is_zipfile(path):
        return  # read_file says what is wrong, or it is of the old format, which has none
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except Exception as error:  # it may be any: zipfile computes with what it finds
        raise InputError(f"{flag} {path}: damaged ({error}); take another file") from None
    if broken:
        raise InputError(f"{flag} {path}: damaged ({broken} has changed since it was written); take another file")
