"""The chain through an autoencoder: a tiny AutoencoderKL of the usual factor 8, read from a local folder."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from engine import vae as autoencoders
from engine.checkpoint import read_facts, save_weights
from engine.errors import InputError
from engine.vae import LatentSpace, pictures_at_once
from engine.weight_files import read_weights
from families import create_model
from families.dit import SD_VAE
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


def test_pictures_at_once():
    assert [pictures_at_once(size, size) for size in (128, 256, 512, 1024, 4096)] == [32, 8, 2, 1, 1]


def test_slices(vae, monkeypatch):
    """Few pictures at a time, the last ones fewer, give what all at once give; a slice holds one picture or more."""
    codec = LatentSpace(32, str(vae), 10, SD_VAE).load_codec("cpu")
    generator = torch.Generator().manual_seed(0)
    pictures, noise, latents = (torch.randn(5, *s, generator=generator) for s in ((3, 32, 32), (4, 4, 4), (4, 4, 4)))
    encoded, decoded = codec.encode(pictures, noise), codec.decode(latents)
    for pixels, sizes in ((2 * 32 * 32, [2, 2, 1]), (3, [1] * 5)):
        monkeypatch.setattr(autoencoders, "SLICE_PIXELS", pixels)
        for name in ("encode", "decode"):
            whole, seen = getattr(codec.vae, name), []
            monkeypatch.setattr(codec.vae, name, lambda x, whole=whole, seen=seen: (seen.append(len(x)), whole(x))[1])
            found, expected = (
                (codec.encode(pictures, noise), encoded) if name == "encode" else (codec.decode(latents), decoded)
            )
            assert seen == sizes
            assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
            monkeypatch.setattr(codec.vae, name, whole)


def test_half_precision(vae):
    """Weights in bfloat16 and channels last; pictures in float32, near those of float32."""
    space = LatentSpace(32, str(vae), 10, SD_VAE)
    latents = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    codec = space.load_codec("cpu", channels_last=True, precision="bf16")
    assert {p.dtype for p in codec.vae.parameters()} == {torch.bfloat16}
    found, expected = codec.decode(latents), space.load_codec("cpu").decode(latents)
    assert found.dtype == torch.float32
    assert 0 < (found - expected).abs().max() < 0.05 * expected.abs().max()


def test_precision_of_a_sample_folder(vae, tmp_path, run_script):
    """The usual precision stays out of the record, so that folders from before the flag go on; no folder holds both."""
    torch.manual_seed(0)
    facts = {"model": "DiT-T/2", "num_classes": 10, "vae": str(vae), "image_size": 32}
    save_weights(
        tmp_path / "w.pt", create_model("DiT-T/2", input_size=4, in_channels=4, num_classes=10).state_dict(), **facts
    )

    def sample(parent, *words):
        few = ["--num-fid-samples", 3, "--num-sampling-steps", 2, "--per-proc-batch-size", 2]
        run_script("sample_ddp", "--ckpt", tmp_path / "w.pt", "--sample-dir", tmp_path / parent, *few, *words)
        (record,) = (tmp_path / parent).glob("*/sampling.json")
        return json.loads(record.read_text())

    for parent, words, others in (("a", (), ("--vae-precision", "bf16")), ("b", ("--vae-precision", "bf16"), ())):
        record = sample(parent, *words)
        assert record.get("vae_precision") == (words[-1] if words else None)
        assert sample(parent, *words) == record
        with pytest.raises(InputError, match="holds images with vae_precision"):
            sample(parent, *others)
    grid = ["--ckpt", tmp_path / "w.pt", "--num-sampling-steps", 2, "--labels", "1", "--output", tmp_path / "grid.png"]
    run_script("sample", *grid, "--vae-precision", "bf16")
    assert Image.open(tmp_path / "grid.png").size == (36, 36)
