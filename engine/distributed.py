"""Processes: one per GPU under a launcher (NCCL), one per CPU share without GPUs (gloo), or a single one.

Small things such as refusals, decisions and signals go over gloo also where tensors go over NCCL.
"""

import os
import re
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from engine.errors import InputError, RunError

TIMEOUT = timedelta(minutes=10)  # until all processes are there, and for every exchange between them
MAIN_TIMEOUT = timedelta(hours=4)  # while the main process packs or evaluates 50,000 pictures

# Whether refusals were exchanged, and the group that waits for the main process.
_state = {"agreed": False, "patient": None}


def start_processes(device="auto"):
    """Join the process group of the launcher, if there is one, and return this process's torch.device.

    Raises InputError for a device that is not there, and RunError if the other processes do not come.
    """
    join_group()
    device = choose_device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        if dist.is_initialized():  # said here and not when joining, where NCCL would wait for those that refuse
            dist.group.WORLD.bound_device_id = device
    return device


def choose_device(name):
    """The torch.device that --device names, for this process. Raises InputError if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise InputError(f"--device {name}: expected auto, cpu, cuda or cuda:N")
    if name == "cpu":
        return torch.device(name)
    if not torch.cuda.is_available():
        raise InputError(f"--device {name}: this machine has no usable GPU; take --device cpu")
    local, there = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    index = int(name.partition(":")[2] or local)
    if ":" in name and world_size() > 1:
        raise InputError(f"--device {name}: {world_size()} processes cannot share one GPU; take --device cuda")
    if index >= there:
        raise InputError(f"--device cuda:{index}: this machine has {there} GPU(s), numbered from 0")
    return torch.device("cuda", index)


def join_group():
    """Join the launcher's process group, whatever device will be used."""
    if "RANK" not in os.environ or dist.is_initialized():
        return
    _state["agreed"] = False
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        dist.init_process_group(backend, timeout=TIMEOUT, **_find_others())
        _state["patient"] = dist.new_group(backend="gloo", timeout=MAIN_TIMEOUT)
    except (RuntimeError, ValueError) as error:  # of torch's store and of its variables
        reason = str(error).splitlines()[0]
        raise RunError(f"process {rank()} of {world_size()} cannot join the others ({reason})") from None


def _find_others():
    """Where processes find each other, as arguments of init_process_group.

    A launcher of one host that restarts its processes gives them the store of those before, whose addresses are
    outdated. Several hosts do not know the number of a restart in common: there the launcher has to make new stores.
    """
    if os.environ.get("GROUP_WORLD_SIZE") != "1" or "TORCHELASTIC_RESTART_COUNT" not in os.environ:
        return {}
    store, number, world = next(dist.rendezvous("env://", timeout=TIMEOUT))
    prefix = f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}"
    return {"store": dist.PrefixStore(prefix, store), "rank": number, "world_size": world}


def rank():
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world_size():
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def is_main():
    return rank() == 0


def is_first_of_host():
    """Whether this process is the one of its host that shows what all have found."""
    return int(os.environ.get("LOCAL_RANK", rank())) == 0


def barrier():
    """Wait for all processes, hours if the main process has much to do alone."""
    if dist.is_initialized():
        dist.barrier(_state["patient"])


def all_reduce(tensor, op="sum"):
    """Combine a tensor over all processes, in place: "sum", "min" or "max"."""
    if dist.is_initialized():
        dist.all_reduce(tensor, getattr(dist.ReduceOp, op.upper()))
    return tensor


def gather(value):
    """The small values of all processes, in the order of their ranks."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def on_main(work, patient=False):
    """work() in the main process; all return its small result, or raise its InputError or RunError.

    patient: the others wait for hours, as in `barrier`.
    """
    result = error = None
    if is_main():
        try:
            result = work()
        except (InputError, RunError) as found:
            error = found
    if dist.is_initialized():
        shared = [(result, error)]
        dist.broadcast_object_list(shared, src=0, group=_state["patient"] if patient else None)
        result, error = shared[0]
    if error:
        raise shared_error(error)
    return result


def broadcast(value):
    """The main process's tensors and plain values, nested in dicts and lists; the value of others is not looked at.

    Tensors arrive one by one on the CPU.
    """
    if not dist.is_initialized():
        return value
    own = []

    def describe(leaf):
        if not isinstance(leaf, torch.Tensor):
            return leaf
        own.append(leaf)
        return _Shape(tuple(leaf.shape), leaf.dtype)

    def receive(leaf):
        if not isinstance(leaf, _Shape):
            return leaf
        tensor = own.pop(0).contiguous() if is_main() else torch.empty(leaf.shape, dtype=leaf.dtype)
        dist.broadcast(tensor, src=0)
        return tensor

    skeleton = [map_leaves(describe, value) if is_main() else None]
    dist.broadcast_object_list(skeleton, src=0)
    return map_leaves(receive, skeleton[0])


@dataclass(frozen=True)
class _Shape:
    """Where a tensor belongs."""

    shape: tuple
    dtype: torch.dtype


def map_leaves(change, value):
    """Nested dicts, lists and tuples with change(leaf) for everything else in them, in their order."""
    if isinstance(value, dict):
        return {key: map_leaves(change, inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map_leaves(change, inner) for inner in value)
    return change(value)


def agree(about):
    """Compare {what: value} over all processes, before they do anything together.

    Raises RunError on all of them if one refused to start, see `refuse`, or if two differ.
    """
    found = gather((None, about))
    _state["agreed"] = True
    for k, (refusal, theirs) in enumerate(found):
        if refusal:
            raise shared_error(RunError(f"process {k} of {len(found)}: {refusal}"))
        for name, value in found[0][1].items():
            if theirs.get(name) != value:
                raise shared_error(
                    RunError(
                        f"processes disagree on {name}: {theirs.get(name)} in process {k}, {value} in process 0; start "
                        "all with the same command, code and files"
                    )
                )


def refuse(message):
    """Tell the other processes, which wait in `agree`, that this one does not start; returns whether to say it here."""
    if world_size() == 1 or _state["agreed"]:
        return True
    try:
        join_group()
        gather((message, {}))
    except (RuntimeError, ValueError):  # the others are gone
        return True
    _state["agreed"] = True
    return is_first_of_host()


def shared_error(error):
    """Mark an error that all processes raise: one of every host shows it."""
    error.shared = True
    return error


def shutdown():
    if dist.is_initialized():
        dist.destroy_process_group()
