"""The order of data, folders of latents, and pictures."""

import pickle
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import engine.data
from engine.data import BatchOrder, LatentDataset, LatentStore, TrainingData, open_latents
from engine.errors import InputError
from engine.extraction import read_marks
from engine.images import center_crop, list_images, load_image, numbered_images, pack_npz, save_grid, to_uint8
from engine.sampling import ImageDraws, preview_labels
from engine.vae import LatentSpace
from families.dit import DIT


def order(steps, rank=0, world=1, mirror=0.5, seed=0, n=50, batch=8):
    return list(BatchOrder(np.arange(n), batch, seed, mirror, steps, rank, world))


def test_global_batch_does_not_depend_on_processes():
    parts = [order(range(20), rank, 2) for rank in range(2)]
    assert [a + b for a, b in zip(*parts, strict=True)] == order(range(20))


def test_every_epoch_is_a_permutation():
    """Six batches of eight from fifty images: no image twice in an epoch, and another order in the next."""
    items = np.array(order(range(12)))
    epochs = (items // 2).reshape(2, 48)
    assert all(len(set(epoch)) == 48 for epoch in epochs)
    assert (epochs < 50).all()
    assert epochs[0].tolist() != epochs[1].tolist()


@pytest.mark.parametrize("start", [0, 1, 5, 6, 13])
def test_order_from_any_step(start):
    assert order(range(start, 20)) == order(range(20))[start:]


def test_order_depends_on_seed():
    assert order(range(3), seed=1) != order(range(3))


@pytest.mark.parametrize("mirror", [0.0, 0.3, 1.0])
def test_mirror_share(mirror):
    versions = np.array(order(range(600), mirror=mirror)) % 2
    assert versions.mean() == pytest.approx(mirror, abs=0.02)


@pytest.mark.parametrize(
    ("n", "batch", "world", "parts", "message"),
    [
        (100, 9, 2, 1, "--global-batch-size 9: not divisible by 2"),
        (7, 8, 1, 1, r"larger than the data \(7 images\)"),
        (100, 12, 2, 4, "--grad-accumulation 4: 6 images a process do not divide by it"),
    ],
)
def test_batch_is_checked(monkeypatch, n, batch, world, parts, message):
    monkeypatch.setattr(engine.data, "world_size", lambda: world)
    TrainingData(range(8), 1, 8)
    with pytest.raises(InputError, match=message):
        TrainingData(range(n), 1, batch, grad_accumulation=parts)


def test_steps():
    """Incomplete batches are dropped."""
    data = TrainingData(range(50), epochs=3, global_batch_size=8)
    assert (data.steps_per_epoch, data.total_steps) == (6, 18)


@pytest.fixture
def published(tmp_path):
    """The original's layout: one file per image, not named in the order of their strings."""

    def make(versions=2, n=12):
        for i in range(n):
            for kind, value in (
                ("features", np.full((versions, 3, 2, 2), i, np.float32)),
                ("labels", np.array([i % 5])),
            ):
                folder = tmp_path / f"imagenet256_{kind}"
                folder.mkdir(exist_ok=True)
                if kind == "features":
                    value += 0.5 * np.arange(versions).reshape(-1, 1, 1, 1)
                np.save(folder / f"{i}.npy", value)
        return tmp_path

    return make


@pytest.mark.parametrize("versions", [1, 2])
def test_published_layout(published, versions):
    """Files are taken by number; without a mirrored version the picture stands in for it."""
    dataset = LatentDataset(published(versions))
    x, y = dataset.__getitems__([2 * 11, 2 * 3 + 1])
    assert len(dataset) == 12
    assert x.dtype == torch.float32
    assert x[:, 0, 0, 0].tolist() == [11, 3 + 0.5 * (versions - 1)]
    assert y.tolist() == [1, 3]
    assert dataset.metadata["shape"] == [3, 2, 2]


@pytest.mark.parametrize("marks", [[[0, 7], [1, 1]], [[0, 1], [1, 3]], [[-1], [1]], [0, 1], [["a"], ["b"]]])
def test_damaged_marks(tmp_path, marks):
    np.save(tmp_path / "status-00000000.npy", np.array(marks))
    with pytest.raises(InputError, match=r"status-00000000.npy: damaged .* remove that file"):
        read_marks(tmp_path / "status-00000000.npy", 7)


def test_published_layout_in_another_order_of_memory(published):
    folder = published()
    first = LatentDataset(folder).source.files["0"]
    array = np.load(first)
    np.save(first, np.asfortranarray(array))
    x, _ = LatentDataset(folder).__getitems__([0, 1])
    assert np.array_equal(x.numpy(), array[:2])


def test_published_file_that_is_damaged_later(published):
    dataset = LatentDataset(published())
    dataset.source.files["0"].write_bytes(b"PK\x05\x06" + bytes(18))
    with pytest.raises(InputError, match="damaged latents"):
        dataset.__getitems__([0])


def test_published_layout_is_sent_to_processes(published):
    """It holds nothing that a process which does not fork could not be given."""
    dataset = LatentDataset(published())
    again, items = pickle.loads(pickle.dumps(dataset)), [5, 22, 0]
    assert not again.mapped
    for got, expected in zip(again.__getitems__(items), dataset.__getitems__(items), strict=True):
        assert torch.equal(got, expected)


def test_spawned_loader(published, monkeypatch):
    """A loader process that starts anew reads the same batches as the caller."""
    dataset = LatentDataset(published())
    here = list(TrainingData(dataset, epochs=1, global_batch_size=4).batches(range(3)))
    monkeypatch.setattr(engine.data, "DataLoader", partial(DataLoader, multiprocessing_context="spawn"))
    there = list(TrainingData(dataset, epochs=1, global_batch_size=4, num_workers=1).batches(range(3)))
    assert len(there) == 3
    for got, expected in zip(there, here, strict=True):
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize(
    ("remove", "message"),
    [("imagenet256_labels/3.npy", "3.npy is in one of"), ("imagenet256_features/0.npy", "0.npy is in one of")],
)
def test_unpaired(published, remove, message):
    folder = published()
    (folder / remove).unlink()
    with pytest.raises(InputError, match=message):
        LatentDataset(folder)


def test_empty_folder(tmp_path):
    with pytest.raises(InputError, match="no latents"):
        LatentDataset(tmp_path)


@pytest.fixture
def store(tmp_path):
    """A store of six images, all encoded."""
    store = LatentStore.create(tmp_path / "s", [0, 1, 2, 0, 1, 2], {"shape": [3, 2, 2]})
    store.features[:] = np.arange(12).reshape(6, 2, 1, 1, 1)
    store.status[:] = 1
    return store


def test_store(store):
    dataset = LatentDataset(store.folder)
    x, y = dataset.__getitems__([0, 7, 11])
    assert x[:, 0, 0, 0].tolist() == [0, 7, 11]
    assert y.tolist() == [0, 0, 2]
    assert dataset[7][0].shape == (3, 2, 2)


def test_store_is_kept(store):
    """Making it a second time does not lose what is there."""
    LatentStore.create(store.folder, [0] * 6, store.metadata)
    assert store.features[5, 1, 0, 0, 0] == 11


def test_corrupt_images_are_left_out(store):
    store.status[2] = 2
    dataset = LatentDataset(store.folder)
    assert len(dataset) == 5
    assert dataset.__getitems__([4])[0][0, 0, 0, 0] == 6  # the third good image is image 3
    assert dataset.labels.tolist() == [0, 1, 0, 1, 2]


def test_pending_images(store):
    store.status[[1, 4]] = 0
    with pytest.raises(InputError, match=r"2 of 6 images are not encoded yet; run extract_features\.py"):
        LatentDataset(store.folder)


@pytest.mark.parametrize("name", ["features.npy", "labels.npy", "status.npy", "metadata.json"])
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_damaged_store(store, name, damage):
    path = store.folder / name
    content = path.read_bytes()
    path.unlink()
    if damage == "truncated":
        path.write_bytes(content[: len(content) - 8])
    with pytest.raises(InputError, match=r"--data-path .*s: (damaged latents|no latents)"):
        LatentDataset(store.folder)


def test_lengths_differ(store):
    np.save(store.folder / "labels.npy", np.zeros(5, np.int64))
    with pytest.raises(InputError, match=r"holds float32 .*, expected float32 \(5, "):
        LatentDataset(store.folder)


@pytest.mark.parametrize(
    ("size", "classes", "message"),
    [(4, 3, r"--image-size 4: needs latents of 4x4 .* has 2x2"), (2, 2, r"labels 0\.\.2, .* give --num-classes 3")],
)
def test_latents_of_another_space(store, size, classes, message):
    assert len(open_latents(store.folder, LatentSpace(2, "none", 3, DIT.latents))) == 6
    with pytest.raises(InputError, match=message):
        open_latents(store.folder, LatentSpace(size, "none", classes, DIT.latents))


@pytest.mark.parametrize(("width", "height", "size"), [(40, 20, 8), (20, 41, 8), (8, 8, 8), (5, 9, 8), (100, 33, 32)])
def test_center_crop(width, height, size):
    """The crop is square, from the middle: the borders of a long picture are gone."""
    pixels = np.zeros((height, width, 3), np.uint8)
    if width > height:
        pixels[:, : (width - height) // 4], pixels[:, -((width - height) // 4) :] = 255, 255
    crop = center_crop(Image.fromarray(pixels), size)
    assert crop.size == (size, size)
    assert np.asarray(crop).max() == 0


def test_pixels_survive(tmp_path):
    """A picture of the right size comes through loading and writing unchanged."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "p.png")
    tensor = load_image(tmp_path / "p.png", 8)
    assert tensor.shape == (3, 8, 8)
    assert tensor.min() >= -1
    assert tensor.max() <= 1
    assert (to_uint8(tensor[None])[0] == pixels).all()


def test_list_images(tmp_path):
    for name in ("b/2.PNG", "b/1.jpg", "a/x/y.png", "a/notes.txt", "c.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    paths, labels, classes = list_images(tmp_path)
    assert [str(p.relative_to(tmp_path)) for p in paths] == ["a/x/y.png", "b/1.jpg", "b/2.PNG"]
    assert (labels, classes) == ([0, 1, 1], ["a", "b"])


def test_pack_npz_in_index_order(tmp_path):
    for i in (10, 2, 0, 1):
        Image.new("RGB", (4, 4), (i, 0, 0)).save(tmp_path / f"{i}.png")
    files = numbered_images(tmp_path)
    packed = np.load(pack_npz(tmp_path / "out.npz", files))["arr_0"]
    assert packed.shape == (4, 4, 4, 3)
    assert packed.dtype == np.uint8
    assert packed[:, 0, 0, 0].tolist() == [0, 1, 2, 10]


def test_pack_npz_of_different_sizes(tmp_path):
    for i, size in enumerate((4, 5)):
        Image.new("RGB", (size, size)).save(tmp_path / f"{i}.png")
    with pytest.raises(ValueError, match=r"1\.png is 5x5, not 4x4"):
        pack_npz(tmp_path / "out.npz", numbered_images(tmp_path))
    with pytest.raises(ValueError, match="no images to pack"):
        pack_npz(tmp_path / "out.npz", [])
    assert sorted(f.name for f in tmp_path.iterdir()) == ["0.png", "1.png"]


def test_grid(tmp_path):
    save_grid(tmp_path / "g.png", torch.linspace(-1, 1, 6 * 3 * 4 * 4).view(6, 3, 4, 4), columns=4, gap=2)
    assert Image.open(tmp_path / "g.png").size == (26, 14)


def test_draws_depend_on_the_image_only():
    """The label and noises of an image are the same in any batch."""
    together = ImageDraws(3, range(6), (2, 2), "cpu")
    alone = ImageDraws(3, [4], (2, 2), "cpu")
    assert together.labels(7)[4] == alone.labels(7)[0]
    for _ in range(2):
        assert torch.equal(together.start_noise()[4], alone.start_noise()[0])
    for step in range(2):
        assert torch.equal(together.step_noise(step, (3,))[4], alone.step_noise(step, (3,))[0])
    other = ImageDraws(4, [4], (2, 2), "cpu")
    other.labels(7)
    assert not torch.equal(other.start_noise(), ImageDraws(3, [4], (2, 2), "cpu").start_noise())


@pytest.mark.parametrize("shape", [(1, 3), (4, 4), (5, 16), (7, 3), (2, 50)])
def test_many_draws_at_once(shape):
    """They are the numbers of as many single calls of torch.randn, whatever their size."""
    together, alone = (ImageDraws(3, range(3), (2, 2), "cpu") for _ in range(2))
    found = [together.step_noise(0, shape), together.step_noise(1, shape, 6), together.step_noise(7, shape)]
    found = torch.cat([found[0][None], found[1], found[2][None]])
    expected = [torch.stack([torch.randn(shape, generator=g) for g in alone.generators]) for _ in range(8)]
    assert torch.equal(found, torch.stack(expected))


def test_labels_cover_the_classes():
    counts = Counter(ImageDraws(0, range(2000), (), "cpu").labels(10).tolist())
    assert sorted(counts) == list(range(10))
    assert min(counts.values()) > 150


@pytest.mark.parametrize("classes", [1, 10, 979, 1000])
def test_preview_labels(classes):
    labels = preview_labels(classes)
    assert len(labels) == 8
    assert all(0 <= label < classes for label in labels)
