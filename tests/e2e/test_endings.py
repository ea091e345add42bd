"""Every script ends with the command that goes on from what it wrote, and that command can be typed."""

import importlib
import shlex
from pathlib import Path

import pytest

TRAIN = ["--epochs", 1, "--global-batch-size", 32, "--num-workers", 0, "--log-every", 2, "--ckpt-every", 100]


def find_next(text):
    """(script, its typed settings) of the last line of an output, as the shell and the script read it."""
    last = text.strip().splitlines()[-1]
    assert last.startswith("next: python "), last
    _, file, *words = shlex.split(last.removeprefix("next: "))
    return file, importlib.import_module(file.removesuffix(".py")).COMMAND.parse(words)


@pytest.fixture
def ending(run_script, capsys):
    """Runs a script and returns the next command."""

    def run(name, *words):
        capsys.readouterr()
        run_script(name, *words)
        return find_next(capsys.readouterr().out)

    return run


def test_extraction(ending, pictures, tmp_path):
    words = f"--vae none --image-size 8 --data-path {pictures} --features-path {tmp_path / 'my latents'}"
    file, flags = ending("extract_features", *words.replace("my latents", "latents").split())
    assert file == "train.py"
    assert flags == {"model": "DiT-XL/2", "data_path": f"{tmp_path / 'latents'}"}


@pytest.mark.parametrize("name", ["train", "train_masked_kd"])
def test_training(ending, family, latents, tmp_path, name):
    words = ["--load-weight", family.student, "--data-path", latents, "--results-dir", tmp_path, *TRAIN]
    if name == "train_masked_kd":
        words += ["--teacher", family.model, "--load-teacher", family.weights]
    file, flags = ending(name, *words)
    assert file == "sample.py"
    assert Path(flags["ckpt"]).is_file()
    assert (
        ending("sample", "--ckpt", flags["ckpt"], "--output", tmp_path / "a.png", "--labels", 1, *family.few_steps)[0]
        == "sample_ddp.py"
    )


@pytest.mark.parametrize("name", ["prune_by_index", "prune_by_score", "prune_by_learning"])
def test_pruning(ending, family, latents, tmp_path, name):
    """On to recovery by the network that it was cut out of."""
    cut = tmp_path / "cut.pt"
    words = {
        "prune_by_index": ["--ckpt", family.weights, "--scheme", "bk-sdm"],
        "prune_by_score": ["--ckpt", family.weights, "--pattern", "1:2", "--data-path", latents, "--nsamples", 16],
        "prune_by_learning": [
            *("--load-weight", family.weights, "--model", family.gated, "--data-path", latents),
            *("--results-dir", tmp_path, *TRAIN),
        ],
    }[name]
    file, flags = ending(name, *words, "--save-model", cut)
    assert file == "train_masked_kd.py"
    assert (flags["load_weight"], flags["load_teacher"]) == (str(cut), str(family.weights))
    assert flags["teacher"] == family.model
    assert flags["data_path"] == ("FEATURES" if name == "prune_by_index" else str(latents))


def test_samples(ending, teacher, tmp_path):
    words = ["--ckpt", teacher.checkpoint, "--sample-dir", tmp_path, "--num-fid-samples", 4, *teacher.few_steps]
    file, flags = ending("sample_ddp", *words)
    assert file == "evaluator.py"
    assert Path(flags["sample"]).is_file()
    assert flags["ref"] == "REFERENCE.npz"
