"""How the benchmarks measure: sides in turns, memory in processes of their own, efficiency against the machine itself.

A benchmark module has CASES, {name: settings}, and make(device, **settings) -> {side: function without arguments}; the
first side is what the others are compared with. It may have flops(side, **settings), the floating point operations of
one call; BARS, {(case, side): {name of a number: ">= 1.4"}}; MEMORY, settings of `make` with which the memory above
that of weights and gradients is measured, and copies(**settings), MB of copies of weights to subtract.
`main(__name__)` does the rest: a table, and JSON with --json.
"""

import argparse
import importlib
import json
import platform
import subprocess
import sys
import time
from contextlib import nullcontext
from datetime import date
from pathlib import Path
from statistics import median

import torch

from benchmarks.evaluator.runs import memory

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def autocast(device, precision):
    """The context in which the project computes with this precision."""
    return nullcontext() if precision == "fp32" else torch.autocast(torch.device(device).type, DTYPES[precision])


def clock(function, device):
    """Seconds of one call, by events where the device has them."""
    if torch.device(device).type == "cpu":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    start, end = (torch.Event(device, enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def take_turns(sides, repeats, device):
    """Seconds of every side, {side: [repeats]}: A B A B, behind a first round that warms up."""
    seconds = {side: [] for side in sides}
    for k in range(repeats + 1):
        for side, function in sides.items():
            spent = clock(function, device)
            if k:
                seconds[side].append(spent)
    return seconds


def quartiles(values):
    """(first, second, third) of a list, interpolated."""
    return torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75]).double()).tolist()


def matmul(device, precision, tokens=2048, width=1152):
    """A function that multiplies as the widest layer does, and its operations a call."""
    a = torch.randn(tokens, width, device=device, dtype=DTYPES[precision])
    b = torch.randn(width, 4 * width, device=device, dtype=DTYPES[precision])

    def run(times=20):
        for _ in range(times):
            a @ b

    return run, 20 * 2 * tokens * width * 4 * width


def compare(module, case, repeats, device):
    """Rows of one case: seconds, ratio to the first side with its quartiles, efficiency."""
    settings = module.CASES[case]
    sides = module.make(device, **settings)
    count = getattr(module, "flops", None)
    if count:
        run, operations = matmul(device, settings.get("precision", "fp32"))
        sides = {**sides, "matmul": run}
    seconds = take_turns(sides, repeats, device)
    rate = operations / median(seconds.pop("matmul")) if count else None
    first = next(iter(seconds.values()))
    rows = []
    for side, spent in seconds.items():
        low, ratio, high = quartiles([a / b for a, b in zip(first, spent, strict=True)])
        row = {"case": case, "side": side, "seconds": median(spent), "ratio": ratio, "ratio_quartiles": [low, high]}
        if count:
            row["efficiency"] = count(side, **settings) / median(spent) / rate
        rows.append(row)
    return rows


def start_memory(module, case, side, device):
    """Peak MB above what was there before, of one side in a process of its own."""
    words = [sys.executable, "-m", module.__spec__.name, "--device", device, "--memory", case, side]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{case} {side} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure_memory(module, case, side, device):
    """In this process: make the case and take the peak of two calls in MB."""
    sides = module.make(device, **module.CASES[case], **module.MEMORY)
    if torch.device(device).type == "cpu":
        before = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        peak = lambda: memory("VmHWM")  # noqa: E731
    else:
        torch.accelerator.reset_peak_memory_stats()
        before = torch.accelerator.memory_allocated() / 1e6
        peak = lambda: torch.accelerator.max_memory_allocated() / 1e6  # noqa: E731
    for _ in range(2):
        sides[side]()
    return peak() - before - getattr(module, "copies", lambda **settings: 0)(**module.CASES[case])


def judge(module, row):
    """Verdicts on a row, {"ratio >= 1.4": whether it holds}."""
    bars = getattr(module, "BARS", {}).get((row["case"], row["side"]), {})
    verdicts = {}
    for name, bar in bars.items():
        sign, limit = bar.split()
        verdicts[f"{name} {bar}"] = row[name] >= float(limit) if sign == ">=" else row[name] <= float(limit)
    return verdicts


def show(row):
    """One line of the table."""
    low, high = row["ratio_quartiles"]
    parts = [
        f"{row['case']:22} {row['side']:14} {row['seconds']:9.4f} s",
        f"{row['ratio']:6.3f}x ({low:.3f}..{high:.3f})",
    ]
    if "efficiency" in row:
        parts.append(f"efficiency {row['efficiency']:.3f}")
    if "peak_mb" in row:
        parts.append(f"peak {row['peak_mb']:6.0f} MB ({row['memory_ratio']:.3f})")
    parts += [f"[{bar}: {'holds' if holds else 'MISSED'}]" for bar, holds in row["bars"].items()]
    print("  ".join(parts), flush=True)


def machine():
    """What the numbers depend on."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
    return {
        "cpu": names[0] if names else platform.processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "command": " ".join(sys.argv),
        "date": date.today().isoformat(),
    }


def parse_args(doc):
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--repeats", type=int, default=5, help="rounds of all sides (default: 5)")
    parser.add_argument("--case", action="append", help="only this case (can be repeated)")
    parser.add_argument("--device", default="cpu", help="where to run (default: cpu)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers there")
    parser.add_argument("--memory", nargs=2, metavar=("CASE", "SIDE"), help=argparse.SUPPRESS)
    return parser.parse_args()


def main(name):
    """Run the benchmark module `name`."""
    module = importlib.import_module(name) if name != "__main__" else sys.modules[name]
    args, rows = parse_args(module.__doc__), []
    torch.manual_seed(0)
    if args.memory:
        return print(json.dumps(measure_memory(module, *args.memory, args.device)))
    for case in args.case or module.CASES:
        found = compare(module, case, args.repeats, args.device)
        if hasattr(module, "MEMORY"):
            for row in found:
                row["peak_mb"] = start_memory(module, case, row["side"], args.device)
                row["memory_ratio"] = row["peak_mb"] / found[0]["peak_mb"]
        for row in found:
            row["bars"] = judge(module, row)
            show(row)
        rows += found
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({**machine(), "rows": rows}, indent=1) + "\n")
