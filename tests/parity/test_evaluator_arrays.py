"""The metrics of recorded features against the published evaluator; cases without a file here are left out."""

import json

import numpy as np
import pytest

from evaluation.metrics import (
    FeatureStatistics,
    frechet_distance,
    frechet_distance_of_features,
    inception_score,
    manifold_radii,
    precision_recall,
)

from .golden import FOLDER, names, read_json

EXACT = ("wide", "real_size", "three_samples", "four_samples", "dead_features", "duplicates")  # singular covariances
TAPS = {"fid": ("acts", "mu", "sigma"), "sfid": ("spatial", "mu_s", "sigma_s")}
FILES = [name for name in names("evaluator_*.npz") if "_e2e_" not in name]
RESULTS = read_json("evaluator_arrays.json")["cases"]


def load(name):
    with np.load(FOLDER / name) as archive:
        arrays = dict(archive)
    return json.loads(str(arrays.pop("meta"))), arrays


def with_key(*keys):
    """The files that have all these arrays."""
    found = []
    for name in FILES:
        with np.load(FOLDER / name) as archive:
            if all(key in archive.files for key in keys):
                found.append(name)
    assert found
    return pytest.mark.parametrize("name", found)


def close(value, expected, relative):
    assert abs(value - expected) <= relative * abs(expected), f"{value}, recorded {expected}"


def statistics(arrays, side, metric):
    """Mean and covariance: stored ones of the reference, or those of the features in three batches."""
    tap, mean, covariance = TAPS[metric]
    if side == "ref" and mean in arrays:
        return arrays[mean], arrays[covariance]
    found = FeatureStatistics(arrays[f"{tap}_{side}"].shape[1])
    for part in np.array_split(arrays[f"{tap}_{side}"], 3):
        found.update(part)
    return found.mean, found.covariance


def test_files_are_the_recorded_ones():
    for name in FILES:
        meta, arrays = load(name)
        recorded = RESULTS[meta["case"]]
        assert len(arrays["acts_sample"]) == recorded["N_sample"]
        if not np.isnan(recorded["inception_score"]):
            close(float(arrays["inception_score"]), recorded["inception_score"], 1e-12)


@with_key("inception_score")
def test_inception_score(name):
    meta, arrays = load(name)
    score = inception_score(arrays["acts_sample"] @ arrays["softmax_w"], meta["split_size"])
    close(score, float(arrays["inception_score_exact"]), 2e-6)
    if not np.isnan(arrays["inception_score"]):
        close(score, float(arrays["inception_score"]), 2e-6)


@pytest.mark.parametrize("metric", TAPS)
@with_key("fid", "sfid")
def test_frechet_distance(name, metric):
    meta, arrays = load(name)
    tap = TAPS[metric][0]
    if meta["case"] == "one_sample":
        with pytest.raises(ValueError, match="at least 2 rows, got 1"):
            statistics(arrays, "sample", metric)
        with pytest.raises(ValueError, match="2 rows"):
            frechet_distance_of_features(arrays[f"{tap}_sample"], arrays[f"{tap}_ref"])
        return
    found = [frechet_distance(*statistics(arrays, "sample", metric), *statistics(arrays, "ref", metric))]
    if "mu" not in arrays:
        found.append(frechet_distance_of_features(arrays[f"{tap}_sample"], arrays[f"{tap}_ref"]))
    for value in found:
        if meta["case"] == "identical":
            assert abs(value) <= 1e-9
            continue
        close(value, float(arrays[f"{metric}_exact"]), 1e-9)
        close(value, float(arrays[metric]), 2e-6 if meta["case"] in EXACT else 1e-6)


def settings(meta):
    blocks = (meta["row_batch_size"], meta["col_batch_size"])
    return {"k": meta["nhood_sizes"], "percentile": meta["clamp_to_percentile"], "blocks": blocks}


@with_key("precision", "recall")
def test_precision_recall(name):
    """The same samples are counted, in every case; the radii are the same numbers."""
    meta, arrays = load(name)
    ref, sample = arrays["acts_ref"], arrays["acts_sample"]
    if len(sample) <= max(meta["nhood_sizes"]):
        with pytest.raises(ValueError, match=r"sample .* expected at least 4 rows"):
            precision_recall(ref, sample, **settings(meta))
        return
    precision, recall = precision_recall(ref, sample, **settings(meta))
    np.testing.assert_array_equal(np.rint(precision * len(sample)), np.rint(arrays["precision"] * len(sample)))
    np.testing.assert_array_equal(np.rint(recall * len(ref)), np.rint(arrays["recall"] * len(ref)))
    for side, features in (("ref", ref), ("sample", sample)):
        radii = manifold_radii(features, **settings(meta))
        limit = 1e-5 if meta["case"] in ("large_norm", "mixed_blocks") else 0.0  # float32 sums have no fixed order
        np.testing.assert_allclose(radii, arrays[f"radii_{side}"], rtol=limit)


@with_key("precision_exact", "recall_exact")
def test_float32_rule(name):
    """The exact distances give the exact numbers, which are others than the published program's where it matters."""
    meta, arrays = load(name)
    ref, sample = arrays["acts_ref"], arrays["acts_sample"]
    found = precision_recall(ref, sample, rule="float32", **settings(meta))
    for value, key, n in zip(found, ("precision", "recall"), (len(sample), len(ref)), strict=True):
        np.testing.assert_allclose(value, arrays[f"{key}_exact"], atol=1.01 / n)
        if meta["case"] == "half_ties":
            assert np.abs(value - arrays[key]).min() * n > 9
