"""Processes: one per GPU under a launcher (NCCL), one per CPU share without GPUs (gloo), or a single one."""

import os
import re
from datetime import timedelta

import torch
import torch.distributed as dist

from engine.errors import InputError


def start_processes(device="auto"):
    """Join the process group of the launcher, if there is one, and return this process's torch.device.

    Raises InputError for a device that is not there.
    """
    local = int(os.environ.get("LOCAL_RANK", 0))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise InputError(f"--device {device}: expected auto, cpu, cuda or cuda:N")
    device = torch.device(device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise InputError(f"--device {device}: this machine has no usable GPU; take --device cpu")
        device = torch.device("cuda", local if device.index is None else device.index)
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        # The main process may pack or evaluate 50,000 pictures while the others wait.
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=4))
    return device


def rank():
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world_size():
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def is_main():
    return rank() == 0


def barrier():
    if dist.is_initialized():
        dist.barrier()


def all_reduce(tensor, op="sum"):
    """Combine a tensor over all processes, in place: "sum" or "min"."""
    if dist.is_initialized():
        dist.all_reduce(tensor, {"sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN}[op])
    return tensor


def shutdown():
    if dist.is_initialized():
        dist.destroy_process_group()
