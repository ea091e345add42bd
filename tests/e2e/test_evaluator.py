"""The evaluator's command line: recorded numbers in both backends, wrong input, processes, memory."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tracemalloc
import zipfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine.errors import InputError
from evaluation import evaluate as protocol
from evaluation.batches import open_images
from evaluation.metrics import precision_recall

GOLDEN = Path(os.environ.get("GOLDEN_DIR") or Path(__file__).parent.parent / "golden")
RECORDED = json.loads((GOLDEN / "evaluator_e2e.json").read_text())
LABELS = ["Inception Score", "FID", "sFID", "Precision", "Recall"]


def load_maker():
    spec = importlib.util.spec_from_file_location("make_graph", GOLDEN / "make_tiny_inception_graph.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


maker = load_maker()


@pytest.fixture(scope="session")
def graphs(tmp_path_factory):
    """Files of Inception weights: the tiny graph, and one of full size."""
    folder = tmp_path_factory.mktemp("graphs")
    (folder / "tiny.pb").write_bytes(maker.tiny_graph(0))
    (folder / "full.pb").write_bytes(maker.full_graph(0))
    return {name: folder / f"{name}.pb" for name in ("tiny", "full")}


@pytest.fixture(scope="session")
def image_file(tmp_path_factory):
    """Writes the images that arguments such as "--seed 1 --num 160 --size 40 --kind ref --stats 5" describe."""
    folder = tmp_path_factory.mktemp("images")

    @cache
    def write(arguments):
        words = dict(re.findall(r"--(\w+) (\w+)", arguments))
        seed, num, size = (int(words[name]) for name in ("seed", "num", "size"))
        arrays = {"arr_0": maker.make_images(seed, num, size, words["kind"])}
        if "stats" in words:
            arrays["mu"], arrays["sigma"] = maker.make_stats(int(words["stats"]), 2048)
            arrays["mu_s"], arrays["sigma_s"] = maker.make_stats(int(words["stats"]) + 1, 2023)
        path = folder / f"{arguments.replace(' ', '')}.npz"
        np.savez(path, **arrays)
        return path

    return write


@pytest.fixture(scope="session")
def plain(image_file):
    """Reference and samples of the recorded case `plain`."""
    return [image_file(arguments) for arguments in RECORDED["cases"]["plain"]["images_args"]]


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def all_threads():
    torch.set_num_threads(os.cpu_count())
    yield
    torch.set_num_threads(1)


def numbers_of(text):
    return {name: float(value) for name, value in re.findall(r"^([\w ]+): (\S+)$", text, re.M) if name in LABELS}


def check_numbers(found, case, n_ref, n_sample):
    """At the tolerances across machines and backends."""
    expected = RECORDED["cases"][case]["numbers"]
    assert list(found) == LABELS
    assert found["Inception Score"] == pytest.approx(expected["Inception Score"], rel=1e-4)
    for name in ("FID", "sFID"):
        assert abs(found[name] - expected[name]) <= 1e-4 * abs(expected[name]) + 2e-3, name
    assert abs(found["Precision"] - expected["Precision"]) <= 3 / n_sample
    assert abs(found["Recall"] - expected["Recall"]) <= 3 / n_ref


CASES = [(case, backend) for case in RECORDED["cases"] for backend in ("tensorflow", "torch")]
LONG = [("bothstats", "tensorflow"), ("full", "tensorflow"), ("many", "tensorflow"), ("many", "torch")]  # minutes


@pytest.mark.usefixtures("all_threads")
@pytest.mark.parametrize(("case", "backend"), CASES)
def test_recorded(run_script, graphs, image_file, cache_dir, capfd, tmp_path, case, backend):
    """Lines and numbers of the published evaluator; the reference's features come from the cache if they are there."""
    recorded = RECORDED["cases"][case]
    if (case, backend) in LONG and not os.environ.get("GOLDEN_DIR"):
        pytest.skip("long; runs if GOLDEN_DIR is set")
    if backend == "tensorflow":
        pytest.importorskip("tensorflow")
    files = [image_file(arguments) for arguments in recorded["images_args"]]
    out = tmp_path / "out.json"
    flags = ["--backend", backend, "--inception", graphs[recorded["graph"]], "--cache-dir", cache_dir, "--json", out]
    capfd.readouterr()
    run_script("evaluator", *files, *flags, "--offline", "--device", "cpu")
    lines = capfd.readouterr().out.splitlines()
    assert lines[0] == f"warming up {'TensorFlow' if backend == 'tensorflow' else 'PyTorch'}..."
    assert lines[1:6] == recorded["stdout"][1:6]
    assert [line.partition(":")[0] for line in lines[6:]] == [*LABELS, "Latex"]
    found = numbers_of("\n".join(lines))
    check_numbers(found, case, *(open_images(file).n for file in files))
    values = json.loads(out.read_text())
    assert [values[name] for name in ("is", "fid", "sfid", "precision", "recall")] == list(found.values())
    assert lines[11] == "Latex: {:.2f} & {:.2f} & {:.2f} & {:.4f} & {:.4f}".format(*found.values())


class Fake:
    """Instead of a network: features that hold a few pixels."""

    backend, name, device = "torch", "nothing", "cpu"

    def __init__(self, weights=__file__, spoil=False):
        self.weights, self.spoil, self.seen = weights, spoil, 0

    def features(self, images):
        self.seen += len(images)
        found = np.zeros((len(images), 4071), np.float32)
        pixels = images.reshape(len(images), -1)[:, :2000]
        found[:, : pixels.shape[1]] = np.nan if self.spoil else pixels
        return found[:, :2048], found[:, :2023]

    def logits(self, pool):
        return pool[:, :1008] / 255


@pytest.fixture
def fake(monkeypatch):
    """No network is loaded; tells how many images were looked at."""
    extractor = Fake()
    monkeypatch.setattr(protocol, "load_extractor", lambda *args: extractor)
    return extractor


def test_cache(plain, tmp_path, capfd):
    """Reference features are kept by the contents of file and weights; a damaged file is made anew."""
    reference, sample = map(open_images, plain)
    options = protocol.Options(metrics=("is", "pr"), cache_dir=tmp_path)
    first = Fake()
    expected = protocol.evaluate(reference, sample, first, options)
    assert first.seen == 300
    kept = list(tmp_path.iterdir())
    assert len(kept) == 1
    second = Fake()
    assert protocol.evaluate(reference, sample, second, options) == expected
    assert second.seen == 140
    kept[0].write_bytes(kept[0].read_bytes()[:-1000])
    third = Fake()
    assert protocol.evaluate(reference, sample, third, options) == expected
    assert third.seen == 300
    other = tmp_path / "other.pb"
    other.write_text("other weights")
    fourth = Fake(other)
    protocol.evaluate(reference, sample, fourth, options)
    assert fourth.seen == 300


def test_save_stats(run_script, fake, plain, tmp_path, capfd):
    """Statistics of one data set, used as a reference, give the same FID and sFID; there are no images for P/R."""
    run_script("evaluator", plain[0], "--save-stats", tmp_path / "stats.npz")
    run_script("evaluator", *plain, "--metrics", "fid,sfid", "--save-stats", tmp_path / "sample.npz")
    direct = numbers_of(capfd.readouterr().out)
    run_script("evaluator", tmp_path / "stats.npz", tmp_path / "sample.npz", "--metrics", "sfid,fid")
    found = numbers_of(capfd.readouterr().out)
    assert found.keys() == direct.keys() == {"FID", "sFID"}
    assert found == pytest.approx(direct, rel=1e-6)
    with np.load(tmp_path / "stats.npz") as archive:
        assert {key: archive[key].shape for key in archive} == protocol.STATISTICS


def test_warnings(run_script, fake, plain, image_file, tmp_path, capfd):
    other = image_file("--seed 1 --num 20 --size 12 --kind ref")
    run_script("evaluator", other, plain[1], "--pr-dtype", "float32", "--json", tmp_path / "o.json")
    said = capfd.readouterr().err
    for words in ("140 samples", "reference: fewer than 2048", "40x40 pixels, but a reference of 12x12", "float32"):
        assert re.search(f"^warning: .*{words}", said, re.M)
    assert len(json.loads((tmp_path / "o.json").read_text())["warnings"]) == 5


def arrays_of(name, good):
    """A damaged kind of .npz by name: the arrays in it."""
    statistics = {"mu": np.zeros(2048), "sigma": np.eye(2048)}
    spatial = {"mu_s": np.zeros(2023), "sigma_s": np.eye(2023)}
    return {
        "floats": {"arr_0": good / 255.0},
        "nchw": {"arr_0": good.transpose(0, 3, 1, 2)},
        "rgba": {"arr_0": np.concatenate([good, good[..., :1]], -1)},
        "one": {"arr_0": good[:1]},
        "three": {"arr_0": good[:3]},
        "keyless": {"images": good},
        "nan": {"arr_0": good, **statistics, "sigma": np.full((2048, 2048), np.nan)},
        "stats": statistics | spatial,
        "stats_images": {"arr_0": good, **statistics},
        "good": {"arr_0": good},
    }[name]


WRONG = {
    "text": ("{good} {text}", "SAMPLE", "not an .npz"),
    "absent": ("{good} absent.npz", "SAMPLE absent.npz", "no such file"),
    "truncated": ("{truncated} {good}", "REF", "truncated"),
    "key": ("{good} {keyless}", "missing arr_0", "images"),
    "floats": ("{good} {floats}", "SAMPLE", "float64", "expected uint8"),
    "nchw": ("{nchw} {good}", "REF", "NCHW"),
    "rgba": ("{good} {rgba}", "RGBA"),
    "one": ("{good} {one}", "holds 1 image,", "needs"),
    "one reference": ("{one} {good} --metrics fid", "REF", "fid needs 2"),
    "three": ("{good} {three}", "SAMPLE", "3 images, pr needs 4", "--metrics"),
    "nan": ("{nan} {good}", "REF", "sigma", "finite"),
    "sizes": ("{good} {sizes}", "SAMPLE", "same size"),
    "no P/R": ("{stats} {good}", "REF", "statistics only", "leave out pr"),
    "no sFID": ("{stats_images} {good}", "mu_s is not among", "leave out sfid"),
    "no sample": ("{good}", "SAMPLE is missing", "--save-stats"),
    "nothing to save": ("{stats} --save-stats o.npz", "--save-stats o.npz", "statistics already"),
    "output": ("{good} {good} --json .", "--json .", "folder"),
    "stats output": ("{good} --save-stats {text}/o.npz", "--save-stats", "cannot be written"),
    "cache": ("{good} {good} --cache-dir {text}/cache", "--cache-dir", "cannot be written"),
    "device": ("{good} {good} --device tpu", "--device tpu", "expected"),
    "weights absent": ("{good} {good} --inception absent.pb", "--inception absent.pb"),
    "weights damaged": ("{good} {good} --inception {damaged}", "--inception"),
    "weights text": ("{good} {good} --inception {text}", "--inception"),
}


@pytest.fixture(scope="module")
def wrong_files(tmp_path_factory, graphs):
    folder = tmp_path_factory.mktemp("wrong")
    good = maker.make_images(0, 20, 12, "ref")
    names = ["floats", "nchw", "rgba", "one", "three", "keyless", "nan", "stats", "stats_images", "good"]
    for name in names:
        np.savez(folder / f"{name}.npz", **arrays_of(name, good))
    found = {name: folder / f"{name}.npz" for name in names}
    found |= {name: folder / f"{name}.npz" for name in ("text", "truncated", "damaged")} | {"sizes": folder / "a,b"}
    found["text"].write_text("no archive")
    found["truncated"].write_bytes(found["good"].read_bytes()[:-300])
    found["damaged"] = folder / "damaged.pb"
    found["damaged"].write_bytes(graphs["tiny"].read_bytes()[:1_000_000])
    found["sizes"].mkdir()
    for i in (8, 9):
        Image.fromarray(good[0, :i]).save(found["sizes"] / f"{i}.png")
    return found


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input(run_script, wrong_files, tmp_path, monkeypatch, name):
    """Named flag or argument, value and advice; before any image is looked at; nothing is written."""
    command, *words = WRONG[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(protocol.Extractor, "features", lambda *args: pytest.fail("an image was looked at"))
    with pytest.raises(InputError) as caught:
        run_script("evaluator", *command.format(**wrong_files).split(), "--offline")
    for word in words:
        assert word in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_wrong_features(run_script, fake, plain, tmp_path):
    """What is only seen in the features: no output is left."""
    fake.spoil = True
    with pytest.raises(InputError, match="not finite"):
        run_script("evaluator", *plain, "--json", tmp_path / "o.json", "--save-stats", tmp_path / "o.npz")
    assert not list(tmp_path.iterdir())


def test_messages(launch, wrong_files):
    """No traceback, and an exit code."""
    result = launch(0, "evaluator", wrong_files["good"], wrong_files["text"])
    assert result.returncode == 1
    assert result.stderr.startswith("evaluator.py: error: SAMPLE ")
    assert result.stderr.count("\n") == 1
    assert not result.stdout


def test_help(root):
    """Nothing large is imported for it, nor TensorFlow for the other backend."""
    big = "{'torch', 'tensorflow', 'scipy', 'torchvision'}"
    code = f"import sys, evaluator; evaluator.parse_args(['a', 'b']); print({big} & set(sys.modules))"
    code += "; import evaluation.evaluate, evaluation.inception; print('tensorflow' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == ["set()", "False"]
    result = subprocess.run([sys.executable, "evaluator.py", "--help"], cwd=root, capture_output=True, text=True)
    assert result.returncode == 0
    assert "--save-stats" in result.stdout


def test_processes(launch, run_script, graphs, plain, tmp_path, capfd):
    """Two processes give the numbers of one, from shards whose border lies elsewhere than that of the shares."""
    images = open_images(plain[1])
    for i, part in enumerate(np.split(next(images.batches(images.n)), [30])):
        np.savez(tmp_path / f"sample-{i}.npz", arr_0=part)
    flags = ["--inception", graphs["tiny"], "--device", "cpu"]
    result = launch(2, "evaluator", plain[0], tmp_path / "sample-*.npz", *flags, "--cache-dir", tmp_path / "cache")
    assert result.returncode == 0, result.stderr[-3000:]
    assert len(list((tmp_path / "cache").iterdir())) == 1
    found = numbers_of(result.stdout)
    check_numbers(found, "plain", 160, 140)
    assert result.stdout.count("FID: ") == 2
    alone = protocol.load_extractor(path=graphs["tiny"])
    pools = [protocol.extract(images, alone, {"pool"})["pool"] for images in map(open_images, plain)]
    assert (found["Precision"], found["Recall"]) == precision_recall(*pools)


def test_features_stay_on_the_device(graphs, plain):
    """The extractor gives tensors where it computes; what `extract` keeps are arrays on the host."""
    images, extractor = open_images(plain[1]), protocol.load_extractor(path=graphs["tiny"])
    batch = next(images.batches(3))
    pool, spatial = extractor.features(batch)
    assert {type(x) for x in (pool, spatial, extractor.logits(pool))} == {torch.Tensor}
    found = protocol.extract(images, extractor, {"pool", "logits", "mu"})
    assert {type(x) for x in found.values()} == {np.ndarray}
    np.testing.assert_array_equal(found["pool"][:3], pool.numpy())


def test_memory(tmp_path):
    """Far less than the images need: 1,000 of 256 pixels, 197 MB."""
    path = tmp_path / "a.npz"
    header = {"descr": "|u1", "fortran_order": False, "shape": (1000, 256, 256, 3)}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("arr_0.npy", "w") as member:
        np.lib.format.write_array_header_1_0(member, header)
        for _ in range(100):
            member.write(bytes(10 * 256 * 256 * 3))
    tracemalloc.start()
    images = open_images(path)
    found = protocol.extract(images, Fake(), {"pool", "logits"})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found["pool"].shape == (1000, 2048)
    assert peak < sum(array.nbytes for array in found.values()) + 60e6


SAMPLE = ["--num-sampling-steps", 2, "--num-fid-samples", 6, "--per-proc-batch-size", 3]


def test_sample_and_evaluate(student, tmp_path, run_script, capfd, graphs):
    """`sample_ddp.py --evaluate` prints the evaluator's lines right after the samples."""
    np.savez(tmp_path / "ref.npz", arr_0=maker.make_images(1, 8, 8, "ref"))
    files = ["--evaluate", tmp_path / "ref.npz", "--inception", graphs["tiny"]]
    run_script("sample_ddp", "--ckpt", student, "--sample-dir", tmp_path / "s", *SAMPLE, *files)
    numbers = numbers_of(capfd.readouterr().out)
    assert list(numbers) == LABELS
    assert np.isfinite(list(numbers.values())).all()


def test_sampling_checks_the_reference_first(student, tmp_path, run_script):
    """A reference without images is refused before anything is sampled."""
    np.savez(tmp_path / "ref.npz", other=np.zeros(3))
    flags = ["--ckpt", student, "--sample-dir", tmp_path / "s", *SAMPLE]
    with pytest.raises(InputError, match=r"--evaluate .*ref.npz.*arr_0"):
        run_script("sample_ddp", *flags, "--evaluate", tmp_path / "ref.npz")
    assert not (tmp_path / "s").exists()
