"""Pictures of what scripts have written: they are made for every family, and show what is in the files."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import pictures
from pruning.distillation import extremes

TRAIN = ["--epochs", "1", "--global-batch-size", "16", "--num-workers", "0", "--log-every", "2"]


def draw(monkeypatch, path, *words):
    monkeypatch.setattr(sys, "argv", ["pictures", *map(str, words), "--output", str(path)])
    pictures.main()
    return np.asarray(Image.open(path).convert("RGB"))


def test_decisions_and_losses(family, latents, tmp_path, run_script, monkeypatch):
    """Of a pattern whose groups differ in size."""
    flags = ["--load-weight", family.weights, "--data-path", latents, "--results-dir", tmp_path, *TRAIN]
    run_script("prune_by_learning", "--model", family.model, "--pattern", "2:4,1:2,3:4,1:2", *flags)
    folder = tmp_path / f"learn_mask-{family.folder.name}"
    assert pictures.read_groups(folder) == [[2, 4], [1, 2], [3, 4], [1, 2]]
    for words in (("decisions", folder), ("losses", folder, folder)):
        shown = draw(monkeypatch, tmp_path / "p.png", *words)
        assert len(np.unique(shown.reshape(-1, 3), axis=0)) > 10


def test_activations(family, latents, tmp_path, monkeypatch):
    """Every layer has a histogram, and the share beyond two deviations is that of the loss."""
    found = pictures.measure_activations(family.weights, latents, nsamples=16, batch_size=8)
    assert len(found.counts) == 12
    assert (found.counts.sum(1) > 0).all()
    shown = draw(monkeypatch, tmp_path / "a.png", "activations", family.weights, "--data-path", latents)
    assert len(np.unique(shown.reshape(-1, 3), axis=0)) > 10


def test_share_of_extremes():
    torch.manual_seed(0)
    hidden = torch.randn(3, 5, 64)
    hidden[0, 1, 2] = 90.0
    found = pictures.Activations(2)
    found(1, hidden, hidden)
    beyond = found.counts[1][pictures.EDGES[:-1] >= 2.0].sum()
    assert beyond == extremes(hidden, 2.0).sum()
    assert found.largest[1] == pytest.approx(((hidden[0].max() - hidden[0].mean()) / hidden[0].std()).item(), rel=1e-6)
    assert found.largest[0] == 0


def test_samples_side_by_side(tmp_path, monkeypatch):
    files = []
    for k in range(2):
        files.append(tmp_path / f"{k}.npz")
        np.savez(files[k], arr_0=np.full((9, 8, 8, 3), 200 * k, np.uint8), arr_1=np.zeros(9))
    shown = draw(monkeypatch, tmp_path / "s.png", "samples", *files)
    assert {0, 200} <= set(np.unique(shown))
