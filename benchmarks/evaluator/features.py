"""Features per image of the full-size random graph: our network against the TensorFlow graph, in turns."""

import runpy
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np

from evaluation.inception import load_inception
from evaluation.tensorflow_backend import TensorFlowFeatures

MAKER = Path(__file__).parents[2] / "tests/golden/make_tiny_inception_graph.py"
BAR = 0.9  # most of the TensorFlow graph's time


def clocked(features, images):
    """Seconds of wall and of processor time per image."""
    wall, busy = time.perf_counter(), time.process_time()
    features(images)
    return (time.perf_counter() - wall) / len(images), (time.process_time() - busy) / len(images)


def run(repeats=5, batch_size=64, size=256):
    """One row: medians over pairs of runs, TensorFlow first and ours second."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "full.pb"
        path.write_bytes(runpy.run_path(str(MAKER))["full_graph"](0))
        ours, theirs = load_inception(path), TensorFlowFeatures(path)
    images = np.random.RandomState(0).randint(0, 256, (batch_size, size, size, 3), dtype=np.uint8)
    for features in (theirs, ours):
        features(images)
    pairs = [(clocked(theirs, images), clocked(ours, images)) for _ in range(repeats)]
    row = {"part": "features", "case": f"{batch_size} images of {size} px", "pairs": repeats, "bar": BAR}
    for i, side in enumerate(("baseline", "ours")):
        row[side] = {"seconds": median(p[i][0] for p in pairs), "cpu_seconds": median(p[i][1] for p in pairs)}
    row["ratio"] = median(b[0] / a[0] for a, b in pairs)
    row["cpu_ratio"] = median(b[1] / a[1] for a, b in pairs)
    row["holds"] = row["ratio"] <= BAR
    return [row]


def main():
    for row in run():
        for side in ("baseline", "ours"):
            print(
                f"{side:10} {row[side]['seconds']:.4f} s per image, {row[side]['cpu_seconds']:.4f} s of the processor"
            )
        print(f"ratio {row['ratio']:.3f} (processor time {row['cpu_ratio']:.3f}), bar {row['bar']}")


if __name__ == "__main__":
    main()
