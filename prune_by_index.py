"""Keep the given layers of a network, or those of a fixed scheme.

python prune_by_index.py --model DiT-XL/2 --ckpt pretrained/DiT-XL-2-256x256.pt --scheme bk-sdm --save-model pruned.pt
"""

from engine.checkpoint import read_checked
from engine.cli import PRUNING_FLAGS, add_unused, flag_type, integer_list, launch, make_parser, parse, report_unused
from engine.errors import InputError, blame, check_writable
from engine.run import Run
from engine.sampling import check_sampling, find_ckpt, save_pruned, told_by_ckpt
from families import stack_layers
from pruning.patterns import bk_sdm_layers, format_pattern, parse_pattern
from pruning.surgery import check_layers, keep_layers

SCHEMES = {"bk-sdm": bk_sdm_layers}


def parse_args(argv=None):
    parser = make_parser("prune_by_index", __doc__, PRUNING_FLAGS, "sample")
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("--kept-indices", type=flag_type(integer_list), help='layers to keep, as "[0, 2, 4]"')
    choice.add_argument(
        "--scheme", choices=SCHEMES, help="bk-sdm: first layers of a group in the first half, last after"
    )
    parser.add_argument("--pattern", default="1:2", help="N:M groups of --scheme (default: 1:2)")
    add_unused(
        parser,
        data_path={"default": "data/imagenet/train"},
        pruner={"default": "dense", "choices": ("dense", "magnitude", "random", "sparsegpt", "wanda")},
        nsamples={"type": int, "default": 128},
        batch_size={"type": int, "default": 16},
    )
    return parse(parser, argv, told_by_ckpt)


def choose_layers(args, depth):
    """Layers to keep, ascending, and the pattern they follow, if any."""
    if args.scheme:
        with blame("--pattern", args.pattern):
            groups = parse_pattern(args.pattern, depth)
        return SCHEMES[args.scheme](groups), {"pattern": format_pattern(groups)}
    with blame("--kept-indices", args.kept_indices):
        check_layers(args.kept_indices, depth)
    return sorted(args.kept_indices), {}


def main(args):
    report_unused(args)
    if not args.save_model:
        raise InputError("--save-model: missing; name the file for the pruned weights")
    check_writable("--save-model", args.save_model)
    kept, pattern = choose_layers(args, sum(stack_layers(args.model)))
    path = find_ckpt(args)
    state, _ = read_checked(path, "--ckpt", args.model)
    if args.preview:
        check_sampling(args, state, path)
    run = Run(args)
    run.print(f"kept layers {kept}")
    save_pruned(run, args, keep_layers(state, kept), source=path, kept=kept, **pattern)


if __name__ == "__main__":
    launch(main, parse_args)
