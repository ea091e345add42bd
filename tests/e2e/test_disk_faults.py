"""Writes that fail: one line names the file and the reason, what was there stays, and the same command continues.

Real ones, on a small file system in memory that only a forked process sees; skipped where that may not be mounted.
"""

import contextlib
import ctypes
import io
import os
import re
import shutil
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
from disturbed import check_same, contents, extraction_words, sampling_words, training_words

from engine.cli import run_script as run_as_launched

NEW_MOUNTS = 0x20000
FULL = "No space left on device"


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


GONE = "No such file or directory|is missing, or not a file|not a regular file"
FAULTS = {  # name -> (what is done to the disk, what the message says, as a pattern)
    "no byte": (fill, FULL),
    "in the middle": (lambda folder: fill(folder, 1 << 20), FULL),
    "no name": (use_all_names, FULL),
    "read-only": (make_read_only, "Read-only file system"),
    "removed": (remove_all, GONE),
}
# Where the fault happens: the class or module, its function, and the call of it.
HOOKS = {
    "train": ("engine.trainer", "Trainer.train_step", 5),
    "prune_by_learning": ("engine.trainer", "Trainer.train_step", 5),
    "train_masked_kd": ("engine.trainer", "Trainer.train_step", 5),
    "extract_features": ("engine.extraction", "ShardWriter.write", 6),
    "sample_ddp": ("engine.sampling", "PictureSampler.sample", 3),
    "sample": ("engine.sampling", "PictureSampler.sample", 1),
    "prune_by_index": ("engine.pruned", "describe_shapes", 1),
    "prune_by_score": ("engine.pruned", "describe_shapes", 1),
}


def call_at(hook, action):
    """Call action() before the n-th call of a function."""
    module, name, count = hook
    holder = sys.modules.get(module) or __import__(module, fromlist=["x"])
    *classes, name = name.split(".")
    for each in classes:
        holder = getattr(holder, each)
    whole, left = getattr(holder, name), [count]

    def hooked(*args, **kwargs):
        left[0] -= 1
        if not left[0]:
            action()
        return whole(*args, **kwargs)

    setattr(holder, name, hooked)


def run_words(words):
    """Status and messages of a script, run as its file would be."""
    script = __import__(words[0])
    with contextlib.redirect_stderr(io.StringIO()) as shown:
        status = run_as_launched(script.main, lambda: script.parse_args([str(word) for word in words[1:]]))
    return status, [line for line in shown.getvalue().splitlines() if ": error: " in line or "Traceback" in line]


def judge(words, folder, fault, whole):
    """What is wrong with the answer to a fault, or None."""
    break_disk, reason = FAULTS[fault]
    before = {}

    def break_it():
        before.update(contents(folder))
        break_disk(folder)

    call_at(HOOKS[words[0]], break_it)
    status, lines = run_words(words)
    if status != 1 or len(lines) != 1 or not re.search(reason, lines[0]) or str(folder) not in lines[0]:
        return f"status {status}, {lines}"
    if fault != "removed":
        after = contents(folder)
        lost = [name for name in before if name not in after or after[name] != before[name]]
        lost = [name for name in lost if not name.endswith(("metrics.jsonl", ".lock", "features.npy"))]
        if lost:
            return f"changed: {lost}"
    repair(folder)
    status, lines = run_words(words)
    if status:
        return f"then status {status}, {lines}"
    check_same(contents(folder), whole)
    return None


@pytest.fixture
def try_fault(tmp_path, run_script):
    """Runs a command undisturbed, then with a fault, then again; both in processes of their own."""
    run = tmp_path / "run"

    def check(words, fault):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(1, 2)
            try:
                if not mount_memory(run):
                    answer = "skip"
                else:
                    status, lines = run_words(words)
                    whole = contents(run)
                    remove_all(run)
                    answer = f"{status} {lines}" if status else judge(words, run, fault, whole) or ""
            except BaseException:
                answer = traceback.format_exc()
            os.write(writer, answer.encode())
            os._exit(0)
        os.close(writer)
        with open(reader) as file:
            answer = file.read()
        os.waitpid(child, 0)
        if answer == "skip":
            pytest.skip("no file system can be mounted here")
        assert not answer

    return check


def words_of(name, teacher, latents, pictures, run):
    few = ["--num-sampling-steps", "2"]
    cut = ["--ckpt", teacher.weights, "--save-model", run / "out.pt"]
    return {
        "extract_features": lambda: extraction_words(pictures, run / "features"),
        "sample_ddp": lambda: sampling_words(teacher, run / "samples"),
        "sample": lambda: ["sample", "--ckpt", teacher.student, *few, "--output", run / "one.png"],
        "prune_by_index": lambda: ["prune_by_index", *cut, "--scheme", "bk-sdm"],
        "prune_by_score": lambda: ["prune_by_score", *cut, "--data-path", latents, "--n-pruned", 3, "--nsamples", 16],
    }.get(name, lambda: training_words(name, teacher, latents, run))()


# A picture and a .npz fit into what is left "in the middle"; two scripts write their only file at once.
CASES = [(name, fault) for name in HOOKS for fault in FAULTS]
CASES = [case for case in CASES if case not in {("sample", "in the middle"), ("extract_features", "in the middle")}]
CASES = [case for case in CASES if case != ("sample_ddp", "in the middle")]
CASES = [(n, f) for n, f in CASES if not (f == "removed" and n in ("sample", "prune_by_index", "prune_by_score"))]
OFTEN = {("train", fault) for fault in FAULTS} | {(name, "no byte") for name in HOOKS}


@pytest.mark.parametrize(("name", "fault"), CASES)
def test_fault(name, fault, teacher, latents, pictures, tmp_path, try_fault, monkeypatch):
    if (name, fault) not in OFTEN and "FAULTS" not in os.environ:
        pytest.skip("one of many; set FAULTS")
    monkeypatch.setattr("engine.extraction.SHARD", 20)
    try_fault(words_of(name, teacher, latents, pictures, tmp_path / "run"), fault)


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
