"""What tests of disturbed runs share: commands, and what a folder has to hold after an undisturbed run."""

import json
import re

import torch

from engine.weight_files import read_file

# Rows of the log do not end with a state: their sums are cut by every kill.
TRAIN = ["--epochs", "2", "--global-batch-size", "16", "--num-workers", "0", "--log-every", "2", "--ckpt-every", "3"]
OWN_TIME = ("images_per_second", "memory_gb")
SCRIPTS = ("train", "prune_by_learning", "train_masked_kd")


def same(a, b):
    """Whether two states hold the same values, tensors to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def training_words(name, teacher, latents, results):
    data = ["--data-path", latents, "--results-dir", results, *TRAIN]
    words = {
        "train": ["--load-weight", teacher.student],
        "prune_by_learning": [
            *("--model", teacher.gated, "--load-weight", teacher.weights, "--delta-w", "--lora"),
            *("--save-model", results / "pruned.pt"),
        ],
        "train_masked_kd": ["--load-weight", teacher.student, "--load-teacher", teacher.weights],
    }[name]
    return [name, *words, *data]


def sampling_words(teacher, folder):
    few = ["--num-fid-samples", "10", "--per-proc-batch-size", "3", "--num-sampling-steps", "2"]
    return ["sample_ddp", "--ckpt", teacher.student, "--sample-dir", folder, *few]


def extraction_words(pictures, folder):
    flags = ["--vae", "none", "--image-size", "8", "--batch-size", "5", "--num-workers", "0"]
    return ["extract_features", "--data-path", pictures, "--features-path", folder, *flags]


def contents(folder):
    """{relative path: what has to be the same} of everything in a folder; tensors as they are, times left out."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".pt":
            found[name] = flatten(read_file(path, "--ckpt"))
        elif path.name == "metrics.jsonl":
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = without_times(rows)
        elif path.name == "config.json":
            found[name] = {key: value for key, value in json.loads(path.read_text()).items() if key != "environment"}
        elif path.name.endswith(".pt.json"):
            found[name] = re.sub('"latency_ms": .*', "", path.read_text())
        elif path.is_file() and path.name != "log.txt":
            found[name] = path.read_bytes()
        else:
            found[name] = ""
    return found


def without_times(rows):
    """Rows of metrics without what is another number in every run: speed and memory."""
    return [{key: value for key, value in row.items() if key not in OWN_TIME} for row in rows]


def flatten(value, name=""):
    """{name: bytes or plain value} of nested dicts and lists."""
    if isinstance(value, torch.Tensor):
        return {name: value.numpy().tobytes()}
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: each for inner, part in items for key, each in flatten(part, f"{name}.{inner}").items()}
    return {name: value}


def check_same(found, expected):
    assert found.keys() == expected.keys()
    assert not [name for name in found if found[name] != expected[name]]
