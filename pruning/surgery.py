"""Cut layers out of a state dict: the kept blocks are renumbered from 0, everything else stays as it was."""

import re

import torch

BLOCK_KEY = re.compile(r"((?:encoder_|decoder_)?blocks)\.(\d+)\.(.+)")


def stack_depths(state):
    """Number of blocks in every stack of a state dict, in forward order: {"blocks": 28}."""
    depths = {}
    for key in state:
        if match := BLOCK_KEY.fullmatch(key):
            depths[match[1]] = max(depths.get(match[1], 0), int(match[2]) + 1)
    return depths


def check_layers(kept, depth):
    """Raise ValueError unless `kept` are distinct layers of a network with `depth` layers."""
    if not kept:
        raise ValueError("no layer is kept: name at least one")
    for layer in kept:
        if not 0 <= layer < depth:
            raise ValueError(f"has {layer}, but the layers are 0..{depth - 1}")
        if kept.count(layer) > 1:
            raise ValueError(f"names layer {layer} {kept.count(layer)} times: name each layer once")


def average_dropped(state, kept):
    """State dict in which every layer in `kept` is the mean of itself and the dropped layers that it is nearest to.

    Within a stack; of two kept layers as near as each other the earlier takes the dropped one in.
    """
    merged, start = dict(state), 0
    for stack, depth in stack_depths(state).items():
        stay = [layer - start for layer in sorted(kept) if start <= layer < start + depth]
        members = {layer: [] for layer in stay}
        for layer in range(depth if stay else 0):
            members[min(stay, key=lambda each, layer=layer: (abs(each - layer), each))].append(layer)
        for key, value in state.items():
            match = BLOCK_KEY.fullmatch(key)
            if match and match[1] == stack and int(match[2]) in members:
                parts = [state[f"{stack}.{layer}.{match[3]}"].double() for layer in members[int(match[2])]]
                merged[key] = torch.stack(parts).mean(0).to(value.dtype)
        start += depth
    return merged


def cut_layers(state, kept, init="kept"):
    """keep_layers of the start that `--init` names: `state` for "kept" and "learned", average_dropped for "average"."""
    start = {"kept": lambda: state, "learned": lambda: state, "average": lambda: average_dropped(state, kept)}[init]
    return keep_layers(start(), kept)


def keep_layers(state, kept):
    """State dict with only the layers `kept`, numbered through all stacks; gates are left out, tensors are shared.

    Raises ValueError for layers that do not exist, are repeated, or would leave a stack empty.
    """
    depths = stack_depths(state)
    check_layers(list(kept), sum(depths.values()))
    position, start = {}, 0
    for stack, depth in depths.items():
        layers = [layer for layer in sorted(kept) if start <= layer < start + depth]
        if not layers:
            raise ValueError(f"no layer of {stack} ({start}..{start + depth - 1}) is kept: name at least one")
        position.update({(stack, layer - start): new for new, layer in enumerate(layers)})
        start += depth
    pruned = {}
    for key, value in state.items():
        match = BLOCK_KEY.fullmatch(key)
        if not match:
            pruned[key] = value
        elif (match[1], int(match[2])) in position:
            pruned[f"{match[1]}.{position[match[1], int(match[2])]}.{match[3]}"] = value
    return {key: value for key, value in pruned.items() if not key.startswith("gumbel_gates.")}
