r"""Sample many pictures with all processes, and pack them into the .npz that the evaluator reads.

A second call makes only what is missing. Image i is the same whatever the number of processes.

Example:
  torchrun --nnodes=1 --nproc_per_node=8 sample_ddp.py --model DiT-D14/2 \
      --ckpt outputs/D14-DiT-D14-2/checkpoints/0500000.pt
"""

import os
import time
from dataclasses import replace
from pathlib import Path

from engine.cli import Command, launch
from engine.errors import InputError, check_folder, check_writable, flag_errors
from engine.flags import SAMPLING_FLAGS, shared
from families import short_name
from families.flags import NEEDED, SYSTEM, Flag, count, path_flag

COMMAND = Command(
    "sample_ddp",
    __doc__,
    own=(
        Flag("num-fid-samples", "images to make", 50000, type=count, group=NEEDED),
        path_flag("sample-dir", "parent folder of image folders", "samples", metavar="FOLDER"),
        path_flag("evaluate", "then run the evaluator against this reference", shown="no", metavar="REF"),
        path_flag("inception", "weights for --evaluate", shown="found or downloaded"),
        path_flag("pack", "only pack the pictures of a folder, by their numbers", shown="no", metavar="FOLDER"),
        Flag("per-proc-batch-size", "images sampled together", 32, type=count, group=SYSTEM),
        Flag("tf32", "TF32 matrix products on a GPU", True, opposite=True, group=SYSTEM),
    ),
    shared=shared(f"{SAMPLING_FLAGS} global-seed", cfg_scale=1.5),
    kinds=("sample",),
    weights=(("ckpt", "model"),),
)
# What pictures depend on, besides the family's own flags and the weights; more than in the last bits.
SAMPLE_SETTINGS = (
    *("model", "vae", "image_size", "num_classes", "cfg_scale", "num_sampling_steps", "global_seed", "no_ema"),
    *("tf32", "precision", "per_proc_batch_size"),
)
# The same, younger than some folders: what their records stand for that do not name it.
LATER_SETTINGS = {"vae_precision": "fp32"}


def parse_args(argv=None):
    typed = COMMAND.parse(argv)
    if "pack" in typed and "evaluate" in typed:
        raise InputError("--pack: only packs; leave out --evaluate, and run evaluator.py on the .npz")
    command = replace(COMMAND, weights=()) if "pack" in typed else COMMAND  # packing needs no weights
    return command.resolve(typed=typed)


def name_folder(settings, path):
    """Name of the folder of pictures: model, weights, size, autoencoder, guidance, sampler, seed."""
    label = settings.family.sampler_label(settings.num_sampling_steps, **settings.own("sample"))
    return (
        f"{short_name(settings.model)}-{Path(path).stem}-size-{settings.image_size}-"
        f"vae-{Path(settings.vae).name}-cfg-{settings.cfg_scale:g}-{label}-seed-{settings.global_seed}"
    )


def sample_missing(run, plan, folder, batches, missing, seed):
    """Make the `missing` pictures, each process some whole batches; returns the images made here per second.

    A batch is always computed whole, so that its pictures do not depend on which of them were missing.
    """
    from tqdm import tqdm

    from engine.images import save_image, to_uint8
    from engine.threads import Background, own_cores

    mine = [batch for batch in batches[run.rank :: run.world] if missing.intersection(batch)]
    if not mine:
        return None
    sampler = plan.load(run)
    start = time.monotonic()
    with Background(own_cores()) as writers:
        for batch in tqdm(mine, desc="sampling batches", disable=not run.is_main):
            draws = sampler.draws(seed, batch)
            pictures = to_uint8(sampler.sample(draws, draws.labels(plan.space.num_classes)))
            for i, pixels in zip(batch, pictures, strict=True):
                if i in missing:
                    writers.call(save_image, folder.file(i), pixels, of_many=True)
    return sum(map(len, mine)) / (time.monotonic() - start)


def open_reference(path, samples):
    """The evaluator's reference images, checked before any sampling."""
    from evaluation import METRICS
    from evaluation.batches import open_images
    from evaluation.evaluate import check

    with flag_errors("--evaluate", path):
        reference = open_images(path)
        check(reference, METRICS, is_sample=False)
    if samples < 4:
        raise InputError(f"--num-fid-samples {samples}: --evaluate needs 4 or more")
    return reference


def run_evaluator(run, reference, flag_value, path, inception):
    """What evaluator.py prints for these samples; all processes share the features."""
    from evaluation import METRICS
    from evaluation.batches import open_images
    from evaluation.evaluate import evaluate, list_warnings, load_extractor

    with flag_errors("--evaluate", flag_value):
        samples = open_images(path)
        for text in list_warnings(reference, samples, METRICS):
            run.print(f"warning: {text}")
        evaluate(reference, samples, load_extractor(path=inception, device=run.device))


def pack_folder(folder):
    """Pack the pictures of any folder."""
    from engine.images import numbered_images, pack_npz

    if not os.path.isdir(folder):
        raise InputError(f"--pack {folder}: no such folder; expected a folder of pictures")
    path = f"{folder.rstrip('/')}.npz"
    check_writable("--pack", path)
    with flag_errors("--pack", folder):
        print("wrote", pack_npz(path, numbered_images(folder)))


def main(settings):
    from engine.distributed import barrier, gather, on_main
    from engine.endings import say_next
    from engine.lock import check_shared
    from engine.run import Run
    from engine.sample_folder import SampleFolder
    from engine.sampling import SamplingPlan
    from engine.start import note_early_average, print_start
    from engine.vae import LatentSpace
    from evaluation.evaluate import load_extractor

    if settings.pack:
        pack_folder(settings.pack)
        return
    run = Run(settings.device, settings.precision, settings.global_seed, tf32=settings.tf32, one_thread=True)
    check_folder("--sample-dir", settings.sample_dir)
    space = settings.make(LatentSpace, latents=settings.family.latents)
    weights, own, n = settings.weights["ckpt"], settings.own("sample"), settings.num_fid_samples
    reference = open_reference(settings.evaluate, n) if settings.evaluate else None
    plan = settings.make(SamplingPlan, weights=weights, space=space, own=own)
    plan.check()

    names = (*SAMPLE_SETTINGS, *LATER_SETTINGS)
    made_with = {name: getattr(settings, name) for name in names} | own | {"weights": weights.digest}
    made_with.pop("head_graphs", None)
    if digest := getattr(plan.make_sampler(), "digest", None):  # of what its flags name
        made_with["sampler"] = digest
    file = os.stat(weights.path)
    earlier = {"ckpt_size": file.st_size, "ckpt_changed": file.st_mtime}
    name = name_folder(settings, weights.path)
    folder = SampleFolder(settings.sample_dir, name, made_with, settings.image_size, earlier, LATER_SETTINGS)
    check_writable("--sample-dir", f"{folder.path}.npz", evaluate=reference.paths if reference else None)
    print_start(settings, run, folder=name)
    note_early_average(run, weights)
    if reference:
        with flag_errors("--inception", settings.inception or "(not given)"):
            load_extractor(path=settings.inception)  # only to see that it is there, before hours of sampling
    on_main(folder.prepare)
    try:
        check_shared("--sample-dir", folder.path)
        parts = gather(folder.find_missing(range(run.rank, n, run.world)))
        missing = {number for part in parts for number in part}
        run.print(f"{n - len(missing)} of {n} images are there, {len(missing)} to make in {folder.path}")
        size = settings.per_proc_batch_size
        batches = [range(i, min(i + size, n)) for i in range(0, n, size)]
        speed = sample_missing(run, plan, folder, batches, missing, settings.global_seed)
        if speed:
            run.print(f"{speed * run.world:.2f} images/s")
        barrier()
        packed = on_main(lambda: folder.pack(n, settings.global_seed, settings.num_classes), patient=True)
        run.print(f"wrote {packed}")
    finally:
        folder.close()
    if reference:
        run_evaluator(run, reference, settings.evaluate, packed, settings.inception)
    else:
        say_next(run, "evaluator", "REFERENCE.npz", packed)


if __name__ == "__main__":
    launch(main, parse_args)
