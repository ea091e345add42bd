"""Faults that once gave a result in silence: every one is refused, with its flag or file named, or does no harm."""

import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from engine.checkpoint import save_weights
from engine.errors import InputError, RunError

STEPS = "--num-sampling-steps 2 --labels 1"
TRAIN = "--global-batch-size 16 --num-workers 0 --epochs 1 --results-dir out"
EXTRACT = "extract_features --data-path {pictures} --vae none --image-size 8 --num-workers 0"
LEARN = f"prune_by_learning --model DiT-T/2 --pattern 1:2 --load-weight {{teacher}} --data-path {{latents}} {TRAIN}"
SCORE = "prune_by_score --ckpt {teacher} --data-path {latents} --n-pruned 1 --nsamples 64 --batch-size 32 --mirror 0"
INDEX = "prune_by_index --ckpt {teacher} --kept-indices 0,3"
EVALUATE = "evaluator {images} {images} --metrics fid --offline"


def cut(path):
    """The file ends in its middle."""
    os.truncate(path, path.stat().st_size // 2)


def spoil_latent(path):
    """One number of one picture is NaN."""
    np.load(path, mmap_mode="r+")[3, :, 0, 0, 0] = np.nan


def spoil_weights(path):
    """One number of the weights is NaN."""
    weights = torch.load(path)
    weights["blocks.0.attn.qkv.bias"][0] = float("nan")
    torch.save(weights, path)


def add_archive(path):
    """An .npz lies among the pictures."""
    shutil.copy(path.parent / "images.npz", path / "0" / "stray.npz")


def remove(path):
    """There is no such file."""
    path.unlink()


def halve(path):
    """The weights of the encoder alone are left."""
    from safetensors.torch import load_file, save_file

    save_file({key: value for key, value in load_file(path).items() if key.startswith("encoder")}, path)


# name -> (the place that is damaged and how, or None; command line; what the message has to contain)
CASES = {
    "half of the latents": (("latents/features.npy", cut), f"train --model DiT-T/2 --data-path {{latents}} {TRAIN}",
                            "--data-path", "features.npy has"),
    "half of the latents, to go on": (("latents/features.npy", cut), f"{EXTRACT} --features-path {{latents}}",
                                      "--features-path", "features.npy has"),
    "a NaN among the latents": (("latents/features.npy", spoil_latent),
                                f"train --model DiT-T/2 --data-path {{latents}} {TRAIN} --global-batch-size 64",
                                "loss of images [3]", "--data-path"),
    "a NaN among the latents, measured": (("latents/features.npy", spoil_latent), f"{SCORE} --save-model p.pt",
                                          "not finite", "--data-path"),
    "latents of pixels": (None, f"train --model DiT-T/2 --data-path {{latents}} {TRAIN} --vae ema --image-size 64",
                          "--vae ema", "made with none"),
    "NaN weights": (("teacher.pt", spoil_weights), f"sample --ckpt {{teacher}} --output o.png {STEPS}",
                    "--ckpt", "blocks.0.attn.qkv.bias", "finite"),
    "NaN weights, cut": (("teacher.pt", spoil_weights), f"{INDEX} --save-model p.pt", "--ckpt", "finite"),
    "temperatures of NaN": (None, f"{LEARN} --tau-range nan nan", "--tau-range", "nan"),
    "an infinite rate of gates": (None, f"{LEARN} --gate-lr inf", "--gate-lr", "inf"),
    "infinite guidance": (None, f"sample --ckpt {{teacher}} --output o.png {STEPS} --cfg-scale inf", "--cfg-scale"),
    "reversed guidance": (None, f"sample --ckpt {{teacher}} --output o.png {STEPS} --cfg-interval 0.9 0.1",
                          "--cfg-interval", "smaller"),
    "steps beyond the chain": (None, f"{SCORE} --save-model p.pt --clean-latents --num-sampling-steps 2000",
                               "--num-sampling-steps 2000"),
    "other classes": (None, f"{INDEX} --save-model p.pt --num-classes 9", "num_classes 10", "--num-classes"),
    "no weights by an empty word": (None, "sample --output o.png --ckpt=", "--ckpt", "is empty"),
    "no teacher by an empty word": (None, f"train --model DiT-T/2 --data-path {{latents}} {TRAIN} --load-weight=",
                                    "--load-weight", "is empty"),
    "no output by an empty word": (None, f"{EVALUATE} --json=", "--json", "is empty"),
    "an archive among pictures": (("pictures", add_archive), "evaluator {pictures} {images} --metrics fid --offline",
                                  "REF", "stray.npz", "unclear"),
    "an autoencoder without weights": (("vae/diffusion_pytorch_model.safetensors", remove),
                                       "extract_features --data-path {pictures} --vae {vae} --image-size 16 "
                                       "--features-path f", "--vae", "cannot load"),
    "an autoencoder with half of its weights": (("vae/diffusion_pytorch_model.safetensors", halve),
                                                "extract_features --data-path {pictures} --vae {vae} --image-size 16 "
                                                "--features-path f", "--vae", "decoder"),
    "weights over weights": (None, f"{INDEX} --save-model {{teacher}}", "--save-model", "--ckpt"),
    "weights over facts": (None, f"{INDEX} --save-model {{teacher}}.json", "--save-model", "--ckpt"),
    "weights over latents": (None, f"{SCORE} --save-model {{latents}}/labels.npy", "--save-model", "--data-path"),
    "weights over the data learnt from": (None, f"{LEARN} --save-model {{latents}}/labels.npy", "--data-path"),
    "a picture over weights": (None, f"sample --ckpt {{teacher}} --output {{teacher}} {STEPS}", "--output", "--ckpt"),
    "a picture over an autoencoder": (None, f"sample --ckpt {{teacher}} --vae {{vae}} --image-size 64 {STEPS} "
                                      "--output {vae}/config.json", "--output", "--vae"),
    "numbers over the reference": (None, f"{EVALUATE} --json {{images}}", "--json", "REF"),
    "numbers over a picture": (None, "evaluator {pictures} {images} --offline --json {pictures}/0/000.png", "--json",
                               "REF"),
    "statistics over numbers": (None, f"{EVALUATE} --json s --save-stats s", "--save-stats", "--json"),
    "numbers over Inception": (None, f"{EVALUATE} --inception {{text}} --json {{text}}", "--json", "--inception"),
    "an archive over the reference": (None, "sample_ddp --pack {pictures} --evaluate {images}", "--pack", "--evaluate"),
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory, teacher, latents, pictures):
    """A folder of good inputs, to copy."""
    from diffusers.models import AutoencoderKL

    folder = tmp_path_factory.mktemp("made")
    save_weights(folder / "teacher.pt", teacher.state, model="DiT-T/2", num_classes=10, vae="none")
    shutil.copytree(latents, folder / "latents")
    shutil.copytree(pictures, folder / "pictures")
    np.savez(folder / "images.npz", arr_0=np.zeros((4, 8, 8, 3), np.uint8))
    (folder / "text").write_text("no weights")
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    vae = AutoencoderKL(block_out_channels=[8] * 4, norm_num_groups=4, latent_channels=4, **blocks)
    vae.save_pretrained(folder / "vae")
    return folder


def contents(folder):
    """{path: bytes} of all files below a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("case", CASES)
def test_refused(case, made, tmp_path, run_script, capsys, monkeypatch):
    """A message with the flag or the file, and inputs are as they were."""
    damage, command, *expected = CASES[case]
    inputs, work = shutil.copytree(made, tmp_path / "inputs"), tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    if damage:
        place, spoil = damage
        spoil(inputs / place)
    names = {path.stem: path for path in inputs.iterdir() if path.suffix != ".json"}
    before = contents(inputs)
    with pytest.raises((InputError, RunError, SystemExit)) as caught:
        run_script(*command.format(**names).split())
    message = f"{caught.value}{capsys.readouterr().err}"
    assert not [part for part in expected if part not in message], message
    changed = {path for path, content in contents(inputs).items() if before.get(path) != content}
    assert {path.name for path in changed} <= {".lock"}
    assert "loss of images" in message or not list(work.iterdir())  # that run had begun


@pytest.mark.parametrize("name", [".cache", ".ipynb_checkpoints", "3/.ipynb_checkpoints"])
def test_hidden_folders(name, made, tmp_path, run_script):
    """What systems leave among pictures is no class and no picture."""
    pictures = shutil.copytree(made / "pictures", tmp_path / "pictures")
    (pictures / name).mkdir()
    Image.new("RGB", (8, 8)).save(pictures / name / "a.png")
    words = ["--data-path", pictures, "--vae", "none", "--image-size", 8, "--features-path", tmp_path / "f"]
    run_script("extract_features", *words, "--num-workers", 0)
    assert (np.load(tmp_path / "f" / "labels.npy") == np.load(made / "latents" / "labels.npy")).all()
