"""Samplers: DPM-Solver++ on our own noise schedule, and guidance on a part of the way."""

import pytest
import torch

from diffusion import create_diffusion
from diffusion.flow import OdeSampler, SdeSampler
from diffusion.samplers import GaussianSampler, dpm_scheduler
from families.sit import LAST_STEPS, PATHS, PREDICTIONS
from models import DiT, SiT


def make(network):
    torch.manual_seed(0)
    net = network(4, 2, 2, 16, 2, 2, num_classes=5).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return net


@pytest.fixture(scope="module")
def net():
    return make(DiT)


@pytest.fixture(scope="module")
def flow_net():
    return make(SiT)


def count_rows(net, sampler, n=3):
    """Samples, and how many rows the network was given at each call."""
    rows = []
    handle = net.x_embedder.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    torch.manual_seed(0)
    out = sampler(net, torch.arange(n), torch.randn(n, 2, 4, 4))
    handle.remove()
    return out, rows


def test_dpm_solver_runs_on_our_schedule():
    diffusion = create_diffusion()
    scheduler = dpm_scheduler(diffusion)
    assert torch.allclose(scheduler.alphas_cumprod.double(), diffusion.alphas_cumprod, rtol=2e-6)
    assert scheduler.config.algorithm_type == "dpmsolver++"
    assert scheduler.config.prediction_type == "epsilon"


def test_dpm_solver_converges_to_ddim(net):
    """Both follow the same ordinary differential equation, so with many steps they end at the same pictures."""
    whole = count_rows(net, GaussianSampler(create_diffusion("ddim1000"), "ddim"))[0]
    error = {}
    for steps in (5, 40):
        sampler = GaussianSampler(create_diffusion(), "dpmpp", num_steps=steps)
        found, rows = count_rows(net, sampler)
        assert rows == [3] * steps
        error[steps] = (found - whole).abs().max().item() / whole.abs().max().item()
    assert error[40] < 0.02
    assert error[40] < error[5] / 4


@pytest.mark.parametrize("method", ["ddpm", "ddim", "dpmpp"])
def test_guidance_interval(net, method):
    """The network is run twice on the part that is guided, and once on the rest."""
    diffusion = create_diffusion("" if method == "dpmpp" else "ddim10")
    options = {"cfg_scale": 3.0, "num_steps": 10}
    everywhere, rows = count_rows(net, GaussianSampler(diffusion, method, **options))
    assert rows == [6] * 10
    part, rows = count_rows(net, GaussianSampler(diffusion, method, cfg_interval=(0.2, 0.5), **options))
    assert rows == [3] * 2 + [6] * 3 + [3] * 5
    plain = count_rows(net, GaussianSampler(diffusion, method, cfg_scale=1.0, num_steps=10))[0]
    assert not torch.allclose(part, plain)
    assert not torch.allclose(part, everywhere)
    nowhere = count_rows(net, GaussianSampler(diffusion, method, cfg_interval=(0.0, 0.0), **options))[0]
    assert torch.equal(nowhere, plain)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("path", PATHS)
def test_flow_samplers_stay_off_singular_ends(flow_net, path, prediction):
    """Every last step, both methods of the SDE, and the ODE both ways."""
    samplers = [OdeSampler(path, prediction, method="euler", num_steps=4, reverse=r) for r in (False, True)]
    for method in ("Euler", "Heun"):
        for last_step in LAST_STEPS:
            for size in (0.0, 0.04):
                options = {"method": method, "last_step": last_step, "last_step_size": size, "num_steps": 4}
                samplers.append(SdeSampler(path, prediction, **options))
    for sampler in samplers:
        assert count_rows(flow_net, sampler)[0].isfinite().all(), vars(sampler)


@pytest.mark.parametrize("kind", ["ddpm", "sde"])
def test_noise_of_steps(net, flow_net, kind):
    """A sampler asks for the noise of every step in turn, by its number and the shape of one sample."""
    model, sampler = (
        (net, GaussianSampler(create_diffusion("4"))) if kind == "ddpm" else (flow_net, SdeSampler(num_steps=5))
    )
    asked, generator, y = [], torch.Generator().manual_seed(0), torch.arange(3)

    def step_noise(k, shape):
        asked.append((k, tuple(shape)))
        return torch.randn(3, *shape, generator=generator)

    start = torch.randn(3, 2, 4, 4, generator=generator)
    found = sampler(model, y, start, step_noise)
    assert asked == [(k, (2, 4, 4)) for k in range(4)]
    torch.manual_seed(0)
    assert torch.equal(sampler(model, y, torch.randn(3, 2, 4, 4)), found)
