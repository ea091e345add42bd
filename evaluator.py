"""Inception Score, FID, sFID, Precision and Recall by the protocol of published tables (guided-diffusion's evaluator).

REF and SAMPLE: an .npz with `arr_0` (N, H, W, 3) uint8, a folder of pictures, or several .npz (a folder, a glob, or a
comma list). Stored mu, sigma, mu_s, sigma_s are used for FID and sFID. Processes under torchrun share the features.

Example:
  python evaluator.py VIRTUAL_imagenet256_labeled.npz samples.npz
  python evaluator.py data/pictures --save-stats reference.npz
"""

import sys

from engine.cli import Command, launch
from engine.errors import InputError, check_folder, check_writable, flag_errors
from evaluation import METRICS
from families.flags import NEEDED, SYSTEM, Flag, count, path_flag, path_text, switch


def metric_list(text):
    """fid,is -> those of METRICS that it names, in their order."""
    names = [name.strip().lower() for name in text.split(",")]
    wrong = [name for name in names if name not in METRICS]
    if wrong:
        raise ValueError(f"{wrong[0]!r} is not one of {','.join(METRICS)}")
    return [name for name in METRICS if name in names]


COMMAND = Command(
    "evaluator",
    __doc__,
    own=(
        Flag(
            "ref",
            "reference images, with or without stored statistics",
            required=True,
            positional=True,
            type=path_text,
            metavar="REF",
            group=NEEDED,
        ),
        Flag(
            "sample",
            "samples; not needed for --save-stats",
            nargs="?",
            positional=True,
            type=path_text,
            metavar="SAMPLE",
            shown="none",
            group=NEEDED,
        ),
        path_flag("inception", "weights, .pb or .pth", shown="found or downloaded"),
        path_flag("json", "also write the numbers there", shown="no"),
        path_flag(
            "save-stats", "write mu, sigma, mu_s, sigma_s of SAMPLE, or of REF if it is alone (.npz)", shown="no"
        ),
        Flag("metrics", "what to compute", list(METRICS), type=metric_list, shown=",".join(METRICS), metavar="LIST"),
        Flag(
            "pr-dtype",
            "distances of precision and recall: float16 as published, or exact",
            "adm",
            choices=("adm", "float32"),
        ),
        Flag("backend", "what runs Inception", "torch", choices=("torch", "tensorflow", "tf"), group=SYSTEM),
        Flag("device", "auto (GPU if there is one), cpu, cuda or cuda:N", "auto", metavar="NAME", group=SYSTEM),
        Flag("batch-size", "images computed together", 64, type=count, group=SYSTEM),
        path_flag(
            "cache-dir",
            "keep features of REF (and downloaded weights) there",
            shown="none",
            group=SYSTEM,
            metavar="FOLDER",
        ),
        switch("offline", "never download weights", group=SYSTEM),
    ),
    kinds=None,
)
parse_args = COMMAND.resolve


def open_checked(settings):
    """The two sets of images (REF alone: the set and None), after every check that needs no network."""
    from evaluation.batches import open_images
    from evaluation.evaluate import check

    if not settings.sample and (settings.json or not settings.save_stats):
        raise InputError("SAMPLE is missing; give REF and SAMPLE, or one data set and --save-stats FILE")
    if settings.cache_dir:
        check_folder("--cache-dir", settings.cache_dir)
    found = []
    for name, path in (("REF", settings.ref), ("SAMPLE", settings.sample)):
        if path:
            with flag_errors(name, path):
                found.append(open_images(path))
                check(found[-1], settings.metrics if settings.sample else (), name == "SAMPLE")
    if settings.save_stats:
        with flag_errors("--save-stats", settings.save_stats):
            check(found[-1], ("stats",), True)
    inputs = {"REF": found[0].paths, "SAMPLE": found[-1].paths, "inception": settings.inception}
    for flag, path, other in (
        ("--json", settings.json, {}),
        ("--save-stats", settings.save_stats, {"json": settings.json}),
    ):
        if path:
            check_writable(flag, path, **inputs, **other)
    return found if settings.sample else (found[0], None)


def main(settings):
    from engine.distributed import agree, is_main, start_processes
    from engine.files import write_json
    from evaluation import evaluate as protocol

    reference, sample = open_checked(settings)
    device = start_processes(settings.device)
    backend = "tensorflow" if settings.backend == "tf" else settings.backend
    warnings = protocol.list_warnings(reference, sample, settings.metrics, settings.pr_dtype) if sample else []
    for text in warnings if is_main() else ():
        print("warning:", text, file=sys.stderr, flush=True)
    with flag_errors("--inception", settings.inception or "(not given)"):
        extractor = protocol.load_extractor(backend, settings.inception, device, settings.offline, settings.cache_dir)
    shown = {"reference_images": reference.n, "samples": sample.n if sample else 0, "metrics": settings.metrics}
    agree({**shown, "pr_dtype": settings.pr_dtype, "backend": backend})
    with flag_errors(f"REF {settings.ref} SAMPLE", settings.sample or "(none)"):
        if sample is None:
            protocol.write_statistics(reference, extractor, settings.save_stats, settings.batch_size)
            return
        numbers = protocol.evaluate(reference, sample, extractor, settings.make(protocol.Options))
    if settings.json and is_main():
        shown = {name: getattr(settings, name) for name in ("ref", "sample", "pr_dtype", "metrics")}
        counts = {"reference_images": reference.n, "samples": sample.n}
        write_json(settings.json, {**numbers, **shown, "backend": backend, **counts, "warnings": warnings})


if __name__ == "__main__":
    launch(main, parse_args)
