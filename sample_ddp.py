r"""Sample many pictures with all processes, and pack them into the .npz that the evaluator reads.

torchrun --nnodes=1 --nproc_per_node=8 sample_ddp.py --model DiT-D14/2 \
    --ckpt outputs/D14-DiT-D14-2/checkpoints/0500000.pt

A second call makes only what is missing. Image i is the same whatever the number of processes.
"""

import json
import os
import time
from pathlib import Path

from tqdm import tqdm

from engine.checkpoint import read_weights, write_atomically
from engine.cli import count, launch, make_parser, parse
from engine.distributed import barrier
from engine.errors import InputError, check_folder
from engine.images import numbered_images, pack_npz, save_image, to_uint8
from engine.run import Run
from engine.sampling import ImageDraws, check_sampling, find_ckpt, load_for_sampling, sample_images, told_by_ckpt


def parse_args(argv=None):
    parser = make_parser(
        __doc__,
        "model vae image-size num-classes cfg-scale cfg-channels num-sampling-steps sampler global-seed ckpt no-ema "
        "precision device",
        cfg_scale=1.5,
    )
    parser.add_argument("--sample-dir", default="samples", help="parent folder of image folders (default: samples)")
    parser.add_argument("--per-proc-batch-size", type=count, default=32, help="images sampled together (default: 32)")
    parser.add_argument("--num-fid-samples", type=count, default=50000, help="images to make (default: 50000)")
    parser.add_argument("--tf32", action="store_true", default=True, help="TF32 matrix products on a GPU (default)")
    parser.add_argument("--no-tf32", action="store_false", dest="tf32", help="full float32 matrix products on a GPU")
    parser.add_argument(
        "--pack", metavar="FOLDER", help="only pack the pictures of a folder, in the order of their numbers"
    )
    return parse(parser, argv, lambda args: {} if args.pack else told_by_ckpt(args))


def describe(args, path):
    """What the pictures of a folder depend on."""
    names = "model vae image_size num_classes cfg_scale cfg_channels num_sampling_steps sampler global_seed no_ema tf32"
    info = os.stat(path)
    settings = {name: getattr(args, name) for name in [*names.split(), "precision", "per_proc_batch_size"]}
    return {**settings, "ckpt": str(path), "ckpt_size": info.st_size, "ckpt_changed": info.st_mtime}


def open_folder(args, run, path):
    """The folder for the pictures; raises InputError if it holds some that were made otherwise."""
    name = (
        f"{args.model.replace('/', '-')}-{Path(path).stem}-size-{args.image_size}-vae-{Path(args.vae).name}-"
        f"cfg-{args.cfg_scale:g}-{args.sampler}-{args.num_sampling_steps}-seed-{args.global_seed}"
    )
    folder, settings = Path(args.sample_dir) / name, describe(args, path)
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


def sample_missing(args, run, state, path, folder):
    """Make the pictures that are not there, each process its own batches; returns the images made here per second."""
    n, size = args.num_fid_samples, args.per_proc_batch_size
    missing = {i for i in range(n) if not (folder / f"{i:06d}.png").exists()}
    run.print(f"{n - len(missing)} of {n} images are there, {len(missing)} to make in {folder}")
    barrier()
    # A batch is always computed whole, so that its pictures do not depend on which of them were missing.
    batches = [range(i, min(i + size, n)) for i in range(0, n, size)]
    mine = [batch for batch in batches[run.rank :: run.world] if missing.intersection(batch)]
    if not mine:
        return None
    net, codec, sampler, shape = load_for_sampling(run, args, state, path)
    start = time.monotonic()
    for batch in tqdm(mine, desc="sampling batches", disable=not run.is_main):
        draws = ImageDraws(args.global_seed, batch, shape, run.device)
        pictures = to_uint8(sample_images(run, net, sampler, codec, draws, draws.labels(args.num_classes)))
        for i, pixels in zip(batch, pictures, strict=True):
            if i in missing:
                save_image(folder / f"{i:06d}.png", pixels)
    return sum(map(len, mine)) / (time.monotonic() - start)


def main(args):
    if args.pack:
        if not os.path.isdir(args.pack):
            raise InputError(f"--pack {args.pack}: no such folder; expected a folder of pictures")
        files = numbered_images(args.pack)
        return print("wrote", pack_npz(f"{args.pack.rstrip('/')}.npz", files, f"--pack {args.pack}"))
    check_folder("--sample-dir", args.sample_dir)
    path = find_ckpt(args)
    state = read_weights(path, "--ckpt", prefer_ema=not args.no_ema)
    check_sampling(args, state, path)
    run = Run(args, one_thread=True)
    folder = open_folder(args, run, path)
    speed = sample_missing(args, run, state, path, folder)
    if speed:
        run.print(f"{speed * run.world:.2f} images/s")
    barrier()
    if run.is_main:
        files = [folder / f"{i:06d}.png" for i in range(args.num_fid_samples)]
        shape = (1,)  # labels are drawn before the noise, so its shape does not matter
        labels = [
            ImageDraws(args.global_seed, [i], shape, "cpu").labels(args.num_classes).item() for i in range(len(files))
        ]
        run.print(f"wrote {pack_npz(f'{folder}.npz', files, '--sample-dir', labels)}")
    barrier()


if __name__ == "__main__":
    launch(main, parse_args)
