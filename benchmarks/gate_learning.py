"""Gate learning: what leaving out the backward of skipped samples saves, in time and in memory of activations."""

from benchmarks.measure import main
from benchmarks.networks import WIDTH, backward_of, batch, block_flops, make_network, objective
from diffusion.objectives import TrainStep
from engine.run import hold_frozen
from pruning.gates import block_stacks
from pruning.lora import weight_update

DEPTH, BATCH = 8, 8
SIDES = {"dense": (True, 1.0), "sparse": (False, 1.0), "quarter": (False, 0.25)}  # dense, gate_samples
CASES = {
    f"{update} {precision}": {"update": update, "precision": precision}
    for precision in ("fp32", "bf16")
    for update in ("full", "lora")
}
LOWEST = {("full", "sparse"): 1.40, ("lora", "sparse"): 1.25, ("full", "quarter"): 1.65, ("lora", "quarter"): 1.5}
BARS = {(f"{u} {p}", side): {"ratio": f">= {low}"} for (u, side), low in LOWEST.items() for p in ("fp32", "bf16")}
for case in CASES:
    BARS[case, "sparse"]["memory_ratio"] = "<= 0.62"
MEMORY = {"keep_gradients": True}


def make(device, update, precision, depth=DEPTH, n=BATCH, groups=None, keep_gradients=False):
    """Gradients of one step in every form, on the same network."""
    groups = groups or [[1, 2]] * (depth // 2)
    net = make_network(depth, device, groups=groups).train()
    weight_update(net, True, 8 if update == "lora" else None)
    hold_frozen(net, precision)
    step = TrainStep(net, objective(device))
    run = backward_of(step, *batch(n, device), device, precision, keep_gradients)
    stack = block_stacks(net)[0]

    def side(dense, share):
        def one():
            stack.dense, stack.gate_samples = dense, share
            run()

        return one

    return {name: side(*settings) for name, settings in SIDES.items()}


def flops(side, update, precision, depth=DEPTH, n=BATCH, groups=None):
    """Of what the form runs: a backward costs two forwards, one if the weights are frozen."""
    backward, half = {"full": 2, "lora": 1}[update], depth * n / 2
    skipped = {"dense": 1 + backward, "sparse": 1, "quarter": 0.25}[side]
    return block_flops(1) * half * (1 + backward + skipped)


def copies(update, precision):
    """Autocast's copies of weights that are trained: weights, not activations."""
    return DEPTH * 18 * WIDTH**2 * 2 / 1e6 if (update, precision) == ("full", "bf16") else 0


if __name__ == "__main__":
    main(__name__)
