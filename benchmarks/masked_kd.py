"""A Masked KD step against its parts: the teacher's forward, and the student's forward and backward."""

import torch

from benchmarks.measure import autocast, main
from benchmarks.networks import backward_of, batch, make_network, objective
from diffusion.objectives import TrainStep
from engine.run import hold_frozen
from pruning.distillation import DistillStep, layer_pairs

TEACHER, STUDENT, BATCH = 8, 4, 8
CASES = {precision: {"precision": precision} for precision in ("fp32", "bf16")}
BARS = {(precision, "distillation"): {"ratio": ">= 0.926"} for precision in CASES}  # at most 8 % above its parts


def make(device, precision, n=BATCH):
    """The parts one after another, and the whole step."""
    x, y = batch(n, device)
    goal = objective(device)
    student = make_network(STUDENT, device).train()
    teacher = hold_frozen(make_network(TEACHER, device).eval().requires_grad_(False), precision)
    plain = backward_of(TrainStep(student, goal), x, y, device, precision)
    step = DistillStep(student, teacher, goal, layer_pairs(STUDENT, TEACHER))

    def parts():
        with torch.no_grad(), autocast(device, precision):
            goal.predict(teacher, x, y, goal.draw(teacher, x, y))
        plain()

    return {"parts": parts, "distillation": backward_of(step, x, y, device, precision)}


if __name__ == "__main__":
    main(__name__)
