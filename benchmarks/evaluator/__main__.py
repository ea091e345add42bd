"""Frechet distance, precision and recall of 2048 features, against the plain constructions."""

from functools import cache, partial

import numpy as np

from benchmarks.evaluator import baseline
from benchmarks.measure import Case, Side, main
from evaluation import metrics


@cache
def make_spectrum(sizes, dim):
    """Two sets of features with a falling spectrum."""
    rng = np.random.default_rng(0)
    scale = np.linspace(1, 0.02, dim) ** 2 / 10
    mix = rng.standard_normal((dim, dim)).astype(np.float32) / 8
    first, second = (np.maximum(rng.standard_normal((n, dim)) * scale @ mix + 0.3, 0) for n in sizes)
    return first, second + 0.02


@cache
def make_positive(sizes, dim, hidden=64):
    """Reference and samples that are not negative, with a mean squared norm of about 430 as Inception's have."""
    rng = np.random.default_rng(1)
    mix = rng.standard_normal((hidden, dim), dtype=np.float32) * np.linspace(1, 0.1, hidden, dtype=np.float32)[:, None]

    def rows(n, spread):
        inner = rng.standard_normal((n, hidden), dtype=np.float32) * np.float32(spread)
        x = np.maximum(inner @ mix * 0.12 + 0.05 * rng.standard_normal((n, dim), dtype=np.float32), 0)
        return x * np.float32(1.1)

    return rows(sizes[0], 1.0), rows(sizes[1], 0.97)


def build(setup, function, make, sizes, with_moments=False):
    """A call on two sets of features, or on their means and covariances, whose making does not count."""
    data = make((40, 40), 32) if setup.tiny else make(sizes, 2048)
    if with_moments:
        data = [moment for x in data for moment in (x.mean(0), np.cov(x, rowvar=False))]
    np.linalg.eigvalsh(np.ones((256, 256)) @ np.ones((256, 256)))  # starts the threads, whose memory does not count
    return Side(lambda: function(*data))


def compare_frechet(name, sizes, least=None, of_features=False):
    ours = metrics.frechet_distance_of_features if of_features else metrics.frechet_distance
    sides = {
        "plain": partial(build, function=baseline.frechet_distance, make=make_spectrum, sizes=sizes, with_moments=True),
        "ours": partial(build, function=ours, make=make_spectrum, sizes=sizes, with_moments=not of_features),
    }
    return Case(f"frechet {name}", sides, [("speedup", "ours", ">=", least)] if least else [], compare=dict)


def compare_precision_recall(name, sizes, bars=(), **options):
    """Also by exact distances, whose numbers are others."""
    exact = partial(metrics.precision_recall, rule="float32")
    functions = {"plain": baseline.precision_recall, "ours": metrics.precision_recall, "float32": exact}
    sides = {side: partial(build, function=f, make=make_positive, sizes=sizes) for side, f in functions.items()}
    return Case(f"precision_recall {name}", sides, bars, compare=dict, **options)


LARGE_BARS = [("speedup", "ours", ">=", 1 / 0.75), ("extra_mb", "ours", "<=", 1500)]
CASES = [
    compare_frechet("regular", (6000, 6000), 5),
    compare_frechet("singular", (150, 140), 8),
    compare_frechet("features", (150, 140), 100, of_features=True),
    compare_frechet("features, 1000 rows", (1000, 1000), of_features=True),
    compare_precision_recall("2k x 2k", (2_000, 2_000)),
    compare_precision_recall("10k x 10k", (10_000, 10_000), [("speedup", "ours", ">=", 1 / 0.8)]),
    compare_precision_recall("10k x 50k", (10_000, 50_000), LARGE_BARS, most_rounds=1),
]

if __name__ == "__main__":
    main(__spec__.name, __doc__, CASES)
