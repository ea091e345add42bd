"""What the README's recipe for ImageNet costs, computed from shapes: operations, hours, memory and disk, as Markdown.

Nothing is measured. Networks run with tensors that have shapes and no memory, by the project's own training steps and
at the README's batch sizes; their floating point operations (a multiply-add counts as two) and the bytes that are alive
at once are counted. Hours are operations over a rate: that of a large bf16 product of the card, times the share of it
that is reached. The evaluator's network computes in float32, at another rate. Memory leaves out what a device needs for
itself and what its allocator wastes. Reading and decoding pictures is not counted.
"""

import argparse
import math
import weakref
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.extraction import make_vae
from diffusion import create_diffusion
from diffusion.objectives import GaussianObjective, TrainStep
from engine.networks import StateSketch
from engine.run import cast_frozen_weights
from engine.vae import pictures_at_once
from evaluation.inception import Inception
from families import create_model
from pruning.distillation import DistillStep, layer_pairs
from pruning.lora import add_lora, weight_update

IMAGES, EPOCHS, SAMPLES, REFERENCE, SAMPLING_STEPS = 1_281_167, 100, 50_000, 10_000, 250
LEARN_BATCH, TRAIN_BATCH, SAMPLE_BATCH, ENCODE_BATCH, EVALUATE_BATCH = 128, 256, 32, 8, 64
CKPT_EVERY, PIXELS, LATENT = 10_000, 256, (4, 32, 32)
TEACHER, STUDENT, GATED, KEPT_LAYERS, LAYERS = "DiT-XL/2", "DiT-D14/2", "DiT-XL-1-2", 14, 28
VAE_WIDTHS = (128, 256, 512, 512)  # of the published SD autoencoder
AT_ONCE = pictures_at_once(PIXELS, PIXELS)  # that it takes


@dataclass(frozen=True)
class Cost:
    """One step of the recipe. memory: bytes by number of cards. disk: a text. fp32: products of the slower kind."""

    name: str
    images: int
    flops_per_image: float
    memory: dict
    disk: str
    fp32: bool = False

    def hours(self, cards, rate):
        """Estimated hours at `rate` floating point operations per second and card."""
        return self.images * self.flops_per_image / (cards * rate) / 3600


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors made inside: `now`, and `peak`, the most so far."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.seen = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, inputs=(), options=None):
        found = function(*inputs, **(options or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return found

    def _add(self, storage):
        if storage in self.seen:  # of a view, or of an operation in place
            return
        self.seen.add(storage)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, storage.nbytes())

    def _remove(self, size):
        self.now -= size


def count_flops(function):
    """Floating point operations of a call: of all products, attention's included, and convolutions."""
    # In the plain form attention is products; nothing is counted in the fused one of a processor.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def count_peak(function):
    """Bytes of tensors made in a call that are alive at once, at most."""
    with LiveBytes() as live:
        function()
    return live.peak


def parameter_bytes(*nets):
    """Bytes of all weights and buffers of these networks."""
    return sum(tensor.nbytes for net in nets for tensor in net.state_dict().values())


def trained_parameters(net):
    return [p for p in net.parameters() if p.requires_grad]


def run_backward(step, n):
    """Losses of a batch of n latents, in half precision, and gradients."""
    with torch.autocast("cpu", torch.bfloat16):
        loss = step(torch.empty(n, *LATENT), torch.zeros(n, dtype=torch.long))["loss"].mean()
    loss.backward()


def run_forward(net, n):
    """A network's output for n latents, in half precision and without gradients."""
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return net(torch.empty(n, *LATENT), torch.zeros(n), torch.zeros(n, dtype=torch.long))


def count_step(step, n, keeps_gradients):
    """Bytes that a training step on n latents needs besides the training state, gradients among them.

    keeps_gradients: several processes exchange them in buffers that stay between steps.
    """
    for p in trained_parameters(step.net):
        p.grad = torch.zeros_like(p) if keeps_gradients else None
    kept = sum(p.nbytes for p in trained_parameters(step.net)) if keeps_gradients else 0
    return kept + count_peak(lambda: run_backward(step, n))


def make_step(net, teacher=None):
    """A step of the network `net`: on the data, or Masked KD from every second layer of a teacher."""
    objective = GaussianObjective(create_diffusion())
    if teacher is None:
        return TrainStep(net, objective)
    teacher = cast_frozen_weights(teacher.requires_grad_(False), "bf16")
    return DistillStep(net, teacher, objective, layer_pairs(len(net.blocks), len(teacher.blocks)))


def cost_of_training(name, cards, batch, epochs, step, sketch, more_bytes=lambda n: 0, more_flops=0.0):
    """The Cost of training; more_bytes(n), more_flops: what the step leaves out, of a batch and of an image."""
    held = sketch.count_bytes() + (parameter_bytes(step.teacher) if isinstance(step, DistillStep) else 0)
    memory = {}
    for count in cards:
        n = math.ceil(batch / count)
        memory[count] = held + more_bytes(n) + count_step(step, n, keeps_gradients=count > 1)
    flops, steps = count_flops(lambda: run_backward(step, 2)) / 2 + more_flops, epochs * (IMAGES // batch)
    states, size = math.ceil(steps / CKPT_EVERY), sketch.count_bytes() / 1e9
    return Cost(f"{name}, batch {batch}", steps * batch, flops, memory, f"{states} states of {size:.1f} GB")


def make_learner(depth, update):
    """A network of so many layers as gate learning trains it, but without gates."""
    net = create_model(TEACHER, depth=depth).train()
    if update == "LoRA":
        add_lora(net, 8)
    return cast_frozen_weights(net, "bf16")


def cost_of_learning(cards, update):
    """Gate learning of 1:2: at each layer half of the samples run with a backward, the others without.

    Counted is the step of a network with as many layers as a sample keeps. A forward of the others is added, and what
    all layers hold: gradients and half-precision copies of what is trained, and block(x) - x for the gates' gradients.
    """
    gated = create_model(GATED)
    weight_update(gated, True, 8 if update == "LoRA" else None)
    cast_frozen_weights(gated, "bf16")
    kept = make_learner(KEPT_LAYERS, update)
    skipped = count_flops(lambda: run_forward(kept, 1)) - count_flops(lambda: run_forward(make_learner(0, update), 1))
    trained = sum(p.numel() for p in trained_parameters(gated)) - sum(p.numel() for p in trained_parameters(kept))
    tokens, width = gated.pos_embed.shape[1:]

    def more_bytes(n):
        return trained * (4 + 2) + LAYERS * n * tokens * width * 2

    sketch = StateSketch(gated, gated.gumbel_gates)
    name = f"learn 1:2, {update}, --no-dense, 1 epoch"
    return cost_of_training(name, cards, LEARN_BATCH, 1, make_step(kept), sketch, more_bytes, skipped)


def cost_of_recovery(cards, name, teacher=None):
    net = create_model(STUDENT).train()
    return cost_of_training(
        f"{name}, {EPOCHS} epochs", cards, TRAIN_BATCH, EPOCHS, make_step(net, teacher), StateSketch(net, net)
    )


def cost_of_inference(name, cards, images, batch, nets, function, disk, fp32=False):
    """The Cost of running `function(n)` on all images, n at a time, the same on every card."""
    memory = sum(map(parameter_bytes, nets)) + count_peak(lambda: function(batch))
    return Cost(name, images, count_flops(lambda: function(1)), dict.fromkeys(cards, memory), disk, fp32)


@torch.no_grad()
def cost_of_encoding(cards):
    """Pictures and their mirrors through the autoencoder, in bf16."""
    vae = make_vae(VAE_WIDTHS)

    def encode(n):
        with torch.autocast("cpu", torch.bfloat16):
            for part in torch.empty(2 * n, 3, PIXELS, PIXELS).split(AT_ONCE):
                vae.encode(part)

    size = IMAGES * (2 * 4 * math.prod(LATENT) + 8)
    disk = f"latents {size / 1e9:.0f} GB"
    return cost_of_inference("encode pictures and mirrors", cards, IMAGES, ENCODE_BATCH, [vae], encode, disk)


@torch.no_grad()
def cost_of_sampling(cards):
    """Guided sampling in bf16, decoding in float32. Steps are alike: one is counted, as often as there are steps."""
    net, vae = cast_frozen_weights(create_model(STUDENT).eval().requires_grad_(False), "bf16"), make_vae(VAE_WIDTHS)
    once = cost_of_inference("", cards, SAMPLES, SAMPLE_BATCH, [net, vae], lambda n: run_forward(net, 2 * n), "")

    def decode(n):
        for part in torch.empty(n, *LATENT).split(AT_ONCE):
            vae.decode(part)

    disk = f"{SAMPLES * PIXELS**2 * 3 / 1e9:.0f} GB .npz"
    last = cost_of_inference("", cards, SAMPLES, SAMPLE_BATCH, [net, vae], decode, disk)
    memory = {count: max(once.memory[count], last.memory[count]) for count in cards}
    flops = SAMPLING_STEPS * once.flops_per_image + last.flops_per_image
    return Cost(f"sample {SAMPLES:,}, {SAMPLING_STEPS} steps, guided", SAMPLES, flops, memory, disk)


@torch.no_grad()
def cost_of_evaluation(cards):
    """Inception features of samples and reference; the distances between features are next to nothing."""
    net = Inception()

    def extract(n):
        net(torch.empty(n, 3, 299, 299))

    name = f"evaluate, {REFERENCE:,} of reference"
    return cost_of_inference(name, cards, SAMPLES + REFERENCE, EVALUATE_BATCH, [net], extract, "", fp32=True)


def compute_costs(cards):
    """All steps of the recipe, for these numbers of cards."""
    # Weights are made with shapes alone, random numbers stay where they are.
    with FakeTensorMode(), torch.random.fork_rng(devices=[]):
        return [
            cost_of_encoding(cards),
            cost_of_learning(cards, "LoRA"),
            cost_of_learning(cards, "full"),
            cost_of_recovery(cards, "fine-tune"),
            cost_of_recovery(cards, "Masked KD", create_model(TEACHER).eval()),
            cost_of_sampling(cards),
            cost_of_evaluation(cards),
        ]


def show_hours(hours):
    if hours < 1:
        return f"{max(1, round(hours * 60))} min"
    return f"{hours:.0f} h" if hours >= 10 else f"{hours:.1f} h"


def write_table(costs, cards, rate, fp32_rate):
    """Lines of a Markdown table; rates: floating point operations per second."""
    numbers = ", ".join(map(str, cards))
    heads = ["step", "TFLOP an image", f"time on {numbers} cards", "memory of a card", "disk"]
    rows = [heads, ["---"] * len(heads)]
    for cost in costs:
        times = ", ".join(show_hours(cost.hours(count, fp32_rate if cost.fp32 else rate)) for count in cards)
        sizes = dict.fromkeys(f"{cost.memory[count] / 1e9:.0f}" for count in cards)  # once where they are the same
        rows.append([cost.name, f"{cost.flops_per_image / 1e12:.2g}", times, f"{', '.join(sizes)} GB", cost.disk])
    return ["| " + " | ".join(row) + " |" for row in rows]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tflops", type=float, default=400, help="of a large bf16 product on a card (default: 400)")
    parser.add_argument("--fp32-tflops", type=float, default=50, help="the same in float32 (default: 50)")
    parser.add_argument("--efficiency", type=float, default=0.4, help="share of them that is reached (default: 0.4)")
    parser.add_argument("--cards", type=int, nargs="+", default=[1, 8], help="numbers of cards (default: 1 8)")
    chosen = parser.parse_args()
    rates = (tflops * 1e12 * chosen.efficiency for tflops in (chosen.tflops, chosen.fp32_tflops))
    print(*write_table(compute_costs(chosen.cards), chosen.cards, *rates), sep="\n")


if __name__ == "__main__":
    main()
