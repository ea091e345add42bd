r"""Drop the layers that a criterion ranks lowest, or take the best of many choices by their loss; nothing is learnt.

The default criterion drops the layers that change their input least (ShortGPT's block influence).

Example:
  python prune_by_score.py --model DiT-XL/2 --ckpt pretrained/DiT-XL-2-256x256.pt --data-path features --n-pruned 14 \
      --save-model pruned.pt
"""

from engine.cli import Command, launch
from engine.errors import InputError, RunError, flag_errors
from engine.flags import PRUNING_FLAGS, shared
from engine.settings import TYPED
from families import fixed_layers, stack_layers, stack_names
from families.flags import Flag, all_or_count, count, path_text

CRITERIA = ("block-influence", "sensitivity", "flux-lite", "output-change", "magnitude", "random")
LOSSES = ("lowest", "median", "highest")
COMMAND = Command(
    "prune_by_score",
    __doc__,
    own=(
        Flag("n-pruned", "number of layers to drop; this or --pattern", type=count, shown="none", metavar="N"),
        Flag(
            "pattern",
            "N:M groups, of each of which N layers stay, e.g. 1:2 or 2:4x5,3:4x2",
            type=path_text,
            shown="none",
            metavar="N:M",
        ),
        Flag("criterion", "what ranks the layers", "block-influence", choices=CRITERIA),
        Flag(
            "search",
            "measure the loss of N random choices of layers, or of all, instead of ranking layers",
            type=all_or_count,
            shown="none",
            metavar="N",
        ),
        Flag("search-for", "which loss of --search to take", "lowest", choices=LOSSES),
        Flag("nsamples", "images to measure on", 128, type=count),
        Flag("batch-size", "images per batch", 16, type=count),
    ),
    shared=shared(f"{PRUNING_FLAGS} data-path mirror", data_path="data/imagenet/train"),
    kinds=("train", "sample", "score", "prune"),
    weights=(("ckpt", "model"),),
    latents=True,
)


def parse_args(argv=None):
    settings = COMMAND.resolve(argv)
    is_typed = {name for name, origin in settings.origins.items() if origin == TYPED}
    if (settings.n_pruned is None) == (settings.pattern is None):
        raise InputError("--n-pruned or --pattern: give one of them, to say how many layers go")
    if settings.search and "criterion" in is_typed:
        raise InputError(f"--criterion {settings.criterion}: has no meaning with --search, which goes by the loss")
    if "search_for" in is_typed and not settings.search:
        raise InputError(f"--search-for {settings.search_for}: needs --search N; without it layers are ranked")
    if settings.clean_latents and (settings.search or settings.criterion != "block-influence"):
        other = f"--search {settings.search}" if settings.search else f"--criterion {settings.criterion}"
        raise InputError(f"--clean-latents: is for block-influence alone, which {other} is not; leave one of them out")
    if settings.nsamples < settings.batch_size:
        raise InputError(f"--nsamples {settings.nsamples}: less than one batch; take {settings.batch_size} or more")
    return settings


def choose_groups(model, n_pruned, pattern):
    """The N:M groups of --pattern; with --n-pruned a single one over all layers."""
    from pruning.patterns import parse_groups

    stacks = stack_layers(model)
    depth = sum(stacks)
    if pattern is None:
        if n_pruned >= depth:
            raise InputError(f"--n-pruned {n_pruned}: {model} has {depth} layers; expected 1..{depth - 1}")
        return [[depth - n_pruned, depth]]
    with flag_errors("--pattern", pattern):
        return parse_groups(pattern, stacks, stack_names(model))


def list_choices(settings, groups):
    """The choices of layers to --search, or None without it."""
    from pruning.search import draw_choices

    if not settings.search:
        return None
    with flag_errors("--search", settings.search):
        stacks, fixed = stack_layers(settings.model), fixed_layers(settings.model)
        return draw_choices(groups, stacks, settings.search, settings.seed, fixed)


def check_finite(numbers):
    """Raise RunError unless scores or losses are numbers."""
    if not numbers.isfinite().all():
        raise RunError(
            "scores are not finite; the weights or the latents hold numbers that are not, see --ckpt, --data-path"
        )


def rank(settings, run, criterion, measured, groups):
    """Layers that stay by a criterion, and facts; measured: network, objective and batches."""
    clean = {"clean_steps": settings.num_sampling_steps} if settings.clean_latents else {}
    scores = criterion.measure(*measured, **clean)
    check_finite(scores)
    removed = criterion.removed(scores, groups, fixed_layers(settings.model))
    for layer, score in enumerate(scores):
        run.print(
            f"layer {layer:2d}  {criterion.word} {score:{criterion.form}}  {'removed' if layer in removed else 'kept'}"
        )
    kept = [layer for layer in range(len(scores)) if layer not in removed]
    return kept, {"criterion": settings.criterion, "scores": scores.tolist()}


def search(settings, run, choices, measured, batches):
    """The choice of layers with the asked loss, and facts. All layers are measured too; batches: how many there are."""
    from tqdm import tqdm

    from pruning.scores import measure_losses
    from pruning.search import choice_masks, find_loss

    depth = sum(stack_layers(settings.model))
    masks = choice_masks([range(depth), *choices], depth)
    with tqdm(total=batches * len(masks), desc="searching", disable=not run.is_main) as bar:
        losses = measure_losses(*measured, masks, bar.update)
    check_finite(losses)
    whole, losses = losses[0], losses[1:]
    run.print(f"loss of all {depth} layers {whole:.6f}, of {len(choices):,} choices of layers:")
    found = {which: find_loss(losses, which) for which in LOSSES}
    for which, i in found.items():
        run.print(f"{which} loss {losses[i]:.6f}  kept layers {list(choices[i])}")
    shown = {which: losses[i].item() for which, i in found.items()}
    facts = {"criterion": f"{settings.search_for} loss", "choices": len(choices), "losses": shown}
    return list(choices[found[settings.search_for]]), facts


def main(settings):
    from tqdm import tqdm

    from engine.calibration import Calibration
    from engine.distributed import on_main
    from engine.endings import say_recovery
    from engine.file_settings import read_latents
    from engine.pruned import check_start, check_target, save_preview, write_choice
    from engine.run import Run
    from engine.sampling import SamplingPlan
    from engine.start import print_start
    from engine.vae import LatentSpace
    from pruning.patterns import format_pattern
    from pruning.scores import CRITERIA
    from pruning.surgery import cut_layers

    inputs = {"ckpt": settings.ckpt, "vae": settings.vae, "data_path": settings.data_path}
    check_target(settings, settings.save_model, **inputs)
    groups = choose_groups(settings.model, settings.n_pruned, settings.pattern)
    choices = list_choices(settings, groups)
    run = Run(settings.device, seed=settings.seed)
    space = settings.make(LatentSpace, latents=settings.family.latents)
    weights = settings.weights["ckpt"]
    config = {**weights.read_config(settings.model), "num_classes": settings.num_classes}
    weights.check_fit(settings.model, config)
    check_start(settings.init, weights, settings.model)
    plan = settings.make(SamplingPlan, weights=weights, space=space, own=settings.own("sample"))
    if settings.preview:
        plan.check()
    if settings.clean_latents:
        plan.make_sampler()  # whose chain has all these steps

    criterion, calibration = CRITERIA[settings.criterion], settings.make(Calibration, space=space)
    batches, data = (), ""
    needs_data = choices or criterion.reads_data
    if needs_data:
        batches = calibration.batches(run.device, config["in_channels"])
        data = calibration.digest() if run.world > 1 else ""
    print_start(settings, run, data_path=data)
    if settings.dry_run:
        return

    net = weights.build(settings.model, config, run.device).eval()
    objective = settings.make_objective().to(run.device) if needs_data else None
    if choices:
        kept, facts = search(settings, run, choices, (net, objective, batches), calibration.count)
    else:
        batches = tqdm(
            batches, total=calibration.count, desc="measuring", disable=not (run.is_main and criterion.reads_data)
        )
        kept, facts = rank(settings, run, criterion, (net, objective, batches), groups)
    pattern = {"pattern": format_pattern(groups)} if settings.pattern else {}
    facts = {"source": weights.name, "kept": kept, "init": settings.init, **pattern, **facts}
    with flag_errors("--n-pruned", settings.n_pruned):
        pruned = cut_layers(weights.state, kept, settings.init, stack_names(settings.model))
    name = on_main(lambda: write_choice(run, settings, weights.state, pruned, space, **facts), patient=True)
    if settings.preview:
        save_preview(run, plan, settings.save_model, name, settings.seed)
    features = settings.data_path if read_latents(settings.data_path) else "FEATURES"
    say_recovery(run, settings.save_model, weights.name, settings.model, features)


if __name__ == "__main__":
    launch(main, parse_args)
