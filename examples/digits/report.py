"""What the digits walkthrough shows: a table and pictures, all measured from the files that its stages left."""

import json
import time

import matplotlib
import numpy as np
from sklearn.datasets import load_digits
from sklearn.svm import SVC

from engine.checkpoint import read_checked, read_facts, read_weights
from engine.cli import SAMPLING_FLAGS, make_parser, parse
from engine.run import Run
from engine.sampling import ImageDraws, load_for_sampling, sample_images, told_by_ckpt
from evaluation.metrics import frechet_distance_of_features
from families import stack_layers

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLUMNS = ("model", "layers", "parameters", "images/s", "Frechet distance", "read as asked", "kept layers")


def load_samples(folder):
    """Samples of a model: grey values 0..16 as in the data set (N, 64), and the labels they were asked for (N,)."""
    packed = np.load(next(folder.glob("*.npz")))
    return packed["arr_0"].mean(-1).reshape(len(packed["arr_0"]), -1) / 255 * 16, packed["arr_1"]


def measure_speed(files, settings, rounds=5, n=50):
    """Images per second of networks sampled in turns, so that a busy machine slows all alike: medians over rounds."""
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value)) if word != "True"]
    loaded = []
    for file in files:
        parser = make_parser("sample", "", SAMPLING_FLAGS + " seed", "sample")
        args = parse(parser, ["--ckpt", str(file), *flags], told_by_ckpt)
        run = Run(args)
        loaded.append((run, *load_for_sampling(run, args, read_weights(file, "--ckpt"), file)))
    seconds = np.zeros((rounds + 1, len(files)))
    for row in seconds:  # the first round warms up
        for i, (run, net, codec, sampler, shape) in enumerate(loaded):
            draws = ImageDraws(0, range(n), shape, run.device)
            start = time.perf_counter()
            sample_images(run, net, sampler, codec, draws, draws.labels(10))
            row[i] = time.perf_counter() - start
    return (n / np.median(seconds[1:], axis=0)).tolist()


def measure(files, folders, settings):
    """One dict per model with the columns of the table."""
    digits = load_digits()
    reader = SVC(gamma=0.001, C=10).fit(digits.data, digits.target)
    speed = dict(zip((12, 6), measure_speed([files["teacher"], files["learned"]], settings), strict=True))
    rows = []
    for name, file in files.items():
        model = read_facts(file)["model"]
        state, layers = read_checked(file, "", model)[0], sum(stack_layers(model))
        samples, asked = load_samples(folders[name])
        values = (
            name,
            layers,
            sum(tensor.numel() for tensor in state.values()),
            round(speed[layers], 1),
            round(frechet_distance_of_features(samples, digits.data), 2),
            round(float((reader.predict(samples) == asked).mean()), 4),
            read_facts(file).get("kept", "all"),
        )
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def format_table(rows):
    """The rows as a Markdown table."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for row in rows:
        shown = {**row, "parameters": f"{row['parameters']:,}", "read as asked": f"{row['read as asked']:.1%}"}
        lines.append("| " + " | ".join(str(shown[column]) for column in COLUMNS) + " |")
    return "\n".join(lines)


def draw_samples(folders, rows, path):
    """One row of pictures per model: two of every digit asked for."""
    figure, axes = plt.subplots(len(rows), 1, figsize=(9, 0.62 * len(rows)), layout="constrained")
    for axis, row in zip(axes, rows, strict=True):
        samples, asked = load_samples(folders[row["model"]])
        chosen = np.concatenate([np.flatnonzero(asked == digit)[:2] for digit in range(10)])
        strip = np.concatenate(list(np.pad(samples[chosen].reshape(-1, 8, 8), ((0, 0), (0, 0), (0, 1)))), axis=1)
        axis.imshow(strip, cmap="gray", vmin=0, vmax=16)
        axis.set_axis_off()
        axis.set_title(f"{row['model']} ({row['layers']} layers)", loc="left", fontsize=8, pad=2)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def read_metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def draw_losses(run, family, path):
    """The prediction error of every run over its steps: `gt` when distilling, `mse` of DiT and MAR, else the loss."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained", sharey=True)
    for folder in sorted((run / "outputs").iterdir()):
        rows = [row for row in read_metrics(folder) if "loss" in row]
        error = next(name for name in ("mse", "gt", "loss") if name in rows[0])
        is_recovery = "D6" in folder.name
        axis = axes[int(is_recovery)]
        label = folder.name.partition(f"-{family}")[0].replace("-ft", " + fine-tuning").replace("-kd", " + Masked KD")
        axis.plot([row["step"] for row in rows], [row[error] for row in rows], label=label, linewidth=1)
    for axis, title in zip(axes, ("12 layers", "recovery, 6 layers"), strict=True):
        axis.set(title=title, xlabel="step", ylabel="prediction error", yscale="log")
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_decisions(run, path, depth=12):
    """Layers kept over the steps of gate learning, with the confidence of their group as opacity."""
    rows = [row for row in read_metrics(next((run / "outputs").glob("learn_mask-*"))) if "kept" in row]
    figure, axis = plt.subplots(figsize=(9, 3.2), layout="constrained")
    colours = plt.get_cmap("tab20")
    for row in rows:
        for group, layer in enumerate(row["kept"]):  # 1:2 groups: one layer is kept per group
            opacity = max(0.0, row["confidence"][group] - 0.5) / 0.5
            axis.scatter(row["step"], layer, color=colours(layer), alpha=0.1 + 0.9 * opacity, s=40, linewidths=0)
    axis.set(xlabel="step", ylabel="kept layer", yticks=range(depth), title="Decisions while the gates learn")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write(run, files, folders, settings, family, seconds):
    """Measure all models, print the table, and write report.md, report.json and the pictures into the run folder."""
    rows = measure(files, folders, settings)
    table = format_table(rows)
    minutes = f"All stages took {seconds / 60:.1f} minutes."
    (run / "report.md").write_text(f"{table}\n\n{minutes}\n")
    (run / "report.json").write_text(json.dumps({"seconds": seconds, "models": rows}, indent=1))
    draw_samples(folders, rows, run / "samples.png")
    draw_losses(run, family, run / "losses.png")
    draw_decisions(run, run / "decisions.png")
    print(f"\n{table}\n\n{minutes}\nReport: {run}/report.md, samples.png, losses.png, decisions.png", flush=True)
