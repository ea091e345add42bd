"""SiT and MAR through every script: the same commands as for DiT, other names."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from engine.checkpoint import read_facts, read_file, read_weights
from engine.errors import InputError
from families import FAMILIES

COMMON = "--num-classes 10 --global-batch-size 16 --num-workers 0 --log-every 2 --ema-decay 0.5 --epochs"
TRAIN = COMMON.split()
TEACHERS = {"SiT": "SiT-T/2", "MAR": "MAR-T"}
STUDENTS = {"SiT": "SiT-T-D6/2", "MAR": "MAR-T-D6"}
FEW_STEPS = {
    "SiT": ["--num-sampling-steps", "4", "--sampling-method", "euler"],
    "MAR": ["--num-sampling-steps", "3", "--num-iter", "4"],
}


@pytest.fixture(scope="module", params=list(TEACHERS))
def run(request, latents, tmp_path_factory, run_script):
    """A teacher of the family and its half, cut out by learning: files and folders."""
    family, results = request.param, tmp_path_factory.mktemp(request.param)
    data = ["--data-path", latents, "--results-dir", results]
    run_script("train", "--model", TEACHERS[family], *data, *TRAIN, "2", "--lr", "3e-3", "--min-lr", "1e-3")
    teacher = next((results / TEACHERS[family].replace("/", "-") / "checkpoints").glob("*8.pt"))
    learn = ["--pattern", "1:2", "--delta-w", "--lora", "--load-weight", teacher]
    pruned = results / "pruned.pt"
    run_script("prune_by_learning", *data, *TRAIN, "1", *learn, "--save-model", pruned)
    return SimpleNamespace(family=family, data=data, results=results, teacher=teacher, pruned=pruned)


def test_learned_layers(run):
    """The student's weights are the teacher's, of layers that the facts name."""
    facts = read_facts(run.pruned)
    assert facts["model"] == STUDENTS[run.family]
    assert facts["pattern"] == "1:2x6"
    assert [layer // 2 for layer in facts["kept"]] == list(range(6))
    log = (run.results / f"learn_mask-{TEACHERS[run.family].replace('/', '-')}" / "log.txt").read_text()
    assert f"[!] Final Decision: {facts['kept']}" in log
    teacher, student = read_weights(run.teacher, ""), read_weights(run.pruned, "")
    stack, depth = {"SiT": ("blocks", 12), "MAR": ("decoder_blocks", 6)}[run.family]
    offset = 12 - depth
    kept = [layer - offset for layer in facts["kept"] if layer >= offset]
    for new, old in enumerate(kept):
        key = f"{stack}.{{}}.mlp.fc1.weight"
        assert torch.equal(student[key.format(new)], teacher[key.format(old)])


@pytest.mark.parametrize("script", ["prune_by_score", "prune_by_index"])
def test_other_criteria(run, run_script, tmp_path, script):
    words = {
        "prune_by_score": ["--n-pruned", "5", "--nsamples", "32", "--batch-size", "8", *run.data[:2]],
        "prune_by_index": ["--scheme", "bk-sdm", "--pattern", "2:4,1:2,2:4,1:2"],
    }[script]
    run_script(script, "--ckpt", run.teacher, *words, "--save-model", tmp_path / "out.safetensors")
    facts = read_facts(tmp_path / "out.safetensors")
    assert len(facts["kept"]) == {"prune_by_score": 7, "prune_by_index": 6}[script]
    assert facts["model"].startswith(f"{run.family}-T-D")
    assert 11 in facts["kept"]


def test_recovery_resumes(run, run_script):
    """Masked KD learns, and the same command continues a run that was cut."""
    recover = ["--load-weight", run.pruned, "--teacher", TEACHERS[run.family], "--load-teacher", run.teacher]
    words = [*run.data, *TRAIN, "2", *recover, "--prefix", "kd", "--ckpt-every", "4"]
    args = run_script("train_masked_kd", *words)
    assert args.beta == {"SiT": 2e-4, "MAR": 1e-2}[run.family]
    folder = run.results / f"kd-{STUDENTS[run.family].replace('/', '-')}"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["feat_loss"] > 0
    assert rows[-1]["kd_loss"] > 0
    last = folder / "checkpoints" / "0000008.pt"
    whole = read_file(last.rename(run.results / "whole.pt"), "--resume")
    run_script("train_masked_kd", *words)
    again = read_file(last, "--resume")
    assert all(torch.equal(again["model"][key], value) for key, value in whole["model"].items())
    run_script("train", *run.data, *TRAIN, "1", "--load-weight", run.pruned, "--prefix", "ft")


def test_pictures(run, run_script, tmp_path):
    flags = ["--ckpt", run.pruned, *FEW_STEPS[run.family], "--cfg-scale", "2"]
    run_script("sample", *flags, "--labels", "1,2", "--output", tmp_path / "grid.png")
    assert Image.open(tmp_path / "grid.png").size == (22, 12)
    found = {}
    for size in ("4", "2"):  # image i does not depend on the batch but for solvers that adapt their steps
        sizes = ["--num-fid-samples", "4", "--per-proc-batch-size", size, "--sample-dir", tmp_path / size]
        run_script("sample_ddp", *flags, *sizes)
        (packed,) = (tmp_path / size).glob("*.npz")
        found[size] = np.load(packed)["arr_0"].astype(int)
    assert found["4"].shape == (4, 8, 8, 3)
    assert abs(found["4"] - found["2"]).max() <= 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "DiT-T/2", "--num-iter", "4"], "--num-iter: is for MAR, but --model DiT-T/2 is a DiT"),
        (["--model", "MAR-T", "--sampler", "ddim"], "--sampler: is for DiT, but --model MAR-T is a MAR"),
        (["SDE", "--model", "DiT-T/2"], "SDE: is for SiT, but --model DiT-T/2 is a DiT"),
        (["--model", "DiT-T/2", "--cfg-channels", "0"], "--cfg-channels: 0: expected 1 or more"),
        (["--model", "DiT-T/2", "--cfg-interval", "0", "2"], "--cfg-interval: 2: expected 0 to 1"),
        (["--model", "MAR-T", "--num-iter", "0"], "--num-iter: 0: expected 1 or more"),
        (["--model", "SiT-T/2", "--temperature", "0.9"], "--temperature: is for MAR, but --model SiT-T/2 is a SiT"),
    ],
)
def test_wrong_flags_of_families(run_script, capsys, words, message):
    with pytest.raises(SystemExit):
        run_script("sample", *words, "--ckpt", "absent.pt")
    assert message in capsys.readouterr().err


def test_wrong_input(run, run_script, tmp_path):
    """A pattern across the stacks of MAR, a teacher of another family, too many steps; nothing is written."""
    learn = [*run.data, *TRAIN, "1", "--load-weight", run.teacher, "--save-model", tmp_path / "out.pt"]
    if run.family == "MAR":
        with pytest.raises(InputError, match=r"--pattern 4:4,3:8: .*crosses from layer 5 to 6"):
            run_script("prune_by_learning", *learn, "--pattern", "4:4,3:8", "--prefix", "wrong")
        with pytest.raises(InputError, match=r"num_iter is 5: expected at most 4"):
            run_script("sample", "--ckpt", run.pruned, "--num-iter", "5")
    distil = [*run.data, *TRAIN, "1", "--load-weight", run.pruned, "--load-teacher", run.teacher, "--prefix", "wrong"]
    with pytest.raises(InputError, match=rf"--teacher DiT-XL/2: is no {run.family}"):
        run_script("train_masked_kd", *distil, "--teacher", "DiT-XL/2")
    assert not list(run.results.glob("wrong*"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mode", ["ODE", "SDE"])
def test_first_word(run, run_script, tmp_path, mode):
    if run.family == "SiT":
        words = ["--ckpt", run.pruned, "--num-sampling-steps", "3", "--cfg-scale", "1", "--labels", "1"]
        run_script("sample", mode, *words, "--output", tmp_path / "one.png")
        assert (tmp_path / "one.png").exists()


def test_plain_training_has_settings_of_its_own(run, run_script):
    """Without weights to start from the family's own settings are the defaults; flags win."""
    import train

    args = train.parse_args(["--model", TEACHERS[run.family], "--data-path", str(run.data[1]), "--epochs", "7"])
    assert args.epochs == 7
    assert args.lr == FAMILIES[run.family].plain["lr"]
    recovery = train.parse_args(["--load-weight", str(run.pruned), "--data-path", str(run.data[1])])
    assert (recovery.model, recovery.lr, recovery.weight_decay) == (STUDENTS[run.family], 2e-4, 0.0)
