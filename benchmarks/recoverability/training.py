"""Training in this process: the teacher, gates over its layers, and the fine-tuning of a choice of them."""

from dataclasses import dataclass

import torch

from benchmarks.recoverability.problem import make_network
from diffusion.objectives import TrainStep
from engine.optim import Ema, Recipe
from engine.run import seed_everything
from pruning.distillation import DistillStep
from pruning.gates import GateSchedule, likeliest
from pruning.lora import learned_weights, weight_update
from pruning.pairs import PairStep
from pruning.patterns import parse_pattern
from pruning.surgery import keep_layers, stack_depths

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


def fine_tune(problem, pictures, state, kept, seed, share=1.0):
    """A choice of layers, recovered by fine-tuning: same batches and draws for every choice. share: of the steps."""
    step = TrainStep(cut(problem, pictures, state, kept), problem.make_objective())
    return train_all(step, problem.lr, pictures, problem.batch_size, round(share * problem.steps), 100 + seed)


@dataclass(frozen=True)
class Learning:
    """How gates are learnt, by default with the defaults of prune_by_learning.py and a full update.

    update: of the weights, "full", "lora" or "none". gradient: of the gates, as --gate-gradient. share: of the loss
    that compares with the teacher's output. length: steps, as a share of the problem's. finalists: most probable
    choices, of which the one is taken that is best after a third of a recovery, by the loss on training data.
    """

    update: str = "full"
    gradient: str = "straight-through"
    share: float = 0.0
    lr: float = 1e-4
    gate_lr: float = 1e-3
    tau_range: tuple = (4.0, 0.1)
    length: float = 1.0
    finalists: int = 1
    candidates: str = "all"  # as --candidates


def gate_step(net, teacher, objective, options):
    """The training step of gates, as prune_by_learning.py makes it."""
    if options.gradient == "pairs":
        return PairStep(net, objective, options.share, teacher)
    return DistillStep(net, teacher, objective, (), options.share, beta=0.0) if teacher else TrainStep(net, objective)


def learn_layers(problem, pictures, state, pattern, seed, options):
    """(Most probable choices of layers, the weights learnt along with them as a state dict).

    Steps and batches are smaller than published. From pairs half as many images are learnt, so the compute is no more.
    """
    seed_everything(1000 + seed)
    depth = sum(stack_depths(state).values())
    net = make_network(problem, pictures, state, groups=parse_pattern(pattern, depth), candidates=options.candidates)
    gates = net.gumbel_gates
    weights = weight_update(net, options.update != "none", 8 if options.update == "lora" else None)
    teacher = make_network(problem, pictures, state) if options.share else None
    average, steps = Ema(gates, 0.999), round(problem.learning_steps * options.length)
    schedule = GateSchedule(options.tau_range, (100.0, 100.0), steps)
    optimize(
        gate_step(net, teacher, problem.make_objective(), options),
        [{"params": weights, "lr": options.lr}, {"params": list(gates), "lr": options.gate_lr}],
        pictures,
        problem.batch_size // (2 if options.gradient == "pairs" else 1),
        steps,
        1000 + seed,
        before=lambda k: schedule.apply(k, gates, average.module),
        after=average.update,
    )
    return likeliest(average.module, options.finalists), learned_weights(net, state)
