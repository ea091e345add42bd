"""Between pictures and latents: a Stable Diffusion autoencoder, or nothing at all (`--vae none`)."""

import os

import torch

from engine.errors import InputError


class Pixels:
    """No autoencoder: the network works on the pixels themselves."""

    channels = 3

    def encode(self, images, noise):
        return images

    def decode(self, latents):
        return latents

    def noise_shape(self, size):
        """Shape of the noise that encoding one picture of this size takes."""
        return (0,)


class AutoencoderCodec:
    """diffusers' AutoencoderKL: pictures (N, 3, H, W) in [-1, 1] <-> scaled latents (N, C, H / factor, W / factor)."""

    def __init__(self, vae, latents):
        self.vae, self.scale, self.factor = vae, latents.scale, latents.factor
        self.channels = vae.config.latent_channels

    def noise_shape(self, size):
        return (self.channels, size // self.factor, size // self.factor)

    @torch.no_grad()
    def encode(self, images, noise):
        posterior = self.vae.encode(images).latent_dist
        return (posterior.mean + posterior.std * noise) * self.scale

    @torch.no_grad()
    def decode(self, latents):
        return self.vae.decode(latents / self.scale).sample


def latent_size(args, latents):
    """Height and width of the latents of --image-size; raises InputError if the autoencoder cannot make them."""
    factor = 1 if args.vae == "none" else latents.factor
    if args.image_size % factor:
        raise InputError(f"--image-size {args.image_size}: expected a multiple of {factor}, by which --vae shrinks")
    return args.image_size // factor


def check_vae(name, latents):
    """Raise InputError unless --vae is a known short name, none or a folder."""
    if name != "none" and name not in latents.hub and not os.path.isdir(name):
        expected = ", ".join([*latents.hub, "none"])
        raise InputError(
            f"--vae {name}: no such folder; expected {expected} or a folder with a diffusers AutoencoderKL"
        )


def load_codec(name, latents, device):
    """The codec for --vae: `name` is a short name of the family's `latents.hub`, a local folder, or "none"."""
    check_vae(name, latents)
    if name == "none":
        return Pixels()
    from diffusers.models import AutoencoderKL  # slow to import, and not needed for pixels

    try:
        vae = AutoencoderKL.from_pretrained(latents.hub.get(name, name))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"--vae {name}: cannot load {latents.hub.get(name, name)} ({reason}); give a local folder"
        ) from None
    return AutoencoderCodec(vae.to(device).eval().requires_grad_(False), latents)
