"""Pictures of what the scripts have written, from a run folder, packed samples or a file of weights.

python -m benchmarks.pictures decisions outputs/learn_mask-DiT-XL-1-2      layers kept while the gates learn
python -m benchmarks.pictures losses outputs/D14-ft-DiT-D14-2 outputs/D14-kd-DiT-D14-2      recovery curves
python -m benchmarks.pictures samples samples/teacher.npz samples/D14.npz      grids side by side
python -m benchmarks.pictures activations pretrained/DiT-XL-2-256x256.pt --data-path data/features      extremes
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure


def read_metrics(folder):
    """Rows of a run folder's metrics.jsonl."""
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def read_settings(folder):
    """Settings of a run."""
    return json.loads((Path(folder) / "config.json").read_text())["settings"]


def read_groups(folder):
    """N:M groups of a run of prune_by_learning.py."""
    from families import model_config, stack_layers
    from pruning.patterns import format_pattern, parse_groups

    settings = read_settings(folder)
    model, pattern = settings["model"], settings["pattern"]
    return parse_groups(pattern or format_pattern(model_config(model)["groups"]), stack_layers(model))


def count_candidates(folder):
    """Ways that every group of such a run could choose its layers."""
    contiguous = read_settings(folder).get("candidates") == "contiguous"
    return [n + 1 if contiguous and n < m else math.comb(m, n) for n, m in read_groups(folder)]


def thin(rows, limit=80):
    """Rows at even distances, at most so many, and the last."""
    return [*rows[: -1 : -(-len(rows) // limit) or 1], *rows[-1:]]


def draw_decisions(folder, path):
    """Layers kept over the steps of gate learning; the more opaque, the surer is the group of a layer.

    A group for which all candidates are alike is nearly white. Depth and groups are those of the run.
    """
    groups = read_groups(folder)
    depth = sum(m for _, m in groups)
    group_of = np.repeat(np.arange(len(groups)), [m for _, m in groups])
    rows = thin([row for row in read_metrics(folder) if "kept" in row])
    unsure = np.array([1 / count if count > 1 else 0 for count in count_candidates(folder)])
    figure, colours = Figure((9, 1.5 + 0.16 * depth), layout="constrained"), colormaps["tab20"]
    axis = figure.subplots()
    for row in rows:
        sure = np.clip((np.array(row["confidence"]) - unsure) / (1 - unsure), 0, 1)
        shades = [
            colours(group_of[layer] % colours.N, alpha=0.1 + 0.9 * sure[group_of[layer]]) for layer in row["kept"]
        ]
        axis.scatter([row["step"]] * len(row["kept"]), row["kept"], color=shades, s=40, linewidths=0)
    for edge in np.cumsum([m for _, m in groups])[:-1]:
        axis.axhline(edge - 0.5, color="0.9", linewidth=0.5)
    axis.set(xlabel="step", ylabel="kept layer", title="Decisions while the gates learn", ylim=(-0.5, depth - 0.5))
    axis.set_yticks(range(0, depth, -(-depth // 16)))
    figure.savefig(path, dpi=110)


def error_of(row):
    """The prediction error of a logged step: `gt` when distilling, `mse` of DiT and MAR, else the loss."""
    return row[next(name for name in ("mse", "gt", "loss") if name in row)]


def plot_losses(axis, curves):
    """Curves {label: rows of metrics} into axes."""
    for label, rows in curves.items():
        rows = [row for row in rows if "loss" in row]
        axis.plot([row["step"] for row in rows], [error_of(row) for row in rows], label=label, linewidth=1)
    axis.set(xlabel="step", ylabel="prediction error", yscale="log")
    axis.legend(fontsize=7)


def draw_losses(folders, path):
    """The prediction error of training runs over their steps."""
    figure = Figure((6, 3.6), layout="constrained")
    plot_losses(figure.subplots(), {str(folder): read_metrics(folder) for folder in folders})
    figure.savefig(path, dpi=110)


def draw_samples(files, path, columns=8):
    """The first pictures of packed samples, one row a file."""
    figure = Figure((columns * 1.1, 1.25 * len(files)), layout="constrained")
    for axis, file in zip(np.atleast_1d(figure.subplots(len(files))), files, strict=True):
        pictures = np.load(file)["arr_0"][:columns]
        axis.imshow(np.concatenate(list(pictures), axis=1))
        axis.set_axis_off()
        axis.set_title(Path(file).stem, loc="left", fontsize=8, pad=2)
    figure.savefig(path, dpi=110)


EDGES = np.linspace(0, 12, 61)  # of the histogram, in standard deviations; beyond counts as the last


class Activations:
    """Histograms (L, bins) of how many deviations hidden states are from their sample's mean; an `observe` argument."""

    def __init__(self, depth):
        self.counts, self.largest = np.zeros((depth, len(EDGES) - 1)), np.zeros(depth)

    def __call__(self, layer, before, after):
        flat = after.flatten(1).double()
        off = ((flat - flat.mean(1, keepdim=True)).abs() / flat.std(1, keepdim=True)).flatten().cpu().numpy()
        self.counts[layer] += np.histogram(np.minimum(off, EDGES[-1]), EDGES)[0]
        self.largest[layer] = max(self.largest[layer], off.max())


def measure_activations(ckpt, data_path, nsamples=64, batch_size=16):
    """Activations of a network on encoded latents or pictures, noised as in training."""
    import torch

    from engine.calibration import Calibration
    from engine.checkpoint import Weights
    from engine.run import Run
    from engine.vae import LatentSpace
    from families import describe_shapes, family_of
    from pruning.scores import count_layers

    run, weights = Run(), Weights(ckpt, "CKPT")
    model = weights.facts.get("model") or describe_shapes(weights.file.shapes)["model"]
    config, family = weights.read_config(model), family_of(model)
    classes, vae = config["num_classes"], weights.facts.get("vae", family.latents.usual)
    size = config["input_size"] * (1 if vae == "none" else family.latents.factor)
    space = LatentSpace(size, vae, classes, family.latents)
    net = weights.build(model, config, run.device).eval()
    objective, found = (
        family.make_objective(**family.own_defaults("train")).to(run.device),
        Activations(count_layers(net)),
    )
    calibration = Calibration(data_path, space, nsamples, batch_size, seed=0, mirror=0.5)
    with torch.inference_mode():
        for x, y in calibration.batches(run.device, config["in_channels"]):
            objective.predict(net, x, y, objective.draw(net, x, y), observe=found)
    return found


def draw_activations(found, path, threshold=2.0):
    """One histogram a layer; what Masked KD leaves out at this threshold is red, the largest a tick."""
    depth = len(found.counts)
    rows = -(-depth // 4)
    figure = Figure((10, 1.5 * rows), layout="constrained")
    axes = figure.subplots(rows, 4, sharex=True, sharey=True, squeeze=False).flatten()
    colours = np.where(EDGES[:-1] < threshold, "0.6", "tab:red")
    for layer, axis in enumerate(axes):
        axis.set_visible(layer < depth)
        if layer < depth:
            counts = found.counts[layer]
            axis.bar(EDGES[:-1], counts / counts.sum(), np.diff(EDGES), align="edge", color=colours)
            extreme = counts[EDGES[:-1] >= threshold].sum() / counts.sum()
            title = f"layer {layer}: {extreme:.1%}, largest {found.largest[layer]:.0f}"
            axis.set(yscale="log")
            axis.set_title(title, fontsize=7)
    figure.supxlabel("standard deviations from the sample's mean", fontsize=8)
    figure.savefig(path, dpi=110)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    for kind, what in (("decisions", "run folder"), ("losses", "run folders"), ("samples", ".npz files")):
        each = kinds.add_parser(kind)
        each.add_argument("inputs", nargs="+" if what.endswith("s") else 1, metavar="PATH", help=what)
    each = kinds.add_parser("activations")
    each.add_argument("inputs", nargs=1, metavar="CKPT", help="file of weights")
    each.add_argument("--data-path", required=True, help="encoded latents, or pictures in class folders")
    for each in kinds.choices.values():
        each.add_argument("--output", type=Path, help="the picture (default: KIND.png)")
    return parser.parse_args()


def main():
    args = parse_args()
    path = args.output or Path(f"{args.kind}.png")
    if args.kind == "activations":
        draw_activations(measure_activations(*args.inputs, args.data_path), path)
    elif args.kind == "decisions":
        draw_decisions(*args.inputs, path)
    else:
        {"losses": draw_losses, "samples": draw_samples}[args.kind](args.inputs, path)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
