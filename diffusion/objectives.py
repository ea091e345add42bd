"""What a family trains on. An objective owns the schedule and no parameters; it makes and uses the draws of a step."""

from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class Draw:
    """All random numbers of one training step but the gates': shared by teacher and student, and given by tests."""

    t: torch.Tensor  # (N,)
    noise: torch.Tensor  # like x
    drop: torch.Tensor | None = None  # (N,) bool, labels that become null


class GaussianObjective(nn.Module):
    """DiT: predict the noise (and the variance) of latents x (N, C, H, W) with labels y (N,)."""

    def __init__(self, diffusion):
        super().__init__()
        self.diffusion = diffusion

    def draw(self, net, x, y):
        """Draw steps, noise and, in training mode, label drops, in this order."""
        t = torch.randint(0, self.diffusion.num_timesteps, (len(x),), device=x.device)
        return Draw(t, torch.randn_like(x), net.draw_drop(len(x), x.device))

    def predict(self, net, x, y, draw, observe=None, mask=None):
        """Run `net` on the noised latents -> (N, C or 2C, H, W); `observe` and `mask` as for the network."""
        x_t = self.diffusion.q_sample(x, draw.t, draw.noise)
        return self.diffusion.run(net, x_t, draw.t, {"y": y, "drop": draw.drop, "observe": observe, "mask": mask})

    def noise_share(self, draw):
        """Share of noise in the variance of what the network sees, (N,)."""
        return 1 - self.diffusion.alphas_cumprod[draw.t]

    def loss(self, prediction, x, draw):
        """The original loss: dict of per-sample terms (N,), `loss` among them."""
        x_t = self.diffusion.q_sample(x, draw.t, draw.noise)
        return self.diffusion.loss_terms(prediction, x, x_t, draw.t, draw.noise)

    def match(self, student, teacher, x, draw):
        """Distillation of the output: dict of per-sample terms (N,), `kd_loss` among them."""
        x_t = self.diffusion.q_sample(x, draw.t, draw.noise)
        return self.diffusion.distillation_terms(student, teacher, x, x_t, draw.t)


class TrainStep(nn.Module):
    """One training step of a network, plain or gated: (x, y) -> dict of per-sample losses. DDP wraps this."""

    def __init__(self, net, objective):
        super().__init__()
        self.net, self.objective = net, objective

    def forward(self, x, y):
        draw = self.objective.draw(self.net, x, y)
        return self.objective.loss(self.objective.predict(self.net, x, y, draw), x, draw)
