"""One record per family of networks: what a script needs to know once `--model` names a member."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from diffusion import create_diffusion
from diffusion.flow import FORMS, LAST_STEPS, PATHS, PREDICTIONS, WEIGHTS, FlowObjective, OdeSampler, SdeSampler
from diffusion.masked import GUIDANCE, MaskedObjective, MaskedSampler, plan_steps
from diffusion.objectives import GaussianObjective
from diffusion.samplers import GaussianSampler
from models import DiT, DiT_models, SiT, SiT_models
from models_mar import MAR, MAR_models
from pruning.gates import block_stacks as block_stacks  # for the engine, which does not know pruning

GATES = "gumbel_gates."


@dataclass(frozen=True)
class Latents:
    """What the network works on: the autoencoder's hub ids or URLs by short name, shrink factor, channels and scale.

    moments: encoded are mean and log-variance, from which every visit of a training run samples.
    """

    hub: dict
    factor: int
    channels: int
    scale: float
    moments: bool = False


@dataclass(frozen=True)
class Family:
    """network + objective + sampler + latents, and what their flags and files look like."""

    name: str
    network: type
    models: dict
    latents: Latents
    objective: Callable  # args -> objective
    sampler: Callable  # args -> sampler
    label: Callable  # args -> word for the names of samples
    base: str  # the size that a name without one has: DiT-D14/2 is an XL
    stacks: Callable  # constructor arguments -> layers of every stack
    with_stacks: Callable  # layers of every stack -> constructor arguments
    describe: Callable  # state dict -> what its shapes tell
    flags: dict  # "train", "sample", "score": flags that not all families have -> rows for argparse, with a range
    check: Callable = lambda args, config: None  # flags and constructor arguments -> ValueError if they do not fit
    defaults: dict = field(default_factory=dict)  # script or "all" -> defaults of shared flags
    plain: dict = field(default_factory=dict)  # defaults of train.py without weights to start from
    no_decay: tuple = ()  # parts of names of weights that never decay
    patterns: dict = field(default_factory=dict)  # pruning patterns of published weights that record none
    releases: dict = field(default_factory=dict)  # file name -> URL
    default_releases: dict = field(default_factory=dict)  # model -> its release by image size


def _guidance(args):
    return {"cfg_scale": args.cfg_scale, "cfg_channels": args.cfg_channels}


def _gaussian_sampler(args):
    steps = args.num_sampling_steps
    diffusion = create_diffusion({"ddpm": str(steps), "ddim": f"ddim{steps}", "dpmpp": ""}[args.sampler])
    if steps > diffusion.num_timesteps:
        raise ValueError(f"the chain has {diffusion.num_timesteps} steps")
    return GaussianSampler(diffusion, args.sampler, cfg_interval=args.cfg_interval, num_steps=steps, **_guidance(args))


def _flow_objective(args):
    return FlowObjective(args.path_type, args.prediction, args.loss_weight, args.train_eps)


def _flow_sampler(args):
    shared = {"path": args.path_type, "prediction": args.prediction, "sample_eps": args.sample_eps, **_guidance(args)}
    shared["num_steps"] = args.num_sampling_steps
    if args.mode == "ODE":
        return OdeSampler(
            **shared, method=args.sampling_method or "dopri5", atol=args.atol, rtol=args.rtol, reverse=args.reverse
        )
    form = {"diffusion_form": args.diffusion_form, "diffusion_norm": args.diffusion_norm}
    last = {"last_step": args.last_step, "last_step_size": args.last_step_size}
    return SdeSampler(**shared, method=args.sampling_method or "Euler", **form, **last)


def _masked_objective(args):
    diffusion = create_diffusion(noise_schedule="squaredcos_cap_v2")
    return MaskedObjective(diffusion, args.mask_ratio_min, args.diffusion_batch_mul, KL16.scale)


def _masked_sampler(args):
    diffusion = create_diffusion(str(args.num_sampling_steps), "squaredcos_cap_v2")
    guidance = {"cfg_scale": args.cfg_scale, "schedule": args.cfg_schedule}
    options = {"temperature": args.temperature, "clip_denoised": args.clip_denoised}
    return MaskedSampler(diffusion, args.num_iter, **guidance, **options)


def _check_masked(args, config):
    tokens = (config["input_size"] // model_config(args.model)["patch_size"]) ** 2
    plan_steps(tokens, args.num_iter)


def _depth(state, stack):
    return 1 + max(int(key.split(".")[1]) for key in state if key.startswith(f"{stack}."))


def _describe_dit(state, family="DiT"):
    width, channels, patch, _ = state["x_embedder.proj.weight"].shape
    tokens, rows = state["pos_embed"].shape[1], state["y_embedder.embedding_table.weight"].shape[0]
    depths = (_depth(state, "blocks"),)
    return {
        "model": name_of(width, depths, patch, family),
        "hidden_size": width,
        "depths": depths,
        "in_channels": channels,
        "input_size": round(tokens**0.5) * patch,
        "num_classes": rows - 1,
        "learn_sigma": state["final_layer.linear.weight"].shape[0] == 2 * channels * patch**2,
    }


def _describe_mar(state):
    width, token_width = state["z_proj.weight"].shape
    patch = {f.keywords["hidden_size"]: f.keywords["patch_size"] for f in MAR_models.values()}.get(width, 1)
    depths = (_depth(state, "encoder_blocks"), _depth(state, "decoder_blocks"))
    return {
        "model": name_of(width, depths, patch, "MAR"),
        "hidden_size": width,
        "depths": depths,
        "in_channels": token_width // patch**2,
        "input_size": patch * round(state["diffusion_pos_embed_learned"].shape[1] ** 0.5),
        "num_classes": state["class_emb.weight"].shape[0],
    }


TOLD = ("input_size", "num_classes", "in_channels", "learn_sigma")  # constructor arguments that shapes may tell


def _with_two_stacks(depths):
    if len(depths) == 1 and depths[0] % 2:
        raise ValueError(f"{depths[0]} layers are no two halves; name both stacks, as in MAR-D6+10")
    encoder, decoder = depths if len(depths) == 2 else (depths[0] // 2,) * 2
    return {"encoder_depth": encoder, "decoder_depth": decoder}


AMOUNT, SHARE, COUNT = ({"type": t, "range": r} for t, r in ((float, (0,)), (float, (0, 1)), (int, (1,))))
CHANNELS = {**COUNT, "default": 3, "help": "number of output channels, from the first, that are guided"}
PATH_FLAGS = {
    "path-type": {"choices": tuple(PATHS), "default": "Linear", "help": "path between noise and data"},
    "prediction": {"choices": PREDICTIONS, "default": "velocity", "help": "what the network predicts"},
}
SD_VAE = Latents(
    hub={name: f"stabilityai/sd-vae-ft-{name}" for name in ("ema", "mse")}, factor=8, channels=4, scale=0.18215
)
KL16 = Latents(
    hub={"kl16": "https://huggingface.co/jadechoghari/mar/resolve/main/kl16.safetensors"},
    factor=16,
    channels=16,
    scale=0.2325,
    moments=True,
)
DIT = Family(
    name="DiT",
    network=DiT,
    models=DiT_models,
    latents=SD_VAE,
    objective=lambda args: GaussianObjective(create_diffusion()),
    sampler=_gaussian_sampler,
    label=lambda args: f"{args.sampler}-{args.num_sampling_steps}",
    base="XL",
    stacks=lambda config: (config["depth"],),
    with_stacks=lambda depths: {"depth": depths[0]},
    describe=_describe_dit,
    flags={
        "train": {},
        "sample": {
            "sampler": {
                "choices": ("ddpm", "ddim", "dpmpp"),
                "default": "ddpm",
                "help": "ancestral, DDIM, or DPM-Solver++ for about 20 steps",
            },
            "cfg-channels": CHANNELS,
            "cfg-interval": {
                **SHARE,
                "nargs": 2,
                "default": [0.0, 1.0],
                "help": "guide between these parts of the way, 0 noise, 1 picture",
            },
        },
        "score": {
            "clean-latents": {
                "action": "store_true",
                "default": False,
                "help": "the original's calibration: no noise, and steps below --num-sampling-steps, unmapped",
            }
        },
    },
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
SIT = Family(
    name="SiT",
    network=SiT,
    models=SiT_models,
    latents=SD_VAE,
    objective=_flow_objective,
    sampler=_flow_sampler,
    label=lambda args: f"{args.mode}-{args.sampling_method or 'default'}-{args.num_sampling_steps}",
    base="XL",
    stacks=DIT.stacks,
    with_stacks=DIT.with_stacks,
    describe=lambda state: _describe_dit(state, "SiT"),
    flags={
        "train": {
            **PATH_FLAGS,
            "loss-weight": {
                "choices": WEIGHTS,
                "default": None,
                "help": "weight of the loss over time (default: none)",
            },
            "train-eps": {**SHARE, "default": None, "help": "distance to the ends of time (default: as needed)"},
        },
        "sample": {
            "mode": {"nargs": "?", "choices": ("ODE", "SDE"), "default": "ODE", "help": "what is solved"},
            **PATH_FLAGS,
            "cfg-channels": CHANNELS,
            "sampling-method": {
                "default": None,
                "help": "Euler or Heun for SDE; for ODE one of torchdiffeq's (default: Euler; dopri5)",
            },
            "atol": {**AMOUNT, "default": 1e-6, "help": "absolute tolerance of an adaptive ODE solver"},
            "rtol": {**AMOUNT, "default": 1e-3, "help": "relative tolerance of an adaptive ODE solver"},
            "reverse": {"action": "store_true", "default": False, "help": "ODE: from data to noise"},
            "sample-eps": {**SHARE, "default": None, "help": "distance to the ends of time (default: as needed)"},
            "diffusion-form": {"choices": FORMS, "default": "sigma", "help": "SDE: noise over time"},
            "diffusion-norm": {**AMOUNT, "default": 1.0, "help": "SDE: amount of noise"},
            "last-step": {"choices": LAST_STEPS, "default": "Mean", "help": "SDE: kind of the last step"},
            "last-step-size": {**SHARE, "default": 0.04, "help": "SDE: length of the last step, in time"},
        },
    },
    defaults={"sample_ddp": {"cfg_scale": 1.0}, "train_masked_kd": {"teacher": "SiT-XL/2", "beta": 2e-4}},
    plain={"lr": 1e-4, "min_lr": 1e-4, "clip_norm": float("inf")},
    patterns={"SiT-D19/2": DIT.patterns["DiT-D19/2"]},
)
MAR_FAMILY = Family(
    name="MAR",
    network=MAR,
    models=MAR_models,
    latents=KL16,
    objective=_masked_objective,
    sampler=_masked_sampler,
    label=lambda args: f"{args.num_iter}x{args.num_sampling_steps}-{args.cfg_schedule}",
    base="L",
    stacks=lambda config: (config["encoder_depth"], config["decoder_depth"]),
    with_stacks=_with_two_stacks,
    describe=_describe_mar,
    flags={
        "train": {
            "mask-ratio-min": {**SHARE, "default": 0.7, "help": "smallest share of hidden tokens"},
            "diffusion-batch-mul": {**COUNT, "default": 4, "help": "noisings of every hidden token"},
        },
        "sample": {
            "num-iter": {**COUNT, "default": 64, "help": "steps in which the tokens are revealed"},
            "cfg-schedule": {"choices": tuple(GUIDANCE), "default": "linear", "help": "guidance over the steps"},
            "clip-denoised": {
                "action": "store_true",
                "default": False,
                "help": "keep predicted data in [-1, 1]: for pixels (--vae none)",
            },
            "temperature": {**AMOUNT, "default": 1.0, "help": "factor of the head's noise"},
        },
    },
    check=_check_masked,
    defaults={
        "all": {"vae": "kl16", "num_sampling_steps": 100},
        "sample_ddp": {"cfg_scale": 3.0},
        "train_masked_kd": {"teacher": "MAR-L"},
    },
    plain={
        **{"lr": 8e-4, "min_lr": 8e-4, "global_batch_size": 2048, "epochs": 400, "clip_norm": 3.0},
        **{"betas": [0.9, 0.95], "weight_decay": 0.02, "warmup_epochs": 100},
    },
    no_decay=("diffloss",),
)
FAMILIES = {family.name: family for family in (DIT, SIT, MAR_FAMILY)}


def family_of(name):
    """The family that a model name belongs to: by its first word, DiT otherwise."""
    return FAMILIES.get(name.partition("-")[0], FAMILIES["DiT"])


def model_config(name):
    """Constructor arguments of a model name: a registered one, or NAME-D<layers>/<patch> for another depth of a size.

    DiT-D16/2 is DiT-XL/2 with 16 layers, DiT-T-D6/2 is DiT-T/2 with 6, MAR-D6+10 has stacks of 6 and 10. Raises
    ValueError for anything else.
    """
    family = family_of(name)
    if name in family.models:
        return dict(family.models[name].keywords)
    match = re.fullmatch(rf"{family.name}(-[A-Z]+)?-D([1-9]\d*(?:\+[1-9]\d*)?)((?:/\d+)?)", name)
    base = match and f"{family.name}{match[1] or '-' + family.base}{match[3]}"
    if base not in family.models or match[2].count("+") >= len(family.stacks(family.models[base].keywords)):
        raise ValueError(
            f"{name!r} is no model: expected one of {', '.join(family.models)}, or a depth as in DiT-D16/2"
        )
    return {**family.models[base].keywords, **family.with_stacks([int(part) for part in match[2].split("+")])}


def stack_layers(name):
    """Number of layers in every stack of the model called `name`, in forward order."""
    return family_of(name).stacks(model_config(name))


def create_model(name, **overrides):
    """Build the network called `name`; `overrides` are constructor arguments, such as input_size or groups."""
    return family_of(name).network(**{**model_config(name), **overrides})


def name_of(width, depths, patch, family="DiT"):
    """The ungated model name with this width, stacks and patch size; None if no size has that width and patch."""
    family = FAMILIES[family]
    plain = {n: f.keywords for n, f in family.models.items() if "groups" not in f.keywords}
    same_size = {n: c for n, c in plain.items() if (c["hidden_size"], c["patch_size"]) == (width, patch)}
    for name, config in same_size.items():
        if family.stacks(config) == tuple(depths):
            return name
    text = str(sum(depths)) if len(set(depths)) == 1 else "+".join(map(str, depths))
    for name in same_size:
        size, slash, patch = name.partition("/")
        return f"{size.removesuffix('-' + family.base)}-D{text}{slash}{patch}"
    return None


def depth_name(name, depths):
    """The plain model name of a pruned `name`: DiT-XL-1-2 with 14 layers is DiT-D14/2. None if there is none."""
    config = model_config(name)
    return name_of(config["hidden_size"], depths, config["patch_size"], family_of(name).name)


def describe_weights(state, name=None):
    """What the shapes of a state dict tell: model, hidden_size, depths, and those of TOLD that the family has.

    name: a model of the family it should be; DiT and SiT differ in nothing else. Raises ValueError if these are not the
    weights of a network of ours.
    """
    family = FAMILIES["MAR"] if any(key.startswith("encoder_blocks.") for key in state) else FAMILIES["DiT"]
    family = family_of(name) if name else family
    try:
        return family.describe(state)
    except (KeyError, ValueError) as error:
        raise ValueError(f"these are no {family.name} weights ({error})") from None


def expected_shapes(net):
    """Shapes of the weights that `net` needs from a file: its state dict without gates."""
    return {k: torch.Size(v.shape) for k, v in net.state_dict().items() if not k.startswith(GATES)}
