"""What is run for a problem: rows of JSON, each of a job that can be repeated alone, in processes beside each other."""

import json
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from multiprocessing import get_context

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.recoverability import measures, problem, recovery, training
from engine.errors import RunError
from engine.run import seed_everything
from pruning.patterns import bk_sdm_layers, parse_pattern
from pruning.scores import CRITERIA, measure_losses
from pruning.search import all_choices, choice_masks, find_loss
from pruning.surgery import cut_layers, keep_layers

WORKER = {}  # what a process keeps between jobs


def choices_to_recover(pattern, depth, most):
    """All of them, or as many as `most`, drawn with a fixed seed."""
    choices = [list(kept) for kept in all_choices(parse_pattern(pattern, depth), (depth,))]
    if len(choices) <= most:
        return choices
    return [choices[k] for k in sorted(np.random.default_rng(0).choice(len(choices), most, replace=False))]


def key_of(row):
    """What a row is about, without what was found."""
    about = ("kind", "kept", "pattern", "method", "options", "seed")
    return json.dumps([row[name] for name in about if name in row])


def prepare_worker(settings, folder):
    """Load or make what all jobs of a problem need; in every process."""
    torch.set_num_threads(1)
    train, held = problem.load_pictures(settings.data)
    state = problem.read_teacher(settings, folder)
    teacher = problem.make_network(settings, train, state).eval()
    judge = measures.Judge(settings, train, held, teacher)
    WORKER.update(settings=settings, train=train, state=state, teacher=teacher, judge=judge)


def measure_teacher(job):
    """How good the whole network is."""
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
    options = training.Learning(**job["options"])
    finalists, _ = training.learn_layers(settings, train, state, job["pattern"], job["seed"], options)
    if len(finalists) == 1:
        return {"chosen": finalists[0]}
    return try_out(finalists, job["seed"])


def try_out(finalists, seed):
    """Of some choices the one that is best after a third of a recovery, by the loss on training data."""
    settings, train, state, judge = (WORKER[name] for name in ("settings", "train", "state", "judge"))
    losses = []
    for kept in finalists:
        net = training.fine_tune(settings, train, state, kept, 50 + seed, share=1 / 3)
        losses.append(judge.calibration_loss(net))
    return {"chosen": finalists[losses.index(min(losses))], "finalists": finalists, "losses": losses}


def recover_by(job):
    """What a choice becomes by a recipe, at equal compute: at the end and on the way."""
    settings, train, state, judge = (WORKER[name] for name in ("settings", "train", "state", "judge"))
    recipe, kept, curve = recovery.RECIPES[job["method"]], job["kept"], []
    start = learned_state() if recipe.init == "learned" else state

    def look(net, compute):
        curve.append([round(compute, 1), judge.losses(net)["loss"]])

    cut = cut_layers(start, kept, recipe.init)
    budget = settings.recovery_compute
    net = recovery.recover(settings, train, cut, state, recipe, job["seed"], budget, look=look)
    drawn = judge.samples(net) if job["seed"] == 0 else {}
    return {**judge.losses(net), **drawn, "curve": curve}


def learned_state():
    """The weights that were learnt along with the gates under the first pattern, with the first seed."""
    settings, train, state = (WORKER[name] for name in ("settings", "train", "state"))
    if "learned" not in WORKER:
        _, WORKER["learned"] = training.learn_layers(settings, train, state, settings.patterns[0], 0, PAIRS)
    return WORKER["learned"]


def recover_depth(job):
    """A network of another depth, its layers learnt, recovered by Masked KD; and how fast it is."""
    settings, train, state, judge = (WORKER[name] for name in ("settings", "train", "state", "judge"))
    pattern, seed, recipe = job["pattern"], job["seed"], recovery.RECIPES["Masked KD"]
    (kept,), _ = training.learn_layers(settings, train, state, pattern, seed, PAIRS)
    groups, start = parse_pattern(pattern, settings.depth), keep_layers(state, kept)
    net = recovery.recover(settings, train, start, state, recipe, seed, settings.recovery_compute, groups)
    return {"layers": kept, "time_share": judge.time_share(net), **judge.losses(net), **judge.samples(net)}


def recover_quarter(job):
    """A quarter of the layers by Masked KD: cut at once, or in two turns of half the compute, each from the last."""
    settings, train, state, judge = (WORKER[name] for name in ("settings", "train", "state", "judge"))
    recipe, seed, teacher = recovery.RECIPES["Masked KD"], job["seed"], state
    turns = {"at once": ["1:4"], "in turns": ["1:2", "1:2"]}[job["method"]]
    for pattern in turns:
        (kept,), _ = training.learn_layers(settings, train, teacher, pattern, seed, PAIRS)
        start, budget = keep_layers(teacher, kept), settings.recovery_compute / len(turns)
        net = recovery.recover(settings, train, start, teacher, recipe, seed, budget)
        teacher = net.state_dict()
    return {**judge.losses(net), **judge.samples(net)}


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
    if job["method"] == RANDOM_TRIED:
        drawn = np.random.default_rng(job["seed"]).choice(len(choices), 4, replace=False)
        return try_out([choices[k] for k in drawn], job["seed"])
    losses = measure_losses(net, WORKER["judge"].objective, batches, choice_masks(choices, settings.depth))
    if job["method"] == LOWEST_TRIED:
        return try_out([choices[k] for k in losses.argsort()[:4].tolist()], job["seed"])
    return {"chosen": choices[find_loss(losses, job["method"].split()[0])]}


def calibration_batches():
    """Pictures to measure scores on, as many as prune_by_score.py takes by default."""
    train = WORKER["train"]
    rows = torch.randperm(len(train.x))[:CALIBRATION]
    return [train.batch(part) for part in rows.chunk(2)]


CALIBRATION = 128
BEST = "learned from pairs"  # fixed on teacher 0 with other seeds, see docs/results.md
PAIRS = training.Learning(gradient="pairs", share=1.0, lr=1e-3, gate_lr=2e-4)
LEARNED = {
    "learned, full update": training.Learning(),
    "learned, LoRA": training.Learning("lora"),
    BEST: PAIRS,
    "learned from pairs, 4 tried": replace(PAIRS, finalists=4),
}
SAME_BUT_GRADIENT = {"learned, with all else of pairs": replace(PAIRS, gradient="straight-through", gate_lr=1e-3)}
ABLATIONS = {  # of learning, on the first teacher and under the first pattern alone
    "learned, frozen weights": training.Learning("none"),
    "learned, teacher's output": training.Learning(share=1.0),
    "learned, gates at 1e-4": training.Learning(gate_lr=1e-4),
    "learned, temperature 1": training.Learning(tau_range=(1.0, 1.0)),
    "learned, full update, twice as long": training.Learning(length=2.0),
    "learned from pairs, twice as long": replace(PAIRS, gate_lr=1e-4, length=2.0),
    "learned from pairs, data": replace(PAIRS, share=0.0),
    "learned from pairs, weights at 1e-4": replace(PAIRS, lr=1e-4),
    "learned from pairs, LoRA": replace(PAIRS, update="lora"),
    "learned from pairs, frozen weights": replace(PAIRS, update="none"),
}
BY_LAYERS = {  # where a group has more than two candidates
    "learned by layers": replace(PAIRS, candidates="layers"),
    "learned by layers, 4 tried": replace(PAIRS, candidates="layers", finalists=4),
}
LARGER_GROUPS = {  # of learning, where a group has more ways to keep layers than two
    "learned from pairs, gates at 1e-3": replace(PAIRS, gate_lr=1e-3),
    "learned from pairs, twice as long": replace(PAIRS, length=2.0),
}
RANDOM_TRIED, LOWEST_TRIED = "4 at random, tried", "4 of lowest loss, tried"
SEARCHED = ("lowest loss", "median loss", "highest loss", RANDOM_TRIED, LOWEST_TRIED)
DEPTHS = ("3:4", "2:3", "1:2", "1:3", "1:4", "1:6")
KINDS = {
    "truth": recover,
    "learned": learn,
    "criterion": score,
    "search": search,
    "recovery": recover_by,
    "depth": recover_depth,
    "quarter": recover_quarter,
    "teacher": measure_teacher,
}


def do(job):
    """The row of a job; in a worker."""
    start = time.perf_counter()
    found = KINDS[job["kind"]](job)
    shown = {name: value for name, value in job.items() if name != "draw"}
    return {**shown, **found, "seconds": round(time.perf_counter() - start, 2)}


def list_truths(settings):
    """The jobs that tell how good the choices under every pattern become; under the first with a second seed."""
    first, *others = settings.patterns
    jobs = [truth_job(kept, draw=True) for kept in choices_to_recover(first, settings.depth, settings.sampled)]
    jobs += [{**job, "seed": 1, "draw": False} for job in jobs if settings.has_extras]
    for pattern in others:
        jobs += [truth_job(kept) for kept in choices_to_recover(pattern, settings.depth, settings.sampled)]
    return jobs


def list_choices(settings, seeds):
    """The jobs that ask every method for its choice under every pattern; with fewer seeds where that takes longer."""
    first, jobs = settings.patterns[0], []
    for pattern in settings.patterns:
        learned = {**LEARNED, **(SAME_BUT_GRADIENT if pattern == first else BY_LAYERS)}
        drawn = range(seeds if pattern == first else min(seeds, 3))
        jobs += [learn_job(pattern, name, learned[name], seed) for name in learned for seed in drawn]
        for kind, names in (("criterion", CRITERIA), ("search", SEARCHED)):
            jobs += [choice_job(kind, pattern, name, seed) for name in names for seed in drawn]
        jobs.append(choice_job("criterion", pattern, "BK-SDM", 0))
    if settings.has_extras:
        tried = [(first, ABLATIONS), *((pattern, LARGER_GROUPS) for pattern in settings.patterns[1:])]
        jobs += [
            learn_job(pattern, name, options, seed)
            for pattern, ablations in tried
            for name, options in ablations.items()
            for seed in range(min(seeds, 2))
        ]
    return jobs


def choice_job(kind, pattern, method, seed):
    """The job that asks a method for its choice."""
    return {"kind": kind, "pattern": pattern, "method": method, "seed": seed}


def learn_job(pattern, method, options, seed):
    """The same of gates; the options are part of what a row is about, but for one that earlier rows did not have."""
    told = {name: value for name, value in asdict(options).items() if (name, value) != ("candidates", "all")}
    return {**choice_job("learned", pattern, method, seed), "options": told}


def list_recoveries(settings, rows, seeds):
    """Jobs that recover the first seed's choice by every recipe, on the first teacher, and other depths."""
    if settings.teacher:
        return []
    pattern = settings.patterns[0]
    asked = [row for row in rows if row.get("pattern") == pattern and "chosen" in row and row["seed"] == 0]
    chosen = {row["method"]: row["chosen"] for row in asked}
    jobs = [
        {"kind": "recovery", "kept": chosen[BEST], "method": recipe, "seed": seed}
        for recipe in recovery.RECIPES
        for seed in range(seeds)
    ]
    if not settings.has_extras:
        return jobs
    jobs += [{"kind": "depth", "pattern": pattern, "seed": seed} for pattern in DEPTHS for seed in range(2)]
    return jobs + [
        {"kind": "quarter", "method": method, "seed": seed}
        for method in ("at once", "in turns")
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


def check_rows(rows, settings, loss, path):
    """Raise RunError if the rows are of other settings or of another teacher, by its held-out loss.

    One that was trained again, on another machine, differs in the last bits of its weights, and so do all numbers.
    """
    for row in rows:
        if row["kind"] == "teacher" and (row["settings"] != settings or abs(row["loss"] / loss - 1) > SAME_TEACHER):
            raise RunError(
                f"{path}: holds rows of another teacher or other settings; move it away, or bring these back"
            )


SAME_TEACHER = 1e-4  # relative difference of the held-out loss


def run_jobs(jobs, path, settings, folder, processes):
    """Do the jobs that `path` holds no rows of, and add theirs. Raises RunError for rows of another problem."""
    rows = read_rows(path)
    about = json.loads(json.dumps(asdict(settings)))  # tuples as lists, as they are read
    prepare_worker(settings, folder)
    check_rows(rows, about, WORKER["judge"].losses(WORKER["teacher"])["loss"], path)
    teacher = {"kind": "teacher", "settings": about}
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
