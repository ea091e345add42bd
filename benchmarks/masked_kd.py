"""A Masked KD step against its parts: the teacher's forward, and the student's forward and backward."""

from functools import partial

import torch

from benchmarks.measure import Case, Side, main
from benchmarks.networks import autocast, backward_of, make_batch, make_network, make_objective
from diffusion.objectives import TrainStep
from engine.run import cast_frozen_weights
from pruning.distillation import DistillStep, layer_pairs


def build(setup, whole=True, precision="fp32", depths=(4, 8), n=8):
    """The whole step, or its parts one after another."""
    (student_depth, teacher_depth), n = ((1, 2), 2) if setup.tiny else (depths, n)
    batch, objective = make_batch(setup, n), make_objective(setup)
    student = make_network(setup, student_depth).train()
    teacher = cast_frozen_weights(make_network(setup, teacher_depth).eval().requires_grad_(False), precision)
    if whole:
        step = DistillStep(student, teacher, objective, layer_pairs(student_depth, teacher_depth))
        return Side(backward_of(setup, step, batch, precision), n)
    plain = backward_of(setup, TrainStep(student, objective), batch, precision)

    def parts():
        with torch.no_grad(), autocast(setup, precision):
            objective.predict(teacher, *batch, objective.draw(teacher, *batch))
        plain()

    return Side(parts, n)


CASES = [
    Case(
        precision,
        {name: partial(build, whole=name == "step", precision=precision) for name in ("parts", "step")},
        [("speedup", "step", ">=", 1 / 1.08)],
        memory=False,
    )
    for precision in ("fp32", "bf16")
]

if __name__ == "__main__":
    main(__spec__.name, __doc__, CASES)
