"""`python -m benchmarks.recoverability --data mnist`: the truth about all choices, and what every method chooses.

Rows are added to <output>/<data>-<teacher>.jsonl as they are found; the same command goes on where it was stopped.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from benchmarks.recoverability import jobs, problem, summary, training

RESULTS = Path(__file__).parent / "results"


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="mnist", help="mnist, digits, or a folder of encoded latents")
    parser.add_argument("--teacher", type=int, default=0, help="seed of the teacher (default: 0)")
    parser.add_argument("--seeds", type=int, default=5, help="seeds of every method that draws (default: 5)")
    parser.add_argument("--processes", type=int, default=2, help="jobs beside each other (default: 2)")
    parser.add_argument("--quick", action="store_true", help="few steps and choices, to see that everything runs")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for rows and teachers")
    return parser.parse_args()


def choose_problem(flags):
    """The Problem that the flags describe."""
    found = problem.PROBLEMS.get(flags.data, problem.Problem(flags.data))
    if flags.teacher:  # the question for another teacher is whether the first pattern's answers hold
        found = replace(found, teacher=flags.teacher, patterns=found.patterns[:1])
    return problem.quick(found) if flags.quick else found


def main():
    args = parse_args()
    settings = choose_problem(args)
    args.output.mkdir(parents=True, exist_ok=True)
    train, _ = problem.load_pictures(settings.data)
    if not problem.teacher_path(settings, args.output).exists():
        print(f"training the teacher: {settings.teacher_steps} steps", flush=True)
        problem.write_teacher(settings, args.output, training.train_teacher(settings, train).state_dict())
    path = args.output / f"{settings.title}.jsonl"

    def run(listed):
        jobs.run_jobs(listed, path, settings, args.output, args.processes)
        return jobs.read_rows(path)

    run(jobs.list_truths(settings))
    rows = run(jobs.list_choices(settings, args.seeds))
    rows = run([jobs.truth_job(row["chosen"]) for row in rows if "chosen" in row])
    rows = run(jobs.list_recoveries(settings, rows, args.seeds))
    choices = {name: jobs.choices_to_recover(name, settings.depth, settings.sampled) for name in settings.patterns}
    print(summary.format_table(summary.summarize(rows, choices)))
    print(summary.format_recoveries(summary.summarize_recoveries(rows)))


if __name__ == "__main__":
    main()
