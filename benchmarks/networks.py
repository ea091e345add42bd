"""Networks at the size of DiT-XL and their floating point operations, for the benchmarks."""

import torch

from benchmarks.measure import autocast
from diffusion import create_diffusion
from diffusion.objectives import GaussianObjective
from models import SIZES, DiT

WIDTH, HEADS, TOKENS = SIZES["XL"]["hidden_size"], SIZES["XL"]["num_heads"], 256


def make_network(depth, device, **options):
    """A DiT of XL width with random weights that are nowhere zero, so that no shortcut is taken."""
    net = DiT(32, 2, 4, WIDTH, depth, HEADS, **options)
    for block in net.blocks:
        torch.nn.init.normal_(block.adaLN_modulation[1].weight, std=0.02)
    return net.to(device)


def objective(device):
    return GaussianObjective(create_diffusion()).to(device)


def batch(n, device):
    """Latents and labels."""
    return torch.randn(n, 4, 32, 32, device=device), torch.arange(n, device=device)


def block_flops(n):
    """Multiply-adds x 2 of one block's forward pass on n samples: linear maps, attention, modulation."""
    linear, attention = 12 * WIDTH**2 * TOKENS, 2 * TOKENS**2 * WIDTH
    return 2 * n * (linear + attention + 6 * WIDTH**2)


def backward_of(step, x, y, device, precision, keep_gradients=False):
    """A function that computes the gradients of one training step; keep_gradients: into memory that is there before."""
    for p in step.parameters():
        p.grad = torch.zeros_like(p) if keep_gradients and p.requires_grad else None

    def run():
        for p in step.parameters() if not keep_gradients else ():
            p.grad = None
        with autocast(device, precision):
            loss = step(x, y)["loss"].mean()
        loss.backward()

    return run
