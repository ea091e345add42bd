r"""Drop the layers that change their input least (ShortGPT's block influence).

Example:
  python prune_by_score.py --model DiT-XL/2 --ckpt pretrained/DiT-XL-2-256x256.pt --data-path features --n-pruned 14 \
      --save-model pruned.pt
"""

from engine.cli import Command, launch
from engine.errors import InputError, RunError, check_writable, flag_errors
from engine.flags import PRUNING_FLAGS, shared
from families import stack_layers
from families.flags import Flag, count

COMMAND = Command(
    "prune_by_score",
    __doc__,
    own=(
        Flag("n-pruned", "number of layers to drop", type=count, required=True, metavar="N"),
        Flag("nsamples", "images to measure on", 128, type=count),
        Flag("batch-size", "images per batch", 16, type=count),
    ),
    shared=shared(f"{PRUNING_FLAGS} data-path mirror", data_path="data/imagenet/train"),
    kinds=("train", "sample", "score"),
    weights=(("ckpt", "model"),),
    latents=True,
)
parse_args = COMMAND.resolve


def main(settings):
    from tqdm import tqdm

    from engine.calibration import Calibration
    from engine.distributed import on_main
    from engine.pruned import save_preview, save_pruned
    from engine.run import Run
    from engine.sampling import SamplingPlan
    from engine.start import print_start
    from engine.vae import LatentSpace
    from pruning.scores import least_influential, measure_influence
    from pruning.surgery import keep_layers

    inputs = {"ckpt": settings.ckpt, "vae": settings.vae, "data_path": settings.data_path}
    check_writable("--save-model", settings.save_model, **inputs)
    depth = sum(stack_layers(settings.model))
    if settings.n_pruned >= depth:
        raise InputError(
            f"--n-pruned {settings.n_pruned}: {settings.model} has {depth} layers; expected 1..{depth - 1}"
        )
    if settings.nsamples < settings.batch_size:
        raise InputError(f"--nsamples {settings.nsamples}: less than one batch; take {settings.batch_size} or more")
    run = Run(settings.device, seed=settings.seed)
    space = settings.make(LatentSpace, latents=settings.family.latents)
    weights = settings.weights["ckpt"]
    config = {**weights.read_config(settings.model), "num_classes": settings.num_classes}
    weights.check_fit(settings.model, config)
    plan = settings.make(SamplingPlan, weights=weights, space=space, own=settings.own("sample"))
    if settings.preview:
        plan.check()
    if settings.clean_latents:
        plan.make_sampler()  # whose chain has all these steps

    calibration = settings.make(Calibration, space=space)
    batches = calibration.batches(run.device, config["in_channels"])
    print_start(settings, run, data_path=calibration.digest() if run.world > 1 else "")
    if settings.dry_run:
        return

    net = weights.build(settings.model, config, run.device).eval()
    objective = settings.family.make_objective(**settings.own("train")).to(run.device)
    batches = tqdm(batches, total=calibration.count, desc="measuring", disable=not run.is_main)
    clean_steps = settings.num_sampling_steps if settings.clean_latents else None
    scores = measure_influence(net, depth, objective, batches, clean_steps)
    if not scores.isfinite().all():
        raise RunError(
            "scores are not finite; the weights or the latents hold numbers that are not, see --ckpt, --data-path"
        )
    removed = least_influential(scores, settings.n_pruned)
    kept = [layer for layer in range(depth) if layer not in removed]
    for layer, score in enumerate(scores):
        run.print(f"layer {layer:2d}  similarity {score:.6f}  {'removed' if layer in removed else 'kept'}")
    facts = {"source": weights.path, "kept": kept, "scores": scores.tolist()}
    with flag_errors("--n-pruned", settings.n_pruned):
        pruned = keep_layers(weights.state, kept)
    name = on_main(lambda: save_pruned(run, settings.save_model, pruned, settings.model, space, **facts))
    if settings.preview:
        save_preview(run, plan, settings.save_model, name, settings.seed)


if __name__ == "__main__":
    launch(main, parse_args)
