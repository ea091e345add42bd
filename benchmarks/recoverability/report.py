"""`python -m benchmarks.recoverability.report`: docs/results.md and docs/recoverability.png from all rows there are."""

from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.recoverability import jobs, problem, summary

ROOT = Path(__file__).parents[2]
START = "<!-- tables by benchmarks/recoverability/report.py -->"


def read_problems(folder):
    """[(Problem, rows)] of every file of rows in a folder."""
    found = []
    for path in sorted(Path(folder).glob("*.jsonl")):
        name, _, teacher = path.stem.rpartition("-")
        settings = problem.PROBLEMS.get(name, problem.Problem(name))
        found.append((settings, int(teacher), jobs.read_rows(path)))
    return found


def describe(settings, teacher, rows):
    """Tables of one problem, as Markdown."""
    choices = {name: jobs.choices_to_recover(name, 12, settings.sampled) for name in settings.patterns}
    lines = [f"## {settings.data}, teacher {teacher}", ""]
    for pattern, drawn in choices.items():
        truth = [row for row in rows if row["kind"] == "truth" and row["kept"] in drawn and row["seed"] == 0]
        if len(truth) < 3:
            continue
        losses, cuts = [row["loss"] for row in truth], [row["calibration"] for row in truth]
        again = summary.truth_of(rows, seed=1)
        twice = [(row["loss"], again[tuple(row["kept"])]) for row in truth if tuple(row["kept"]) in again]
        lines.append(
            f"{pattern}: {len(truth)} of {len(drawn)} choices recovered, held-out loss {min(losses):.5f} to "
            f"{max(losses):.5f}, median {sorted(losses)[len(losses) // 2]:.5f}; rank correlation of the loss after the "
            f"cut and the final one {summary.rank_correlation(cuts, losses):.2f}"
            + (
                f", of two seeds of the recovery {summary.rank_correlation(*zip(*twice, strict=True)):.2f}"
                if twice
                else ""
            )
            + "."
        )
        lines.append("")
    lines += [summary.format_table(summary.summarize(rows, choices)), ""]
    recoveries = summary.summarize_recoveries(rows)
    return "\n".join(lines + ([summary.format_recoveries(recoveries), ""] if recoveries else []))


def draw(problems, path):
    """Loss after the cut against the final loss, all choices of the first pattern and what methods took of them."""
    figure = Figure((4.6 * len(problems), 3.8), layout="constrained")
    for axis, (settings, teacher, rows) in zip(
        figure.subplots(1, len(problems), squeeze=False)[0], problems, strict=True
    ):
        drawn = jobs.choices_to_recover(settings.patterns[0], 12, settings.sampled)
        truth = {tuple(row["kept"]): row for row in rows if row["kind"] == "truth" and row["seed"] == 0}
        dots = [truth[tuple(kept)] for kept in drawn if tuple(kept) in truth]
        axis.scatter([row["calibration"] for row in dots], [row["loss"] for row in dots], s=12, color="0.7")
        for method, marker in MARKED.items():
            taken = [row for row in rows if row.get("method") == method and row.get("pattern") == settings.patterns[0]]
            rows_of = [
                truth[tuple(row["chosen"])] for row in taken if "chosen" in row and tuple(row["chosen"]) in truth
            ]
            places = [[row[name] for row in rows_of] for name in ("calibration", "loss")]
            axis.scatter(*places, marker=marker, s=50, label=method, alpha=0.8)
        axis.set(xlabel="loss after the cut", title=f"{settings.data}, teacher {teacher}")
        axis.set(xscale="log", ylabel="held-out loss after recovery")
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=110)


MARKED = {
    "learned, full update": "*",
    "learned, LoRA": "P",
    "block-influence": "o",
    "sensitivity": "s",
    "lowest loss": "^",
    "BK-SDM": "X",
}


def main():
    problems = read_problems(Path(__file__).parent / "results")
    page = ROOT / "docs/results.md"
    text = page.read_text().partition(START)[0]
    page.write_text(text + START + "\n\n" + "\n".join(describe(*each) for each in problems))
    draw(problems, ROOT / "docs/recoverability.png")


if __name__ == "__main__":
    main()
