r"""Keep the given layers of a network, or those of a fixed scheme.

Example:
  python prune_by_index.py --model DiT-XL/2 --ckpt pretrained/DiT-XL-2-256x256.pt --scheme bk-sdm \
      --save-model pruned.pt
"""

from engine.cli import Command, launch, unused_flags
from engine.errors import InputError, flag_errors
from engine.flags import PRUNING_FLAGS, shared
from families import fixed_layers, stack_layers, stack_names
from families.flags import UNUSED, Flag, integer_list, path_text

COMMAND = Command(
    "prune_by_index",
    __doc__,
    own=(
        Flag(
            "kept-indices",
            'layers to keep, as "[0, 2, 4]"; this or --scheme',
            type=integer_list,
            shown="none",
            metavar="LIST",
        ),
        Flag(
            "scheme", "bk-sdm: first layers of a group in the first half, last after", choices=("bk-sdm",), shown="none"
        ),
        Flag("pattern", "N:M groups of --scheme", "1:2", type=path_text, metavar="N:M"),
    ),
    shared=shared(PRUNING_FLAGS),
    kinds=("sample", "prune"),
    weights=(("ckpt", "model"),),
    unused=(
        *unused_flags(data_path="data/imagenet/train", nsamples=128, batch_size=16),
        Flag(
            "pruner", "no effect", "dense", choices=("dense", "magnitude", "random", "sparsegpt", "wanda"), group=UNUSED
        ),
    ),
)


def parse_args(argv=None):
    settings = COMMAND.resolve(argv)
    if (settings.kept_indices is None) == (settings.scheme is None):
        raise InputError("--kept-indices or --scheme: give one of them, to say which layers stay")
    return settings


def choose_layers(kept_indices, pattern, model):
    """Layers to keep, ascending, and facts: the given ones, or else those of BK-SDM's scheme under a pattern."""
    from pruning.patterns import bk_sdm_layers, format_pattern, parse_pattern, split_pattern
    from pruning.surgery import check_layers

    stacks, facts = dict(zip(stack_names(model), stack_layers(model), strict=True)), {}
    depth = sum(stacks.values())
    if kept_indices is None:
        with flag_errors("--pattern", pattern):
            groups = split_pattern(pattern, stacks) if "=" in pattern else parse_pattern(pattern, depth)
        kept, facts = bk_sdm_layers(groups), {"pattern": format_pattern(groups)}
    else:
        with flag_errors("--kept-indices", kept_indices):
            check_layers(kept_indices, depth)
        kept = sorted(kept_indices)
    if missing := sorted(set(fixed_layers(model)) - set(kept)):
        raise InputError(f"--model {model}: layer {missing[0]} is unlike the others and has to stay; keep it too")
    return kept, {"kept": kept, **facts}


def main(settings):
    from engine.distributed import on_main
    from engine.endings import say_recovery
    from engine.pruned import check_target, save_preview, write_choice
    from engine.run import Run
    from engine.sampling import SamplingPlan
    from engine.start import print_start
    from engine.vae import LatentSpace
    from pruning.surgery import cut_layers

    inputs = {"ckpt": settings.ckpt, "vae": settings.vae}
    check_target(settings, settings.save_model, **inputs)
    kept, facts = choose_layers(settings.kept_indices, settings.pattern, settings.model)
    run = Run(settings.device, seed=settings.seed)
    space = settings.make(LatentSpace, latents=settings.family.latents)
    weights = settings.weights["ckpt"]
    weights.check_fit(settings.model, {**weights.read_config(settings.model), "num_classes": settings.num_classes})
    with flag_errors("--kept-indices" if settings.scheme is None else "--pattern", kept):
        pruned = cut_layers(weights.state, kept, settings.init, stack_names(settings.model))
    plan = settings.make(SamplingPlan, weights=weights, space=space, own=settings.own("sample"))
    if settings.preview:
        plan.check()
    run.print(f"kept layers {kept}")
    print_start(settings, run)
    if settings.dry_run:
        return
    facts |= {"source": weights.name, "init": settings.init}
    name = on_main(lambda: write_choice(run, settings, weights.state, pruned, space, **facts), patient=True)
    if settings.preview:
        save_preview(run, plan, settings.save_model, name, settings.seed)
    say_recovery(run, settings.save_model, weights.name, settings.model, "FEATURES")


if __name__ == "__main__":
    launch(main, parse_args)
