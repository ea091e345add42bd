"""Two processes that were started differently, as on two hosts: both end soon, with one message and nothing written.

A few cases run always, all of them where the environment variable HOSTS is set.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.checkpoint import save_weights
from engine.weight_files import read_weights

SECONDS = 30  # from the start of the second process until both have ended
TRAIN = ["--epochs", "1", "--global-batch-size", "16", "--num-workers", "0"]
PARTS = ("engine", "families", "pruning", "diffusion", "evaluation")
rarely = pytest.mark.skipif("HOSTS" not in os.environ, reason="slow: set HOSTS to run it")


@dataclass
class Host:
    """What one process is started with: words of a command line, the project's folder, more variables."""

    words: list
    root: Path
    env: dict = field(default_factory=dict)


@pytest.fixture
def hosts(root, tmp_path):
    """Makes two equal hosts of a command line; tests change the second."""

    def make(*words):
        return [Host([str(word) for word in words], root) for _ in range(2)]

    return make


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def start(host, rank, port):
    name, *flags = host.words
    env = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    env |= {"MASTER_PORT": port, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [sys.executable, str(host.root / f"{name}.py"), *flags],
        env={**os.environ, **env, **host.env},
        cwd=host.root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_both(hosts):
    """(statuses, lines that both have shown as errors, seconds since the second was started)."""
    port = free_port()
    processes = [start(host, rank, port) for rank, host in enumerate(hosts)]
    began = time.monotonic()
    try:
        shown = "".join(process.communicate(timeout=4 * SECONDS)[1] for process in processes)
    finally:
        for process in processes:
            process.kill()
    seconds = time.monotonic() - began
    assert "Traceback" not in shown, shown[-3000:]
    return [process.returncode for process in processes], find_errors(shown), seconds


def find_errors(shown):
    return [line for line in shown.splitlines() if ": error: " in line]


def check_refused(hosts, *expected):
    """Both end in time and show one line for all that is expected; a wrong flag also where it was typed."""
    statuses, errors, seconds = run_both(hosts)
    print(f"{seconds:.1f} s, statuses {statuses}: {errors}")
    assert all(statuses), statuses
    own = [line for line in errors if "there is no such flag" in line]
    assert len(errors) == 1 + len(own), errors
    assert len(own) <= 1
    assert all(part in " ".join(errors) for part in expected), errors
    assert seconds < SECONDS, f"{seconds:.0f} s"


def replace(host, flag, value):
    """Give a flag another value, or append it."""
    if flag in host.words:
        host.words[host.words.index(flag) + 1] = str(value)
    else:
        host.words += [flag, str(value)]


def set_second(flag, value):
    """A change of the second host's command line."""
    return lambda second, files: replace(second, flag, value)


def other_latents(second, files):
    """The same number of images under another path, of which one pixel differs."""
    replace(second, "--data-path", shutil.copytree(files.latents, files.other / "latents"))
    path = files.other / "latents/features.npy"
    features = np.load(path)
    features[0] += 0.25
    np.save(path, features)


def fewer_images(second, files):
    """The same latents under another path, without the last image."""
    folder = files.other / "latents"
    replace(second, "--data-path", shutil.copytree(files.latents, folder))
    for name in ("features", "labels", "status"):
        np.save(folder / f"{name}.npy", np.load(folder / f"{name}.npy")[:-1])


def other_weights(second, files):
    """A copy of the weights in which one number differs."""
    flag = "--load-weight" if "--load-weight" in second.words else "--ckpt"
    own = read_weights(second.words[second.words.index(flag) + 1], flag)
    state = {key: value.clone() for key, value in own.items()}
    next(iter(state.values())).flatten()[0].add_(torch.tensor(1e-3))
    path = files.other / "weights.pt"
    save_weights(path, state, model="DiT-T-D6/2", num_classes=10, vae="none")
    replace(second, flag, path)


def other_code(second, files):
    """A copy of the project with one more comment."""
    second.root = files.other / "project"
    for part in PARTS:
        shutil.copytree(files.root / part, second.root / part, ignore=shutil.ignore_patterns("__pycache__"))
    for path in files.root.glob("*.py"):
        shutil.copy(path, second.root)
    with open(second.root / "engine/lock.py", "a") as file:
        file.write("# another version\n")


def wrong_flag(second, files):
    second.words.append("--eposch")


def missing_file(second, files):
    replace(second, "--load-weight", files.other / "nothing.pt")


def other_pictures(second, files):
    """The same pictures under another path, but one."""
    folder = shutil.copytree(files.pictures, files.other / "pictures")
    next(folder.glob("*/*.png")).unlink()
    replace(second, "--data-path", folder)


CASES = {  # name -> (script, change of the second host, words of the message)
    "lr": ("train", set_second("--lr", "3e-4"), ["disagree on lr", "0.0003"]),
    "latents": ("train", other_latents, ["disagree on data_path"]),
    "code": ("train", other_code, ["disagree on code"]),
    "typo": ("train", wrong_flag, ["--eposch: there is no such flag", "process 1 of 2: its command line is wrong"]),
    "device": ("train", set_second("--device", "cuda"), ["process 1 of 2", "--device cuda", "no usable GPU"]),
}
RARE = {
    "model": ("train", set_second("--model", "DiT-S/2"), ["process 1 of 2", "--load-weight"]),
    "weights": ("train", other_weights, ["disagree on load_weight"]),
    "fewer images": ("train", fewer_images, ["disagree on data_path"]),
    "missing file": ("train", missing_file, ["process 1 of 2", "nothing.pt"]),
    "results": ("train", set_second("--results-dir", "elsewhere"), ["disagree on results_dir"]),
    "guidance": ("sample_ddp", set_second("--cfg-scale", "2"), ["disagree on cfg_scale"]),
    "sampled weights": ("sample_ddp", other_weights, ["disagree on ckpt"]),
    "number of samples": ("sample_ddp", set_second("--num-fid-samples", "6"), ["disagree on num_fid_samples"]),
    "pictures": ("extract_features", other_pictures, ["disagree on data_path"]),
    "seed of scores": ("prune_by_score", set_second("--seed", "1"), ["disagree on seed"]),
    "seed of training": ("train_masked_kd", set_second("--global-seed", "1"), ["disagree on global_seed"]),
    "rate of gates": ("prune_by_learning", set_second("--gate-lr", "1"), ["disagree on gate_lr"]),
}


@dataclass
class Files:
    """Where the project and its inputs are, a folder for other inputs, and one for results."""

    root: Path
    latents: Path
    pictures: Path
    other: Path
    results: Path


@pytest.fixture
def files(root, latents, pictures, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "results").mkdir()
    return Files(root, latents, pictures, tmp_path / "other", tmp_path / "results")


def make_words(name, teacher, files):
    """The command line of a script, all of whose results are in one folder."""
    training = ["--data-path", files.latents, "--results-dir", files.results, *TRAIN]
    few = ["--num-sampling-steps", "2"]
    words = {
        "train": ["--load-weight", teacher.student, *training],
        "train_masked_kd": ["--load-weight", teacher.student, "--load-teacher", teacher.weights, *training],
        "prune_by_learning": ["--model", teacher.gated, "--load-weight", teacher.weights, *training],
        "sample_ddp": ["--ckpt", teacher.student, "--sample-dir", files.results, "--num-fid-samples", "4", *few],
        "extract_features": [
            *("--data-path", files.pictures, "--features-path", files.results, "--vae", "none", "--image-size", "8")
        ],
        "prune_by_score": [
            *("--ckpt", teacher.weights, "--data-path", files.latents, "--n-pruned", "6", "--nsamples", "16"),
            *("--save-model", files.results / "pruned.pt"),
        ],
    }[name]
    return [name, *words]


@pytest.mark.parametrize(
    ("script", "change", "expected"),
    [
        *(pytest.param(*case, id=name) for name, case in CASES.items()),
        *(pytest.param(*case, id=name, marks=rarely) for name, case in RARE.items()),
    ],
)
def test_difference(hosts, teacher, files, script, change, expected):
    """The second host differs in one thing."""
    both = hosts(*make_words(script, teacher, files))
    change(both[1], files)
    check_refused(both, *expected)
    assert list(files.results.iterdir()) == []
