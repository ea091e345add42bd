"""Frechet distance of 2048 features: regular covariances, singular ones, and both sets of features at hand."""

import numpy as np

from benchmarks.evaluator import baseline
from evaluation import metrics

DIM = 2048
NAMES = ("mean1", "cov1", "mean2", "cov2")
SIZES = {"regular": (6000, 6000), "singular": (150, 140), "features": (150, 140), "features, 1000 rows": (1000, 1000)}
CASES = {"regular": 1 / 5, "singular": 1 / 8, "features": 1 / 100, "features, 1000 rows": None}  # most of the baseline


def make(case):
    """Two sets of features with a falling spectrum, their means and covariances."""
    rng = np.random.default_rng(0)
    scale = np.linspace(1, 0.02, DIM) ** 2 / 10
    mix = rng.standard_normal((DIM, DIM)).astype(np.float32) / 8
    x1, x2 = (np.maximum(rng.standard_normal((n, DIM)) * scale @ mix + 0.3, 0) for n in SIZES[case])
    x2 += 0.02
    arrays = {
        "mean1": x1.mean(0),
        "cov1": np.cov(x1, rowvar=False),
        "mean2": x2.mean(0),
        "cov2": np.cov(x2, rowvar=False),
    }
    return arrays | ({"x1": x1, "x2": x2} if case.startswith("features") else {})


def run_baseline(arrays):
    """Always from the covariances, whose making does not count."""
    return baseline.frechet_distance(*(arrays[name] for name in NAMES))


def run(arrays):
    if "x1" in arrays:
        return metrics.frechet_distance_of_features(arrays["x1"], arrays["x2"])
    return metrics.frechet_distance(*(arrays[name] for name in NAMES))
