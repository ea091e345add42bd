"""What learning and recovering large networks of diffusers takes in memory, computed from shapes, as Markdown.

Counted are weights, gradients, AdamW's two averages, the averaged copy and the teacher. Frozen matrices are held in
half precision, as autocast computes with them; what is trained, and vectors, in float32. Activations come on top: with
--grad-checkpointing the tokens between blocks, and one block's own. `--run` takes one step of learning with LoRA and
one of Masked KD on this machine, with random weights of full size, and shows what they took.
"""

import argparse
import resource
import time
from dataclasses import dataclass

import torch

from diffusion.objectives import TrainStep
from engine.run import Run, cast_frozen_weights, find_matrices
from engine.trainer import Trainer, TrainingOptions
from families.diffusers_stacks import cut_config, find_stacks, fixed_layers, sketch
from models_diffusers import make_network
from pruning.distillation import DistillStep, layer_pairs
from pruning.lora import add_lora, weight_update

RANK = 8
MODELS = {  # as published: class of diffusers and config
    "PixArt-Sigma": (
        "PixArtTransformer2DModel",
        {
            "num_attention_heads": 16,
            "attention_head_dim": 72,
            "num_layers": 28,
            "in_channels": 4,
            "out_channels": 8,
            "cross_attention_dim": 1152,
            "caption_channels": 4096,
            "sample_size": 128,
            "patch_size": 2,
            "use_additional_conditions": False,
        },
    ),
    "Sana-1.6B": (
        "SanaTransformer2DModel",
        {
            "num_attention_heads": 70,
            "attention_head_dim": 32,
            "num_layers": 20,
            "in_channels": 32,
            "out_channels": 32,
            "num_cross_attention_heads": 20,
            "cross_attention_head_dim": 112,
            "cross_attention_dim": 2240,
            "caption_channels": 2304,
            "mlp_ratio": 2.5,
            "sample_size": 32,
            "patch_size": 1,
        },
    ),
    "SD3-medium": (
        "SD3Transformer2DModel",
        {
            "num_attention_heads": 24,
            "attention_head_dim": 64,
            "num_layers": 24,
            "in_channels": 16,
            "out_channels": 16,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 1536,
            "pooled_projection_dim": 2048,
            "sample_size": 128,
            "patch_size": 2,
            "pos_embed_max_size": 192,
        },
    ),
    "FLUX.1-dev": (
        "FluxTransformer2DModel",
        {
            "num_attention_heads": 24,
            "attention_head_dim": 128,
            "num_layers": 19,
            "num_single_layers": 38,
            "in_channels": 64,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
            "guidance_embeds": True,
        },
    ),
    "Qwen-Image": (
        "QwenImageTransformer2DModel",
        {
            "num_attention_heads": 24,
            "attention_head_dim": 128,
            "num_layers": 60,
            "in_channels": 64,
            "out_channels": 16,
            "joint_attention_dim": 3584,
        },
    ),
}


@dataclass(frozen=True)
class Sizes:
    """Numbers of weights of a network: all, those of matrices, and those of LoRA adapters of rank RANK."""

    weights: int
    matrices: int
    adapters: int

    @property
    def frozen(self):
        """Bytes of the network when nothing of it is trained."""
        return 2 * self.matrices + 4 * (self.weights - self.matrices)


def half_layers(stacks):
    """Layers of a network of which every second of each stack stays, the last ones among them."""
    kept, start = set(), 0
    for stack in stacks:
        kept |= set(range(start + 1, start + stack.depth, 2))
        start += stack.depth
    return sorted(kept | set(fixed_layers(stacks)))


def halve(class_name, config):
    """The config of a network of half the depth."""
    stacks = find_stacks(class_name, config)
    return cut_config(config, stacks, half_layers(stacks))


def count(class_name, config):
    """The Sizes of a network."""
    net = sketch(class_name, config)
    weights = sum(p.numel() for p in net.parameters())
    matrices = sum(p.numel() for module in find_matrices(net).values() for p in module.parameters(recurse=False))
    return Sizes(weights, matrices, sum(p.numel() for p in add_lora(net, RANK)))


def count_bytes(whole, half):
    """{what is done: bytes} of a network and its half, both Sizes."""
    adapters = 16 * whole.adapters  # weight, gradient, two averages
    half_adapters, copy = 16 * half.adapters, half.frozen + 4 * half.adapters
    return {
        "learning with LoRA": whole.frozen + adapters,
        "learning with the full update": 16 * whole.weights,
        "fine-tuning the half": 20 * half.weights,
        "Masked KD": 20 * half.weights + whole.frozen,
        "Masked KD with LoRA": half.frozen + half_adapters + copy + whole.frozen,
    }


def write_table():
    """Lines of the table."""
    rows = []
    for name, (class_name, config) in MODELS.items():
        whole, half = count(class_name, config), count(class_name, halve(class_name, config))
        taken = count_bytes(whole, half)
        rows.append(
            [name, f"{whole.weights:,}", f"{half.weights:,}", *(f"{each / 1e9:.1f}" for each in taken.values())]
        )
    head = ["network", "weights", "half the depth", *(f"{name}, GB" for name in taken)]
    return ["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]]


class NoiseObjective(torch.nn.Module):
    """A noise prediction with random prompts of `tokens` tokens, for networks that are called as PixArt's is."""

    def __init__(self, tokens=120, width=4096):
        super().__init__()
        self.tokens, self.width = tokens, width

    def draw(self, net, x, y):
        inputs = {
            "timestep": torch.randint(0, 1000, (len(x),)),
            "encoder_hidden_states": torch.randn(len(x), self.tokens, self.width),
            "encoder_attention_mask": torch.ones(len(x), self.tokens),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        }
        return torch.randn_like(x), inputs

    def predict(self, net, x, y, draw, observe=None, mask=None):
        noise, inputs = draw
        if hasattr(net, "gumbel_gates"):
            net.prepare(lambda n: {"hidden_states": x[[0] * n], **repeat_first(inputs, n)})
        return net(hidden_states=x + noise, **inputs, return_dict=False, observe=observe, mask=mask)[0].chunk(2, 1)[0]

    def loss(self, prediction, x, draw):
        return {"loss": (prediction.float() - draw[0]).square().flatten(1).mean(1)}

    def match(self, student, teacher, x, draw):
        return {"kd_loss": (student.float() - teacher.float()).square().flatten(1).mean(1)}


def repeat_first(inputs, n):
    """The inputs of the first sample, n times."""
    return {name: value[[0] * n] if torch.is_tensor(value) else value for name, value in inputs.items()}


def run_steps(name, pixels, images):
    """Take a step of learning with LoRA and one of Masked KD, and print what they took."""
    class_name, config = MODELS[name]
    run, objective, options = Run("auto", "bf16"), NoiseObjective(), TrainingOptions(grad_checkpointing=True)
    x, y = torch.randn(images, config["in_channels"], pixels // 8, pixels // 8), torch.zeros(images, dtype=torch.long)
    net = make_network(class_name, config, groups=[[1, 2]] * (config["num_layers"] // 2))
    adapters = weight_update(net, True, RANK)
    cast_frozen_weights(net, "bf16")
    groups = [{"params": adapters, "lr": 1e-4}, {"params": list(net.gumbel_gates), "lr": 1e-3}]
    report(name, "learning with LoRA", Trainer(run, TrainStep(net, objective), groups, net.gumbel_gates, options), x, y)
    del net, adapters, groups
    teacher = run.freeze(make_network(class_name, config))
    student = make_network(class_name, halve(class_name, config))
    pairs = layer_pairs(config["num_layers"] // 2, config["num_layers"])
    step = DistillStep(student, teacher, objective, pairs)
    groups = [{"params": list(student.parameters()), "lr": 1e-4}]
    report(name, "Masked KD", Trainer(run, step, groups, student, options), x, y)


def report(name, what, trainer, x, y):
    """Take one step and print its loss, time and the most memory of this process so far."""
    start = time.monotonic()
    loss = trainer.train_step(x.to(trainer.run.device), y.to(trainer.run.device))["loss"].mean().item()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{name}, {what}: loss {loss:.4f}, {time.monotonic() - start:.0f} s, {peak:.1f} GB", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="take two steps of a PixArt-Sigma with random weights")
    parser.add_argument("--pixels", type=int, default=256, help="height and width of the pictures of --run")
    parser.add_argument("--images", type=int, default=2, help="pictures of a step of --run")
    arguments = parser.parse_args()
    if arguments.run:
        run_steps("PixArt-Sigma", arguments.pixels, arguments.images)
    else:
        print("\n".join(write_table()))


if __name__ == "__main__":
    main()
