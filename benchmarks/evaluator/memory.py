"""Memory of a whole evaluation, 50,000 samples against 10,000 references of 256 px, with a small graph.

Both sets repeat one shard of random images, so that the disk holds 200 MB instead of 12 GB; what has to be in memory is
the same. Takes some five minutes on a core.
"""

import runpy
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.measure import memory
from evaluation.batches import open_images
from evaluation.evaluate import evaluate, load_extractor

MAKER = Path(__file__).parents[2] / "tests/golden/make_tiny_inception_graph.py"
BAR = 3000  # MB besides the network


def main(samples=50, references=10, shard=1000, size=256):
    """Print the most memory above that of the process with its network loaded."""
    with tempfile.TemporaryDirectory() as folder:
        weights, images = Path(folder) / "tiny.pb", Path(folder) / "shard.npz"
        weights.write_bytes(runpy.run_path(str(MAKER))["tiny_graph"](0))
        np.savez(images, np.random.RandomState(0).randint(0, 256, (shard, size, size, 3), dtype=np.uint8))
        extractor = load_extractor("torch", weights)
        extractor.logits(extractor.features(np.zeros((1, size, size, 3), np.uint8))[0])
        before = memory("VmRSS")
        reference, sample = (open_images(",".join([str(images)] * n)) for n in (references, samples))
        evaluate(reference, sample, extractor)
    print(f"{sample.n} x {reference.n}: {memory('VmHWM') - before:.0f} MB above {before:.0f} MB, bar {BAR} MB")


if __name__ == "__main__":
    main()
