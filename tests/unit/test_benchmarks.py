"""The benchmarks run at a tiny size, say where their numbers are from, and their harness counts right."""

import importlib.util
import json
import math
import subprocess
import sys

import pytest
import torch

from benchmarks import measure, plain
from benchmarks.__main__ import NAMES
from benchmarks.gpu import report as gpu_report
from benchmarks.gpu.__main__ import CLAIMS
from benchmarks.gpu.cases import CASES
from benchmarks.report import judge

MODULES = [n for n in NAMES if n != "evaluator" and importlib.util.find_spec(f"benchmarks.{n}")]


@pytest.mark.parametrize("name", MODULES)
def test_module(root, tmp_path, name):
    target = tmp_path / "out" / f"{name}.json"
    flags = ["--tiny", "--repeats", "1", "--device", "cpu", "--json", str(target)]
    command = [sys.executable, "-m", f"benchmarks.{name}", *flags]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    written = json.loads(target.read_text())
    assert {"python", "torch", "cpu", "threads", "device", "command", "date"} <= set(written["machine"])
    assert written["cases"]
    for case in written["cases"]:
        assert case["case"] in done.stdout
        assert all(len(row["rounds"]) == 1 and row["seconds"] > 0 for row in case["sides"].values())


@pytest.mark.parametrize("kind", [kind for kind in plain.BARS if kind != "sampling"])
def test_plain_steps_compute_the_same(kind):
    """Losses and gradient norms of three whole steps, so that a ratio of times compares equal work."""
    setup = measure.Setup(torch.device("cpu"), tiny=True)
    theirs, ours = (plain.rehearse(setup, kind, is_plain, depth=4) for is_plain in (True, False))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    assert (theirs.std(dim=0) > 0).all()  # it does train


def test_plain_samples_are_the_same():
    setup = measure.Setup(torch.device("cpu"), tiny=True)
    theirs, ours = (plain.make_sampling(setup, is_plain, "fp32", 2, 2) for is_plain in (True, False))
    torch.testing.assert_close(plain.in_turn(ours)(), plain.in_turn(theirs)(), rtol=1e-4, atol=1e-4)


def test_sides_take_turns():
    """A warm-up, a call to see how long it takes, and then as many rounds as asked for."""
    calls = []
    sides = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = measure.time_sides(sides, torch.device("cpu"), 3, least_seconds=0)
    assert calls == list("aabbababab")
    assert [len(each) for each in seconds.values()] == [3, 3]


def test_efficiency_of_a_matmul_is_about_one():
    cpu = torch.device("cpu")
    run, flops = measure.make_matmul(torch.float32, cpu, (512, 512, 512))
    assert flops == 2 * 512**3
    case = measure.Case("c", {"x": lambda _: measure.Side(run, items=2, flops=flops)}, compare=lambda r: {"n": len(r)})
    rows, found = measure.measure_case(case, measure.Setup(cpu, repeats=3))
    assert 0.05 < rows["x"]["efficiency"] < 20
    assert len(rows["x"]["rounds"]) == 3
    assert rows["x"]["speedup"] == 1
    assert rows["x"]["rate"] == pytest.approx(2 / rows["x"]["seconds"])
    assert found == {"n": 1}


def test_bars():
    rows, found = {"ours": {"speedup": 2.0}}, {"difference": 0.5}
    bars = [("speedup", "ours", ">=", 1.5), ("speedup", "ours", "<=", 1.5), ("difference", None, "<=", math.inf)]
    assert [bar["holds"] for bar in judge(bars, rows, found)] == [True, False, True]


def test_gpu_page_says_what_was_measured():
    """The tables of docs/performance.md are those of the results in the repository."""
    section = gpu_report.PAGE.read_text().split(gpu_report.START)[1].split(gpu_report.END)[0]
    results = gpu_report.read_results()
    assert section.strip() == gpu_report.format_results(results)
    assert {case["case"] for result in results for case in result["cases"]} <= {case.name for case in CASES}
    assert all(result["claims"].keys() <= CLAIMS.keys() for result in results)


def test_gpu_command_without_a_gpu(root, tmp_path):
    """It lists what would run, refuses to pretend, and runs all cases at tiny size."""

    def run(*words):
        command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", *words]
        return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300, check=False)

    assert len(run("--dry").stdout.splitlines()) == len(CLAIMS) + len(CASES)
    assert "no GPU here" in run().stderr
    target = tmp_path / "gpu.json"
    done = run("--tiny", "--part", "sizes", "--json", target)
    assert done.returncode == 0, done.stderr[-3000:]
    measured = json.loads(target.read_text())["cases"]
    assert [case["case"] for case in measured] == [case.name for case in CASES]
    for case in measured:
        assert all(row["rate"] > 0 and row["efficiency"] > 0 for row in case["sides"].values())
        assert case["profile"]
