"""`python -m benchmarks.plot`: docs/scaling.png from benchmarks/results/gate_learning.json."""

import json
from pathlib import Path

from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]


def main():
    cases = json.loads((ROOT / "benchmarks/results/gate_learning.json").read_text())["cases"]
    figure = Figure((9, 3.2), layout="constrained")
    for axis, name in zip(figure.subplots(1, 2), ("depth", "batch"), strict=True):
        sides = next(case for case in cases if case["case"] == name)["sides"]
        sizes = [int(side.split()[0]) for side in sides]
        axis.plot(sizes, [row["seconds"] for row in sides.values()], "o-", label="seconds per step")
        axis.set(xlabel=next(iter(sides)).split()[1], ylabel="seconds per step", xlim=(0, None), ylim=(0, None))
        other = axis.twinx()
        other.plot(sizes, [row["extra_mb"] / 1024 for row in sides.values()], "s--", color="tab:orange")
        other.set(ylabel="GB of activations (dashed)", ylim=(0, None))
    figure.savefig(ROOT / "docs/scaling.png", dpi=110)


if __name__ == "__main__":
    main()
