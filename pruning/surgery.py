"""Cut layers out of a state dict: the kept blocks are renumbered from 0, everything else stays as it was."""

import re

import torch

STACKS = ("blocks", "encoder_blocks", "decoder_blocks")  # names of the stacks of our own networks, in forward order


def read_key(key, stacks):
    """(stack, layer in it, the rest) of the key of a weight of a block; None for another key."""
    match = re.fullmatch(rf"({'|'.join(map(re.escape, stacks))})\.(\d+)\.(.+)", key)
    return match and (match[1], int(match[2]), match[3])


def stack_depths(state, stacks=STACKS):
    """Number of blocks in every stack of a state dict, in forward order: {"blocks": 28}."""
    depths = dict.fromkeys(stacks, 0)
    for key in state:
        if found := read_key(key, stacks):
            depths[found[0]] = max(depths[found[0]], found[1] + 1)
    return {stack: depth for stack, depth in depths.items() if depth}


def check_layers(kept, depth):
    """Raise ValueError unless `kept` are distinct layers of a network with `depth` layers."""
    if not kept:
        raise ValueError("no layer is kept: name at least one")
    for layer in kept:
        if not 0 <= layer < depth:
            raise ValueError(f"has {layer}, but the layers are 0..{depth - 1}")
        if kept.count(layer) > 1:
            raise ValueError(f"names layer {layer} {kept.count(layer)} times: name each layer once")


def average_dropped(state, kept, stacks=STACKS):
    """State dict in which every layer in `kept` is the mean of itself and the dropped layers that it is nearest to.

    Within a stack; of two kept layers as near as each other the earlier takes the dropped one in.
    """
    check_alike({key: value.shape for key, value in state.items()}, stacks)
    merged, start = dict(state), 0
    for stack, depth in stack_depths(state, stacks).items():
        stay = [layer - start for layer in sorted(kept) if start <= layer < start + depth]
        members = {layer: [] for layer in stay}
        for layer in range(depth if stay else 0):
            members[min(stay, key=lambda each, layer=layer: (abs(each - layer), each))].append(layer)
        for key, value in state.items():
            found = read_key(key, (stack,))
            if found and found[1] in members:
                names = [f"{stack}.{layer}.{found[2]}" for layer in members[found[1]]]
                parts = [state[name].double() for name in names if name in state]  # some blocks may have more weights
                merged[key] = torch.stack(parts).mean(0).to(value.dtype)
        start += depth
    return merged


def check_alike(shapes, stacks=STACKS):
    """Raise ValueError if a weight of blocks, of {key: shape}, has different shapes in a stack: it has no average."""
    seen = {}
    for key, shape in shapes.items():
        found = read_key(key, stacks)
        if found and seen.setdefault((found[0], found[2]), tuple(shape)) != tuple(shape):
            raise ValueError(f"{key} has another shape than in other layers, so they have no average; take --init kept")


def cut_layers(state, kept, init="kept", stacks=STACKS):
    """keep_layers of the start that `--init` names: `state` for "kept" and "learned", average_dropped for "average"."""
    start = average_dropped(state, kept, stacks) if init == "average" else state
    return keep_layers(start, kept, stacks)


def keep_layers(state, kept, stacks=STACKS):
    """State dict with only the layers `kept`, numbered through all stacks; gates are left out, tensors are shared.

    Raises ValueError for layers that do not exist, are repeated, or would leave a stack empty.
    """
    depths = stack_depths(state, stacks)
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
        found = read_key(key, stacks)
        if not found:
            pruned[key] = value
        elif found[:2] in position:
            pruned[f"{found[0]}.{position[found[:2]]}.{found[2]}"] = value
    return {key: value for key, value in pruned.items() if not key.startswith("gumbel_gates.")}
