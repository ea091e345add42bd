"""Sets of images: what is read, in which order, and what is refused before anything is computed."""

import io
import os
import zipfile

import numpy as np
import pytest
from PIL import Image

from evaluation.batches import open_images

PIXELS = np.random.RandomState(0).randint(0, 256, (11, 6, 5, 3)).astype(np.uint8)
STATISTICS = {"mu": np.ones(2048), "sigma": np.eye(2048), "mu_s": np.ones(2023), "sigma_s": np.eye(2023)}


def read(images, size=4, **share):
    batches = list(images.batches(size, **share))
    assert all(batch.dtype == np.uint8 and 0 < len(batch) <= size for batch in batches)
    return np.concatenate(batches)


def write_member(path, version=(1, 0), array=PIXELS, cut=0, compression=zipfile.ZIP_STORED):
    """An .npz with a member `arr_0` of the wanted header version, without its last `cut` bytes."""
    data = io.BytesIO()
    np.lib.format.write_array(data, array, version=version)
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("arr_0.npy", data.getvalue()[: len(data.getvalue()) - cut])
    return path


def write_pictures(folder, names, pixels=PIXELS):
    for name, picture in zip(names, pixels, strict=False):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(folder / name)
    return folder


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(tmp_path, save):
    save(tmp_path / "a.npz", arr_0=PIXELS, arr_1=np.arange(11))
    images = open_images(tmp_path / "a.npz")
    assert (images.n, images.height, images.width) == (11, 6, 5)
    assert not images.statistics
    assert not images.lossy
    np.testing.assert_array_equal(read(images), PIXELS)
    np.testing.assert_array_equal(read(images, start=3, stop=9), PIXELS[3:9])
    assert not list(images.batches(4, 5, 5))


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_headers(tmp_path, version, order):
    path = write_member(tmp_path / "a.npz", version, np.asarray(PIXELS, order=order))
    images = open_images(path)
    assert (images.parts[0].whole is None) == (version != (3, 0) and order == "C")
    np.testing.assert_array_equal(read(images, start=2), PIXELS[2:])


def test_stored_statistics(tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=PIXELS, **STATISTICS)
    np.savez(tmp_path / "b.npz", mu=STATISTICS["mu"].astype(np.float32), sigma=STATISTICS["sigma"])
    found = open_images(tmp_path / "a.npz").statistics
    assert found.keys() == STATISTICS.keys()
    only = open_images(tmp_path / "b.npz")
    assert (only.n, only.height, set(only.statistics)) == (0, None, {"mu", "sigma"})
    assert only.statistics["mu"].dtype == np.float64


def test_folder(tmp_path):
    """Pictures below a folder, in the order of their numbers; others files are passed over."""
    folder = write_pictures(tmp_path / "a", [f"{i}.png" for i in range(11)])
    (folder / "sampling.json").write_text("{}")
    (folder / ".7.png").write_text("hidden")
    images = open_images(folder)
    np.testing.assert_array_equal(read(images), PIXELS)
    np.testing.assert_array_equal(read(images, start=1, stop=10), PIXELS[1:10])
    nested = write_pictures(tmp_path / "b", [f"class{i // 2}/{i}.png" for i in range(11)])
    np.testing.assert_array_equal(read(open_images(nested)), PIXELS)
    assert images.digest() == open_images(nested).digest() != open_images(write_pictures(folder, ["11.png"])).digest()


def test_lossy_and_grey(tmp_path):
    grey = write_pictures(tmp_path / "a", ["0.jpg", "1.jpg"], PIXELS[..., 0])
    images = open_images(grey)
    assert images.lossy
    assert read(images).shape == (2, 6, 5, 3)


def test_shards(tmp_path):
    for i, part in ((2, PIXELS[:3]), (10, PIXELS[3:4]), (11, PIXELS[4:])):
        np.savez(tmp_path / f"shard-{i}.npz", arr_0=part)
    listed = ",".join(str(tmp_path / f"shard-{i}.npz") for i in (2, 10, 11))
    for source in (tmp_path, tmp_path / "shard-*.npz", listed):
        images = open_images(source)
        assert (images.n, len(images.parts)) == (11, 3)
        np.testing.assert_array_equal(read(images), PIXELS)
        for start, stop in ((0, 3), (2, 4), (3, 9), (4, 11)):
            np.testing.assert_array_equal(read(images, start=start, stop=stop), PIXELS[start:stop])
    np.savez(tmp_path / "shard-12.npz", arr_0=PIXELS, **STATISTICS)
    with pytest.raises(ValueError, match="holds statistics"):
        open_images(tmp_path)
    np.savez(tmp_path / "shard-12.npz", arr_0=PIXELS[:, :4])
    with pytest.raises(ValueError, match=r"shard-12.npz: images of 4x5, but 6x5"):
        open_images(tmp_path)


def test_images_are_not_held(tmp_path):
    """The pixels of a file are read batch by batch."""
    write_member(tmp_path / "a.npz", array=np.zeros((500, 64, 64, 3), np.uint8), compression=zipfile.ZIP_DEFLATED)
    images = open_images(tmp_path / "a.npz")
    assert images.parts[0].whole is None
    assert sum(map(len, images.batches(64))) == 500


WRONG_ARRAYS = {
    "floats": (PIXELS / np.float32(255), "float32.*uint8"),
    "int64": (PIXELS.astype(np.int64), "int64.*uint8"),
    "nchw": (PIXELS.transpose(0, 3, 1, 2), "NCHW"),
    "rgba": (np.repeat(PIXELS[..., :1], 4, -1), "RGBA"),
    "grey": (PIXELS[..., :1], "grey"),
    "rank": (PIXELS[0], "four dimensions"),
    "empty": (PIXELS[:0], "empty"),
    "objects": (np.array([None, 1]), "a.npz"),
}


@pytest.mark.parametrize("name", WRONG_ARRAYS)
def test_wrong_array(tmp_path, name):
    array, words = WRONG_ARRAYS[name]
    np.savez(tmp_path / "a.npz", arr_0=array)
    with pytest.raises(ValueError, match=words):
        open_images(tmp_path / "a.npz")


WRONG_STATISTICS = {
    "alone": ({"mu": STATISTICS["mu"]}, "sigma is missing"),
    "spatial": ({**STATISTICS, "sigma_s": None}, "sigma_s is missing"),
    "shape": ({**STATISTICS, "sigma": np.eye(5)}, r"\(5, 5\)"),
    "nan": ({**STATISTICS, "mu_s": np.full(2023, np.nan)}, "mu_s.*finite"),
    "missing": ({"images": PIXELS}, "missing arr_0.*images"),
}


@pytest.mark.parametrize("name", WRONG_STATISTICS)
def test_wrong_keys(tmp_path, name):
    arrays, words = WRONG_STATISTICS[name]
    np.savez(tmp_path / "a.npz", **{key: value for key, value in arrays.items() if value is not None})
    with pytest.raises(ValueError, match=words):
        open_images(tmp_path / "a.npz")


def test_wrong_files(tmp_path):
    text = tmp_path / "text.npz"
    text.write_text("no archive")
    whole = tmp_path / "whole.npz"
    np.savez(whole, arr_0=PIXELS)
    cut = tmp_path / "cut.npz"
    cut.write_bytes(whole.read_bytes()[:-200])
    short = write_member(tmp_path / "short.npz", cut=10)
    (tmp_path / "none").mkdir()
    for path, words in (
        (text, "not an .npz"),
        (cut, "truncated"),
        (short, "truncated.*11 images"),
        (tmp_path / "none", "no images"),
        (tmp_path / "absent.npz", "no such file"),
        (tmp_path / "*.npy", "no such file"),
        (",", "names no file"),
    ):
        with pytest.raises(ValueError, match=words):
            open_images(path)


def test_damage_inside(tmp_path):
    """A flipped byte, which only the check sum tells, is found while reading."""
    write_member(tmp_path / "a.npz")
    data = bytearray((tmp_path / "a.npz").read_bytes())
    data[400] ^= 1
    (tmp_path / "a.npz").write_bytes(data)
    with pytest.raises(ValueError, match=r"a.npz.*damaged"):
        read(open_images(tmp_path / "a.npz"))


def test_wrong_pictures(tmp_path):
    other = write_pictures(tmp_path / "sizes", ["0.png", "1.png"], [PIXELS[0], PIXELS[1][:4]])
    with pytest.raises(ValueError, match="4x5 pixels, but 6x5"):
        open_images(other)
    alpha = write_pictures(tmp_path / "alpha", ["0.png"], np.repeat(PIXELS[..., :1], 4, -1))
    with pytest.raises(ValueError, match="mode RGBA"):
        open_images(alpha)
    cut = write_pictures(tmp_path / "cut", ["0.png"])
    os.truncate(cut / "0.png", 100)
    with pytest.raises(ValueError, match=r"0\.png.*truncated"):
        read(open_images(cut))
    (cut / "0.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"0\.png: not a picture"):
        open_images(cut)
