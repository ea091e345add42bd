"""The protocol: features of two sets of images, streamed and shared among processes, and the numbers they give."""

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from engine.files import write_atomically
from engine.threads import own_cores
from evaluation import METRICS
from evaluation.batches import STATISTICS, digest
from evaluation.inception import find_weights, load_inception
from evaluation.metrics import (
    FeatureStatistics,
    Workers,
    frechet_distance,
    frechet_distance_of_features,
    inception_score,
    precision_recall,
)

LABELS = {"is": "Inception Score", "fid": "FID", "sfid": "sFID", "precision": "Precision", "recall": "Recall"}
WIDTHS = {"pool": 2048, "spatial": 2023, "logits": 1008}
TAPS = {"fid": ("pool", "mu", "sigma"), "sfid": ("spatial", "mu_s", "sigma_s")}  # metric: features, mean, covariance
PUBLISHED, FEW = 50_000, 2_048  # samples of published numbers; fewer than FEW make covariances singular


class Extractor:
    """Features of uint8 images (b, H, W, 3): pool (b, 2048), spatial (b, 2023), logits (b, 1008).

    They stay where they are made: tensors on the device, or arrays of the TensorFlow backend.
    """

    def __init__(self, backend, weights, device="cpu"):
        self.backend, self.weights = backend, weights
        self.name = {"torch": "PyTorch", "tensorflow": "TensorFlow"}[backend]
        if backend == "torch":
            self.network = load_inception(weights, device)
        else:
            from evaluation.tensorflow_backend import TensorFlowFeatures

            self.network = TensorFlowFeatures(weights)

    def features(self, images):
        return self.network(images)

    def logits(self, pool):
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")  # no TF32
        try:
            return self.network.logits(pool)
        finally:
            torch.set_float32_matmul_precision(precision)


def load_extractor(backend="torch", path=None, device="cpu", offline=False, cache_dir=None):
    """An Extractor; the first process of a machine downloads the weights if need be."""
    weights = find_weights(path, offline=offline, cache_dir=cache_dir, graph=backend == "tensorflow")
    try:
        return Extractor(backend, weights, device)
    except ImportError as error:
        raise ValueError(f"backend {backend}: {error}; install it, or take the other backend") from None


def check(images, metrics, is_sample):
    """Raise ValueError unless the metrics, or "stats" to be saved, can be computed of `images`; needs no network."""
    needs = {"is": 1 if is_sample else 0, "pr": 4, "stats": 2}
    if "stats" in metrics and images.statistics:
        raise ValueError("the images' file holds statistics already; this is for images without")
    for name, (_, mean, _) in TAPS.items():
        needs[name] = 0 if mean in images.statistics else 2
        if name in metrics and needs[name] and images.statistics:
            raise ValueError(f"{mean} is not among the stored statistics; leave out {name} with --metrics")
    for name in metrics:
        if images.n < needs[name]:
            few = f"holds {images.n} image{'' if images.n == 1 else 's'}" if images.n else "holds statistics only"
            advice = "" if name == "stats" else f"; leave out {name} with --metrics"
            raise ValueError(f"{few}, {name} needs {needs[name]} images or more{advice}")


def list_warnings(reference, sample, metrics, rule="adm"):
    """Reasons why numbers are not comparable with published ones, as sentences."""
    found = []
    if "pr" in metrics and rule != "adm":
        found.append(f"precision and recall from {rule} distances: published ones are rounded to float16")
    if 0 < sample.n < PUBLISHED and not set(metrics) <= {"pr"}:
        found.append(f"{sample.n} samples: published numbers are made with {PUBLISHED}")
    for name, images in (("reference", reference), ("sample", sample)):
        if 0 < images.n < FEW and ("fid" in metrics or "sfid" in metrics) and not images.statistics:
            found.append(f"{name}: fewer than {FEW} images make the covariances singular, FID and sFID large")
        if images.lossy:
            found.append(f"{name}: JPEG pictures have other features than the images before compression")
    sizes = {(images.height, images.width) for images in (reference, sample) if images.n}
    if len(sizes) > 1:
        sizes = [f"{images.width}x{images.height}" for images in (sample, reference)]
        found.append(f"samples of {sizes[0]} pixels, but a reference of {sizes[1]}")
    return found


def wanted(images, metrics, is_sample, statistics=False):
    """What has to be computed of `images`: rows (pool, spatial, logits) and means (mu, mu_s; with covariances)."""
    want = {"pool"} if "pr" in metrics else set()
    if "is" in metrics and is_sample:
        want.add("logits")
    for name, (tap, mean, _) in TAPS.items():
        if statistics or (name in metrics and mean not in images.statistics):
            want.add(mean)
            if images.n < FEW:
                want.add(tap)  # few rows: their distance needs no covariance
    return want


def extract(images, extractor, want, batch_size=64, title=""):
    """A dict of what `want` names, computed by all processes, each a run of the images in file order.

    Only the main process gets it, the others None. Raises ValueError if a feature is not finite.
    """
    rank, world = _processes()
    if not want:
        return {} if rank == 0 else None
    start, stop = (images.n * i // world for i in (rank, rank + 1))
    rows = {key: np.empty((stop - start, width), np.float32) for key, width in WIDTHS.items() if key in want}
    sums = {tap: FeatureStatistics(WIDTHS[tap]) for tap, mean, _ in TAPS.values() if mean in want}
    done = start
    with tqdm(total=stop - start, desc=title, unit="img", disable=rank > 0) as bar:
        for batch in images.batches(batch_size, start, stop):
            found = dict(zip(("pool", "spatial"), extractor.features(batch), strict=True))
            if not all(torch.as_tensor(x).isfinite().all() for x in found.values()):
                raise ValueError(f"features of image {done} or one soon after are not finite; check the weights")
            if "logits" in rows:
                found["logits"] = extractor.logits(found["pool"])
            for key, array in rows.items():
                array[done - start : done - start + len(batch)] = torch.as_tensor(found[key]).cpu().numpy()
            for key, total in sums.items():
                total.update(found[key])
            done += len(batch)
            bar.update(len(batch))
    result = {key: _gather_rows(array, images.n) for key, array in rows.items()}
    for tap, mean, covariance in TAPS.values():
        total, *others = _gather(sums[tap].bring_to_host()) if tap in sums else [None]
        for other in others:
            total.merge(other)
        if rank == 0 and total:
            result[mean], result[covariance] = total.mean, total.covariance
    return result if rank == 0 else None


def extract_cached(images, extractor, want, cache_dir, **options):
    """`extract`, kept in a file whose name depends on the contents of the images, on the weights and on `want`."""
    if not cache_dir or not want:
        return extract(images, extractor, want, **options)
    name = "-".join([images.digest()[:24], digest(extractor.weights)[:24], extractor.backend, *sorted(want)])
    path = Path(cache_dir) / f"{name}.npz"
    kept = read_cache(path) if _processes()[0] == 0 else None
    is_kept = [kept is not None]
    if dist.is_initialized():
        dist.broadcast_object_list(is_kept)
    if is_kept[0]:
        return kept
    result = extract(images, extractor, want, **options)
    if result is not None:
        save_arrays(path, result)
    return result


def read_cache(path):
    """The arrays of a file, or None if it is missing or damaged."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return dict(archive)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error):
        return None


def save_arrays(path, arrays):
    """Write an .npz file; nobody sees half of it."""

    def write(temporary):
        with open(temporary, "wb") as file:  # np.savez would add a suffix to a path
            np.savez(file, **arrays)

    write_atomically(path, write)


def save_stats(path, found):
    """Write mu, sigma, mu_s and sigma_s, as a reference carries them."""
    save_arrays(path, {key: found[key] for key in STATISTICS})


def compare(reference, sample, metrics, rule="adm"):
    """Yields (name, number) in the order of the protocol, from two dicts of features and statistics.

    Their entry `few` tells that the rows of the statistics are there, and fewer than a covariance needs.
    In the main process; for "pr" the others have to call `share_precision_recall` meanwhile.
    """
    if "pr" in metrics:  # first, as the others wait for their share
        precision, recall = share_precision_recall(reference["pool"], sample["pool"], rule)
    if "is" in metrics:
        yield "is", inception_score(sample.pop("logits"))
    for name, (tap, mean, covariance) in TAPS.items():
        if name in metrics:
            if sample["few"] and reference["few"]:
                yield name, frechet_distance_of_features(sample[tap], reference[tap])
            else:
                yield name, frechet_distance(*(side[key] for side in (sample, reference) for key in (mean, covariance)))
    if "pr" in metrics:
        yield "precision", precision
        yield "recall", recall


def share_precision_recall(ref=None, sample=None, rule="adm"):
    """Precision and recall of rows (Nr, D) and (Ns, D) that the main process has; every process computes a part."""
    ref, sample = _broadcast_rows(ref), _broadcast_rows(sample)
    rank, world = _processes()
    # Under a launcher torch and NumPy's BLAS have one thread a process, and the latter cannot be given more any more:
    # so the cores that are left compute tiles of their own, whose numbers do not depend on that.
    threads = max(1, own_cores() // torch.get_num_threads())
    workers = Workers(rank, world, _gather_everywhere, threads)
    return precision_recall(ref, sample, rule=rule, progress=rank == 0, workers=workers)


def latex(numbers):
    """The values as cells of a table row."""
    return " & ".join(f"{value:.{4 if name in ('precision', 'recall') else 2}f}" for name, value in numbers.items())


@dataclass(frozen=True)
class Options:
    """What is computed, and how; settings of evaluator.py have these names.

    pr_dtype: rule of the distances of precision and recall, see metrics.precision_recall. batch_size: images computed
    together. cache_dir: where to keep features of the reference. save_stats: a file for the statistics of the sample.
    """

    metrics: tuple = METRICS
    pr_dtype: str = "adm"
    batch_size: int = 64
    cache_dir: str | None = None
    save_stats: str | None = None


def evaluate(reference, sample, extractor, options=Options()):
    """Print the lines of the protocol and return {name: number}; in other processes than the main one, None."""
    rank = _processes()[0]
    say = print if rank == 0 else lambda *words, **options: None
    say(f"warming up {extractor.name}...", flush=True)
    found = []
    for title, images in (("reference", reference), ("sample", sample)):
        say(f"computing {title} batch activations...", flush=True)
        is_sample = images is sample
        want = wanted(images, options.metrics, is_sample, bool(options.save_stats) and is_sample)
        cache, batches = None if is_sample else options.cache_dir, {"batch_size": options.batch_size, "title": title}
        features = extract_cached(images, extractor, want, cache, **batches)
        say(f"computing/reading {title} batch statistics...", flush=True)
        few = images.n < FEW and not images.statistics
        found.append({**(features or {}), **images.statistics, "few": few})
    if rank:
        if "pr" in options.metrics:
            share_precision_recall(rule=options.pr_dtype)
        return None
    if options.save_stats:
        save_stats(options.save_stats, found[1])
    say("Computing evaluations...", flush=True)
    numbers = {}
    for name, value in compare(*found, options.metrics, options.pr_dtype):
        numbers[name] = float(value)
        print(f"{LABELS[name]}:", numbers[name], flush=True)
    print("Latex:", latex(numbers), flush=True)
    return numbers


def write_statistics(images, extractor, path, batch_size=64):
    """Write mu, sigma, mu_s and sigma_s of `images` to an .npz file."""
    found = extract(images, extractor, {"mu", "mu_s"}, batch_size, "images")
    if found:
        save_stats(path, found)
        print(f"wrote {path}: statistics of {images.n} images", flush=True)


def _processes():
    """This process's number, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _gather(value):
    """The values of all processes in a list, on the main process; [None] elsewhere."""
    if not dist.is_initialized():
        return [value]
    found = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, found)
    return found or [None]


def _gather_everywhere(value):
    """The values of all processes in a list, on each of them."""
    found = [value] * _processes()[1]
    if dist.is_initialized():
        dist.all_gather_object(found, value)
    return found


def _broadcast_rows(array, piece=4096):
    """The main process's rows (N, D) float32, on all; a piece at a time."""
    if _processes()[1] == 1:
        return array
    shape = [array.shape if array is not None else None]
    dist.broadcast_object_list(shape)
    rows = torch.empty(shape[0]) if array is None else torch.from_numpy(np.ascontiguousarray(array, np.float32))
    for part in rows.split(piece):
        dist.broadcast(part, 0)
    return rows.numpy()


def _gather_rows(array, n, piece=4096):
    """The n rows of all processes in their order, on the main process; a piece at a time, so nothing is held twice."""
    rank, world = _processes()
    if world == 1:
        return array
    whole = np.empty((n, array.shape[1]), array.dtype) if rank == 0 else None
    for i in range(0, -(-n // world), piece):
        for other, rows in enumerate(_gather(array[i : i + piece])):
            if rank == 0:
                start = n * other // world + i
                whole[start : start + len(rows)] = rows
    return whole
