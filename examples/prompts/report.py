"""What the walkthrough with prompts shows: a table, pictures, and whether the project and diffusers draw the same."""

import json

import diffusers
import numpy as np
import torch
import transformers
from draw import draw
from networks import PROMPTS, SIZE, SPELLINGS
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from sklearn.svm import SVC

from diffusion.pipeline_call import open_pipeline
from engine.checkpoint import Weights, read_facts
from families import stack_layers

NETWORKS = ("teacher", "student")
COLUMNS = ("network", "layers", "parameters", "words", "figures", "read as asked", "of the teacher")
CHECKED = 40  # pictures that the project draws too
ENOUGH = 0.95  # of the pictures read as asked, and of the teacher's share
ZOOM = 6


def read_digits(pictures):
    """The digits that a classifier of the data set sees in grey pictures (N, SIZE, SIZE) from 0 to 1."""
    digits = load_digits()
    return SVC(gamma=0.001, C=10).fit(digits.data, digits.target).predict(pictures.reshape(len(pictures), -1) * 16)


def measure(name, who, file, folder):
    """A dict with the columns of the table, but the last one: of a network and its pictures."""
    pictures, weights = np.load(folder / f"{who}.npy"), Weights(file, "--ckpt")
    right = read_digits(pictures) == np.arange(len(pictures)) % 10  # prompts go from zero to nine in every spelling
    spelling = np.arange(len(pictures)) // 10 % len(SPELLINGS)
    values = [f"{name} {who}", sum(stack_layers(weights.facts["model"])), weights.count_parameters()]
    shares = [float(right[spelling == number].mean()) for number in range(len(SPELLINGS))]
    return dict(zip(COLUMNS, [*values, *shares, float(right.mean())], strict=False))


def compare(name, who, file, folder, drawing):
    """What differs between a network in the project and its exported pipeline, as lines of text; none: nothing.

    The project's network draws in the pipeline that it was trained for; the exported pipeline has drawn in a process of
    its own, with diffusers alone.
    """
    weights, exported = Weights(file, "--ckpt"), folder / f"{who}-pipeline" / "transformer"
    model, written = weights.facts["model"], load_file(exported / "diffusion_pytorch_model.safetensors")
    net = weights.build(model, weights.read_config(model), "cpu").eval()
    ours = draw(open_pipeline(folder / "pipeline", net), PROMPTS, **{**drawing, "pictures": CHECKED})
    gap = float(np.abs(ours - np.load(folder / f"{who}.npy")[:CHECKED]).max())
    state = weights.state
    same = written.keys() == state.keys() and all(torch.equal(written[key], state[key]) for key in written)
    print(f"{name} {who}: weights {'equal' if same else 'differ'}, pictures differ by at most {gap:.1g}", flush=True)
    wrong = [] if same else [f"{name} {who}: the exported weights are not those of {file}"]
    return wrong + ([] if gap <= 1e-6 else [f"{name} {who}: diffusers alone draws something else ({gap:.3g})"])


def judge(teacher, student):
    """What is too bad in the rows of a network, as lines of text."""
    shares = [teacher["read as asked"], student["of the teacher"]]
    texts = ["{} is read as asked in {:.1%}, not 95 %", "{} is at {:.1%} of its teacher, not 95 %"]
    rows = (teacher["network"], student["network"])
    return [text.format(row, share) for text, row, share in zip(texts, rows, shares, strict=True) if share < ENOUGH]


def format_row(row):
    """A row of the Markdown table."""
    cells = [f"{row[key]:.1%}" if isinstance(row[key], float) else f"{row[key]:,}" for key in COLUMNS[1:]]
    return f"| {row['network']} | {' | '.join(cells)} |"


def draw_grid(folder, path):
    """Write a picture: two rows of digits by the teacher, one in every spelling, and two by the student."""
    rows = [np.load(folder / f"{who}.npy")[: len(PROMPTS)] for who in NETWORKS]
    tiles = np.pad(np.concatenate(rows), ((0, 0), (0, 1), (0, 1)), constant_values=1)
    grid = tiles.reshape(-1, 10, SIZE + 1, SIZE + 1).swapaxes(1, 2).reshape(-1, 10 * (SIZE + 1))
    pixels = np.kron(grid, np.ones((ZOOM, ZOOM)))
    Image.fromarray((pixels * 255).round().astype(np.uint8)).save(path)


def write(run, files, drawing, stages, seconds):
    """Measure and compare all networks, print the table, write report.md, report.json and the pictures.

    files: {name: files of weights, of the teacher and the student}. stages: {name: {stage: seconds}}. Returns what is
    wrong or missed, as lines of text.
    """
    torch.set_num_threads(1)  # as in the processes that have drawn
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    rows, missed, kept = [], [], {}
    for name, pair in files.items():
        both = [measure(name, who, file, run / name) for who, file in zip(NETWORKS, pair, strict=True)]
        for row in both:
            row["of the teacher"] = row["read as asked"] / max(both[0]["read as asked"], 1e-9)
        for who, file in zip(NETWORKS, pair, strict=True):
            missed += compare(name, who, file, run / name, drawing)
        kept[name] = read_facts(run / name / "pruned")["kept"]
        missed += judge(*both)
        rows += both
        draw_grid(run / name, run / f"{name}.png")
    heads = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    lines = [*heads, *map(format_row, rows), ""]
    lines += [f"Layers of the {name} teacher that are left: {', '.join(map(str, kept[name]))}." for name in kept]
    for name, times in stages.items():
        lines.append(f"Seconds of {name}: " + ", ".join(f"{stage} {time:.0f}" for stage, time in times.items()) + ".")
    lines.append(f"All stages took {seconds / 60:.1f} minutes.")
    (run / "report.md").write_text("\n".join(lines) + "\n")
    told = {"seconds": seconds, "stages": stages, "networks": rows, "kept": kept, "missed": missed}
    (run / "report.json").write_text(json.dumps(told, indent=1))
    print("\n" + "\n".join(lines) + f"\nReport: {run}/report.md, " + ", ".join(f"{name}.png" for name in files))
    return missed
