"""Statistics, Frechet distance, inception score, precision and recall against plain constructions."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from evaluation import metrics
from evaluation.metrics import (
    FeatureStatistics,
    Workers,
    frechet_distance,
    frechet_distance_of_features,
    half_norms,
    inception_score,
    manifold_radii,
    precision_recall,
)


def features(n, dim, seed=0, rank=None):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, rank or dim)) @ rng.standard_normal((rank or dim, dim)) + rng.standard_normal(dim)


def moments(x):
    return x.mean(0), np.cov(x, rowvar=False)


def add_up(parts):
    found = FeatureStatistics(parts[0].shape[1])
    for part in parts:
        found.update(part)
    return found


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_statistics_of_batches(offset):
    x = features(101, 7) + offset
    found = add_up(np.split(x, [0, 1, 40, 41]))
    assert found.count == 101
    np.testing.assert_allclose(found.mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(x, rowvar=False), rtol=1e-8, atol=1e-8)


def test_statistics_take_float32_and_torch():
    x = features(20, 3).astype(np.float32)
    assert add_up([torch.from_numpy(x)]).covariance.dtype == np.float64
    np.testing.assert_array_equal(add_up([torch.from_numpy(x)]).covariance, add_up([x]).covariance)


def check_sums_of_tensors(device):
    """Rows on a device are added up there; only the sums come to the host, where they are those of arrays."""
    x = features(101, 7).astype(np.float32) + 50
    found = FeatureStatistics(7)
    for part in np.split(x, [1, 40]):
        found.update(torch.from_numpy(part).to(device))
        for value in (found._shift, found._sum, found._outer):
            assert (value.dtype, value.device.type) == (torch.float64, device)
    found.bring_to_host().merge(add_up([x[:30]]))
    expected = add_up([*np.split(x, [1, 40]), x[:30]])
    assert isinstance(found.covariance, np.ndarray)
    np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-13)
    np.testing.assert_allclose(found.covariance, expected.covariance, rtol=1e-10, atol=1e-10)


def test_statistics_of_tensors(monkeypatch):
    monkeypatch.setattr(metrics, "is_on_gpu", lambda features: isinstance(features, torch.Tensor))
    check_sums_of_tensors("cpu")
    with pytest.raises(ValueError, match=r"shape \(2, 4\), expected \(n, 3\)"):
        FeatureStatistics(3).update(torch.zeros(2, 4))


@pytest.mark.own_device
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_statistics_on_a_gpu():
    check_sums_of_tensors("cuda")


@pytest.mark.parametrize("cut", [0, 1, 30, 101])
def test_merged_statistics(cut):
    x = features(101, 7) + 50
    first, second = add_up([x[:cut]]), add_up(list(np.array_split(x[cut:], 2)))
    first.merge(second)
    assert first.count == 101
    np.testing.assert_allclose(first.mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(first.covariance, np.cov(x, rowvar=False), rtol=1e-9, atol=1e-9)


def test_statistics_refuse():
    found = FeatureStatistics(3)
    with pytest.raises(ValueError, match="no rows"):
        _ = found.mean
    for wrong in (np.zeros((2, 4)), np.zeros(3)):
        with pytest.raises(ValueError, match=r"expected \(n, 3\)"):
            found.update(wrong)
    with pytest.raises(ValueError, match="statistics of 4 features"):
        found.merge(FeatureStatistics(4))
    found.update(np.zeros((1, 3)))
    with pytest.raises(ValueError, match="at least 2 rows, got 1"):
        _ = found.covariance


def plain_distance(mean1, cov1, mean2, cov2):
    """Through the eigenvalues of S1 S2, which are real and not negative."""
    cross = np.sqrt(np.linalg.eigvals(cov1 @ cov2).real.clip(0)).sum()
    return ((mean1 - mean2) ** 2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * cross


@pytest.mark.parametrize(("n1", "n2"), [(90, 80), (12, 80), (80, 12), (12, 9), (24, 25), (2, 2)])
def test_frechet_distance(n1, n2):
    """Regular and singular covariances: from statistics, from features, in both orders."""
    x1, x2 = features(n1, 24), features(n2, 24, seed=1)
    expected = plain_distance(*moments(x1), *moments(x2))
    for a, b in ((x1, x2), (x2, x1)):
        assert frechet_distance(*moments(a), *moments(b)) == pytest.approx(expected, rel=1e-6)
        assert frechet_distance_of_features(a, b) == pytest.approx(
            frechet_distance(*moments(a), *moments(b)), rel=1e-10
        )


def test_commuting_covariances():
    a, b = np.array([4.0, 9.0, 0.0]), np.array([1.0, 0.0, 16.0])
    expected = 3 + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert frechet_distance(np.ones(3), np.diag(a), np.zeros(3), np.diag(b)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("n", [60, 8])
def test_frechet_distance_to_itself(n):
    x = features(n, 16)
    assert 0 <= frechet_distance(*moments(x), *moments(x)) <= 1e-9
    assert 0 <= frechet_distance_of_features(x, x) <= 1e-9


def test_constant_features():
    still, moving = np.ones((5, 4)), features(6, 4)
    expected = ((moving.mean(0) - 1) ** 2).sum() + np.trace(np.cov(moving, rowvar=False))
    for a, b in ((still, moving), (moving, still)):
        assert frechet_distance_of_features(a, b) == pytest.approx(expected)
        assert frechet_distance(*moments(a), *moments(b)) == pytest.approx(expected)
    assert frechet_distance_of_features(still, still) == 0


def test_covariance_with_noise_below_zero():
    """Singular and stored in float32: eigenvalues of either sign where there should be zeros."""
    x1, x2 = features(200, 40, rank=5), features(200, 40, seed=1)
    (mean1, cov1), (mean2, cov2) = moments(x1), moments(x2)
    rounded = cov1.astype(np.float32).astype(np.float64)
    assert np.linalg.eigvalsh(rounded)[0] < -1e-7
    exact = frechet_distance(mean1, cov1, mean2, cov2)
    assert frechet_distance(mean1, rounded, mean2, cov2) == pytest.approx(exact, rel=1e-3)
    assert frechet_distance(mean2, cov2, mean1, rounded) == pytest.approx(exact, rel=1e-3)


def test_root_of_a_covariance_with_noise():
    """Pivoted Cholesky loses digits on negative eigenvalues; the root is as close as the noise all the same."""
    rows = np.random.default_rng(0).standard_normal((5, 200)) * np.linspace(3, 0.1, 200)
    cov = (rows.T @ rows).astype(np.float32).astype(np.float64)
    root = metrics._thin_root(cov)
    assert np.abs(root @ root.T - cov).max() <= 3e-7 * cov.max()


def test_frechet_distance_refuses():
    mean, cov = moments(features(9, 3))
    for wrong in ((mean[:2], cov), (mean, cov[:2]), (mean, cov[:2, :2])):
        with pytest.raises(ValueError, match="shapes do not match"):
            frechet_distance(mean, cov, *wrong)
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match="cov2 has entries that are not finite"):
            frechet_distance(mean, cov, mean, cov * bad)
        with pytest.raises(ValueError, match="x1 has entries that are not finite"):
            frechet_distance_of_features(np.full((4, 2), bad), np.ones((4, 2)))
    with pytest.raises(ValueError, match="mean1 has shape"):
        frechet_distance(cov, cov, mean, cov)
    for x1, x2 in ((np.ones((1, 2)), np.ones((4, 2))), (np.ones((4, 2)), np.ones((4, 3)))):
        with pytest.raises(ValueError, match="expected as many columns"):
            frechet_distance_of_features(x1, x2)


def test_inception_score_of_clear_cases():
    assert inception_score(np.zeros((6, 5))) == 1.0
    certain = np.repeat(np.eye(5) * 1000, 3, axis=0)  # all other probabilities underflow to 0
    assert inception_score(certain) == pytest.approx(5, rel=1e-6)
    assert inception_score(certain, split=3) == 1.0


def test_inception_score_counts_chunks_alike_and_in_order():
    logits = features(25, 6).astype(np.float32)
    parts = [inception_score(logits[start : start + 10]) for start in (0, 10, 20)]
    assert inception_score(logits, split=10) == pytest.approx(np.mean(parts), rel=1e-6)
    assert isinstance(inception_score(logits), float)


@pytest.mark.parametrize("wrong", [np.zeros((0, 5)), np.zeros(5), np.full((3, 5), np.nan)])
def test_inception_score_refuses(wrong):
    with pytest.raises(ValueError, match="logits have"):
        inception_score(wrong)


@pytest.mark.parametrize("dim", [3, 8, 24, 32, 45, 64, 100])
def test_half_norms(dim):
    """Written out for one row: accumulators, lanes, and what is left."""
    rows = torch.rand(5, dim, generator=torch.Generator().manual_seed(0)).half() * 3
    for row, found in zip(rows.numpy(), half_norms(rows).numpy(), strict=True):
        terms, lanes = row * row, np.zeros((4, 8), dtype=np.float16)
        for i in range(dim - dim % 32):
            lanes[i // 8 % 4, i % 8] += terms[i]
        for accumulator in lanes[1:]:
            lanes[0] += accumulator
        for i in range(dim - dim % 32, dim - dim % 8):
            lanes[0, i % 8] += terms[i]
        rest = np.float16(0)
        for term in terms[dim - dim % 8 :]:
            rest += term
        assert found == np.float16(lanes[0].astype(np.float32).sum()) + rest


def test_half_norms_of_many_features():
    rows = torch.rand(50, 2048, generator=torch.Generator().manual_seed(0)).half()
    assert torch.equal(half_norms(rows), half_norms(rows[:, :1024]) + half_norms(rows[:, 1024:]))


def plain_distances(u, v, rule, blocks):
    """All distances (Nu, Nv) block by block."""
    found = np.zeros((len(u), len(v)), dtype=np.float32)
    for i in range(0, len(u), blocks[0]):
        for j in range(0, len(v), blocks[1]):
            a, b = (torch.from_numpy(x) for x in (u[i : i + blocks[0]], v[j : j + blocks[1]]))
            product = (a.half().float() @ b.half().float().T).half()
            block = ((half_norms(a.half())[:, None] - product.float() * 2).half() + half_norms(b.half())).float()
            if rule == "float32" or not block.isfinite().all():
                block = (a.square().sum(1)[:, None] - 2 * (a @ b.T)) + b.square().sum(1)
            found[i : i + blocks[0], j : j + blocks[1]] = block.clamp(min=0)
    return found


def plain_precision_recall(ref, sample, k, rule, blocks):
    radii = [np.sort(plain_distances(x, x, rule, blocks), axis=1)[:, k] for x in (ref, sample)]
    pairs = plain_distances(ref, sample, rule, blocks)
    return radii, ((pairs <= radii[0][:, None]).any(0).mean(), (pairs <= radii[1]).any(1).mean())


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(metrics, "TILE", 29)
    monkeypatch.setattr(metrics, "GROUP", 3)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("rule", ["adm", "float32"])
@pytest.mark.parametrize("blocks", [(10_000, 10_000), (40, 64)])
@pytest.mark.parametrize("outlier", [0.0, 40.0, 90.0, 7e4])  # overflows: nothing, pairs, norms, the values
def test_precision_recall(rule, blocks, outlier):
    """Tiles, groups and the saved half of the products change nothing; an outlier turns its blocks to float32."""
    ref, sample = features(130, 16).astype(np.float32), features(111, 16).astype(np.float32)[:, ::-1] * 0.9
    ref[50] += outlier
    sample[7] -= outlier
    kept = ref.copy()
    for k in (1, 3):
        radii, expected = plain_precision_recall(ref, sample, k, rule, blocks)
        for x, radius in zip((ref, sample), radii, strict=True):
            np.testing.assert_allclose(manifold_radii(x, k, rule, blocks=blocks), radius, rtol=1e-3)
        assert precision_recall(ref, sample, k, rule, blocks=blocks) == pytest.approx(expected, abs=1e-12)
    np.testing.assert_array_equal(ref, kept)


def share(world, threads, compute):
    """What compute(workers) returns in each of `world` processes, played by threads that exchange what they gather."""
    barrier, values = threading.Barrier(world, timeout=60), [None] * world

    def gather(rank):
        def exchange(value):
            values[rank] = value
            barrier.wait()
            found = list(values)
            barrier.wait()
            return found

        return exchange

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(lambda rank: compute(Workers(rank, world, gather(rank), threads)), range(world)))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("world", "threads"), [(1, 3), (2, 1), (3, 2), (40, 1)])  # the last: some without a tile
@pytest.mark.parametrize("rule", ["adm", "float32"])
def test_shared_tiles(rule, world, threads):
    """Whoever computes a tile, radii and numbers are the same to the bit, in every process."""
    ref, sample = features(130, 16).astype(np.float32), features(111, 16).astype(np.float32)[:, ::-1] * 0.9
    ref[50] += 90  # a block that overflows
    options = {"k": [1, 3], "rule": rule, "blocks": (40, 64)}
    expected = precision_recall(ref, sample, **options)
    for found in share(world, threads, lambda workers: precision_recall(ref, sample, workers=workers, **options)):
        np.testing.assert_array_equal(found, expected)


def test_every_item_has_one_worker():
    """An item is computed by one process, results keep the order, and the threads work together."""
    together = threading.Barrier(2, timeout=30)
    parts = [list(Workers(rank, 3, threads=2).map(lambda x: (together.wait(), x)[1], range(12))) for rank in range(3)]
    assert parts == [list(range(rank, 12, 3)) for rank in range(3)]


def test_rules_differ():
    """Close rows far from the origin: float16 steps are larger than their distances."""
    base = features(1, 64) * 3
    ref, sample = (base + 0.3 * features(200, 64, seed) for seed in (1, 2))
    assert precision_recall(ref, sample) != precision_recall(ref, sample, rule="float32")


def test_several_k_and_a_percentile():
    ref, sample = features(80, 8), features(70, 8, seed=1)
    precision, recall = precision_recall(ref, sample, k=[1, 3], percentile=80)
    assert precision.shape == recall.shape == (2,)
    assert precision_recall(ref, sample, k=3, percentile=80) == (precision[1], recall[1])
    radii, cut = manifold_radii(ref, 3), manifold_radii(ref, 3, percentile=80)
    np.testing.assert_array_equal(cut, np.where(radii > np.percentile(radii, 80), 0, radii))


def test_precision_is_of_the_samples():
    """Samples on top of one another near one reference row: all precise, and nothing else is recalled."""
    ref = np.arange(10, dtype=np.float32)[:, None] * np.ones((1, 4), dtype=np.float32)
    sample = np.repeat(ref[:1], 6, axis=0)
    assert precision_recall(ref, sample) == (1.0, 0.1)
    assert precision_recall(sample, ref) == (0.1, 1.0)


def test_progress(capsys):
    precision_recall(features(10, 3), features(10, 3))
    assert not capsys.readouterr().err
    precision_recall(features(10, 3), features(10, 3), progress=True)
    assert "precision and recall" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("ref", "sample", "options", "message"),
    [
        (np.ones((3, 2)), np.ones((9, 2)), {}, r"ref has shape \(3, 2\), expected at least 4 rows"),
        (np.ones((9, 2)), np.ones((5, 2)), {"k": [1, 5]}, r"sample has shape \(5, 2\), expected at least 6 rows"),
        (np.ones((9, 2)), np.ones((9, 3)), {}, "different numbers of features"),
        (np.ones((9, 2)), np.full((9, 2), np.nan), {}, "sample has entries that are not finite"),
        (np.ones((9, 2)), np.ones((9, 2)), {"rule": "bfloat16"}, "unknown rule 'bfloat16': expected one of adm"),
    ],
)
def test_precision_recall_refuses(ref, sample, options, message):
    with pytest.raises(ValueError, match=message):
        precision_recall(ref, sample, **options)
