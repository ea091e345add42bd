"""`--shard`: weights, gradients, AdamW's averages and the averaged copy, split over the processes (torch's FSDP2).

Each process holds its rows of every tensor, as a DTensor; a block's weights are brought together while it runs. States
stay what they are without it: whole tensors, put together in the main process and taken apart by every process.
"""

from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate

from engine.distributed import all_reduce, is_main, map_leaves, rank, world_size
from engine.errors import InputError
from pruning.gates import block_stacks


def check_sharding(device):
    """Raise InputError if there is only one process, or if this torch cannot do it on `device`."""
    if not hasattr(torch.get_device_module(device).Stream, "record_event"):
        raise InputError(
            f"--shard with --device {device}: torch {torch.__version__} can do this on GPUs only; take torch 2.7 or "
            "newer, or leave it out"
        )
    if world_size() == 1:
        raise InputError(
            "--shard: there is 1 process, expected several to share the network; start with torchrun "
            "--nproc_per_node=N, or leave it out"
        )


def shard_training(step, groups, ema, device):
    """Split a training step, built on the CPU, over all processes, each with its part on `device`.

    step: module with the network `net` and perhaps a frozen `teacher`. groups: parameter groups of an optimizer. ema:
    engine.optim.Ema of the network or of its gates. Gates, which are small and read everywhere, stay whole: `step.net`
    keeps them as they are, and the optimizer trains replicas, which share their memory.
    Returns the groups with the new parameters, and the pairs (gate, its replica).
    """
    mesh = init_device_mesh(device.type, (world_size(),))
    names = {id(p): name for name, p in step.named_parameters()}
    for stack in block_stacks(step.net):
        stack.together = True
    with _set_aside_gates(step.net, device) as gates:
        if getattr(step, "teacher", None) is not None:
            # In the tree of the step: torch never forgets the order of calls in a tree without a backward.
            step.sharded_teacher = _shard_network(step.teacher, mesh)
        _shard_network(step.net, mesh, root=step)
    _follow(ema.module, ema.source, device)
    ema.link()
    replicas = {gate: nn.Parameter(DTensor.from_local(gate.detach(), mesh, [Replicate()])) for gate in gates}
    found = dict(step.named_parameters())
    now = {key: replicas.get(found[name], found[name]) for key, name in names.items()}
    return [{**group, "params": [now[id(p)] for p in group["params"]]} for group in groups], list(replicas.items())


@contextmanager
def _set_aside_gates(net, device):
    """Bring the gates of a network to `device` and out of reach, for as long as it is sharded; yields them."""
    gates = getattr(net, "gumbel_gates", None)
    if gates is None:
        yield []
        return
    net.gumbel_gates = None
    yield list(gates.to(device))
    net.gumbel_gates = gates


def _shard_network(net, mesh, root=None):
    """Split the blocks of a network one by one, and what else `root` holds as one; returns the root."""
    if torch.__version__ < (2, 8):
        net.float()  # weights that are brought together had to be of one type, and frozen ones may be in half precision
    for block in net.blocks_to_compile():
        fully_shard(block, mesh=mesh)
    return fully_shard(root or net, mesh=mesh)


@torch.no_grad()
def _follow(copied, source, device):
    """Split the parameters of a copy as those of its source now are, and bring the rest of it to `device`."""
    for name, p in source.named_parameters():
        place, _, own = name.rpartition(".")
        part = nn.Parameter(take_part(copied.get_parameter(name), p), requires_grad=False)
        setattr(copied.get_submodule(place), own, part)
    copied.to(device)


def take_part(value, like):
    """What this process holds of a whole tensor where `like` is a DTensor of its shape; else the value itself."""
    if not isinstance(like, DTensor) or not isinstance(value, torch.Tensor) or value.shape != like.shape:
        return value
    part = value
    if not like.placements[0].is_replicate():  # rows in even portions, of which the last may be short or missing
        start = rank() * -(-len(value) // world_size())
        part = value[start : start + len(like.to_local())]
    part = part.detach().to(like.device, copy=True)
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def take_parts(state, like):
    """Every tensor of {key: tensor or {name: tensor}} as `take_part` gives it for the tensor of the same key."""
    return {
        key: take_parts(value, dict.fromkeys(value, like.get(key)))
        if isinstance(value, dict)
        else take_part(value, like.get(key))
        for key, value in state.items()
    }


def put_together(state):
    """Nested dicts and lists with whole tensors, on the CPU, for every DTensor; None for these but in the main process.

    All processes have to call this.
    """

    def whole(leaf):
        if not isinstance(leaf, DTensor):
            return leaf
        tensor = leaf.full_tensor()
        return tensor.cpu() if is_main() else None

    return map_leaves(whole, state)


def hand_over(replicas):
    """Give replicas the gradients of their gates, as means over all processes."""
    for gate, replica in replicas:
        mean = all_reduce(gate.grad) / world_size()
        replica.grad = DTensor.from_local(mean, replica.device_mesh, replica.placements, run_check=False)
        gate.grad = None


@torch.no_grad()
def clip_gradients(params, limit):
    """Scale the gradients of DTensors down to the norm `limit` over all of them and all processes.

    Returns the norm before, a tensor (). In the steps of torch.nn.utils.clip_grad_norm_, which would wait for the other
    processes at every tensor.
    """
    grads = [p.grad for p in params if p.grad is not None]
    parts = [grad.to_local() for grad in grads]
    norms = {True: [parts[0].new_zeros(())], False: [parts[0].new_zeros(())]}  # of what is whole, and of what is not
    for grad, norm in zip(grads, torch._foreach_norm(parts), strict=True):
        norms[grad.placements[0].is_replicate()].append(norm)
    whole, split = (torch.stack(norms[kind]).square().sum() for kind in (True, False))
    norm = (all_reduce(split) + whole).sqrt()
    torch._foreach_mul_(parts, (limit / (norm + 1e-6)).clamp(max=1.0))
    return norm
