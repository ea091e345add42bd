"""`--shard`: the numbers and the files of a run without it, which either form continues."""

import json
from types import SimpleNamespace

import pytest
import torch

from engine.errors import InputError
from engine.weight_files import read_file, read_weights

TRAIN = ["--global-batch-size", 16, "--num-workers", 0, "--log-every", 1, "--ckpt-every", 20]
LEARN = ["--delta-w", "--init", "learned"]
CHEAP = ["--grad-accumulation", 2, "--grad-checkpointing"]
LONG, MIDDLE, SHORT = ["--epochs", 13], ["--epochs", 6], ["--epochs", 2]  # 52, 24 and 8 steps


def commands(teacher, latents, folder):
    """{case: [script, word, ...]} of training runs."""
    common = ["--data-path", latents, *TRAIN]
    learn = ["prune_by_learning", "--model", teacher.gated, "--load-weight", teacher.weights, *common]
    distil = ["train_masked_kd", "--load-weight", teacher.student, "--teacher", teacher.model, *common]
    cases = {
        "train": ["train", "--load-weight", teacher.student, *LONG, *common],
        "learn": [*learn, *LEARN, *MIDDLE],
        "lora": [*learn, "--delta-w", "--lora", "--init", "learned", "--precision", "bf16", *SHORT],
        "fp16": [*learn, *LEARN, "--precision", "fp16", *SHORT],
        "pairs": [*learn, *LEARN, "--gate-gradient", "pairs", "--target", "teacher", *CHEAP, *SHORT],
        "kd": [*distil, "--load-teacher", teacher.weights, "--precision", "fp16", *CHEAP, *SHORT],
    }
    for case, words in cases.items():
        words += ["--results-dir", folder / case]
        words += ["--save-model", folder / case / "out.pt"] if words[0] == "prune_by_learning" else []
    return cases


ENTRIES = ("model", "ema", "opt", "scaler", "train_steps", "world")
CASES = ("train", "learn", "lora", "fp16", "pairs", "kd")


def run_in_turn(launch, path, words):
    path.write_text(json.dumps([[str(word) for word in each] for each in words]))
    done = launch(2, "tests/e2e/in_turn", path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def runs(launch, teacher, latents, tmp_path_factory):
    """Folders of the same runs by two processes: plain, sharded, and a sharded one from step 20 of the plain one."""
    plain, sharded, joined = (tmp_path_factory.mktemp(name) for name in ("plain", "sharded", "joined"))
    run_in_turn(launch, plain / "commands.json", commands(teacher, latents, plain).values())
    words = [[*each, "--shard"] for each in commands(teacher, latents, sharded).values()]
    state = next(plain.glob("train/*/checkpoints/0000020.pt"))
    words.append([*commands(teacher, latents, joined)["train"], "--shard", "--resume", state])
    run_in_turn(launch, sharded / "commands.json", words)
    return SimpleNamespace(plain=plain, sharded=sharded, joined=joined)


def read_losses(folder):
    """Losses of the rows of metrics.jsonl in the run folder in `folder`, by step."""
    rows = [json.loads(line) for line in next(folder.glob("*/metrics.jsonl")).read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def read_last(folder):
    """The last training state of the run folder in `folder`."""
    return read_file(max(folder.glob("*/checkpoints/*.pt")), "--resume")


def assert_like(found, expected):
    """The same keys in the same order, kinds of numbers and plain values, and tensors within 1e-4."""
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            assert_like(found[key], expected[key])
    elif isinstance(expected, torch.Tensor):
        assert type(found) is torch.Tensor
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_like(one, other)
    else:
        assert found == (pytest.approx(expected, rel=1e-4) if isinstance(expected, float) else expected)


@pytest.mark.parametrize("case", CASES)
def test_same_run(runs, case):
    """Losses agree within 1e-5, and states are the same files, over 52 steps for `train`."""
    expected, found = (read_losses(folder / case) for folder in (runs.plain, runs.sharded))
    assert found == pytest.approx(expected, rel=0, abs=1e-5)
    old, new = (read_last(folder / case) for folder in (runs.plain, runs.sharded))
    for entry in ENTRIES:
        assert_like(new[entry], old[entry])
    steps = {value["step"].item() for value in new["opt"]["state"].values()}
    assert steps == {new["train_steps"]}, "fp16 skipped steps: nothing was compared"


@pytest.mark.parametrize("case", ["learn", "lora", "pairs"])
def test_learned_weights_are_written_whole(runs, case):
    old, new = (read_weights(folder / case / "out.pt", "--ckpt") for folder in (runs.plain, runs.sharded))
    assert_like(new, old)


def test_plain_state_goes_on_sharded(runs):
    expected, found = (read_losses(folder / "train") for folder in (runs.plain, runs.joined))
    assert list(found) == list(range(21, 53))
    assert found == pytest.approx({step: expected[step] for step in found}, rel=0, abs=1e-5)
    assert_like(read_last(runs.joined / "train")["opt"], read_last(runs.plain / "train")["opt"])


@pytest.mark.parametrize("case", ["train", "learn"])
def test_sharded_state_goes_on_in_one_process(runs, teacher, latents, tmp_path, run_script, case):
    """As a plain state does."""
    for name in ("plain", "sharded"):
        state = next((getattr(runs, name) / case).glob("*/checkpoints/0000020.pt"))
        run_script(*commands(teacher, latents, tmp_path / name)[case], "--resume", state)
    losses = [read_losses(tmp_path / name / case) for name in ("plain", "sharded")]
    assert min(losses[1]) == 21
    assert losses[1] == pytest.approx(losses[0], rel=0, abs=1e-5)
    old, new = (read_last(tmp_path / name / case) for name in ("plain", "sharded"))
    for entry in ENTRIES:
        assert_like(new[entry], old[entry])


def test_one_process_is_refused(teacher, latents, tmp_path, run_script):
    script, *words = commands(teacher, latents, tmp_path)["train"]
    with pytest.raises(InputError, match="--shard: there is 1 process, expected several"):
        run_script(script, *words, "--shard")
    assert not list(tmp_path.iterdir())
