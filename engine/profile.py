"""What a network costs for one image: parameters, multiply-adds, and the time and memory of a forward pass.

A forward pass is that of the family's training, without its backward: one noised image (and of a family that noises an
image several times at once, so many). Multiply-adds are those of products and convolutions. Memory is, on a GPU, the
peak of tensors in the pass, weights included; elsewhere the bytes of the weights.
"""

import re
import statistics
import time
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from engine.errors import one_line
from engine.run import Run
from engine.weight_files import GATES
from families import SHAPE_ARGUMENTS, describe_shapes, family_of, sketch_model

PASSES = 5  # that are timed, after one that is not
PRODUCT = re.compile(r"\w*(attention|convolution|matmul|_mm)\w*|(mkldnn_)?linear|(add)?(mv|bmm|r)|v?dot")
QUANTITIES = (  # of a profile: name, and how it is shown
    ("parameters", "{:,} parameters"),
    ("gmacs", "{:,.4g} GMACs"),
    ("latency_ms", "{:,.4g} ms"),
    ("memory_gb", "{:,.3g} GB"),
)


@dataclass
class Profiler:
    """Measures the network that is pruned and what is left of it, every size once.

    model: a name of their family. whole: the state dict before the cut; gates in it are left out.
    """

    run: Run
    model: str
    whole: dict
    measured: dict = field(default_factory=dict)  # by the name and parameters of a network

    def compare(self, pruned):
        """{"before": {name: number or None}, "after": ...} for the state dict `pruned`, and what they were taken on."""
        return {**self.place, "before": self.measure(self.whole), "after": self.measure(pruned)}

    @property
    def place(self):
        """What times and memory depend on besides the network."""
        return {"device": name_device(self.run), "precision": self.run.precision}

    def measure(self, state):
        """The numbers of QUANTITIES of the network with these weights."""
        state = {key: value for key, value in state.items() if not key.startswith(GATES)}
        told = describe_shapes({key: tuple(value.shape) for key, value in state.items()}, self.model)
        model, config = told["model"], {key: told[key] for key in SHAPE_ARGUMENTS if key in told}
        parameters = sum(value.numel() for value in state.values())
        key = (model, parameters)
        if key not in self.measured:
            macs, latency, memory = None, None, None
            if model and not family_of(model).find_model:  # else it cannot be built from its name alone
                macs = count_macs(model, config)
                latency, memory = self.time_forward(model, config, state)
            numbers = (parameters, macs and macs / 1e9, latency, memory)
            self.measured[key] = dict(zip([name for name, _ in QUANTITIES], numbers, strict=True))
        return self.measured[key]

    def time_forward(self, model, config, state):
        """(milliseconds, GB) of a forward pass in the run's precision on its device; None where it has no room."""
        try:
            with own_draws(self.run.device):
                net = sketch_model(model, **config)
                weights = {key: value.to(self.run.device, torch.float32) for key, value in state.items()}
                net.load_state_dict(weights, assign=True)
                net = self.run.freeze(net)
                return time_passes(self.run, net, make_forward(model, net, self.run.device))
        except RuntimeError as error:  # what is to be saved must not be lost
            self.run.print(f"note: {model} was not timed ({one_line(error):.200})")
            return None, None


def name_device(run):
    """The GPU's name, or cpu."""
    return torch.get_device_module(run.device).get_device_name(run.device) if run.on_gpu else run.device.type


@contextmanager
def own_draws(device):
    """Draw random numbers as after a seed of 0 on the CPU, and leave all generators as they were."""
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]):
        torch.default_generator.manual_seed(0)
        yield


def make_forward(model, net, device):
    """A function that runs a network on one image, as its family trains it by default."""
    family = family_of(model)
    objective = family.make_objective(**family.own_defaults("train")).to(device)
    x = torch.zeros(1, net.in_channels, net.input_size, net.input_size, device=device)
    y = torch.zeros(1, dtype=torch.long, device=device)
    draw = objective.draw(net, x, y)
    return lambda: objective.predict(net, x, y, draw)


@torch.no_grad()
def time_passes(run, net, forward):
    """(milliseconds, GB) of `forward`, the median of PASSES; see this module for the memory."""
    device, times = torch.get_device_module(run.device), []
    with run.autocast():
        forward()
        if run.on_gpu:
            device.reset_peak_memory_stats(run.device)
            held = device.memory_allocated(run.device)
        for _ in range(PASSES):
            device.synchronize()
            start = time.perf_counter()
            forward()
            device.synchronize()
            times.append(time.perf_counter() - start)
    memory = sum(tensor.nbytes for tensor in net.state_dict().values())
    if run.on_gpu:  # where others, such as a trainer, may hold tensors too
        memory += device.max_memory_allocated(run.device) - held
    return 1000 * statistics.median(times), memory / 1e9


def count_macs(model, config):
    """Multiply-adds of one image in the network called `model`; None if they cannot be counted.

    Nothing is multiplied and no weight has memory, so that large networks take a moment too.
    """
    cpu = torch.device("cpu")
    with own_draws(cpu):
        net = sketch_model(model, **config).eval()
        nothing = {key: torch.zeros(()).expand(value.shape) for key, value in net.state_dict().items()}
        net.load_state_dict(nothing, assign=True)
        flops = count_flops(make_forward(model, net, cpu))
    return flops and flops // 2


@torch.no_grad()
def count_flops(function):
    """Floating point operations of the products in a call, which are skipped; None if they cannot be counted."""
    try:
        # The attention of a processor has no formula; in its plain form it is products.
        with sdpa_kernel(SDPBackend.MATH), SkippedProducts() as skipped, FlopCounterMode(display=False) as counter:
            function()
    except Exception:  # it may be any: of torch's counter, or of an operation that it does not know
        return None
    return None if skipped.unknown else counter.get_total_flops() or None


class SkippedProducts(TorchDispatchMode):
    """Takes zeros for the results of products that torch can count; `unknown` are names of others that were run."""

    def __init__(self):
        super().__init__()
        self.unknown = set()

    def __torch_dispatch__(self, function, types, inputs=(), options=None):
        packet, options = function._overloadpacket, options or {}
        if packet not in flop_registry:
            if PRODUCT.fullmatch(packet.__name__):
                self.unknown.add(packet.__name__)
            return function(*inputs, **options)
        inputs, options = tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), (inputs, options))
        return tree_map_only(torch.Tensor, make_zeros, function(*inputs, **options))


def make_zeros(tensor):
    """Zeros on the CPU of the shape of a tensor."""
    return torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu")


def describe_profile(profile):
    """Lines for people: before and after the cut, and on what it was measured."""
    lines = [f"for one image on {profile['device']}, {profile['precision']}:"]
    for when in ("before", "after"):
        told = [form.format(profile[when][name]) for name, form in QUANTITIES if profile[when][name] is not None]
        lines.append(f"  {when:6}  {'  '.join(told)}")
    return lines
