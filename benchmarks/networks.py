"""Networks at the size of DiT-XL and their floating point operations, for the benchmarks."""

from contextlib import nullcontext

import torch

from diffusion import create_diffusion
from diffusion.objectives import GaussianObjective
from engine.run import DTYPES
from families.dit import SIZES
from models import DiT


def make_network(setup, depth, **options):
    """A DiT of XL width with random weights that are nowhere zero, so that no shortcut is taken."""
    size = SIZES["T" if setup.tiny else "XL"]
    net = DiT(8 if setup.tiny else 32, 2, 4, size["hidden_size"], depth, size["num_heads"], **options)
    for linear in (*(part.adaLN_modulation[1] for part in (*net.blocks, net.final_layer)), net.final_layer.linear):
        torch.nn.init.normal_(linear.weight, std=0.02)
    return net.to(setup.device)


def make_objective(setup):
    return GaussianObjective(create_diffusion()).to(setup.device)


def make_batch(setup, n):
    """Latents and labels."""
    side = 8 if setup.tiny else 32
    return torch.randn(n, 4, side, side, device=setup.device), torch.arange(n, device=setup.device)


def autocast(setup, precision):
    """The context in which the project computes with this precision."""
    return nullcontext() if precision == "fp32" else torch.autocast(setup.device.type, DTYPES[precision])


def block_flops(setup, n):
    """Multiply-adds x 2 of one block's forward pass on n samples: linear maps, attention, modulation."""
    width, tokens = SIZES["T" if setup.tiny else "XL"]["hidden_size"], 16 if setup.tiny else 256
    return 2 * n * (12 * width**2 * tokens + 2 * tokens**2 * width + 6 * width**2)


def backward_of(setup, step, batch, precision):
    """A function that computes the gradients of one training step; for memory, into tensors that are there before."""
    keep = setup.for_memory
    for p in step.parameters():
        p.grad = torch.zeros_like(p) if keep and p.requires_grad else None

    def run():
        for p in step.parameters() if not keep else ():
            p.grad = None
        with autocast(setup, precision):
            loss = step(*batch)["loss"].mean()
        loss.backward()

    return run


def weights_of(net, precision):
    """Weights and gradients, and of trained matrices the copies that autocast makes of them."""
    for p in net.parameters():
        yield p
        if p.requires_grad:
            yield p.grad
            if precision != "fp32" and p.ndim > 1:
                yield torch.empty_like(p, dtype=DTYPES[precision], device="meta")
