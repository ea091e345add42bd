"""Use only some steps of a long diffusion chain; the network still sees the original step numbers."""

import numpy as np


def _ddim_stride(num_timesteps, count):
    for stride in range(1, num_timesteps + 1):
        if len(range(0, num_timesteps, stride)) == count:
            return range(0, num_timesteps, stride)
    raise ValueError(f"ddim{count}: no whole stride takes exactly {count} of {num_timesteps} steps")


def space_timesteps(num_timesteps, section_counts):
    """The set of original steps to use.

    section_counts: "ddimN" (N steps at the smallest whole stride, from 0), or counts, as a list or "10,15,20": the
    chain is cut into that many equal sections (earlier ones take the remainder) with so many steps from each.
    Raises ValueError if a section is shorter than its count, or no stride gives N steps.
    """
    if isinstance(section_counts, str):
        if section_counts.startswith("ddim"):
            return set(_ddim_stride(num_timesteps, int(section_counts[4:])))
        section_counts = [int(part) for part in section_counts.split(",")]
    size, extra = divmod(num_timesteps, len(section_counts))
    start, steps = 0, set()
    for section, count in enumerate(section_counts):
        length = size + (section < extra)
        if count > length:
            raise ValueError(f"respacing asks for {count} of the {length} steps in section {section}")
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0
        for _ in range(count):
            steps.add(start + round(position))  # half to even
            position += stride
        start += length
    return steps


def respaced_betas(betas, use_timesteps):
    """Betas of the chain that visits only `use_timesteps`, and those steps in order (the timestep map)."""
    alphas_cumprod = np.cumprod(1.0 - betas)
    timestep_map = sorted(use_timesteps)
    kept = alphas_cumprod[timestep_map]
    return 1.0 - kept / np.append(1.0, kept[:-1]), timestep_map
