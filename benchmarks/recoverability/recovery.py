"""Recipes of recovery, compared at equal compute."""

import math
from dataclasses import dataclass, field

import torch
from torch import nn

from benchmarks.recoverability.problem import make_network
from benchmarks.recoverability.training import train_all
from diffusion.objectives import TrainStep
from pruning.distillation import DistillStep, feature_weight, layer_pairs
from pruning.surgery import stack_depths


@dataclass(frozen=True)
class Recovery:
    """How a cut network is recovered.

    distil: options of DistillStep; None: fine-tuning. init: as --init of prune_by_learning.py. intervals: share of the
    steps in which the parts learn apart. budget: compute, as a share of what the others get. planted: whether the
    teacher's hidden states have extremes, see Planted.
    """

    distil: dict | None = field(default_factory=dict)
    init: str = "kept"
    intervals: float = 0.0
    budget: float = 1.0
    planted: bool = False


RELATIVE = {"beta": 1.0, "relative": True}
RECIPES = {
    "fine-tuning": Recovery(None),
    "output KD": Recovery({"beta": 0.0}),
    "representation KD": Recovery({"k": math.inf}),
    "Masked KD, threshold 0.1": Recovery({"k": 0.1}),
    "Masked KD, threshold 1": Recovery({"k": 1.0}),
    "Masked KD": Recovery(),
    "Masked KD, threshold 4": Recovery({"k": 4.0}),
    "relative representation KD": Recovery({**RELATIVE, "k": math.inf}),
    "relative Masked KD": Recovery(RELATIVE),
    "Masked KD from averages": Recovery(init="average"),
    "Masked KD after intervals": Recovery(intervals=0.2),
    "fine-tuning from learned": Recovery(None, init="learned"),
    "Masked KD from learned": Recovery(init="learned"),
    "representation KD, planted": Recovery({"k": math.inf}, planted=True),
    "Masked KD, planted": Recovery(planted=True),
    "relative representation KD, planted": Recovery({**RELATIVE, "k": math.inf}, planted=True),
    "relative Masked KD, planted": Recovery(RELATIVE, planted=True),
    "half of Masked KD": Recovery(budget=0.5),
    "half of Masked KD from learned": Recovery(init="learned", budget=0.5),
    "half of relative representation KD from learned": Recovery(
        {**RELATIVE, "k": math.inf}, init="learned", budget=0.5
    ),
}


class Planted(nn.Module):
    """A teacher whose hidden states, as they are observed, have extremes; what it computes stays as it was.

    In the same two of a thousand places (token, channel) of every layer there is SIZE times the sample's deviation
    more, as in trained transformers a few places hold massive activations (arXiv 2402.17762).
    """

    SHARE, SIZE = 0.002, 50.0

    def __init__(self, net):
        super().__init__()
        self.net, self.training = net, False

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.net, name)

    def forward(self, *inputs, observe=None, **options):
        if observe:
            options["observe"] = lambda layer, before, after: observe(layer, before, self.plant(after))
        return self.net(*inputs, **options)

    def plant(self, hidden):
        """Hidden states (N, T, D) with extremes."""
        generator = torch.Generator().manual_seed(0)
        count = max(1, round(self.SHARE * hidden[0].numel()))
        places = torch.randperm(hidden[0].numel(), generator=generator)[:count].to(hidden.device)
        planted = hidden.flatten(1).clone()
        planted[:, places] += self.SIZE * planted.std(1, keepdim=True)
        return planted.view_as(hidden)


def price_of(depth, whole):
    """Compute of a step, in steps of fine-tuning a network of half the depth; whole: 0 if there is no teacher.

    By passes through blocks: three for a forward and backward of the student, one for the teacher's forward.
    """
    return (3 * depth + whole) / (3 * HALF)


HALF = 6  # layers


def recover(problem, pictures, student, teacher, recipe, seed, compute, groups=None, look=None):
    """The network of state dict `student`, recovered for as much compute as so many steps of fine-tuning take.

    groups: that pair the layers, see layer_pairs. look(network, compute): called ten times on the way.
    """
    net, objective = make_network(problem, pictures, student), problem.make_objective()
    depth, whole = (sum(stack_depths(state).values()) for state in (student, teacher))
    step, price = TrainStep(net, objective), price_of(depth, 0)
    if recipe.distil is not None:
        price = price_of(depth, whole)
        pairs = layer_pairs(depth, whole, groups)
        source = make_network(problem, pictures, teacher)
        source = Planted(source) if recipe.planted else source
        step = DistillStep(net, source, objective, pairs, **recipe.distil)
    steps, beta = round(compute * recipe.budget / price), getattr(step, "beta", 0.0)

    def before(k):
        step.intervals = k < recipe.intervals * steps
        step.beta = feature_weight(beta, k, steps)

    def after(k):
        if look and (k + 1) % max(1, steps // 10) == 0:
            look(net.eval(), (k + 1) * price)
            net.train()

    train_all(step, problem.lr, pictures, problem.batch_size, steps, 200 + seed, before, after)
    return net
