"""One run in a process of its own: seconds, memory above the data, and the result."""

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np


def memory(field):
    """VmRSS (now) or VmHWM (the most so far) of this process in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


def load(folder):
    return {path.stem: np.load(path) for path in sorted(Path(folder).glob("*.npy"))}


def start(*words):
    """Run this module with `words` in a new process and return what it prints as JSON."""
    done = subprocess.run([sys.executable, "-m", __spec__.name, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def prepare(module, case, folder):
    """Make the data of a case and write one file per array."""
    for name, array in module.make(case).items():
        np.save(Path(folder) / f"{name}.npy", array)
    return {}


def measure(module, function, folder):
    """Seconds, peak MB above what was there before, and the result of one call."""
    arrays = load(folder)
    np.linalg.eigvalsh(np.ones((256, 256)) @ np.ones((256, 256)))  # starts the threads
    before, since = memory("VmRSS"), time.perf_counter()
    result = getattr(module, function)(arrays)
    return {"seconds": time.perf_counter() - since, "peak_mb": memory("VmHWM") - before, "result": result}


if __name__ == "__main__":
    module, action, folder = importlib.import_module(f"benchmarks.evaluator.{sys.argv[1]}"), *sys.argv[2:4]
    print(json.dumps(prepare(module, sys.argv[4], folder) if action == "make" else measure(module, action, folder)))
