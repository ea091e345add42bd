"""Good inputs, made once and as small as they can be: of these the cases copy what they name, and damage the copy."""

import contextlib
import importlib
import importlib.util
import logging
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent.parent
IMAGES, SIZE, CLASSES = 32, 8, 10
MODELS = {"DiT": ("DiT-T-D4/2", "DiT-T-D2/2"), "SiT": ("SiT-T-D4/2", "SiT-T-D2/2"), "MAR": ("MAR-T-D4", "MAR-T-D2")}
FEW = {
    "DiT": "--num-sampling-steps 3",
    "SiT": "--num-sampling-steps 3 --sampling-method euler",
    "MAR": "--num-sampling-steps 3 --num-iter 2 --clip-denoised",
}
RUN = "--global-batch-size 16 --num-workers 0 --epochs 1 --log-every 1"
# A good command line of every script, from which wrong ones are made. Words in braces depend on the family.
BASES = {
    "train": f"--model {{student}} --load-weight in/{{f}}/student.pt --data-path in/latents {RUN} --results-dir out",
    "train_masked_kd": f"--load-weight in/{{f}}/student.pt --teacher {{teacher}} --load-teacher in/{{f}}/teacher.pt "
    f"--data-path in/latents {RUN} --results-dir out",
    "prune_by_learning": f"--model {{teacher}} --pattern 1:2 --load-weight in/{{f}}/teacher.pt --data-path in/latents "
    f"{RUN} --results-dir out --save-model out/p.pt",
    "prune_by_score": "--ckpt in/{f}/teacher.pt --data-path in/latents --n-pruned 1 --nsamples 16 --batch-size 8 "
    "--save-model out/p.pt",
    "prune_by_index": "--ckpt in/{f}/teacher.pt --kept-indices 0,3 --save-model out/p.pt",
    "extract_features": "--data-path in/pictures --vae none --image-size 8 --features-path out/f --num-workers 0",
    "sample": "--ckpt in/{f}/student.pt --output out/g.png {few}",
    "sample_ddp": "--ckpt in/{f}/student.pt --sample-dir out --num-fid-samples 2 {few}",
    "evaluator": "in/ref.npz in/sample.npz --inception in/tiny.pb --offline --metrics fid --device cpu --batch-size 4",
}
RESUME = (
    "--model {student} --load-weight in/{f}/student.pt --data-path in/latents --global-batch-size 16 --num-workers 0 "
    "--epochs 3 --log-every 1 --ckpt-every 2 --results-dir in/{f}/run"
)


def words_of(text, family="DiT"):
    """The words of a command line, with the names of a family."""
    teacher, student = MODELS[family]
    return text.format(f=family, teacher=teacher, student=student, few=FEW[family]).split()


def run_folder(family):
    """Path of the run folder that RESUME continues."""
    return f"in/{family}/run/{MODELS[family][1].replace('/', '-')}"


def call(script, words):
    """Run a script in this process."""
    module = importlib.import_module(script)
    module.main(module.parse_args(list(words)))


def make_good(folder):
    """Write all good inputs to `folder`/in; afterwards that is the working folder of this process."""
    (folder / "in").mkdir(parents=True)
    os.chdir(folder)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        make_pictures()
        call(
            "extract_features",
            ["--data-path", "in/pictures", "--vae", "none", "--image-size", "8", "--features-path", "in/latents"],
        )
        make_published()
        for family in MODELS:
            make_family(family)
        make_autoencoder()
        make_evaluator()
        call("sample_ddp", words_of("--ckpt in/{f}/student.pt --sample-dir in/samples --num-fid-samples 3 {few}"))
    logging.shutdown()


def make_pictures():
    """Handwritten digits of 8 x 8 pixels, one folder per class."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    for i, (image, label) in enumerate(zip(digits.images[:IMAGES], digits.target[:IMAGES], strict=True)):
        target = Path(f"in/pictures/{label}/{i:03d}.png")
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image / 16 * 255).astype(np.uint8)).convert("RGB").save(target)


def make_published():
    """The same latents as one file per image, in the layout of the published code."""
    features, labels = np.load("in/latents/features.npy"), np.load("in/latents/labels.npy")
    for kind in ("features", "labels"):
        Path(f"in/published/i_{kind}").mkdir(parents=True)
    for i, (pair, label) in enumerate(zip(features, labels, strict=True)):
        np.save(f"in/published/i_features/{i}.npy", pair)
        np.save(f"in/published/i_labels/{i}.npy", np.array([label]))


def make_family(family):
    """A teacher, its half, a .safetensors of both, and a run folder of the half with two states."""
    from engine.checkpoint import save_weights
    from engine.weight_files import read_weights

    teacher, _ = MODELS[family]
    common = f"--data-path in/latents --global-batch-size 16 --num-workers 0 --results-dir made/{family}"
    call(
        "train",
        [
            *common.split(),
            "--model",
            teacher,
            *["--epochs", "2", "--ema-decay", "0.5", "--lr", "3e-3", "--min-lr", "1e-4"],
        ],
    )
    state = next(Path(f"made/{family}").glob("*/checkpoints/*.pt"))
    weights = {key: value.clone() for key, value in read_weights(state, "--ckpt").items()}
    Path(f"in/{family}").mkdir()
    for suffix in ("pt", "safetensors"):
        path = f"in/{family}/teacher.{suffix}"
        save_weights(path, weights, model=teacher, num_classes=CLASSES, vae="none")
        kept = ["--kept-indices", "0,3", "--save-model", f"in/{family}/student.{suffix}"]
        call("prune_by_index", ["--ckpt", path, *kept])
    resume = words_of(RESUME, family)
    call("train", resume)
    for file in Path(run_folder(family)).glob("checkpoints/0000006.pt*"):
        file.unlink()


def make_autoencoder():
    """An AutoencoderKL of the usual factor 8 with random weights, and latents and a network made with it."""
    from diffusers.models import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=[8] * 4,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        norm_num_groups=4,
        latent_channels=4,
    )
    vae.save_pretrained("in/vae")
    flags = "--data-path in/pictures --vae in/vae --image-size 16 --features-path in/encoded --num-workers 0"
    call("extract_features", flags.split())
    words = "--model DiT-T-D2/2 --data-path in/encoded --global-batch-size 16 --num-workers 0 --epochs 1"
    call("train", [*words.split(), "--results-dir", "made/encoded"])
    state = next(Path("made/encoded").glob("*/checkpoints/*.pt"))
    from engine.checkpoint import save_weights
    from engine.weight_files import read_weights

    weights = {key: value.clone() for key, value in read_weights(state, "--ckpt").items()}
    save_weights("in/encoded.pt", weights, model="DiT-T-D2/2", num_classes=CLASSES, vae="in/vae")


def load_maker():
    """The module that makes small Inception graphs."""
    path = ROOT / "tests" / "golden" / "make_tiny_inception_graph.py"
    spec = importlib.util.spec_from_file_location("make_tiny_inception_graph", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_evaluator():
    """Reference, samples, stored statistics, and Inception weights of both kinds."""
    from evaluation.graph import read_graph
    from evaluation.inception import _from_graph

    maker = load_maker()
    np.savez("in/ref.npz", arr_0=maker.make_images(0, 8, 8, "ref"))
    np.savez("in/sample.npz", arr_0=maker.make_images(1, 8, 8, "ref"))
    np.savez_compressed("in/stats.npz", **statistics())
    Path("in/tiny.pb").write_bytes(maker.tiny_graph(0))
    torch.save(_from_graph(read_graph("in/tiny.pb")), "in/tiny.pth")


def statistics():
    """Means and covariances as a reference stores them."""
    small = {"mu": (2048,), "mu_s": (2023,)}
    found = {name: np.zeros(shape, np.float16) for name, shape in small.items()}
    return found | {"sigma": np.eye(2048, dtype=np.float16), "sigma_s": np.eye(2023, dtype=np.float16)}
