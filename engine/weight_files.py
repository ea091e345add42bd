"""Files with tensors: opened and read safely, whatever wrote them."""

import argparse
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from contextlib import contextmanager
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from engine.errors import InputError
from engine.files import plain, write_atomically
from pruning.lora import is_adapter, merge_adapters

FACTS = "tinyfusion"  # entry of the metadata of a .safetensors file that holds facts about its weights, as JSON
ENTRIES = ("ema", "model_ema", "model")  # of a training checkpoint, in order of preference
GATES = "gumbel_gates."
FLOATS = {"F64", "F32", "F16", "BF16"}  # types of numbers in .safetensors that weights can have


class Opened(NamedTuple):
    """A file of weights that was opened: shapes at once, tensors by `read()`, and the checkpoint around them."""

    shapes: dict  # key -> shape
    read: Callable  # () -> state dict; memory-mapped where the format allows
    checkpoint: dict  # the other entries of a training checkpoint
    averaged: bool  # whether these are the averaged weights of it
    facts: dict | None = None  # that the file itself holds about its weights
    model: str | None = None  # the name of the model, of a folder of diffusers that is one


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
    shapes = {key: tuple(value.shape) for key, value in weights.items() if not is_adapter(key)}
    around = {key: value for key, value in checkpoint.items() if key not in ENTRIES} if found else {}
    return Opened(shapes, lambda: merge_adapters(weights), around, averaged=found in ENTRIES[:2])


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
        facts = json.loads((file.metadata() or {}).get(FACTS, "{}"))
    if not isinstance(facts, dict):
        raise damaged_file(path, flag)
    for key, kind in kinds.items():
        if kind not in FLOATS and not key.startswith(GATES):
            raise wrong_numbers(key, path, flag)

    def read():
        with damage_errors(path, flag):
            return {key: file.get_tensor(key) for key in shapes}

    return Opened(shapes, read, {}, averaged=False, facts=facts)


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


def write_safetensors(path, state, facts):
    """Write tensors, {key: tensor}, as a .safetensors file that holds facts about them."""
    metadata = {"format": "pt", FACTS: json.dumps(plain(facts))}
    contiguous = {key: value.contiguous() for key, value in state.items()}
    write_atomically(path, lambda temporary: save_file(contiguous, temporary, metadata))
