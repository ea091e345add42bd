"""The harness of the benchmarks: sides timed in turns in one process, memory of each in a process of its own.

A module is functions that build sides, of which nothing is measured but the call that they return, a list of cases, and
a last line, for instance benchmarks/masked_kd.py; `python -m benchmarks.NAME [--repeats 5] [--json FILE] [--device D]`.

The first side is the baseline. The numbers of a side, which bars and JSON name:
    seconds               median per call
    speedup               median of baseline seconds / own seconds of the same round, with its least and most
    rate                  items per second; tflops: 1e12 FLOPs per second
    efficiency            FLOPs per second over those of a large matrix product of `dtype`, timed in the same rounds
    peak_mb, extra_mb     the most memory, and that above the bare process and what `kept` names (without `kept`, above
                          what was there once the side was built); extra_ratio: extra_mb over the baseline's
What `compare` makes of {side: what its last call returned} belongs to the case: a bar on it names no side,
("difference", None, "<=", 1e-2).
"""

import argparse
import contextlib
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch

from benchmarks.report import judge, show, write_json

LEAST_SECONDS = 0.2  # of one timing; shorter calls are repeated
MATMUL = (4096, 1152, 4608)  # tokens, width and hidden width: the first product of DiT-XL's MLP for 16 images


@dataclass(frozen=True)
class Setup:
    """What builders go by: the device, whether sizes are the smallest, rounds, and whether memory is measured."""

    device: torch.device
    tiny: bool = False
    repeats: int = 5
    for_memory: bool = False


@dataclass
class Side:
    """One way to do it: `run()` is a call; of it, how many `items` it makes and how many `flops` the model takes.

    kept: () -> tensors that stay between calls (weights, optimizer state), whose memory is not counted as extra.
    """

    run: Callable
    items: float | None = None
    flops: float | None = None
    dtype: torch.dtype = torch.float32
    kept: Callable | None = None


@dataclass
class Case:
    """sides: name -> builder(setup) -> Side, the baseline first. bars: (number, side or None, ">=" or "<=", value).

    most_rounds: of a case whose calls take minutes.
    """

    name: str
    sides: dict
    bars: list = field(default_factory=list)
    compare: Callable | None = None
    memory: bool = True
    most_rounds: float = math.inf


def memory(field):
    """VmRSS (now) or VmHWM (the most so far) of this process in MB of 2**20 bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


def parse_args(doc):
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="rounds in which every side is timed (default: 5)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the numbers to this file as well")
    parser.add_argument("--device", default="auto", help="auto (GPU if there is one), cpu or another of torch's")
    parser.add_argument("--threads", type=int, help="threads of a processor (default: torch's)")
    parser.add_argument("--case", help="one case")
    parser.add_argument("--side", help="print the memory of this side of --case, as JSON, and end")
    parser.add_argument("--tiny", action="store_true", help="smallest sizes, to see that everything runs")
    return parser.parse_args()


def find_device(name):
    if name != "auto":
        return torch.device(name)
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def clock(function, device, calls=1):
    """Seconds per call: by events of the device, or by the wall."""
    if device.type == "cpu":
        since = time.perf_counter()
        for _ in range(calls):
            function()
        return (time.perf_counter() - since) / calls
    module = torch.get_device_module(device)
    start, end = (module.Event(enable_timing=True) for _ in range(2))
    module.synchronize(device)
    start.record()
    for _ in range(calls):
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def time_sides(functions, device, repeats, least_seconds=LEAST_SECONDS):
    """Seconds per call of each function, {name: one per round}: A B A B, after a warm-up of each."""
    seconds, calls = {name: [] for name in functions}, {}
    for name, function in functions.items():
        function()
        calls[name] = max(1, math.ceil(least_seconds / clock(function, device)))
    for _ in range(repeats):
        for name, function in functions.items():
            seconds[name].append(clock(function, device, calls[name]))
    return seconds


def make_matmul(dtype, device, shape=MATMUL):
    """A product of (rows, inner) and (inner, columns), and its FLOPs."""
    rows, inner, columns = shape
    a, b = torch.randn(rows, inner, device=device).to(dtype), torch.randn(inner, columns, device=device).to(dtype)
    return (lambda: a @ b), 2 * math.prod(shape)


def compare_times(sides, setup, repeats, shape=MATMUL):
    """{side: its numbers} but memory, and {side: what its last call returned}; shape: of the product for efficiency."""
    dtypes = {side.dtype for side in sides.values() if side.flops}
    products = {dtype: make_matmul(dtype, setup.device, (64, 64, 64) if setup.tiny else shape) for dtype in dtypes}
    results = {}
    functions = {name: lambda name=name: results.update({name: sides[name].run()}) for name in sides}
    functions |= {dtype: function for dtype, (function, _) in products.items()}
    seconds = time_sides(functions, setup.device, repeats, 0 if setup.tiny else LEAST_SECONDS)
    baseline, rows = seconds[next(iter(sides))], {}
    for name, side in sides.items():
        ratios = [theirs / own for theirs, own in zip(baseline, seconds[name], strict=True)]
        row = rows[name] = {"seconds": median(seconds[name]), "speedup": median(ratios)}
        row |= {"least": min(ratios), "most": max(ratios), "rounds": seconds[name]}
        if side.items:
            row["rate"] = side.items / row["seconds"]
        if side.flops:
            rounds, product = zip(seconds[name], seconds[side.dtype], strict=True), products[side.dtype][1]
            row["efficiency"] = median(side.flops / own * theirs / product for own, theirs in rounds)
            row |= {"tflops": side.flops / row["seconds"] / 1e12, "flops": side.flops}
            row["matmul_tflops"] = product / median(seconds[side.dtype]) / 1e12
    return rows, {name: results[name] for name in sides}


def measure_case(case, setup):
    """{side: its numbers} but memory, and what `compare` found."""
    sides = {name: build(setup) for name, build in case.sides.items()}
    rows, results = compare_times(sides, setup, min(setup.repeats, case.most_rounds))
    return rows, case.compare(results) if case.compare else {}


def measure_memory(build, setup):
    """peak_mb and extra_mb of two calls, in this process, which has done nothing else; MB are 2**20 bytes."""
    on_cpu, module = setup.device.type == "cpu", torch.get_device_module(setup.device)
    now = (lambda: memory("VmRSS")) if on_cpu else (lambda: module.memory_allocated(setup.device) / 2**20)
    start = now()
    side = build(setup)
    built = now()
    if on_cpu:
        with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # building may have needed more than it left
    else:
        module.reset_peak_memory_stats(setup.device)
    for _ in range(2):
        side.run()
    peak = memory("VmHWM") if on_cpu else module.max_memory_allocated(setup.device) / 2**20
    kept = side.kept and sum(tensor.nbytes for tensor in side.kept()) / 2**20
    return {"peak_mb": peak, "extra_mb": peak - built if kept is None else peak - start - kept}


def start_side(module, words):
    """Measure the memory of one side in a new process."""
    done = subprocess.run([sys.executable, "-m", module, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{module} {' '.join(words)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main(module, doc, cases):
    """Run the cases of a module (its `__spec__.name` and `__doc__`)."""
    args = parse_args(doc)
    setup = Setup(find_device(args.device), args.tiny, args.repeats, for_memory=bool(args.side))
    if args.threads:
        torch.set_num_threads(args.threads)
    cases = [case for case in cases if args.case in (None, case.name)]
    if not cases:
        raise SystemExit(f"no case is called {args.case!r}")
    if args.side:
        print(json.dumps(measure_memory(cases[0].sides[args.side], setup)))
        return
    done = []
    for case in cases:
        rows, found = measure_case(case, setup)
        measured = case.memory and not (args.tiny and done)  # one case shows that it works
        for name in case.sides if measured else ():
            rows[name] |= start_side(module, [*sys.argv[1:], "--case", case.name, "--side", name])
            least = rows[next(iter(rows))]["extra_mb"]
            rows[name] |= {"extra_ratio": rows[name]["extra_mb"] / least} if least > 0 else {}
        bars = [] if args.tiny else list(judge(case.bars, rows, found))
        done.append({"case": case.name, "sides": rows, "found": found, "bars": bars})
        show(done[-1])
        if args.json:  # after every case, so that a long run that is stopped leaves what it measured
            write_json(args.json, setup.device, done)
