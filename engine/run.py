"""A run: processes, device, precision, seeds, and a folder with config.json, log.txt and metrics.jsonl."""

import json
import logging
import os
import re
import resource
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import nn

from engine import distributed
from engine.checkpoint import read_file, write_atomically
from engine.errors import InputError, check_folder
from families import block_stacks

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Flags that may change when the same command resumes a run: they do not change its numbers.
FREE_FLAGS = {"device", "num_workers", "log_every", "ckpt_every", "resume", "save_model", "unused", "compile"}
FREE_FLAGS |= {"grad_checkpointing"}


def seed_everything(*parts):
    """Seed all of torch's generators from whole numbers such as (seed, step, rank)."""
    torch.manual_seed(int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0]))


def peak_memory(device):
    """Largest memory so far of this process, in GB: of the GPU if it runs on one, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def hold_frozen(net, precision):
    """Hold the matrices of `net` that are not trained in the dtype that autocast would cast them to at every call.

    The results are the same; the casts and half of the memory are saved.
    """
    for module in net.modules() if precision != "fp32" else ():
        if isinstance(module, nn.Linear | nn.Conv2d) and not module.weight.requires_grad:
            for p in module.parameters(recurse=False):
                p.data = p.data.to(DTYPES[precision])
    return net


class Run:
    """Processes, device and precision of a script; `open_folder` adds a folder for what it writes.

    one_thread: on a CPU, compute with one thread per process, so that the last bits do not depend on how many threads a
    launcher grants; scripts whose output must not depend on the process count ask for it.
    """

    def __init__(self, args, default_precision="fp32", one_thread=False):
        self.device = distributed.start_processes(args.device)
        if one_thread and self.device.type == "cpu":
            torch.set_num_threads(1)
        self.rank, self.world, self.is_main = distributed.rank(), distributed.world_size(), distributed.is_main()
        # What the original computes in needs a GPU to be worth it: without one the default is fp32.
        on_gpu = self.device.type == "cuda"
        self.precision = getattr(args, "precision", None) or (default_precision if on_gpu else "fp32")
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = getattr(args, "tf32", True)
        self.args, self.folder, self.logger = args, None, None
        self.seed = getattr(args, "global_seed", getattr(args, "seed", 0))
        seed_everything(self.seed)

    def autocast(self):
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, DTYPES[self.precision])

    def compile(self, net):
        """Compile every block of a network, if --compile asks for it; names and weights stay as they are."""
        args = self.args
        for stack in block_stacks(net) if getattr(args, "compile", False) else ():
            for block in stack:
                block.compile()

    def freeze(self, net):
        """Prepare a network that is not trained at all, such as a teacher."""
        return hold_frozen(net.eval().requires_grad_(False), self.precision)

    def print(self, text):
        if self.is_main:
            print(text, flush=True)

    def open_folder(self):
        """Make or reopen <results>/<prefix>-<model> and the log in it.

        Raises InputError if the folder belongs to a run with other settings, unless --resume is given.
        """
        args = self.args
        if args.resume and "train_steps" not in read_file(args.resume, "--resume"):
            raise InputError(f"--resume {args.resume}: no training state; take a file of a run folder's checkpoints")
        self.folder = Path(run_folder(args))
        check_folder("--results-dir", self.folder / "checkpoints")
        config = {name: value for name, value in vars(args).items() if name not in FREE_FLAGS}
        config = json.loads(json.dumps(config, default=str))
        if not args.resume:
            check_same_config(self.folder / "config.json", config)
        self.config = config
        distributed.barrier()
        if self.is_main:
            (self.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            write_atomically(self.folder / "config.json", lambda file: file.write_text(json.dumps(config, indent=1)))
            self.logger = logging.getLogger(str(self.folder))
            self.logger.setLevel(logging.INFO)
            self.logger.propagate = False
            self.logger.handlers.clear()
            for handler in (logging.StreamHandler(sys.stdout), logging.FileHandler(self.folder / "log.txt")):
                handler.setFormatter(logging.Formatter("[%(asctime)s] %(message)s", "%Y-%m-%d %H:%M:%S"))
                self.logger.addHandler(handler)
            self.log(f"command: {' '.join([os.path.basename(sys.argv[0]), *sys.argv[1:]])}")
            self.log(f"{self.world} process(es), {self.device.type}, {self.precision}, folder {self.folder}")
        distributed.barrier()

    def log(self, text):
        if self.logger:
            self.logger.info(text)

    def newest_state(self):
        """The training state to continue from: --resume, else the newest in the folder, else None."""
        if self.args.resume:
            return Path(self.args.resume)
        found = [f for f in self.folder.glob("checkpoints/*.pt") if re.fullmatch(r"\d{7,}", f.stem)]
        return max(found, key=lambda f: int(f.stem), default=None)

    def write_metrics(self, row):
        if self.is_main:
            with open(self.folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")

    def drop_metrics_after(self, step):
        """Forget the rows of steps that a resumed run makes again."""
        path = self.folder / "metrics.jsonl"
        if self.is_main and path.exists():
            rows = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= step]
            write_atomically(path, lambda file: file.write_text("".join(row + "\n" for row in rows)))


def run_folder(args):
    return os.path.join(args.results_dir, "-".join(filter(None, [args.prefix, args.model.replace("/", "-")])))


def check_same_config(path, config):
    """Raise InputError if `path` records a run with other settings."""
    if not path.exists():
        return
    old = json.loads(path.read_text())
    different = [name for name in sorted(old) if old[name] != config.get(name)]  # flags added since have no old value
    if different:
        flag = "--" + different[0].replace("_", "-")
        raise InputError(
            f"--results-dir and --prefix: {path.parent} holds a run with {flag} {old.get(different[0])}, now it is "
            f"{config.get(different[0])}; take another --prefix, or repeat the old command to resume"
        )
