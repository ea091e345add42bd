"""Files of weights and of training state: opened once, read safely, checked against a model, written whole."""

import math
import os
from functools import cached_property
from pathlib import Path

import torch

from engine import hub
from engine.diffusers_folder import digest_folder, open_folder
from engine.errors import InputError, flag_errors
from engine.files import digest_file, download, read_json, write_atomically, write_json
from engine.run import DTYPES, find_matrices
from engine.weight_files import GATES, check_intact, open_weights, read_file, write_safetensors, wrong_numbers
from families import RELEASES, SHAPE_ARGUMENTS, describe_shapes, family_of, model_config, sketch_model
from families.names import is_hub_name


class Weights:
    """Weights that a flag names: what is known of them at once, their tensors when they are asked for.

    name: a file, a diffusers folder, one of these on the Hub (see engine.hub), which is fetched now, or the name of a
    published file, which is fetched only when its tensors are needed; until then its settings are those of the release.
    A file is opened once, here. average: take the averaged weights of a training checkpoint if there are any. Raises
    InputError for a file without weights.
    """

    def __init__(self, name, flag, average=True):
        self.name, self.flag, self.average = str(name), flag, average
        self.release = None if os.path.exists(name) else RELEASES.get(self.name)
        self.checked = False  # whether its numbers were looked at
        if self.release:
            self.facts, self.opened = dict(self.release.settings), None
            return
        with flag_errors(flag, name):
            self.local = hub.fetch(self.name) if is_hub_name(self.name) else self.name
        self.opened = self._open(self.local)
        self.facts = read_facts(self.local, flag) or self.opened.facts or {}
        if self.opened.model:
            self.facts = {**self.facts, "model": self.name}

    def _open(self, path):
        """The weights in a file or a folder."""
        if os.path.isdir(path):
            return open_folder(path, self.flag)
        return open_weights(path, self.flag, self.average)

    @cached_property
    def path(self):
        """Where the file is; a published one is fetched first, into torch's cache."""
        if not self.release:
            return self.local
        with flag_errors(self.flag, self.name):
            return str(download(self.release.url, Path(torch.hub.get_dir()) / "checkpoints" / self.name))

    @cached_property
    def file(self):
        """The opened file, see `Opened`."""
        return self.opened or self._open(self.path)

    @cached_property
    def digest(self):
        """A short digest of the file's contents."""
        return digest_folder(self.path) if os.path.isdir(self.path) else digest_file(self.path)

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
        if not os.path.isdir(self.path):
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
            if key in asked and key in told and asked[key] != told[key] and told["model"] == model:
                raise InputError(f"{name}: has {key} {told[key]}, expected {asked[key]}; change {flag}")
        depths, width = family_of(model).stacks(asked), asked.get("hidden_size")
        if (told["depths"], told.get("hidden_size")) != (depths, width):
            other = told["model"] if told["model"] != model else None
            advice = f"take {option} {other}" if other else "no registered model has this width"
            of_width = [f" of width {each}" if each else "" for each in (told.get("hidden_size"), width)]
            raise InputError(
                f"{name}: has {sum(told['depths'])} layers{of_width[0]}, but {option} {model} has "
                f"{sum(depths)}{of_width[1]}; {advice}"
            )
        found = {key: tuple(shape) for key, shape in self.file.shapes.items() if not key.startswith(GATES)}
        different = set(found.items()) ^ set(expected_shapes(model, config).items())
        if different:
            raise InputError(
                f"{name}: does not fit {option} {model}: keys or shapes differ, the first is {min(different)[0]}"
            )
        self.check_numbers()

    def build(self, model, config, device, frozen="fp32"):
        """The network called `model` on `device`, with a copy of these weights, which fit.

        In float32; of a network whose matrices are not trained, these in the precision `frozen`, so that they are never
        held in float32, see engine.run.cast_frozen_weights.
        """
        net = sketch_model(model, **config)
        halves = {f"{name}.{part}" for name in find_matrices(net) for part in ("weight", "bias")}
        weights = {
            key: value.to(device, DTYPES[frozen] if key in halves else torch.float32, copy=True)
            for key, value in self.state.items()
            if not key.startswith(GATES)
        }
        net.load_state_dict(weights, strict=False, assign=True)
        return net.to(device)


def expected_shapes(model, config):
    """{key: shape} of the weights that a network needs from a file: its state dict without gates."""
    state = sketch_model(model, **config).state_dict()
    return {key: tuple(value.shape) for key, value in state.items() if not key.startswith(GATES)}


def facts_path(path):
    return Path(f"{Path(path)}.json")  # of a folder too, with a slash at its end or without


def read_facts(path, flag="facts"):
    """What was recorded with a file of weights (model, kept layers, pattern, source, ...), or an empty dict.

    Raises InputError for a file that is there and holds something else.
    """
    facts = facts_path(path)
    return read_json(flag, facts) if os.path.lexists(facts) else {}


def save_weights(path, state, **facts):
    """Write a plain state dict (.pt, or .safetensors by suffix) and, beside it, its facts as <path>.json.

    A .safetensors file holds its facts too, for those who get it alone.
    """
    # Facts first: weights without theirs would be taken for something else.
    write_json(facts_path(path), facts)
    if str(path).endswith(".safetensors"):
        write_safetensors(path, state, facts)
    else:
        write_atomically(path, lambda temporary: save_anonymously(state, temporary))


def save_anonymously(state, path):
    """torch.save without the name of the file inside, so that equal weights are equal bytes."""
    with open(path, "wb") as file:
        torch.save(state, file)


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
