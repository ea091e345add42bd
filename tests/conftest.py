"""What tests share: their device, one thread, small networks, and a tiny data set with a trained teacher.

TEST_DEVICE=cuda runs those that the command for a GPU lists (benchmarks/gpu) on it.
"""

import importlib
import logging
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from machine import DEVICE
from PIL import Image

from engine.checkpoint import save_weights
from engine.weight_files import read_weights
from families import create_model

ROOT = Path(__file__).resolve().parent.parent
IMAGES, SIZE, CLASSES = 64, 8, 10
MODELS = {  # family -> a small network, the same with gates, half of it, one of another width
    "DiT": ("DiT-T/2", "DiT-T-1-2", "DiT-T-D6/2", "DiT-S/2"),
    "SiT": ("SiT-T/2", "SiT-T-1-2", "SiT-T-D6/2", "SiT-S/2"),
    "MAR": ("MAR-T", "MAR-T-1-2", "MAR-T-D6", "MAR-B"),
}
FEW_STEPS = {
    "DiT": ["--num-sampling-steps", "3"],
    "SiT": ["--num-sampling-steps", "4", "--sampling-method", "euler"],
    "MAR": ["--num-sampling-steps", "3", "--num-iter", "4", "--clip-denoised"],
}


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Networks this small are slower with more threads, and bytes are compared with processes of one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def test_device(request):
    """Tensors are made on TEST_DEVICE, and products are exact; scripts and `own_device` tests choose for themselves."""
    if DEVICE.type == "cpu" or "e2e" in request.path.parts or request.node.get_closest_marker("own_device"):
        yield
        return
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    from_numpy = torch.from_numpy
    with pytest.MonkeyPatch.context() as patch, DEVICE:
        patch.setattr(torch, "from_numpy", lambda array: from_numpy(array).to(DEVICE))  # tables of noise schedules
        yield


@pytest.fixture(scope="session")
def root():
    """The project's folder."""
    return ROOT


@pytest.fixture
def small_net():
    """Builds a network of width 16 for 3 x 4 x 4 latents and 5 classes, with random weights in every parameter."""

    def build(depth=6, groups=None, seed=0, **overrides):
        config = {"input_size": 4, "in_channels": 3, "num_classes": 5, "hidden_size": 16, "num_heads": 2}
        net = create_model("DiT-T/2", **{**config, "depth": depth, "groups": groups, **overrides})
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, p in net.named_parameters():
                if name != "pos_embed" and not name.startswith("gumbel_gates"):
                    p.copy_(torch.randn(p.shape, generator=generator, device="cpu") * 0.2)
        return net.eval()

    return build


@pytest.fixture
def batch():
    """Latents, steps and labels for `small_net`."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 3, 4, 4, generator=generator, device="cpu").to(DEVICE)
    return x, torch.tensor([0, 5, 500, 999]), torch.tensor([0, 1, 2, 4])


@pytest.fixture(scope="session")
def run_script():
    """Runs a script in this process: run_script("train", "--epochs", 1, ...) returns its parsed flags."""

    def run(name, *argv):
        script = importlib.import_module(name)
        args = script.parse_args([str(word) for word in argv])
        try:
            script.main(args)
        finally:
            close_logs()
        return args

    return run


def close_logs():
    """Close the log files of runs in this process; a process of its own does so by ending."""
    for logger in list(logging.Logger.manager.loggerDict.values()):
        for handler in list(getattr(logger, "handlers", [])):
            if isinstance(handler, logging.FileHandler):
                for each in list(logger.handlers):
                    logger.removeHandler(each)
                    each.close()
                break


@pytest.fixture(scope="session")
def launch():
    """Runs a script in processes of its own: launch(2, "train", ...) under the launcher, launch(0, ...) without."""

    def run(processes, name, *argv):
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nnodes=1", f"--nproc_per_node={processes}"]
        command = [sys.executable, *(launcher if processes else []), str(ROOT / f"{name}.py"), *map(str, argv)]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)

    return run


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """64 handwritten digits as 8 x 8 PNG files, one subfolder per class."""
    from sklearn.datasets import load_digits

    folder, digits = tmp_path_factory.mktemp("pictures"), load_digits()
    for i, (image, label) in enumerate(zip(digits.images[:IMAGES], digits.target[:IMAGES], strict=True)):
        target = folder / str(label) / f"{i:03d}.png"
        target.parent.mkdir(exist_ok=True)
        Image.fromarray((image / 16 * 255).astype(np.uint8)).convert("RGB").save(target)
    return folder


@pytest.fixture(scope="session")
def latents(pictures, tmp_path_factory, run_script):
    """The digits as latents of three channels, without an autoencoder."""
    folder = tmp_path_factory.mktemp("latents") / "features"
    run_script(
        "extract_features", *f"--vae none --image-size {SIZE} --data-path".split(), pictures, "--features-path", folder
    )
    return folder


@pytest.fixture(scope="session")
def make_family(latents, tmp_path_factory, run_script):
    """Names and files of a family: a teacher that saw a few steps and its half, made at the first call."""

    @cache
    def make(name):
        model, gated, half, other = MODELS[name]
        results = tmp_path_factory.mktemp(name)
        flags = "--epochs 2 --global-batch-size 16 --num-workers 0 --log-every 3 --ckpt-every 4 --lr 3e-3 --min-lr 1e-4"
        words = ["--model", model, *flags.split(), "--data-path", latents, "--results-dir", results]
        run_script("train", *words, "--ema-decay", 0.5)
        folder = results / model.replace("/", "-")
        checkpoint = folder / "checkpoints" / "0000008.pt"
        weights, student = results / "teacher.pt", results / "student.pt"
        state = {key: value.clone() for key, value in read_weights(checkpoint, "--ckpt").items()}
        save_weights(weights, state, model=model, num_classes=CLASSES, vae="none")
        run_script("prune_by_index", "--ckpt", weights, "--scheme", "bk-sdm", "--save-model", student)

        def translate(text):
            """The text with this family's names instead of DiT's, also as parts of paths."""
            for ours, theirs in zip(MODELS["DiT"], MODELS[name], strict=True):
                text = text.replace(ours, theirs).replace(ours.replace("/", "-"), theirs.replace("/", "-"))
            return text

        names = {"name": name, "model": model, "gated": gated, "half": half, "other": other}
        files = {"folder": folder, "checkpoint": checkpoint, "weights": weights, "state": state, "student": student}
        return SimpleNamespace(**names, **files, few_steps=FEW_STEPS[name], translate=translate)

    return make


@pytest.fixture(scope="session", params=list(MODELS))
def family(request, make_family):
    """Every family in turn."""
    return make_family(request.param)


@pytest.fixture(scope="session")
def teacher(make_family):
    """A DiT-T/2 that saw a few steps: its run folder, checkpoint and averaged weights as a file of their own."""
    return make_family("DiT")


@pytest.fixture(scope="session")
def student(teacher):
    """The teacher cut to six layers: a file of weights."""
    return teacher.student


@pytest.fixture
def latents_copy(latents, tmp_path):
    """A copy of the latents that a test may damage."""
    return Path(shutil.copytree(latents, tmp_path / "latents_copy"))


@pytest.fixture
def same_weights():
    """Asserts that two state dicts hold the same keys and the same bits."""

    def check(found, expected):
        assert found.keys() == expected.keys()
        different = [key for key in found if not torch.equal(found[key], expected[key])]
        assert not different

    return check
