"""`python -m benchmarks.gpu`: the tests' claims on a GPU, then real sizes, each against its plain form.

Ends in about ten minutes on one GPU. Without a GPU it stops, unless --tiny makes everything small enough for a
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
from benchmarks.gpu.report import RESULTS, write_page
from benchmarks.measure import Setup, find_device, make_matmul, time_sides
from benchmarks.report import describe_machine

ROUNDS = 5
CLAIMS = {  # what the tests of the processor claim, on the GPU
    "bf16 and fp16 within bounds": ["tests/unit/test_precision.py"],
    "parity with the recorded numbers, float32 without TF32, and float64": ["tests/parity"],
    "sparse = dense": ["tests/unit/test_routing.py"],
    "the digits chain, resumed exactly": ["tests/e2e/test_chain.py", "tests/e2e/test_resume.py"],
    "compiled": ["tests/e2e/test_compile.py"],
}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto (GPU if there is one), or another of torch's")
    parser.add_argument("--json", type=Path, help="where results go (default: benchmarks/gpu/results/CARD.json)")
    parser.add_argument("--only", default="", help="cases with this in their name, and no tests")
    parser.add_argument("--tests", action="store_true", help="the tests alone")
    parser.add_argument("--workers", type=int, default=4, help="tests beside each other (default: 4)")
    parser.add_argument("--tiny", action="store_true", help="smallest sizes, to see that everything runs")
    parser.add_argument("--dry", action="store_true", help="list what would run")
    return parser.parse_args()


def check_claims(device, workers, tiny):
    """{claim: the last line of its tests}; tiny tries one, for the others take minutes on a processor."""
    found = {}
    for claim, files in list(CLAIMS.items())[: 1 if tiny else None]:
        print(f"== {claim}", flush=True)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", str(workers), *files]
        environment = {**os.environ, "TEST_DEVICE": device.type, "OMP_NUM_THREADS": "1"}
        if claim != "compiled":  # the default on a GPU, which takes longer than networks as small as the tests'
            environment["TORCHDYNAMO_DISABLE"] = "1"
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        lines = done.stdout.strip().splitlines()
        found[claim] = {"rc": done.returncode, "summary": lines[-1] if lines else done.stderr[-300:]}
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        print("\n".join([*failed, found[claim]["summary"]]), flush=True)
    return found


def measure(case, setup):
    """{side: its numbers} of a case, the sides timed in turns; memory is that of a side alone, in GB."""
    made, rows = {}, {}
    on_gpu = setup.device.type == "cuda"
    for name, build in case.sides.items():
        before = memory(setup)
        since = time.perf_counter()
        made[name] = build(setup)
        own = memory(setup) - before
        made[name].run()  # compiles
        rows[name] = {"first_call": time.perf_counter() - since}
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            start = memory(setup)
        made[name].run()
        if on_gpu:
            rows[name]["gb"] = own + torch.cuda.max_memory_allocated() / 1e9 - start
    plain = next(iter(made.values()))
    flops = count_flops(plain)
    product, product_flops = make_matmul(plain.dtype, setup.device, (64, 64, 64) if setup.tiny else (8192, 8192, 8192))
    functions = {name: side.run for name, side in made.items()} | {None: product}
    seconds = time_sides(functions, setup.device, setup.repeats, 0 if setup.tiny else 0.3)
    middle = {name: sorted(times)[len(times) // 2] for name, times in seconds.items()}
    for name, side in made.items():
        ratios = sorted(a / b for a, b in zip(seconds[next(iter(made))], seconds[name], strict=True))
        rows[name] |= {
            "seconds": middle[name],
            "rate": side.items / middle[name],
            "speedup": ratios[len(ratios) // 2],
            "least": ratios[0],
            "most": ratios[-1],
            "share_of_matmul": flops / middle[name] / (product_flops / middle[None]),
        }
    print(f"-- {case.name}: {flops / 1e12:.3g} TFLOP, matmul {product_flops / middle[None] / 1e12:.0f} TFLOP/s")
    for name, row in rows.items():
        print(
            f"   {name:18} {row['seconds'] * 1e3:9.1f} ms {row['rate']:9.1f}/s {row['speedup']:6.2f}x "
            f"({row['least']:.2f} to {row['most']:.2f})  {row['share_of_matmul']:.2f} of matmul "
            f"{row.get('gb', 0):6.2f} GB, first {row['first_call']:.1f} s",
            flush=True,
        )
    slowest = profile_side(made[next(reversed(made))], setup)
    return {"case": case.name, "tflop": flops / 1e12, "sides": rows, "profile": slowest}


def memory(setup):
    """GB of tensors on the GPU."""
    return torch.cuda.memory_allocated() / 1e9 if setup.device.type == "cuda" else 0.0


def count_flops(side):
    """Floating point operations of one call of the plain side."""
    with FlopCounterMode(display=False) as counter:
        side.run()
    return counter.get_total_flops()


def profile_side(side, setup, most=8):
    """[(kernel, share of the time)] of one call, the longest first."""
    activity = ProfilerActivity.CUDA if setup.device.type == "cuda" else ProfilerActivity.CPU
    with profile(activities={ProfilerActivity.CPU, activity}) as found:
        side.run()
        if setup.device.type == "cuda":
            torch.cuda.synchronize()
    kind = "self_device_time_total" if setup.device.type == "cuda" else "self_cpu_time_total"
    rows = sorted(found.key_averages(), key=lambda row: -getattr(row, kind))
    total = sum(getattr(row, kind) for row in rows) or 1
    return [(row.key[:80], round(getattr(row, kind) / total, 4)) for row in rows[:most]]


def main():
    args = parse_args()
    device = find_device(args.device)
    cases = [case for case in CASES if args.only in case.name]
    if args.dry:
        print("\n".join([f"tests: {claim}" for claim in CLAIMS] + [f"case: {case.name}" for case in cases]))
        return
    if device.type == "cpu" and not args.tiny:
        raise SystemExit("no GPU here; --tiny runs everything on a processor, --dry lists it")
    setup = Setup(device, args.tiny, 1 if args.tiny else ROUNDS)
    machine = {**describe_machine(device), "driver": read_driver() if device.type == "cuda" else None}
    path = args.json or RESULTS / f"{machine['device'].replace(' ', '-')}.json"
    result = {"machine": machine, "claims": {}, "cases": []}

    def save():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")

    if not args.only:
        result["claims"] = check_claims(device, args.workers, args.tiny)
        save()
    for case in [] if args.tests else cases:
        try:
            result["cases"].append(measure(case, setup))
        except torch.OutOfMemoryError as error:
            print(f"-- {case.name}: {str(error).splitlines()[0]}", flush=True)
        torch._dynamo.reset()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        save()
    if not args.json:
        write_page()


def read_driver():
    """Version of the GPU's driver."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


if __name__ == "__main__":
    main()
