"""Parts of optimization: the learning rate over the steps, weight decay by parameter, the averaged copy."""

import copy
import math
from dataclasses import dataclass

import torch


def cosine_schedule(lr, min_lr, total_steps, warmup_steps=0):
    """Learning rate as a function of the step: up to `lr` in `warmup_steps`, then along a cosine to `min_lr`."""

    def rate(step):
        if step < warmup_steps:
            return lr * step / warmup_steps
        way = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return min_lr + (lr - min_lr) * (1 + math.cos(math.pi * min(way, 1))) / 2

    return rate


def decay_groups(net, weight_decay, exempt=()):
    """Parameter groups of AdamW: vectors, biases and what has a part of `exempt` in its name do not decay."""
    trained = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    if not weight_decay:
        return [{"params": [p for _, p in trained]}]
    decaying, others = [], []
    for name, p in trained:
        is_matrix = p.ndim > 1 and not name.endswith(".bias")
        is_exempt = any(word in name for word in exempt)
        (decaying if is_matrix and not is_exempt else others).append(p)
    groups = [{"params": decaying, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


@dataclass(frozen=True)
class Recipe:
    """How all weights of a network are trained, from scratch or in recovery; the fields are settings of these names."""

    epochs: int
    lr: float
    min_lr: float
    weight_decay: float = 0.0
    betas: tuple = (0.9, 0.999)
    warmup_epochs: int = 0

    def groups(self, net, exempt=()):
        """Parameter groups of AdamW; exempt: see decay_groups."""
        return [{**group, "betas": tuple(self.betas)} for group in decay_groups(net, self.weight_decay, exempt)]

    def schedule(self, total_steps):
        """Learning rate as a function of the step."""
        return cosine_schedule(self.lr, self.min_lr, total_steps, total_steps * self.warmup_epochs // self.epochs)


class Ema:
    """Averaged copy of a module, over the parameters that are trained; the others stay as they are.

    warmup: let the decay of step k rise as (1 + k) / (10 + k) up to `decay`, so that a short run forgets its start.
    """

    def __init__(self, module, decay, warmup=False):
        self.decay, self.warmup, self.source = decay, warmup, module
        self.module = copy.deepcopy(module).requires_grad_(False).eval()
        self.link()

    def link(self):
        """Find the parameters that are averaged, again when they have been replaced."""
        trained = {name for name, p in self.source.named_parameters() if p.requires_grad}
        self.live = [p for name, p in self.source.named_parameters() if name in trained]
        self.averages = [p for name, p in self.module.named_parameters() if name in trained]

    @torch.no_grad()
    def update(self, step):
        """Take in the weights after step `step`, counted from 0."""
        decay = decay_at(step, self.decay, self.warmup)
        torch._foreach_lerp_(self.averages, self.live, 1 - decay)


def decay_at(step, decay, warmup):
    """Decay of the average at a step, counted from 0."""
    return min(decay, (1 + step) / (10 + step)) if warmup else decay


def share_of_start(steps, decay, warmup=False):
    """How much of an average after so many steps is still the weights that it started from, 0 to 1."""
    return math.prod(decay_at(step, decay, warmup) for step in range(steps)) if warmup else decay**steps
