"""The same command resumes: bit for bit, and only with the same settings."""

import json
import shutil

import pytest
from disturbed import same, without_times

from engine.checkpoint import read_facts
from engine.errors import InputError
from engine.weight_files import read_file

TRAIN = ["--epochs", "2", "--global-batch-size", "16", "--num-workers", "0", "--log-every", "1", "--ckpt-every", "3"]


def command(name, family, latents, results):
    common = ["--data-path", latents, "--results-dir", results, *TRAIN]
    return {
        "train": ["--load-weight", family.student, *common],
        "prune_by_learning": [
            *("--model", family.gated, "--load-weight", family.weights, "--delta-w", "--lora"),
            *("--save-model", results / "out.pt", "--prefix", "", *common),
        ],
        "pairs": [
            *("--model", family.gated, "--load-weight", family.weights, "--delta-w", "--gate-gradient", "pairs"),
            *("--target", "teacher", "--save-model", results / "out.pt", "--prefix", "", *common),
        ],
        "train_masked_kd": [
            *("--load-weight", family.student, "--teacher", family.model, "--load-teacher", family.weights, *common)
        ],
    }[name]


@pytest.mark.parametrize("form", ["train", "prune_by_learning", "pairs", "train_masked_kd"])
def test_interrupted_run(family, latents, tmp_path, run_script, form):
    """Without its last states a run continues to the same weights, optimizer, averages and metrics."""
    words = command(form, family, latents, tmp_path)
    name = "prune_by_learning" if form == "pairs" else form
    run_script(name, *words)
    (folder,) = (f for f in tmp_path.iterdir() if f.is_dir())
    whole = read_file(shutil.copy(folder / "checkpoints" / "0000008.pt", tmp_path / "whole.pt"), "--resume")
    rows = (folder / "metrics.jsonl").read_text().splitlines()
    for step in (6, 8):
        (folder / "checkpoints" / f"{step:07d}.pt").unlink()
    run_script(name, *words)
    again = read_file(folder / "checkpoints" / "0000008.pt", "--resume")
    for part in ("model", "ema", "opt", "train_steps"):
        assert same(again[part], whole[part]), part
    assert "resumed from" in (folder / "log.txt").read_text()

    def numbers(lines):
        return without_times(map(json.loads, lines))

    assert numbers((folder / "metrics.jsonl").read_text().splitlines()) == numbers(rows)


@pytest.mark.parametrize("name", ["train", "prune_by_learning", "train_masked_kd"])
def test_finished_run(family, latents, tmp_path, run_script, name):
    """A finished run trains no step, keeps its metrics, and leaves its states alone."""
    words = command(name, family, latents, tmp_path)
    run_script(name, *words)
    (folder,) = (f for f in tmp_path.iterdir() if f.is_dir())
    files = {f: f.stat().st_mtime_ns for f in (folder / "checkpoints").iterdir()}
    metrics = (folder / "metrics.jsonl").read_text()
    facts = read_facts(tmp_path / "out.pt")
    run_script(name, *words)
    assert read_facts(tmp_path / "out.pt") == facts
    assert {f: f.stat().st_mtime_ns for f in (folder / "checkpoints").iterdir()} == files
    assert (folder / "metrics.jsonl").read_text() == metrics


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--lr", "0.5"], "--lr"),
        (["--global-batch-size", "32"], "--global-batch-size"),
        (["--epochs", "3"], "--epochs"),
    ],
)
def test_other_settings_are_refused(teacher, latents, tmp_path, run_script, flags, named):
    words = command("train", teacher, latents, tmp_path)
    run_script("train", *words, "--epochs", "1")
    before = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
    with pytest.raises(InputError, match=rf"{named} .*, now it is .*take another --prefix"):
        run_script("train", *words, "--epochs", "1", *flags)
    assert {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()} == before


def test_free_settings_may_change(teacher, latents, tmp_path, run_script):
    words = command("train", teacher, latents, tmp_path)
    run_script("train", *words, "--epochs", "1")
    (folder,) = tmp_path.iterdir()
    before = {f: f.read_bytes() for f in (folder / "checkpoints").iterdir()}
    run_script("train", *words, "--epochs", "1", "--log-every", "7", "--ckpt-every", "9")
    assert {f: f.read_bytes() for f in (folder / "checkpoints").iterdir()} == before


def test_resume_flag(teacher, latents, tmp_path, run_script):
    """--resume continues a given state in a folder of its own."""
    run_script("train", *command("train", teacher, latents, tmp_path / "a"))
    old = tmp_path / "a" / "DiT-T-D6-2" / "checkpoints"
    words = command("train", teacher, latents, tmp_path / "b")
    run_script("train", *words, "--resume", old / "0000003.pt")
    new = tmp_path / "b" / "DiT-T-D6-2" / "checkpoints" / "0000008.pt"
    for part in ("model", "ema", "opt"):
        assert same(read_file(new, "--resume")[part], read_file(old / "0000008.pt", "--resume")[part])


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_resume_in_another_precision(teacher, latents, tmp_path, run_script, precision):
    """A state of a run in fp32 holds no loss scaler; one in fp16 starts with a new one."""
    run_script("train", *command("train", teacher, latents, tmp_path / "a"))
    state = tmp_path / "a" / "DiT-T-D6-2" / "checkpoints" / "0000003.pt"
    words = [*command("train", teacher, latents, tmp_path / "b"), "--precision", precision]
    run_script("train", *words, "--resume", state)
    last = read_file(tmp_path / "b" / "DiT-T-D6-2" / "checkpoints" / "0000008.pt", "--resume")
    assert last["train_steps"] == 8
    assert bool(last["scaler"]) == (precision == "fp16")


def test_resume_with_other_rates(teacher, latents, tmp_path, run_script):
    """The rates of the command line count, not those in the state."""
    run_script("prune_by_learning", *command("prune_by_learning", teacher, latents, tmp_path / "a"))
    state = tmp_path / "a" / "DiT-T-1-2" / "checkpoints" / "0000003.pt"
    words = command("prune_by_learning", teacher, latents, tmp_path / "b")
    run_script("prune_by_learning", *words, "--resume", state, "--lr", "0.004", "--gate-lr", "0.02")
    last = read_file(tmp_path / "b" / "DiT-T-1-2" / "checkpoints" / "0000008.pt", "--resume")
    assert [group["lr"] for group in last["opt"]["param_groups"]] == [0.004, 0.02]
    old = read_file(tmp_path / "a" / "DiT-T-1-2" / "checkpoints" / "0000008.pt", "--resume")
    assert [group["lr"] for group in old["opt"]["param_groups"]] == [1e-4, 1e-3]


def test_finished_run_says_so(teacher, latents, tmp_path, run_script, capsys):
    words = command("train", teacher, latents, tmp_path)
    run_script("train", *words)
    capsys.readouterr()
    run_script("train", *words)
    shown = capsys.readouterr()
    assert f"nothing left to train: 8 of 8 steps are done, the last state is in {tmp_path}/DiT-T-D6-2" in shown.out
    assert "it/s" not in shown.err


def test_folder_of_an_earlier_version(teacher, latents, tmp_path, run_script):
    """Its config.json holds settings alone, and infinity as JSON does not know it."""
    words = [*command("train", teacher, latents, tmp_path), "--clip-norm", "inf"]
    run_script("train", *words)
    config = next(tmp_path.iterdir()) / "config.json"
    settings = json.loads(config.read_text(), parse_constant=pytest.fail)["settings"]
    assert settings["clip_norm"] == "inf"
    config.write_text(json.dumps({**settings, "script": "train", "clip_norm": float("inf")}))
    run_script("train", *words)
    config.write_text(json.dumps({**settings, "lr": 0.5}))
    with pytest.raises(InputError, match=r"--lr 0\.5, now it is 0\.0002"):
        run_script("train", *words)


def test_refused_state_leaves_the_folder(teacher, latents, tmp_path, run_script):
    """A state of another model is refused, and the folder still belongs to the run that made it."""
    words = command("train", teacher, latents, tmp_path)
    run_script("train", *words)
    config = tmp_path / "DiT-T-D6-2" / "config.json"
    before = config.read_bytes()
    with pytest.raises(InputError, match="not a training state of this model"):
        run_script("train", *words, "--lr", "0.5", "--resume", teacher.checkpoint)
    assert config.read_bytes() == before
    run_script("train", *words)


def test_dry_run_checks_the_state(family, latents, tmp_path, run_script):
    """Another model's state is refused, by its first difference, before a dry run says that all is well."""
    words = command("train", family, latents, tmp_path)
    with pytest.raises(InputError, match=r"not a training state of this model: \S+ in its model is \(.*expected none"):
        run_script("train", *words, "--resume", family.checkpoint, "--dry-run")
    assert not list(tmp_path.iterdir())


def test_settings_that_came_later(teacher, latents, tmp_path, run_script):
    """A record that does not know a flag continues without it, and not with it."""
    words = command("train", teacher, latents, tmp_path)
    run_script("train", *words)
    config = next(tmp_path.iterdir()) / "config.json"
    about = json.loads(config.read_text())
    del about["settings"]["ema_warmup"]
    config.write_text(json.dumps(about))
    with pytest.raises(InputError, match="--ema-warmup not set, now it is True"):
        run_script("train", *words, "--ema-warmup")
    run_script("train", *words)
