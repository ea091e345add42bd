"""Sampling: pruned networks against DiT-XL/2 at full size, and bf16 against fp32."""

from functools import partial

import torch

from benchmarks.measure import Case, Side, main
from benchmarks.networks import autocast, block_flops, make_batch, make_network
from diffusion import create_diffusion
from diffusion.samplers import GaussianSampler
from engine.run import DTYPES, cast_frozen_weights

DEPTHS, STEPS = {"XL": 28, "D19": 19, "D14": 14, "D7": 7}, 2


def build(setup, depth=14, precision="bf16", n=2, compiled=False):
    """Some guided steps of the ancestral sampler, on a doubled batch."""
    depth, compiled = (2, False) if setup.tiny else (depth, compiled)  # compiling takes longer than the rest
    noise, labels = make_batch(setup, n)
    sampler = GaussianSampler(create_diffusion(str(STEPS)), "ddpm", cfg_scale=4.0).to(setup.device)
    net = cast_frozen_weights(make_network(setup, depth).eval().requires_grad_(False), precision)
    for block in net.blocks if compiled else ():
        block.compile()

    def run():
        with torch.inference_mode(), autocast(setup, precision):
            return sampler(net, labels, noise)

    return Side(run, n, STEPS * depth * block_flops(setup, 2 * n), DTYPES[precision])


def compare_depths(precision):
    bars = [("speedup", name, ">=", 0.95 * 28 / depth) for name, depth in DEPTHS.items() if name != "XL"]
    sides = {name: partial(build, depth=depth, precision=precision) for name, depth in DEPTHS.items()}
    return Case(f"depth {precision}", sides, bars, memory=False)


def compare_precisions(name, **options):
    sides = {precision: partial(build, precision=precision, **options) for precision in ("fp32", "bf16")}
    return Case(name, sides, [("speedup", "bf16", ">=", 2.2)], memory=False)


CASES = [compare_depths("bf16"), compare_depths("fp32")]
CASES += [compare_precisions("precision"), compare_precisions("compiled", compiled=True)]

if __name__ == "__main__":
    main(__spec__.name, __doc__, CASES)
