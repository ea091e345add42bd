"""The record of a family of networks: all that scripts and engine need to know once `--model` names a member.

Without torch. Networks, objectives and samplers are imported when they are made, so that --help stays quick; what they
have to offer is in `families/protocols.py`.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Latents:
    """What the networks work on: the autoencoders' hub ids or URLs by short name, shrink factor, channels and scale.

    The first short name is the default. moments: mean and log-variance are stored, and every visit of a training run
    samples from them.
    """

    hub: dict
    factor: int
    channels: int
    scale: float
    moments: bool = False

    @property
    def usual(self):
        """Short name of the default autoencoder."""
        return next(iter(self.hub))


@dataclass(frozen=True)
class Release:
    """A published file of weights: where it is, the settings that it stands for, licence and origin for model cards."""

    url: str
    settings: dict
    license: str | None = None  # as the Hub names it
    base_model: str | None = None  # on the Hub


@dataclass(frozen=True)
class Exchange:
    """How a family's weights are exchanged with diffusers.

    module: has to_diffusers, from_diffusers, ORIGINAL and SCHEDULER, see families.dit_diffusers. classes: names that
    config.json gives the class of such a network. pipeline: the class that samples from it.
    """

    module: str
    classes: tuple
    pipeline: str

    def load(self):
        """The module."""
        return importlib.import_module(self.module)


@dataclass(frozen=True)
class Family:
    """network + objective + sampler + latents, and what their flags and files look like."""

    name: str
    network: str  # "module.Class" of the network
    models: dict  # registered name -> constructor arguments
    base: str  # the size that a name without one has: DiT-D14/2 is an XL
    latents: Latents
    make_objective: Callable  # (**flags of kind "train") -> Objective
    make_sampler: Callable  # (num_sampling_steps, cfg_scale, **flags of kind "sample") -> Sampler
    sampler_label: Callable  # (num_sampling_steps, **flags of kind "sample") -> word for the names of samples
    stacks: Callable  # constructor arguments -> layers of every stack
    with_stacks: Callable  # layers of every stack -> constructor arguments
    read_shapes: Callable  # {key: shape} of a state dict -> constructor arguments that it tells, and `depths` of stacks
    flags: dict  # kind ("train", "sample", "score") -> Flags that not all families have
    check_sampler: Callable = lambda config, **flags: None  # ValueError if sampler and network do not fit
    defaults: dict = field(default_factory=dict)  # script or "all" -> defaults of shared flags
    scratch: dict = field(default_factory=dict)  # defaults of train.py without weights to start from
    no_decay: tuple = ()  # parts of names of weights that never decay
    patterns: dict = field(default_factory=dict)  # model -> pruning pattern of published weights that record none
    releases: dict = field(default_factory=dict)  # file name -> Release
    default_releases: dict = field(default_factory=dict)  # model -> its release by image size
    exchange: Exchange | None = None  # None: diffusers has no such network
    stack_names: Callable = lambda config: ("blocks",)  # constructor arguments -> names of the stacks in a state dict
    fixed_layers: Callable = lambda config: ()  # constructor arguments -> layers that have to stay
    asks: dict = field(default_factory=dict)  # kind -> shared settings that its objective or sampler is made from too
    has_captions: bool = False  # whether images come with captions, and not in classes
    # Of a family whose models are folders instead of names:
    find_model: Callable | None = None  # name -> constructor arguments
    describe: Callable | None = None  # ({key: shape}, name) -> what `families.describe_shapes` tells
    own_weights: Callable = lambda name: None  # name -> name of the weights that a model has without another flag
    tell_settings: Callable = lambda name, typed: ({}, {})  # see families.of_diffusers.tell_settings
    make_recorder: Callable | None = None  # see families.of_diffusers.make_recorder
    save: Callable | None = None  # see families.of_diffusers.save, and export there
    export: Callable | None = None
    check_export: Callable | None = None
    find_pipeline: Callable | None = None
    sample_hint: dict = field(default_factory=dict)  # flags that sampling needs besides weights, with words for values
    pruned_file: str = "pruned.pt"  # usual name of pruned weights in a run folder

    def own_flags(self, kinds):
        """The Flags of some kinds, each once."""
        return list({flag.dest: flag for kind in kinds for flag in self.flags.get(kind, ())}.values())

    def own_defaults(self, kind):
        """Defaults of the flags of a kind, {setting: value}."""
        return {flag.dest: flag.default for flag in self.own_flags([kind])}

    def defaults_for(self, script):
        """Defaults of shared flags that the family has for a script."""
        return self.defaults.get("all", {}) | self.defaults.get(script, {})
