"""Inception Score, FID, sFID, Precision and Recall by the protocol of published tables (guided-diffusion's evaluator).

python evaluator.py VIRTUAL_imagenet256_labeled.npz samples.npz
python evaluator.py data/pictures --save-stats reference.npz

REF and SAMPLE: an .npz with `arr_0` (N, H, W, 3) uint8, a folder of pictures, or several .npz (a folder, a glob, or a
comma list). Stored mu, sigma, mu_s, sigma_s are used for FID and sFID. Processes under torchrun share the features.
"""

import argparse
import sys

from engine.errors import InputError, blame, check_folder, check_writable

METRICS = ("is", "fid", "sfid", "pr")


def metric_list(text):
    names = [name.strip().lower() for name in text.split(",")]
    wrong = [name for name in names if name not in METRICS]
    if wrong:
        raise argparse.ArgumentTypeError(f"{wrong[0]!r} is none of {','.join(METRICS)}")
    return [name for name in METRICS if name in names]


def positive(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number of 1 or more")
    return int(text)


def parse_args(argv=None):
    """A parser of its own, since engine.cli takes seconds to import and --help should not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ref", metavar="REF", help="reference images, with or without stored statistics")
    parser.add_argument("sample", metavar="SAMPLE", nargs="?", help="samples; not needed for --save-stats")
    parser.add_argument(
        "--backend", choices=("torch", "tensorflow", "tf"), default="torch", help="what runs Inception (default: torch)"
    )
    parser.add_argument("--inception", metavar="PATH", help="weights, .pb or .pth (default: found or downloaded)")
    parser.add_argument("--offline", action="store_true", help="never download weights")
    parser.add_argument("--device", default="auto", help="auto (the default: GPU if there is one), cpu, cuda or cuda:N")
    parser.add_argument("--batch-size", type=positive, default=64, help="images computed together (default: 64)")
    parser.add_argument(
        "--metrics", type=metric_list, default=list(METRICS), help=f"what to compute (default: {','.join(METRICS)})"
    )
    parser.add_argument(
        "--pr-dtype",
        choices=("adm", "float32"),
        default="adm",
        help="distances of precision and recall: float16 as published, or exact (default: adm)",
    )
    parser.add_argument(
        "--save-stats", metavar="FILE", help="write mu, sigma, mu_s, sigma_s of SAMPLE, or of REF if it is alone (.npz)"
    )
    parser.add_argument("--cache-dir", metavar="DIR", help="keep features of REF (and downloaded weights) there")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers there")
    args = parser.parse_args(argv)
    args.backend = "tensorflow" if args.backend == "tf" else args.backend
    return args


def open_checked(args):
    """The two sets of images (REF alone: the set and None), after every check that needs no network."""
    from evaluation.batches import open_images
    from evaluation.evaluate import check

    if not args.sample and (args.json or not args.save_stats):
        raise InputError("SAMPLE is missing; give REF and SAMPLE, or one data set and --save-stats FILE")
    for flag, path in (("--json", args.json), ("--save-stats", args.save_stats)):
        if path:
            check_writable(flag, path)
    if args.cache_dir:
        check_folder("--cache-dir", args.cache_dir)
    found = []
    for name, path in (("REF", args.ref), ("SAMPLE", args.sample)):
        if path:
            with blame(name, path):
                found.append(open_images(path))
                check(found[-1], args.metrics if args.sample else (), name == "SAMPLE")
    if args.save_stats:
        with blame("--save-stats", args.save_stats):
            check(found[-1], ("stats",), True)
    return found if args.sample else (found[0], None)


def main(args):
    from engine.distributed import is_main, start_processes
    from evaluation import evaluate as protocol

    reference, sample = open_checked(args)
    device = start_processes(args.device)
    warnings = protocol.doubts(reference, sample, args.metrics, args.pr_dtype) if sample else []
    for text in warnings if is_main() else ():
        print("warning:", text, file=sys.stderr, flush=True)
    with blame("--inception", args.inception or "(not given)"):
        extractor = protocol.load_extractor(args.backend, args.inception, device, args.offline, args.cache_dir)
    with blame(f"REF {args.ref} SAMPLE", args.sample or "(none)"):
        if sample is None:
            return protocol.write_statistics(reference, extractor, args.save_stats, args.batch_size)
        numbers = protocol.evaluate(
            reference, sample, extractor, args.metrics, args.pr_dtype, args.batch_size, args.cache_dir, args.save_stats
        )
    if args.json and is_main():
        settings = {name: getattr(args, name) for name in ("ref", "sample", "backend", "pr_dtype", "metrics")}
        counts = {"reference_images": reference.n, "samples": sample.n}
        protocol.save_json(args.json, {**numbers, **settings, **counts, "warnings": warnings})


if __name__ == "__main__":
    arguments = parse_args()  # before the import of torch
    from engine.cli import launch

    launch(main, lambda: arguments)
