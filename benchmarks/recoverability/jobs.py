"""What is run for a problem: rows of JSON, each of a job that can be repeated alone, in processes beside each other."""

import json
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.recoverability import measures, problem, training
from engine.errors import RunError
from engine.files import digest_file
from engine.run import seed_everything
from pruning.patterns import bk_sdm_layers, parse_pattern
from pruning.scores import CRITERIA, measure_losses
from pruning.search import all_choices, choice_masks, find_loss

WORKER = {}  # what a process keeps between jobs


def choices_to_recover(pattern, depth, most):
    """All of them, or as many as `most`, drawn with a fixed seed."""
    choices = [list(kept) for kept in all_choices(parse_pattern(pattern, depth), (depth,))]
    if len(choices) <= most:
        return choices
    return [choices[k] for k in sorted(np.random.default_rng(0).choice(len(choices), most, replace=False))]


def key_of(row):
    """What a row is about, without what was found."""
    return json.dumps([row[name] for name in ("kind", "kept", "pattern", "method", "seed", "digest") if name in row])


def prepare_worker(settings, folder):
    """Load or make what all jobs of a problem need; in every process."""
    torch.set_num_threads(1)
    train, held = problem.load_pictures(settings.data)
    state = problem.read_teacher(settings, folder)
    teacher = problem.make_network(settings, train, state).eval()
    judge = measures.Judge(settings, train, held, teacher)
    WORKER.update(settings=settings, train=train, state=state, teacher=teacher, judge=judge)


def measure_teacher(job):
    """The whole network: which file it is, and how good it is."""
    judge, net = WORKER["judge"], WORKER["teacher"]
    return {**judge.losses(net), **judge.samples(net)}


def recover(job):
    """A choice of layers: its loss right after the cut, and what it becomes by fine-tuning."""
    settings, train, state, judge = (WORKER[name] for name in ("settings", "train", "state", "judge"))
    found = {"calibration": judge.calibration_loss(training.cut(settings, train, state, job["kept"]).eval())}
    net = training.fine_tune(settings, train, state, job["kept"], job["seed"])
    found |= judge.losses(net)
    return {**found, **judge.samples(net)} if job.get("draw") else found


def learn(job):
    """A decision of gates."""
    settings, train, state = (WORKER[name] for name in ("settings", "train", "state"))
    kept = training.learn_layers(settings, train, state, job["pattern"], job["seed"], **LEARNED[job["method"]])
    return {"chosen": kept}


def recover_by(job):
    """What a choice becomes by a recipe, at equal compute: at the end and on the way."""
    settings, train, state, judge = (WORKER[name] for name in ("settings", "train", "state", "judge"))
    curve = []

    def look(net, compute):
        curve.append([round(compute, 1), judge.losses(net)["loss"]])

    start = job["kept"], job["method"], job["seed"]
    net = training.recover(settings, train, state, *start, settings.recovery_compute, look)
    return {**judge.losses(net), **judge.samples(net), "curve": curve}


def score(job):
    """The choice of a criterion that learns nothing."""
    groups, net = parse_pattern(job["pattern"], WORKER["settings"].depth), WORKER["teacher"]
    if job["method"] == "BK-SDM":
        return {"chosen": bk_sdm_layers(groups)}
    seed_everything(2000 + job["seed"])
    criterion = CRITERIA[job["method"]]
    scores = criterion.measure(net, WORKER["judge"].objective, calibration_batches())
    removed = criterion.removed(scores, groups)
    return {"chosen": [layer for layer in range(len(scores)) if layer not in removed]}


def search(job):
    """The choice of the lowest, median or highest loss right after the cut, among those that are recovered."""
    settings, net = WORKER["settings"], WORKER["teacher"]
    seed_everything(2000 + job["seed"])
    batches = calibration_batches()
    choices = choices_to_recover(job["pattern"], settings.depth, settings.sampled)
    losses = measure_losses(net, WORKER["judge"].objective, batches, choice_masks(choices, settings.depth))
    return {"chosen": choices[find_loss(losses, job["method"].split()[0])]}


def calibration_batches():
    """Pictures to measure scores on, as many as prune_by_score.py takes by default."""
    train = WORKER["train"]
    rows = torch.randperm(len(train.x))[:CALIBRATION]
    return [train.batch(part) for part in rows.chunk(2)]


CALIBRATION = 128
RECOVERED = ("learned, full update", "block-influence", "BK-SDM")  # methods whose choices are recovered by all recipes
LEARNED = {  # method -> options of learn_layers
    "learned, full update": {},
    "learned, LoRA": {"update": "lora"},
    "learned, frozen weights": {"update": "none"},
    "learned, teacher's output": {"alpha": 1.0},
    "learned, data and teacher": {"alpha": 0.5},
}
SEARCHED = ("lowest loss", "median loss", "highest loss")
KINDS = {
    "truth": recover,
    "learned": learn,
    "criterion": score,
    "search": search,
    "recovery": recover_by,
    "teacher": measure_teacher,
}


def do(job):
    """The row of a job; in a worker."""
    start = time.perf_counter()
    found = KINDS[job["kind"]](job)
    shown = {name: value for name, value in job.items() if name != "draw"}
    return {**shown, **found, "seconds": round(time.perf_counter() - start, 2)}


def list_jobs(settings, seeds):
    """All jobs that depend on no other one: learning, and the truth about the choices under every pattern."""
    jobs = []
    for pattern in settings.patterns:
        choices = choices_to_recover(pattern, settings.depth, settings.sampled)
        first = pattern == settings.patterns[0]
        for seed in range(2 if first else 1):
            jobs += [truth_job(kept, seed, draw=first and seed == 0) for kept in choices]
    methods = {"learned": LEARNED, "criterion": CRITERIA, "search": SEARCHED}
    jobs += [
        {"kind": kind, "pattern": pattern, "method": method, "seed": seed}
        for pattern in settings.patterns
        for kind, names in methods.items()
        for method in names
        for seed in range(seeds)
    ]
    jobs += [{"kind": "criterion", "pattern": each, "method": "BK-SDM", "seed": 0} for each in settings.patterns]
    return jobs


def list_recoveries(rows, pattern, seeds):
    """Jobs that recover the first seed's choices under a pattern by every recipe."""
    chosen = {row["method"]: row["chosen"] for row in rows if row.get("pattern") == pattern and row["seed"] == 0}
    return [
        {"kind": "recovery", "kept": chosen[origin], "method": recipe, "seed": seed}
        for origin in RECOVERED
        for recipe in training.RECIPES
        for seed in range(seeds)
    ]


def truth_job(kept, seed=0, draw=False):
    """The job that tells how good a choice becomes; draw: its samples too."""
    return {"kind": "truth", "kept": kept, "seed": seed, **({"draw": True} if draw else {})}


def read_rows(path):
    """Rows of a file that is written line by line; half a last line is left out."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else ()
    return [json.loads(line) for line in lines]


def unfinished(jobs, rows):
    """The jobs that have no row; of equal ones the first, for a choice under several patterns is recovered once."""
    done, left = {key_of(row) for row in rows}, {}
    for job in jobs:
        if key_of(job) not in done:
            left.setdefault(key_of(job), job)
    return list(left.values())


def check_rows(rows, problem_row, path):
    """Raise RunError if the rows are of another teacher or other settings."""
    for row in rows:
        if row["kind"] == "teacher" and any(row[name] != value for name, value in problem_row.items()):
            raise RunError(
                f"{path}: holds rows of another teacher or other settings; move it away, or bring these back"
            )


def run_jobs(jobs, path, settings, folder, processes):
    """Do the jobs that `path` holds no rows of, and add theirs. Raises RunError for rows of another problem."""
    rows = read_rows(path)
    about = json.loads(json.dumps(asdict(settings)))  # tuples as lists, as they are read
    teacher = {"kind": "teacher", "digest": digest_file(problem.teacher_path(settings, folder)), "settings": about}
    check_rows(rows, teacher, path)
    jobs = unfinished([teacher, *jobs], rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))  # without half a last line
    if not jobs:
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    with (
        ProcessPoolExecutor(processes, get_context("spawn"), prepare_worker, (settings, folder)) as pool,
        open(path, "a") as file,
    ):
        waiting = [pool.submit(do, job) for job in jobs]
        for future in tqdm(as_completed(waiting), total=len(jobs), desc=path.stem):
            if future.exception():
                pool.shutdown(wait=False, cancel_futures=True)  # rows that were written stay
            file.write(json.dumps(future.result()) + "\n")
            file.flush()
