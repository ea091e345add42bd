"""A running script: its processes, device, precision and seed, and what these do to a network."""

import shutil
import sys
from contextlib import nullcontext

import numpy as np
import torch
from torch import nn
from torch.utils._triton import has_triton

from engine import distributed
from pruning.gates import block_stacks

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def seed_everything(*parts):
    """Seed all of torch's generators from whole numbers such as (seed, step, rank)."""
    torch.manual_seed(int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0]))


def peak_memory(device):
    """Largest memory so far of this process in GB: of the GPU if it runs on one, else resident; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource  # Windows has none
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def cast_frozen_weights(net, precision):
    """Hold the matrices of `net` that are not trained in the dtype that autocast would cast them to at every call.

    The results are the same; the casts and half of the memory are saved.
    """
    for module in find_matrices(net).values() if precision != "fp32" else ():
        if not module.weight.requires_grad:
            for p in module.parameters(recurse=False):
                p.data = p.data.to(DTYPES[precision])
    return net


def find_matrices(net):
    """{name: module} of the modules of a network that autocast computes in half precision."""
    return {name: module for name, module in net.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}


class Run:
    """Processes, device and precision of a script.

    precision: None takes `default_precision` on a GPU and fp32 on a CPU. seed: of all generators, now. tf32: allow TF32
    matrix products on a GPU. one_thread: on a CPU, compute with one thread per process, so that the last bits do not
    depend on how many threads a launcher grants; for scripts whose output must not depend on the process count.
    sharded: training is split over the processes, see engine.sharding; InputError if there is only one. `home` is where
    networks are to be built: the device; if sharded the CPU, from where each process takes its part.
    """

    def __init__(
        self,
        device="auto",
        precision=None,
        seed=0,
        *,
        default_precision="fp32",
        tf32=True,
        one_thread=False,
        sharded=False,
    ):
        self.device = distributed.start_processes(device)
        if one_thread and self.device.type == "cpu":
            torch.set_num_threads(1)
        self.rank, self.world, self.is_main = distributed.rank(), distributed.world_size(), distributed.is_main()
        if sharded:
            from engine.sharding import check_sharding  # slow to import, and of no use where nothing is trained

            check_sharding(self.device)
        self.sharded, self.home = sharded, torch.device("cpu") if sharded else self.device
        # What the original computes in needs a GPU to be worth it: without one the default is fp32.
        self.precision = precision or (default_precision if self.on_gpu else "fp32")
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        self.seed = seed
        seed_everything(seed)

    @property
    def on_gpu(self):
        """Whether it computes on a GPU; batches are then read into pinned memory, from where one fetches them."""
        return self.device.type == "cuda"

    def compiles(self, asked):
        """Whether networks are compiled: as asked for; by default (None) on a GPU, if the compilers are there.

        By default not with --shard, which makes a graph of every block, more than torch keeps of one function.
        """
        return asked if asked is not None else self.on_gpu and not self.sharded and has_compilers()

    def autocast(self):
        """The context in which networks compute."""
        if self.precision == "fp32":
            return nullcontext()
        # The cache would hold the casts of all weights at once, which sharding is there to avoid.
        return torch.autocast(self.device.type, DTYPES[self.precision], cache_enabled=not self.sharded)

    def freeze(self, net, precision=None):
        """Prepare a network that is not trained at all, such as a teacher; precision: if not the run's."""
        net = cast_frozen_weights(net.eval().requires_grad_(False), precision or self.precision)
        if precision and precision != self.precision:
            options = {"dtype": DTYPES[precision], "enabled": precision != "fp32"}
            net.forward = torch.autocast(self.device.type, **options)(net.forward)
        return net

    def print(self, text):
        """Print from the main process."""
        if self.is_main:
            print(text, flush=True)


def has_compilers():
    """Whether torch can make kernels for a GPU: by Triton, which needs a C compiler for its first launch."""
    return has_triton() and any(map(shutil.which, ("cc", "gcc", "clang")))


def checkpoint_blocks(net):
    """Recompute the activations of every block in the backward instead of keeping them."""
    for stack in block_stacks(net):
        stack.checkpointing = True


def unfuse_attention(net):
    """Compute attention by plain matrix products.

    On a CPU in bf16, forward and backward take half the time of torch's fused attention, whose backward is slow there.
    """
    for module in net.modules():
        if hasattr(module, "fused_attn"):  # a switch of timm's
            module.fused_attn = False


def compile_blocks(net, backend="inductor"):
    """Compile a network block by block; names and weights stay as they are.

    In a gated network the number of samples changes with every layer and step: its graphs take any number at once,
    instead of one after another until torch's limit of recompilations is reached.
    """
    keep_graph_order = getattr(torch._C._dynamo.eval_frame, "_set_lru_cache", None)
    if keep_graph_order:  # or a checkpointed block may be recomputed by another graph than that of its forward
        keep_graph_order(False)
    for block in net.blocks_to_compile():
        block.compile(backend=backend, dynamic=True if hasattr(net, "gumbel_gates") else None)
