"""From a network, labels and noise to latents: guided sampling with a Gaussian diffusion."""

from functools import partial

import torch
from torch import nn
from tqdm import tqdm


def guided(net, cfg_scale, cfg_channels=3):
    """A model (x, t, y) -> output, guided on the first `cfg_channels` channels if cfg_scale > 1."""

    def model(x, t, y):
        if cfg_scale <= 1:
            return net(x, t, y)
        x, t, y = torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, torch.full_like(y, net.num_classes)])
        return net.forward_with_cfg(x, t, y, cfg_scale, cfg_channels).chunk(2)[0]

    return model


class GaussianSampler(nn.Module):
    """DiT's samplers, without clipping: "ddpm" (ancestral), "ddim" and "dpmpp" (DPM-Solver++, arXiv 2211.01095).

    The first two go through all steps of `diffusion`, which is respaced for them; the third takes `num_steps` of a
    whole chain. cfg_interval: the part of the way, from noise (0) to picture (1), on which guidance is applied (arXiv
    2404.07724); elsewhere the network runs once instead of twice.
    """

    def __init__(self, diffusion, method="ddpm", cfg_scale=1.0, cfg_channels=3, cfg_interval=(0, 1), num_steps=None):
        super().__init__()
        self.diffusion = diffusion
        self.method, self.solve = method, {"ddpm": self._chain, "ddim": self._chain, "dpmpp": self._dpmpp}[method]
        self.steps = num_steps if method == "dpmpp" else diffusion.num_timesteps
        self.cfg_scale, self.cfg_channels, self.cfg_interval = cfg_scale, cfg_channels, cfg_interval

    @torch.no_grad()
    def forward(self, net, y, noise, step_noise=None, progress=False):
        """Labels y (N,) and start noise (N, C, H, W) -> latents (N, C, H, W).

        step_noise(k, shape) gives the k-th standard normal tensor (N, *shape); without it noise is drawn where needed.
        """

        def model(k, x, t):
            first, last = self.cfg_interval
            scale = self.cfg_scale if first <= k / self.steps < last else 1.0
            return guided(net, scale, self.cfg_channels)(x, t, y)

        bar = tqdm(range(self.steps), disable=not progress, desc="sampling", leave=False)
        return self.solve(model, noise, bar, step_noise or (lambda k, shape: torch.randn_like(noise)))

    def _chain(self, model, x, steps, step_noise):
        take = {"ddpm": self.diffusion.p_sample, "ddim": self.diffusion.ddim_sample}[self.method]
        none = torch.zeros_like(x)  # DDIM adds no noise, so none is drawn
        for k in steps:
            t = torch.full((len(x),), self.steps - 1 - k, device=x.device)
            noise = step_noise(k, x.shape[1:]) if self.method == "ddpm" else none
            x = take(partial(model, k), x, t, clip_denoised=False, noise=noise)["sample"]
        return x

    def _dpmpp(self, model, x, steps, step_noise):
        scheduler = dpm_scheduler(self.diffusion)
        scheduler.set_timesteps(self.steps, device=x.device)
        scheduler.set_begin_index(0)  # or it would look the first step up on the device
        for k, step in zip(steps, scheduler.timesteps, strict=True):
            output = self.diffusion.run(partial(model, k), x, step.expand(len(x)))
            x = scheduler.step(output[:, : x.shape[1]], step, x, return_dict=False)[0]
        return x


def dpm_scheduler(diffusion):
    """diffusers' DPM-Solver++ of second order over the betas of a whole chain that predicts noise."""
    from diffusers import DPMSolverMultistepScheduler  # slow to import, and only needed here

    betas = diffusion.betas.tolist()
    return DPMSolverMultistepScheduler(diffusion.num_timesteps, trained_betas=betas, solver_order=2)
