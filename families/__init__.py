"""The registry of families, and what can be looked up about a model by its name or by the shapes of its weights.

Another family is one new file in this folder and one line here. Importing this needs no torch.
"""

import importlib
import os

from families.dit import DIT
from families.hollow import parameters_on_meta
from families.mar import MAR
from families.names import read_name, write_name
from families.of_diffusers import DIFFUSERS, is_place
from families.sit import SIT

FAMILIES = {family.name: family for family in (DIT, SIT, MAR, DIFFUSERS)}
RELEASES = {name: release for family in FAMILIES.values() for name, release in family.releases.items()}
SHAPE_ARGUMENTS = ("input_size", "num_classes", "in_channels", "learn_sigma")  # constructor arguments shapes may tell


def family_of(name):
    """The family that a model name belongs to: by its first word; of another that is a folder diffusers, else DiT."""
    first = name.partition("-")[0]
    if first in FAMILIES and not os.path.isabs(name):
        return FAMILIES[first]
    return DIFFUSERS if is_place(name) else DIT


def model_name(text):
    """The text, if it names a model; raises ValueError otherwise."""
    model_config(text)
    return text


def model_config(name):
    """Constructor arguments of the model called `name`; see families.names. Raises ValueError for no such model."""
    family = family_of(name)
    return family.find_model(name) if family.find_model else read_name(family, name)


def stack_layers(name):
    """Number of layers in every stack of the model called `name`, in forward order."""
    return family_of(name).stacks(model_config(name))


def stack_names(name):
    """Names of the stacks of the model called `name`, as keys of its weights begin, in forward order."""
    return family_of(name).stack_names(model_config(name))


def fixed_layers(name):
    """Numbers of the layers of the model called `name` that have to stay."""
    return list(family_of(name).fixed_layers(model_config(name)))


def depth_name(name, depths):
    """The plain name of a pruned `name`: DiT-XL-1-2 with stacks (14,) is DiT-D14/2. None if there is none.

    A model that is a folder has its own name, and none at other depths.
    """
    family, config = family_of(name), model_config(name)
    if family.find_model:
        return name if tuple(depths) == family.stacks(config) else None
    return write_name(family, config["hidden_size"], depths, config["patch_size"])


def full_name(name):
    """A name that holds wherever one is: of a model that is a folder, its whole path."""
    return os.path.abspath(name) if os.path.isdir(name) and family_of(name).find_model else name


def short_name(name):
    """A name as part of the names of files: DiT-XL/2 is DiT-XL-2, a folder is its last part."""
    return os.path.basename(name.rstrip("/")) if family_of(name).find_model else name.replace("/", "-")


def create_model(name, **overrides):
    """Build the network called `name`; `overrides` are constructor arguments, such as input_size or groups."""
    return _find_network(name)(**{**model_config(name), **overrides})


def sketch_model(name, **overrides):
    """The same with parameters on torch's meta device: without their memory and random numbers, to look at or fill."""
    import torch

    network = _find_network(name)  # before the context, in which libraries must not be imported for the first time
    with torch.random.fork_rng(devices=[]), parameters_on_meta():
        return network(**{**model_config(name), **overrides})


def _find_network(name):
    """The class of the network called `name`."""
    module, _, network = family_of(name).network.rpartition(".")
    return getattr(importlib.import_module(module), network)


def describe_shapes(shapes, name=None):
    """What {key: shape} of a state dict tells: model, hidden_size, depths, and those of SHAPE_ARGUMENTS there are.

    name: a model of the family it should be; the weights of a DiT and of a SiT have the same keys and shapes, and are
    taken for a DiT's without it. Raises ValueError if these are not weights of that family.
    """
    family = MAR if any(key.startswith("encoder_blocks.") for key in shapes) else DIT
    family = family_of(name) if name else family
    try:
        if family.describe:
            return family.describe(shapes, name)
        told = family.read_shapes(shapes)
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(f"not the weights of a {family.name} ({error})") from None
    return {"model": write_name(family, told["hidden_size"], told["depths"], told.pop("patch_size")), **told}


def find_exchange(class_name):
    """The module that turns weights of diffusers' class `class_name` into ours; None for a class that stays itself."""
    exchanges = [family.exchange for family in FAMILIES.values() if family.exchange]
    return next((exchange.load() for exchange in exchanges if class_name in exchange.classes), None)
