"""MAR (arXiv 2406.11838): training on hidden tokens with a diffusion head, and sampling by iterated unmasking.

Networks are called as net(tokens, masked, y) -> conditions (N, L, D), and their head, `net.diffloss.net`, as
head(x_t, t, z) on M tokens at once. Tokens taken from a mask come sample by sample, positions ascending.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from tqdm import tqdm

from diffusion.head_graph import HeadGraphs

KL16_SCALE = 0.2325  # 1 / standard deviation of the latents of MAR's autoencoder, as published
RATIO_STD = 0.25  # of the masking ratio, a normal around 1


@dataclass
class MaskedDraw:
    """All random numbers of one training step but the gates': shared by teacher and student, and given by tests.

    H is the number of hidden tokens of each sample; R the repeats, each with its own step and noise.
    """

    tokens: torch.Tensor  # (N, L, width), the data; where it comes as moments, sampled from them
    masked: torch.Tensor  # (N, L) bool, H in every row
    t: torch.Tensor  # (R, N, H)
    noise: torch.Tensor  # (R, N, H, width)
    drop: torch.Tensor | None = None  # (N,) bool, labels that are taken away


def masking_ratio(u, smallest):
    """Masking ratio (section 5.1) for u uniform in [0, 1]: quantile of normal(1, 0.25) cut to [smallest, 1]."""
    below = torch.special.ndtr(torch.as_tensor((smallest - 1) / RATIO_STD, dtype=u.dtype))
    return (1 + RATIO_STD * torch.special.ndtri(below + u * (0.5 - below))).clamp(smallest, 1)


def mask_first(order, count):
    """Mask (N, L) bool of the first `count` positions of each order (N, L)."""
    return torch.zeros_like(order, dtype=torch.bool).scatter(1, order[:, :count], True)


def sample_latents(x, noise, scale):
    """Latents (N, C, H, W) from moments x (N, 2C, H, W), mean and log-variance, and standard normal noise."""
    mean, log_variance = x.chunk(2, dim=1)
    return (mean + (0.5 * log_variance.clamp(-30, 20)).exp() * noise) * scale


class MaskedObjective(nn.Module):
    """MAR: predict noise and variance of hidden tokens from the visible ones and the label.

    x is latents (N, C, H, W), or moments (N, 2C, H, W), unscaled, from which latents are sampled and multiplied by
    `scale`. mask_ratio_min: smallest share of hidden tokens. batch_mul: noisings of every hidden token (section 3.3).
    Raises ValueError for a share outside (0, 1] or a batch_mul below 1.
    """

    def __init__(self, diffusion, mask_ratio_min=0.7, batch_mul=4, scale=None):
        super().__init__()
        if not 0 < mask_ratio_min <= 1:
            raise ValueError(f"mask_ratio_min is {mask_ratio_min}: expected a share in (0, 1]")
        if batch_mul < 1:
            raise ValueError(f"batch_mul is {batch_mul}: expected at least 1")
        self.diffusion, self.mask_ratio_min, self.batch_mul = diffusion, mask_ratio_min, batch_mul
        self.scale = KL16_SCALE if scale is None else scale

    def draw(self, net, x, y):
        """Draw latents (from moments only), masks, steps, noise and, in training mode, label drops, in this order."""
        found, channels = x.shape[1], net.in_channels
        if found == 2 * channels:
            x = sample_latents(x, torch.randn_like(x[:, :channels]), self.scale)
        elif found != channels:
            raise ValueError(f"x has {found} channels: expected latents with {channels} or moments with twice as many")
        tokens = net.patchify(x)
        n, length, width = tokens.shape
        # One ratio for the batch; drawn on the CPU, because it decides on shapes.
        ratio = masking_ratio(torch.rand((), dtype=torch.float64, device="cpu"), self.mask_ratio_min)
        shape = (self.batch_mul, n, math.ceil(length * ratio.item()))
        masked = mask_first(torch.rand(n, length, device=x.device).argsort(1), shape[-1])
        t = torch.randint(0, self.diffusion.num_timesteps, shape, device=x.device)
        noise = torch.randn(*shape, width, dtype=x.dtype, device=x.device)
        return MaskedDraw(tokens, masked, t, noise, net.draw_drop(n, x.device))

    def _noised(self, draw):
        """Hidden tokens (M, width), the same noised, their steps (M,) and their noise, with M = R * N * H."""
        start, t = draw.tokens[draw.masked].repeat(len(draw.t), 1), draw.t.flatten()
        noise = draw.noise.reshape(start.shape)
        return start, self.diffusion.q_sample(start, t, noise), t, noise

    def predict(self, net, x, y, draw, observe=None, mask=None):
        """Run `net` and, on the hidden tokens, its head -> (M, 2 * width); `observe` and `mask` as for the network."""
        z = net(draw.tokens, draw.masked, y, drop=draw.drop, observe=observe, mask=mask)
        _, x_t, t, _ = self._noised(draw)
        return self.diffusion.run(net.diffloss.net, x_t, t, {"z": z[draw.masked].repeat(len(draw.t), 1)})

    def noise_share(self, draw):
        """Share of noise in the variance of what the head sees, for every row of its output (M,)."""
        return 1 - self.diffusion.alphas_cumprod[draw.t.flatten()]

    def loss(self, prediction, x, draw):
        """The original loss: dict of per-sample terms (N,), `loss` among them; means over repeats and hidden tokens."""
        return self._average(self.diffusion.loss_terms(prediction, *self._noised(draw)), draw)

    def match(self, student, teacher, x, draw):
        """Distillation of the head's output: dict of per-sample terms (N,), `kd_loss` among them."""
        start, x_t, t, _ = self._noised(draw)
        return self._average(self.diffusion.distillation_terms(student, teacher, start, x_t, t), draw)

    @staticmethod
    def _average(terms, draw):
        return {name: values.view(draw.t.shape).mean((0, 2)) for name, values in terms.items()}


GUIDANCE = {  # schedule -> scale of a step, from the full scale and the share of tokens known after that step
    "linear": lambda scale, known: 1 + (scale - 1) * known,
    "constant": lambda scale, known: scale,
}


def plan_steps(length, num_iter, cfg_scale=1.0, schedule="linear"):
    """For each of `num_iter` steps: (tokens hidden before it, tokens hidden after it, guidance scale).

    The number falls as a cosine, by at least one token a step (section 3.4). Raises ValueError if num_iter > length.
    """
    if num_iter > length:
        raise ValueError(f"num_iter is {num_iter}: expected at most {length}, the number of tokens")
    steps, before = [], length
    for k in range(1, num_iter + 1):
        after = max(1, min(before - 1, math.floor(length * math.cos(math.pi / 2 * k / num_iter))))
        scale = GUIDANCE[schedule](cfg_scale, (length - after) / length)
        # Guidance of the last step counts one token as hidden, although none is: so it was published.
        steps.append((before, after if k < num_iter else 0, scale))
        before = after
    return steps


def guide_head(head, x, t, z, null, scale):
    """Head output (M, 2 * width) for conditions z and null (M, D): the noise is guided, the variance that of z.

    scale: a number, or a tensor () of float64.
    """
    cond, uncond = head(torch.cat([x, x]), torch.cat([t, t]), torch.cat([z, null])).chunk(2)
    noise, variance = cond.chunk(2, dim=1)
    unguided = uncond[:, : x.shape[1]]
    step = noise - unguided
    # A scale on the device would be rounded to half precision before the product, a number is not.
    step = (scale * step.to(torch.promote_types(step.dtype, torch.float32))).to(step.dtype)
    return torch.cat([unguided + step, variance], dim=1)


@dataclass
class MaskedStep:
    """One step of sampling: what was predicted, M = N * (tokens of this step) tokens, and the state after it."""

    z: torch.Tensor  # (M, D), or (2M, D) the unconditional ones last
    cfg_scale: float
    sampled: torch.Tensor  # (M, width)
    tokens: torch.Tensor  # (N, L, width)
    masked: torch.Tensor  # (N, L) bool


class MaskedSampler(nn.Module):
    """MAR's sampler: in `num_iter` steps reveal all tokens in random order, each by ancestral sampling with the head.

    diffusion: the head's chain, usually respaced. cfg_scale: 1 is no guidance. schedule: "linear" or "constant".
    temperature: multiplies the noise of the ancestral steps. clip_denoised: for data in [-1, 1], such as pixels; the
    cosine schedule starts where errors of the noise count 20,000-fold in the data, too many for a small network.
    head_graphs: on a GPU, replay the head's steps as graphs (head_graph.py); the samples are the same up to rounding.
    Raises ValueError for values that make no sense.
    """

    def __init__(
        self,
        diffusion,
        num_iter=64,
        cfg_scale=1.0,
        schedule="linear",
        temperature=1.0,
        clip_denoised=False,
        head_graphs=True,
    ):
        super().__init__()
        if num_iter < 1:
            raise ValueError(f"num_iter is {num_iter}: expected at least 1")
        if schedule not in GUIDANCE:
            raise ValueError(f"schedule is {schedule!r}: expected one of {', '.join(GUIDANCE)}")
        self.diffusion, self.num_iter, self.temperature = diffusion, num_iter, temperature
        self.cfg_scale, self.schedule, self.clip_denoised = cfg_scale, schedule, clip_denoised
        self.graphs = HeadGraphs(diffusion) if head_graphs else None

    def forward(self, net, y, noise, step_noise=None, progress=False):
        """Labels y (N,), `num_classes` for none, and start noise (N, C, H, W) -> latents (N, C, H, W), scaled.

        The start noise decides on the order of the tokens only. step_noise(k, shape, count) gives `count` standard
        normal tensors from the k-th on, (count, N, *shape), shape being (tokens of the step, width); row i of each
        belongs to image i.
        """
        # Of independent values the ranks are a uniform permutation, and each image has its own.
        order = net.patchify(noise).mean(-1).argsort(1)

        def draw(_, shape, count):
            return torch.stack([noise.new_empty(len(noise), *shape).normal_() for _ in range(count)])

        for step in self.trajectory(net, y, order, step_noise or draw, progress):
            tokens = step.tokens
        return net.unpatchify(tokens)

    @torch.no_grad()
    def trajectory(self, net, y, order, step_noise, progress=False):
        """Yield a MaskedStep for every step. order (N, L): the last position is revealed first.

        step_noise is asked once for every step: for the head's start and then the noise of its ancestral steps.
        """
        guided, null = self.cfg_scale != 1, torch.full_like(y, net.num_classes)
        labels, twice = (torch.cat([y, null]), 2) if guided else (y, 1)
        plan = plan_steps(order.shape[1], self.num_iter, self.cfg_scale, self.schedule)
        draws, tokens, masked = 1 + self.diffusion.num_timesteps, None, mask_first(order, order.shape[1])
        for k, (before, after, cfg_scale) in enumerate(tqdm(plan, disable=not progress, desc="sampling", leave=False)):
            # All at once, or a GPU would wait for the processor's noise at every step of the head.
            noise = step_noise(k * draws, (before - after, net.token_width), draws).flatten(1, 2)
            if tokens is None:
                tokens = noise.new_zeros(*order.shape, net.token_width)
            z = net(tokens.repeat(twice, 1, 1), masked.repeat(twice, 1), labels)
            remaining = mask_first(order, after)
            revealed, masked = masked & ~remaining, remaining
            z = z[revealed.repeat(twice, 1)]
            sampled = self._run_head(net.diffloss.net, z, noise[0], cfg_scale, noise[1:])
            tokens = tokens.masked_scatter(revealed.unsqueeze(-1), sampled)
            yield MaskedStep(z, cfg_scale, sampled, tokens, masked)

    def _run_head(self, head, z, start, cfg_scale, noise):
        """Ancestral samples (M, width) for conditions z (M, D), or (2M, D) if guided; noise (steps, M, width)."""
        options = {"clip_denoised": self.clip_denoised, "temperature": self.temperature}
        model, conditions = head, {"z": z}
        if len(z) > len(start):
            z, null = z.chunk(2)
            model, conditions = partial(guide_head, head), {"z": z, "null": null, "scale": cfg_scale}
        if self.graphs and self.graphs.fit(start):
            return self.graphs.sample(head, model, conditions, start, noise, **options)
        given = {"noise": start, "step_noise": noise.__getitem__, "model_kwargs": conditions}
        return self.diffusion.p_sample_loop(model, start.shape, **given, **options)
