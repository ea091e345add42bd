"""Encoded latents on disk: our folder of arrays with its metadata, and the published folders of one file per image."""

import json

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from engine.data import LatentDataset, LatentStore, open_latents
from engine.vae import LatentSpace
from families import FAMILIES

from .inputs import EDITS, SIZES, VALUES, edit_bytes, json_files
from .limits import read_or_refuse
from .test_images import MAGIC, MEMBERS

SHAPE = (3, 2, 2)
METADATA = {"shape": list(SHAPE), "image_size": 2, "vae": "none", "num_classes": 5}
SPACE = LatentSpace(2, "none", 5, FAMILIES["DiT"].latents)
NAMES = ("features.npy", "labels.npy", "status.npy", "metadata.json")
PUBLISHED = ("a_features/0.npy", "a_labels/0.npy", "a_features/1.npy", "a_labels/1.npy")


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """Our layout with three images: (folder, {file: bytes})."""
    store = LatentStore.create(tmp_path_factory.mktemp("ours"), [0, 1, 4], METADATA)
    store.features[:], store.status[:] = 0.5, 1
    return store.folder, {name: (store.folder / name).read_bytes() for name in NAMES}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The published layout with two images: (folder, {file: bytes})."""
    folder = tmp_path_factory.mktemp("published")
    for name in PUBLISHED:
        (folder / name).parent.mkdir(exist_ok=True)
        np.save(folder / name, np.zeros((2, *SHAPE), np.float32) if "features" in name else np.array([3]))
    return folder, {name: (folder / name).read_bytes() for name in PUBLISHED}


def saved(shape, descr, fortran, data):
    """A .npy file with any header."""
    text = repr({"descr": descr, "fortran_order": fortran, "shape": shape}).encode()
    return MAGIC + b"\1\0" + (len(text) % 65536).to_bytes(2, "little") + text + data


DATA = st.integers(0, 3).map(lambda n: bytes(96 * n)) | st.binary(max_size=24)
DTYPES = st.sampled_from(
    ["<f4", "<f4", "|u1", "<i8", "<f8", ">f4", "<c8", "|O", "<U1", "|b1", "|V8", "<M8[s]", "u1,u1"]
)
ROWS = st.sampled_from([(3, 2, *SHAPE), (3,), (1,), (), (0,), (2, *SHAPE), (1, *SHAPE), (0, *SHAPE), (2, 3, 2), (3, 1)])
FILES = st.builds(saved, ROWS | st.lists(SIZES, max_size=5).map(tuple) | VALUES, DTYPES, st.booleans(), DATA)
FILES |= MEMBERS | st.sampled_from([b"", b"PK\x05\x06" + bytes(18), b"\x80\x04N.", MAGIC])


def write(made, changes):
    """Write the files of a folder with some replaced (bytes) or edited (a list of changes); None leaves one out."""
    folder, files = made
    for name, data in files.items():
        change = changes.get(name, [])
        (folder / name).unlink(missing_ok=True)
        if change is not None:
            (folder / name).write_bytes(change if isinstance(change, bytes) else edit_bytes(data, change))
    return folder


def read_all(folder):
    """The dataset, and its batches of every item and version."""
    dataset = open_latents(folder, SPACE)
    return dataset, dataset.__getitems__(range(2 * len(dataset)))


def check(accepted, found):
    """What is accepted is whole."""
    if accepted:
        dataset, (x, y) = found
        assert len(dataset) > 0
        assert x.shape == (2 * len(dataset), *dataset.metadata["shape"])
        assert len(y) == len(x)
        assert 0 <= int(y.min()) <= int(y.max()) < SPACE.num_classes
    else:
        assert "--" in found


SHAPES = st.sampled_from(
    [[3, 2, 2], [3, 2], [3, 2, 2, 1], [-3, 2, 2], [[3], 2, 2], "322", ["3", "2", "2"], 3, None, [True, 2, 2]]
)
ARRAYS = st.fixed_dictionaries({}, optional={name: st.none() | FILES | EDITS for name in NAMES[:3]})
OURS = st.builds(
    lambda arrays, metadata: arrays | ({} if metadata is None else {"metadata.json": metadata}),
    ARRAYS,
    st.none() | json_files(METADATA, special=SHAPES | SIZES),
)


@given(changes=OURS)
@example(changes={})
@example(changes={"labels.npy": b""})
@example(changes={"features.npy": b"PK\x05\x06" + bytes(18)})
@example(changes={"metadata.json": b"[]"})
@example(changes={"metadata.json": b"[" * 100_000})
@example(changes={"metadata.json": b'{"shape": 3}'})
@example(changes={"labels.npy": saved((3,), "<U1", False, bytes(12))})
@example(changes={"labels.npy": saved((0,), "<i8", False, b""), "status.npy": saved((0,), "|u1", False, b"")})
@example(changes={"status.npy": saved((3,), "|u1", False, b"\2\2\2")})
def test_our_latents(part, ours, changes):
    accepted, found = read_or_refuse("latents", read_all, write(ours, changes))
    check(accepted, found)
    assert accepted or changes


@given(changes=st.fixed_dictionaries({}, optional={name: st.none() | FILES | EDITS for name in PUBLISHED}))
@example(changes={})
@example(changes={"a_labels/0.npy": b""})
@example(changes={"a_features/1.npy": saved((0, *SHAPE), "<f4", False, b"")})
@example(changes={"a_features/1.npy": saved((2, *SHAPE), "<U1", False, bytes(96))})
@example(changes={"a_labels/0.npy": saved((2**26,), "<i8", False, b"")})
def test_published_latents(part, published, changes):
    accepted, found = read_or_refuse("published latents", read_all, write(published, changes))
    check(accepted, found)
    assert accepted or changes


def test_metadata_of_the_valid_folder(ours):
    folder = write(ours, {})
    assert json.loads((folder / "metadata.json").read_text())["shape"] == list(LatentDataset(folder).metadata["shape"])
