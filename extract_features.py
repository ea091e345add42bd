"""Encode a folder of images, one subfolder per class, into the latents that all training scripts read.

torchrun --nnodes=1 --nproc_per_node=8 extract_features.py --data-path imagenet/train --features-path features
"""

import numpy as np
from tqdm import tqdm

from engine.cli import add_unused, count, launch, make_parser, parse, report_unused
from engine.data import CORRUPT, DONE, LatentStore
from engine.distributed import barrier
from engine.errors import InputError, RunError, check_folder
from engine.images import from_uint8, list_images, picture_loader
from engine.run import Run
from engine.sampling import ImageDraws
from engine.vae import check_vae, encode_pictures, latent_size, load_codec
from families import family_of


def parse_args(argv=None):
    flags = "data-path model image-size num-classes global-seed vae num-workers precision device"
    parser = make_parser("extract_features", __doc__, flags)
    parser.add_argument("--features-path", default="features", help="folder for the latents (default: features)")
    parser.add_argument("--batch-size", type=count, default=8, help="images encoded together with their mirrors")
    add_unused(
        parser,
        results_dir={"default": "results"},
        epochs={"type": int, "default": 1400},
        global_batch_size={"type": int, "default": 256},
        log_every={"type": int, "default": 100},
        ckpt_every={"type": int, "default": 50000},
    )
    return parse(parser, argv, lambda args: {})


def open_store(args, run, labels, classes, codec):
    """The store to write to: made by the main process, opened by all. Raises InputError if it holds something else."""
    size = latent_size(args, family_of(args.model).latents)
    metadata = {
        "images": len(labels),
        "shape": [codec.stored_channels, size, size],
        "num_classes": len(classes),
        "classes": classes,
        "image_size": args.image_size,
        "vae": args.vae,
        "scale": getattr(codec, "scale", 1.0),
        "seed": args.global_seed,
        "precision": run.precision,
    }
    try:
        if run.is_main:
            LatentStore.create(args.features_path, labels, metadata)
        barrier()
        store = LatentStore(args.features_path, "r+")
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"--features-path {args.features_path}: damaged ({error!r}); take another") from None
    found = {"precision": "fp32", **store.metadata}  # the only one there was before it was recorded
    different = [name for name, value in metadata.items() if found.get(name) != value]
    if different or store.labels.tolist() != labels:
        what = different[0] if different else "labels"
        raise InputError(
            f"--features-path {args.features_path}: holds latents of other data ({what} differ); take another"
        )
    return store


def encode_batches(args, run, codec, store, paths, batches):
    """Write the latents of these pictures and their mirrors, and who could not be read."""
    pictures = picture_loader(paths, args.image_size, batches, args.num_workers, run.device)
    bar = tqdm(pictures, desc="encoding batches", disable=not run.is_main)
    for batch, (good, pixels, errors) in zip(batches, bar, strict=True):
        store.status[[i for i in batch if i not in good]] = CORRUPT
        for error in errors:
            tqdm.write(error)
        if not good:
            continue
        draws = ImageDraws(run.seed, good, codec.noise_shape(args.image_size), run.device)
        latents = encode_pictures(codec, run, from_uint8(pixels.to(run.device)), draws)
        store.features[good] = latents.cpu().numpy()
        store.status[good] = DONE
    store.features.flush()
    store.status.flush()


def main(args):
    report_unused(args)
    paths, labels, classes = list_images(args.data_path)
    if len(classes) > args.num_classes:
        raise InputError(f"--num-classes {args.num_classes}: --data-path {args.data_path} has {len(classes)} classes")
    latents = family_of(args.model).latents
    latent_size(args, latents)
    check_vae(args.vae, latents)
    check_folder("--features-path", args.features_path)
    run = Run(args, one_thread=True)
    codec = load_codec(args.vae, latents, run.device, channels_last=run.precision != "fp32")
    store = open_store(args, run, labels, classes, codec)

    # Batches are the same for any number of processes, and so is the noise of each image: so are the latents.
    batches = [range(i, min(i + args.batch_size, len(paths))) for i in range(0, len(paths), args.batch_size)]
    mine = [batch for batch in batches[run.rank :: run.world] if (store.status[batch] != DONE).any()]
    encode_batches(args, run, codec, store, paths, mine)
    barrier()
    corrupt = np.flatnonzero(store.status == CORRUPT)
    run.print(f"{len(paths) - len(corrupt)} of {len(paths)} images encoded in {args.features_path}")
    if len(corrupt):
        names = ", ".join(str(paths[i]) for i in corrupt[:10])
        raise RunError(f"{len(corrupt)} corrupt image(s), left out: {names}{' ...' * (len(corrupt) > 10)}")


if __name__ == "__main__":
    launch(main, parse_args)
