"""MAR (arXiv 2406.11838): a masked autoencoder of two stacks with a diffusion head, on latents of KL-16."""

from families.family import Family, Latents
from families.flags import FAMILY, Flag, amount, count, expect, number, switch

FIELDS = (
    "hidden_size", "encoder_depth", "decoder_depth", "num_heads", "head_depth", "head_width", "buffer_size",
    "patch_size",
)  # fmt: skip
SIZES = {
    "B": (768, 12, 12, 12, 6, 1024, 64, 1),
    "L": (1024, 16, 16, 16, 8, 1280, 64, 1),
    "H": (1280, 20, 20, 16, 12, 1536, 64, 1),
    "D16": (1024, 8, 8, 16, 8, 1280, 64, 1),
    "D8": (1024, 4, 4, 16, 8, 1280, 64, 1),
    "T": (96, 6, 6, 4, 3, 128, 2, 4),  # tiny: for tests and the digits walkthrough
}
GATED = {  # name after the family's -> size, groups over the layers of both stacks
    "L-1-2": ("L", [[1, 2]] * 16),
    "L-2-4": ("L", [[2, 4]] * 8),
    "L-1-4": ("L", [[1, 4]] * 8),
    "D16-1-2": ("D16", [[1, 2]] * 8),
    "T-1-2": ("T", [[1, 2]] * 6),
}
SCHEDULES = ("linear", "constant")  # of the guidance


def name_sizes():
    """{name: constructor arguments} of all sizes, gated ones included."""
    models = {f"MAR-{size}": dict(zip(FIELDS, row, strict=True)) for size, row in SIZES.items()}
    models["MAR-T"] |= {"attn_dropout": 0.0, "proj_dropout": 0.0}  # so small a network needs none
    for name, (size, groups) in GATED.items():
        models[f"MAR-{name}"] = {**models[f"MAR-{size}"], "groups": groups}
    return models


def stacks(config):
    """Layers of encoder and decoder."""
    return config["encoder_depth"], config["decoder_depth"]


def with_stacks(depths):
    """Constructor arguments for other stacks; one number is cut into two halves."""
    if len(depths) == 1 and depths[0] % 2:
        raise ValueError(f"{depths[0]} layers cannot be cut into two halves; name both stacks, as in MAR-D6+10")
    encoder, decoder = depths if len(depths) == 2 else (depths[0] // 2,) * 2
    return {"encoder_depth": encoder, "decoder_depth": decoder}


def read_shapes(shapes):
    """See families.family.Family. The patch size is that of the size with this width."""
    width, token_width = shapes["z_proj.weight"]
    patches = {config["hidden_size"]: config["patch_size"] for config in MAR.models.values()}
    patch = patches.get(width, 1)
    depths = tuple(count_blocks(shapes, stack) for stack in ("encoder_blocks", "decoder_blocks"))
    return {
        "hidden_size": width,
        "patch_size": patch,
        "depths": depths,
        "in_channels": token_width // patch**2,
        "input_size": patch * round(shapes["diffusion_pos_embed_learned"][1] ** 0.5),
        "num_classes": shapes["class_emb.weight"][0],
    }


def count_blocks(shapes, stack):
    """Number of blocks of a stack."""
    return 1 + max(int(key.split(".")[1]) for key in shapes if key.startswith(f"{stack}."))


def make_objective(*, mask_ratio_min, diffusion_batch_mul):
    """Predict noise and variance of hidden tokens."""
    from diffusion import create_diffusion
    from diffusion.masked import MaskedObjective

    diffusion = create_diffusion(noise_schedule="squaredcos_cap_v2")
    return MaskedObjective(diffusion, mask_ratio_min, diffusion_batch_mul, KL16.scale)


def make_sampler(num_sampling_steps, cfg_scale, *, num_iter, cfg_schedule, temperature, clip_denoised, head_graphs):
    """Reveal the tokens in `num_iter` steps, each by `num_sampling_steps` steps of the head."""
    from diffusion import create_diffusion
    from diffusion.masked import MaskedSampler

    diffusion = create_diffusion(str(num_sampling_steps), "squaredcos_cap_v2")
    return MaskedSampler(diffusion, num_iter, cfg_scale, cfg_schedule, temperature, clip_denoised, head_graphs)


def check_sampler(config, *, num_iter, **_):
    """Raise ValueError if there are fewer tokens than steps."""
    tokens = (config["input_size"] // config["patch_size"]) ** 2
    expect(num_iter <= tokens, "num-iter", num_iter, f"at most {tokens}, the number of tokens")


def sampler_label(num_sampling_steps, *, num_iter, cfg_schedule, **_):
    """Word for the names of samples."""
    return f"{num_iter}x{num_sampling_steps}-{cfg_schedule}"


KL16 = Latents(
    hub={"kl16": "https://huggingface.co/jadechoghari/mar/resolve/main/kl16.safetensors"},
    factor=16,
    channels=16,
    scale=0.2325,
    moments=True,
)
MAR = Family(
    name="MAR",
    network="models_mar.MAR",
    models=name_sizes(),
    base="L",
    latents=KL16,
    make_objective=make_objective,
    make_sampler=make_sampler,
    sampler_label=sampler_label,
    stacks=stacks,
    with_stacks=with_stacks,
    read_shapes=read_shapes,
    stack_names=lambda config: ("encoder_blocks", "decoder_blocks"),
    flags={
        "train": (
            Flag("mask-ratio-min", "smallest share of hidden tokens", 0.7, type=number(float, 1e-6, 1), group=FAMILY),
            Flag("diffusion-batch-mul", "noisings of every hidden token", 4, type=count, group=FAMILY),
        ),
        "sample": (
            Flag("num-iter", "steps in which the tokens are revealed", 64, type=count, group=FAMILY),
            Flag("cfg-schedule", "guidance over the steps", "linear", choices=SCHEDULES, group=FAMILY),
            switch("clip-denoised", "keep predicted data in [-1, 1]: for pixels (--vae none)", group=FAMILY),
            Flag("temperature", "factor of the head's noise", 1.0, type=amount, group=FAMILY),
            Flag("head-graphs", "replay the head's steps as graphs, on a GPU", True, opposite=True, group=FAMILY),
        ),
    },
    check_sampler=check_sampler,
    defaults={
        "all": {"vae": "kl16", "num_sampling_steps": 100},
        "sample_ddp": {"cfg_scale": 3.0},
        "train_masked_kd": {"teacher": "MAR-L"},
    },
    scratch={
        "lr": 8e-4,
        "min_lr": 8e-4,
        "global_batch_size": 2048,
        "epochs": 400,
        "clip_norm": 3.0,
        "betas": [0.9, 0.95],
        "weight_decay": 0.02,
        "warmup_epochs": 100,
    },
    no_decay=("diffloss",),
)
