"""Draw a few pictures from a network and write them as one grid.

python sample.py --model DiT-D14/2 --ckpt TinyDiT-D14-MaskedKD-500K.pt --seed 5464
"""

from pathlib import Path

from engine.checkpoint import read_weights
from engine.cli import SAMPLING_FLAGS, flag_type, integer_list, launch, make_parser, parse
from engine.errors import InputError, check_writable
from engine.run import Run
from engine.sampling import find_ckpt, preview_labels, sample_grid, told_by_ckpt
from families import family_of


def parse_args(argv=None):
    parser = make_parser("sample", __doc__, SAMPLING_FLAGS + " seed", "sample")
    parser.add_argument("--labels", type=flag_type(integer_list), help="classes to draw (default: eight of them)")
    parser.add_argument("--output", help="picture to write (default: named after the weights, in outputs/samples)")
    return parse(parser, argv, told_by_ckpt)


def main(args):
    labels = args.labels or preview_labels(args.num_classes)
    for label in labels:
        if not 0 <= label < args.num_classes:
            raise InputError(f"--labels {labels}: has {label}, but the classes are 0..{args.num_classes - 1}")
    path = find_ckpt(args)
    name = str(path).strip("/").replace("/", "-").removesuffix(".pt")
    settings = f"cfg{args.cfg_scale:g}-{family_of(args.model).label(args)}-seed{args.seed}"
    output = args.output or str(Path("outputs/samples") / f"{name}-{settings}.png")
    check_writable("--output", output)
    state = read_weights(path, "--ckpt", prefer_ema=not args.no_ema)
    run = Run(args)
    sample_grid(run, args, state, path, labels, output)


if __name__ == "__main__":
    launch(main, parse_args)
