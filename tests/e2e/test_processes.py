"""Real launches with two gloo processes, compared with one process."""

import json

import numpy as np

from engine.checkpoint import read_facts
from engine.weight_files import read_file, read_weights
from pruning.surgery import keep_layers

TRAIN = ["--epochs", "1", "--global-batch-size", "16", "--num-workers", "0", "--log-every", "2"]


def finished(result):
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Traceback" not in result.stderr


def check_run(folder, steps):
    """One log, written by the main process only, with finite losses at every interval."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss" in row]
    assert [row["step"] for row in rows] == list(range(2, steps + 1, 2))
    assert all(np.isfinite(row["loss"]) for row in rows)
    log = (folder / "log.txt").read_text()
    assert log.count("2 process(es)") == 1
    return rows


def test_extraction(launch, pictures, latents, tmp_path):
    """The same bytes as from one process."""
    flags = ["--vae", "none", "--image-size", 8, "--data-path", pictures, "--batch-size", 5]
    finished(launch(2, "extract_features", *flags, "--features-path", tmp_path / "features"))
    for name in ("features.npy", "labels.npy", "status.npy", "metadata.json"):
        assert (tmp_path / "features" / name).read_bytes() == (latents / name).read_bytes()


def test_learning(launch, family, latents, tmp_path, same_weights):
    flags = ["--load-weight", family.weights, "--data-path", latents, "--results-dir", tmp_path, *TRAIN]
    out = tmp_path / "pruned.pt"
    words = ["--model", family.gated, *flags, "--delta-w", "--lora", "--save-model", out]
    finished(launch(2, "prune_by_learning", *words))
    rows = check_run(tmp_path / f"learn_mask-{family.gated}", 4)
    facts = read_facts(out)
    assert facts["kept"] == rows[-1]["kept"]
    same_weights(read_weights(out, "--ckpt"), keep_layers(family.state, facts["kept"]))


def test_learning_from_pairs(launch, teacher, latents, tmp_path, same_weights):
    """All of what goes with it: the processes train the same weights, and the main one writes every file once."""
    flags = ["--load-weight", teacher.weights, "--data-path", latents, "--results-dir", tmp_path, *TRAIN]
    flags += ["--gate-gradient", "pairs", "--target", "both", "--candidates", "contiguous", "--grad-accumulation", 2]
    flags += ["--finalists", 2, "--init", "learned", "--save-model", tmp_path / "pruned.pt"]
    finished(launch(2, "prune_by_learning", "--model", "DiT-T/2", "--pattern", "2:4", "--delta-w", *flags))
    check_run(tmp_path / "learn_mask-DiT-T-2", 4)
    trained = read_file(tmp_path / "learn_mask-DiT-T-2/checkpoints/0000004.pt", "--resume")["model"]
    for path in (tmp_path / "pruned.pt", tmp_path / "pruned-2.pt"):
        same_weights(read_weights(path, "--ckpt"), keep_layers(trained, read_facts(path)["kept"]))


def test_training(launch, student, latents, tmp_path, run_script):
    """The first step of two processes, over the same images, is close to that of one: a mean over the whole batch."""
    flags = ["--load-weight", student, "--data-path", latents, *TRAIN, "--lr", 0]
    flags += ["--min-lr", 0]
    finished(launch(2, "train", *flags, "--results-dir", tmp_path / "two"))
    run_script("train", *flags, "--results-dir", tmp_path / "one")
    two = check_run(tmp_path / "two" / "DiT-T-D6-2", 4)
    one = [json.loads(line) for line in (tmp_path / "one/DiT-T-D6-2/metrics.jsonl").read_text().splitlines()]
    for a, b in zip(one, two, strict=True):
        assert abs(a["mse"] - b["mse"]) < 0.3 * a["mse"]  # the same images and weights, other noise
        assert a["mse"] != b["mse"]
    state = read_file(tmp_path / "two/DiT-T-D6-2/checkpoints/0000004.pt", "--resume")
    assert not [key for key in state["model"] if key.startswith("module.")]


def test_masked_kd(launch, family, latents, tmp_path):
    flags = ["--load-weight", family.student, "--data-path", latents, "--results-dir", tmp_path, *TRAIN]
    words = [*flags, "--teacher", family.model, "--load-teacher", family.weights]
    finished(launch(2, "train_masked_kd", *words))
    rows = check_run(tmp_path / family.half.replace("/", "-"), 4)
    assert all(row["feat_loss"] > 0 for row in rows)


def test_sampling(launch, family, tmp_path, run_script):
    """The same bytes as from one process, also when some images are there already."""
    student, flags = family.student, ["--num-fid-samples", "10", "--per-proc-batch-size", "3", *family.few_steps]
    run_script("sample_ddp", "--ckpt", student, *flags, "--sample-dir", tmp_path / "one")
    (one,) = (f for f in (tmp_path / "one").iterdir() if f.is_dir())
    two = tmp_path / "two" / one.name
    run_script("sample_ddp", "--ckpt", student, *flags, "--sample-dir", tmp_path / "two")
    for i in (0, 4, 5, 6, 9):
        (two / f"{i:06d}.png").unlink()
    kept = {f: f.stat().st_mtime_ns for f in two.glob("*.png")}
    finished(launch(2, "sample_ddp", "--ckpt", student, *flags, "--sample-dir", tmp_path / "two"))
    assert {f: f.stat().st_mtime_ns for f in kept} == kept
    names = sorted(f.name for f in one.glob("*.png"))
    assert names == sorted(f.name for f in two.glob("*.png"))
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in names)
    with np.load(f"{one}.npz") as a, np.load(f"{two}.npz") as b:
        assert all((a[key] == b[key]).all() for key in a)
