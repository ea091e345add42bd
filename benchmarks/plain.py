"""Whole steps against the plain construction: gate learning, Masked KD, fine-tuning and sampling, as users run them.

`plain` computes what ours computes in the way that published code for this method does, written anew and with the same
weights and draws. In it, all layers run for all samples and a mask blends them; modulation and residuals are products
and sums of their own; weights stay in float32, which autocast casts at every call; the student's and the teacher's
hidden states are kept, and compared by plain expressions; attention is torch's fused one; AdamW has torch's defaults;
the average is over all parameters, one by one; a guided batch is sampled in both halves. Optimizer, losses on latents
and precision are the same on both sides, and what costs little (loss scaling, logs, data) is on neither.

Three float32 steps of a shallower network have the same losses, and gradients of the same norm, on both sides.
"""

import copy
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.measure import Case, Side, main
from benchmarks.networks import autocast, make_batch, make_network, make_objective
from diffusion import create_diffusion
from diffusion.objectives import TrainStep
from diffusion.samplers import GaussianSampler
from engine.run import Run, cast_frozen_weights, compile_blocks
from engine.trainer import Trainer, TrainingOptions
from models import DiTBlock, FinalLayer
from pruning.distillation import DistillStep, layer_pairs
from pruning.gates import set_routing
from pruning.lora import LoRALinear, weight_update

DECAY, SAMPLING_STEPS, CFG_SCALE = 0.999, 2, 4.0
BARS = {"gates, full": 1.65, "gates, LoRA": 1.5, "Masked KD": 1.2, "fine-tuning": 1.1, "sampling": 1.0}


def shift_and_scale(x, shift, scale):
    """x (N, T, D) times 1 + scale plus shift, both (N, D)."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class PlainBlock(DiTBlock):
    """The same block, with an operation for every product and sum."""

    def forward(self, x, c):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_a.unsqueeze(1) * self.attn(shift_and_scale(self.norm1(x), shift_a, scale_a))
        return x + gate_m.unsqueeze(1) * self.mlp(shift_and_scale(self.norm2(x), shift_m, scale_m))


class PlainFinalLayer(FinalLayer):
    """The same, modulated in the plain way."""

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(shift_and_scale(self.norm_final(x), shift, scale))


class PlainLoRALinear(LoRALinear):
    """The frozen map, and the update as a second path beside it."""

    def forward(self, x):
        return F.linear(x, self.weight, self.bias) + self.scale * self.lora_b(self.lora_a(x))


PLAIN_FORMS = {DiTBlock: PlainBlock, FinalLayer: PlainFinalLayer, LoRALinear: PlainLoRALinear}


def make_plain(net):
    """Let a network compute by the plain forms; its weights and their names stay."""
    set_routing(net, dense=True, gate_samples=1.0)
    for module in net.modules():
        module.__class__ = PLAIN_FORMS.get(type(module), type(module))


def keep_ordinary(hidden, k):
    """Hidden states (N, T, D), with zeros where an entry is k standard deviations or more from its sample's mean."""
    mean = hidden.mean(dim=(1, 2), keepdim=True)
    std = hidden.var(dim=(1, 2), keepdim=True).sqrt()
    return hidden * ((hidden - mean).abs() < k * std)


class PlainDistillStep(DistillStep):
    """Masked KD: the student, then the teacher, hidden states of both kept until they are compared."""

    def forward(self, x, y):
        draw = self.objective.draw(self.net, x, y)
        of_student, of_teacher = {}, {}
        prediction = self.objective.predict(self.net, x, y, draw, lambda layer, _, out: of_student.update({layer: out}))
        with torch.no_grad():
            goal = self.objective.predict(
                self.teacher, x, y, draw, lambda layer, _, out: of_teacher.update({layer: out})
            )
        terms = self.objective.loss(prediction, x, draw)
        gt = terms.pop("loss")
        terms |= self.objective.match(prediction, goal, x, draw)
        features = []
        for student, teacher in self.pairs:
            ordinary = keep_ordinary(of_student[student], self.k), keep_ordinary(of_teacher[teacher], self.k)
            features.append(F.mse_loss(*ordinary, reduction="none").mean(dim=(1, 2)))
        features = sum(features) / len(features)
        return {"loss": self.alpha * terms["kd_loss"] + (1 - self.alpha) * gt + self.beta * features}


class PlainTrainer:
    """One optimizer step after another, and an averaged copy of all of the network."""

    def __init__(self, setup, precision, step, groups):
        self.setup, self.precision, self.step = setup, precision, step
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        self.average = copy.deepcopy(step.net).requires_grad_(False)
        self.grad_norm = None

    def train_step(self, x, y):
        """Per-sample losses (N,) of the step."""
        with autocast(self.setup, self.precision):
            losses = self.step(x, y)["loss"]
        self.optimizer.zero_grad()
        losses.mean().backward()
        self.grad_norm = nn.utils.clip_grad_norm_(self.step.net.parameters(), 1.0)
        self.optimizer.step()
        averages = dict(self.average.named_parameters())
        with torch.no_grad():
            for name, p in self.step.net.named_parameters():
                averages[name].mul_(DECAY).add_(p, alpha=1 - DECAY)
        return {"loss": losses.detach()}


def make_step(setup, kind, is_plain, depth):
    """(training step, parameter groups, what ours keeps an average of); weights are the same for every side."""
    torch.manual_seed(0)
    objective = make_objective(setup)
    if kind.startswith("gates"):
        net = make_network(setup, depth, groups=[[1, 2]] * (depth // 2)).train()
        weights = weight_update(net, True, 8 if kind == "gates, LoRA" else None)
        groups = [{"params": weights, "lr": 1e-4}, {"params": list(net.gumbel_gates), "lr": 1e-3}]
        return TrainStep(net, objective), groups, net.gumbel_gates
    net = make_network(setup, depth // 2 if kind == "Masked KD" else depth).train()
    groups = [{"params": [p for p in net.parameters() if p.requires_grad], "lr": 2e-4}]
    if kind == "fine-tuning":
        return TrainStep(net, objective), groups, net
    teacher = make_network(setup, depth)
    make = PlainDistillStep if is_plain else DistillStep
    return make(net, teacher, objective, layer_pairs(depth // 2, depth)), groups, net


def make_trainer(setup, kind, is_plain, precision, depth, compiled=False):
    """A trainer of one side: with `train_step` and, after a step, `grad_norm`."""
    step, groups, averaged = make_step(setup, kind, is_plain, depth)
    teachers = [step.teacher] if kind == "Masked KD" else []
    if is_plain:
        for net in (step.net, *teachers):
            make_plain(net)
        return PlainTrainer(setup, precision, step, groups)
    for net in (step.net, *teachers):
        cast_frozen_weights(net, precision)
    for teacher in teachers if compiled else ():
        compile_blocks(teacher)
    options = TrainingOptions(ema_decay=DECAY, compile=compiled)
    return Trainer(Run(str(setup.device), precision), step, groups, averaged, options)


def in_turn(function):
    """A function that seeds its k-th call with k, and returns what the first call returned."""
    results = []

    def run():
        torch.manual_seed(len(results))
        results.append(function())
        return results[0]

    return run


def rehearse(setup, kind, is_plain, depth=2, steps=3):
    """Losses and gradient norms of whole float32 steps, for batches of 2: (steps, 3)."""
    trainer, rows = make_trainer(setup, kind, is_plain, "fp32", depth), []
    torch.manual_seed(0)
    batch = make_batch(setup, 2)
    for k in range(steps):
        torch.manual_seed(k)
        rows.append(torch.cat([trainer.train_step(*batch)["loss"], trainer.grad_norm.view(1)]))
    return torch.stack(rows)


def build_training(setup, kind, is_plain=False, compiled=False):
    """Whole optimizer steps in bf16; Masked KD has a student of half the layers."""
    depth, n, compiled = (2, 2, False) if setup.tiny else (8, 8, compiled)  # compiling takes longer than the rest
    rehearsed = None if setup.for_memory or compiled else rehearse(setup, kind, is_plain)
    trainer = make_trainer(setup, kind, is_plain, "bf16", depth, compiled)
    torch.manual_seed(0)
    batch = make_batch(setup, n)
    first = in_turn(lambda: trainer.train_step(*batch)["loss"])
    return Side(lambda: (first(), rehearsed), n, kept=tuple)


def sample_plainly(net, diffusion, labels, noise, step_noise):
    """Latents of a guided batch whose halves, with and without labels, both go through all steps."""
    x, y = torch.cat([noise, noise]), torch.cat([labels, torch.full_like(labels, net.num_classes)])
    model = partial(net.forward_with_cfg, cfg_scale=CFG_SCALE)
    for k in range(SAMPLING_STEPS):
        t = torch.full((len(x),), SAMPLING_STEPS - 1 - k, device=x.device)
        drawn = torch.cat([step_noise(k, x.shape[1:])] * 2)
        x = diffusion.p_sample(model, x, t, clip_denoised=False, model_kwargs={"y": y}, noise=drawn)["sample"]
    return x.chunk(2)[0]


def make_sampling(setup, is_plain, precision, depth, n, compiled=False):
    """A function that samples n latents by guided ancestral steps."""
    torch.manual_seed(0)
    net = make_network(setup, depth).eval().requires_grad_(False)
    diffusion = create_diffusion(str(SAMPLING_STEPS)).to(setup.device)
    sampler = GaussianSampler(diffusion, "ddpm", CFG_SCALE)
    noise, labels = make_batch(setup, n)
    if is_plain:
        make_plain(net)
    else:
        cast_frozen_weights(net, precision)
    if compiled:
        compile_blocks(net)

    def run():
        with torch.inference_mode(), autocast(setup, precision):
            if is_plain:
                return sample_plainly(net, diffusion, labels, noise, lambda k, shape: torch.randn_like(noise))
            return sampler(net, labels, noise)

    return run


def build_sampling(setup, is_plain=False, compiled=False):
    """Guided steps in bf16, of a doubled batch of 8."""
    depth, n, compiled = (2, 2, False) if setup.tiny else (8, 4, compiled)
    rehearsed = None if setup.for_memory or compiled else in_turn(make_sampling(setup, is_plain, "fp32", 2, 1))()
    first = in_turn(make_sampling(setup, is_plain, "bf16", depth, n, compiled))
    return Side(lambda: (first(), rehearsed), n, kept=tuple)


def find_difference(a, b):
    """The largest difference, as a share of the largest value."""
    return float((a - b).abs().max() / a.abs().max())


def compare_sides(results):
    """How far ours is from plain: whole steps in float32, and the first call in bf16, compiled too."""
    (first, rehearsed), others = results["plain"], {name: results[name] for name in results if name != "plain"}
    found = {f"bf16 difference, {name}": find_difference(first, own) for name, (own, _) in others.items()}
    return {"float32 difference": find_difference(rehearsed, others["ours"][1]), **found}


def make_case(kind, bar):
    build = build_sampling if kind == "sampling" else partial(build_training, kind=kind)
    sides = {"plain": partial(build, is_plain=True), "ours": build, "ours, compiled": partial(build, compiled=True)}
    bars = [("speedup", "ours", ">=", bar), ("extra_ratio", "ours", "<=", 1.0)]
    return Case(kind, sides, [*bars, ("float32 difference", None, "<=", 1e-5)], compare_sides)


CASES = [make_case(kind, bar) for kind, bar in BARS.items()]

if __name__ == "__main__":
    main(__spec__.name, __doc__, CASES)
