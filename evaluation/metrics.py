"""The numbers of the ADM protocol, as pure functions of arrays."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np
import scipy.linalg
import torch
from tqdm import tqdm

from engine.threads import map_ahead

TILE = 2500  # rows of one tile of a distance matrix: 25 MB
GROUP = 50  # a tile's smallest entries are searched in groups of that many
RULES = ("adm", "float32")


class FeatureStatistics:
    """Mean (D,) and covariance (D, D) of rows that come in batches, in float64; nothing of the rows is kept.

    Rows on a GPU are added up there: bring the sums to the host before they are read or merged.
    """

    def __init__(self, dim):
        self.dim, self.count, self._shift = dim, 0, None
        self._sum = self._outer = 0.0  # of no rows yet; then arrays, or tensors where the rows are

    def update(self, features):
        """Add rows (n, D). They are shifted by the first batch's mean, so that no digits cancel in the covariance."""
        rows = features.double() if is_on_gpu(features) else np.asarray(features, dtype=np.float64)
        if rows.ndim != 2 or rows.shape[1] != self.dim:
            raise ValueError(f"features have shape {tuple(rows.shape)}, expected (n, {self.dim})")
        if not len(rows):
            return
        if self._shift is None:
            self._shift = rows.mean(0)
        rows = rows - self._shift
        self.count += len(rows)
        self._sum += rows.sum(0)
        self._outer += rows.T @ rows

    def bring_to_host(self):
        """Turn sums on a GPU into arrays; returns itself."""
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                setattr(self, name, value.cpu().numpy())
        return self

    def merge(self, other):
        """Add the rows that another one has seen, for instance in another process."""
        if other.dim != self.dim:
            raise ValueError(f"statistics of {other.dim} features do not go with {self.dim}")
        if not other.count:
            return
        if self._shift is None:
            self._shift = other._shift
        step = other._shift - self._shift
        cross = np.outer(step, other._sum)
        self.count += other.count
        self._sum += other._sum + other.count * step
        self._outer += other._outer + cross + cross.T + other.count * np.outer(step, step)

    @property
    def mean(self):
        """(D,) float64."""
        if not self.count:
            raise ValueError("the mean of no rows is not defined")
        return self._shift + self._sum / self.count

    @property
    def covariance(self):
        """(D, D) float64, divisor N - 1."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 rows, got {self.count}")
        return (self._outer - np.outer(self._sum, self._sum / self.count)) / (self.count - 1)


def is_on_gpu(features):
    """Whether rows are a tensor that a GPU holds."""
    return isinstance(features, torch.Tensor) and features.is_cuda


def _cholesky(cov):
    """Lower Cholesky factor (D, D), or None where `cov` is singular."""
    try:
        return np.linalg.cholesky(cov)
    except np.linalg.LinAlgError:
        return None


def _thin_root(cov):
    """A factor (D, rank) with factor @ factor.T = cov, for any covariance; negative eigenvalues count as zero."""
    noise = len(cov) * np.finfo(np.float64).eps * max(cov.diagonal().max(), 0.0)
    lower, order, rank, _ = scipy.linalg.lapack.dpstrf(cov, tol=noise, lower=1)
    root = np.zeros((len(cov), rank))
    root[order - 1] = np.tril(lower)[:, :rank]
    if np.abs(cov.diagonal() - np.square(root).sum(1)).max(initial=0.0) <= 10 * noise:
        return root
    values, vectors = np.linalg.eigh(cov)  # noise above the rounding of float64: stored in float32, for instance
    kept = values > len(cov) * np.finfo(np.float64).eps * max(values[-1], 0.0)
    return vectors[:, kept] * np.sqrt(values[kept])


def _nuclear_norm(matrix):
    """Sum of the singular values."""
    return float(scipy.linalg.svdvals(matrix, check_finite=False).sum()) if matrix.size else 0.0


def _checked(name, array, ndim):
    """The array in float64, or ValueError."""
    array = np.asarray(array, dtype=np.float64)
    if array.ndim != ndim:
        raise ValueError(f"{name} has shape {array.shape}, expected {ndim} dimensions")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} has entries that are not finite")
    return array


def frechet_distance(mean1, cov1, mean2, cov2):
    """Distance of two Gaussians with means (D,) and covariances (D, D): |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)).

    The trace of the root is the sum of the roots of the eigenvalues of L' S2 L with L L' = S1: symmetric, thus real.
    Singular covariances are cut to their rank: the nuclear norm of L1' L2 is the same trace.
    """
    mean1, mean2 = _checked("mean1", mean1, 1), _checked("mean2", mean2, 1)
    cov1, cov2 = _checked("cov1", cov1, 2), _checked("cov2", cov2, 2)
    shapes = [mean1.shape * 2, cov1.shape, mean2.shape * 2, cov2.shape]
    if len(set(shapes)) > 1:
        raise ValueError(f"shapes do not match: {[array.shape for array in (mean1, cov1, mean2, cov2)]}")
    roots = [_cholesky(cov1), _cholesky(cov2)]
    if all(root is not None for root in roots):
        cross = np.sqrt(np.linalg.eigvalsh(roots[0].T @ cov2 @ roots[0]).clip(0)).sum()
    else:
        first, second = (_thin_root(c) if r is None else r for c, r in zip((cov1, cov2), roots, strict=True))
        cross = _nuclear_norm(first.T @ second)
    return _distance(mean1 - mean2, np.trace(cov1), np.trace(cov2), cross)


def _distance(shift, trace1, trace2, cross):
    """The distance from its terms; rounding does not make it negative."""
    return max(float(shift @ shift + trace1 + trace2 - 2 * cross), 0.0)


def frechet_distance_of_features(x1, x2):
    """The same from rows of features (N1, D) and (N2, D).

    Fewer rows than features are a factor of their covariance themselves, and the decomposition is as small as they are.
    """
    x1, x2 = _checked("x1", x1, 2), _checked("x2", x2, 2)
    if x1.shape[1] != x2.shape[1] or min(len(x1), len(x2)) < 2:
        raise ValueError(f"features of shapes {x1.shape} and {x2.shape}: expected as many columns, and 2 rows or more")
    mean1, mean2 = x1.mean(0), x2.mean(0)
    rows1, rows2 = ((x - mean) / np.sqrt(len(x) - 1) for x, mean in ((x1, mean1), (x2, mean2)))
    if min(len(x1), len(x2)) >= x1.shape[1]:
        return frechet_distance(mean1, rows1.T @ rows1, mean2, rows2.T @ rows2)
    trace1, trace2 = np.vdot(rows1, rows1), np.vdot(rows2, rows2)
    first, second = (rows if len(rows) < rows.shape[1] else _thin_root(rows.T @ rows).T for rows in (rows1, rows2))
    return _distance(mean1 - mean2, trace1, trace2, _nuclear_norm(first @ second.T))


def inception_score(logits, split=5000):
    """Mean over chunks of `split` rows, in the order given, of exp(mean KL(p(y|x) | p(y))); logits (N, C), float32.

    The last chunk may be shorter and counts as much as the others; 0 ln 0 is 0.
    """
    logits = np.asarray(logits, dtype=np.float32)
    if logits.ndim != 2 or not len(logits):
        raise ValueError(f"logits have shape {logits.shape}, expected (N, classes) with at least one row")
    if not np.isfinite(logits).all():
        raise ValueError("logits have entries that are not finite")
    return float(np.mean([_chunk_score(logits[i : i + split]) for i in range(0, len(logits), split)], dtype=np.float32))


def _chunk_score(logits):
    """Score of one chunk (n, C)."""
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    tiny = np.finfo(np.float32).smallest_subnormal  # ln of a zero: anything finite will do
    marginal = np.log(np.maximum(p.mean(0, keepdims=True), tiny))
    return np.exp((p * (np.log(np.maximum(p, tiny)) - marginal)).sum(1).mean())


def half_norms(rows):
    """Squared norms (N,) of rows (N, D) in float16, every operation rounded, in the order in which Eigen adds on a CPU.

    Four accumulators of 8 lanes, then what is left by 8, then the 8 lanes at once, then the rest one by one; more than
    1600 entries are halved first.
    """
    return _half_sum(rows * rows)


def _half_sum(terms):
    """Sums (N,) of float16 terms (N, D) in the order of `half_norms`."""
    n, dim = terms.shape
    if dim > 1600:
        split = -(-dim // 16) * 8
        return _half_sum(terms[:, :split]) + _half_sum(terms[:, split:])
    rounds, lanes = dim - dim % 32, dim - dim % 8
    sums = terms.new_zeros(n, 4, 8)
    for part in terms[:, :rounds].reshape(n, -1, 4, 8).unbind(1):
        sums += part
    sums = [*sums.unbind(1), *terms[:, rounds:lanes].reshape(n, -1, 8).unbind(1)]
    total = sum(sums[1:], sums[0]).float().sum(1).half()
    return total + sum(terms[:, lanes:].unbind(1), terms.new_zeros(n))


@dataclass(frozen=True)
class Workers:
    """Who computes the tiles of distances: `world` processes, of which this is number `rank`, with `threads` threads.

    gather: a value of this process -> the list of the values of all. Whoever computes a tile, its numbers are the same.
    """

    rank: int = 0
    world: int = 1
    gather: Callable = lambda value: [value]
    threads: int = 1

    def share(self, items):
        """Those of the items that this process computes."""
        return items[self.rank :: self.world]

    def map(self, work, items):
        """Yield work(item) for this process's share of the items."""
        return map_ahead(work, self.share(items), self.threads)


class _Rows:
    """Features (N, D) as the rule of each dtype sees them: float32 values after rounding, and squared norms (N,)."""

    def __init__(self, name, features, rule, least):
        features = np.ascontiguousarray(features, dtype=np.float32)
        if features.ndim != 2 or len(features) < least:
            raise ValueError(f"{name} has shape {features.shape}, expected at least {least} rows of features")
        if not np.isfinite(features).all():
            raise ValueError(f"{name} has entries that are not finite")
        self.count = len(features)
        self.values = {torch.float32: features}
        self.norms = {torch.float32: torch.from_numpy(np.einsum("nd,nd->n", features, features))}
        if rule == "adm":
            self._add_half(features)

    def _add_half(self, features):
        values, norms = np.empty_like(features), []
        for start in range(0, self.count, TILE):
            half = torch.from_numpy(features[start : start + TILE]).half()
            norms.append(half_norms(half))
            values[start : start + TILE] = half.float().numpy()
        self.values[torch.float16], self.norms[torch.float16] = values, torch.cat(norms)


def _tiles(count, *blocks):
    """Slices of at most TILE rows that do not cross the borders of the blocks."""
    cuts = sorted({cut for size in (TILE, *blocks) for cut in range(0, count, size)} | {count})
    return [slice(a, b) for a, b in pairwise(cuts)]


# Distances stay on the processor: a GPU adds the products in another order, which now and then falls on the other side
# of a step of float16, and the published numbers count such steps.
def _products(u, rows, v, cols, dtype):
    """Inner products (R, C) of two tiles, a float32 product rounded to `dtype`."""
    return torch.from_numpy(u.values[dtype][rows] @ v.values[dtype][cols].T).to(dtype)  # NumPy's BLAS is faster here


def _distances(norm_u, products, norm_v):
    """(|u|^2 - 2 u v) + |v|^2 with both results rounded; may fall below 0, where the protocol says 0."""
    return torch.sub(norm_u, products, alpha=2).add_(norm_v).float()


def _pair_distances(u, rows, v, cols, dtype):
    """Distances (R, C) of two tiles, rows of u first."""
    products = _products(u, rows, v, cols, dtype)
    return _distances(u.norms[dtype][rows, None], products, v.norms[dtype][cols])


def _fits_half(u, rows, v, cols):
    """Whether all float16 distances of a block are finite."""
    norm_u, norm_v = (side.norms[torch.float16][part].float() for side, part in ((u, rows), (v, cols)))
    if not (norm_u.isfinite().all() and norm_v.isfinite().all()):
        return False
    if (norm_u.max().sqrt() + norm_v.max().sqrt()).square() < 6e4:  # float16 ends at 65504
        return True
    parts = [slice(start, min(start + TILE, rows.stop)) for start in range(rows.start, rows.stop, TILE)]
    return all(_pair_distances(u, part, v, cols, torch.float16).isfinite().all() for part in parts)


def _rounding(u, v, rule, blocks):
    """dtype(rows, cols) that distances of a tile within one block are rounded to: float32 where float16 overflows."""

    @cache
    def fits_half(*block):
        rows, cols = (slice(i * size, (i + 1) * size) for i, size in zip(block, blocks, strict=True))
        return _fits_half(u, rows, v, cols)

    def dtype(rows, cols):
        is_half = rule == "adm" and fits_half(rows.start // blocks[0], cols.start // blocks[1])
        return torch.float16 if is_half else torch.float32

    return dtype


def _smallest(distances, best, dim):
    """The smallest entries along `dim` of a tile and of `best`, as many as `best` has there.

    The `count` smallest lie in the `count` groups with the smallest minima: one pass and a small sort.
    """
    count, groups = best.shape[dim], distances.shape[dim] // GROUP
    grouped = distances.narrow(dim, 0, groups * GROUP).unflatten(dim, (GROUP, groups))
    rest = distances.narrow(dim, groups * GROUP, distances.shape[dim] - groups * GROUP)
    if groups > count:
        index = grouped.amin(dim).topk(count, dim, largest=False, sorted=False).indices.unsqueeze(dim)
        grouped = grouped.gather(dim + 1, index.expand([GROUP if d == dim else -1 for d in range(3)]))
    candidates = torch.cat([grouped.flatten(dim, dim + 1), rest, best], dim)
    return candidates.topk(count, dim, largest=False).values


def _own_pairs(count, blocks):
    """Pairs of tiles of one set of rows, each once."""
    tiles = _tiles(count, *blocks)
    return [(rows, cols) for i, rows in enumerate(tiles) for cols in tiles[i:]]


def _cross_pairs(u, v, blocks):
    """Pairs of a tile of u and one of v."""
    return [(rows, cols) for rows in _tiles(u.count, blocks[0]) for cols in _tiles(v.count, blocks[1])]


def _radii(u, ks, rule, blocks, percentile, bar, workers):
    """Squared distances (N, K) to the k-th neighbour, the row itself being the 0th; each product serves two rows."""
    dtype, count = _rounding(u, u, rule, blocks), max(ks) + 1

    def nearest(pair):
        """[(rows, the smallest distances of these rows in the tile)]: for its rows, and for its columns as rows."""
        rows, cols = pair
        there, back = dtype(rows, cols), dtype(cols, rows)
        products = _products(u, rows, u, cols, there)
        found = _distances(u.norms[there][rows, None], products, u.norms[there][cols])
        nearest = [(rows, _smallest(found, torch.full((len(found), count), torch.inf), 1))]
        if rows != cols:
            products = products if back == there else _products(u, rows, u, cols, back)
            found = _distances(u.norms[back][cols], products, u.norms[back][rows, None])
            nearest.append((cols, _smallest(found, torch.full((count, found.shape[1]), torch.inf), 0).T))
        return nearest

    best = torch.full((u.count, count), torch.inf)
    for found in workers.map(nearest, _own_pairs(u.count, blocks)):
        for rows, values in found:
            best[rows] = torch.cat([best[rows], values], 1).topk(count, 1, largest=False).values
        bar.update()
    best = torch.cat(workers.gather(best), 1).topk(count, 1, largest=False).values
    radii = best[:, list(ks)].clamp(min=0)
    if percentile is not None:
        limits = torch.from_numpy(np.percentile(radii.numpy(), percentile, axis=0)).float()
        radii = radii.where(radii <= limits, 0.0)
    return radii


def _covered(u, radii_u, v, radii_v, rule, blocks, bar, workers):
    """Which rows of v lie in a ball of u (N_v, K), and which rows of u in a ball of v (N_u, K)."""
    dtype, ks = _rounding(u, v, rule, blocks), range(radii_u.shape[1])

    def cover(pair):
        """(rows, columns, which columns lie in balls of the rows, and which rows in balls of the columns)."""
        rows, cols = pair
        found = _pair_distances(u, rows, v, cols, dtype(rows, cols))
        in_rows = torch.stack([(found <= radii_u[rows, k, None]).any(0) for k in ks], 1)
        in_cols = torch.stack([(found <= radii_v[cols, k]).any(1) for k in ks], 1)
        return rows, cols, in_rows, in_cols

    in_u, in_v = torch.zeros(radii_v.shape, dtype=torch.bool), torch.zeros(radii_u.shape, dtype=torch.bool)
    for rows, cols, in_rows, in_cols in workers.map(cover, _cross_pairs(u, v, blocks)):
        in_u[cols] |= in_rows
        in_v[rows] |= in_cols
        bar.update()
    return (torch.stack(workers.gather(side)).any(0) for side in (in_u, in_v))


def manifold_radii(features, k=3, rule="adm", percentile=None, blocks=(10_000, 10_000)):
    """Squared distance of every row (N, D) to its k-th neighbour in float32: (N,), or (N, K) for several k."""
    ks = np.atleast_1d(k).tolist()
    rows = _Rows("features", features, rule, max(ks) + 1)
    with tqdm(disable=True) as bar:
        radii = _radii(rows, ks, rule, blocks, percentile, bar, Workers()).numpy()
    return radii[:, 0] if np.ndim(k) == 0 else radii


def precision_recall(
    ref, sample, k=3, rule="adm", progress=False, percentile=None, blocks=(10_000, 10_000), workers=Workers()
):
    """Improved precision and recall of sample (Ns, D) against ref (Nr, D): two floats, or two arrays for several k.

    Precision is the share of samples within the k-th neighbour radius of a reference row, recall the reverse. The rule
    "adm" computes every distance as the published evaluator does, in float16; a block of `blocks` rows in which one
    overflows is computed in float32, as the rule "float32" does everywhere. Radii above `percentile` become 0.
    workers: every process that shares the tiles calls this with the same rows, and gets the numbers.
    """
    if rule not in RULES:
        raise ValueError(f"unknown rule {rule!r}: expected one of {', '.join(RULES)}")
    ks = np.atleast_1d(k).tolist()
    u, v = (_Rows(name, x, rule, max(ks) + 1) for name, x in (("ref", ref), ("sample", sample)))
    if u.values[torch.float32].shape[1] != v.values[torch.float32].shape[1]:
        raise ValueError("ref and sample have different numbers of features")
    pairs = [_own_pairs(u.count, blocks), _own_pairs(v.count, blocks), _cross_pairs(u, v, blocks)]
    total = sum(len(workers.share(each)) for each in pairs)
    with tqdm(desc="precision and recall", total=total, disable=not progress) as bar:
        radii_u, radii_v = (_radii(side, ks, rule, blocks, percentile, bar, workers) for side in (u, v))
        in_u, in_v = _covered(u, radii_u, v, radii_v, rule, blocks, bar, workers)
    precision, recall = in_u.numpy().mean(0), in_v.numpy().mean(0)
    return (float(precision[0]), float(recall[0])) if np.ndim(k) == 0 else (precision, recall)
