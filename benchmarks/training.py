"""A whole training step, with clipping, optimizer and average: bf16 against fp32, and both against pure matmuls."""

from argparse import Namespace

from benchmarks.measure import main
from benchmarks.networks import batch, block_flops, make_network, objective
from diffusion.objectives import TrainStep
from engine.run import Run
from engine.trainer import Trainer

DEPTH, BATCH = 8, 8
CASES = {f"{DEPTH} layers": {}, "checkpointing": {"grad_checkpointing": True}}
BARS = {(f"{DEPTH} layers", "bf16"): {"ratio": ">= 2.0", "efficiency": ">= 0.65"}}
BARS[f"{DEPTH} layers", "fp32"] = {"efficiency": ">= 0.75"}
PRECISION = {"fp32": "fp32", "bf16": "bf16"}


def make(device, depth=DEPTH, n=BATCH, grad_checkpointing=False):
    """One optimizer step in every precision."""
    x, y = batch(n, device)

    def side(precision):
        flags = {"ema_decay": 0.999, "clip_norm": 1.0, "compile": False, "grad_accumulation": 1}
        args = Namespace(device=device, precision=precision, grad_checkpointing=grad_checkpointing, **flags)
        step = TrainStep(make_network(depth, device).train(), objective(device))
        groups = [{"params": [p for p in step.net.parameters() if p.requires_grad], "lr": 1e-4}]
        trainer = Trainer(Run(args), step, groups, step.net, args)
        return lambda: trainer.train_step(x, y)

    return {precision: side(precision) for precision in PRECISION}


def flops(side, depth=DEPTH, n=BATCH, grad_checkpointing=False):
    """Forward and backward; what checkpointing computes again does not count."""
    return 3 * depth * block_flops(n)


if __name__ == "__main__":
    main(__name__)
