"""From a network, labels and noise to latents: guided sampling with a Gaussian diffusion."""

import torch
from torch import nn


def guided(net, cfg_scale, cfg_channels=3):
    """A model (x, t, y) -> output, guided on the first `cfg_channels` channels if cfg_scale > 1."""

    def model(x, t, y):
        if cfg_scale <= 1:
            return net(x, t, y)
        null = torch.full_like(y, net.num_classes)
        doubled = net.forward_with_cfg(
            torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null]), cfg_scale, cfg_channels
        )
        return doubled[: len(x)]

    return model


class GaussianSampler(nn.Module):
    """DiT's samplers: "ddpm" (ancestral) and "ddim", without clipping, over a respaced chain."""

    def __init__(self, diffusion, method="ddpm", cfg_scale=1.0, cfg_channels=3):
        super().__init__()
        self.diffusion = diffusion
        self.loop = {"ddpm": diffusion.p_sample_loop, "ddim": diffusion.ddim_sample_loop}[method]
        self.cfg_scale, self.cfg_channels = cfg_scale, cfg_channels

    def forward(self, net, y, noise, step_noise=None, progress=False):
        """Labels y (N,) and start noise (N, C, H, W) -> latents (N, C, H, W); step_noise(k) as for `trajectory`."""
        return self.loop(
            guided(net, self.cfg_scale, self.cfg_channels),
            noise.shape,
            noise=noise,
            step_noise=step_noise,
            clip_denoised=False,
            model_kwargs={"y": y},
            progress=progress,
        )
