"""The sections of the report that are charts and pictures. Each is a function of runs and options."""

from reporting import charts
from reporting.markup import element
from reporting.parts import card, fold, grid, list_missing, name_run, note, swatch, table
from reporting.pictures import embed_picture
from reporting.values import as_text, is_drawable, show, spread

CURVES = (  # name in metrics.jsonl, title, whether its scale may be logarithmic; others are terms of the loss
    ("loss", "loss", True),
    ("held_out_loss", "held-out loss", True),
    ("lr", "learning rate", False),
    ("grad_norm", "gradient norm", True),
    ("images_per_second", "images per second", False),
    ("memory_gb", "memory, GB", False),
    ("tau", "temperature of the gates", False),
    ("scaling", "scaling of the gates", False),
)


def draw_curves(runs, options):
    """A chart for every number that was measured over the steps, with a line for every run."""
    known = {name for name, *_ in CURVES}
    others = dict.fromkeys(name for run in runs for name in run.curves if name not in known)
    order = [*CURVES[:2], *((name, name.replace("_", " "), True) for name in others), *CURVES[2:]]
    cards = [draw_curve(runs, *each) for each in order if any(each[0] in run.curves for run in runs)]
    missing = list_missing(runs, "numbers over the steps (metrics.jsonl)", lambda run: run.curves)
    absent = [title for name, title, _ in CURVES[:6] if not any(name in run.curves for run in runs)]
    if absent and len(missing) < len(runs):
        missing.append(note(f"Not measured: {', '.join(absent)}."))
    return [grid(cards), *missing]


def draw_curve(runs, name, title, log):
    """The card of one quantity."""
    lines = [(run.name, charts.series_class(k), run.curves.get(name, [])) for k, run in enumerate(runs)]
    chart = charts.draw_lines(title, lines, log) or note("No value can be drawn.")
    told = [describe_curve(runs, run, run.curves[name]) for run in runs if name in run.curves]
    return card(title, chart, element("ul", *told, class_="key"))


def describe_curve(runs, run, points):
    """The last and the lowest value of a run's curve."""
    values = [value for _, value in points if is_drawable(value)]
    odd = len(points) - len(values)
    parts = [f"last {show(points[-1][1])}"]
    if len(runs) == 1 and values:
        parts.append(f"lowest {show(min(values))}, highest {show(max(values))}")
    if odd:
        parts.append(f"{odd} not finite, left out")
    return element("li", name_run(runs, run) if len(runs) > 1 else None, " " + ", ".join(parts))


def draw_gates(runs, options):
    """What the gates chose over time, and how probable it is that every layer is kept."""
    deciding = [run for run in runs if run.decisions]
    if not deciding:
        return [note("No gates were learned here.")]
    shown = [part for run in deciding for part in draw_run_gates(runs, run)]
    legend = note(
        swatch("kept"),
        "kept ",
        swatch("dropped"),
        "not kept; the fuller, the more probable it is that the layer is kept.",
    )
    return [legend, *shown]


def draw_run_gates(runs, run):
    """The charts of a run."""
    chart = charts.draw_decisions("Layers kept over the steps", run.decisions, run.depth)
    cards = [card("layers kept over the steps", chart)] if chart else []
    last = run.decisions[-1]
    shares = next((each.probabilities for each in reversed(run.decisions) if each.probabilities), None)
    if shares:
        bars = charts.draw_bars("Probability of every layer to be kept", shares, last.kept or ())
        cards.append(card("probability to be kept, at the end", bars))
    cards += draw_confidence(run)
    told = element("p", "Last choice: ", element("code", as_text(last.kept)))
    missing = [] if shares else [note("No probabilities of layers are recorded in this run.")]
    rows = [[layer, f"{share:.4f}", as_text(layer in (last.kept or ()))] for layer, share in enumerate(shares or ())]
    numbers = [fold("Probabilities as numbers", table(f"Layers: {run.name}", ["layer", "probability", "kept"], rows))]
    heading = [element("h3", name_run(runs, run))] if len(runs) > 1 else []
    return [*heading, told, grid(cards), *missing, *(numbers if shares else [])]


def draw_confidence(run):
    """[The card of how sure the gates are], if that is recorded."""
    known = [(each.step, each.confidence) for each in run.decisions if each.confidence]
    if not known:
        return []
    kinds = {"surest gate": max, "mean": lambda values: sum(values) / len(values), "least sure gate": min}
    lines = [
        (name, charts.series_class(k), [(step, measure(values)) for step, values in known])
        for k, (name, measure) in enumerate(kinds.items())
    ]
    key = [element("li", swatch(classes), f"{name} {show(points[-1][1])}") for name, classes, points in lines]
    chart = charts.draw_lines("Confidence of the gates", lines)
    return [card("confidence of the gates", chart, element("ul", *key, class_="key"))]


def show_samples(runs, options):
    """Pictures of every run along its steps."""
    parts = [part for run in runs if run.samples for part in show_run_samples(runs, run, options.samples)]
    return parts + list_missing(runs, "pictures (samples/STEP.png)", lambda run: run.samples)


def show_run_samples(runs, run, limit):
    chosen, figures, notes = spread(run.samples, limit), [], []
    for step, path in chosen:
        try:
            picture = embed_picture(path, f"Samples of {run.name} at step {step:,}")
            figures.append(element("figure", picture, element("figcaption", f"step {step:,}")))
        except ValueError as error:
            notes.append(note(str(error)))
    if len(chosen) < len(run.samples):
        notes.append(note(f"{len(chosen)} of {len(run.samples)} pictures are shown."))
    heading = [element("h3", name_run(runs, run))] if len(runs) > 1 else []
    return [*heading, element("div", *figures, class_="strip"), *notes]
