"""Between pictures and latents: the autoencoder that --vae names, or nothing at all (`--vae none`)."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.errors import InputError, flag_errors, one_line
from engine.files import download, read_json
from engine.run import DTYPES
from engine.weight_files import read_weights
from families.family import Latents

SLICE_PIXELS = 8 * 256 * 256  # that go through an autoencoder at once: 8 pictures of 256 px, 2 of 512 px


@dataclass(frozen=True)
class LatentSpace:
    """What a network works on: pictures of image_size pixels as latents of an autoencoder, in num_classes classes.

    vae: the value of --vae. latents: those of the family. Raises InputError, when it is made, for an autoencoder that
    is not there or cannot make latents of such pictures.
    """

    image_size: int
    vae: str
    num_classes: int
    latents: Latents

    def __post_init__(self):
        with flag_errors("--vae", self.vae):
            check_vae(self.vae, self.latents)
        factor = shrink_factor(self.vae, self.latents)
        if self.image_size % factor:
            raise InputError(f"--image-size {self.image_size}: expected a multiple of {factor}, by which --vae shrinks")

    @property
    def size(self):
        """Height and width of the latents."""
        return self.image_size // shrink_factor(self.vae, self.latents)

    @property
    def channels(self):
        """Channels that the network works on."""
        if self.vae == "none":
            return Pixels.channels
        return read_autoencoder(self.vae, self.latents)[1]

    def check_codec(self):
        """Raise InputError if a local autoencoder cannot be loaded; asks no network."""
        if self.vae not in self.latents.hub:
            self.load_codec("cpu")

    def load_codec(self, device, channels_last=False, precision="fp32"):
        """The families.protocols.Codec; channels_last: see AutoencoderCodec; precision: what its weights are held in.

        Raises InputError if it cannot be loaded.
        """
        if self.vae == "none":
            return Pixels()
        vae = load_autoencoder(self.vae, self.latents).to(device)
        if precision != "fp32":  # diffusers warns of every other way to say so
            vae = vae.to(DTYPES[precision])
        return AutoencoderCodec(vae.eval().requires_grad_(False), self.latents, channels_last)


class Pixels:
    """No autoencoder: the network works on the pixels themselves."""

    channels = stored_channels = 3
    scale = 1.0

    def encode(self, images, noise):
        return images

    def decode(self, latents):
        return latents

    def noise_shape(self, size):
        return (0,)


class AutoencoderCodec:
    """An autoencoder of diffusers: pictures (N, 3, H, W) in [-1, 1] <-> latents (N, C, H / factor, W / factor).

    Latents are scaled, and shifted or brought to mean 0 and deviation 1 by channel, as the autoencoder's config says.
    Of a family that samples latents at every visit, `encode` gives the moments: mean and log-variance, unscaled.
    It computes with at most SLICE_PIXELS pixels at once (one picture, if that has more), so that memory does not grow
    with N, and in the precision of its weights; pictures come out in float32.

    channels_last: keep the channels of a pixel together in memory, which is faster in half precision.
    """

    def __init__(self, vae, latents, channels_last=False):
        kind = AUTOENCODERS[type(vae).__name__]
        channels_last = channels_last and not kind.is_video
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        self.vae, self.is_video = vae.to(memory_format=self.format), kind.is_video
        self.factor, self.channels = kind.read(vae.config)
        self.scale = vae.config.get("scaling_factor") or latents.scale
        self.shift, self.gain = vae.config.get("shift_factor"), self.scale
        if kind.is_video and vae.config.get("latents_mean"):
            mean, std = (torch.tensor(vae.config[f"latents_{name}"], device=vae.device) for name in ("mean", "std"))
            self.shift, self.gain = mean.view(1, -1, 1, 1), 1 / std.view(1, -1, 1, 1)
        self.moments = latents.moments
        self.stored_channels = self.channels * (2 if latents.moments else 1)

    def noise_shape(self, size):
        return (self.channels, size // self.factor, size // self.factor)

    @torch.no_grad()
    def encode(self, images, noise):
        together = pictures_at_once(*images.shape[2:])
        parts = zip(images.split(together), noise.split(together), strict=True)
        return torch.cat([self._encode_slice(*part) for part in parts])

    def _encode_slice(self, images, noise):
        """`encode` of few pictures."""
        encoded = self.vae.encode(self._as_taken(images))
        if not hasattr(encoded, "latent_dist"):
            return self._scaled(encoded.latent)
        posterior = encoded.latent_dist
        if self.moments:
            return torch.cat([posterior.mean, posterior.logvar], dim=1)
        mean, std = (self._as_picture(each) for each in (posterior.mean, posterior.std))
        return self._scaled(mean + std * noise)

    def _scaled(self, latents):
        return latents * self.gain if self.shift is None else (latents - self.shift) * self.gain

    @torch.no_grad()
    def decode(self, latents):
        together = pictures_at_once(*(self.factor * size for size in latents.shape[2:]))
        latents = latents / self.gain if self.shift is None else latents / self.gain + self.shift
        parts = latents.split(together)
        decoded = (self.vae.decode(self._as_taken(part)).sample for part in parts)
        return torch.cat([self._as_picture(part).float() for part in decoded])

    def _as_taken(self, images):
        """Pictures or latents in the precision of the weights and in their order of memory; of a video, one frame."""
        images = images.to(self.vae.dtype).contiguous(memory_format=self.format)
        return images[:, :, None] if self.is_video else images

    def _as_picture(self, tensor):
        """The way back from one frame."""
        return tensor[:, :, 0] if self.is_video else tensor


def pictures_at_once(height, width):
    """How many pictures of height x width pixels go through an autoencoder at once."""
    return max(1, SLICE_PIXELS // (height * width))


def shrink_factor(name, latents):
    """Pixels per latent, along one side: of the family's autoencoder, of the one in a local folder, or 1 for none."""
    return 1 if name == "none" else read_autoencoder(name, latents)[0]


@dataclass(frozen=True)
class AutoencoderKind:
    """A class of autoencoders.

    sizes: a list in its config with an entry for every size of picture, each half of the one before. channels: what it
    calls its latent channels. is_video: whether it takes videos, of which a picture is one frame.
    """

    sizes: str
    channels: str = "latent_channels"
    is_video: bool = False

    def read(self, config):
        """(shrink factor, latent channels) out of a config."""
        return 2 ** (len(config[self.sizes]) - 1), config[self.channels]


AUTOENCODERS = {
    "AutoencoderKL": AutoencoderKind("block_out_channels"),
    "AutoencoderDC": AutoencoderKind("encoder_block_out_channels"),
    "AutoencoderKLQwenImage": AutoencoderKind("dim_mult", "z_dim", is_video=True),
    "AutoencoderKLWan": AutoencoderKind("dim_mult", "z_dim", is_video=True),
}


def read_autoencoder(name, latents):
    """(shrink factor, latent channels) of the family's autoencoder, or of the one in a local folder."""
    if name in latents.hub or os.path.isfile(name):
        return latents.factor, latents.channels
    path = Path(name) / "config.json"
    if not os.path.lexists(path):
        raise InputError(f"--vae {name}: no config.json of an autoencoder of diffusers; expected such a folder")
    config = read_json("--vae", path)
    with flag_errors("--vae", path):
        return check_autoencoder(config).read(config)


def check_autoencoder(config):
    """The AutoencoderKind of a config.json. Raises ValueError unless it can be one of a known class."""
    scale = config.get("scaling_factor")
    kind = AUTOENCODERS.get(str(config.get("_class_name")))
    if not kind:
        raise ValueError(f"_class_name is {config.get('_class_name')!r:.100}; expected {' or '.join(AUTOENCODERS)}")
    sizes, layers = config.get(kind.sizes), config.get("layers_per_block", 1)
    fits = {
        kind.sizes: isinstance(sizes, list) and len(sizes) > 0 and all(map(is_size, sizes)),
        kind.channels: is_size(config.get(kind.channels)),
        "layers_per_block": not isinstance(layers, int | float | str) or is_size(layers),
        "patch_size": config.get("patch_size") is None,  # of pictures before the first layer
        "scaling_factor": scale is None or (type(scale) in (int, float) and 0 < scale < float("inf")),
    }
    wrong = [name for name, is_right in fits.items() if not is_right]
    if wrong:
        raise ValueError(f"{wrong[0]} is {config.get(wrong[0])!r:.100}; expected that of an {config['_class_name']}")
    return kind


def is_size(value):
    """Whether a value from a file can be a number of channels or layers."""
    return type(value) is int and 0 < value < 1 << 16


def check_vae(name, latents):
    """Raise ValueError unless an autoencoder's name is a known short name, none, a folder or, for MAR, a file."""
    is_kl16_file = os.path.isfile(name) and latents.moments
    if name != "none" and name not in latents.hub and not os.path.isdir(name) and not is_kl16_file:
        expected = ", ".join([*latents.hub, "none"])
        raise ValueError(f"no such folder; expected {expected} or a folder with an autoencoder of diffusers")


def load_autoencoder(name, latents):
    """The autoencoder for --vae: from the hub, a local folder, or a file or URL of KL-16."""
    source = latents.hub.get(name, name)
    if source.startswith("https://"):
        with flag_errors("--vae", name):
            source = str(download(source, Path(torch.hub.get_dir()) / "checkpoints" / Path(source).name))
    if os.path.isfile(source):
        from engine.kl16 import build_kl16

        with flag_errors("--vae", source):
            return build_kl16(read_weights(source, "--vae"))
    import diffusers.models  # slow to import, and not needed for pixels

    config = Path(source) / "config.json"
    kind = read_json("--vae", config)["_class_name"] if config.is_file() else "AutoencoderKL"
    try:
        # The other way of loading needs the package accelerate, and says so at length.
        vae, found = getattr(diffusers.models, kind).from_pretrained(
            source, low_cpu_mem_usage=False, output_loading_info=True
        )
        check_complete(vae, found)
    except Exception as error:  # it may be any: diffusers computes with what the files hold
        reason = one_line(error)
        raise InputError(f"--vae {name}: cannot load {source} ({reason}); give a whole local folder") from None
    return vae


def check_complete(vae, found):
    """Raise ValueError unless an autoencoder has all its weights, and they are numbers; found: see diffusers."""
    unpaired = sorted([*found["missing_keys"], *found["unexpected_keys"]])
    if unpaired:
        raise ValueError(f"{unpaired[0]} is in one of config.json and the weights only")
    for key, value in vae.state_dict().items():
        if not value.isfinite().all():
            raise ValueError(f"{key} does not hold finite numbers")


def encode_pictures(codec, run, pictures, draws):
    """Latents (n, 2, C, h, w) float32 of pictures (n, 3, H, W) in [-1, 1] and of their mirrors, in run's precision.

    draws: an engine.sampling.ImageDraws of the n images; each takes the noise of its picture first, then that of the
    mirror.
    """
    # On a CPU one at a time, which stays in the caches; the bytes do not depend on the batch then.
    together = 1 if run.device.type == "cpu" else 2 * len(pictures)
    pictures = torch.cat([pictures, pictures.flip(-1)])
    noise = torch.cat([draws.start_noise(), draws.start_noise()])
    with run.autocast():
        parts = zip(pictures.split(together), noise.split(together), strict=True)
        latents = torch.cat([codec.encode(*part).float() for part in parts])
    return latents.unflatten(0, (2, -1)).transpose(0, 1)
