"""The long form: all cases, or those whose names match, in a few processes; prints what failed and how often.

Example:
  python tests/faults/run.py --jobs 2 --only "train .*--lr" --json results.json
"""

import argparse
import contextlib
import importlib
import json
import multiprocessing
import os
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE.parent)]
os.environ.setdefault("OMP_NUM_THREADS", "1")

from faults import command_lines, files, good, harness, report  # noqa: E402


def all_cases():
    """Every case, in a fixed order."""
    return [*command_lines.cases(), *files.cases()]


def pick(cases, number):
    """`number` of the cases, by a fixed stride through scripts and kinds."""
    ordered = sorted(cases, key=lambda case: (case.kind, case.script, case.name))
    if not number or number >= len(ordered):
        return ordered
    return [ordered[i * len(ordered) // number] for i in range(number)]


def preload():
    """Import what scripts use, once, before processes are forked."""
    names = [*good.BASES, "models", "models_mar", "torchdiffeq", "engine.kl16", "evaluation.inception"]
    names += ["diffusers.models.autoencoders.autoencoder_kl", "engine.sample_folder", "engine.trainer"]
    names += ["engine.calibration", "engine.extraction", "engine.start", "engine.pruned", "diffusion", "diffusion.flow"]
    names += ["diffusion.masked", "diffusion.samplers", "evaluation.evaluate", "pruning.surgery", "pruning.scores"]
    for name in names:
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)


def make_inputs(folder):
    """Make the good inputs in a forked process, so that this one has computed nothing."""
    if (folder / "done").exists():
        return
    worker = multiprocessing.get_context("fork").Process(target=make_quietly, args=(folder,))
    worker.start()
    worker.join()
    if worker.exitcode:
        sys.exit("the good inputs could not be made")
    (folder / "done").touch()


def make_quietly(folder):
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        good.make_good(folder)


CASES, GOOD, LIMIT = [], [], [harness.SECONDS]  # what forked processes find


def run_number(number):
    """Run a case by its number."""
    multiprocessing.current_process()._config["daemon"] = False  # or a loader could start no process
    return number, harness.run_case(CASES[number], GOOD[0], LIMIT[0])


def run_all(cases, folder, jobs=2, tell=None):
    """Results of all cases, in their order. tell: called with every result when it is there."""
    preload()
    make_inputs(Path(folder))
    CASES[:], GOOD[:] = cases, [Path(folder)]
    found = {}
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        for number, result in pool.imap_unordered(run_number, range(len(cases)), chunksize=1):
            found[number] = result
            if tell:
                tell(result)
    return [found[number] for number in range(len(cases))]


def read_flags(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("Example:")[0].strip())
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--only", default="", help="expression that names of cases match")
    parser.add_argument("--sample", type=int, default=0, help="so many cases, by a fixed stride; 0: all")
    parser.add_argument("--seconds", type=int, default=harness.SECONDS, help="time that a case may take")
    parser.add_argument("--json", help="file for all results")
    parser.add_argument("--markdown", help="file for tables of all answers")
    parser.add_argument("--page", help="page whose tables are written anew, docs/faults.md")
    parser.add_argument("--inputs", help="folder that keeps the good inputs between calls")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    parser.add_argument("--quiet", action="store_true", help="print the summary alone")
    return parser.parse_args(argv)


def main(argv=None):
    flags = read_flags(argv)
    cases = pick([case for case in all_cases() if re.search(flags.only, case.name)], flags.sample)
    if flags.list:
        print("\n".join(case.name for case in cases))
        return 0
    LIMIT[0], done = flags.seconds, Counter()

    def tell(result):
        done["all"] += 1
        if not flags.quiet:
            print(
                f"{done['all']}/{len(cases)} {result.seconds:5.1f} s  {result.name}: {result.reason or 'ok'}",
                flush=True,
            )

    with tempfile.TemporaryDirectory(prefix="faults-") as temporary:
        results = run_all(cases, Path(flags.inputs or temporary) / "good", flags.jobs, tell)
    print(report.summary(results))
    if flags.json:
        Path(flags.json).write_text(json.dumps([harness.as_dict(result) for result in results], indent=1))
    if flags.markdown:
        Path(flags.markdown).write_text(report.table(results))
    if flags.page:
        report.fill_page(Path(flags.page), results)
    return int(any(result.reason for result in results))


if __name__ == "__main__":
    sys.exit(main())
