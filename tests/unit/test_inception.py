"""The reader of graphs, resizing, the weights' two formats, where weights are looked for, and damaged files."""

import hashlib
import io
import runpy
import struct
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from evaluation import inception
from evaluation.graph import read_graph
from evaluation.inception import SmallInception, find_weights, load_inception, resize

MAKER = Path(__file__).parents[1] / "golden/make_tiny_inception_graph.py"
made = SimpleNamespace(**runpy.run_path(str(MAKER)))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The small graph as a file."""
    path = tmp_path_factory.mktemp("graph") / "tiny.pb"
    path.write_bytes(made.tiny_graph(0))
    return path


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """A folder of one's own, without weights in any of the usual places."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(inception.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path


def state_of(path):
    """The graph's weights as the public .pth names and holds them."""
    state = inception._from_graph(read_graph(path))
    bias = torch.from_numpy(read_graph(path)["softmax/biases"])
    return state | {"fc.bias": bias, "conv.bn.num_batches_tracked": torch.tensor(0)}


def const(name, tensor):
    attr = made.p_bytes(5, made.p_bytes(1, "value") + made.p_bytes(2, made.p_bytes(8, tensor)))
    return made.p_bytes(1, made.p_bytes(1, name) + made.p_bytes(2, "Const") + attr)


def test_read_graph_of_all_forms(tmp_path):
    """Raw content, single and packed values, repeated last values, negative numbers; text is left out."""
    shape = made.p_bytes(2, made.tensor_shape((2, 2)))
    nodes = {
        "raw": made.tensor(np.arange(6, dtype=np.int32).reshape(2, 3)),
        "scalar": made.p_int(1, 1) + made.p_bytes(2, b"") + made.p_float(5, 128.0),
        "packed": made.p_int(1, 1) + shape + made.p_bytes(5, struct.pack("<3f", 1, 2, 3)),
        "negative": made.p_int(1, 3) + shape + made.p_int(7, -2),
        "varints": made.p_int(1, 3) + shape + made.p_bytes(7, bytes([1, 2, 0xAC, 0x02, 4])),
        "zeros": made.p_int(1, 1) + shape,
        "text": made.string_scalar(b"words"),
    }
    path = tmp_path / "graph.pb"
    path.write_bytes(b"".join(const(*node) for node in nodes.items()) + made.p_bytes(4, made.p_int(1, 8)))
    found = {name: array.tolist() for name, array in read_graph(path).items()}
    assert found == {
        "raw": [[0, 1, 2], [3, 4, 5]],
        "scalar": 128.0,
        "packed": [[1, 2], [3, 3]],
        "negative": [[-2, -2], [-2, -2]],
        "varints": [[1, 2], [300, 4]],
        "zeros": [[0, 0], [0, 0]],
    }


def test_read_graph_is_what_was_written(tiny):
    graph, found = made.Graph(0), read_graph(tiny)
    made.head(graph)
    graph.conv("conv", "Mul", 3, 8, (3, 3))
    again = made.Graph(0)
    weight = again.bell((3, 3, 3, 8), np.sqrt(1 / 27))
    np.testing.assert_array_equal(found["conv/conv2d_params"], weight)
    assert found["softmax/weights"].shape == (2048, 1008)
    assert found["Mul/y"] == np.float32(1 / 128)


DAMAGED = {
    "empty": lambda data: b"",
    "text": lambda data: b"these are not weights, they are words\n" * 20,
    "zeros": lambda data: bytes(1000),
    "half": lambda data: data[: len(data) // 2],
    "end missing": lambda data: data[:-3],
    "start missing": lambda data: data[7:],
    "page instead of a file": lambda data: b"<!DOCTYPE html><html>not found</html>",
    "broken zip": lambda data: b"PK\x03\x04" + data[:1000],
    "broken pickle": lambda data: b"\x80\x02" + data[:1000],
    "numbers that are none": lambda data: data.replace(struct.pack("<f", 0.75), struct.pack("<f", np.nan)),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_weights(tiny, tmp_path, damage):
    path = tmp_path / "weights"
    path.write_bytes(DAMAGED[damage](tiny.read_bytes()))
    with pytest.raises(ValueError, match=r"weights: (.*damaged|not .*graph|not .*2015)"):
        load_inception(path)


def test_every_cut_is_noticed(tiny, tmp_path):
    """Wherever the file ends too early; the version at the very end is not needed."""
    data, path = tiny.read_bytes(), tmp_path / "cut.pb"
    rng = np.random.default_rng(0)
    for size in rng.integers(0, data.rindex(b"softmax/weights") - 100, 12):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"cut\.pb"):
            load_inception(path)


def test_missing_and_foreign_files(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"absent\.pb: cannot be read \(No such file"):
        load_inception(tmp_path / "absent.pb")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="not the weights of the Inception"):
        load_inception(tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match=r"list\.pth: .*not a file of weights"):
        load_inception(tmp_path / "list.pth")
    state = state_of(tiny)
    torch.save(state | {"conv.conv.weight": torch.zeros(8, 3, 5, 5)}, tmp_path / "shape.pth")
    with pytest.raises(ValueError, match=r"not the weights of the Inception.*conv\.weight differs"):
        load_inception(tmp_path / "shape.pth")


def test_foreign_code_is_not_run(tmp_path):
    torch.save({"fc.weight": io.StringIO("object")}, tmp_path / "object.pth")
    with pytest.raises(ValueError, match="damaged, or not a file of weights"):
        load_inception(tmp_path / "object.pth")


@pytest.mark.parametrize("zipped", [True, False])
def test_both_formats_and_their_hash(tiny, tmp_path, zipped):
    """The same features from .pb and .pth, whatever the name; a name that claims another hash is refused."""
    path = tmp_path / "weights.pb"
    torch.save(state_of(tiny), path, _use_new_zipfile_serialization=zipped)
    images = torch.from_numpy(made.make_images(1, 3, 20, "ref"))
    for found, expected in zip(load_inception(path)(images), load_inception(tiny)(images), strict=True):
        assert torch.equal(found, expected)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    load_inception(path.rename(tmp_path / f"weights-{digest[:8]}.pth"))
    wrong = (tmp_path / f"weights-{digest[:8]}.pth").rename(tmp_path / "weights-6726825d.pth")
    with pytest.raises(ValueError, match="SHA-256"):
        load_inception(wrong)


def test_names_of_all_layers():
    with torch.device("meta"):
        layers = {name.removesuffix(".weight") for name in inception.Inception().state_dict() if "weight" in name}
    assert set(inception.layer_names().values()) == layers
    assert len(layers) == 94


def test_taps(tiny):
    """Shapes; a batch is its images; spatial features are the first seven channels, pixel by pixel; no bias."""
    net = load_inception(tiny)
    images = torch.from_numpy(made.make_images(1, 5, 24, "ref"))
    pool, spatial = net(images)
    assert (pool.shape, spatial.shape, net.logits(pool).shape) == ((5, 2048), (5, 2023), (5, 1008))
    assert isinstance(net.network, SmallInception)
    torch.testing.assert_close(net(images[3:4])[0][0], pool[3], rtol=1e-4, atol=1e-5)
    x = (resize(images) - 128) / 128
    tap = net.network(x.permute(0, 3, 1, 2))[1]
    torch.testing.assert_close(spatial.view(5, 17, 17, 7)[2, 4, 9], tap[2, :7, 4, 9], rtol=1e-4, atol=1e-5)
    weights = torch.from_numpy(read_graph(tiny)["softmax/weights"])
    torch.testing.assert_close(net.logits(pool), pool @ weights)
    assert torch.equal(net(images.numpy())[0], pool)


def test_resize_is_the_corner_grid():
    """Pixel i comes from i * size / 299 exactly: nothing changes at 299, and the first pixel stays."""
    images = torch.randint(0, 256, (2, 299, 299, 3), dtype=torch.uint8)
    assert torch.equal(resize(images), images.float())
    ramp = torch.arange(64, dtype=torch.uint8).view(1, 1, 64, 1).expand(1, 64, 64, 3)
    expected = (torch.arange(299) * (64 / 299)).clamp_max(63)
    torch.testing.assert_close(resize(ramp)[0, 7, :, 1], expected)


def test_places_in_their_order(nowhere, monkeypatch):
    """Each place is taken over the ones after it."""
    places = {
        "hub": nowhere / "hub/checkpoints/pt_inception-2015-12-05-6726825d.pth",
        "cached weights": nowhere / "cache" / inception.WEIGHTS_NAME,
        "cached graph": nowhere / "cache" / inception.GRAPH_NAME,
        "folder": nowhere / inception.GRAPH_NAME,
    }
    for path in places.values():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
        assert find_weights(offline=True, cache_dir="cache").absolute() == path
    (nowhere / "other").write_bytes(b"")
    monkeypatch.setenv(inception.VARIABLE, "other")
    assert find_weights().name == "other"
    assert find_weights(places["hub"], offline=True) == places["hub"]


def test_only_the_graph_for_tensorflow(nowhere):
    (nowhere / "cache").mkdir()
    (nowhere / "cache" / inception.WEIGHTS_NAME).write_bytes(b"")
    assert find_weights(offline=True, cache_dir="cache").name == inception.WEIGHTS_NAME
    with pytest.raises(ValueError, match=f"{inception.GRAPH_URL}.*--inception"):
        find_weights(offline=True, cache_dir="cache", graph=True)


def test_nothing_found(nowhere, monkeypatch):
    with pytest.raises(ValueError, match=f"{inception.WEIGHTS_URL}.*--inception"):
        find_weights(offline=True)
    with pytest.raises(ValueError, match=r"--inception absent\.pb: no such file"):
        find_weights("absent.pb")
    monkeypatch.setenv(inception.VARIABLE, "absent.pth")
    with pytest.raises(ValueError, match=rf"{inception.VARIABLE} absent\.pth: no such file"):
        find_weights()


def no_network(url, timeout):
    raise urllib.error.URLError("no network")


BAD_DOWNLOADS = {
    "no network": (no_network, False, "no network"),
    "other file": (lambda url, timeout: io.BytesIO(b"words"), False, "SHA-256"),
    "other graph": (lambda url, timeout: io.BytesIO(b"words"), True, "not a frozen TensorFlow graph"),
}


@pytest.mark.parametrize("case", BAD_DOWNLOADS)
def test_failed_download_leaves_nothing(nowhere, monkeypatch, case):
    opener, graph, reason = BAD_DOWNLOADS[case]
    monkeypatch.setattr(urllib.request, "urlopen", opener)
    with pytest.raises(ValueError, match=f"https://.* cannot be fetched .*{reason}.*--inception"):
        find_weights(cache_dir="cache", graph=graph)
    assert not list((nowhere / "cache").iterdir())


def test_download(nowhere, monkeypatch, tiny):
    """The file comes under its own name only when whole, and is found there afterwards."""
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: io.BytesIO(tiny.read_bytes()))
    path = find_weights(graph=True)
    assert path.read_bytes() == tiny.read_bytes()
    assert [p.name for p in (nowhere / "xdg/tinyfusion").iterdir()] == [inception.GRAPH_NAME]
    assert find_weights(offline=True, graph=True) == path


def test_tensorflow_is_not_imported(root):
    code = "import sys, evaluation.inception, evaluation.tensorflow_backend; print('tensorflow' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
