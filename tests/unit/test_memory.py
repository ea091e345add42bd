"""Real sizes of diffusers' networks from shapes, and that the bytes of the memory table are those of a run."""

import pytest
import torch
from diffusers_classes import CLASSES

from benchmarks.memory import MODELS, RANK, count, count_bytes, halve
from engine.run import Run, cast_frozen_weights
from engine.trainer import Trainer, TrainingOptions
from families.diffusers_stacks import find_stacks, sketch
from models_diffusers import make_network
from pruning.lora import add_lora

PUBLISHED = {  # weights at full depth, and layers of the stacks
    "PixArt-Sigma": (610_856_096, [28]),
    "Sana-1.6B": (1_604_462_752, [20]),
    "SD3-medium": (2_028_328_000, [24]),
    "FLUX.1-dev": (11_901_408_320, [19, 38]),
    "Qwen-Image": (20_430_401_088, [60]),
}
BLOCKS = {"FLUX.1-dev": ("transformer_blocks", "single_transformer_blocks")}


@pytest.mark.parametrize("name", MODELS)
def test_real_sizes(name):
    class_name, config = MODELS[name]
    net = sketch(class_name, config)
    assert all(p.is_meta for p in net.parameters())
    weights, depths = PUBLISHED[name]
    assert sum(p.numel() for p in net.parameters()) == weights
    assert [stack.depth for stack in find_stacks(class_name, config)] == depths
    half = sketch(class_name, halve(class_name, config))
    stacks = BLOCKS.get(name, ("transformer_blocks",))
    assert [len(getattr(half, stack)) for stack in stacks] == [depth // 2 for depth in depths]
    gone = sum(p.numel() for stack in stacks for p in getattr(net, stack).parameters())
    left = sum(p.numel() for stack in stacks for p in getattr(half, stack).parameters())
    assert weights - sum(p.numel() for p in half.parameters()) == gone - left > 0.45 * weights


def held(*owners):
    """Bytes of all parameters, gradients and averages of AdamW in these modules and optimizers."""
    tensors = []
    for owner in owners:
        if isinstance(owner, torch.nn.Module):
            tensors += [each for p in owner.parameters() for each in (p, p.grad) if each is not None]
        else:
            tensors += [each for entry in owner.state.values() for each in entry.values() if each.ndim]
    return sum(tensor.nbytes for tensor in tensors)


class Squares(torch.nn.Module):
    """A step that gives every trained weight a gradient, whatever the network computes."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, y):
        total = sum(p.float().square().sum() for p in self.net.parameters() if p.requires_grad)
        return {"loss": total.expand(len(x))}


@pytest.mark.parametrize("class_name", ["PixArtTransformer2DModel", "FluxTransformer2DModel"])
def test_bytes_are_those_of_a_run(class_name):
    """The table's formulas against the tensors that a trainer really holds."""
    config, run, options = CLASSES[class_name].config, Run("cpu"), TrainingOptions()
    x, y = torch.zeros(2, 1), torch.zeros(2, dtype=torch.long)
    expected = count_bytes(count(class_name, config), count(class_name, config))  # of a half that is the whole

    def train(net, averaged):
        groups = [{"params": [p for p in net.parameters() if p.requires_grad], "lr": 1e-4}]
        trainer = Trainer(run, Squares(net), groups, averaged, options)
        trainer.train_step(x, y)
        return trainer

    def adapted():
        net = make_network(class_name, config)
        add_lora(net, RANK)
        return cast_frozen_weights(net, "bf16")

    teacher = cast_frozen_weights(make_network(class_name, config).requires_grad_(False), "bf16")
    net, small = make_network(class_name, config), torch.nn.Linear(1, 1)
    trainer = train(net, net)
    assert held(net, trainer.optimizer, trainer.ema.module) == expected["fine-tuning the half"]
    assert held(net, trainer.optimizer, trainer.ema.module, teacher) == expected["Masked KD"]
    assert held(net, trainer.optimizer) == expected["learning with the full update"]
    net = adapted()
    assert held(net, train(net, small).optimizer) == expected["learning with LoRA"]
    net = adapted()
    trainer = train(net, net)
    assert held(net, trainer.optimizer, trainer.ema.module, teacher) == expected["Masked KD with LoRA"]
