"""How runs start: what they say, what a dry run leaves, and which weights of a training state they take."""

import json
import shlex
import sys

import numpy as np
import pytest
import torch

from engine.checkpoint import save_weights
from engine.errors import InputError, RunError
from engine.weight_files import read_file

TRAIN = ["--global-batch-size", "16", "--num-workers", "0", "--epochs", "1", "--ckpt-every", "3"]


def command(name, family, latents, folder):
    data = ["--data-path", latents]
    train = [*data, "--results-dir", folder, *TRAIN]
    cut = ["--ckpt", family.weights, "--save-model", folder / "out.pt"]
    return {
        "train": ["--load-weight", family.student, *train],
        "train_masked_kd": ["--load-weight", family.student, "--load-teacher", family.weights, *train],
        "prune_by_learning": ["--model", family.gated, "--load-weight", family.weights, *train, "--delta-w", "--lora"],
        "prune_by_score": [*cut, *data, "--n-pruned", 6, "--nsamples", 16],
        "prune_by_index": [*cut, "--scheme", "bk-sdm"],
    }[name]


@pytest.mark.parametrize("name", ["train", "train_masked_kd", "prune_by_learning", "prune_by_score", "prune_by_index"])
def test_dry_run(family, latents, tmp_path, run_script, capsys, name):
    """Everything is checked and said, nothing is written."""
    run_script(name, *command(name, family, latents, tmp_path), "--dry-run")
    shown = capsys.readouterr().out
    weights = family.student if name.startswith("train") else family.weights
    if name != "prune_by_learning":
        model = family.half if name.startswith("train") else family.model
        assert f"model {model} (from {weights}.json)" in shown
    assert f"{latents}/metadata.json)" in shown or name == "prune_by_index"
    assert shown.rstrip().endswith("dry run: all checks passed, nothing was written")
    assert not list(tmp_path.iterdir())
    if name.startswith("train") or name == "prune_by_learning":
        assert "data: 64 images; 4 steps of 16, 4 an epoch" in shown
        assert "checkpoints: 2 of " in shown
        role = {"train": "network", "train_masked_kd": "student", "prune_by_learning": "network"}[name]
        state = torch.load(weights)
        count = sum(value.numel() for value in state.values())
        assert f"networks: {role} {count:,} parameters" in shown


def test_size_of_states(family, latents, tmp_path, run_script, capsys):
    """The disk that was announced for a state is what it takes, gates with LoRA too."""
    for name in ("train", "prune_by_learning"):
        run_script(name, *command(name, family, latents, tmp_path / name))
        announced = float(capsys.readouterr().out.partition("checkpoints: 2 of ")[2].split()[0])
        (state,) = (tmp_path / name).glob("*/checkpoints/0000004.pt")
        # Names and alignment take some kilobytes of these small files.
        assert announced * 1e9 == pytest.approx(state.stat().st_size, rel=0.03)


def test_plain_weights_to_start_from(teacher, latents, tmp_path, run_script):
    """--no-ema starts from the weights of the last step, not from their average."""
    state = read_file(teacher.checkpoint, "--resume")
    key = "blocks.3.attn.qkv.weight"
    assert not torch.equal(state["model"][key], state["ema"][key])
    for flags, entry in (([], "ema"), (["--no-ema"], "model")):
        words = ["--load-weight", teacher.checkpoint, "--data-path", latents, "--results-dir", tmp_path / entry, *TRAIN]
        run_script("train", *words, "--lr", "0", "--min-lr", "0", *flags)
        (last,) = (tmp_path / entry).glob("*/checkpoints/0000004.pt")
        assert torch.equal(read_file(last, "--resume")["model"][key], state[entry][key])


def test_early_averages_are_named(family, latents, tmp_path, run_script, capsys):
    """Sampling from an average that still is its start says so; a warm-up of the decay helps."""
    said = {}
    for name, flags in (("long", ["--ema-decay", "0.9999"]), ("warm", ["--ema-decay", "0.9999", "--ema-warmup"])):
        run_script("train", *command("train", family, latents, tmp_path / name), *flags)
        (state,) = (tmp_path / name).glob("*/checkpoints/0000004.pt")
        capsys.readouterr()
        draw = ["--ckpt", state, *family.few_steps, "--labels", "1", "--output", tmp_path / "one.png"]
        run_script("sample", *draw)
        said[name] = capsys.readouterr().out
        run_script("sample", *draw, "--no-ema")
        assert "note:" not in capsys.readouterr().out
    assert "note: after 4 steps these averaged weights are 100% the weights that training started from" in said["long"]
    assert "note:" not in said["warm"]  # 1/10 * 2/11 * 3/12 * 4/13 is 0.1 %


def test_scores_that_are_not_finite(teacher, latents_copy, tmp_path, run_script):
    """Nothing is chosen by NaN, and nothing is written: of the latents, or of the weights."""
    words = ["--n-pruned", 3, "--nsamples", 64, "--save-model", tmp_path / "out.pt", "--data-path", latents_copy]
    np.load(latents_copy / "features.npy", mmap_mode="r+")[7] = np.nan
    with pytest.raises(RunError, match=r"scores are not finite|image 7 .*not finite"):
        run_script("prune_by_score", "--ckpt", teacher.weights, *words)
    state = {key: value.clone() for key, value in teacher.state.items()}
    state["blocks.3.attn.qkv.weight"][0] = float("nan")
    save_weights(tmp_path / "nan.pt", state, model="DiT-T/2", num_classes=10, vae="none")
    with pytest.raises(InputError, match=r"nan\.pt: blocks\.3\.attn\.qkv\.weight does not hold finite"):
        run_script("prune_by_score", "--ckpt", tmp_path / "nan.pt", *words)
    assert not (tmp_path / "out.pt").exists()


def test_recorded_command_can_be_typed_again(teacher, latents, tmp_path, run_script, monkeypatch):
    """Words with spaces come back whole."""
    typed = ["train.py", *map(str, command("train", teacher, latents, tmp_path / "two words"))]
    monkeypatch.setattr(sys, "argv", typed)
    run_script("train", *typed[1:])
    (config,) = tmp_path.glob("*/*/config.json")
    assert shlex.split(json.loads(config.read_text())["environment"]["command"]) == typed


def test_preview_needs_the_autoencoder_of_the_weights(teacher, tmp_path, run_script):
    """A dry run finds out that the picture could not be decoded."""
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(
        json.dumps({"_class_name": "AutoencoderKL", "block_out_channels": [8, 8], "latent_channels": 5})
    )
    words = ["--ckpt", teacher.weights, "--scheme", "bk-sdm", "--save-model", tmp_path / "out.pt"]
    words += ["--vae", tmp_path / "vae", "--image-size", "16", "--preview", "--dry-run"]
    with pytest.raises(InputError, match=r"--vae .* has 5 channels, but --ckpt .* works on 3"):
        run_script("prune_by_index", *words)


def test_facts_name_an_autoencoder_that_is_gone(teacher, tmp_path, run_script):
    """The message names the file that says so."""
    save_weights(tmp_path / "moved.pt", teacher.state, model="DiT-T/2", num_classes=10, vae="gone/vae")
    with pytest.raises(InputError, match=r"--ckpt .*moved\.pt\.json, vae gone/vae: no such folder"):
        run_script("sample", "--ckpt", tmp_path / "moved.pt", "--output", tmp_path / "one.png")
