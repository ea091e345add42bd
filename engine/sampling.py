"""Pictures by index: label and noise of image i are functions of the seed and i, whoever makes it."""

import json
import os
from pathlib import Path

import numpy as np
import torch

from engine.checkpoint import build_network, check_fit, fetch, save_weights, told_by_weights, write_atomically
from engine.errors import InputError, blame
from engine.images import pack_npz, save_grid
from engine.vae import check_vae, latent_size, load_codec
from families import TOLD, depth_name, describe_weights, family_of, model_config


class ImageDraws:
    """The random draws of a batch of images, in this order for each: label, start noise, noise of every step.

    Drawn on the CPU by one generator per image, so that they depend neither on the batch nor on the device.
    """

    def __init__(self, seed, indices, shape, device):
        seeds = [np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0] for index in indices]
        self.generators = [torch.Generator().manual_seed(int(s) & (2**63 - 1)) for s in seeds]
        self.shape, self.device = shape, device

    def labels(self, num_classes):
        """Random labels (N,)."""
        drawn = [torch.randint(num_classes, (), generator=g) for g in self.generators]
        return torch.stack(drawn).to(self.device)

    def noise(self, step=None, shape=None):
        """The next standard normal tensor (N, *shape); `step` is ignored, so this serves as `step_noise`."""
        drawn = [torch.randn(shape or self.shape, generator=g) for g in self.generators]
        return torch.stack(drawn).to(self.device)


@torch.inference_mode()
def sample_images(run, net, sampler, codec, draws, labels, progress=False):
    """Pictures (N, 3, H, W) in [-1, 1] for labels (N,)."""
    with run.autocast():
        latents = sampler(net, labels, draws.noise(), draws.noise, progress)
    return codec.decode(latents)


def find_ckpt(args):
    """Path of the weights to sample from: --ckpt, fetched if it is a published file, or the family's own release."""
    family = family_of(args.model)
    if not args.ckpt and args.model not in family.default_releases:
        raise InputError(f"--ckpt: missing; give weights of --model {args.model}, for which none are published")
    name = args.ckpt or family.default_releases[args.model].format(image_size=args.image_size)
    return fetch(name, "--ckpt", family)


def told_by_ckpt(args):
    """Settings for `engine.cli.parse` that the weights of --ckpt tell."""
    check_vae(args.vae, family_of(args.model).latents)
    return told_by_weights(find_ckpt(args), "--ckpt", args.vae, prefer_ema=not args.no_ema)


def check_sampling(args, state, path):
    """Constructor arguments of the network to sample from; raises InputError if weights and flags do not fit."""
    size = latent_size(args, family_of(args.model).latents)
    if "groups" in model_config(args.model):
        raise InputError(f"--model {args.model}: has gates; prune with it first, then sample from the pruned weights")
    with blame("--ckpt", path):
        shapes = describe_weights(state, args.model)
    config = {name: shapes[name] for name in TOLD if name in shapes}
    config |= {"input_size": size, "num_classes": args.num_classes}
    check_fit(state, "--ckpt", path, args.model, **config)
    with blame("--num-sampling-steps", args.num_sampling_steps):
        family_of(args.model).sampler(args)
    with blame("--model", args.model):
        family_of(args.model).check(args, config)
    return config


def load_for_sampling(run, args, state, path):
    """(network, codec, sampler, latent shape) for weights and the flags of a sampling script."""
    config = check_sampling(args, state, path)
    codec = load_codec(args.vae, family_of(args.model).latents, run.device)
    if codec.channels != config["in_channels"]:
        raise InputError(
            f"--vae {args.vae}: has {codec.channels} channels, but --ckpt {path} works on {config['in_channels']}; "
            "take the autoencoder it was trained with"
        )
    net = run.freeze(build_network(args.model, state, run.device, **config))
    run.compile(net)
    shape = (config["in_channels"], config["input_size"], config["input_size"])
    return net, codec, family_of(args.model).sampler(args).to(run.device), shape


def sample_grid(run, args, state, path, labels, output):
    """Sample one picture per label and write them as a grid, four per row."""
    net, codec, sampler, shape = load_for_sampling(run, args, state, path)
    draws = ImageDraws(run.seed, range(len(labels)), shape, run.device)
    labels = torch.tensor(labels, device=run.device)
    save_grid(output, sample_images(run, net, sampler, codec, draws, labels, progress=run.is_main))
    run.print(f"wrote {output}")


def save_pruned(run, args, state, **facts):
    """Write pruned weights to --save-model with their facts; with --preview also a grid sampled from them."""
    depths = describe_weights(state, args.model)["depths"]
    args.model, depth = depth_name(args.model, depths), sum(depths)
    facts |= {"model": args.model, "num_classes": args.num_classes, "vae": args.vae}
    save_weights(args.save_model, state, **facts)
    run.print(f"saved {args.save_model}: {depth} layers, {sum(v.numel() for v in state.values()):,} parameters")
    if getattr(args, "preview", False):
        sample_grid(run, args, state, args.save_model, preview_labels(args.num_classes), f"{args.save_model}.png")


def preview_labels(num_classes):
    """Eight labels to look at: the customary ImageNet classes if there are that many, else spread over all classes."""
    customary = [207, 360, 387, 974, 88, 979, 417, 279]
    if num_classes > max(customary):
        return customary
    return [i * num_classes // 8 for i in range(8)]


def describe_samples(args, path):
    """What the pictures of a folder depend on."""
    names = [
        "model",
        "vae",
        "image_size",
        "num_classes",
        "cfg_scale",
        "num_sampling_steps",
        "global_seed",
        "no_ema",
        "tf32",
        "compile",
    ]
    names += [flag.replace("-", "_") for flag in family_of(args.model).flags["sample"]]
    info = os.stat(path)
    settings = {name: getattr(args, name) for name in [*names, "precision", "per_proc_batch_size"]}
    return {**settings, "ckpt": str(path), "ckpt_size": info.st_size, "ckpt_changed": info.st_mtime}


def open_sample_folder(args, run, path):
    """The folder for the pictures; raises InputError if it holds some that were made otherwise."""
    name = (
        f"{args.model.replace('/', '-')}-{Path(path).stem}-size-{args.image_size}-vae-{Path(args.vae).name}-"
        f"cfg-{args.cfg_scale:g}-{family_of(args.model).label(args)}-seed-{args.global_seed}"
    )
    folder, settings = Path(args.sample_dir) / name, describe_samples(args, path)
    record = folder / "sampling.json"
    old = json.loads(record.read_text()) if record.exists() else settings
    different = [name for name in settings if old.get(name) != settings[name]]
    if different:
        raise InputError(
            f"--sample-dir {args.sample_dir}: {folder} holds images with {different[0]} {old.get(different[0])}, now "
            f"{settings[different[0]]}; delete that folder or take another --sample-dir"
        )
    if run.is_main:
        write_atomically(record, lambda file: file.write_text(json.dumps(settings, indent=1)))
    return folder


def pack_samples(args, folder):
    """Write the .npz with pictures and labels, in the order of their numbers."""
    files = [folder / f"{i:06d}.png" for i in range(args.num_fid_samples)]
    shape = (1,)  # labels are drawn before the noise, so its shape does not matter
    draws = (ImageDraws(args.global_seed, [i], shape, "cpu") for i in range(len(files)))
    labels = [draw.labels(args.num_classes).item() for draw in draws]
    print(f"wrote {pack_npz(f'{folder}.npz', files, '--sample-dir', labels)}", flush=True)
