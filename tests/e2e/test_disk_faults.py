"""Writes that fail: one line names the file and the reason, what was there stays, and the same command continues.

Real ones, on a small file system in memory that only a forked process sees; skipped where that may not be mounted.
"""

import contextlib
import ctypes
import functools
import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import threading
import traceback
from pathlib import Path

import numpy as np
import pytest
from disturbed import check_same, contents, extraction_words, sampling_words, training_words

from engine.cli import run_script as run_as_launched

MAKER = Path(__file__).parents[1] / "golden/make_tiny_inception_graph.py"
NEW_MOUNTS = 0x20000
FULL = "No space left on device|make room"
ENDED = "ended"


def mount_memory(folder):
    """Give this process an empty file system of 100 MB at `folder`; False if it may not."""
    folder.mkdir(parents=True, exist_ok=True)
    if ctypes.CDLL(None, use_errno=True).unshare(NEW_MOUNTS):
        return False
    commands = ["mount --make-rprivate /", f"mount -t tmpfs -o size=100m,nr_inodes=2000 tmpfs {folder}"]
    return not any(subprocess.run(words.split(), capture_output=True, check=False).returncode for words in commands)


def fill(folder, left=0):
    """Leave so many bytes."""
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    with open(folder / "filler", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(free - left, 1))


def use_all_names(folder):
    """Leave no inode."""
    (folder / "names").mkdir()
    with contextlib.suppress(OSError):
        for k in range(2000):
            (folder / "names" / str(k)).touch()


def make_read_only(folder):
    """For all files that are opened from now on."""
    subprocess.run(["mount", "--bind", "-o", "ro", folder, folder], check=True)


def remove_all(folder):
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def repair(folder):
    """Undo every fault but removal."""
    while os.statvfs(folder).f_flag & os.ST_RDONLY:
        subprocess.run(["umount", folder], check=True)
    for name in ("filler", "names"):
        path = folder / name
        if path.exists():
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def leave_half(folder, size):
    fill(folder, size // 2)


def leave_all_but_the_end(folder, size):
    fill(folder, max(size - PAGE, 0))


PAGE = 4096
GONE = "No such file or directory|is missing, or not a file|not a regular file|folder is gone"
FAULTS = {  # name -> (what is done to the disk before a file of so many bytes, what the message says, as a pattern)
    "no byte": (lambda folder, size: fill(folder), FULL),
    "half of the file": (leave_half, FULL),
    "all but the end": (leave_all_but_the_end, FULL),
    "no name": (lambda folder, size: use_all_names(folder), FULL),
    "read-only": (lambda folder, size: make_read_only(folder), "Read-only file system"),
    "removed": (lambda folder, size: remove_all(folder), GONE),
}
SMALL = {"half of the file", "all but the end"}  # the same as "no byte" for files of one page


EVENTS = ("open", "os.mkdir", "os.scandir", "os.rename")


class Writes:
    """Watches what this process writes in a folder, and calls action(size) before write number `at`, from 0.

    A write is a file opened for writing, a folder made or read, or a rename. write_atomically begins by making or
    reading its folder. The sizes of what it wrote are known at the rename; so they are taken from a run before.
    """

    def __init__(self, folder, at=None, action=None):
        self.folder, self.at, self.action = os.fspath(folder), at, action
        self.found, self.lock = [], threading.Lock()  # (event, path, bytes) of every write, by any thread
        self.acting = threading.local()  # of the thread in which the action itself writes
        sys.addaudithook(self.watch)  # which cannot be taken back: only for a process that ends afterwards

    def watch(self, event, args):
        if getattr(self.acting, "now", False) or event not in EVENTS or not is_inside(args[0], self.folder):
            return
        if event == "open" and not (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        self.acting.now = True
        size = os.path.getsize(args[0]) if event == "os.rename" else 0
        with self.lock:
            self.found.append((event, os.fspath(args[0]), size))
            is_due = len(self.found) - 1 == self.at
        if is_due:
            self.action()
        self.acting.now = False


def is_inside(path, folder):
    return isinstance(path, str | os.PathLike) and f"{os.fspath(path)}{os.sep}".startswith(folder + os.sep)


def sizes_of(writes):
    """The bytes that each write begins: those of the next rename, if what lies between belongs to the same file."""
    sizes = []
    for k in range(len(writes)):
        ahead = [size for event, path, size in writes[k : k + 4] if event == "os.rename"]
        sizes.append(ahead[0] if ahead else 0)
    return sizes


def run_words(words):
    """Status and messages of a script, run as its file would be."""
    script = __import__(words[0])
    with contextlib.redirect_stderr(io.StringIO()) as shown:
        status = run_as_launched(script.main, lambda: script.parse_args([str(word) for word in words[1:]]))
    return status, [line for line in shown.getvalue().splitlines() if ": error: " in line or "Traceback" in line]


def judge_fault(words, folder, fault, moment, size, whole):
    """What is wrong with the answer to a fault at a moment; ENDED if that did not keep it from its end."""
    break_disk, reason = FAULTS[fault]
    before = {}

    def break_it():
        before.update(contents(folder))
        break_disk(folder, size)

    watched = Writes(folder, moment, break_it)
    status, lines = run_words(words)
    if len(watched.found) <= moment:
        return "the fault did not happen"
    if status == 0:  # nothing that came later needed what is missing
        repair(folder)
        return check_whole(folder, whole, removed=before if fault == "removed" else ()) or ENDED
    if status != 1 or len(lines) != 1 or not re.search(reason, lines[0]) or str(folder) not in lines[0]:
        return f"status {status}, {lines}"
    if fault != "removed":
        after = contents(folder)
        lost = [name for name in before if name not in after or after[name] != before[name]]
        lost = [name for name in lost if not name.endswith(("metrics.jsonl", ".lock", "features.npy", ".part"))]
        if lost:
            return f"changed: {lost}"
    return None


def judge_next(words, folder, whole):
    """What is wrong with the same command after the fault."""
    status, lines = run_words(words)
    return f"then status {status}, {lines}" if status else check_whole(folder, whole)


def check_whole(folder, whole, removed=()):
    found = contents(folder)
    try:
        check_same(found, {name: value for name, value in whole.items() if name in found or name not in removed})
    except AssertionError as error:
        return f"another end: {error}"
    return None


def in_a_fork(run):
    """What run() returns, as text, in a process of its own; "" for None."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        try:
            answer = run() or ""
        except BaseException:
            answer = traceback.format_exc()
        with open(writer, "w") as file:
            file.write(answer)
            file.flush()
            os._exit(0)
    os.close(writer)
    with open(reader) as file:
        answer = file.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return f"ended with {status} {answer}" if status else answer


def try_moments(words, folder, fault, every):
    """Run a command undisturbed, then with a fault before every so many-th of its writes, each time from the start."""
    if not mount_memory(folder):
        return "skip"

    def record():
        watched = Writes(folder)
        status, lines = run_words(words)
        return json.dumps(watched.found) if status == 0 else f"status {status}, {lines}"

    answer = in_a_fork(record)
    if not answer.startswith("["):
        return answer
    writes, whole = json.loads(answer), contents(folder)
    moments = [k for k, size in enumerate(sizes_of(writes)) if size > PAGE or fault not in SMALL]
    problems = []
    for k in moments[min(every, len(moments)) // 2 :: every]:
        remove_all(folder)
        size = sizes_of(writes)[k]
        problem = in_a_fork(functools.partial(judge_fault, words, folder, fault, k, size, whole))
        repair(folder)
        problem = problem or in_a_fork(functools.partial(judge_next, words, folder, whole))
        if problem and problem != ENDED:
            problems.append(f"write {k}, {writes[k][0]} {writes[k][1]}: {problem}")
    return "\n".join(problems)


@pytest.fixture(scope="session")
def evaluation(tmp_path_factory):
    """Words for the evaluator: a small Inception, and reference and samples of few pictures."""
    folder, maker = tmp_path_factory.mktemp("evaluation"), runpy.run_path(str(MAKER))
    (folder / "tiny.pb").write_bytes(maker["tiny_graph"](0))
    for k, name in enumerate(("ref", "sample")):
        np.savez(folder / f"{name}.npz", arr_0=maker["make_images"](k, 12, 40, name))
    flags = ["--inception", folder / "tiny.pb", "--offline", "--device", "cpu"]
    return ["evaluator", folder / "ref.npz", folder / "sample.npz", *flags]


def words_of(name, teacher, latents, pictures, evaluation, run):
    few = ["--num-sampling-steps", "2"]
    cut = ["--ckpt", teacher.weights, "--save-model", run / "out.pt"]
    return {
        "extract_features": lambda: extraction_words(pictures, run / "features"),
        "sample_ddp": lambda: sampling_words(teacher, run / "samples"),
        "sample": lambda: ["sample", "--ckpt", teacher.student, *few, "--output", run / "one.png"],
        "evaluator": lambda: [
            *evaluation,
            "--metrics",
            "is,pr",
            "--json",
            run / "a.json",
            "--cache-dir",
            run / "cache",
        ],
        "evaluator, statistics": lambda: [*evaluation, "--metrics", "is", "--save-stats", run / "stats.npz"],
        "prune_by_index": lambda: ["prune_by_index", *cut, "--scheme", "bk-sdm"],
        "prune_by_score": lambda: ["prune_by_score", *cut, "--data-path", latents, "--n-pruned", 3, "--nsamples", 16],
    }.get(name, lambda: training_words(name, teacher, latents, run))()


SCRIPTS = ["train", "prune_by_learning", "train_masked_kd", "extract_features", "sample_ddp", "sample"]
SCRIPTS += ["prune_by_index", "prune_by_score", "evaluator", "evaluator, statistics"]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", SCRIPTS)
def test_fault(name, fault, teacher, latents, pictures, evaluation, tmp_path, monkeypatch):
    """FAULTS=1 tries every write of every script; otherwise few of some."""
    if "FAULTS" not in os.environ and name != "train" and fault != "no byte":
        pytest.skip("one of many; set FAULTS")
    every = 1 if "FAULTS" in os.environ else 13
    monkeypatch.setattr("engine.extraction.SHARD", 20)
    words = words_of(name, teacher, latents, pictures, evaluation, tmp_path / "run")
    answer = in_a_fork(functools.partial(try_moments, words, tmp_path / "run", fault, every))
    if answer == "skip":
        pytest.skip("no file system can be mounted here")
    assert not answer


def test_small_shared_memory(pictures, tmp_path):
    """Loader processes do not send pictures through it."""
    child = os.fork()
    if child == 0:
        shared = Path("/dev/shm")
        is_small = mount_memory(shared)
        if is_small:
            fill(shared, 1 << 17)
        words = [*extraction_words(pictures, tmp_path / "features"), "--num-workers", "2", "--image-size", "128"]
        os._exit(run_words(words)[0] if is_small else 77)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == 77:
        pytest.skip("no file system can be mounted here")
    assert status == 0
