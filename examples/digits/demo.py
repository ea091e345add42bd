"""The whole recipe on scikit-learn's handwritten digits, through the same scripts a lab would use.

`make demo` runs it with a DiT, `make demo-sit` and `make demo-mar` (demo.py --family SiT) with the other families.
Every command is printed as it could be typed in the repository's folder; its output goes to logs in the run folder.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import report  # noqa: E402  (this and the next import the project from ROOT)

from engine.checkpoint import read_facts  # noqa: E402
from families import depth_name, stack_layers  # noqa: E402

FAMILIES = {"DiT": ("DiT-T/4", 20), "SiT": ("SiT-T/4", 20), "MAR": ("MAR-T", 16)}  # teacher, epochs of recovery
SAMPLING_FLAGS = {
    "DiT": {"cfg-scale": 2.0, "sampler": "ddim", "num-sampling-steps": 20},
    "SiT": {"cfg-scale": 2.0, "sampling-method": "heun2", "num-sampling-steps": 11},
    "MAR": {"cfg-scale": 4.0, "temperature": 0.9, "num-iter": 4, "num-sampling-steps": 20, "clip-denoised": True},
}
SCRATCH_FLAGS = {
    "DiT": {"epochs": 114},
    "SiT": {"epochs": 114, "clip-norm": 1.0},
    "MAR": {"epochs": 110, "clip-norm": 1.0, "warmup-epochs": 5, "weight-decay": 0, "betas": "0.9 0.999"},
}
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--family", choices=FAMILIES, default="DiT", help="whose network (default: DiT)")
parser.add_argument("--depth", type=int, help="layers of the teacher (default: those of its name)")
ARGUMENTS = parser.parse_args()
FAMILY = ARGUMENTS.family


def choose_stacks(model, depth):
    """Layers in every stack of the teacher, of which one of every two will stay."""
    stacks = stack_layers(model)
    depth, multiple = sum(stacks) if depth is None else depth, 2 * len(stacks)
    if depth < multiple or depth % multiple:
        parser.error(f"--depth {depth}: expected a multiple of {multiple}, as every stack is cut by half")
    return [depth // len(stacks)] * len(stacks)


TEACHER, RECOVERY_EPOCHS = FAMILIES[FAMILY]
STACKS = choose_stacks(TEACHER, ARGUMENTS.depth)
TEACHER, STUDENT = (depth_name(TEACHER, [layers // part for layers in STACKS]) for part in (1, 2))
SAMPLING, SCRATCH = SAMPLING_FLAGS[FAMILY], SCRATCH_FLAGS[FAMILY]
RUN = Path("examples/digits") / {"DiT": "run"}.get(FAMILY, f"run-{FAMILY.lower()}")  # below ROOT, where commands run
DEPTH, KEPT = (sum(stack_layers(model)) for model in (TEACHER, STUDENT))
METHODS = ("learned", "block-influence", "bk-sdm", "random")
DATA = {"data-path": RUN / "features", "results-dir": RUN / "outputs", "num-workers": 0, "mirror": 0}
STEPS_PER_EPOCH = 1797 // 128
TRAIN = {**DATA, "global-batch-size": 128, "ckpt-every": 100000, "log-every": 25}
RECOVER = {**TRAIN, "epochs": RECOVERY_EPOCHS, "lr": 1e-3, "min-lr": 1e-5, "ema-decay": 0.98}
LEARN = {**DATA, "global-batch-size": 64, "log-every": 4, "epochs": 4, "gate-lr": 5e-3, "ema-decay": 0.9}
IMAGES = 500
GUIDANCE = {"guided": {}, "unguided": {"cfg-scale": 1.0}}


def write_images(folder):
    """The 1,797 digits as 8x8 PNG files, one folder per class."""
    digits = load_digits()
    for i, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = folder / str(label) / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels / 16 * 255).round().astype(np.uint8)).save(path)


def command(script, *switches, processes=1, **flags):
    """Words of a command line: `python script` or `torchrun`, then flags from keywords, then switches."""
    words = ["python"] if processes == 1 else ["torchrun", "--nnodes=1", f"--nproc_per_node={processes}"]
    words.append(script)
    for name, value in flags.items():
        values = [] if value is True else value.split(" ") if name == "betas" else [str(value)]
        words += ["--" + name.replace("_", "-"), *values]
    return words + list(switches)


def checkpoint(prefix, model, epochs):
    folder = RUN / "outputs" / f"{prefix}-{model.replace('/', '-')}" / "checkpoints"
    return folder / f"{epochs * STEPS_PER_EPOCH:07d}.pt"


def student(method):
    """The model that a method has left; scores and random layers may cut the stacks of MAR unevenly."""
    return read_facts(RUN / f"{method}.pt").get("model", STUDENT)


def weights():
    """Name of every model in the report -> its file of weights."""
    files = {"teacher": checkpoint("teacher", TEACHER, SCRATCH["epochs"])}
    for method in METHODS:
        files[method] = RUN / f"{method}.pt"
        files[f"{method} + fine-tuning"] = checkpoint(f"{method}-ft", student(method), RECOVERY_EPOCHS)
    files["learned + Masked KD"] = checkpoint("learned-kd", student("learned"), RECOVERY_EPOCHS)
    return files


def stages():
    """The stages in order; each is a dict name -> command, and its commands do not depend on each other."""
    files = weights()
    teacher = files["teacher"]
    images = {"data-path": RUN / "images", "features-path": RUN / "features", "image-size": 8, "vae": "none"}
    rate = {"lr": 2e-3, "min-lr": 2e-5, "ema-decay": 0.99}
    yield {"encode": command("extract_features.py", processes=2, model=TEACHER, **images)}
    yield {"teacher": command("train.py", processes=2, model=TEACHER, prefix="teacher", **rate, **TRAIN, **SCRATCH)}

    prune = {"model": TEACHER, "ckpt": teacher}
    learn = {"model": TEACHER, "pattern": "1:2", "load-weight": teacher, "save-model": files["learned"], **LEARN}
    score = {"data-path": RUN / "features", "n-pruned": DEPTH - KEPT, "nsamples": 1024, "batch-size": 128, "mirror": 0}
    kept = sorted(np.random.default_rng(0).choice(DEPTH, KEPT, replace=False).tolist())
    yield {
        "learn": command("prune_by_learning.py", "--delta-w", "--lora", **learn),
        "block influence": command("prune_by_score.py", **prune, **score, save_model=files["block-influence"]),
        "bk-sdm": command("prune_by_index.py", **prune, scheme="bk-sdm", save_model=files["bk-sdm"]),
        "random": command("prune_by_index.py", **prune, kept_indices=kept, save_model=files["random"]),
    }
    starts = {method: {"model": student(method), "load-weight": files[method], **RECOVER} for method in METHODS}
    distil = {"prefix": "learned-kd", "teacher": TEACHER, "load-teacher": teacher, **starts["learned"]}
    yield {"Masked KD": command("train_masked_kd.py", **distil)} | {
        f"fine-tune {method}": command("train.py", prefix=f"{method}-ft", **start) for method, start in starts.items()
    }
    samples = {"num-fid-samples": IMAGES, "per-proc-batch-size": 250, **SAMPLING}
    yield {
        f"sample {name} {kind}": command(
            "sample_ddp.py", ckpt=file, sample_dir=sample_folder(name, kind), **{**samples, **changed}
        )
        for name, file in weights().items()
        for kind, changed in GUIDANCE.items()
    }


def sample_folder(name, kind):
    return RUN / "samples" / kind / name.replace(" ", "")


def run_command(name, words):
    """Run one command from ROOT with this Python, one thread per process; its output goes to a log."""
    launcher = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}[words[0]]
    log = RUN / "logs" / f"{name.replace(' ', '_')}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(log, "w") as output:
        streams = {"stdout": output, "stderr": subprocess.STDOUT}
        done = subprocess.run([*launcher, *words[1:]], **streams, env=environment, check=False)
    lines = [line for line in log.read_text().replace("\r", "\n").splitlines() if line.strip()]
    seconds, last = time.monotonic() - start, lines[-1] if lines else ""
    print(f"\n== {name} ({seconds:.0f} s)\n$ {shlex.join(words)}\n{last}", flush=True)
    if done.returncode:
        raise SystemExit("\n".join(lines[-40:]) + f"\n{name} failed; its whole output is in {log}")


def main():
    start = time.monotonic()
    os.chdir(ROOT)
    shutil.rmtree(RUN, ignore_errors=True)
    write_images(RUN / "images")
    for stage in stages():
        print(f"\n... {', '.join(stage)}", flush=True)
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            for finished in [pool.submit(run_command, name, words) for name, words in stage.items()]:
                finished.result()
    folders = {kind: {name: sample_folder(name, kind) for name in weights()} for kind in GUIDANCE}
    report.write(RUN, weights(), folders, SAMPLING, FAMILY, time.monotonic() - start)


if __name__ == "__main__":
    main()
