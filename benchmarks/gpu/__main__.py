"""`python -m benchmarks.gpu`: the tests' claims on a GPU, then real sizes, each against its plain form.

Meant to end in ten minutes on one GPU. Without a GPU it stops, unless --tiny makes everything small enough for a
processor, to see that it runs; --dry lists what would run.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu.cases import CASES
from benchmarks.gpu.report import RESULTS, format_case, write_page
from benchmarks.measure import Setup, compare_times, find_device
from benchmarks.report import describe_machine
from engine.cli import grow_in_segments

ROUNDS = 5
PRODUCT = (8192, 8192, 8192)  # for the share of the matrix product's rate
CLAIMS = {  # what the tests of the processor claim, on the GPU
    "bf16 and fp16 within bounds": ["tests/unit/test_precision.py"],
    "parity with the recorded numbers, float32 without TF32, and float64": [
        "tests/parity",
        "--ignore=tests/parity/test_evaluator_arrays.py",  # of arrays of the processor
    ],
    "sparse = dense": ["tests/unit/test_routing.py"],
    "graphs of MAR's head, sums of features": [
        "tests/unit/test_head_graph.py",
        "tests/unit/test_metrics.py::test_statistics_on_a_gpu",
    ],
    "resumed exactly": ["tests/e2e/test_resume.py"],
    "the digits chain": ["tests/e2e/test_chain.py"],
    "compiled": ["tests/e2e/test_compile.py"],
}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto (GPU if there is one), or another of torch's")
    parser.add_argument("--json", type=Path, help="where results go (default: benchmarks/gpu/results/CARD.json)")
    parser.add_argument("--part", choices=("tests", "sizes"), help="the tests or the real sizes alone")
    parser.add_argument("--only", default="", help="cases with this in their name")
    parser.add_argument("--workers", type=int, default=4, help="tests beside each other (default: 4)")
    parser.add_argument("--tiny", action="store_true", help="smallest sizes, to see that everything runs")
    parser.add_argument("--dry", action="store_true", help="list what would run")
    return parser.parse_args()


def check_claim(claim, device, workers):
    """Run the tests of a claim; returns their exit status and last line."""
    print(f"== {claim}", flush=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", str(workers), *CLAIMS[claim]]
    environment = {**os.environ, "TEST_DEVICE": device.type, "OMP_NUM_THREADS": "1", "NVIDIA_TF32_OVERRIDE": "0"}
    if claim != "compiled":  # the default on a GPU, which takes longer than networks as small as the tests'
        environment["TORCHDYNAMO_DISABLE"] = "1"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines() or [done.stderr[-300:]]
    print("\n".join([*(line for line in lines if line.startswith(("FAILED", "ERROR"))), lines[-1]]), flush=True)
    return {"rc": done.returncode, "summary": lines[-1]}


def measure(case, setup):
    """{side: its numbers} of a case, the sides timed in turns; memory is that of a side alone, in GB."""
    made, rows = {}, {}
    gpu = torch.get_device_module(setup.device) if setup.device.type != "cpu" else None
    for name, build in case.sides.items():
        before = memory(setup)
        since = time.perf_counter()
        made[name] = build(setup)
        made[name].run()  # compiles
        rows[name] = {"first_call": time.perf_counter() - since}
        if gpu:
            gpu.reset_peak_memory_stats()
        made[name].run()
        if gpu:
            rows[name]["gb"] = gpu.max_memory_allocated() / 1e9 - before
    flops = count_flops(next(iter(made.values())))
    for side in made.values():
        side.flops = flops  # of all forms of the work, whatever they do for it
    for name, row in compare_times(made, setup, setup.repeats, PRODUCT)[0].items():
        rows[name] |= row
    profiled = profile_side(made[next(reversed(made))], setup)
    return {"case": case.name, "tflop": flops / 1e12, "sides": rows, "profile": profiled}


def memory(setup):
    """GB of tensors on the GPU."""
    return torch.get_device_module(setup.device).memory_allocated() / 1e9 if setup.device.type != "cpu" else 0.0


def count_flops(side):
    """Floating point operations of one call of the plain side."""
    with FlopCounterMode(display=False) as counter:
        side.run()
    return counter.get_total_flops()


def profile_side(side, setup, most=8):
    """[(kernel, share of the time)] of one call, the longest first."""
    on_cpu = setup.device.type == "cpu"
    with profile(activities=None if on_cpu else [ProfilerActivity.CUDA]) as found:
        side.run()
        if not on_cpu:
            torch.get_device_module(setup.device).synchronize()
    kind = "self_cpu_time_total" if on_cpu else "self_device_time_total"
    rows = sorted(found.key_averages(), key=lambda row: -getattr(row, kind))
    total = sum(getattr(row, kind) for row in rows) or 1
    return [(row.key[:80], round(getattr(row, kind) / total, 4)) for row in rows[:most]]


def main():
    args = parse_args()
    grow_in_segments()
    device = find_device(args.device)
    cases = [case for case in CASES if args.only in case.name]
    if args.dry:
        print("\n".join([f"tests: {claim}" for claim in CLAIMS] + [f"case: {case.name}" for case in cases]))
        return
    if device.type == "cpu" and not args.tiny:
        raise SystemExit("no GPU here; --tiny runs everything on a processor, --dry lists it")
    setup = Setup(device, args.tiny, 1 if args.tiny else ROUNDS)
    machine = {**describe_machine(device), "driver": read_driver() if device.type != "cpu" else None}
    path = args.json or RESULTS / f"{machine['device'].replace(' ', '-')}.json"
    result = {"machine": machine, "claims": {}, "cases": []}

    def save():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")

    # On a processor one claim shows that it works: the others take minutes, and `make test` runs them.
    for claim in [] if args.part == "sizes" else list(CLAIMS)[: 1 if args.tiny else None]:
        result["claims"][claim] = check_claim(claim, device, args.workers)
        save()
    for case in [] if args.part == "tests" else cases:
        try:
            result["cases"].append(measure(case, setup))
            print("\n".join(format_case(result["cases"][-1])), flush=True)
        except torch.OutOfMemoryError as error:
            print(f"-- {case.name}: {str(error).splitlines()[0]}", flush=True)
        torch._dynamo.reset()
        gc.collect()
        if device.type != "cpu":
            torch.get_device_module(device).empty_cache()
        save()
    if not args.json:
        write_page()


def read_driver():
    """Version of the GPU's driver."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


if __name__ == "__main__":
    main()
