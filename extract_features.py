"""Encode a folder of images, one subfolder per class, into the latents that all training scripts read.

Example:
  torchrun --nnodes=1 --nproc_per_node=8 extract_features.py --data-path imagenet/train --features-path features
"""

from engine.cli import Command, launch, unused_flags
from engine.errors import RunError, check_folder
from engine.flags import shared
from families.flags import SYSTEM, Flag, count, path_flag

COMMAND = Command(
    "extract_features",
    __doc__,
    own=(
        path_flag(
            "data-path",
            "folder of images, one subfolder per class, or with captions (metadata.jsonl or a .txt beside each)",
            required=True,
            metavar="FOLDER",
        ),
        path_flag("features-path", "folder for the latents", "features", metavar="FOLDER"),
        Flag("batch-size", "images encoded together with their mirrors", 8, type=count, group=SYSTEM),
    ),
    shared=shared("model image-size num-classes global-seed vae num-workers precision device"),
    unused=unused_flags(results_dir="results", epochs=1400, global_batch_size=256, log_every=100, ckpt_every=50000),
)
parse_args = COMMAND.resolve


def main(settings):
    from engine.distributed import on_main, shared_error
    from engine.endings import say_next
    from engine.extraction import Extraction
    from engine.images import list_images
    from engine.prompts import encode_prompts, list_captioned
    from engine.run import Run
    from engine.start import print_start
    from engine.vae import LatentSpace

    run = Run(settings.device, settings.precision, settings.global_seed, one_thread=True)
    family = settings.family
    pictures = list_captioned(settings.data_path) if family.has_captions else list_images(settings.data_path)
    if not family.has_captions:
        pictures.check_classes(settings.data_path, settings.num_classes)
    space = settings.make(LatentSpace, latents=settings.family.latents)
    check_folder("--features-path", settings.features_path)
    codec = space.load_codec(run.device, channels_last=run.precision != "fp32")
    print_start(settings, run, data_path=pictures.digest())

    extraction = Extraction(settings.features_path, run, pictures, space, codec)
    try:
        if family.has_captions:
            on_main(lambda: encode_prompts(settings.features_path, settings.model, pictures.classes, space, run), True)
        corrupt = extraction.encode(settings.batch_size, settings.num_workers)
    finally:
        extraction.close()
    n = len(pictures.paths)
    run.print(f"{n - len(corrupt)} of {n} images encoded in {settings.features_path}")
    if corrupt:
        names = ", ".join(str(pictures.paths[i]) for i in corrupt[:10])
        raise shared_error(
            RunError(f"{len(corrupt)} corrupt image(s), left out: {names}{' ...' * (len(corrupt) > 10)}")
        )
    say_next(run, "train", model=settings.model, data_path=settings.features_path)


if __name__ == "__main__":
    launch(main, parse_args)
