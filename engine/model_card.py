"""A model card: README.md in the form of the Hugging Face Hub, from the facts that are recorded with weights."""

import json
import os
from pathlib import Path

from engine.checkpoint import read_facts
from engine.errors import InputError
from engine.files import read_json, write_atomically
from families import RELEASES

ABOUT = {  # fact -> how the card says it
    "pattern": "pattern of the cut",
    "criterion": "layers chosen by",
    "confidence": "confidence of the gates",
    "init": "kept layers started from",
    "vae": "autoencoder",
    "num_classes": "classes",
    "num_sampling_steps": "steps of the sampler, of which alone it knows the times",
}
METRICS = ("is", "fid", "sfid", "precision", "recall")


def trace_source(name, facts):
    """What weights were made from, nearest first: names of files, as long as there are facts beside them."""
    found, facts = [str(name)], facts or read_facts(name)
    while isinstance(facts.get("source"), str) and facts["source"] not in found:
        found.append(facts["source"])
        facts = read_facts(facts["source"])
    return found


def find_release(sources):
    """The published file that weights come from in the end, by its name, or None."""
    known = [RELEASES[Path(source).name] for source in sources if Path(source).name in RELEASES]
    return known[-1] if known else None


def read_metrics(path):
    """What evaluator.py --json wrote. Raises InputError for another file."""
    metrics = read_json("--metrics", path)
    counts = all(type(metrics.get(name)) is int for name in ("samples", "reference_images"))
    numbers = [metrics[name] for name in METRICS if name in metrics]
    if not counts or not numbers or not all(type(number) in (int, float) and abs(number) < 1e9 for number in numbers):
        raise InputError(f"--metrics {path}: no numbers of the evaluator; expected what evaluator.py --json writes")
    return metrics


def write_card(path, model, sources, facts, opening, data=None, metrics=None):
    """Write the card of a network called `model`.

    sources: of trace_source. facts: of the weights. opening: lines of Python that open what the card lies beside. data:
    name of the data set. metrics: what evaluator.py --json wrote.
    """
    release = find_release(sources)
    head = {"license": release.license if release and release.license else "other", "library_name": "diffusers"}
    if release and release.base_model:
        head["base_model"] = release.base_model
    if data:
        head["datasets"] = [data]
    title = Path(model).name if os.path.isabs(model) else model  # a folder's place is nobody's business
    facts = {**facts, "vae": Path(facts["vae"]).name} if os.path.isabs(str(facts.get("vae"))) else facts
    lines = ["---", *(f"{name}: {json.dumps(value)}" for name, value in head.items()), "---", "", f"# {title}", ""]
    lines += describe_origin(sources, facts, release)
    lines += ["", "```python", *opening, "```", "", "## Data and metrics", ""]
    lines += [f"Trained on {data}." if data else "The data it was trained on are not recorded here.", ""]
    lines += describe_metrics(metrics) if metrics else ["No metrics are recorded here."]
    text = "\n".join(lines) + "\n"
    write_atomically(path, lambda temporary: Path(temporary).write_text(text))


def show(value):
    """What a file tells, as words on one line of the card."""
    return " ".join(str(value).split()).replace("<", "&lt;")


def describe_origin(sources, facts, release):
    """Where the weights come from, what was kept, and whose licence holds."""
    lines = ["A diffusion transformer, made shallow with TinyFusion (arXiv 2412.01199)." if "kept" in facts else ""]
    names = [Path(source).name for source in sources]
    lines += [f"- weights: {names[0]}" + "".join(f", made from {name}" for name in names[1:])]
    if "kept" in facts:
        lines.append(f"- layers that were kept of the original: {show(facts['kept'])}")
    lines += [f"- {words}: {show(facts[name])}" for name, words in ABOUT.items() if facts.get(name) is not None]
    if release and release.license:
        lines.append(f"- licence of the base weights: {release.license}, which holds for these too")
    else:
        lines.append("- the licence of the base weights is not known here; it holds for these too")
    return [line for line in lines if line]


def describe_metrics(metrics):
    """A table of what the evaluator measured."""
    names = [name for name in METRICS if name in metrics]
    rows = [names, ["---"] * len(names), [f"{metrics[name]:.4g}" for name in names]]
    table = ["| " + " | ".join(row) + " |" for row in rows]
    counts = f"{metrics['samples']:,} samples against {metrics['reference_images']:,} images of {metrics.get('ref')}"
    return [*table, "", f"{counts}, by the protocol of the ADM evaluator."]
