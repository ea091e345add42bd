"""Sampling: pruned networks against DiT-XL/2 at full size, and bf16 against fp32."""

import torch

from benchmarks.measure import autocast, main
from benchmarks.networks import batch, block_flops, make_network
from diffusion import create_diffusion
from diffusion.samplers import GaussianSampler
from engine.run import hold_frozen

DEPTHS, BATCH, STEPS = {"XL": 28, "D19": 19, "D14": 14, "D7": 7}, 2, 3
CASES = {"depth": {"sides": {name: (depth, "fp32") for name, depth in DEPTHS.items()}}}
CASES["depth bf16"] = {"sides": {name: (depth, "bf16") for name, depth in DEPTHS.items()}, "precision": "bf16"}
CASES["precision"] = {"sides": {precision: (14, precision) for precision in ("fp32", "bf16")}, "precision": "bf16"}
BARS = {("depth", name): {"ratio": f">= {0.95 * 28 / depth:.3f}"} for name, depth in DEPTHS.items() if name != "XL"}
BARS["precision", "bf16"] = {"ratio": ">= 2.2"}


def make(device, sides, precision="fp32"):
    """Some guided steps of the ancestral sampler for every side, {name: (depth, precision)}."""
    noise, labels = batch(BATCH, device)
    sampler = GaussianSampler(create_diffusion(str(STEPS)), "ddpm", cfg_scale=4.0).to(device)

    def side(depth, precision):
        net = hold_frozen(make_network(depth, device).eval().requires_grad_(False), precision)

        def run():
            with torch.inference_mode(), autocast(device, precision):
                sampler(net, labels, noise)

        return run

    return {name: side(*settings) for name, settings in sides.items()}


def flops(side, sides, precision="fp32"):
    """Of the blocks, on a doubled batch."""
    return STEPS * sides[side][0] * block_flops(2 * BATCH)


if __name__ == "__main__":
    main(__name__)
