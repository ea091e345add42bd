"""SiT (arXiv 2401.08740): paths between noise (t = 0) and data (t = 1), their training loss, ODE and SDE samplers.

x_t = alpha(t) data + sigma(t) noise. Velocity of the path: alpha' data + sigma' noise.
"""

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from diffusion.gaussian_diffusion import mean_flat
from diffusion.objectives import Draw
from diffusion.samplers import guided

BETA_MIN, BETA_MAX = 0.1, 20.0  # of the VP path
NEAR = 1e-3  # usual distance to singular ends of time


class Coefficients(NamedTuple):
    """A path at times t: weights of data and noise, their derivatives, alpha' / alpha and the score's weight."""

    alpha: torch.Tensor
    d_alpha: torch.Tensor
    sigma: torch.Tensor
    d_sigma: torch.Tensor
    ratio: torch.Tensor
    score_weight: torch.Tensor  # w in velocity = ratio x + w score


def _coefficients(alpha, d_alpha, sigma, d_sigma, ratio):
    return Coefficients(alpha, d_alpha, sigma, d_sigma, ratio, ratio * sigma**2 - sigma * d_sigma)


def linear_path(t):
    return _coefficients(t, torch.ones_like(t), 1 - t, -torch.ones_like(t), 1 / t)


def gvp_path(t):
    angle, rate = t * (math.pi / 2), math.pi / 2
    return _coefficients(angle.sin(), rate * angle.cos(), angle.cos(), -rate * angle.sin(), rate / angle.tan())


def vp_path(t):
    log = -((1 - t) ** 2) * (BETA_MAX - BETA_MIN) / 4 - (1 - t) * BETA_MIN / 2
    beta = BETA_MIN + (1 - t) * (BETA_MAX - BETA_MIN)
    alpha, square = log.exp(), (2 * log).exp()
    sigma = (-torch.expm1(2 * log)).sqrt()
    # The score's weight is exactly beta / 2; the general expression would subtract equal numbers.
    return Coefficients(alpha, alpha * beta / 2, sigma, -square * beta / (2 * sigma), beta / 2, beta / 2)


PATHS = {"Linear": linear_path, "GVP": gvp_path, "VP": vp_path}
LOSS_WEIGHTS = {  # factor of the loss of noise and score
    None: lambda c: torch.ones_like(c.sigma),
    "velocity": lambda c: (c.score_weight / c.sigma) ** 2,
    "likelihood": lambda c: c.score_weight / c.sigma**2,
}


def at(path, t, ndim):
    """Coefficients of a path at times t (N,) as tensors (N, 1, ...) of `ndim` axes."""
    return PATHS[path](t.view(-1, *[1] * (ndim - 1)))


def velocity_of(output, prediction, x, c):
    """Velocity of the path at x for a network output and Coefficients c."""
    if prediction == "velocity":
        return output
    return c.ratio * x + c.score_weight * score_of(output, prediction, x, c)


def score_of(output, prediction, x, c):
    """Gradient of the log-density at x for a network output and Coefficients c."""
    if prediction == "velocity":
        q = c.alpha / c.d_alpha
        return (q * output - x) / (c.sigma**2 - q * c.d_sigma * c.sigma)
    return -output / c.sigma if prediction == "noise" else output


def diffusion_coefficient(form, norm, t, c):
    """Strength g of the noise of the SDE, drift = velocity + g score (section 3.2), shaped like t."""
    forms = {
        "constant": lambda: torch.full_like(t, norm),
        "SBDM": lambda: norm * c.score_weight,
        "sigma": lambda: norm * c.sigma,
        "linear": lambda: norm * (1 - t),
        "decreasing": lambda: (norm * torch.cos(math.pi * t) + 1) ** 2 / 4,
        "increasing-decreasing": lambda: norm * torch.sin(math.pi * t) ** 2,
    }
    return forms[form]()


def time_limits(path, prediction, use, eps=None, form="sigma", last_step_size=0.0, reverse=False):
    """First and last time of `use`: "train", "ode" or "sde"; eps: distance to singular ends, or None for the usual."""
    singular = path == "VP" or prediction != "velocity"
    usual = 1e-5 if use == "train" and path == "VP" else NEAR
    near = (usual if singular else 0.0) if eps is None else eps
    first, last = 0.0 if path == "VP" else near, 1 - near
    if use == "sde":
        last = 1 - (last_step_size or near)
        if path != "VP" and form == "SBDM":
            first = near or usual  # its noise is infinite at t = 0
    return (1 - first, 1 - last) if reverse else (first, last)


class FlowObjective(nn.Module):
    """SiT: predict velocity, noise or score of latents x (N, C, H, W) with labels y (N,) on a path."""

    def __init__(self, path="Linear", prediction="velocity", loss_weight=None, train_eps=None):
        super().__init__()
        self.path, self.prediction, self.weight = path, prediction, LOSS_WEIGHTS[loss_weight]
        self.limits = time_limits(path, prediction, "train", train_eps)

    def draw(self, net, x, y):
        """Draw noise, times and, in training mode, label drops, in this order."""
        first, last = self.limits
        noise = torch.randn_like(x)
        t = torch.rand(len(x), dtype=x.dtype, device=x.device) * (last - first) + first
        return Draw(t, noise, net.draw_drop(len(x), x.device))

    def _point(self, x, draw):
        c = at(self.path, draw.t, x.ndim)
        return c.alpha * x + c.sigma * draw.noise, c

    def predict(self, net, x, y, draw, observe=None, mask=None):
        """Run `net` on the points of the path -> (N, C, H, W); `observe` and `mask` as for the network."""
        output = net(self._point(x, draw)[0], draw.t, y, drop=draw.drop, observe=observe, mask=mask)
        return output.to(torch.promote_types(output.dtype, torch.float32))

    def noise_share(self, draw):
        """Share of noise in the variance of what the network sees, (N,)."""
        c = at(self.path, draw.t, 1)
        return c.sigma**2 / (c.alpha**2 + c.sigma**2)

    def loss(self, prediction, x, draw):
        """The original loss: dict of per-sample terms (N,), here `loss` alone."""
        c = at(self.path, draw.t, x.ndim)
        if self.prediction == "velocity":
            return {"loss": mean_flat((prediction - c.d_alpha * x - c.d_sigma * draw.noise) ** 2)}
        error = prediction - draw.noise if self.prediction == "noise" else c.sigma * prediction + draw.noise
        return {"loss": mean_flat(self.weight(c) * error**2)}

    def match(self, student, teacher, x, draw):
        """Distillation of the output: mean squared difference (N,) as `kd_loss`."""
        return {"kd_loss": mean_flat((student - teacher.detach()) ** 2)}


class FlowSampler(nn.Module):
    """What both samplers share: the network's output at a time of the path, guided on the first `cfg_channels`."""

    def __init__(self, path, prediction, cfg_scale, cfg_channels, num_steps):
        super().__init__()
        if num_steps < 2:
            raise ValueError(f"{num_steps} grid points: expected 2 or more, a step lies between two")
        self.path, self.prediction, self.num_steps = path, prediction, num_steps
        self.cfg_scale, self.cfg_channels = cfg_scale, cfg_channels

    def evaluate(self, model, x, t):
        """(output, Coefficients) at time t, a number or tensor (); one call of the network."""
        times = torch.as_tensor(t, dtype=x.dtype, device=x.device).expand(len(x))
        output = model(x, times)
        return output.to(x.dtype), at(self.path, times, x.ndim)

    def velocity(self, model, x, t):
        output, c = self.evaluate(model, x, t)
        return velocity_of(output, self.prediction, x, c)

    @torch.no_grad()
    def forward(self, net, y, noise, step_noise=None, progress=False):
        """Labels y (N,) and start noise (N, C, H, W) -> latents (N, C, H, W).

        step_noise(k, shape) gives the k-th standard normal tensor (N, *shape); without it noise is drawn where needed.
        """
        return self.trajectory(net, y, noise, step_noise, progress)[-1][: len(y)]


class OdeSampler(FlowSampler):
    """The probability-flow ODE by torchdiffeq, whose method names apply; adaptive ones choose their own steps.

    num_steps counts points of the time grid, one more than the steps of a fixed-step method. Guided, the state stays
    doubled, as for published numbers: an adaptive solver controls its error on all of it.
    """

    def __init__(
        self, path="Linear", prediction="velocity", cfg_scale=1.0, cfg_channels=3, num_steps=50, method="dopri5",
        atol=1e-6, rtol=1e-3, sample_eps=None, reverse=False,
    ):  # fmt: skip
        super().__init__(path, prediction, cfg_scale, cfg_channels, num_steps)
        self.method, self.tolerances = method, {"atol": atol, "rtol": rtol}
        from torchdiffeq._impl.odeint import SOLVERS

        if method not in SOLVERS:
            raise ValueError(f"{method!r} is not a method of torchdiffeq: expected one of {', '.join(SOLVERS)}")
        first, last = time_limits(path, prediction, "ode", sample_eps, reverse=reverse)
        if first == 1 and prediction == "noise":  # VP in reverse: there the score of a noise is infinite
            first = 1 - (sample_eps or NEAR)
        self.limits = first, last

    def trajectory(self, net, y, noise, step_noise=None, progress=False):
        """States (num_steps, N, C, H, W); guided, 2N, of which the first N are the samples."""
        from torchdiffeq import odeint

        x, model = noise, partial(net, y=y)
        if self.cfg_scale > 1:
            labels, x = torch.cat([y, torch.full_like(y, net.num_classes)]), torch.cat([noise, noise])
            guidance = {"cfg_scale": self.cfg_scale, "cfg_channels": self.cfg_channels}
            model = partial(net.forward_with_cfg, y=labels, **guidance)
        times = torch.linspace(*self.limits, self.num_steps, dtype=x.dtype, device=x.device)
        with tqdm(disable=not progress, desc="network calls", leave=False) as bar:

            def drift(t, x):
                bar.update()
                return self.velocity(model, x, t)

            return odeint(drift, x, times, method=self.method, **self.tolerances)


class SdeSampler(FlowSampler):
    """The reverse-time SDE by Euler-Maruyama or Heun, then one step of length `last_step_size` without noise.

    num_steps counts points of the time grid. The network runs once for every drift: velocity and score are functions of
    the same output.
    """

    def __init__(
        self, path="Linear", prediction="velocity", cfg_scale=1.0, cfg_channels=3, num_steps=250, method="Euler",
        diffusion_form="sigma", diffusion_norm=1.0, last_step="Mean", last_step_size=0.04, sample_eps=None,
    ):  # fmt: skip
        super().__init__(path, prediction, cfg_scale, cfg_channels, num_steps)
        if method not in ("Euler", "Heun"):
            raise ValueError(f"{method!r} is not a method for the SDE: expected Euler or Heun")
        self.method, self.form, self.norm, self.last_step = method, diffusion_form, diffusion_norm, last_step
        self.last_step_size = 0.0 if last_step == "None" else last_step_size
        first, last = time_limits(path, prediction, "sde", sample_eps, diffusion_form, self.last_step_size)
        if last == 1 and method == "Heun":  # it looks at the end as well, where the score of a velocity is 0 / 0
            last = 1 - NEAR
        self.limits = first, last

    def drift(self, model, x, t):
        """velocity + g score at time t."""
        output, c = self.evaluate(model, x, t)
        score = score_of(output, self.prediction, x, c)
        return velocity_of(output, self.prediction, x, c) + self._strength(t, x) * score

    def _strength(self, t, x):
        t = torch.as_tensor(t, dtype=x.dtype, device=x.device).view(1)
        return diffusion_coefficient(self.form, self.norm, t, PATHS[self.path](t))

    def _finish(self, model, x, t):
        h = self.last_step_size
        if not h:
            return x
        if self.last_step == "Mean":
            return x + h * self.drift(model, x, t)
        if self.last_step == "Euler":
            return x + h * self.velocity(model, x, t)
        output, c = self.evaluate(model, x, t)
        return (x + c.sigma**2 * score_of(output, self.prediction, x, c)) / c.alpha

    def trajectory(self, net, y, noise, step_noise=None, progress=False):
        """States after every step and after the last one: a list of num_steps tensors (N, C, H, W)."""
        model = partial(guided(net, self.cfg_scale, self.cfg_channels), y=y)
        times = torch.linspace(*self.limits, self.num_steps, dtype=noise.dtype, device=noise.device)
        h, x, states = times[1] - times[0], noise, []
        for k in tqdm(range(self.num_steps - 1), disable=not progress, desc="sampling", leave=False):
            t = times[k]
            step = torch.randn_like(noise) if step_noise is None else step_noise(k, noise.shape[1:])
            scattered = (2 * self._strength(t, x)).sqrt() * h.sqrt() * step
            if self.method == "Euler":
                x = x + h * self.drift(model, x, t) + scattered
            else:
                x = x + scattered
                first = self.drift(model, x, t)
                x = x + h / 2 * (first + self.drift(model, x + h * first, t + h))
            states.append(x)
        return [*states, self._finish(model, x, times[-1])]


def log_likelihood(net, x, y, sampler, probe=None):
    """Log-density (N,) of data x in nats, by Euler steps along the ODE to the noise, and where they end.

    probe(k, x): random signs of Hutchinson's estimate of the divergence; without it one draw serves the whole solve.
    """
    fixed = torch.randint(0, 2, x.shape, device=x.device).to(x.dtype) * 2 - 1
    times = torch.linspace(*sampler.limits, sampler.num_steps, dtype=x.dtype, device=x.device)
    divergence, h = x.new_zeros(len(x)), times[1] - times[0]
    for k, s in enumerate(times[:-1]):
        signs = fixed if probe is None else probe(k)
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            v = sampler.velocity(lambda x, t: net(x, t, y), x, 1 - s)
            (slope,) = torch.autograd.grad((v * signs).sum(), x)
        divergence = divergence + h * (slope * signs).flatten(1).sum(1)
        x = (x - h * v).detach()
    prior = -0.5 * (x**2 + math.log(2 * math.pi)).flatten(1).sum(1)
    return prior - divergence, x
