"""The chain through an autoencoder: a tiny AutoencoderKL of the usual factor 8, read from a local folder."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from engine.checkpoint import read_facts, read_weights
from pruning.surgery import keep_layers

TRAIN = ["--epochs", "1", "--global-batch-size", "32", "--num-workers", "0"]


@pytest.fixture(scope="module")
def make_vae(tmp_path_factory):
    """Writes an AutoencoderKL with random weights and that many halvings."""

    def make(halvings):
        from diffusers.models import AutoencoderKL

        torch.manual_seed(0)
        levels, blocks = halvings + 1, [8] * (halvings + 1)
        vae = AutoencoderKL(
            block_out_channels=blocks,
            down_block_types=["DownEncoderBlock2D"] * levels,
            up_block_types=["UpDecoderBlock2D"] * levels,
            norm_num_groups=4,
            latent_channels=4,
        )
        folder = tmp_path_factory.mktemp("vae")
        vae.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="module")
def vae(make_vae):
    return make_vae(3)


@pytest.fixture(scope="module")
def encoded(vae, pictures, tmp_path_factory, run_script):
    folder = tmp_path_factory.mktemp("encoded") / "features"
    flags = ["--vae", vae, "--image-size", 32, "--data-path", pictures, "--batch-size", 16]
    run_script("extract_features", *flags, "--features-path", folder)
    return folder


def test_latents(encoded, vae):
    features = np.load(encoded / "features.npy")
    assert features.shape == (64, 2, 4, 4, 4)
    assert np.isfinite(features).all()
    assert len(np.unique(features[:, 0].reshape(64, -1), axis=0)) == 64
    metadata = json.loads((encoded / "metadata.json").read_text())
    assert metadata["scale"] == 0.18215
    assert metadata["vae"] == str(vae)


def test_same_latents_in_other_batches(encoded, vae, pictures, tmp_path, run_script):
    """The noise of an image does not depend on its batch."""
    flags = ["--vae", vae, "--image-size", 32, "--data-path", pictures, "--batch-size", 7]
    run_script("extract_features", *flags, "--features-path", tmp_path / "features")
    for name in ("features", "labels"):
        a, b = (np.load(folder / f"{name}.npy") for folder in (encoded, tmp_path / "features"))
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_chain(encoded, vae, pictures, tmp_path, run_script, same_weights, monkeypatch):
    """Train, learn, score, cut, distil and sample; every file tells the next script its autoencoder and sizes."""
    monkeypatch.chdir(tmp_path)
    run_script("train", "--model", "DiT-T/2", "--data-path", encoded, *TRAIN, "--prefix", "teacher")
    teacher = tmp_path / "outputs/teacher-DiT-T-2/checkpoints/0000002.pt"
    original = read_weights(teacher, "--ckpt")
    assert original["x_embedder.proj.weight"].shape[1] == 4

    flags = ["--load-weight", teacher, "--data-path", encoded, "--delta-w", "--lora", "--save-model", "learnt.pt"]
    run_script("prune_by_learning", "--model", "DiT-T-1-2", *flags, *TRAIN)
    flags = ["--ckpt", teacher, "--n-pruned", 6, "--nsamples", 16]
    run_script("prune_by_score", *flags, "--data-path", encoded, "--save-model", "a.pt")
    run_script("prune_by_score", *flags, "--data-path", pictures, "--save-model", "b.safetensors")
    flags = ["--ckpt", teacher, "--scheme", "bk-sdm", "--preview", "--num-sampling-steps", 2]
    run_script("prune_by_index", *flags, "--save-model", "c.pt")
    for name in ("learnt.pt", "a.pt", "b.safetensors", "c.pt"):
        facts = read_facts(name)
        assert facts["vae"] == str(vae)
        same_weights(read_weights(name, "--ckpt"), keep_layers(original, facts["kept"]))
    assert Image.open("c.pt.png").size == (4 * 34 + 2, 2 * 34 + 2)

    flags = ["--load-weight", "learnt.pt", "--data-path", encoded, "--teacher", "DiT-T/2", "--load-teacher", teacher]
    run_script("train_masked_kd", *flags, *TRAIN)
    student = tmp_path / "outputs/DiT-T-D6-2/checkpoints/0000002.pt"
    run_script("sample", "--ckpt", student, "--labels", "1,2", "--num-sampling-steps", 2, "--output", "grid.png")
    assert Image.open("grid.png").size == (2 * 34 + 2, 36)
    run_script("sample_ddp", "--ckpt", student, "--num-fid-samples", 5, "--num-sampling-steps", 2)
    (packed,) = (tmp_path / "samples").glob("*.npz")
    assert np.load(packed)["arr_0"].shape == (5, 32, 32, 3)


def test_autoencoder_of_another_factor(make_vae, pictures, tmp_path, run_script):
    """How much an autoencoder shrinks is its own affair: the latents of one that halves are half as large."""
    flags = ["--vae", make_vae(1), "--image-size", 8, "--data-path", pictures]
    run_script("extract_features", *flags, "--features-path", tmp_path / "features")
    assert np.load(tmp_path / "features" / "features.npy").shape == (64, 2, 4, 4, 4)
    run_script("train", "--model", "DiT-T/2", "--data-path", tmp_path / "features", *TRAIN, "--results-dir", tmp_path)
    flags = ["--num-sampling-steps", 2, "--labels", "1", "--output", tmp_path / "grid.png"]
    run_script("sample", "--ckpt", tmp_path / "DiT-T-2/checkpoints/0000002.pt", *flags)
    assert Image.open(tmp_path / "grid.png").size == (12, 12)
