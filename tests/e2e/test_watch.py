"""Held-out losses, pictures and trackers: they tell what happens, and change no number of the training."""

import json
import os
import subprocess
import sys

import pytest
import torch
from disturbed import without_times

from engine.data import LatentDataset, TrainingData
from engine.errors import InputError
from engine.run_folder import FREE
from engine.trackers import split_row
from engine.weight_files import read_file
from families import FAMILIES

TRAIN = ["--epochs", 2, "--global-batch-size", 16, "--num-workers", 0, "--log-every", 2, "--ckpt-every", 100]
HOLD_OUT = ["--eval-split", 0.25]
LOOK = ["--eval-every", 3, "--sample-every", 4]


def make_command(name, family, latents):
    """Flags of a short run of a script."""
    start = {
        "train": ["--load-weight", family.student],
        "prune_by_learning": ["--model", family.gated, "--load-weight", family.weights, "--delta-w"],
        "train_masked_kd": [
            *("--load-weight", family.student, "--teacher", family.model, "--load-teacher", family.weights)
        ],
    }[name]
    return [*start, "--data-path", latents, *TRAIN, *HOLD_OUT, *family.few_steps]


def train(run_script, name, words, folder):
    """(rows of metrics.jsonl, last state, run folder) of a run."""
    saved = ["--save-model", folder / "out.pt"] if name == "prune_by_learning" else []
    run_script(name, *words, *saved, "--results-dir", folder)
    (run,) = (path for path in folder.iterdir() if path.is_dir())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return rows, read_file(run / "checkpoints" / "0000006.pt", "--resume"), run


@pytest.mark.parametrize("name", ["train", "prune_by_learning", "train_masked_kd"])
def test_looking_changes_no_number(run_script, family, latents, tmp_path, name):
    words = make_command(name, family, latents)
    plain, expected, _ = train(run_script, name, words, tmp_path / "plain")
    rows, state, run = train(run_script, name, [*words, *LOOK], tmp_path / "watched")
    for part in ("model", "ema"):
        assert all(torch.equal(state[part][key], expected[part][key]) for key in expected[part])
    held_out = [row for row in rows if "held_out_loss" in row]
    assert [row["step"] for row in held_out] == [0, 3, 6]
    assert all(0 < row["held_out_loss"] < 100 for row in held_out)
    assert len({row["held_out_loss"] for row in held_out}) > 1
    assert without_times(row for row in rows if "held_out_loss" not in row) == without_times(plain)
    assert [path.name for path in sorted((run / "samples").iterdir())] == ["0000000.png", "0000004.png", "0000006.png"]
    assert "memory_gb" in plain[-1]


def test_resumed_run_has_the_same_losses(run_script, teacher, latents, tmp_path):
    words = [*make_command("train", teacher, latents), *LOOK, "--ckpt-every", 3]
    rows, _, run = train(run_script, "train", words, tmp_path)
    (run / "checkpoints" / "0000006.pt").unlink()
    again, _, _ = train(run_script, "train", words, tmp_path)
    assert without_times(again) == without_times(rows)


def test_processes_share_the_images(launch, run_script, teacher, latents, tmp_path):
    """Two processes find the loss of one, before the first step."""
    words = [*make_command("train", teacher, latents), "--eval-every", 100]
    alone, _, _ = train(run_script, "train", words, tmp_path / "one")
    done = launch(2, "train", *words, "--results-dir", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "two").glob("*/metrics.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    first = [next(row["held_out_loss"] for row in each if "held_out_loss" in row) for each in (alone, rows)]
    assert first[0] == pytest.approx(first[1], rel=1e-6)


@pytest.mark.parametrize(("asked", "count"), [(0.25, 16), (5, 5)])
def test_held_out_images_are_not_trained_on(latents, asked, count):
    data = TrainingData(LatentDataset(latents), epochs=3, global_batch_size=8, eval_split=asked)
    seen = {item // 2 for items in data.order(range(data.total_steps)) for item in items}
    assert len(data.held_out) == count
    assert seen.isdisjoint(data.held_out.tolist())
    assert data.steps_per_epoch == (64 - count) // 8
    everything = TrainingData(LatentDataset(latents), epochs=1, global_batch_size=8)
    assert len(everything.images) == 64


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--eval-every", 3], "--eval-every 3: needs --eval-split"),
        (["--eval-split", 64], "--eval-split 64: holds out 64 of 64 images"),
        (["--eval-split", 0.001], r"--eval-split 0.001: holds out 0 of 64 images"),
    ],
)
def test_refused(run_script, teacher, latents, tmp_path, words, message):
    with pytest.raises(InputError, match=message):
        run_script("train", "--data-path", latents, "--model", teacher.model, "--results-dir", tmp_path, *TRAIN, *words)


def test_tensorboard(run_script, teacher, latents, tmp_path):
    """Its files hold every series that metrics.jsonl has, the pictures and the decisions."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    words = [*make_command("prune_by_learning", teacher, latents), *LOOK, "--log-to", "tensorboard"]
    rows, _, run = train(run_script, "prune_by_learning", words, tmp_path)
    events = reader.EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    expected = {}
    for row in rows:
        for name, value in split_row(row)[0].items():
            expected.setdefault(name, []).append((row["step"], pytest.approx(value, rel=1e-6)))
    assert {"loss", "lr", "grad_norm", "images_per_second", "memory_gb", "held_out_loss"} <= expected.keys()
    assert {"keep_probability/11", "confidence/05", "tau", "scaling"} <= expected.keys()
    found = {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
    assert found == expected
    assert [event.step for event in events.Images("samples")] == [0, 4, 6]
    assert "kept/text_summary" in events.Tags()["tensors"]


def test_wandb_offline(run_script, teacher, latents, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    words = [*make_command("train", teacher, latents), *LOOK, "--log-to", "wandb"]
    _, _, run = train(run_script, "train", words, tmp_path)
    (written,) = (run / "wandb").glob("offline-run-*/run-*.wandb")
    assert (run / "wandb_id").read_text() in written.name
    assert b"held_out_loss" in written.read_bytes()


def test_trackers_are_imported_only_if_asked_for(teacher, latents, tmp_path):
    """A run that may import neither works; timm tries to import one of them by itself."""
    code = (
        "import sys\n"
        "sys.modules |= {'tensorboard': None, 'wandb': None}\n"
        "import train\n"
        "train.main(train.parse_args())\n"
        "assert 'engine.trackers' in sys.modules and 'torch.utils.tensorboard' not in sys.modules\n"
    )
    words = map(str, [*make_command("train", teacher, latents), "--results-dir", tmp_path])
    root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_missing_tracker(run_script, teacher, latents, tmp_path, monkeypatch):
    monkeypatch.setattr("engine.trackers.find_spec", lambda name: None)
    words = [*make_command("train", teacher, latents), "--results-dir", tmp_path, "--log-to", "wandb"]
    with pytest.raises(InputError, match="--log-to wandb: needs the package wandb; pip install wandb"):
        run_script("train", *words)


def test_tensorboard_of_a_resumed_run(run_script, teacher, latents, tmp_path):
    """Steps that are made again are there once."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    words = [*make_command("train", teacher, latents), "--ckpt-every", 2, "--log-to", "tensorboard"]
    _, _, run = train(run_script, "train", words, tmp_path)
    (run / "checkpoints" / "0000006.pt").unlink()
    train(run_script, "train", words, tmp_path)
    events = reader.EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [2, 4, 6]


def test_broken_tracker(run_script, teacher, latents, tmp_path, monkeypatch, capsys):
    """A tracker that fails is left out, and the run goes on."""
    pytest.importorskip("tensorboard")

    def fail(*words):
        raise OSError("no space left")

    monkeypatch.setattr("engine.trackers.TensorBoard.log", fail)
    words = [*make_command("train", teacher, latents), "--log-to", "tensorboard"]
    train(run_script, "train", words, tmp_path)
    assert capsys.readouterr().out.count("note: --log-to tensorboard fails, and gets no more (no space left)") == 1


def test_trouble_with_a_picture(run_script, teacher, latents, tmp_path, monkeypatch):
    """Training does not end for a picture's sake."""

    def fail(*words):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("engine.watch.PictureSampler.save_grid", fail)
    _, _, run = train(run_script, "train", [*make_command("train", teacher, latents), *LOOK], tmp_path)
    assert "no picture at step 4: out of memory" in (run / "log.txt").read_text()


def test_what_may_change_on_resuming():
    """Flags of sampling, but no flag that says what is trained."""
    training = {flag.dest for family in FAMILIES.values() for flag in family.own_flags(["train"])}
    assert not FREE & training
    assert {"sampler", "num_iter", "cfg_scale", "eval_every", "log_to"} <= FREE
    assert not FREE & {"eval_split", "lr", "model"}
