"""What the digits walkthrough shows: a table and pictures, all measured from the files that its stages left."""

import json
import time

import numpy as np
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.svm import SVC

from benchmarks import pictures
from engine.checkpoint import Weights, read_facts
from engine.run import Run
from engine.sampling import SamplingPlan
from engine.vae import LatentSpace
from evaluation.metrics import frechet_distance_of_features
from families import family_of, stack_layers
from reporting.markup import element
from reporting.page import write_page
from reporting.parts import table
from reporting.pictures import embed_picture
from reporting.runs import read_run

SIZE, CLASSES = 8, 10  # pixels per side, digits
COLUMNS = ("model", "layers", "parameters", "images/s", "Frechet distance", "guided", "read as asked", "kept layers")


def load_samples(folder):
    """Samples of a model: grey values 0..16 as in the data set (N, 64), and the labels they were asked for (N,)."""
    packed = np.load(next(folder.glob("*.npz")))
    return packed["arr_0"].mean(-1).reshape(len(packed["arr_0"]), -1) / 255 * 16, packed["arr_1"]


def plan_sampling(file, settings):
    """How sample_ddp.py samples from a file with these flags; flags not given are the family's defaults."""
    weights = Weights(file, "--ckpt")
    model = weights.facts["model"]
    family, given = family_of(model), {name.replace("-", "_"): value for name, value in settings.items()}
    own = {name: given.pop(name, value) for name, value in family.own_defaults("sample").items()}
    space = LatentSpace(SIZE, weights.facts["vae"], CLASSES, family.latents)
    plan = SamplingPlan(model, weights, space, own, **given)
    plan.check()
    return plan


def measure_speed(files, settings, rounds=5, n=50):
    """Images per second of networks sampled in turns, so that a busy machine slows all alike: medians over rounds."""
    run = Run()
    samplers = [plan_sampling(file, settings).load(run) for file in files]
    seconds = np.zeros((rounds + 1, len(files)))
    for row in seconds:  # the first round warms up
        for i, sampler in enumerate(samplers):
            draws = sampler.draws(0, range(n))
            start = time.perf_counter()
            sampler.sample(draws, draws.labels(CLASSES))
            row[i] = time.perf_counter() - start
    return (n / np.median(seconds[1:], axis=0)).tolist()


def count_layers(file):
    """Layers of the model that a file holds."""
    return sum(stack_layers(read_facts(file)["model"]))


def measure(files, folders, settings):
    """One dict per model with the columns of the table.

    folders: {kind: {model: samples}}. The Frechet distance is that of the unguided samples, which have to be as varied
    as the data, and beside it that of the guided ones, by which the digits are read.
    """
    digits = load_digits()
    reader = SVC(gamma=0.001, C=10).fit(digits.data, digits.target)
    timed = [files["teacher"], files["learned"]]
    depths = [count_layers(file) for file in timed]
    speed = dict(zip(depths, measure_speed(timed, settings), strict=True))
    rows = []
    for name, file in files.items():
        layers, weights = count_layers(file), Weights(file, "--ckpt")
        (plain, _), (samples, asked) = (load_samples(folders[kind][name]) for kind in ("unguided", "guided"))
        distances = [round(frechet_distance_of_features(each, digits.data), 2) for each in (plain, samples)]
        correct = round(float((reader.predict(samples) == asked).mean()), 4)
        values = (name, layers, weights.count_parameters(), round(speed[layers], 1), *distances, correct)
        rows.append(dict(zip(COLUMNS, (*values, weights.facts.get("kept", "all")), strict=True)))
    return rows


def format_table(rows):
    """The rows as a Markdown table."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (COLUMNS, *format_cells(rows))]
    return "\n".join([lines[0], "|---" * len(COLUMNS) + "|", *lines[1:]])


def format_cells(rows):
    """The rows as text, one list a row."""
    shown = [
        {**row, "parameters": f"{row['parameters']:,}", "read as asked": f"{row['read as asked']:.1%}"} for row in rows
    ]
    return [[str(row[column]) for column in COLUMNS] for row in shown]


def draw_samples(folders, rows, path):
    """One row of pictures per model, one of every digit asked for: guided on the left, unguided on the right."""
    figure = Figure((12, 0.78 * len(rows)), layout="constrained")
    for axes, row in zip(figure.subplots(len(rows), 2), rows, strict=True):
        for axis, kind in zip(axes, ("guided", "unguided"), strict=True):
            samples, asked = load_samples(folders[kind][row["model"]])
            chosen = [np.flatnonzero(asked == digit)[0] for digit in range(CLASSES)]
            pictures = np.pad(samples[chosen].reshape(-1, SIZE, SIZE), ((0, 0), (0, 0), (0, 1)))
            axis.imshow(np.concatenate(list(pictures), axis=1), cmap="gray", vmin=0, vmax=16)
            axis.set_axis_off()
            axis.set_title(f"{row['model']} ({row['layers']} layers), {kind}", loc="left", fontsize=10, pad=3)
    figure.savefig(path, dpi=110)


def draw_losses(run, family, depths, path):
    """The prediction error of every run over its steps; depths: layers of the teacher and of its students."""
    figure, curves = Figure((9, 3.2), layout="constrained"), ({}, {})
    for folder in sorted((run / "outputs").iterdir()):
        is_recovery = not folder.name.startswith(("teacher", "learn_mask"))
        label = folder.name.partition(f"-{family}")[0].replace("-ft", " + fine-tuning").replace("-kd", " + Masked KD")
        curves[is_recovery][label] = pictures.read_metrics(folder)
    titles = (f"{depths[0]} layers", f"recovery, {depths[1]} layers")
    for axis, title, those in zip(figure.subplots(1, 2, sharey=True), titles, curves, strict=True):
        pictures.plot_losses(axis, those)
        axis.set_title(title)
    figure.savefig(path, dpi=110)


def write_runs(run, rows, family):
    """Write report.html: the table and the samples, then all runs side by side."""
    found = sorted((run / "outputs").iterdir(), key=lambda path: path.name)
    folders = sorted(found, key=lambda path: [not path.name.startswith(word) for word in ("teacher", "learn_mask")])
    runs = [read_run(folder, lambda model: sum(stack_layers(model))) for folder in folders]
    samples = embed_picture(run / "samples.png", "Digits sampled by every model, with guidance and without")
    digits = element("figure", samples, class_="wide", role="region", aria_label="Digits", tabindex="0")
    extras = [("Models", [table("Models", COLUMNS, format_cells(rows), "numbers")]), ("Digits", [digits])]
    write_page(run / "report.html", f"Handwritten digits with a {family}", runs, extras=extras)


def write(run, files, folders, settings, family, seconds):
    """Measure all models, print the table, and write report.md, .json, .html and the pictures into the run folder."""
    rows = measure(files, folders, settings)
    text = format_table(rows)
    minutes = f"All stages took {seconds / 60:.1f} minutes."
    (run / "report.md").write_text(f"{text}\n\n{minutes}\n")
    (run / "report.json").write_text(json.dumps({"seconds": seconds, "models": rows}, indent=1))
    draw_samples(folders, rows, run / "samples.png")
    depths = [count_layers(files[name]) for name in ("teacher", "learned")]
    draw_losses(run, family, depths, run / "losses.png")
    pictures.draw_decisions(next((run / "outputs").glob("learn_mask-*")), run / "decisions.png")
    write_runs(run, rows, family)
    pages = "report.html, report.md, samples.png, losses.png, decisions.png"
    print(f"\n{text}\n\n{minutes}\nReport: {run}/{pages}", flush=True)
