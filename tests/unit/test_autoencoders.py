"""Autoencoders of every class that is known: latents as their pipelines make and read them."""

import diffusers
import pytest
import torch

from engine.vae import AUTOENCODERS, LatentSpace, read_autoencoder
from families.family import Latents

ANY = Latents(hub={}, factor=8, channels=4, scale=1.0)
DEEP = {"block_types": ("ResBlock", "ResBlock"), "block_out_channels": (8, 8), "layers_per_block": (1, 1)}
MADE = {  # class: config, factor, channels
    "AutoencoderKL": (
        {
            "down_block_types": ["DownEncoderBlock2D"] * 2,
            "up_block_types": ["UpDecoderBlock2D"] * 2,
            "block_out_channels": [8, 8],
            "norm_num_groups": 4,
            "latent_channels": 3,
            "scaling_factor": 1.5,
            "shift_factor": 0.25,
        },
        2,
        3,
    ),
    "AutoencoderDC": (
        {
            "latent_channels": 4,
            "attention_head_dim": 4,
            "scaling_factor": 0.4,
            "qkv_multiscales": ((), ()),
            **{f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in DEEP.items()}
            | {"encoder_qkv_multiscales": ((), ()), "decoder_qkv_multiscales": ((), ())},
        },
        2,
        4,
    ),
    "AutoencoderKLQwenImage": (
        {"base_dim": 8, "dim_mult": [1, 1], "num_res_blocks": 1, "temperal_downsample": [True]},
        2,
        4,
    ),
    "AutoencoderKLWan": ({"base_dim": 8, "dim_mult": [1, 1], "num_res_blocks": 1, "temperal_downsample": [True]}, 2, 4),
}
for name in ("AutoencoderKLQwenImage", "AutoencoderKLWan"):
    MADE[name][0].update(z_dim=4, latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.0, 2.0, 0.5, 1.5])
MADE["AutoencoderDC"][0].pop("qkv_multiscales")


@pytest.fixture(scope="module", params=list(AUTOENCODERS))
def saved(request, tmp_path_factory):
    """(class name, folder, the autoencoder in it)."""
    torch.manual_seed(0)
    config, _, _ = MADE[request.param]
    vae = getattr(diffusers, request.param)(**config).eval()
    folder = tmp_path_factory.mktemp("vae") / "vae"
    vae.save_pretrained(folder)
    return request.param, folder, vae


def test_config_tells_sizes(saved):
    name, folder, _ = saved
    assert read_autoencoder(str(folder), ANY) == MADE[name][1:]


@torch.no_grad()
def test_latents_and_pictures(saved):
    """The formulas of the pipelines: (z - shift) * scale, or (z - mean) / deviation by channel, and back."""
    name, folder, vae = saved
    torch.manual_seed(1)
    pictures = torch.rand(2, 3, 16, 16) * 2 - 1
    codec = LatentSpace(16, str(folder), 10, ANY).load_codec("cpu")
    noise = torch.randn(2, *codec.noise_shape(16))
    config = vae.config
    if name == "AutoencoderDC":
        expected = vae.encode(pictures).latent * config.scaling_factor
        back = vae.decode(expected / config.scaling_factor).sample
    elif name == "AutoencoderKL":
        found = vae.encode(pictures).latent_dist
        expected = (found.mean + found.std * noise - config.shift_factor) * config.scaling_factor
        back = vae.decode(expected / config.scaling_factor + config.shift_factor).sample
    else:
        found = vae.encode(pictures[:, :, None]).latent_dist
        mean, std = (torch.tensor(each).view(1, 4, 1, 1, 1) for each in (config.latents_mean, config.latents_std))
        expected = (found.mean + found.std * noise[:, :, None] - mean) / std
        back = vae.decode(expected * std + mean).sample[:, :, 0]
        expected = expected[:, :, 0]
    latents = codec.encode(pictures, noise)
    assert latents.shape == (2, codec.channels, 8, 8)
    torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(codec.decode(latents), back, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("saved", ["AutoencoderKLWan"], indirect=True)
def test_patched_autoencoders_are_refused(saved):
    """Wan 2.2's halves pictures once more, before its first layer; nothing here knows of that."""
    _, folder, _ = saved
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"patch_size": null', '"patch_size": 2'))
    with pytest.raises(ValueError, match="patch_size is 2"):
        read_autoencoder(str(folder), ANY)
    (folder / "config.json").write_text(text)
