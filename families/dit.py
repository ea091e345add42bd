"""DiT (arXiv 2212.09748): names and sizes, flags, objective, samplers, latents, releases."""

from families.family import Exchange, Family, Latents, Release
from families.flags import FAMILY, Flag, count, expect, share, switch

SIZES = {
    "XL": {"depth": 28, "hidden_size": 1152, "num_heads": 16},
    "L": {"depth": 24, "hidden_size": 1024, "num_heads": 16},
    "B": {"depth": 12, "hidden_size": 768, "num_heads": 12},
    "S": {"depth": 12, "hidden_size": 384, "num_heads": 6},
    "T": {"depth": 12, "hidden_size": 96, "num_heads": 4},  # tiny: for tests and the digits walkthrough
}
LICENSE = "cc-by-nc-4.0"  # of the published weights, and so of what is made from them
GATED = {  # name after the family's -> size, depth, groups
    "XL-1-2": ("XL", 28, [[1, 2]] * 14),
    "XL-2-4": ("XL", 28, [[2, 4]] * 7),
    "XL-7-14": ("XL", 28, [[7, 14]] * 2),
    "XL-1-4": ("XL", 28, [[1, 4]] * 7),
    "D14-1-2": ("XL", 14, [[1, 2]] * 7),
    # 14 is not a multiple of 4: the last two layers form a 1:2 group, so that 7 layers stay.
    "D14-2-4": ("XL", 14, [[2, 4]] * 3 + [[1, 2]]),
    "T-1-2": ("T", 12, [[1, 2]] * 6),
}


def name_sizes(family):
    """{name: constructor arguments} of all sizes of a network with one stack, pruned and gated ones included."""
    models = {}
    for size, config in SIZES.items():
        for patch in (2, 4, 8):
            models[f"{family}-{size}/{patch}"] = {**config, "patch_size": patch}
    for depth in (19, 14, 7):
        models[f"{family}-D{depth}/2"] = {**SIZES["XL"], "depth": depth, "patch_size": 2}
    for name, (size, depth, groups) in GATED.items():
        models[f"{family}-{name}"] = {**SIZES[size], "depth": depth, "patch_size": 2, "groups": groups}
    return models


def stacks(config):
    """Layers of the one stack."""
    return (config["depth"],)


def with_stacks(depths):
    """Constructor arguments for a stack of another depth."""
    return {"depth": depths[0]}


def read_shapes(shapes):
    """See families.family.Family."""
    width, channels, patch, _ = shapes["x_embedder.proj.weight"]
    tokens, rows = shapes["pos_embed"][1], shapes["y_embedder.embedding_table.weight"][0]
    blocks = [int(key.split(".")[1]) for key in shapes if key.startswith("blocks.")]
    return {
        "hidden_size": width,
        "patch_size": patch,
        "depths": (1 + max(blocks),),
        "in_channels": channels,
        "input_size": round(tokens**0.5) * patch,
        "num_classes": rows - 1,
        "learn_sigma": shapes["final_layer.linear.weight"][0] == 2 * channels * patch**2,
    }


def make_objective():
    """Predict noise and variance."""
    from diffusion import create_diffusion
    from diffusion.objectives import GaussianObjective

    return GaussianObjective(create_diffusion())


def make_sampler(num_sampling_steps, cfg_scale, *, sampler, cfg_channels, cfg_interval):
    """Ancestral sampling, DDIM or DPM-Solver++; raises ValueError for a number of steps that the chain lacks."""
    from diffusion import create_diffusion
    from diffusion.samplers import GaussianSampler

    expect(cfg_interval[0] <= cfg_interval[1], "cfg-interval", cfg_interval, "the first to be the smaller one")
    respacing = {"ddpm": str(num_sampling_steps), "ddim": f"ddim{num_sampling_steps}", "dpmpp": ""}[sampler]
    diffusion = create_diffusion(respacing)
    if num_sampling_steps > diffusion.num_timesteps:
        raise ValueError(f"the chain has {diffusion.num_timesteps} steps")
    return GaussianSampler(diffusion, sampler, cfg_scale, cfg_channels, cfg_interval, num_sampling_steps)


def sampler_label(num_sampling_steps, *, sampler, **_):
    """Word for the names of samples."""
    return f"{sampler}-{num_sampling_steps}"


def list_releases():
    """{file name: Release} of the published weights."""
    usual = {"num_classes": 1000, "vae": "ema"}
    found = {}
    for size in (256, 512):
        name = f"DiT-XL-2-{size}x{size}.pt"
        settings = {"model": "DiT-XL/2", "image_size": size, **usual}
        origin = {"license": LICENSE, "base_model": f"facebook/DiT-XL-2-{size}"}
        found[name] = Release(f"https://dl.fbaipublicfiles.com/DiT/models/{name}", settings, **origin)
    for depth in (7, 14, 19):
        name = f"TinyDiT-D{depth}-MaskedKD-500K.pt"
        settings = {"model": f"DiT-D{depth}/2", "image_size": 256, **usual}
        url = f"https://github.com/VainF/TinyFusion/releases/download/v1.0.0/{name}"
        found[name] = Release(url, settings, license=LICENSE, base_model="facebook/DiT-XL-2-256")
    return found


CFG_CHANNELS = Flag(
    "cfg-channels", "number of output channels, from the first, that are guided", 3, type=count, group=FAMILY
)
SD_VAE = Latents(
    hub={name: f"stabilityai/sd-vae-ft-{name}" for name in ("ema", "mse")}, factor=8, channels=4, scale=0.18215
)
DIT = Family(
    name="DiT",
    network="models.DiT",
    models=name_sizes("DiT"),
    base="XL",
    latents=SD_VAE,
    make_objective=make_objective,
    make_sampler=make_sampler,
    sampler_label=sampler_label,
    stacks=stacks,
    with_stacks=with_stacks,
    read_shapes=read_shapes,
    flags={
        "sample": (
            Flag(
                "sampler",
                "ancestral, DDIM, or DPM-Solver++ for about 20 steps",
                "ddpm",
                choices=("ddpm", "ddim", "dpmpp"),
                group=FAMILY,
            ),
            CFG_CHANNELS,
            Flag(
                "cfg-interval",
                "guide between these parts of the way, 0 noise, 1 picture",
                [0.0, 1.0],
                type=share,
                nargs=2,
                group=FAMILY,
            ),
        ),
        "score": (
            switch(
                "clean-latents",
                "the original's calibration: no noise, and steps below --num-sampling-steps, unmapped",
                group=FAMILY,
            ),
        ),
    },
    patterns={"DiT-D19/2": "3:4x2,2:4,3:4,2:4,3:4x2"},
    releases=list_releases(),
    default_releases={"DiT-XL/2": "DiT-XL-2-{image_size}x{image_size}.pt"},
    exchange=Exchange("families.dit_diffusers", ("DiTTransformer2DModel", "Transformer2DModel"), "DiTPipeline"),
)
