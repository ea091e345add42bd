r"""Write weights as a folder that diffusers opens: a pipeline, or its transformer alone.

Example:
  python export_diffusers.py --model DiT-D14/2 --ckpt TinyDiT-D14-MaskedKD-500K.pt --output outputs/D14-diffusers
"""

import os
from pathlib import Path

from engine.cli import Command, launch
from engine.errors import InputError, check_apart, check_folder, flag_errors
from engine.flags import shared
from families import model_config
from families.flags import Flag, path_flag, path_text, switch

COMMAND = Command(
    "export_diffusers",
    __doc__,
    own=(
        path_flag("output", "folder to write", shown="none; must be given", metavar="FOLDER"),
        switch("transformer-only", "write the transformer without scheduler and autoencoder"),
        Flag("data", "data set of the model card", type=path_text, shown="none", metavar="NAME"),
        path_flag("metrics", "numbers of the model card, from evaluator.py --json", shown="none"),
    ),
    shared=shared("ckpt no-ema model vae image-size num-classes num-sampling-steps dry-run", num_sampling_steps=50),
    weights=(("ckpt", "model"),),
)
NULL_CLASS = 1000  # of the pipeline, whatever its transformer was trained with


def parse_args(argv=None):
    settings = COMMAND.resolve(argv)
    if not settings.output:
        raise InputError("--output: missing; name the folder to write")
    if not settings.family.exchange and not settings.family.export:
        raise InputError(
            f"--model {settings.model}: diffusers has no class for a {settings.family.name}; this is for a DiT, or a "
            "network of diffusers"
        )
    if "groups" in model_config(settings.model):
        raise InputError(f"--model {settings.model}: has gates; prune with it first, then export the pruned weights")
    if settings.family.export:
        return settings
    alone = "take --transformer-only"
    if not settings.transformer_only and settings.num_classes != NULL_CLASS:
        raise InputError(
            f"--num-classes {settings.num_classes}: the pipeline takes class {NULL_CLASS} for no class, so it needs a "
            f"network of {NULL_CLASS} classes; {alone}"
        )
    if not settings.transformer_only and settings.vae == "none":
        raise InputError(f"--vae none: the pipeline decodes latents, and this network works on pixels; {alone}")
    return settings


def check_output(settings):
    """Raise InputError unless the folder to write is new, empty or an earlier export, and apart from what is read."""
    output, original = Path(settings.output), settings.family.exchange.load().ORIGINAL
    check_folder("--output", output)
    for part in (output, output / "transformer", output / "vae"):
        check_apart("--output", part / "config.json", {"ckpt": settings.ckpt, "vae": settings.vae})
    is_export = any((folder / original).is_file() for folder in (output, output / "transformer"))
    if output.is_dir() and any(output.iterdir()) and not is_export:
        raise InputError(f"--output {output}: is not empty, and no earlier export; name a new folder")


def export_own(settings):
    """Write weights of a model that is a folder of diffusers itself."""
    from engine.model_card import read_metrics, trace_source, write_card
    from engine.pruned import check_network_folder
    from engine.run import Run
    from engine.start import print_start

    weights, run, output = settings.weights["ckpt"], Run("cpu"), settings.output
    part = output if settings.transformer_only else str(Path(output) / "transformer")
    sources = trace_source(weights.name, weights.facts)
    given = {"ckpt": weights.name, "model": settings.model, "SOURCES": sources, "metrics": settings.metrics}
    check_network_folder("--output", part, given)
    is_export = os.path.isfile(f"{part}.json")  # the facts of an earlier one
    if not settings.transformer_only and os.path.isdir(output) and os.listdir(output) and not is_export:
        raise InputError(f"--output {output}: is not empty, and no earlier export; name a new folder")
    metrics = read_metrics(settings.metrics) if settings.metrics else None
    weights.check_fit(settings.model, {})
    print_start(settings, run)
    if settings.dry_run:
        return
    facts = {**weights.facts, "model": settings.model}
    with flag_errors("--output", output):
        opening = settings.family.export(output, weights.state, settings.model, facts, not settings.transformer_only)
    write_card(Path(output) / "README.md", settings.model, sources, facts, opening, settings.data, metrics)
    run.print(f"wrote {output}")


def main(settings):
    from engine.diffusers_folder import write_pipeline, write_transformer
    from engine.model_card import read_metrics, trace_source, write_card
    from engine.run import Run
    from engine.start import print_start
    from engine.vae import LatentSpace

    if settings.family.export:
        export_own(settings)
        return
    weights, run = settings.weights["ckpt"], Run("cpu")
    check_output(settings)
    metrics = read_metrics(settings.metrics) if settings.metrics else None
    space = settings.make(LatentSpace, latents=settings.family.latents)
    config = {**weights.read_config(settings.model), "num_classes": settings.num_classes, "input_size": space.size}
    weights.check_fit(settings.model, config)
    print_start(settings, run)
    if settings.dry_run:
        return
    output, config = Path(settings.output), {**model_config(settings.model), **config}
    facts = {**weights.facts, "model": settings.model, "num_classes": settings.num_classes, "vae": settings.vae}
    exchange, sources = settings.family.exchange, trace_source(weights.name, facts)
    with flag_errors("--num-sampling-steps", settings.num_sampling_steps):
        exported = exchange.load().to_diffusers(weights.state, config, settings.num_sampling_steps)
    facts |= exported[-1]
    if settings.transformer_only:
        opening = write_transformer(output, exchange, exported, facts)
    else:
        opening = write_pipeline(output, exchange, exported, facts, space, settings.num_sampling_steps)
    write_card(output / "README.md", settings.model, sources, facts, opening, settings.data, metrics)
    run.print(f"wrote {output}")


if __name__ == "__main__":
    launch(main, parse_args)
