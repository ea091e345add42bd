"""What becomes of the numbers of a benchmark: bars that hold or not, a table, and JSON that tells their origin."""

import json
import operator
import platform
import sys
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import torch

COLUMNS = {  # of the table: number -> width and precision
    **{"seconds": "10.4g", "speedup": "9.3f", "least": "8.3f", "most": "8.3f", "rate": "10.4g", "tflops": "8.3f"},
    **{"efficiency": "12.3f", "peak_mb": "9.0f", "extra_mb": "10.0f", "extra_ratio": "13.3f"},
}
COMPARISONS = {">=": operator.ge, "<=": operator.le}


def judge(bars, rows, found):
    """Bars as dictionaries that say whether they hold."""
    for number, side, sign, value in bars:
        measured = (rows[side] if side else found)[number]
        holds = COMPARISONS[sign](measured, value)
        yield {"number": number, "side": side, "sign": sign, "bar": value, "measured": measured, "holds": holds}


def show(case):
    """Print a table with one line per side, what the sides differ in, and the bars."""
    shown = [key for key in COLUMNS if any(key in row for row in case["sides"].values())]
    width = {key: int(COLUMNS[key].partition(".")[0]) for key in shown}
    print(f"{case['case']:24}" + "".join(f"{key:>{width[key]}}" for key in shown))
    for name, row in case["sides"].items():
        cells = (format(row[key], COLUMNS[key]) if key in row else " " * width[key] for key in shown)
        print(f"  {name:22}" + "".join(cells))
    for name, value in case["found"].items():
        print(f"  {name}: {value:.4g}" if isinstance(value, float) else f"  {name}: {value}")
    for bar in case["bars"]:
        what = " ".join(filter(None, [bar["side"], bar["number"], bar["sign"]]))
        print(f"  bar: {what} {bar['bar']:g}: {'holds' if bar['holds'] else 'MISSED'} ({bar['measured']:.4g})")
    print(flush=True)


def describe_machine(device):
    """What the numbers depend on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    cpu = next(named, platform.processor())
    return {
        **{name: version(name) for name in ("torch", "numpy", "scipy")},
        "python": platform.python_version(),
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "device": getattr(torch.get_device_module(device), "get_device_name", lambda _: cpu)(device),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def write_json(path, device, cases):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": describe_machine(device), "cases": cases}, indent=1) + "\n")
