"""Runs that are told to stop: the step ends, its state is saved, the status says which signal it was."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from disturbed import without_times

from engine.cli import run_script as run_as_launched
from engine.trainer import Trainer
from engine.weight_files import read_file

TRAIN = ["--epochs", "2", "--global-batch-size", "16", "--num-workers", "0", "--log-every", "2", "--ckpt-every", "100"]


def training_words(teacher, latents, results):
    return ["--load-weight", teacher.student, "--data-path", latents, "--results-dir", results, *TRAIN]


def run_with_signals(words, numbers, at_step):
    """Status of train.py in a process that gets these signals while it computes a step, counted from 1."""
    import train

    child = os.fork()
    if child == 0:
        compute = Trainer.train_step

        def train_step(self, x, y):
            if self.steps + 1 == at_step:
                for number in numbers:
                    os.kill(os.getpid(), number)
            return compute(self, x, y)

        Trainer.train_step = train_step
        os._exit(run_as_launched(train.main, lambda: train.parse_args([str(word) for word in words])))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture(scope="module")
def whole(teacher, latents, tmp_path_factory, run_script):
    """The last state of a run that nothing has stopped, and the rows of its metrics."""
    folder = tmp_path_factory.mktemp("whole")
    run_script("train", *training_words(teacher, latents, folder))
    return last_state(folder), read_rows(folder)


def last_state(folder):
    (path,) = folder.glob("*/checkpoints/0000008.pt")
    return read_file(path, "--resume")


def read_rows(folder):
    (path,) = folder.glob("*/metrics.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return without_times(rows)


def states(folder):
    return sorted(path.name for path in folder.glob("*/checkpoints/*.pt"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signal(teacher, latents, tmp_path, run_script, whole, same_weights, capfd, number):
    """No step is lost, and none is repeated: the state is that of the step that was running."""
    words = training_words(teacher, latents, tmp_path)
    assert run_with_signals(words, [number], at_step=3) == 128 + number
    assert (
        f"stopped by {number.name} after step 3, which is saved; the same command continues" in capfd.readouterr().err
    )
    assert states(tmp_path) == ["0000003.pt"]
    run_script("train", *words)
    for entry in ("model", "ema"):
        same_weights(last_state(tmp_path)[entry], whole[0][entry])
    assert read_rows(tmp_path) == whole[1]


def test_second_interrupt(teacher, latents, tmp_path):
    """It ends the run at once."""
    assert run_with_signals(training_words(teacher, latents, tmp_path), [signal.SIGINT] * 2, at_step=3) == 130
    assert states(tmp_path) == []


def test_signal_in_the_last_step(teacher, latents, tmp_path):
    """The run is done: it ends as if nothing had been said."""
    assert run_with_signals(training_words(teacher, latents, tmp_path), [signal.SIGTERM], at_step=8) == 0


def start_launcher(root, words, *options):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *options]
    return subprocess.Popen(
        [*launcher, str(root / "train.py"), *map(str, words)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_step(folder, step, seconds=60):
    """Wait until the log has a row of this step."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for log in folder.glob("*/log.txt"):
            if re.search(rf"step {step}/", log.read_text()):
                return
        time.sleep(0.02)
    raise AssertionError("the step did not come")


def test_launcher_is_told_to_stop(teacher, latents, tmp_path, root):
    """It passes the signal on; all processes stop after the same step, whose state is there."""
    words = [*training_words(teacher, latents, tmp_path), "--epochs", "5000"]
    launched = start_launcher(root, words)
    wait_for_step(tmp_path, 4)
    launched.send_signal(signal.SIGTERM)
    shown, _ = launched.communicate(timeout=60)
    stopped = re.findall(r"train.py: error: stopped by SIGTERM after step (\d+)", shown)
    assert len(stopped) == 1
    assert states(tmp_path)[-1] == f"{int(stopped[0]):07d}.pt"
    assert launched.returncode != 0


def test_launcher_restarts(teacher, latents, tmp_path, root):
    """A process that dies is started again with the others, and the run continues by itself."""
    words = [*training_words(teacher, latents, tmp_path), "--ckpt-every", "3", "--epochs", "40"]
    launched = start_launcher(root, words, "--max-restarts=1")
    wait_for_step(tmp_path, 4)
    listed = subprocess.run(["pgrep", "-P", str(launched.pid)], capture_output=True, text=True, check=True)
    os.kill(int(listed.stdout.split()[-1]), signal.SIGKILL)
    shown, _ = launched.communicate(timeout=120)
    assert launched.returncode == 0, shown[-3000:]
    assert states(tmp_path)[-1] == "0000160.pt"
    assert "resumed from" in shown
