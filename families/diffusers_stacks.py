"""What a class of diffusers' transformers says of its stacks of blocks, and its config for fewer of them.

No class is named here: depths are found by making the network with a layer less and more, without memory.
"""

import copy
import inspect
import json
import re
from dataclasses import dataclass, replace
from functools import cache, lru_cache

import torch
from torch import nn

from families.hollow import parameters_on_meta
from pruning.surgery import keep_layers

DEPTH_FIELD = re.compile("layer|depth|block")  # names of numbers in a config that may say how deep a stack is


@dataclass(frozen=True)
class Stack:
    """A stack of blocks: the name of its ModuleList, its depth, and the number of the config that says so.

    has_lists: whether lists of the config about layers are about these (of several stacks, the first).
    keeps_last: the last block is unlike the others, and has to stay.
    """

    name: str
    depth: int
    field: str
    has_lists: bool = True
    keeps_last: bool = False


def find_stacks(class_name, config):
    """The Stacks of a network, a tuple in forward order. Raises ValueError, with the reason, if none can be cut."""
    return _find_stacks(class_name, json.dumps(config, sort_keys=True, default=str))


@lru_cache(maxsize=32)
def _find_stacks(class_name, text):
    config = json.loads(text)
    find_class(class_name)  # says by itself what is wrong
    try:
        net = sketch(class_name, config)
    except Exception as error:  # it may be any: of the class
        raise ValueError(f"config.json does not make a {class_name} ({' '.join(str(error).split())[:200]})") from None
    depths, found, shared = list_depths(net), {}, {}
    for field in (name for name, value in config.items() if DEPTH_FIELD.search(name) and is_depth(value)):
        changed = find_changed(class_name, config, field, depths)
        if len(changed) == 1:
            found.setdefault(changed[0], field)
        for name in changed if len(changed) > 1 else ():
            shared[name] = f"{' and '.join(changed)} have one depth, {field}"
    reasons = {name: shared.get(name, "no number of its config says how deep it is") for name in depths}
    stacks, whole = [], {key: tuple(value.shape) for key, value in net.state_dict().items()}
    for name in (name for name in depths if name in found):  # modules are listed in the order of their making
        stack = Stack(name, depths[name], found[name], has_lists=not stacks)
        try:
            stacks.append(check_stack(class_name, config, whole, stack))
        except ValueError as error:
            reasons[name] = str(error)
    if not stacks:
        told = "; ".join(f"{name}: {reason}" for name, reason in reasons.items()) or "it has no stack of blocks"
        raise ValueError(f"{class_name} cannot be cut ({told})")
    return tuple(stacks)


def is_depth(value):
    """Whether a value of a config can be a number of blocks."""
    return type(value) is int and 1 <= value <= 1000


def list_depths(net):
    """{name: number of blocks} of the ModuleLists of a network that can be stacks."""
    lists = {name: module for name, module in net.named_children() if isinstance(module, nn.ModuleList)}
    return {name: len(blocks) for name, blocks in lists.items() if len(blocks)}


def find_changed(class_name, config, field, depths):
    """Names of the ModuleLists that a number of the config says the depth of: they follow it down, or up.

    A number that is 1 can go up alone. An empty list if the class does not take a smaller number.
    """
    changed = set()
    for step in (-1, 1) if config[field] > 1 else (1,):
        try:
            other = list_depths(sketch(class_name, {**config, field: config[field] + step}))
        except Exception:  # it may be any: of the class, for a number that has to fit to others
            if step < 0:
                return []
            continue
        changed |= {name for name, depth in depths.items() if other.get(name, 0) == depth + step}
    return [name for name in depths if name in changed]


def check_stack(class_name, config, whole, stack):
    """The Stack, knowing whether its last block has to stay. Raises ValueError with what is in the way of cutting it.

    whole: {key: shape} of the network.
    """
    layers, last = list(range(stack.depth)), stack.depth - 1
    for keeps_last in (False, True):
        choices = [layers[1:], [*layers[: last // 2], *layers[last // 2 + 1 :]], layers[last % 2 :: 2]]
        choices += [] if keeps_last else [layers[:-1]]
        choices = [kept for kept in choices if kept]  # of a single block nothing can go
        wrong = next(filter(None, (find_misfit(class_name, config, whole, stack, kept) for kept in choices)), None)
        if not wrong:
            return replace(stack, keeps_last=keeps_last)
    raise ValueError(f"the blocks that are left do not fit a shallower network, first {wrong}")


def find_misfit(class_name, config, whole, stack, kept):
    """The first key that differs between a stack cut to the layers `kept` and the class with such a config, or None."""
    try:
        expected = sketch(class_name, cut_config(config, (stack,), kept)).state_dict()
    except Exception as error:  # it may be any: of the class
        return f"a config that it does not take ({str(error)[:100]})"
    left = keep_layers(whole, kept, (stack.name,))
    different = set(left.items()) ^ {(key, tuple(value.shape)) for key, value in expected.items()}
    return min(different)[0] if different else None


def cut_config(config, stacks, kept):
    """The config of a network with only the layers `kept`, which are numbered through the stacks.

    Lists with a value for every layer lose those of dropped ones, and lists of numbers of layers are renumbered.
    """
    cut, start = copy.deepcopy(config), 0
    for stack in stacks:
        layers = [layer - start for layer in kept if start <= layer < start + stack.depth]
        cut[stack.field] = len(layers)
        for name, value in config.items() if stack.has_lists else ():
            if name != stack.field:
                cut[name] = cut_list(name, value, stack.depth, layers)
        start += stack.depth
    return cut


def cut_list(name, value, depth, layers):
    """A config's value without the layers that are not in `layers`, if it is a list of or about all layers."""
    if not isinstance(value, list | tuple) or not value:
        return value
    if name.endswith("layers") and all(type(each) is int and 0 <= each < depth for each in value):
        return [layers.index(each) for each in value if each in layers]
    return [value[layer] for layer in layers] if len(value) == depth and "layer" in name else value


def sketch(class_name, config):
    """The plain network of diffusers without memory, for its shapes: all on torch's meta device, tables included."""
    find_class(class_name)  # libraries must not be imported for the first time there
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                return build_class(class_name, config)
        except (NotImplementedError, RuntimeError, TypeError):  # of classes that look at the numbers of a table
            with parameters_on_meta():
                return build_class(class_name, config)


@cache
def find_class(class_name):
    """Diffusers' class of that name. Raises ValueError if there is no such network."""
    import diffusers  # slow to import
    from diffusers.models import transformers

    network = getattr(transformers, str(class_name), None)
    if not (isinstance(network, type) and issubclass(network, diffusers.ModelMixin)):
        raise ValueError(f"is of the class {class_name}; diffusers {diffusers.__version__} has no such transformer")
    return network


def build_class(class_name, config):
    """Diffusers' own network of a class with a config."""
    return find_class(class_name).from_config(config)


def fixed_layers(stacks):
    """Numbers of the layers that have to stay."""
    ends = [sum(stack.depth for stack in stacks[: place + 1]) - 1 for place in range(len(stacks))]
    return [end for end, stack in zip(ends, stacks, strict=True) if stack.keeps_last]


def list_arguments(class_name):
    """Names of the arguments of the forward of a class of diffusers."""
    return list(inspect.signature(inspect.unwrap(find_class(class_name).forward)).parameters)[1:]
