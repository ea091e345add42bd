"""MAR's autoencoder (KL-16): published weights with the names of latent-diffusion, as a diffusers AutoencoderKL."""

import re

import torch

LAST_LEVEL = 4  # of five; the decoder counts its levels from the other end
RENAMINGS = [  # applied in this order
    (r"^decoder\.up\.(\d)", lambda match: f"decoder.up_blocks.{LAST_LEVEL - int(match[1])}"),
    (r"^encoder\.down\.", "encoder.down_blocks."),
    (r"\.mid\.block_(\d)", lambda match: f".mid_block.resnets.{int(match[1]) - 1}"),
    (r"\.mid\.attn_1", ".mid_block.attentions.0"),
    (r"\.block\.(\d)", r".resnets.\1"),
    (r"\.attn\.(\d)", r".attentions.\1"),
    (r"\.(down|up)sample\.", r".\1samplers.0."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"(attentions\.\d)\.norm\.", r"\1.group_norm."),
    (r"(attentions\.\d)\.([qkv])\.", r"\1.to_\2."),
    (r"(attentions\.\d)\.proj_out\.", r"\1.to_out.0."),
]


def rename_key(key):
    """decoder.up.4.block.0.conv1.weight -> decoder.up_blocks.0.resnets.0.conv1.weight"""
    for pattern, replacement in RENAMINGS:
        key = re.sub(pattern, replacement, key)
    return key


def make_kl16():
    """KL-16 with random weights: 16 channels at 1/16 of the size."""
    from diffusers.models import AutoencoderKL  # slow to import

    return AutoencoderKL(
        block_out_channels=(128, 128, 256, 256, 512),
        layers_per_block=2,
        latent_channels=16,
        down_block_types=["DownEncoderBlock2D"] * LAST_LEVEL + ["AttnDownEncoderBlock2D"],
        up_block_types=["UpDecoderBlock2D"] * (LAST_LEVEL + 1),
        scaling_factor=0.2325,
    )


def build_kl16(state):
    """KL-16 as an AutoencoderKL, from the state dict of kl16.ckpt (its `model`), whose tensors it takes over.

    Raises ValueError if keys or shapes are not those of KL-16.
    """
    with torch.device("meta"):  # no time for random weights
        vae = make_kl16()
    renamed = {rename_key(key): value for key, value in state.items()}
    # 1x1 convolutions of the attentions are linear maps in diffusers.
    renamed = {k: v.squeeze((2, 3)) if v.ndim == 4 and ".attentions." in k else v for k, v in renamed.items()}
    expected, found = ({k: v.shape for k, v in weights.items()} for weights in (vae.state_dict(), renamed))
    wrong = [key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key)]
    if wrong:
        key = min(wrong)
        raise ValueError(f"not the weights of KL-16: {key} has shape {found.get(key)}, expected {expected.get(key)}")
    vae.load_state_dict(renamed, assign=True)
    return vae
