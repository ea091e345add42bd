"""Gate learning: what leaving out the backward of skipped samples saves, in time and in memory of activations.

Also how the cost grows with the depth, the batch and the number of candidates of a group.
"""

from functools import partial

import torch

from benchmarks.measure import Case, Side, main
from benchmarks.networks import backward_of, block_flops, make_batch, make_network, make_objective, weights_of
from diffusion.objectives import TrainStep
from engine.run import DTYPES, cast_frozen_weights
from families import create_model, family_of
from pruning.gates import set_routing
from pruning.lora import weight_update

FORMS = {"dense": (True, 1.0), "sparse": (False, 1.0), "quarter": (False, 0.25)}  # dense, gate_samples
BARS = {"full": {"sparse": 1.40, "quarter": 1.65}, "lora": {"sparse": 1.25, "quarter": 1.5}}


def build(setup, form="sparse", update="full", precision="fp32", depth=8, n=8, groups=None):
    """Gradients of one step; FLOPs are those of what the form runs, a frozen weight saving one part of three."""
    dense, share = FORMS[form]
    depth, n = (2, 2) if setup.tiny else (depth, n)
    groups = [[1, 2]] * (depth // 2) if setup.tiny or groups is None else groups
    net = make_network(setup, depth, groups=groups).train()
    weight_update(net, True, 8 if update == "lora" else None)
    cast_frozen_weights(net, precision)
    set_routing(net, dense, share)
    step = TrainStep(net, make_objective(setup))
    backward = {"full": 2, "lora": 1}[update]
    kept = sum(keep for keep, _ in groups) / depth
    flops = block_flops(setup, n) * depth * (kept * (1 + backward) + (1 - kept) * (share + backward * dense))
    run = backward_of(setup, step, make_batch(setup, n), precision)
    return Side(run, n, flops, DTYPES[precision], lambda: weights_of(net, precision))


def build_family(setup, name, form, **config):
    """Gradients of one step of a registered network, whole, with the usual settings of its family, in bf16."""
    family, name = family_of(name), f"{name[:3]}-T-1-2" if setup.tiny else name
    net = create_model(name, **({} if setup.tiny else config)).train().to(setup.device)
    set_routing(net, *FORMS[form])
    step = TrainStep(net, family.make_objective(**family.own_defaults("train")).to(setup.device))
    n = 2 if setup.tiny else 4
    x = torch.randn(n, net.in_channels, net.input_size, net.input_size, device=setup.device)
    return Side(backward_of(setup, step, (x, torch.arange(n, device=setup.device)), "bf16"), n)


def compare_family(name, bar, **config):
    sides = {form: partial(build_family, name=name, form=form, **config) for form in ("dense", "sparse")}
    return Case(f"{name} bf16", sides, [("speedup", "sparse", ">=", bar)], memory=False)


def compare_forms(update, precision):
    bars = [("speedup", form, ">=", bar) for form, bar in BARS[update].items()]
    sides = {form: partial(build, form=form, update=update, precision=precision) for form in FORMS}
    return Case(f"{update} {precision}", sides, [*bars, ("extra_ratio", "sparse", "<=", 0.62)])


CANDIDATES = {
    name: partial(build, precision="bf16", depth=14, n=4, groups=groups)
    for name, groups in (("1:2", [[1, 2]] * 7), ("7:14", [[7, 14]]))
}
CASES = [compare_forms(update, precision) for precision in ("fp32", "bf16") for update in BARS]
CASES += [
    compare_family("SiT-XL-1-2", 1.25, depth=8, groups=[[1, 2]] * 4),
    compare_family("MAR-L-1-2", 1.15),
    Case("depth", {f"{d} layers": partial(build, precision="bf16", depth=d, n=4) for d in (4, 8, 16, 28)}),
    Case("batch", {f"{n} images": partial(build, precision="bf16", depth=4, n=n) for n in (2, 4, 8, 16)}),
    Case("candidates", CANDIDATES, [("speedup", "7:14", ">=", 1 / 1.03)], memory=False),
]

if __name__ == "__main__":
    main(__spec__.name, __doc__, CASES)
