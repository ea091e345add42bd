"""Noise schedules by name, all as float64 betas."""

import math

import numpy as np


def _warmup(steps, first, last, share):
    betas = np.full(steps, last)
    count = int(steps * share)
    betas[:count] = np.linspace(first, last, count)
    return betas


def _cosine(steps):
    def alpha_bar(u):
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    return np.array([min(1 - alpha_bar((i + 1) / steps) / alpha_bar(i / steps), 0.999) for i in range(steps)])


RAW_SCHEDULES = {  # betas between a first and a last value
    "linear": np.linspace,
    "quad": lambda first, last, steps: np.linspace(first**0.5, last**0.5, steps) ** 2,
    "const": lambda first, last, steps: np.full(steps, last),
    "jsd": lambda first, last, steps: 1.0 / np.linspace(steps, 1, steps),
    "warmup10": lambda first, last, steps: _warmup(steps, first, last, 0.1),
    "warmup50": lambda first, last, steps: _warmup(steps, first, last, 0.5),
}


def raw_beta_schedule(name, first, last, steps):
    """Betas (steps,) float64 of one of RAW_SCHEDULES between two given values."""
    return RAW_SCHEDULES[name](first, last, steps).astype(np.float64)


def beta_schedule(name, steps):
    """Betas (steps,) float64: "linear" is 1e-4 .. 2e-2 at 1000 steps and scaled for others, "squaredcos_cap_v2" cosine.

    The other raw schedules run between the same two values. Raises ValueError for an unknown name.
    """
    if name == "squaredcos_cap_v2":
        return _cosine(steps)
    if name not in RAW_SCHEDULES:
        known = ", ".join(["squaredcos_cap_v2", *RAW_SCHEDULES])
        raise ValueError(f"noise schedule {name!r} is unknown: expected one of {known}")
    scale = 1000 / steps
    return raw_beta_schedule(name, scale * 1e-4, scale * 2e-2, steps)
