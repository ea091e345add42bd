"""Sampling trajectories with given noise, ancestral and DDIM, plain, clipped, and guided on a doubled batch."""

from functools import partial

import pytest
import torch

from diffusion import create_diffusion
from diffusion.samplers import GaussianSampler

from .golden import Golden, names, precisions, recorded_network, stream

FILES = names("sampling_*.npz")
CASES = [(name, case) for name in FILES for case in Golden(name).meta["streams"]]


def load(name, case, dtype):
    z = Golden(name, dtype)
    facts = z.meta["streams"][case]
    noise = stream(z, facts["name"], facts["shape"], z.meta["profile_seed"])
    return z, recorded_network(z), create_diffusion(z.meta["spec"]), noise


@pytest.mark.parametrize(("name", "case"), CASES)
@precisions
def test_every_step(name, case, dtype):
    z, model, diffusion, noise = load(name, case, dtype)
    z.check("timestep_map", diffusion.timestep_map, "exact")
    options = {"clip_denoised": case == "clip" or z.meta["clip_denoised"], "model_kwargs": {"y": z["y"]}}
    start, step = z["z"], diffusion.p_sample
    if "ddim" in name:
        options["eta"], step = z.meta["eta"] if case == "eta" else 0.0, diffusion.ddim_sample
    if case == "cfg":
        model = partial(model.forward_with_cfg, cfg_scale=z.meta["cfg_scale"])
        start, options["model_kwargs"] = torch.cat([start, start]), {"y": z["y_cfg"]}
    steps = list(diffusion.trajectory(step, model, start.shape, noise=start, step_noise=noise, **options))
    assert len(steps) == z.meta["streams"][case]["calls"], f"{name}: noise calls of {case}"
    z.check(f"{case}.samples", torch.stack([out["sample"] for out in steps]), "loss")
    if dtype == torch.float64:
        z.check(f"{case}.pred_xstart", torch.stack([out["pred_xstart"] for out in steps]), "loss")


@pytest.mark.parametrize("name", FILES)
@precisions
@torch.no_grad()
def test_guided_sampler(name, dtype):
    """The sampler keeps one half of the doubled batch, and its result is that half of the recorded one."""
    z, net, diffusion, noise = load(name, "cfg", dtype)
    sampler, n = GaussianSampler(diffusion, "ddim" if "ddim" in name else "ddpm", z.meta["cfg_scale"]), len(z["z"])
    found = sampler(net, z["y"], z["z"], step_noise=lambda k, shape: noise(k)[:n])
    z.check("cfg.samples", found, "loss", lambda array: array[-1, :n], " (first half, last step)")
