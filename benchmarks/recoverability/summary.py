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
    return [row["chosen"] for row in rows if row.get("pattern") == pattern and "chosen" in row]


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


MEASURES = ("loss", "distance", "frechet", "read")


def ends_of(rows, recipe):
    """{(choice, seed): row} of the recoveries by a recipe."""
    found = [row for row in rows if row["kind"] == "recovery" and row["method"] == recipe]
    return {(tuple(row["kept"]), row["seed"]): row for row in found}


def count_wins(ends, others):
    """(pairs in which `ends` has the lower loss, pairs) of two sets of recoveries from the same choice and seed."""
    pairs = ends.keys() & others.keys()
    return sum(ends[key]["loss"] < others[key]["loss"] for key in pairs), len(pairs)


def means_of(rows):
    """{measure: mean} of the MEASURES that all the rows have."""
    shared = [name for name in MEASURES if rows and all(name in row for row in rows)]
    return {name: mean(row[name] for row in rows) for name in shared}


def summarize_recoveries(rows):
    """One dict per recipe: means over the seeds, and in how many pairs it ends below fine-tuning.

    Samples are drawn of the first seed alone, and are missing where it is.
    """
    recipes = list(dict.fromkeys(row["method"] for row in rows if row["kind"] == "recovery"))
    plain, summary = ends_of(rows, "fine-tuning"), []
    for recipe in recipes:
        ends = ends_of(rows, recipe)
        wins, pairs = count_wins(ends, plain)
        drawn = [row for row in ends.values() if "read" in row]
        measures = {**means_of(drawn), **means_of(ends.values())}  # the loss is that of all seeds
        summary.append({"recipe": recipe, **measures, "wins": wins, "pairs": pairs})
    return sorted(summary, key=lambda row: row["loss"])


def format_recoveries(found):
    """The same as a Markdown table."""
    heads = "loss | distance | Frechet, seed 0 | read as asked, seed 0 | below fine-tuning"
    lines = [f"| recipe | {heads} |", "|---" * 6 + "|"]
    for row in found:
        drawn = f"{row['frechet']:.2f} | {row['read']:.1%}" if "read" in row else "- | -"
        numbers = f"{row['loss']:.5f} | {row['distance']:.5f} | {drawn}"
        lines.append(f"| {row['recipe']} | {numbers} | {row['wins']} of {row['pairs']} |")
    return "\n".join(lines)


def average(rows, kind, key, names):
    """{value of `key`: means of `names` over the rows of a kind}, in the order they were found."""
    found = {}
    for row in rows:
        if row["kind"] == kind:
            found.setdefault(row[key], []).append(row)
    return {value: {name: mean(row[name] for row in those) for name in names} for value, those in found.items()}


def format_averages(found, heads):
    """Such averages as a Markdown table; heads: of the first column and of the others."""
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    lines += [
        f"| {value} | " + " | ".join(f"{number:.4g}" for number in row.values()) + " |" for value, row in found.items()
    ]
    return "\n".join(lines)
