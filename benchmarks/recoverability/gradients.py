"""`python -m benchmarks.recoverability.gradients --data digits`: which way the gates of 1:2 are pushed at the start.

The gradient of the expected loss is exact, from the losses of all choices, which are as likely as each other then. The
straight-through gradient at three temperatures and that from pairs are means over draws on the same pictures, noise
and times. One number a group: below zero pushes towards its first layer. A teacher is read from the results' folder.
"""

import torch

from benchmarks.recoverability import problem
from benchmarks.recoverability.__main__ import choose_problem, parse_args
from benchmarks.recoverability.jobs import choices_to_recover
from diffusion.objectives import TrainStep
from engine.run import seed_everything
from pruning.pairs import PairStep
from pruning.patterns import parse_pattern
from pruning.scores import measure_losses
from pruning.search import choice_masks

PICTURES, DRAWS = 256, 20


class FixedDraw:
    """An objective that always gives the same draw."""

    def __init__(self, objective, draw):
        self.objective, self.fixed = objective, draw

    def draw(self, net, x, y):
        return self.fixed

    def __getattr__(self, name):
        return getattr(self.objective, name)


def exact_gradient(net, objective, x, y, depth):
    """Of the expected loss, by the logits of the first candidates (groups,), all choices being as likely."""
    choices = choices_to_recover("1:2", depth, 2**depth)
    losses = measure_losses(net, objective, [(x, y)], choice_masks(choices, depth))
    takes_first = torch.tensor([[layer % 2 == 0 for layer in kept] for kept in choices])
    means = [(losses[column].mean(), losses[~column].mean()) for column in takes_first.T]
    return torch.stack([(first - second) / 4 for first, second in means])  # 1/4 = p (1 - p)


def mean_gradient(step, gates, x, y):
    """What a step gives for the same logits, the mean over DRAWS draws of the gates."""
    total = 0.0
    for k in range(DRAWS):
        seed_everything(9, k)
        found = torch.autograd.grad(step(x, y)["loss"].mean(), list(gates))
        total = total + torch.stack([gradient[0, 0] for gradient in found])
    return total / DRAWS


def make_step(kind, net, objective):
    """A step of the objective, which is no module."""
    step = kind(net, None)
    step.objective = objective
    return step


def main():
    args = parse_args()
    settings = choose_problem(args)
    torch.set_num_threads(1)
    train, _ = problem.load_pictures(settings.data)
    state = problem.read_teacher(settings, args.output)
    net = problem.make_network(settings, train, state, parse_pattern("1:2", settings.depth))
    net.requires_grad_(False).eval()
    gates, (x, y) = net.gumbel_gates.requires_grad_(True), train.batch(slice(0, PICTURES))
    seed_everything(5)
    objective = settings.make_objective()
    objective = FixedDraw(objective, objective.draw(net, x, y))
    found = {"exact": exact_gradient(net, objective, x, y, settings.depth)}
    net.train()
    gates.scaling = 1.0
    for tau in (4.0, 1.0, 0.1):
        gates.tau = tau
        found[f"straight-through, temperature {tau:g}"] = mean_gradient(
            make_step(TrainStep, net, objective), gates, x, y
        )
    found["pairs"] = mean_gradient(make_step(PairStep, net, objective), gates, x, y)
    for name, gradient in found.items():
        print(f"{name:32s}", " ".join(f"{value:+.4f}" for value in gradient.tolist()))


if __name__ == "__main__":
    main()
