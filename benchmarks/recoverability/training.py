"""Training in this process: the teacher, gates over its layers, and the recovery of a choice of them."""

import math

import torch

from benchmarks.recoverability.problem import make_network
from diffusion.objectives import TrainStep
from engine.optim import Ema, Recipe
from engine.run import seed_everything
from pruning.distillation import DistillStep, feature_weight, layer_pairs
from pruning.gates import GateSchedule, decide
from pruning.lora import weight_update
from pruning.patterns import parse_pattern
from pruning.surgery import keep_layers

LEAST_LR = 1e-5


def optimize(step, groups, pictures, batch_size, steps, seed, before=None, schedule=None, after=None):
    """AdamW on the losses of step(x, y); batches and all draws are functions of (seed, step).

    groups: of AdamW, each with `params` and `lr`. schedule: step -> rate of all groups. before(k), after(k): calls
    around step k.
    """
    params = [p for group in groups for p in group["params"]]
    optimizer = torch.optim.AdamW(groups, lr=0.0, weight_decay=0.0, fused=True)
    step.train()
    for k in range(steps):
        seed_everything(seed, k)
        rows = torch.randint(len(pictures.x), (batch_size,))
        if before:
            before(k)
        for group in optimizer.param_groups if schedule else ():
            group["lr"] = schedule(k)
        optimizer.zero_grad(set_to_none=True)
        step(*pictures.batch(rows))["loss"].mean().backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        if after:
            after(k)


def train_all(step, lr, pictures, batch_size, steps, seed, before=None, after=None):
    """Train all weights of a step's network along a cosine, as in recovery and from scratch."""
    recipe = Recipe(epochs=1, lr=lr, min_lr=LEAST_LR)
    schedule = recipe.schedule(steps)
    optimize(step, recipe.groups(step.net), pictures, batch_size, steps, seed, before, schedule, after)
    return step.net.eval()


def train_teacher(problem, pictures):
    """A network from scratch."""
    seed_everything(problem.teacher)
    step = TrainStep(make_network(problem, pictures), problem.make_objective())
    return train_all(step, problem.lr, pictures, problem.teacher_batch_size, problem.teacher_steps, seed=1)


def cut(problem, pictures, state, kept):
    """The network of these layers of a teacher's state dict."""
    return make_network(problem, pictures, keep_layers(state, kept))


def fine_tune(problem, pictures, state, kept, seed):
    """A choice of layers, recovered by fine-tuning: same batches and draws for every choice."""
    step = TrainStep(cut(problem, pictures, state, kept), problem.make_objective())
    return train_all(step, problem.lr, pictures, problem.batch_size, problem.steps, 100 + seed)


RECIPES = {  # name -> options of a distillation; None: fine-tuning
    "fine-tuning": None,
    "output KD": {"beta": 0.0},
    "representation KD": {"k": math.inf},
    "Masked KD, threshold 0.1": {"k": 0.1},
    "Masked KD, threshold 1": {"k": 1.0},
    "Masked KD": {},
    "Masked KD, threshold 4": {"k": 4.0},
    "relative Masked KD": {"beta": 1.0, "relative": True},
    "relative representation KD": {"beta": 1.0, "relative": True, "k": math.inf},
}


def recover(problem, pictures, state, kept, recipe, seed, compute, look=None):
    """Recover a choice by one of RECIPES for as much `compute` as so many steps of fine-tuning take.

    Steps are counted by passes through blocks: three for a forward and backward of the student, one for the teacher's.
    look(network, compute): called ten times on the way.
    """
    net, options, objective = cut(problem, pictures, state, kept), RECIPES[recipe], problem.make_objective()
    step, price = TrainStep(net, objective), 1.0
    if options is not None:
        teacher = make_network(problem, pictures, state)
        depth, whole = len(net.blocks), len(teacher.blocks)
        price += whole / (3 * depth)
        step = DistillStep(net, teacher, objective, layer_pairs(depth, whole), **options)
    steps, beta = round(compute / price), getattr(step, "beta", 0.0)

    def before(k):
        step.beta = feature_weight(beta, k, steps)

    def after(k):
        if look and (k + 1) % max(1, steps // 10) == 0:
            look(net.eval(), (k + 1) * price)
            net.train()

    train_all(step, problem.lr, pictures, problem.batch_size, steps, 200 + seed, before, after)
    return net


def learn_layers(problem, pictures, state, pattern, seed, update="full", alpha=0.0, gate_lr=1e-3, lr=1e-4):
    """The decision of prune_by_learning.py's method, by default with its defaults and a full update.

    Steps and batches are smaller than published. update: of the weights, "full", "lora" or "none". alpha: share of the
    loss that compares with the teacher's output.
    """
    seed_everything(1000 + seed)
    net = make_network(problem, pictures, state, groups=parse_pattern(pattern, problem.depth))
    gates = net.gumbel_gates
    weights = weight_update(net, update != "none", 8 if update == "lora" else None)
    objective = problem.make_objective()
    step = TrainStep(net, objective)
    if alpha:
        step = DistillStep(net, make_network(problem, pictures, state), objective, (), alpha, beta=0.0)
    average = Ema(gates, 0.999)
    schedule = GateSchedule((4.0, 0.1), (100.0, 100.0), problem.learning_steps)
    optimize(
        step,
        [{"params": weights, "lr": lr}, {"params": list(gates), "lr": gate_lr}],
        pictures,
        problem.batch_size,
        problem.learning_steps,
        1000 + seed,
        before=lambda k: schedule.apply(k, gates, average.module),
        after=average.update,
    )
    return decide(average.module).kept
