"""Pictures by index: label and noise of image i are functions of the seed and i, whoever makes it."""

import math
from dataclasses import dataclass

import numpy as np
import torch

from diffusion.pipeline_call import PipelineError
from engine.checkpoint import Weights
from engine.errors import InputError, RunError, flag_errors
from engine.images import save_grid
from engine.run import compile_blocks
from engine.vae import LatentSpace
from families import family_of, model_config

SIXTEEN = 16  # normal numbers that torch makes together on a CPU


class ImageDraws:
    """The random draws of a batch of images, in this order for each: label, start noise, noise of every step.

    Drawn on the CPU by one generator per image, so that they depend neither on the batch nor on the device, and sent
    there in one piece by every call.
    """

    def __init__(self, seed, indices, shape, device):
        seeds = [np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0] for index in indices]
        self.generators = [torch.Generator().manual_seed(int(s) & (2**63 - 1)) for s in seeds]
        self.shape, self.device = shape, device

    def labels(self, num_classes):
        """Random labels (N,)."""
        drawn = [torch.randint(num_classes, (), generator=g) for g in self.generators]
        return torch.stack(drawn).to(self.device)

    def start_noise(self):
        """The next standard normal tensor (N, *self.shape)."""
        return self.step_noise(None, self.shape)

    def step_noise(self, step, shape, count=None):
        """The next standard normal tensor (N, *shape), or `count` of them (count, N, *shape), as samplers ask for it.

        The order counts, not `step`.
        """
        drawn = self._draw_normal(count or 1, shape).to(self.device, non_blocking=True).transpose(0, 1)
        return drawn[0] if count is None else drawn

    def _draw_normal(self, count, shape):
        """The next `count` tensors of every image on the CPU, (N, count, *shape); pinned if they go to a GPU."""
        drawn = torch.empty(len(self.generators), count, *shape, pin_memory=torch.device(self.device).type == "cuda")
        # torch makes normal numbers by sixteens: a call for several tensors gives other numbers than a call for each,
        # unless these are whole sixteens.
        whole = math.prod(shape) % SIXTEEN == 0
        for rows, generator in zip(drawn, self.generators, strict=True):
            for part in [rows] if whole else rows:
                part.normal_(generator=generator)
        return drawn


@dataclass(frozen=True)
class SamplingPlan:
    """What is to be sampled; `model` and the fields from num_sampling_steps on are settings of these names.

    own: the family's own flags of kind "sample".
    """

    model: str
    weights: Weights
    space: LatentSpace
    own: dict
    num_sampling_steps: int
    cfg_scale: float
    compile: bool | None = False
    vae_precision: str = "fp32"

    def check(self):
        """Raise InputError for weights, sizes and flags that do not fit together."""
        if "groups" in model_config(self.model):
            raise InputError(
                f"--model {self.model}: has gates; prune with it first, then sample from the pruned weights"
            )
        self.make_sampler()  # before the weights, which may have to be fetched
        config = self.config
        self.weights.check_fit(self.model, config)
        if self.space.channels != config["in_channels"]:
            raise InputError(
                f"--vae {self.space.vae}: has {self.space.channels} channels, but {self.weights.flag} "
                f"{self.weights.name} works on {config['in_channels']}; take the autoencoder it was trained with"
            )
        with flag_errors("--model", self.model):
            family_of(self.model).check_sampler({**model_config(self.model), **config}, **self.own)
        self.space.check_codec()

    @property
    def config(self):
        """Constructor arguments of the network."""
        told = self.weights.read_config(self.model)
        return {**told, "input_size": self.space.size, "num_classes": self.space.num_classes}

    def make_sampler(self):
        """The family's sampler."""
        with flag_errors("--num-sampling-steps", self.num_sampling_steps):
            return family_of(self.model).make_sampler(self.num_sampling_steps, self.cfg_scale, **self.own)

    def load(self, run):
        """A PictureSampler, ready to draw."""
        config, in_half = self.config, self.vae_precision != "fp32"
        codec = self.space.load_codec(run.device, channels_last=in_half, precision=self.vae_precision)
        net = run.freeze(self.weights.build(self.model, config, run.device, run.precision))
        if run.compiles(self.compile):
            compile_blocks(net)
        shape = (config["in_channels"], config["input_size"], config["input_size"])
        return PictureSampler(run, net, self.make_sampler().to(run.device), codec, shape)


@dataclass
class PictureSampler:
    """A network, its sampler and its autoencoder, ready to draw pictures; shape: that of the latents of one."""

    run: object
    net: object
    sampler: object
    codec: object
    shape: tuple

    def draws(self, seed, indices):
        """The ImageDraws of these images."""
        return ImageDraws(seed, indices, self.shape, self.run.device)

    @torch.inference_mode()
    def sample(self, draws, labels, progress=False):
        """Pictures (N, 3, H, W) in [-1, 1] for labels (N,). Raises RunError if they are not finite."""
        try:
            with self.run.autocast():
                latents = self.sampler(self.net, labels, draws.start_noise(), draws.step_noise, progress)
        except AssertionError as error:  # of torchdiffeq, when no step is short enough
            raise RunError(f"the solver gives up ({error}); see the weights (--ckpt), --atol and --rtol") from None
        except PipelineError as error:
            raise RunError(str(error)) from None
        pictures = self.codec.decode(latents)
        if not pictures.isfinite().all():
            raise RunError(
                "the sampled pictures are not finite: see the weights (--ckpt) and --cfg-scale, or take another "
                "--precision"
            )
        return pictures

    def save_grid(self, path, labels, seed):
        """Sample one picture per label, of a list, and write them as a grid, four per row."""
        labels = torch.tensor(labels, device=self.run.device)
        pictures = self.sample(self.draws(seed, range(len(labels))), labels, progress=self.run.is_main)
        save_grid(path, pictures)


def preview_labels(num_classes):
    """Eight labels to look at: the customary ImageNet classes if there are that many, else spread over all classes."""
    customary = [207, 360, 387, 974, 88, 979, 417, 279]
    if num_classes > max(customary):
        return customary
    return [i * num_classes // 8 for i in range(8)]
