"""Write a page of run folders: settings, curves, decisions of gates, samples, sizes before and after, and metrics.

It is one file that holds all it shows: it needs no server, and asks nobody for anything when it is read.

Example:
  python report_runs.py outputs/learn_mask-DiT-XL-1-2 outputs/D14-kd-DiT-D14-2 --output report.html
"""

from engine.cli import Command, launch
from engine.errors import InputError, check_writable, flag_errors
from families import stack_layers
from families.flags import NEEDED, Flag, count, path_flag, path_text

COMMAND = Command(
    "report_runs",
    __doc__,
    own=(
        Flag(
            "runs",
            "run folders, which are shown side by side",
            required=True,
            positional=True,
            nargs="+",
            type=path_text,
            metavar="RUN",
            group=NEEDED,
        ),
        path_flag("metrics", "more files that evaluator.py --json has written", nargs="+", shown="those in the runs"),
        path_flag("output", "the page", "report.html"),
        Flag("title", "its title", shown="names of the runs", metavar="TEXT", group=NEEDED),
        Flag("samples", "most pictures of a run, spread over its steps", 8, type=count, group=NEEDED),
    ),
    kinds=None,
)
parse_args = COMMAND.resolve


def count_layers(model):
    """Layers of a model by its name; None for a name that is not known."""
    try:
        return sum(stack_layers(model))
    except ValueError:
        return None


def read_folder(path):
    """The reporting.runs.Run of a folder. Raises InputError for another folder."""
    from reporting.runs import read_run

    with flag_errors("RUN", path):
        return read_run(path, count_layers)


def read_metrics(paths):
    """{file: numbers} of files that the evaluator has written. Raises InputError for others."""
    from engine.files import read_json

    found = {path: read_json("--metrics", path) for path in paths}
    for path, numbers in found.items():
        if "fid" not in numbers:
            raise InputError(f"--metrics {path}: holds no fid; give a file that evaluator.py --json has written")
    return found


def main(settings):
    from reporting.page import write_page
    from reporting.parts import Options
    from reporting.runs import name_apart

    if not settings.output.lower().endswith((".html", ".htm")):
        raise InputError(f"--output {settings.output}: expected a name that ends with .html")
    check_writable("--output", settings.output, RUN=settings.runs, metrics=settings.metrics)
    runs = [read_folder(path) for path in settings.runs]
    name_apart(runs)
    options = Options(settings.samples, read_metrics(settings.metrics or []))
    size = write_page(settings.output, settings.title or ", ".join(run.name for run in runs), runs, options)
    print(f"wrote {settings.output}: {len(runs)} run(s), {size / 1e6:.2g} MB")


if __name__ == "__main__":
    launch(main, parse_args)
