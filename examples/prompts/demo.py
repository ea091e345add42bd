"""Two small text-to-image networks, trained on captioned digits, cut to half their layers, recovered and read.

`make demo-t2i` runs it: a PixArt and an SD3, both of diffusers' own classes, side by side and each through the scripts
a lab would use. Every command is printed as it could be typed in the repository's folder; its output goes to logs in
the run folder. Pictures are drawn by draw.py, in processes that cannot import the project.
"""

import json
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
FOLDER = Path("examples/prompts")  # below ROOT, where commands run
RUN = FOLDER / "run"
sys.path.insert(0, str(ROOT))
import report  # noqa: E402  (it imports the project from ROOT)
from networks import PIPELINES, PROMPTS, SIZE, SPELLINGS  # noqa: E402

DRAWING = {"pictures": 400, "size": SIZE, "steps": 10, "guidance": 2.0}
DATA = {"num-workers": 0, "mirror": 0, "global-batch-size": 64}
TRAIN = {**DATA, "min-lr": 2e-5, "ckpt-every": 100000, "log-every": 25}
TEACH = {**TRAIN, "epochs": 20, "lr": 2e-3, "ema-decay": 0.99}
LEARN = {**DATA, "epochs": 4, "gate-lr": 5e-3, "ema-decay": 0.9, "log-every": 4}
RECOVER = {**TRAIN, "epochs": 16, "lr": 1e-3, "ema-decay": 0.98}
OWN_FLAGS = {"pixart": {}, "sd3": {"time-sampling": "uniform"}}  # of a network, in all training


def write_pictures(folder):
    """The 1,797 digits as PNG files of 8x8 pixels with captions, in the two spellings by turns."""
    folder.mkdir(parents=True)
    digits, rows = load_digits(), []
    for i, (pixels, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        name = f"{i:04d}.png"
        Image.fromarray((pixels * 255 / 16).round().astype(np.uint8)).save(folder / name)
        rows.append({"file_name": name, "text": SPELLINGS[i % 2][digit]})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_command(script, *switches, **flags):
    """Words of a command line, without the Python that runs it."""
    pairs = [("--" + name.replace("_", "-"), str(value)) for name, value in flags.items()]
    return [script, *(word for pair in pairs for word in pair), *switches]


def find_checkpoint(results, prefix):
    """The one file of weights that a training has left."""
    (file,) = (RUN / results).glob(f"outputs/{prefix}-*/checkpoints/*.pt")
    return file


def list_stages(name):
    """Yield (what it does, words of its command) for all stages of a network, one after another."""
    folder, own = RUN / name, OWN_FLAGS[name]
    pipeline, features, pruned = folder / "pipeline", folder / "features", folder / "pruned"
    data = {"data-path": features, "results-dir": folder / "outputs"}
    encode = {"data-path": RUN / "pictures", "features-path": features, "image-size": SIZE, "num-workers": 0}
    yield "make", write_command(str(FOLDER / "networks.py"), name=name, output=pipeline)
    yield "encode", write_command("extract_features.py", model=pipeline, **encode)
    yield "teach", write_command("train.py", model=pipeline, prefix="teacher", **data, **TEACH, **own)

    teacher = find_checkpoint(name, "teacher")
    cut = {"model": pipeline, "load-weight": teacher, "pattern": "1:2", "save-model": pruned}
    yield "learn", write_command("prune_by_learning.py", "--delta-w", "--lora", **cut, **data, **LEARN, **own)
    distil = {"model": pruned, "prefix": "student", "teacher": pipeline, "load-teacher": teacher}
    yield "recover", write_command("train_masked_kd.py", **distil, **data, **RECOVER, **own)

    for who, model, file in (("teacher", pipeline, teacher), ("student", pruned, find_checkpoint(name, "student"))):
        exported = folder / f"{who}-pipeline"
        yield f"export {who}", write_command("export_diffusers.py", model=model, ckpt=file, output=exported)
        places = {"pipeline": exported, "prompts": RUN / "prompts.txt", "output": folder / f"{who}.npy"}
        yield f"draw {who}", write_command(str(FOLDER / "draw.py"), **places, **DRAWING)


def run_stages(name):
    """Run all stages of a network and return {stage: its seconds}."""
    seconds = {}
    for stage, words in list_stages(name):
        seconds[stage] = run_stage(f"{name} {stage}", words)
    return seconds


def run_stage(title, words):
    """Run one command with this Python, on one thread, and return its seconds; its output goes to a log.

    draw.py runs in another folder and isolated, so that it can import nothing of ours.
    """
    alone = words[0].endswith("draw.py")
    typed = ["python", *(["-I"] if alone else []), *words]
    inside = [str(ROOT / word) if alone and word.startswith(str(FOLDER)) else word for word in typed[1:]]
    log, start = RUN / "logs" / f"{title.replace(' ', '_')}.txt", time.monotonic()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with open(log, "w") as output:
        folder = "/" if alone else ROOT
        done = subprocess.run(
            [sys.executable, *inside], stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=folder, check=False
        )
    lines, seconds = log.read_text().replace("\r", "\n").split("\n"), time.monotonic() - start
    told = [line.strip() for line in lines if line.strip() and "next: " not in line]
    print(f"\n== {title} ({seconds:.0f} s)\n$ {shlex.join(typed)}\n{told[-1] if told else ''}", flush=True)
    if done.returncode:
        raise SystemExit("\n".join(told[-40:]) + f"\n{title} failed; its whole output is in {log}")
    return seconds


def main():
    start = time.monotonic()
    os.chdir(ROOT)
    shutil.rmtree(RUN, ignore_errors=True)
    write_pictures(RUN / "pictures")
    (RUN / "logs").mkdir()
    (RUN / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    with ThreadPoolExecutor(max_workers=len(PIPELINES)) as pool:
        seconds = dict(zip(PIPELINES, pool.map(run_stages, PIPELINES), strict=True))
    files = {name: [find_checkpoint(name, who) for who in report.NETWORKS] for name in PIPELINES}
    missed = report.write(RUN, files, DRAWING, seconds, time.monotonic() - start)
    if missed:
        raise SystemExit("\n".join(missed))


if __name__ == "__main__":
    main()
