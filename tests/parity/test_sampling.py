"""Sampling trajectories with given noise, ancestral and DDIM, plain, clipped, and guided on a doubled batch."""

from functools import partial

import pytest
import torch

from diffusion import create_diffusion
from diffusion.samplers import GaussianSampler

from .golden import TOLERANCES, Golden, assert_close, names, precisions, recorded_network, stream

FILES = [Golden(name) for name in names("sampling_*.npz")]
CASES = [(z.name, case) for z in FILES for case in z.meta["streams"]]
GUIDED = [(z.name, "cfg") for z in FILES]


def load(name, case, dtype):
    z = Golden(name, dtype)
    facts = z.meta["streams"][case]
    noise = stream(z, facts["name"], facts["shape"], z.meta["profile_seed"])
    return z, recorded_network(z), create_diffusion(z.meta["spec"]), noise


def trajectory(z, net, diffusion, noise, case):
    ancestral = "ddpm" in z.name
    options = {"clip_denoised": case == "clip" or z.meta["clip_denoised"], "model_kwargs": {"y": z["y"]}}
    if not ancestral:
        options["eta"] = z.meta["eta"] if case == "eta" else 0.0
    model, start = net, z["z"]
    if case == "cfg":
        model = partial(net.forward_with_cfg, cfg_scale=z.meta["cfg_scale"])
        start, options["model_kwargs"] = torch.cat([start, start]), {"y": z["y_cfg"]}
    step = diffusion.p_sample if ancestral else diffusion.ddim_sample
    return list(diffusion.trajectory(step, model, start.shape, noise=start, step_noise=noise, **options))


@pytest.mark.parametrize(("name", "case"), CASES)
@precisions
def test_every_step(name, case, dtype):
    z, net, diffusion, noise = load(name, case, dtype)
    z.check("timestep_map", diffusion.timestep_map, "exact")
    steps = trajectory(z, net, diffusion, noise, case)
    assert len(steps) == z.meta["streams"][case]["calls"], f"{name}: noise calls of {case}"
    z.check(f"{case}.samples", torch.stack([out["sample"] for out in steps]), "loss")
    if dtype == torch.float64:
        z.check(f"{case}.pred_xstart", torch.stack([out["pred_xstart"] for out in steps]), "loss")


@pytest.mark.parametrize(("name", "case"), GUIDED)
@precisions
@torch.no_grad()
def test_guided_sampler(name, case, dtype):
    """The sampler keeps one half of the doubled batch, and its result is that half of the recorded one."""
    z, net, diffusion, noise = load(name, case, dtype)
    sampler = GaussianSampler(diffusion, "ddpm" if "ddpm" in name else "ddim", z.meta["cfg_scale"])
    n = len(z["z"])
    found = sampler(net, z["y"], z["z"], step_noise=lambda k: noise(k)[:n])
    expected, single = z.recorded(f"{case}.samples")
    what = f"{name}: first half of the last {case}.samples"
    assert_close(found, expected[-1, :n], TOLERANCES["loss"][0 if single else 1], what)
