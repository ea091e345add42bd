"""Precision and recall of 2048 features, by the float16 rule."""

import numpy as np

from benchmarks.evaluator import baseline
from evaluation import metrics

DIM, HIDDEN = 2048, 64
SIZES = {"2k x 2k": (2_000, 2_000), "10k x 10k": (10_000, 10_000), "10k x 50k": (10_000, 50_000)}
CASES = {"2k x 2k": None, "10k x 10k": 0.8, "10k x 50k": 0.75}  # at most this much of the baseline's time
MEMORY = {"10k x 50k": 1500}  # MB above the features


def make(case):
    """Features that are not negative, with a mean squared norm of about 430 as Inception's have."""
    rng = np.random.default_rng(1)
    mix = rng.standard_normal((HIDDEN, DIM), dtype=np.float32) * np.linspace(1, 0.1, HIDDEN, dtype=np.float32)[:, None]

    def rows(n, spread):
        hidden = rng.standard_normal((n, HIDDEN), dtype=np.float32) * spread
        x = np.maximum(hidden @ mix * 0.12 + 0.05 * rng.standard_normal((n, DIM), dtype=np.float32), 0)
        return x * np.float32(1.1)

    ref, sample = SIZES[case]
    return {"ref": rows(ref, np.float32(1.0)), "sample": rows(sample, np.float32(0.97))}


def run_baseline(arrays):
    return baseline.precision_recall(arrays["ref"], arrays["sample"])


def run(arrays):
    return metrics.precision_recall(arrays["ref"], arrays["sample"])


def run_float32(arrays):
    """What exact distances would give instead."""
    return metrics.precision_recall(arrays["ref"], arrays["sample"], rule="float32")
