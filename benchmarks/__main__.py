"""`python -m benchmarks`: all benchmarks one after another, each in a process of its own, into benchmarks/results.

Last comes the quick form of benchmarks.recoverability, to see that it runs; its numbers mean nothing and are not kept.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

NAMES = ["latents", "extraction", "gate_learning", "masked_kd", "training", "sampling", "plain", "evaluator"]
RESULTS = Path(__file__).parent / "results"


def main():
    """Flags are passed on to every module."""
    failed = []
    for name in NAMES:
        print(f"== benchmarks.{name}", flush=True)
        command = [sys.executable, "-m", f"benchmarks.{name}", *sys.argv[1:], "--json", str(RESULTS / f"{name}.json")]
        if subprocess.run(command, check=False).returncode:
            failed.append(name)
    print("== benchmarks.recoverability --quick", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.recoverability", "--quick", "--data", "digits", "--seeds", "1"]
        if subprocess.run([*command, "--output", folder], check=False).returncode:
            failed.append("recoverability")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
