"""The registry of families, and what can be looked up about a model by its name or by the shapes of its weights.

Another family is one new file in this folder and one line here. Importing this needs no torch.
"""

import importlib

from families.dit import DIT
from families.mar import MAR
from families.names import read_name, write_name
from families.sit import SIT

FAMILIES = {family.name: family for family in (DIT, SIT, MAR)}
RELEASES = {name: release for family in FAMILIES.values() for name, release in family.releases.items()}
SHAPE_ARGUMENTS = ("input_size", "num_classes", "in_channels", "learn_sigma")  # constructor arguments shapes may tell


def family_of(name):
    """The family that a model name belongs to: by its first word, DiT otherwise."""
    return FAMILIES.get(name.partition("-")[0], DIT)


def model_name(text):
    """The text, if it names a model; raises ValueError otherwise."""
    model_config(text)
    return text


def model_config(name):
    """Constructor arguments of the model called `name`; see families.names. Raises ValueError for no such model."""
    return read_name(family_of(name), name)


def stack_layers(name):
    """Number of layers in every stack of the model called `name`, in forward order."""
    return family_of(name).stacks(model_config(name))


def depth_name(name, depths):
    """The plain name of a pruned `name`: DiT-XL-1-2 with stacks (14,) is DiT-D14/2. None if there is none."""
    config = model_config(name)
    return write_name(family_of(name), config["hidden_size"], depths, config["patch_size"])


def create_model(name, **overrides):
    """Build the network called `name`; `overrides` are constructor arguments, such as input_size or groups."""
    return _find_network(name)(**{**model_config(name), **overrides})


def sketch_model(name, **overrides):
    """The same on torch's meta device: without memory and random numbers, for shapes and counting."""
    import torch

    network = _find_network(name)  # before the context, in which libraries must not be imported for the first time
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
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
        told = family.read_shapes(shapes)
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(f"not the weights of a {family.name} ({error})") from None
    return {"model": write_name(family, told["hidden_size"], told["depths"], told.pop("patch_size")), **told}


def find_exchange(class_name):
    """The module that turns weights of diffusers' class `class_name` into ours. Raises ValueError if there is none."""
    exchanges = [family.exchange for family in FAMILIES.values() if family.exchange]
    for exchange in exchanges:
        if class_name in exchange.classes:
            return exchange.load()
    known = " or ".join(name for exchange in exchanges for name in exchange.classes)
    raise ValueError(f"holds a {class_name} of diffusers; expected a {known}")
