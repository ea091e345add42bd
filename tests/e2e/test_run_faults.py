"""What must not go wrong in silence in a run folder: numbers, branches, changed inputs, damage, second owners."""

import json
import os
import shutil
import time

import numpy as np
import pytest
import torch
from disturbed import TRAIN, contents, training_words

from engine.checkpoint import save_weights
from engine.data import TrainingData
from engine.errors import InputError, RunError
from engine.lock import FolderLock
from engine.run import Run
from engine.trainer import Meter, Trainer
from engine.weight_files import read_file


def train_words(teacher, latents, results, *more):
    return ["train", "--load-weight", teacher.student, "--data-path", latents, "--results-dir", results, *TRAIN, *more]


def run_of(results):
    return results / "DiT-T-D6-2"


def states(results):
    return sorted(path.stem for path in run_of(results).glob("checkpoints/*.pt"))


def stop_at(monkeypatch, step):
    """Let every training step from this one fail."""
    compute = Trainer.train_step

    def train_step(self, x, y):
        if self.steps + 1 >= step:
            raise RunError("stopped for the test")
        return compute(self, x, y)

    monkeypatch.setattr(Trainer, "train_step", train_step)


def spoil_gradient(monkeypatch, step):
    """Let one number of a gradient be NaN at a step, while the loss is fine."""
    backward = Trainer._backward

    def spoiled(self, x, y, parts, last):
        terms = backward(self, x, y, parts, last)
        if self.steps + 1 == step:
            self.params[0].grad.view(-1)[0] = float("nan")
        return terms

    monkeypatch.setattr(Trainer, "_backward", spoiled)


@pytest.mark.parametrize("step", [3, 8])
def test_gradient_that_is_not_finite(teacher, latents, tmp_path, run_script, monkeypatch, step):
    """Neither at a checkpoint nor at the end does it become a state; the message names step and process."""
    with monkeypatch.context() as patch:
        spoil_gradient(patch, step)
        with pytest.raises(RunError, match=f"the gradient is not finite at step {step} in process 0"):
            run_script(*train_words(teacher, latents, tmp_path))
    assert states(tmp_path) == {3: [], 8: ["0000003", "0000006"]}[step]
    run_script(*train_words(teacher, latents, tmp_path))
    assert states(tmp_path)[-1] == "0000008"


def test_gates_that_are_not_finite(teacher, latents, tmp_path, run_script, monkeypatch):
    """They choose nothing, and nothing is written."""
    spoil_gradient(monkeypatch, 8)
    with pytest.raises(RunError, match="not finite at step 8"):
        run_script(*training_words("prune_by_learning", teacher, latents, tmp_path))
    assert not (tmp_path / "pruned.pt").exists()


def test_loss_names_pictures(teacher, latents_copy, tmp_path, run_script):
    """Those whose latents are damaged."""
    np.load(latents_copy / "features.npy", mmap_mode="r+")[[5, 40]] = np.nan
    with pytest.raises(
        RunError, match=r"the loss of images \[(5|40|5, 40|40, 5)\] of --data-path is not finite at step"
    ):
        run_script(*train_words(teacher, latents_copy, tmp_path))
    assert states(tmp_path) in ([], ["0000003"])


def test_branch(teacher, latents, tmp_path, run_script, monkeypatch):
    """A run that continued an early state with another rate goes on with its own states, not with those of before."""
    words = train_words(teacher, latents, tmp_path)
    run_script(*words)
    early = shutil.copy(run_of(tmp_path) / "checkpoints" / "0000003.pt", tmp_path / "early.pt")
    branch = [*words, "--lr", "0.001"]
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        with pytest.raises(RunError):
            run_script(*branch, "--resume", early)
    run_script(*branch)  # as a scheduler would repeat it without --resume
    log = (run_of(tmp_path) / "log.txt").read_text()
    assert log.rstrip().count("resumed from") == 2
    assert "passed over" in log
    assert f"resumed from {early} at step 3" in log.splitlines()[-1] or log.count(f"resumed from {early}") == 2

    run_script(*train_words(teacher, latents, tmp_path / "whole", "--lr", "0.001", "--resume", early))
    ours, expected = (
        read_file(run_of(folder) / "checkpoints" / "0000008.pt", "--resume")
        for folder in (tmp_path, tmp_path / "whole")
    )
    assert all(torch.equal(ours["model"][key], value) for key, value in expected["model"].items())
    again = [*branch, "--resume", early]  # the branch is there already
    before = contents(run_of(tmp_path) / "checkpoints")
    run_script(*again)
    assert contents(run_of(tmp_path) / "checkpoints") == before


def test_failed_start_does_not_take_the_folder(teacher, latents, tmp_path, run_script, monkeypatch):
    """Without a state a folder belongs to nobody."""
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        with pytest.raises(RunError):
            run_script(*train_words(teacher, latents, tmp_path, "--lr", "0.5"))
    run_script(*train_words(teacher, latents, tmp_path))
    rows = [json.loads(line) for line in (run_of(tmp_path) / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6, 8]


def test_other_inputs_under_the_same_path(teacher, latents_copy, tmp_path, run_script, monkeypatch):
    """Latents and weights are not those that the run began with: named and refused; a copy of them is fine."""
    weights = tmp_path / "start.pt"
    shutil.copy(teacher.student, weights)
    shutil.copy(f"{teacher.student}.json", f"{weights}.json")
    words = ["train", "--load-weight", weights, "--data-path", latents_copy, "--results-dir", tmp_path / "r", *TRAIN]
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        with pytest.raises(RunError):
            run_script(*words)
    os.utime(weights)
    features = np.load(latents_copy / "features.npy", mmap_mode="r+")
    kept = features[3].copy()
    features[3] += 1
    with pytest.raises(InputError, match=r"--data-path .*latents_copy: has changed since the run in .* began"):
        run_script(*words)
    features[3] = kept
    state = torch.load(weights)
    save_weights(
        weights, {**state, "pos_embed": state["pos_embed"] + 1}, **json.loads((tmp_path / "start.pt.json").read_text())
    )
    with pytest.raises(InputError, match=r"--load-weight .*start\.pt: has changed"):
        run_script(*words)
    save_weights(weights, state, **json.loads((tmp_path / "start.pt.json").read_text()))


def damage(path, how):
    data = bytearray(path.read_bytes())
    if how == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif how == "bit":
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
    else:
        path.write_bytes(b"")


@pytest.mark.parametrize("how", ["cut", "bit", "empty"])
def test_damaged_newest_state(teacher, latents, tmp_path, run_script, monkeypatch, how):
    """The one before is taken, and the damage is said; the end is the same."""
    words = train_words(teacher, latents, tmp_path)
    run_script(*words)
    whole = contents(run_of(tmp_path) / "checkpoints")
    damage(run_of(tmp_path) / "checkpoints" / "0000008.pt", how)
    run_script(*words)
    log = (run_of(tmp_path) / "log.txt").read_text()
    assert "passed over: --resume" in log
    assert "0000006.pt at step 6" in log
    assert contents(run_of(tmp_path) / "checkpoints") == whole


def test_state_beyond_the_end(teacher, latents, tmp_path, run_script):
    words = train_words(teacher, latents, tmp_path / "a")
    run_script(*words)
    path = run_of(tmp_path / "a") / "checkpoints" / "0000008.pt"
    state = read_file(path, "--resume")
    torch.save({**state, "train_steps": 10**9}, tmp_path / "far.pt")
    with pytest.raises(InputError, match="is of step 1000000000, but --epochs ends at 8"):
        run_script(*train_words(teacher, latents, tmp_path / "b"), "--resume", tmp_path / "far.pt")


def test_torn_metrics(teacher, latents, tmp_path, run_script, monkeypatch):
    """Half a row is none."""
    words = train_words(teacher, latents, tmp_path)
    run_script(*words)
    rows = run_of(tmp_path) / "metrics.jsonl"
    whole = rows.read_text()
    rows.write_text(whole + '{"step": 9, "lo')
    run_script(*words)
    assert rows.read_text() == whole


def test_second_owner(teacher, latents, tmp_path, run_script, monkeypatch):
    """The second start of a command says who runs; when the first is gone the folder is free."""
    words = train_words(teacher, latents, tmp_path)
    said = []
    compute = Trainer.train_step

    def train_step(self, x, y):
        if self.steps == 2 and not said:
            said.append("")
            with pytest.raises(InputError, match=rf"in use since .* by process {os.getpid()} on .*; wait for its end"):
                run_script(*words)
            said.append("refused")
        return compute(self, x, y)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    run_script(*words)
    assert said == ["", "refused"]
    assert not (run_of(tmp_path) / ".lock").exists()


def test_keep_checkpoints(teacher, latents, tmp_path, run_script):
    """The newest, and multiples of a step; with each its facts."""
    run_script(
        *train_words(teacher, latents, tmp_path, "--ckpt-every", "1", "--keep-checkpoints", "2", "--keep-every", "3")
    )
    assert states(tmp_path) == ["0000003", "0000006", "0000007", "0000008"]
    facts = sorted(path.name for path in run_of(tmp_path).glob("checkpoints/*.json"))
    assert facts == [f"{name}.pt.json" for name in states(tmp_path)]


def test_no_room_for_a_state(teacher, latents, tmp_path, run_script, monkeypatch):
    """Known before the first step."""
    usage = shutil._ntuple_diskusage(10**9, 10**9 - 5 * 10**6, 5 * 10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InputError, match=r"a training state takes 0\.017 GB, and 0\.005 GB are free"):
        run_script(*train_words(teacher, latents, tmp_path))
    assert not list(tmp_path.iterdir())


def stopped_branch(words, early, run_script, monkeypatch, step):
    """Begin a branch from an early state, and let it fail at a step."""
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        with pytest.raises(RunError):
            run_script(*words, "--resume", early)


@pytest.mark.parametrize("flags", [[], ["--lr", "0.001"]])
@pytest.mark.parametrize("repeated", ["with --resume", "without"])
def test_branch_without_a_state(teacher, latents, tmp_path, run_script, monkeypatch, flags, repeated):
    """It begins again where it began, also where an older branch with the same settings has come to its end."""
    words = train_words(teacher, latents, tmp_path)
    run_script(*words)
    early = shutil.copy(run_of(tmp_path) / "checkpoints" / "0000003.pt", tmp_path / "early.pt")
    branch = [*words, *flags]
    stopped_branch(branch, early, run_script, monkeypatch, 5)
    run_script(*branch, *(["--resume", early] if repeated == "with --resume" else []))
    assert (run_of(tmp_path) / "log.txt").read_text().count(f"resumed from {early} at step 3") == 2
    rows = [json.loads(line)["step"] for line in (run_of(tmp_path) / "metrics.jsonl").read_text().splitlines()]
    assert rows == [2, 4, 6, 8]


def test_keep_checkpoints_of_a_branch(teacher, latents, tmp_path, run_script, monkeypatch):
    """States of another branch are neither counted nor deleted, nor is the one that the branch began with."""
    run_script(*train_words(teacher, latents, tmp_path, "--ckpt-every", "1"))
    base = run_of(tmp_path) / "checkpoints" / "0000002.pt"
    branch = train_words(teacher, latents, tmp_path, "--ckpt-every", "1", "--lr", "0.001", "--keep-checkpoints", "2")
    stopped_branch(branch, base, run_script, monkeypatch, 6)
    assert states(tmp_path) == [f"{step:07d}" for step in (1, 2, 4, 5, 6, 7, 8)]
    run_script(*branch)
    assert "0000005.pt at step 5" in (run_of(tmp_path) / "log.txt").read_text()
    assert states(tmp_path) == [f"{step:07d}" for step in (1, 2, 7, 8)]


@pytest.mark.parametrize(("before", "now"), [(2, 1), (1, 2), (2, 2)])
def test_means_with_other_processes(before, now, monkeypatch):
    """Losses of one are one, whoever has measured them."""
    run = Run("cpu")
    run.world = now
    meter = Meter(run, TrainingData(range(8), epochs=9, global_batch_size=4))
    meter.load({"count": 3, "sums": [{"loss": torch.tensor(3.0)}] * before})
    meter.add({"loss": torch.ones(2)}, 4)
    monkeypatch.setattr("engine.trainer.all_reduce", lambda t, op="sum": t * now if op == "sum" else t)
    assert meter.flush(4, 0.1, 1.0)[0]["loss"] == 1


def test_other_precision(teacher, latents, tmp_path, run_script):
    """The default depends on the device: another one than before is not taken in silence."""
    words = train_words(teacher, latents, tmp_path)
    run_script(*words)
    config = run_of(tmp_path) / "config.json"
    about = json.loads(config.read_text())
    about["environment"]["precision"] = "bf16"
    config.write_text(json.dumps(about))
    with pytest.raises(InputError, match=r"--precision: the run in .* was computed in bf16, now it would be in fp32"):
        run_script(*words)


def test_samples_of_an_earlier_version(teacher, tmp_path, run_script):
    """Their record has the size and time of the weights: other weights under that name are refused."""
    weights = tmp_path / "w.pt"
    for suffix in ("", ".json"):
        shutil.copy(f"{teacher.student}{suffix}", f"{weights}{suffix}")
    few = ["--num-fid-samples", 2, "--num-sampling-steps", 2]
    words = ["sample_ddp", "--ckpt", weights, "--sample-dir", tmp_path / "s", *few]
    run_script(*words)
    (record,) = (tmp_path / "s").glob("*/sampling.json")
    about, info = json.loads(record.read_text()), weights.stat()
    del about["weights"]
    record.write_text(json.dumps({**about, "ckpt_size": info.st_size, "ckpt_changed": info.st_mtime}))
    run_script(*words)
    record.write_text(json.dumps({**about, "ckpt_size": info.st_size - 1, "ckpt_changed": info.st_mtime}))
    with pytest.raises(InputError, match="holds images with ckpt_size"):
        run_script(*words)
    record.unlink()
    with pytest.raises(InputError, match=r"no sampling\.json that says how they were made"):
        run_script(*words)


def test_children_do_not_hold_the_folder(tmp_path):
    """A loader process outlives its killed parent for some seconds; the folder is free at once."""
    child = os.fork()
    if child == 0:
        FolderLock(tmp_path, "--results-dir")
        if os.fork() == 0:
            time.sleep(5)
        os._exit(0)
    os.waitpid(child, 0)
    FolderLock(tmp_path, "--results-dir").release()
    assert not list(tmp_path.iterdir())
