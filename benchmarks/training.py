"""A whole training step, with clipping, optimizer and average: bf16 against fp32, and both against pure matmuls."""

from functools import partial

from benchmarks.measure import Case, Side, main
from benchmarks.networks import block_flops, make_batch, make_network, make_objective
from diffusion.objectives import TrainStep
from engine.run import DTYPES, Run
from engine.trainer import Trainer, TrainingOptions


def build(setup, precision="bf16", depth=8, n=8, grad_checkpointing=False, compiled=False):
    """One optimizer step; what checkpointing computes again is not among its FLOPs."""
    depth, n, compiled = (2, 2, False) if setup.tiny else (depth, n, compiled)  # compiling takes longer than the rest
    options = TrainingOptions(ema_decay=0.999, grad_checkpointing=grad_checkpointing, compile=compiled)
    step = TrainStep(make_network(setup, depth).train(), make_objective(setup))
    groups = [{"params": [p for p in step.net.parameters() if p.requires_grad], "lr": 1e-4}]
    run = Run(str(setup.device), precision)
    trainer = Trainer(run, step, groups, step.net, options)
    batch = make_batch(setup, n)
    return Side(lambda: trainer.train_step(*batch), n, 3 * depth * block_flops(setup, n), DTYPES[precision])


def compare_precisions(name, **options):
    sides = {precision: partial(build, precision=precision, **options) for precision in ("fp32", "bf16")}
    bars = [("speedup", "bf16", ">=", 2.0), ("efficiency", "fp32", ">=", 0.75), ("efficiency", "bf16", ">=", 0.65)]
    return Case(name, sides, bars, memory=False)


CASES = [
    compare_precisions("precision"),
    compare_precisions("compiled", compiled=True),
    Case("checkpointing", {"kept": build, "computed again": partial(build, grad_checkpointing=True)}),
]

if __name__ == "__main__":
    main(__spec__.name, __doc__, CASES)
