"""MAR's head on a GPU: one ancestral step, recorded as a graph, and replayed for every step.

A step of the head on few tokens is over sooner than the processor can ask for its hundred small operations. A graph is
asked for at once, but reads and writes the same memory whenever it runs: what changes from step to step is in tensors
on the device, and the number of tokens is rounded up.
"""

from dataclasses import dataclass

import torch

SMALLEST, LARGEST = 16, 4096  # rows of a graph; more rows keep a GPU busy without one
WARM_UP = 3  # steps before a graph is recorded, in which libraries choose algorithms and take their memory


def padded_rows(count):
    """The number of rows of the graph for `count` tokens: four sizes from a power of two to the next."""
    unit = max(SMALLEST, 1 << max(0, count.bit_length() - 3))
    return -(-count // unit) * unit


@dataclass
class HeadBuffers:
    """The memory that a step reads and writes, for P rows."""

    x: torch.Tensor  # (P, width), moved on by every step
    noise: torch.Tensor  # (steps, P, width)
    step: torch.Tensor  # (1,) int64, how many steps are done
    conditions: dict  # keyword arguments of the model: tensors of P rows, and of none, which hold for all rows

    def fill(self, start, noise, conditions):
        """Begin with tokens start (M, width), their noise (steps, M, width) and conditions, M <= P.

        Rows from M on keep what they hold: no row of a head depends on another.
        """
        self.x[: len(start)] = start
        self.noise[:, : len(start)] = noise
        self.step.zero_()
        for name, buffer in self.conditions.items():
            if buffer.ndim:
                buffer[: len(start)] = conditions[name]
            else:
                buffer.fill_(conditions[name])


# Under inference_mode too these are ordinary tensors, since ones made in that mode cannot be written to outside of it.
@torch.inference_mode(False)
def make_buffers(rows, start, noise, conditions):
    """HeadBuffers of `rows` rows for values like these."""

    def zeros(value):
        if not isinstance(value, torch.Tensor):  # a number; in float64, so that it is the same one
            return start.new_zeros((), dtype=torch.float64)
        return value.new_zeros(rows, *value.shape[1:])

    step = start.new_zeros(1, dtype=torch.int64)
    return HeadBuffers(
        zeros(start),
        noise.new_zeros(len(noise), rows, *noise.shape[2:]),
        step,
        {name: zeros(value) for name, value in conditions.items()},
    )


def take_step(diffusion, model, buffers, **options):
    """One ancestral step of all rows, in place; `options` as for diffusion.p_sample.

    Asks nothing of the device and takes no branch by values, so that a graph of it is right for every step.
    """
    t = (diffusion.num_timesteps - 1 - buffers.step).expand(len(buffers.x))
    noise = buffers.noise.index_select(0, buffers.step)[0]
    out = diffusion.p_sample(model, buffers.x, t, noise=noise, model_kwargs=buffers.conditions, **options)
    buffers.x.copy_(out["sample"])
    buffers.step.add_(1)


def record(step, buffers):
    """A function that does what step() does, as one graph on the device of the buffers."""
    device = torch.get_device_module(buffers.x.device)
    side = device.Stream()
    side.wait_stream(device.current_stream())
    with device.stream(side):
        for _ in range(WARM_UP):
            buffers.step.zero_()  # a short chain has fewer steps than these
            step()
    device.current_stream().wait_stream(side)
    graph = device.CUDAGraph()
    # Other threads may go on: those that write pictures, and the one that watches over NCCL.
    with device.graph(graph, capture_error_mode="thread_local"):
        step()
    return graph.replay


class HeadGraphs:
    """Ancestral sampling with a head by graphs, each made when its number of rows is first needed.

    A graph reads the weights where they were when it was recorded: they may change in place, but not move.
    """

    def __init__(self, diffusion, record=record):
        self.diffusion, self.record = diffusion, record
        self.head, self.kept = None, {}

    def fit(self, start):
        """Whether a graph is of use for tokens start (M, width)."""
        return start.is_cuda and len(start) <= LARGEST

    @torch.no_grad()
    def sample(self, head, model, conditions, start, noise, **options):
        """Samples (M, width) as of diffusion.p_sample_loop(model, ...) with noise (steps, M, width).

        head: the module that `model` calls; graphs of another one are dropped. conditions: keyword arguments of the
        model, tensors (M, ...) and numbers. `options` have to be the same at every call.
        """
        if head is not self.head:
            self.head, self.kept = head, {}
        buffers, step = self._find(model, conditions, start, noise, options)
        buffers.fill(start, noise, conditions)
        for _ in range(len(noise)):
            step()
        return buffers.x[: len(start)].clone()

    def _find(self, model, conditions, start, noise, options):
        """Buffers and the function that takes a step on them."""
        device, rows = start.device.type, padded_rows(len(start))
        precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        kinds = [(name, getattr(value, "dtype", None)) for name, value in conditions.items()]
        key = rows, precision, len(noise), start.dtype, *kinds
        if key not in self.kept:
            buffers = make_buffers(rows, start, noise, conditions)

            def step():
                # Autocast's copies of weights are gone at its end, when a graph would still read them.
                with torch.autocast(device, precision, enabled=precision is not None, cache_enabled=False):
                    take_step(self.diffusion, model, buffers, **options)

            self.kept[key] = buffers, self.record(step, buffers)
        return self.kept[key]
