"""Ranks and regrets of every method, recomputed from the rows alone. Without torch."""

from statistics import mean, pstdev


def truth_of(rows, measure="loss", seed=0):
    """{choice: what it becomes} of one recovery seed."""
    return {tuple(row["kept"]): row[measure] for row in rows if row["kind"] == "truth" and row["seed"] == seed}


def rank_among(kept, truth, drawn):
    """1 + how many of the drawn choices become better than this one."""
    return 1 + sum(truth[other] < truth[tuple(kept)] for other in drawn)


def chosen_under(rows, pattern):
    """What any method chose under a pattern."""
    return [row["chosen"] for row in rows if row.get("pattern") == pattern]


def summarize(rows, choices_of):
    """One dict per pattern and method, over its seeds; choices_of: {pattern: choices that were drawn to be recovered}.

    regret: the mean loss above that of the best known choice, those of the methods included; spread: its deviation.
    rank: the mean among the drawn ones. calibration: the loss right after the cut.
    """
    truth, calibration = truth_of(rows), truth_of(rows, "calibration")
    picked = {}
    for row in rows:
        if "chosen" in row and tuple(row["chosen"]) in truth:
            picked.setdefault((row["pattern"], row["method"]), []).append(row["chosen"])
    found = []
    for (pattern, method), chosen in picked.items():
        drawn = {tuple(kept) for kept in choices_of[pattern]} & truth.keys()
        known = drawn | {tuple(kept) for kept in chosen_under(rows, pattern)} & truth.keys()
        best = min(truth[kept] for kept in known)
        ranks = [rank_among(kept, truth, drawn) for kept in chosen]
        regrets = [truth[tuple(kept)] - best for kept in chosen]
        found.append(
            {
                "pattern": pattern,
                "method": method,
                "seeds": len(chosen),
                "regret": mean(regrets),
                "spread": pstdev(regrets),
                "rank": mean(ranks),
                "of": len(drawn),
                "loss": mean(truth[tuple(kept)] for kept in chosen),
                "calibration": mean(calibration[tuple(kept)] for kept in chosen),
            }
        )
    return sorted(found, key=lambda row: (row["pattern"], row["regret"]))


def format_table(found):
    """The summary as a Markdown table."""
    lines = ["| pattern | method | seeds | regret | spread | rank | loss | after the cut |", "|---" * 8 + "|"]
    for row in found:
        numbers = f"{row['regret']:.5f} | {row['spread']:.5f} | {row['rank']:.1f} of {row['of']} | {row['loss']:.5f}"
        lines.append(f"| {row['pattern']} | {row['method']} | {row['seeds']} | {numbers} | {row['calibration']:.4f} |")
    return "\n".join(lines)


def summarize_recoveries(rows):
    """One dict per recipe: means over choices and seeds, and in how many pairs it ends below fine-tuning."""
    found = {}
    for row in rows:
        if row["kind"] == "recovery":
            found.setdefault(row["method"], {})[(tuple(row["kept"]), row["seed"])] = row
    plain, summary = found.get("fine-tuning", {}), []
    for recipe, ends in found.items():
        pairs = [key for key in ends if key in plain]
        summary.append(
            {
                "recipe": recipe,
                **{name: mean(row[name] for row in ends.values()) for name in ("loss", "distance", "frechet", "read")},
                "wins": sum(ends[key]["loss"] < plain[key]["loss"] for key in pairs),
                "pairs": len(pairs),
            }
        )
    return sorted(summary, key=lambda row: row["loss"])


def format_recoveries(found):
    """The same as a Markdown table."""
    lines = ["| recipe | loss | distance | Frechet | read as asked | below fine-tuning |", "|---" * 6 + "|"]
    for row in found:
        numbers = f"{row['loss']:.5f} | {row['distance']:.5f} | {row['frechet']:.2f} | {row['read']:.1%}"
        lines.append(f"| {row['recipe']} | {numbers} | {row['wins']} of {row['pairs']} |")
    return "\n".join(lines)
