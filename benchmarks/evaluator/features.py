"""Features per image of the full-size random graph: our network against the TensorFlow graph."""

import runpy
import tempfile
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.measure import Case, Side, main
from evaluation.inception import load_inception
from evaluation.tensorflow_backend import TensorFlowFeatures

MAKER = Path(__file__).parents[2] / "tests/golden/make_tiny_inception_graph.py"


def build(setup, load):
    n, size = (2, 32) if setup.tiny else (64, 256)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "full.pb"
        path.write_bytes(runpy.run_path(str(MAKER))["full_graph"](0))
        features = load(path)
    images = np.random.RandomState(0).randint(0, 256, (n, size, size, 3), dtype=np.uint8)
    return Side(lambda: features(images), items=n)


SIDES = {"TensorFlow graph": partial(build, load=TensorFlowFeatures), "ours": partial(build, load=load_inception)}
CASES = [Case("features", SIDES, [("speedup", "ours", ">=", 1 / 0.9)], memory=False)]

if __name__ == "__main__":
    main(__spec__.name, __doc__, CASES)
