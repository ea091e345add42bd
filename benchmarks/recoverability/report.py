"""`python -m benchmarks.recoverability.report`: docs/results.md and docs/recoverability.png from all rows there are."""

from pathlib import Path
from statistics import median

from matplotlib.figure import Figure
from scipy.stats import spearmanr

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
    """Tables of one problem, as Markdown; of patterns all of whose drawn choices were recovered."""
    drawn = {name: jobs.choices_to_recover(name, settings.depth, settings.sampled) for name in settings.patterns}
    truth = summary.truth_of(rows)
    whole = {name: choices for name, choices in drawn.items() if all(tuple(kept) in truth for kept in choices)}
    lines = [f"## {settings.data}, teacher {teacher}", ""]
    for pattern, choices in drawn.items():
        known = sum(tuple(kept) in truth for kept in choices)
        lines.append(
            f"- {describe_truth(pattern, rows, choices) if pattern in whole else describe_part(pattern, known)}"
        )
    rows = [row for row in rows if row.get("pattern", next(iter(whole), "")) in whole]
    lines += ["", summary.format_table(summary.summarize(rows, whole)), ""]
    recoveries = summary.summarize_recoveries(rows)
    return "\n".join(lines + ([summary.format_recoveries(recoveries), ""] if recoveries else []))


def describe_part(pattern, known):
    """A line on a pattern that is not finished."""
    return f"{pattern}: {known} choices recovered so far; not shown below."


def describe_truth(pattern, rows, choices):
    """A line on what the choices under a pattern become."""
    truth, again = (summary.truth_of(rows, seed=seed) for seed in (0, 1))
    cuts = summary.truth_of(rows, "calibration")
    losses = [truth[tuple(kept)] for kept in choices]
    after_cut = [cuts[tuple(kept)] for kept in choices]
    line = (
        f"{pattern}: {len(choices)} choices recovered; held-out loss {min(losses):.5f} to {max(losses):.5f}, median "
        f"{median(losses):.5f}. Rank correlation of the loss after the cut and the final one: "
        f"{spearmanr(after_cut, losses).statistic:.2f}"
    )
    twice = [(truth[tuple(kept)], again[tuple(kept)]) for kept in choices if tuple(kept) in again]
    if len(twice) < len(choices):
        return f"{line}."
    first, second = zip(*twice, strict=True)
    return f"{line}; of two seeds of the recovery: {spearmanr(first, second).statistic:.2f}."


def draw(problems, path):
    """Loss after the cut against the final loss, all choices of the first pattern and what methods took of them."""
    figure = Figure((4.6 * len(problems), 3.8), layout="constrained")
    for axis, (settings, teacher, rows) in zip(
        figure.subplots(1, len(problems), squeeze=False)[0], problems, strict=True
    ):
        drawn = jobs.choices_to_recover(settings.patterns[0], settings.depth, settings.sampled)
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
