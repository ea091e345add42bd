"""Draw a few pictures from a network and write them as one grid.

Example:
  python sample.py --model DiT-D14/2 --ckpt TinyDiT-D14-MaskedKD-500K.pt --seed 5464
"""

from pathlib import Path

from engine.cli import Command, launch
from engine.errors import InputError, check_writable
from engine.flags import SAMPLING_FLAGS, shared
from families.flags import Flag, integer_list, path_flag

COMMAND = Command(
    "sample",
    __doc__,
    own=(
        path_flag("output", "picture to write", shown="named after the weights, in outputs/samples"),
        Flag("labels", "classes to draw", type=integer_list, shown="eight of them", metavar="LIST"),
    ),
    shared=shared(f"{SAMPLING_FLAGS} seed", compile=False),
    kinds=("sample",),
    weights=(("ckpt", "model"),),
)
parse_args = COMMAND.resolve


def name_output(path, settings):
    """The picture's name: weights, guidance, sampler and seed."""
    weights = str(path).strip("/").replace("/", "-").removesuffix(".pt")
    label = settings.family.sampler_label(settings.num_sampling_steps, **settings.own("sample"))
    return str(Path("outputs/samples") / f"{weights}-cfg{settings.cfg_scale:g}-{label}-seed{settings.seed}.png")


def main(settings):
    from engine.endings import say_next
    from engine.run import Run
    from engine.sampling import SamplingPlan, preview_labels
    from engine.start import note_early_average, print_start
    from engine.vae import LatentSpace

    labels = settings.labels or preview_labels(settings.num_classes)
    for label in labels:
        if not 0 <= label < settings.num_classes:
            raise InputError(f"--labels {labels}: has {label}, but the classes are 0..{settings.num_classes - 1}")
    run = Run(settings.device, settings.precision, settings.seed)
    space = settings.make(LatentSpace, latents=settings.family.latents)
    weights = settings.weights["ckpt"]
    output = settings.output or name_output(weights.name, settings)
    check_writable("--output", output, ckpt=weights.name, vae=settings.vae)
    plan = settings.make(SamplingPlan, weights=weights, space=space, own=settings.own("sample"))
    plan.check()

    print_start(settings, run)
    note_early_average(run, weights)
    plan.load(run).save_grid(output, labels, settings.seed)
    run.print(f"wrote {output}")
    say_next(run, "sample_ddp", model=settings.model, ckpt=weights.name, **settings.family.sample_hint)


if __name__ == "__main__":
    launch(main, parse_args)
