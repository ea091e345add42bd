"""Both backends and torch-fidelity's network agree: resizing to the bit, both taps, logits, Frechet distance."""

import hashlib
import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from evaluation import inception
from evaluation.graph import read_graph
from evaluation.inception import load_inception, resize
from evaluation.metrics import frechet_distance, frechet_distance_of_features

GOLDEN = Path(__file__).parents[1] / "golden"
made = SimpleNamespace(**runpy.run_path(str(GOLDEN / "make_tiny_inception_graph.py")))
IMAGES = 24


@pytest.fixture(scope="module", params=["tiny", "full"])
def graph(request, tmp_path_factory):
    """A random graph as a file, checked to be the one that numbers were recorded with."""
    path = tmp_path_factory.mktemp("graph") / f"{request.param}.pb"
    data = (made.tiny_graph if request.param == "tiny" else made.full_graph)(0)
    recorded = json.loads((GOLDEN / "evaluator_e2e.json").read_text())["graph"][request.param]["sha256"]
    assert hashlib.sha256(data).hexdigest() == recorded
    path.write_bytes(data)
    return path


@pytest.fixture(scope="module")
def images():
    """Different sizes, each a batch."""
    return [made.make_images(1, IMAGES - 6, 40, "ref"), made.make_images(2, 6, 320, "sample")]


def tensorflow_features(path):
    pytest.importorskip("tensorflow")
    from evaluation.tensorflow_backend import TensorFlowFeatures

    return TensorFlowFeatures(path)


def assert_close(found, expected, tolerance):
    """Relative to the largest value."""
    assert found.shape == expected.shape
    assert np.abs(np.asarray(found) - expected).max() <= tolerance * np.abs(expected).max()


def test_same_features(graph, images):
    """Both taps to 1e-4 of their largest value, the logits too."""
    ours, theirs = load_inception(graph), tensorflow_features(graph)
    for batch in images:
        (pool, spatial), expected = ours(torch.from_numpy(batch)), theirs(batch)
        assert all(isinstance(x, np.ndarray) and x.dtype == np.float32 for x in expected)
        assert_close(pool, expected[0], 1e-4)
        assert_close(spatial, expected[1], 1e-4)
        assert_close(ours.logits(pool), theirs.logits(expected[0]), 1e-4)
        assert [x.shape[1] for x in expected] == [2048, 2023]


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (32, 32), (64, 48), (100, 333), (256, 256), (299, 299), (512, 512)])
def test_resize_to_the_bit(size):
    tf = pytest.importorskip("tensorflow").compat.v1
    pixels = np.random.RandomState(0).randint(0, 256, (2, *size, 3), dtype=np.uint8)
    flags = {"align_corners": False, "half_pixel_centers": False}
    expected = tf.raw_ops.ResizeBilinear(images=pixels.astype(np.float32), size=[299, 299], **flags).numpy()
    np.testing.assert_array_equal(resize(torch.from_numpy(pixels)).numpy(), expected)


def test_tensorflow_wants_its_graph(tmp_path):
    """A clear message for the other format, damaged files and foreign graphs, before TensorFlow is loaded."""
    from evaluation.tensorflow_backend import TensorFlowFeatures

    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=rf"weights\.pth: .*TensorFlow needs the graph, from {inception.GRAPH_URL}"):
        TensorFlowFeatures(tmp_path / "weights.pth")
    graph = made.Graph(0)
    graph.const("other", np.float32(1))
    (tmp_path / "other.pb").write_bytes(graph.serialise())
    with pytest.raises(ValueError, match="softmax/weights is missing"):
        TensorFlowFeatures(tmp_path / "other.pb")
    graph.const("softmax/weights", np.zeros((2048, 1008), np.float32))
    (tmp_path / "other.pb").write_bytes(graph.serialise())
    pytest.importorskip("tensorflow")
    with pytest.raises(ValueError, match="not the Inception graph"):
        TensorFlowFeatures(tmp_path / "other.pb")


def test_like_torch_fidelity(tmp_path):
    """Its network, with the weights in the public .pth's form, and its distance between features."""
    fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    graph, weights = tmp_path / "full.pb", tmp_path / "full.pth"
    graph.write_bytes(made.full_graph(0))
    consts = read_graph(graph)
    state = inception._from_graph(consts) | {"fc.bias": torch.from_numpy(consts["softmax/biases"])}
    torch.save(state, weights)
    taps = ["2048", "logits_unbiased"]
    theirs = fidelity.FeatureExtractorInceptionV3("inception-v3-compat", taps, feature_extractor_weights_path=weights)
    ours, found, expected = load_inception(weights), [], []
    for kind in ("ref", "sample"):
        batch = torch.from_numpy(made.make_images(3, 12, 48, kind))
        pool, _ = ours(batch)
        with torch.no_grad():
            pool_expected, logits_expected = theirs(batch.permute(0, 3, 1, 2))
        assert_close(pool, pool_expected.numpy(), 1e-4)
        assert_close(ours.logits(pool), logits_expected.numpy(), 1e-4)
        found.append(pool.numpy())
        expected.append(pool_expected)
    statistics = [fid_features_to_statistics(features) for features in expected]
    distance = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert frechet_distance_of_features(*found) == pytest.approx(distance, rel=1e-4, abs=2e-3)


def test_distance_like_torch_fidelity():
    """Of regular covariances, to 1e-8."""
    metric = pytest.importorskip("torch_fidelity.metric_fid")
    rng = np.random.default_rng(0)
    sets = [rng.standard_normal((400, 64)) * np.linspace(0.2, 2, 64) + shift for shift in (0, 0.3)]
    statistics = [{"mu": x.mean(0), "sigma": np.cov(x, rowvar=False)} for x in sets]
    expected = metric.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    found = frechet_distance(*(array for each in statistics for array in each.values()))
    assert found == pytest.approx(expected, rel=1e-8)
