"""Networks at the size of DiT-XL and their floating point operations, for the benchmarks."""

from contextlib import nullcontext
from types import SimpleNamespace

import torch

from diffusion import create_diffusion
from diffusion.objectives import GaussianObjective, TrainStep
from engine.run import DTYPES
from families import create_model, family_of
from models import SIZES, DiT


def make_network(args, depth, **options):
    """A DiT of XL width with random weights that are nowhere zero, so that no shortcut is taken."""
    size = SIZES["T" if args.tiny else "XL"]
    net = DiT(8 if args.tiny else 32, 2, 4, size["hidden_size"], depth, size["num_heads"], **options)
    for block in net.blocks:
        torch.nn.init.normal_(block.adaLN_modulation[1].weight, std=0.02)
    return net.to(args.device)


def make_objective(args):
    return GaussianObjective(create_diffusion()).to(args.device)


def make_family_step(args, name, **config):
    """A training step of a registered network, whole, with the usual settings of its family, and a batch of latents."""
    family, name = family_of(name), f"{name[:3]}-T-1-2" if args.tiny else name
    settings = {flag.replace("-", "_"): row["default"] for flag, row in family.flags["train"].items()}
    net = create_model(name, **({} if args.tiny else config)).train().to(args.device)
    step = TrainStep(net, family.objective(SimpleNamespace(**settings)).to(args.device))
    n = 2 if args.tiny else 4
    return step, (torch.randn(n, net.in_channels, net.input_size, net.input_size), torch.arange(n))


def make_batch(args, n):
    """Latents and labels."""
    side = 8 if args.tiny else 32
    return torch.randn(n, 4, side, side, device=args.device), torch.arange(n, device=args.device)


def autocast(args, precision):
    """The context in which the project computes with this precision."""
    return nullcontext() if precision == "fp32" else torch.autocast(args.device.type, DTYPES[precision])


def block_flops(args, n):
    """Multiply-adds x 2 of one block's forward pass on n samples: linear maps, attention, modulation."""
    width, tokens = SIZES["T" if args.tiny else "XL"]["hidden_size"], 16 if args.tiny else 256
    return 2 * n * (12 * width**2 * tokens + 2 * tokens**2 * width + 6 * width**2)


def backward_of(args, step, batch, precision):
    """A function that computes the gradients of one training step; for memory, into tensors that are there before."""
    keep = bool(args.side)
    for p in step.parameters():
        p.grad = torch.zeros_like(p) if keep and p.requires_grad else None

    def run():
        for p in step.parameters() if not keep else ():
            p.grad = None
        with autocast(args, precision):
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
