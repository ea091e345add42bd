"""LoRA: the cheap weight update that stands for the later fine-tuning while gates are learnt (paper, section 3.3)."""

import math
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F

SCALE = 2  # alpha per rank


class LoRALinear(nn.Linear):
    """y = W x + b + (alpha / rank) B A x with W and b frozen; B starts at zero. Keys: weight, bias, lora_a, lora_b."""

    def __init__(self, linear, rank, alpha):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        # Matrices may be held in half precision; what is trained may not.
        dtype = torch.promote_types(linear.weight.dtype, torch.float32)
        like = {"device": linear.weight.device, "dtype": dtype, "bias": False}
        self.lora_a = nn.Linear(linear.in_features, rank, **like)
        self.lora_b = nn.Linear(rank, linear.out_features, **like)
        self.scale = alpha / rank
        nn.init.kaiming_uniform_(self.lora_a.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_b.weight)

    def forward(self, x):
        # Scaled where it is small: `rank` values a token instead of all outputs, and the same again in the backward.
        return F.linear(x, self.weight, self.bias) + self.lora_b(self.scale * self.lora_a(x))


def add_lora(model, rank, alpha=None):
    """Freeze `model` but its gates, adapt every nn.Linear (alpha = SCALE * rank), return the adapters' weights."""
    if rank < 1:
        raise ValueError(f"LoRA rank {rank}: at least 1 is needed")
    model.requires_grad_(False)
    if hasattr(model, "gumbel_gates"):
        model.gumbel_gates.requires_grad_(True)
    linears = [(name, module) for name, module in model.named_modules() if type(module) is nn.Linear]
    adapters = []
    for name, linear in linears:
        parent, _, child = name.rpartition(".")
        adapted = LoRALinear(linear, rank, SCALE * rank if alpha is None else alpha)
        setattr(model.get_submodule(parent), child, adapted)
        adapters += [adapted.lora_a.weight, adapted.lora_b.weight]
    return adapters


def merge_adapters(state):
    """A state dict in which adapters of the usual scale are part of the weights that they adapt, in float32."""
    merged = {key: value for key, value in state.items() if not is_adapter(key)}
    for key in state:
        if key.endswith(".lora_a.weight"):
            name = key.removesuffix(".lora_a.weight")
            a, b = (state[f"{name}.{part}.weight"].float() for part in ("lora_a", "lora_b"))
            merged[f"{name}.weight"] = merged[f"{name}.weight"].float() + SCALE * (b @ a)
    return merged


def is_adapter(key):
    """Whether a key of a state dict is that of a weight of an adapter."""
    return key.endswith((".lora_a.weight", ".lora_b.weight"))


@contextmanager
def adapters_off(model):
    """Run a network as if it had no adapters."""
    scales = {module: module.scale for module in model.modules() if isinstance(module, LoRALinear)}
    try:
        for module in scales:
            module.scale = 0.0
        yield
    finally:
        for module, scale in scales.items():
            module.scale = scale


@torch.no_grad()
def learned_weights(net, original, trained=None):
    """The state dict `original` with the update that a network which started from it has learnt, on the CPU.

    trained: the network's state dict, where it is not whole in the network itself.
    What was learnt is in float32, as half precision would round most of an update away; the rest is as in `original`.
    """
    learned, trained = dict(original), trained or net.state_dict()
    for name, module in net.named_modules():
        if isinstance(module, LoRALinear):
            a, b = (trained[f"{name}.{each}.weight"].float() for each in ("lora_a", "lora_b"))
            update = module.scale * (b @ a)
            weight = original[f"{name}.weight"]
            learned[f"{name}.weight"] = weight.float() + update.to(weight.device)
    for name, p in net.named_parameters():
        if p.requires_grad and name in original:
            learned[name] = trained[name].float().to(original[name].device)
    return learned


def weight_update(model, delta_w, lora_rank=None):
    """The parameters that stand for fine-tuning: adapters, all weights (`delta_w` alone) or none; freezes the rest."""
    if delta_w and lora_rank is not None:
        return add_lora(model, lora_rank)
    gates = {id(p) for p in model.gumbel_gates}
    weights = [p for p in model.parameters() if p.requires_grad and id(p) not in gates]
    if delta_w:
        return weights
    for weight in weights:
        weight.requires_grad_(False)
    return []
