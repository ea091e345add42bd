"""A network to train: checked before anything runs, counted without memory, built on its device."""

from dataclasses import dataclass

import torch

from engine.checkpoint import Weights
from engine.errors import InputError
from engine.run import cast_frozen_weights, compile_blocks
from engine.weight_files import GATES
from families import create_model, family_of, full_name, model_config, sketch_model
from pruning.lora import add_lora


@dataclass(frozen=True)
class NetworkStart:
    """The network called `model`, and the weights it starts from; None: initial weights.

    config: constructor arguments that the data and the method ask for. option: the flag that names the model. Raises
    InputError if the weights do not fit, or if the model is gated but `config` has no groups.
    """

    model: str
    config: dict
    weights: Weights | None = None
    option: str = "--model"

    def __post_init__(self):
        if "groups" in model_config(self.model) and "groups" not in self.config:
            raise InputError(
                f"{self.option} {self.model}: has gates; take a plain name, or prune_by_learning.py to learn them"
            )
        asked = {**model_config(self.model), **self.config}
        if asked["input_size"] % asked.get("patch_size", 1):
            raise InputError(
                f"{self.option} {self.model}: patches of {asked['patch_size']} do not divide latents of "
                f"{asked['input_size']}x{asked['input_size']}; take smaller patches or another --image-size"
            )
        if self.weights:
            self.weights.check_fit(self.model, self.config, self.option)

    def build(self, device, frozen="fp32"):
        """The network in float32; `frozen`: of matrices that will not be trained, see engine.checkpoint.Weights."""
        if self.weights:
            return self.weights.build(self.model, self.config, device, frozen)
        return create_model(self.model, **self.config).to(device)

    def build_without_memory(self):
        """The network on torch's meta device, for counting; random numbers stay where they are."""
        return sketch_model(self.model, **self.config)

    def count_parameters(self):
        """Number of weights, those of gates left out."""
        named = self.build_without_memory().named_parameters()
        return sum(p.numel() for name, p in named if not name.startswith(GATES))

    def describe(self, space):
        """Facts to record with weights of this network, which works on an engine.vae.LatentSpace."""
        source = full_name(self.weights.name) if self.weights else None
        known = self.weights.facts if self.weights else {}
        facts = {"model": full_name(self.model), **describe_space(self.model, space), "source": source}
        return facts | {name: known[name] for name in ("kept", "pattern", "profile") if name in known}


def describe_space(model, space):
    """Facts about the engine.vae.LatentSpace of a model: of a network with captions, whose shapes do not tell the size
    of its pictures, that in place of the number of classes."""
    if family_of(model).has_captions:
        return {"image_size": space.image_size, "vae": space.vae}
    return {"num_classes": space.num_classes, "vae": space.vae}


def build_teacher(start, run, settings):
    """The network of a NetworkStart, ready to be learnt from as the settings of a training script say."""
    precision = settings.teacher_precision or run.precision
    teacher = run.freeze(start.build(run.home, precision), precision)
    if run.compiles(settings.compile):
        compile_blocks(teacher)
    return teacher


def add_adapters(net, settings, precision):
    """If `--lora` says so, freeze a network but for new adapters; its matrices are held in `precision` then."""
    if settings.lora:
        add_lora(net, settings.lora_rank)
        cast_frozen_weights(net, precision)
    return net


@dataclass(frozen=True)
class StateSketch:
    """What a training state will hold, without memory: the network as it is trained, and the part that is averaged."""

    net: torch.nn.Module
    averaged: torch.nn.Module

    def count_bytes(self):
        """Bytes of weights, averaged copy, and AdamW's two averages of everything that is trained."""
        weights = sum(t.nbytes for module in (self.net, self.averaged) for t in module.state_dict().values())
        return weights + sum(8 * p.numel() for p in self.net.parameters() if p.requires_grad)

    def check(self, state, path):
        """Raise InputError, naming the first difference, unless the state read from `path` is one of this network."""
        for entry, module in (("model", self.net), ("ema", self.averaged)):
            expected = {key: tuple(value.shape) for key, value in module.state_dict().items()}
            held = state.get(entry)
            found = {key: tuple(value.shape) for key, value in held.items()} if isinstance(held, dict) else {}
            if found != expected:
                key = min(key for key in expected.keys() | found.keys() if found.get(key) != expected.get(key))
                raise InputError(
                    f"--resume {path}: not a training state of this model: {key} in its {entry} is "
                    f"{found.get(key, 'missing')}, expected {expected.get(key, 'none')}; take another file"
                )
            for key, value in held.items():
                if not value.is_floating_point() or not value.isfinite().all():
                    raise InputError(f"--resume {path}: {key} in its {entry} is not finite numbers; take another file")
        self._check_averages(state, path)

    def _check_averages(self, state, path):
        """Raise InputError unless the state's optimizer has the averages of every weight that is trained.

        It may have none at all while the loss of fp16 is still being scaled: no step was taken then.
        """
        optimizer = state.get("opt")
        entries = optimizer.get("state") if isinstance(optimizer, dict) else None
        entries = list(entries.values()) if isinstance(entries, dict) else [None]
        expected = sorted(tuple(p.shape) for p in self.net.parameters() if p.requires_grad)
        if not entries and state.get("scaler"):
            return
        for name in ("exp_avg", "exp_avg_sq"):
            values = [entry.get(name) if isinstance(entry, dict) else None for entry in entries]
            are_numbers = all(isinstance(v, torch.Tensor) and v.isfinite().all() for v in values)
            if not are_numbers or sorted(tuple(value.shape) for value in values) != expected:
                raise InputError(f"--resume {path}: {name} in its opt are not those of this model; take another file")
