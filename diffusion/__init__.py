"""Diffusion processes. `create_diffusion` builds the Gaussian one that DiT is trained and sampled with."""

from diffusion.gaussian_diffusion import GaussianDiffusion
from diffusion.respace import respaced_betas, space_timesteps
from diffusion.schedules import beta_schedule


def create_diffusion(
    timestep_respacing="",
    noise_schedule="linear",
    use_kl=False,
    sigma_small=False,
    predict_xstart=False,
    learn_sigma=True,
    rescale_learned_sigmas=False,
    diffusion_steps=1000,
):
    """A GaussianDiffusion over `diffusion_steps` steps, or over the part of them that `timestep_respacing` names.

    timestep_respacing: "" for all steps, "250", "10,15,20" (counts per section) or "ddim50"; see `space_timesteps`.
    Raises ValueError for an unknown schedule or an impossible respacing.
    """
    betas = beta_schedule(noise_schedule, diffusion_steps)
    use_timesteps = space_timesteps(diffusion_steps, timestep_respacing or [diffusion_steps])
    return GaussianDiffusion(
        *respaced_betas(betas, use_timesteps),
        mean="x_start" if predict_xstart else "noise",
        variance="learned_range" if learn_sigma else ("fixed_small" if sigma_small else "fixed_large"),
        loss="kl" if use_kl else ("rescaled_mse" if rescale_learned_sigmas else "mse"),
        original_steps=diffusion_steps,
    )
