"""Gaussian diffusion (DDPM, arXiv 2006.11239; learned variances, 2102.09672): losses, distillation terms, samplers."""

import math

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

LN2 = math.log(2.0)


def mean_flat(x):
    """Mean over all axes but the first: (N, ...) -> (N,)."""
    return x.flatten(1).mean(1)


def normal_kl(mean1, logvar1, mean2, logvar2):
    """KL(N1 || N2) of diagonal Gaussians, elementwise, in nats."""
    return 0.5 * (-1.0 + logvar2 - logvar1 + torch.exp(logvar1 - logvar2) + (mean1 - mean2) ** 2 * torch.exp(-logvar2))


def discretized_gaussian_log_likelihood(x, means, log_scales):
    """Log-probability, in nats, of 8-bit data x scaled to [-1, 1]; the first and last bin reach to infinity."""

    def cdf(value):  # tanh approximation of the normal cdf
        return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (value + 0.044715 * value**3)))

    centered, inv_std = x - means, torch.exp(-log_scales)
    upper, lower = cdf(inv_std * (centered + 1.0 / 255.0)), cdf(inv_std * (centered - 1.0 / 255.0))
    inner = torch.where(x > 0.999, 1.0 - lower, upper - lower)
    return torch.where(x < -0.999, upper, inner).clamp(min=1e-12).log()


class GaussianDiffusion(nn.Module):
    """A chain of noising steps. Its tables are float64 buffers; looked-up values are rounded to float32.

    betas: (steps,). timestep_map: the step number that the network is given at each step of this chain.
    mean: "noise" or "x_start", what the network predicts. variance: "learned_range", "fixed_small" or "fixed_large".
    loss: "mse", "rescaled_mse" (vb times steps / original_steps) or "kl" (bound in bits, times the number of steps).
    Networks are called as model(x, t, **model_kwargs) with x (N, C, H, W) and original step numbers t (N,).
    """

    def __init__(
        self, betas, timestep_map=None, mean="noise", variance="learned_range", loss="mse", original_steps=1000
    ):
        super().__init__()
        betas = np.asarray(betas, dtype=np.float64)
        if betas.ndim != 1 or not ((betas > 0) & (betas <= 1)).all():
            raise ValueError("betas must be one-dimensional, each in (0, 1]")
        self.num_timesteps, self.mean, self.variance, self.loss = len(betas), mean, variance, loss
        self.vb_weight = len(betas) / original_steps if loss == "rescaled_mse" else 1.0
        steps = torch.arange(len(betas)) if timestep_map is None else torch.as_tensor(list(timestep_map))
        self.register_buffer("timestep_map", steps, persistent=False)
        for name, table in self._tables(betas).items():
            self.register_buffer(name, torch.from_numpy(table), persistent=False)

    @staticmethod
    def _tables(betas):
        alphas, cumprod = 1.0 - betas, np.cumprod(1.0 - betas)
        prev, following = np.append(1.0, cumprod[:-1]), np.append(cumprod[1:], 0.0)
        posterior = betas * (1.0 - prev) / (1.0 - cumprod)
        # The posterior variance of step 0 is zero; its logarithm repeats step 1 (or beta, in a chain of one step).
        first = posterior[1] if len(betas) > 1 else betas[0]
        return {
            "betas": betas,
            "log_betas": np.log(betas),
            "alphas_cumprod": cumprod,
            "alphas_cumprod_prev": prev,
            "alphas_cumprod_next": following,
            "sqrt_alphas_cumprod": np.sqrt(cumprod),
            "sqrt_one_minus_alphas_cumprod": np.sqrt(1.0 - cumprod),
            "log_one_minus_alphas_cumprod": np.log(1.0 - cumprod),
            "sqrt_recip_alphas_cumprod": np.sqrt(1.0 / cumprod),
            "sqrt_recipm1_alphas_cumprod": np.sqrt(1.0 / cumprod - 1),
            "posterior_variance": posterior,
            "posterior_log_variance_clipped": np.log(np.append(first, posterior[1:])),
            "posterior_mean_coef1": betas * np.sqrt(prev) / (1.0 - cumprod),
            "posterior_mean_coef2": (1.0 - prev) * np.sqrt(alphas) / (1.0 - cumprod),
            "large_variance": np.append(first, betas[1:]),
            "large_log_variance": np.log(np.append(first, betas[1:])),
        }

    def _at(self, name, t, ndim):
        """Values of a table at steps t (N,), float32, shaped (N, 1, ...)."""
        return self.get_buffer(name)[t].float().view(-1, *[1] * (ndim - 1))

    # The forward process

    def q_mean_variance(self, x_start, t):
        """Mean, variance and log variance of q(x_t | x_0)."""
        ndim = x_start.ndim
        mean = self._at("sqrt_alphas_cumprod", t, ndim) * x_start
        log_variance = self._at("log_one_minus_alphas_cumprod", t, ndim)
        return mean, (1.0 - self.alphas_cumprod)[t].float().view(log_variance.shape), log_variance

    def q_sample(self, x_start, t, noise=None):
        """Noised data x_t for data x_0 (N, ...) and steps t (N,) of this chain."""
        noise = torch.randn_like(x_start) if noise is None else noise
        scale = self._at("sqrt_one_minus_alphas_cumprod", t, x_start.ndim)
        return self._at("sqrt_alphas_cumprod", t, x_start.ndim) * x_start + scale * noise

    def q_posterior_mean_variance(self, x_start, x_t, t):
        """Mean, variance and clipped log variance of q(x_{t-1} | x_t, x_0)."""
        ndim = x_t.ndim
        mean = self._at("posterior_mean_coef1", t, ndim) * x_start + self._at("posterior_mean_coef2", t, ndim) * x_t
        return mean, self._at("posterior_variance", t, ndim), self._at("posterior_log_variance_clipped", t, ndim)

    # The reverse process

    def run(self, model, x, t, model_kwargs=None):
        """The network's output at steps t of this chain, in at least float32; the only place that calls a network."""
        output = model(x, self.timestep_map[t], **(model_kwargs or {}))
        return output.to(torch.promote_types(output.dtype, torch.float32))

    def p_mean_variance(self, model, x, t, clip_denoised=True, model_kwargs=None):
        """Dict of mean, variance, log_variance and pred_xstart of p(x_{t-1} | x_t)."""
        return self.interpret(self.run(model, x, t, model_kwargs), x, t, clip_denoised)

    def interpret(self, output, x, t, clip_denoised=False):
        """What a network output (N, C or 2C, ...) at x_t says about the reverse step; same dict as p_mean_variance."""
        output, log_variance, variance = self._variance(output, x, t)
        x_start = output
        if self.mean == "noise":
            x_start = self._at("sqrt_recip_alphas_cumprod", t, x.ndim) * x
            x_start = x_start - self._at("sqrt_recipm1_alphas_cumprod", t, x.ndim) * output
        if clip_denoised:
            x_start = x_start.clamp(-1, 1)
        mean, _, _ = self.q_posterior_mean_variance(x_start, x, t)
        return {"mean": mean, "variance": variance, "log_variance": log_variance, "pred_xstart": x_start}

    def _variance(self, output, x, t):
        if self.variance == "learned_range":
            output, values = output.split(x.shape[1], dim=1)
            share = (values + 1) / 2
            smallest = self._at("posterior_log_variance_clipped", t, x.ndim)
            log_variance = share * self._at("log_betas", t, x.ndim) + (1 - share) * smallest
            return output, log_variance, log_variance.exp()
        names = {
            "fixed_large": ("large_log_variance", "large_variance"),
            "fixed_small": ("posterior_log_variance_clipped", "posterior_variance"),
        }[self.variance]
        return output, *(self._at(name, t, x.ndim).expand_as(x) for name in names)

    def noise_of(self, x_t, t, x_start):
        """The noise that leads from x_0 to x_t."""
        scale = self._at("sqrt_recipm1_alphas_cumprod", t, x_t.ndim)
        return (self._at("sqrt_recip_alphas_cumprod", t, x_t.ndim) * x_t - x_start) / scale

    # Losses, all per sample (N,)

    def training_losses(self, model, x_start, t, model_kwargs=None, noise=None):
        """Dict of per-sample training losses (N,): loss and, if learned, its parts mse and vb (bits)."""
        noise = torch.randn_like(x_start) if noise is None else noise
        x_t = self.q_sample(x_start, t, noise)
        return self.loss_terms(self.run(model, x_t, t, model_kwargs), x_start, x_t, t, noise)

    def loss_terms(self, output, x_start, x_t, t, noise):
        """`training_losses` for a network output that is already there."""
        if self.loss == "kl":
            return {"loss": self._bound(self.interpret(output, x_t, t), x_start, x_t, t) * self.num_timesteps}
        prediction = output[:, : x_t.shape[1]]
        terms = {"mse": mean_flat((prediction - (noise if self.mean == "noise" else x_start)) ** 2)}
        if self.variance == "learned_range":
            terms["vb"] = self._variance_bound(output, x_start, x_t, t)
        return {"loss": sum(terms.values()), **terms}

    def distillation_terms(self, student, teacher, x_start, x_t, t):
        """Output distillation: dict of kd_loss (N,) and its part vb_kd, the KL between reverse steps in bits.

        At t = 0 vb_kd is the likelihood of the data under the student, and the teacher plays no role in it.
        """
        channels = x_t.shape[1]
        mse = mean_flat((student[:, :channels] - teacher[:, :channels].detach()) ** 2)
        if self.variance != "learned_range":
            return {"kd_loss": mse}
        goal = self.interpret(teacher.detach(), x_t, t)
        vb_kd = self._variance_bound(student, x_start, x_t, t, (goal["mean"], goal["log_variance"]))
        return {"kd_loss": mse + vb_kd, "vb_kd": vb_kd}

    def _variance_bound(self, output, x_start, x_t, t, goal=None):
        """Weighted `_bound` of a network output that trains nothing but its variance."""
        mean, values = output.split(x_t.shape[1], dim=1)
        frozen = self.interpret(torch.cat([mean.detach(), values], dim=1), x_t, t)
        return self._bound(frozen, x_start, x_t, t, goal) * self.vb_weight

    def _bound(self, out, x_start, x_t, t, goal=None):
        """One term of the bound in bits: KL from `goal` (default: the true posterior), likelihood at t = 0."""
        if goal is None:
            mean, _, log_variance = self.q_posterior_mean_variance(x_start, x_t, t)
            goal = mean, log_variance
        kl = mean_flat(normal_kl(*goal, out["mean"], out["log_variance"])) / LN2
        likelihood = discretized_gaussian_log_likelihood(x_start, out["mean"], 0.5 * out["log_variance"])
        return torch.where(t == 0, -mean_flat(likelihood) / LN2, kl)

    def prior_bits(self, x_start):
        """KL (N,) in bits from q(x_T | x_0) to the standard normal."""
        t = torch.full((len(x_start),), self.num_timesteps - 1, device=x_start.device)
        mean, _, log_variance = self.q_mean_variance(x_start, t)
        return mean_flat(normal_kl(mean, log_variance, torch.zeros_like(mean), torch.zeros_like(mean))) / LN2

    @torch.no_grad()
    def variational_bound(self, model, x_start, clip_denoised=True, model_kwargs=None, step_noise=None):
        """Whole bound in bits per dimension: total_bpd, prior_bpd (N,); vb, xstart_mse, mse (N, steps), last first."""
        rows = {"vb": [], "xstart_mse": [], "mse": []}
        for k, step in enumerate(reversed(range(self.num_timesteps))):
            t = torch.full((len(x_start),), step, device=x_start.device)
            noise = torch.randn_like(x_start) if step_noise is None else step_noise(k)
            x_t = self.q_sample(x_start, t, noise)
            out = self.p_mean_variance(model, x_t, t, clip_denoised, model_kwargs=model_kwargs)
            rows["vb"].append(self._bound(out, x_start, x_t, t))
            rows["xstart_mse"].append(mean_flat((out["pred_xstart"] - x_start) ** 2))
            rows["mse"].append(mean_flat((self.noise_of(x_t, t, out["pred_xstart"]) - noise) ** 2))
        terms = {name: torch.stack(values, dim=1) for name, values in rows.items()}
        prior = self.prior_bits(x_start)
        return {"total_bpd": terms["vb"].sum(1) + prior, "prior_bpd": prior, **terms}

    # Samplers

    def p_sample(self, model, x, t, clip_denoised=True, model_kwargs=None, noise=None, temperature=1.0):
        """One ancestral step: dict of sample (x_{t-1}) and pred_xstart; no noise is added at t = 0.

        temperature: factor of the noise (MAR, section 3.3).
        """
        out = self.p_mean_variance(model, x, t, clip_denoised, model_kwargs=model_kwargs)
        noise = torch.randn_like(x) if noise is None else noise
        nonzero = (t != 0).float().view(-1, *[1] * (x.ndim - 1))
        sample = out["mean"] + nonzero * torch.exp(0.5 * out["log_variance"]) * (temperature * noise)
        return {"sample": sample, "pred_xstart": out["pred_xstart"]}

    def ddim_sample(self, model, x, t, clip_denoised=True, model_kwargs=None, noise=None, eta=0.0):
        """One DDIM step (arXiv 2010.02502, equation 12): dict of sample and pred_xstart."""
        out = self.p_mean_variance(model, x, t, clip_denoised, model_kwargs=model_kwargs)
        eps = self.noise_of(x, t, out["pred_xstart"])
        bar, prev = self._at("alphas_cumprod", t, x.ndim), self._at("alphas_cumprod_prev", t, x.ndim)
        sigma = eta * torch.sqrt((1 - prev) / (1 - bar)) * torch.sqrt(1 - bar / prev)
        noise = torch.randn_like(x) if noise is None else noise
        mean = out["pred_xstart"] * torch.sqrt(prev) + torch.sqrt(1 - prev - sigma**2) * eps
        nonzero = (t != 0).float().view(-1, *[1] * (x.ndim - 1))
        return {"sample": mean + nonzero * sigma * noise, "pred_xstart": out["pred_xstart"]}

    def ddim_reverse_sample(self, model, x, t, clip_denoised=True, model_kwargs=None):
        """One deterministic DDIM step towards the noise: dict of sample (x_{t+1}) and pred_xstart."""
        out = self.p_mean_variance(model, x, t, clip_denoised, model_kwargs=model_kwargs)
        eps = self.noise_of(x, t, out["pred_xstart"])
        following = self._at("alphas_cumprod_next", t, x.ndim)
        sample = out["pred_xstart"] * torch.sqrt(following) + torch.sqrt(1 - following) * eps
        return {"sample": sample, "pred_xstart": out["pred_xstart"]}

    def p_sample_loop(self, model, shape, **options):
        """Ancestral samples of `shape`; options as for `trajectory`."""
        for out in self.trajectory(self.p_sample, model, shape, **options):
            sample = out["sample"]
        return sample

    def ddim_sample_loop(self, model, shape, eta=0.0, **options):
        """DDIM samples of `shape`; options as for `trajectory`."""
        for out in self.trajectory(self.ddim_sample, model, shape, eta=eta, **options):
            sample = out["sample"]
        return sample

    @torch.no_grad()
    def trajectory(self, step_fn, model, shape, noise=None, step_noise=None, progress=False, **step_options):
        """Yield the dict of every step, noisiest first.

        step_fn: self.p_sample or self.ddim_sample, with its `step_options`. noise: the start, x_T.
        step_noise: step_noise(k) gives the noise of the k-th step; without it noise is drawn at every step.
        """
        x = torch.randn(shape, device=self.betas.device) if noise is None else noise
        steps = tqdm(range(self.num_timesteps), disable=not progress, desc="sampling", leave=False)
        for k in steps:
            t = torch.full((shape[0],), self.num_timesteps - 1 - k, device=x.device)
            given = None if step_noise is None else step_noise(k)
            out = step_fn(model, x, t, noise=given, **step_options)
            yield out
            x = out["sample"]
