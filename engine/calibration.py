"""A few batches of latents to measure a network on: from encoded latents, or from images encoded on the fly."""

import numpy as np
import torch

from engine.data import LatentDataset, check_latents, network_channels, told_by_latents
from engine.errors import InputError, blame
from engine.images import list_images, load_image
from engine.vae import load_codec
from families import family_of


def calibration_batches(args, device, shapes):
    """--nsamples // --batch-size batches (x, y) of randomly chosen and mirrored images of --data-path, on `device`.

    shapes: in_channels and input_size of the network. Raises InputError, before the first batch, for unfit data.
    """
    rng = np.random.default_rng(args.seed)
    n = args.nsamples // args.batch_size * args.batch_size
    from_images = not told_by_latents(args.data_path) and _has_images(args.data_path)
    total, read = _pictures(args, device) if from_images else _encoded(args, shapes)
    if total < n:
        raise InputError(f"--nsamples {args.nsamples}: --data-path {args.data_path} has {total} images; take fewer")
    order = rng.permutation(total)[:n].reshape(-1, args.batch_size)
    mirrored = rng.random(order.shape) < args.mirror
    return ([tensor.to(device) for tensor in read(*row)] for row in zip(order, mirrored, strict=True))


def _has_images(folder):
    try:
        return bool(list_images(folder))
    except InputError:
        return False


def _encoded(args, shapes):
    dataset = LatentDataset(args.data_path)
    stored = check_latents(dataset, args, shapes["input_size"])
    channels = network_channels(stored, family_of(args.model).latents)
    if channels != shapes["in_channels"]:
        raise InputError(
            f"--data-path {args.data_path}: latents have {channels} channels, the network takes {shapes['in_channels']}"
        )
    return len(dataset), lambda images, mirrored: dataset.__getitems__(2 * images + mirrored)


def _pictures(args, device):
    paths, labels, classes = list_images(args.data_path)
    if len(classes) > args.num_classes:
        raise InputError(f"--num-classes {args.num_classes}: --data-path {args.data_path} has {len(classes)} classes")
    codec = load_codec(args.vae, family_of(args.model).latents, device)

    def read(images, mirrored):
        with blame("--data-path", args.data_path):
            pictures = [load_image(paths[i], args.image_size) for i in images]
        pictures = [p.flip(-1) if flip else p for p, flip in zip(pictures, mirrored, strict=True)]
        noise = torch.randn(len(images), *codec.noise_shape(args.image_size), device=device)
        return codec.encode(torch.stack(pictures).to(device), noise), torch.tensor([labels[i] for i in images])

    return len(paths), read
