"""The sections of the report that are tables. Each is a function of runs and options that returns its parts."""

import re
import shlex

from reporting.markup import element, join
from reporting.parts import card, fold, grid, list_missing, name_run, note, table
from reporting.runs import MOST_LAYERS
from reporting.values import NOTHING, as_dict, as_text, show, show_change


def describe_runs(runs, options):
    """What was run, on what, and how far."""
    rows = [[title, *(tell(run) for run in runs)] for title, tell in ABOUT]
    told = [row for row in rows if any(cell != NOTHING for cell in row[1:])]
    remarks = [note(f"{run.name}: {remark}") for run in runs for remark in run.remarks]
    return [table("What was run", ["", *(name_run(runs, run) for run in runs)], told), *remarks]


def tell_script(run):
    command = run.environment.get("command")
    return command.split()[0] if isinstance(command, str) and command.split() else NOTHING


def tell_parameters(run):
    counts = as_dict(run.sizes.get("parameters"))
    return ", ".join(f"{word} {show(count)}" for word, count in counts.items()) or NOTHING


def tell_steps(run):
    total = run.sizes.get("steps")
    if run.steps is None:
        return f"none of {show(total)} is recorded" if total else NOTHING
    return f"{show(int(run.steps))} of {show(total)}" if total else show(int(run.steps))


def tell_machine(run):
    count = run.environment.get("processes")
    parts = [as_text(run.environment[name]) for name in ("device", "precision") if run.environment.get(name)]
    return ", ".join(parts + ([f"{as_text(count)} process(es)"] if count else [])) or NOTHING


def tell_versions(run):
    versions = as_dict(run.environment.get("versions"))
    return ", ".join(f"{name} {as_text(version)}" for name, version in versions.items() if version) or NOTHING


ABOUT = (  # quantity, run -> its value
    ("script", tell_script),
    ("model", lambda run: as_text(run.settings.get("model"))),
    ("layers", lambda run: show(run.layers)),
    ("parameters", tell_parameters),
    ("images", lambda run: show(run.sizes.get("images"))),
    ("steps done", tell_steps),
    ("log from – to", lambda run: " – ".join(run.times) or NOTHING),
    ("computed on", tell_machine),
    ("commit", lambda run: as_text(run.environment.get("commit"))[:12]),
    ("versions", tell_versions),
)


QUANTITIES = (  # name in a profile, title
    ("layers", "layers"),
    ("parameters", "parameters"),
    ("gmacs", "GMACs"),
    ("latency_ms", "latency, ms"),
    ("memory_gb", "memory, GB"),
)


def compare_sizes(runs, options):
    """What the cut changed, of every run whose weights tell."""
    found = [(run, *find_sizes(run)) for run in runs]
    cards = [card(name_run(runs, run), compare(run, *sizes)) for run, *sizes in found if any(sizes)]
    pruned = {run.name for run, *sizes in found if any(sizes)}
    return [grid(cards), *list_missing(runs, "pruned weights with facts", lambda run: run.name in pruned)]


def find_sizes(run):
    """({quantity: value} before, after) the cut, as the facts beside the weights tell it."""
    before, after = {}, {}
    for facts in run.facts.values():
        profile = as_dict(facts.get("profile"))
        before, after = (as_dict(profile.get(when)) | told for when, told in (("before", before), ("after", after)))
        kept, depth = facts.get("kept"), count_pattern(facts.get("pattern"))
        if isinstance(kept, list):
            after = {"layers": len(kept)} | after
            before = ({"layers": depth} if depth else {}) | before
    if after and run.decisions and run.depth:  # gates choose from all layers
        before = {"layers": run.depth} | before
    return before, after


def count_pattern(pattern):
    """Layers that N:M groups cover, as in 2:4x3,1:2; None for anything else."""
    parts = pattern.split(",") if isinstance(pattern, str) else [""]
    groups = [re.fullmatch(r"[0-9]{1,4}:([0-9]{1,4})(?:x([0-9]{1,4}))?", part) for part in parts]
    return min(sum(int(each[1]) * int(each[2] or 1) for each in groups), MOST_LAYERS) if all(groups) else None


def compare(run, before, after):
    """The table of a run."""
    known = [(title, before.get(name), after.get(name)) for name, title in QUANTITIES]
    rows = [
        [title, *map(show, pair), show_change(*pair)]
        for title, *pair in known
        if any(each is not None for each in pair)
    ]
    columns = ["", "before", "after", "change"]
    return join([table(f"Before and after the cut: {run.name}", columns, rows, "numbers"), tell_place(run)])


def tell_place(run):
    """A note on what times and memory were measured with; None if that is not recorded."""
    profiles = [as_dict(facts["profile"]) for facts in run.facts.values() if facts.get("profile")]
    place = [as_text(told[name]) for told in profiles[:1] for name in ("device", "precision") if told.get(name)]
    return note(f"One image on {', '.join(place)}.") if place else None


METRICS = (  # name in the file, title
    ("fid", "FID"),
    ("sfid", "sFID"),
    ("is", "Inception Score"),
    ("precision", "precision"),
    ("recall", "recall"),
    ("samples", "samples"),
    ("reference_images", "reference images"),
)


def list_metrics(runs, options):
    """The numbers that evaluator.py wrote."""
    found = [
        (join([name_run(runs, run), element("small", file)]), told)
        for run in runs
        for file, told in run.metrics.items()
    ]
    found += list(options.metrics.items())
    if not found:
        return [note("No metrics: evaluator.py --json RUN/metrics.json writes them into a run folder.")]
    columns = [(name, title) for name, title in METRICS if any(name in told for _, told in found)]
    rows = [[name, *(show(told.get(quantity)) for quantity, _ in columns)] for name, told in found]
    return [table("Metrics of samples", ["run", *(title for _, title in columns)], rows, "numbers")]


def list_settings(runs, options):
    """Settings with their origin: those that are no plain defaults or differ between the runs, then all others."""
    names = list(dict.fromkeys(name for run in runs for name in run.settings))
    rows = {name: [describe_setting(run, name) for run in runs] for name in names}
    notable = [name for name in names if is_notable(runs, name)]
    others = [name for name in names if name not in notable]
    columns = ["setting", *(name_run(runs, run) for run in runs)]
    shown = [table("Chosen settings", columns, [[name_setting(runs, name), *rows[name]] for name in notable])]
    if others:
        defaults = table("Settings that are defaults", columns, [[name, *rows[name]] for name in others])
        shown.append(fold(f"{len(others)} settings that are defaults", defaults))
    commands = [(run, run.environment.get("command")) for run in runs]
    told = [element("pre", f"{run.name}:\n{wrap_command(str(command))}") for run, command in commands if command]
    return shown + ([fold("Command lines", *told)] if told else [])


def is_notable(runs, name):
    """Whether a setting is worth a look."""
    is_chosen = any(run.origins.get(name, "default") != "default" for run in runs)
    return is_chosen or differs(runs, name)


def differs(runs, name):
    return any(run.settings.get(name) != runs[0].settings.get(name) for run in runs[1:])


def name_setting(runs, name):
    """The name of a setting, marked if its values differ."""
    return join([name, element("span", " ≠", class_="differs", title="differs")]) if differs(runs, name) else name


def describe_setting(run, name):
    """A value and where it comes from."""
    if name not in run.settings:
        return NOTHING
    origin = run.origins.get(name)
    where = element("small", f" {as_text(origin)}") if origin else None
    return join([as_text(run.settings[name]), where])


def wrap_command(command):
    """A command line with every flag in a line of its own."""
    try:
        words = shlex.split(command)
    except ValueError:
        return command
    lines = [""]
    for word in words:
        if word.startswith("--"):
            lines.append("   ")
        lines[-1] += f" {shlex.quote(word)}"
    return " \\\n".join(lines).strip()


def describe_files(runs, options):
    """What is recorded about the weights, and the end of the log."""
    parts = []
    for run in runs:
        parts += [fold(join([name_run(runs, run), f" {file}"]), tell_facts(run, file)) for file in run.facts]
        if run.log:
            parts.append(fold(join([name_run(runs, run), " log.txt, its end"]), element("pre", "\n".join(run.log))))
    missing = list_missing(runs, "facts about weights", lambda run: run.facts)
    return parts + missing + list_missing(runs, "log.txt", lambda run: run.log)


def tell_facts(run, file):
    rows = [[name, as_text(value)] for name, value in run.facts[file].items()]
    return table(f"What is recorded about {file} of {run.name}", ["fact", "value"], rows)
