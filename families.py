"""One record per family of networks: what a script needs to know once `--model` names a member."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from diffusion import create_diffusion
from diffusion.objectives import GaussianObjective
from diffusion.samplers import GaussianSampler
from models import DiT, DiT_models
from pruning.gates import block_stacks as block_stacks  # for the engine, which does not know pruning


@dataclass(frozen=True)
class Latents:
    """What the network works on: the autoencoder's hub ids by short name, its shrink factor, channels and scale."""

    hub: dict
    factor: int
    channels: int
    scale: float


@dataclass(frozen=True)
class Family:
    """network + objective + sampler + latents; `patterns`: pruning patterns of published weights that record none."""

    name: str
    network: type
    models: dict
    latents: Latents
    objective: Callable  # args -> objective
    sampler: Callable  # args -> sampler
    patterns: dict = field(default_factory=dict)
    releases: dict = field(default_factory=dict)  # file name -> URL
    default_releases: dict = field(default_factory=dict)  # model -> its release by image size


def _gaussian_sampler(args):
    steps = args.num_sampling_steps
    respacing = {"ddpm": str(steps), "ddim": f"ddim{steps}", "dpmpp": ""}[args.sampler]
    diffusion, guidance = create_diffusion(respacing), (args.cfg_scale, args.cfg_channels, args.cfg_interval)
    if steps > diffusion.num_timesteps:
        raise ValueError(f"the chain has {diffusion.num_timesteps} steps")
    return GaussianSampler(diffusion, args.sampler, *guidance, num_steps=steps)


SD_VAE = Latents(
    hub={name: f"stabilityai/sd-vae-ft-{name}" for name in ("ema", "mse")}, factor=8, channels=4, scale=0.18215
)
FAMILIES = {
    "DiT": Family(
        name="DiT",
        network=DiT,
        models=DiT_models,
        latents=SD_VAE,
        objective=lambda args: GaussianObjective(create_diffusion()),
        sampler=_gaussian_sampler,
        patterns={"DiT-D19/2": "3:4x2,2:4,3:4,2:4,3:4x2"},
        releases={
            "DiT-XL-2-256x256.pt": "https://dl.fbaipublicfiles.com/DiT/models/DiT-XL-2-256x256.pt",
            "DiT-XL-2-512x512.pt": "https://dl.fbaipublicfiles.com/DiT/models/DiT-XL-2-512x512.pt",
        }
        | {
            f"TinyDiT-D{depth}-MaskedKD-500K.pt": "https://github.com/VainF/TinyFusion/releases/download/v1.0.0/"
            f"TinyDiT-D{depth}-MaskedKD-500K.pt"
            for depth in (7, 14, 19)
        },
        default_releases={"DiT-XL/2": "DiT-XL-2-{image_size}x{image_size}.pt"},
    )
}


def family_of(name):
    """The family that a model name belongs to: by its first word, DiT otherwise."""
    return FAMILIES.get(name.partition("-")[0], FAMILIES["DiT"])


def model_config(name):
    """Constructor arguments of a model name: a registered one, or NAME-D<layers>/<patch> for another depth of a size.

    DiT-D16/2 is DiT-XL/2 with 16 layers, DiT-T-D6/2 is DiT-T/2 with 6. Raises ValueError for anything else.
    """
    family = family_of(name)
    if name in family.models:
        return dict(family.models[name].keywords)
    match = re.fullmatch(rf"{family.name}(-[A-Z]+)?-D([1-9]\d*)/(\d+)", name)
    base = match and f"{family.name}{match[1] or '-XL'}/{match[3]}"
    if base not in family.models:
        raise ValueError(
            f"{name!r} is no model: expected one of {', '.join(family.models)}, or a depth as in DiT-D16/2"
        )
    return {**family.models[base].keywords, "depth": int(match[2])}


def create_model(name, **overrides):
    """Build the network called `name`; `overrides` are constructor arguments, such as input_size or groups."""
    return family_of(name).network(**{**model_config(name), **overrides})


def name_of(width, depth, patch, family="DiT"):
    """The ungated model name with this width, depth and patch size; None if no size has that width and patch."""
    plain = {n: f.keywords for n, f in FAMILIES[family].models.items() if "groups" not in f.keywords}
    same_size = {n: c for n, c in plain.items() if (c["hidden_size"], c["patch_size"]) == (width, patch)}
    for name, config in same_size.items():
        if config["depth"] == depth:
            return name
    for name in same_size:
        size = name.removesuffix(f"/{patch}").removesuffix("-XL")
        return f"{size}-D{depth}/{patch}"
    return None


def depth_name(name, depth):
    """The plain model name of a pruned `name`: DiT-XL-1-2 with 14 layers is DiT-D14/2. None if there is none."""
    config = model_config(name)
    return name_of(config["hidden_size"], depth, config["patch_size"], family_of(name).name)


def describe_weights(state):
    """What the shapes of a state dict tell: model, hidden_size, depth, patch_size, in_channels, input_size, ...

    Raises ValueError if these are not the weights of a network of ours.
    """
    try:
        width, channels, patch, _ = state["x_embedder.proj.weight"].shape
        tokens, rows = state["pos_embed"].shape[1], state["y_embedder.embedding_table.weight"].shape[0]
        out_rows = state["final_layer.linear.weight"].shape[0]
        depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
    except (KeyError, ValueError) as error:
        raise ValueError(f"these are no DiT weights ({error})") from None
    return {
        "model": name_of(width, depth, patch),
        "hidden_size": width,
        "depth": depth,
        "patch_size": patch,
        "in_channels": channels,
        "input_size": round(tokens**0.5) * patch,
        "num_classes": rows - 1,
        "learn_sigma": out_rows == 2 * channels * patch**2,
    }


def expected_shapes(net):
    """Shapes of the weights that `net` needs from a file: its state dict without gates."""
    return {k: torch.Size(v.shape) for k, v in net.state_dict().items() if not k.startswith("gumbel_gates.")}
