"""Images per second of extraction: ours in bfloat16 against batch 1 in float32, each by two processes of one thread.

The autoencoder has the sizes of stabilityai/sd-vae-ft-ema and random weights; pictures are JPEG files of 500 x 375,
encoded at 256 px with their mirrors. Processes and network are there before the clock starts; pictures are decoded by
the process that encodes them, of whose time that is a hundredth.
"""

import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import Case, Side, main
from engine.images import from_uint8, picture_loader
from engine.run import DTYPES, Run
from engine.sampling import ImageDraws
from engine.vae import LatentSpace, encode_pictures
from families.dit import SD_VAE

PROCESSES, LEVELS = 2, 4


def make_vae(widths):
    from diffusers.models import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=widths,
        layers_per_block=2,
        latent_channels=4,
        down_block_types=["DownEncoderBlock2D"] * LEVELS,
        up_block_types=["UpDecoderBlock2D"] * LEVELS,
    )


@cache
def make_folder(widths, n):
    """A folder with an autoencoder and n pictures: a coarse random pattern with some noise, as JPEG."""
    folder, rng = tempfile.TemporaryDirectory(), np.random.default_rng(0)
    torch.manual_seed(0)
    make_vae(widths).save_pretrained(folder.name)
    for i in range(n):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((500, 375))
        noisy = np.asarray(coarse) + rng.normal(0, 8, (375, 500, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(Path(folder.name) / f"{i}.jpg")
    return folder


def count_flops(widths, size):
    """FLOPs of encoding a picture and its mirror."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        make_vae(widths).encode(torch.empty(2, 3, size, size))
    return counter.get_total_flops()


@cache
def start(folder, device, precision, size):
    """The run and the codec, once per process."""
    run = Run(device, precision, one_thread=True)
    space = LatentSpace(size, folder, 1000, SD_VAE)
    return run, space.load_codec(run.device, channels_last=precision != "fp32")


def extract(folder, device, precision, batch, size, numbers):
    """Latents (n, 2, 4, h, w) of the pictures with these numbers, as extract_features.py makes them; processor time."""
    run, codec = start(folder, device, precision, size)
    paths, done, since = {i: f"{folder}/{i}.jpg" for i in numbers}, [], time.process_time()
    batches = [numbers[i : i + batch] for i in range(0, len(numbers), batch)]
    for good, pixels, _ in picture_loader(paths, size, batches, 0, run.device):
        draws = ImageDraws(run.seed, good, codec.noise_shape(size), run.device)
        done.append(
            encode_pictures(codec, run, from_uint8(torch.from_numpy(pixels).to(run.device)), draws).cpu().numpy()
        )
    return np.concatenate(done), time.process_time() - since


def build(setup, precision, batch):
    """`images` pictures, one share for each process."""
    widths, size, images = ((32,) * LEVELS, 32, 4) if setup.tiny else ((128, 256, 512, 512), 256, 4)
    settings = (make_folder(widths, images).name, str(setup.device), precision, batch, size)
    shares = [list(range(rank, images, PROCESSES)) for rank in range(PROCESSES)]
    # A process that was forked from one with threads may hang.
    pools = [ProcessPoolExecutor(1, get_context("spawn")) for _ in range(PROCESSES)]

    def run():
        found = [pool.submit(extract, *settings, share) for pool, share in zip(pools, shares, strict=True)]
        latents, seconds = zip(*(each.result() for each in found), strict=True)
        return np.concatenate(latents), sum(seconds)

    return Side(run, images, images * count_flops(widths, size), DTYPES[precision])


def compare(results):
    """The largest difference over the largest value, and how much less processor time the last calls took."""
    (plain, plain_seconds), (ours, seconds) = results.values()
    difference = float(np.abs(plain - ours).max() / np.abs(plain).max())
    return {"difference": difference, "processor time ratio": plain_seconds / seconds}


SIDES = {
    "float32, batch 1": partial(build, precision="fp32", batch=1),
    "ours, bfloat16": partial(build, precision="bf16", batch=8),
}
BARS = [("speedup", "ours, bfloat16", ">=", 1.25), ("difference", None, "<=", 0.03)]
CASES = [Case("extraction", SIDES, BARS, compare, memory=False)]  # memory of the two processes would not count

if __name__ == "__main__":
    main(__spec__.name, __doc__, CASES)
