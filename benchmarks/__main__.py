"""`python -m benchmarks`: all benchmarks one after another, each in a process of its own, into benchmarks/results."""

import importlib.util
import subprocess
import sys
from pathlib import Path

NAMES = ["latents", "extraction", "gate_learning", "masked_kd", "training", "sampling", "evaluator"]
RESULTS = Path(__file__).parent / "results"


def main():
    """Flags are passed on to every module but the evaluator's, which has its own."""
    RESULTS.mkdir(exist_ok=True)
    failed = []
    for name in NAMES:
        module = f"benchmarks.{name}"
        if importlib.util.find_spec(module) is None:
            continue
        flags = [] if name == "evaluator" else sys.argv[1:]
        print(f"== {module}", flush=True)
        command = [sys.executable, "-m", module, *flags, "--json", str(RESULTS / f"{name}.json")]
        if subprocess.run(command, check=False).returncode:
            failed.append(name)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
