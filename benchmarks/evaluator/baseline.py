"""Plain constructions of the same numbers: the root of S1 S2, and all distances in blocks of 10,000 rows."""

import contextlib
import os
import warnings

import numpy as np
import scipy.linalg
import torch

from evaluation.metrics import half_norms

BLOCK, K = 10_000, 3


def matrix_root(matrix):
    """scipy's sqrtm without its `disp`, which is gone since 1.18, and without the note that it prints before that."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return scipy.linalg.sqrtm(matrix)


def frechet_distance(mean1, cov1, mean2, cov2):
    """From the root of S1 S2, with a small multiple of the identity added if that is not finite."""
    root = matrix_root(cov1 @ cov2)
    if not np.isfinite(root).all():
        shift = 1e-6 * np.eye(len(cov1))
        root = matrix_root((cov1 + shift) @ (cov2 + shift))
    return float(((mean1 - mean2) ** 2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * np.trace(root.real))


def distances(u, v):
    """Squared distances (R, C) float32 of rows u and v, by the float16 rule, or in float32 where that overflows."""
    a, b = torch.from_numpy(u).half(), torch.from_numpy(v).half()
    product = torch.from_numpy(a.float().numpy() @ b.float().numpy().T).half()
    found = (half_norms(a)[:, None] - 2 * product + half_norms(b)).clamp(min=0).float()
    if not found.isfinite().all():
        a, b = torch.from_numpy(u), torch.from_numpy(v)
        found = (a.square().sum(1)[:, None] - 2 * (a @ b.T) + b.square().sum(1)).clamp(min=0)
    return found.numpy()


def radii(rows):
    """Squared distance (N,) of every row to its third neighbour, from full rows of the matrix of distances."""
    found = np.zeros(len(rows), dtype=np.float32)
    matrix = np.zeros((min(BLOCK, len(rows)), len(rows)), dtype=np.float32)
    for i in range(0, len(rows), BLOCK):
        part = rows[i : i + BLOCK]
        for j in range(0, len(rows), BLOCK):
            matrix[: len(part), j : j + BLOCK] = distances(part, rows[j : j + BLOCK])
        found[i : i + BLOCK] = np.partition(matrix[: len(part)], K, axis=1)[:, K]
    return found


def precision_recall(ref, sample):
    """Shares of samples in a ball of the reference, and the reverse."""
    radii_ref, radii_sample = radii(ref), radii(sample)
    in_ref, in_sample = np.zeros(len(sample), dtype=bool), np.zeros(len(ref), dtype=bool)
    for i in range(0, len(ref), BLOCK):
        for j in range(0, len(sample), BLOCK):
            found = distances(ref[i : i + BLOCK], sample[j : j + BLOCK])
            in_ref[j : j + BLOCK] |= (found <= radii_ref[i : i + BLOCK, None]).any(0)
            in_sample[i : i + BLOCK] |= (found <= radii_sample[j : j + BLOCK]).any(1)
    return float(in_ref.mean()), float(in_sample.mean())
