"""`python -m benchmarks.evaluator`: paired runs against the plain constructions, each in a process of its own."""

import argparse
import importlib
import json
import platform
import tempfile
from pathlib import Path
from statistics import median

from benchmarks.evaluator.runs import start

PARTS = ("frechet", "precision_recall")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=PARTS, help="one part")
    parser.add_argument("--case", help="one case of it")
    parser.add_argument("--repeats", type=int, default=5, help="pairs of runs (default: 5)")
    parser.add_argument("--slow-repeats", type=int, default=1, help="pairs of 10k x 50k (default: 1)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the numbers to this file as well")
    return parser.parse_args()


def compare(part, case, repeats):
    """One row: medians over pairs of runs, baseline first and ours second in turns."""
    module = importlib.import_module(f"benchmarks.evaluator.{part}")
    with tempfile.TemporaryDirectory() as folder:
        start(part, "make", folder, case)
        pairs = [(start(part, "run_baseline", folder), start(part, "run", folder)) for _ in range(repeats)]
        row = {"part": part, "case": case, "pairs": repeats, "bar": module.CASES[case]}
        for side, runs in zip(("baseline", "ours"), zip(*pairs, strict=True), strict=True):
            row[side] = {key: median(run[key] for run in runs) for key in ("seconds", "peak_mb")}
            row[side]["result"] = runs[0]["result"]
        row["ratio"] = median(b["seconds"] / a["seconds"] for a, b in pairs)
        if hasattr(module, "run_float32"):
            row["float32"] = start(part, "run_float32", folder)
    within = row["ours"]["peak_mb"] <= getattr(module, "MEMORY", {}).get(case, float("inf"))
    row["holds"] = within and (row["bar"] is None or row["ratio"] <= row["bar"])
    return row


def show(row):
    """One line of the table."""
    sides = "  ".join(f"{row[side]['seconds']:8.3f} s {row[side]['peak_mb']:6.0f} MB" for side in ("baseline", "ours"))
    bar = "" if row["bar"] is None else f"  bar {row['bar']:.3g}: {'holds' if row['holds'] else 'missed'}"
    print(f"{row['part']:16} {row['case']:20} {sides}  ratio {row['ratio']:.4f} ({1 / row['ratio']:.1f}x){bar}")
    print(f"{'':37} {row['baseline']['result']} and {row['ours']['result']}", flush=True)
    if "float32" in row:
        change = [exact - ours for exact, ours in zip(row["float32"]["result"], row["ours"]["result"], strict=True)]
        print(f"{'':37} in float32 precision {change[0]:+.5f}, recall {change[1]:+.5f}", flush=True)


def main():
    asked, rows = parse_args(), []
    for part in [asked.only] if asked.only else PARTS:
        for case in importlib.import_module(f"benchmarks.evaluator.{part}").CASES:
            if asked.case in (None, case):
                rows.append(compare(part, case, asked.slow_repeats if case == "10k x 50k" else asked.repeats))
                show(rows[-1])
    if not rows:
        raise SystemExit(f"no case is called {asked.case!r}")
    if asked.json:
        versions = {name: importlib.import_module(name).__version__ for name in ("numpy", "scipy", "torch")}
        asked.json.write_text(
            json.dumps({"python": platform.python_version(), **versions, "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
