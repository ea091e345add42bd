"""`python -m benchmarks.recoverability.report`: tables of docs/results.md and its figures, from all rows there are."""

from pathlib import Path
from statistics import mean, median

from matplotlib.figure import Figure
from scipy.stats import spearmanr

from benchmarks.recoverability import jobs, problem, summary

ROOT = Path(__file__).parents[2]
START = "<!-- tables by benchmarks/recoverability/report.py -->"


def read_problems(folder):
    """[(Problem, rows)] of every file of rows in a folder."""
    found = []
    for path in sorted(Path(folder).glob("*.jsonl")):
        rows = jobs.read_rows(path)
        told = next(row for row in rows if row["kind"] == "teacher")["settings"]
        found.append((problem.Problem(**{**told, "patterns": tuple(told["patterns"])}), rows))
    return found


def whole_patterns(settings, rows):
    """{pattern: drawn choices} of the patterns all of whose drawn choices were recovered."""
    truth = summary.truth_of(rows)
    drawn = {name: jobs.choices_to_recover(name, settings.depth, settings.sampled) for name in settings.patterns}
    return {name: choices for name, choices in drawn.items() if all(tuple(kept) in truth for kept in choices)}


def summarize_patterns(rows, whole):
    """What was found of every method under the patterns in `whole`; rows of others wait for their choices."""
    return summary.summarize([row for row in rows if row.get("pattern") in (None, *whole)], whole)


def summarize_all(problems):
    """Means over the problems of regret and rank, per pattern and method that all of them have: {pattern: rows}."""
    found = {}
    for settings, rows in problems:
        for row in summarize_patterns(rows, whole_patterns(settings, rows)):
            found.setdefault((row["pattern"], row["method"]), []).append(row)
    tables = {}
    for (pattern, method), those in found.items():
        most = max(len(each) for (name, _), each in found.items() if name == pattern)
        if len(those) == most:
            regrets = [row["regret"] for row in those]
            tables.setdefault(pattern, []).append(
                (mean(regrets), mean(row["rank"] / row["of"] for row in those), method, regrets)
            )
    return {pattern: sorted(those) for pattern, those in tables.items()}


def describe_all(problems):
    """Regrets of every method in every problem, and their mean, under each pattern, as Markdown."""
    lines = []
    for pattern, rows in summarize_all(problems).items():
        names = [settings.title for settings, those in problems if pattern in whole_patterns(settings, those)]
        lines += [f"### {pattern}", "", "Regrets in hundred thousandths; ranks as shares of all choices.", ""]
        lines.append("| method | " + " | ".join(names) + " | mean regret | mean rank |")
        lines.append("|---" * (len(names) + 3) + "|")
        for regret, rank, method, each in rows:
            numbers = " | ".join(f"{1e5 * value:.0f}" for value in each)
            lines.append(f"| {method} | {numbers} | {1e5 * regret:.0f} | {rank:.0%} |")
        lines.append("")
    return "\n".join(lines)


def describe(settings, rows):
    """Tables of one problem, as Markdown."""
    whole, lines = whole_patterns(settings, rows), [f"## {settings.data}, teacher {settings.teacher}", ""]
    teacher = next(row for row in rows if row["kind"] == "teacher")
    hours = sum(row["seconds"] for row in rows) / 3600
    lines.append(
        f"Teacher: {settings.teacher_steps} steps, held-out loss {teacher['loss']:.5f}, {teacher['read']:.1%} of its "
        f"samples read as asked. All jobs took {hours:.1f} hours of one process."
    )
    lines += ["", *(f"- {describe_truth(pattern, rows, choices)}" for pattern, choices in whole.items()), ""]
    lines += [summary.format_table(summarize_patterns(rows, whole)), ""]
    recoveries = summary.summarize_recoveries(rows)
    if recoveries:
        lines += [summary.format_recoveries(recoveries), "", *describe_masking(rows), ""]
    depths = summary.average(rows, "depth", "pattern", (*summary.MEASURES, "time_share"))
    if depths:
        heads = ("pattern", "loss", "distance", "Frechet", "read as asked", "time of a forward")
        lines += [summary.format_averages(depths, heads), ""]
    quarters = summary.average(rows, "quarter", "method", summary.MEASURES)
    if quarters:
        heads = ("a quarter of the layers", "loss", "distance", "Frechet", "read as asked")
        lines += [summary.format_averages(quarters, heads), ""]
    return "\n".join(lines)


def describe_masking(rows):
    """In how many pairs a recipe ends below another, as Markdown lines."""
    lines = []
    for recipe, other in COMPARED:
        wins, pairs = summary.count_wins(summary.ends_of(rows, recipe), summary.ends_of(rows, other))
        lines.append(f"- {recipe} below {other}: {wins} of {pairs}")
    return lines


COMPARED = (
    ("Masked KD", "representation KD"),
    ("relative Masked KD", "relative representation KD"),
    ("Masked KD, planted", "representation KD, planted"),
    ("relative Masked KD, planted", "relative representation KD, planted"),
    ("Masked KD from learned", "fine-tuning from learned"),
    ("half of Masked KD", "Masked KD"),
    ("half of Masked KD from learned", "Masked KD"),
    ("half of relative representation KD from learned", "Masked KD"),
)


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


def draw_choices(problems, path):
    """Loss after the cut against the final loss, all choices of the first pattern and what methods took of them."""
    rows_of_axes = -(-len(problems) // 2)
    figure = Figure((9, 3.4 * rows_of_axes), layout="constrained")
    axes = figure.subplots(rows_of_axes, 2, squeeze=False).flatten()
    for axis, (settings, rows) in zip(axes, problems, strict=False):
        drawn = jobs.choices_to_recover(settings.patterns[0], settings.depth, settings.sampled)
        truth = {tuple(row["kept"]): row for row in rows if row["kind"] == "truth" and row["seed"] == 0}
        dots = [truth[tuple(kept)] for kept in drawn if tuple(kept) in truth]
        axis.scatter([row["calibration"] for row in dots], [row["loss"] for row in dots], s=12, color="0.7")
        for method, marker in MARKED.items():
            taken = [row for row in rows if row.get("method") == method and row.get("pattern") == settings.patterns[0]]
            those = [truth[tuple(row["chosen"])] for row in taken if tuple(row.get("chosen", ())) in truth]
            places = [[row[name] for row in those] for name in ("calibration", "loss")]
            axis.scatter(*places, marker=marker, s=50, label=method, alpha=0.8)
        axis.set(xlabel="loss after the cut", title=f"{settings.data}, teacher {settings.teacher}")
        axis.set(xscale="log", ylabel="held-out loss after recovery")
    axis.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def draw_recoveries(problems, path):
    """Held-out loss over the compute spent, means over the seeds; and loss and speed of other depths."""
    problems = [(settings, rows) for settings, rows in problems if any(row["kind"] == "recovery" for row in rows)]
    if not problems:
        return
    figure = Figure((9, 3.4 * len(problems)), layout="constrained")
    for (left, right), (settings, rows) in zip(figure.subplots(len(problems), 2, squeeze=False), problems, strict=True):
        for recipe in CURVES:
            curves = [row["curve"] for row in summary.ends_of(rows, recipe).values()]
            points = [
                (mean(at), mean(loss)) for at, loss in (zip(*each, strict=True) for each in zip(*curves, strict=False))
            ]
            shown = [point for point in points if point[1] < 1.4 * points[-1][1]]  # parts that learn apart begin high
            left.plot(*zip(*shown, strict=True), label=recipe, linewidth=1)
        left.set(xlabel="compute, in steps of fine-tuning", ylabel="held-out loss", yscale="log", title=settings.data)
        left.legend(fontsize=7)
        depths = summary.average(rows, "depth", "pattern", ("loss", "time_share"))
        for pattern, row in depths.items():
            right.annotate(pattern, (row["time_share"], row["loss"]), fontsize=8)
        right.plot([row["time_share"] for row in depths.values()], [row["loss"] for row in depths.values()], "o-")
        right.set_visible(bool(depths))
        right.set(xlabel="time of a forward, share of the teacher's", ylabel="held-out loss", title="depth")
    figure.savefig(path, dpi=110)


CURVES = (
    "fine-tuning",
    "output KD",
    "Masked KD",
    "relative Masked KD",
    "Masked KD after intervals",
    "Masked KD from learned",
)
MARKED = {
    jobs.BEST: "*",
    "learned, full update": "P",
    "block-influence": "o",
    "magnitude": "s",
    "lowest loss": "^",
    "BK-SDM": "X",
}


def main():
    problems = read_problems(Path(__file__).parent / "results")
    page = ROOT / "docs/results.md"
    text = page.read_text().partition(START)[0]
    tables = [describe_all(problems), *(describe(*each) for each in problems)]
    page.write_text(text + START + "\n\n" + "\n".join(tables))
    draw_choices(problems, ROOT / "docs/recoverability.png")
    draw_recoveries(problems, ROOT / "docs/recovery.png")


if __name__ == "__main__":
    main()
