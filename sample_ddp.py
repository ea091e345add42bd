r"""Sample many pictures with all processes, and pack them into the .npz that the evaluator reads.

torchrun --nnodes=1 --nproc_per_node=8 sample_ddp.py --model DiT-D14/2 \
    --ckpt outputs/D14-DiT-D14-2/checkpoints/0500000.pt

A second call makes only what is missing. Image i is the same whatever the number of processes.
"""

import os
import time

from tqdm import tqdm

from engine.checkpoint import read_weights
from engine.cli import SAMPLING_FLAGS, count, launch, make_parser, parse
from engine.distributed import barrier
from engine.errors import InputError, blame, check_folder
from engine.images import numbered_images, pack_npz, save_image, to_uint8
from engine.run import Run
from engine.sampling import (
    ImageDraws,
    check_sampling,
    find_ckpt,
    load_for_sampling,
    open_sample_folder,
    pack_samples,
    sample_images,
    told_by_ckpt,
)
from evaluation.batches import open_images
from evaluation.evaluate import METRICS, check, doubts, evaluate, load_extractor


def parse_args(argv=None):
    parser = make_parser("sample_ddp", __doc__, SAMPLING_FLAGS + " global-seed", "sample", cfg_scale=1.5)
    parser.add_argument("--sample-dir", default="samples", help="parent folder of image folders (default: samples)")
    parser.add_argument("--per-proc-batch-size", type=count, default=32, help="images sampled together (default: 32)")
    parser.add_argument("--num-fid-samples", type=count, default=50000, help="images to make (default: 50000)")
    parser.add_argument("--tf32", action="store_true", default=True, help="TF32 matrix products on a GPU (default)")
    parser.add_argument("--no-tf32", action="store_false", dest="tf32", help="full float32 matrix products on a GPU")
    parser.add_argument(
        "--evaluate", metavar="REF", help="then run the evaluator on the samples against this reference"
    )
    parser.add_argument("--inception", metavar="PATH", help="weights for --evaluate (default: found or downloaded)")
    parser.add_argument("--pack", metavar="FOLDER", help="only pack the pictures of a folder, by their numbers")
    return parse(parser, argv, lambda args: {} if args.pack else told_by_ckpt(args))


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


def run_evaluator(args, run, reference, path):
    """What evaluator.py prints for these samples; all processes share the features."""
    with blame("--evaluate", args.evaluate):
        samples = open_images(path)
        for text in doubts(reference, samples, METRICS):
            run.print(f"warning: {text}")
        evaluate(reference, samples, load_extractor(path=args.inception, device=run.device))


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
    if args.evaluate:
        with blame("--evaluate", args.evaluate):
            reference = open_images(args.evaluate)
            check(reference, METRICS, is_sample=False)
        if args.num_fid_samples < 4:
            raise InputError(f"--num-fid-samples {args.num_fid_samples}: --evaluate needs 4 or more")
    run = Run(args, one_thread=True)
    folder = open_sample_folder(args, run, path)
    speed = sample_missing(args, run, state, path, folder)
    if speed:
        run.print(f"{speed * run.world:.2f} images/s")
    barrier()
    if run.is_main:
        pack_samples(args, folder)
    barrier()
    if args.evaluate:
        run_evaluator(args, run, reference, f"{folder}.npz")


if __name__ == "__main__":
    launch(main, parse_args)
