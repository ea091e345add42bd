"""Runs that are killed, at any moment, continue by the same command to the same bytes, and leave nothing behind.

`KILLS=60 python -m pytest tests/e2e/test_kills.py` tries that many random moments; a few are tried otherwise.
"""

import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time

import pytest
from disturbed import SCRIPTS, check_same, contents, extraction_words, sampling_words, training_words
from tqdm import tqdm

KILLS = int(os.environ.get("KILLS", 6))


def fork(run_script, words, prepare):
    """The status of a process like this one that calls prepare() and then runs a script."""
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        tqdm.set_lock(threading.RLock())  # the usual one is shared by forked processes: a killed one may hold it
        prepare()
        try:
            run_script(*words)
        except BaseException:
            os._exit(1)
        os._exit(0)
    return child


def end_of(child):
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status


def die_at_rename(count, after):
    """Kill this process at the count-th rename, before or after it."""
    rename, left = os.replace, [count]

    def replace(*paths):
        left[0] -= 1
        if left[0] or after:
            rename(*paths)
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace


def killed_after(seconds, child):
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return end_of(child)


@pytest.fixture
def try_kills(run_script, tmp_path):
    """Runs a command as a whole, then killed by each of `kills`, until it has ended; every end has to be the same."""
    run = tmp_path / "run"

    def check(words, kills):
        start = time.monotonic()
        assert end_of(fork(run_script, words, lambda: None)) == 0
        seconds, whole = time.monotonic() - start, contents(run)
        died = 0
        for kill in kills(seconds):
            shutil.rmtree(run)
            died += kill(words) != 0
            assert end_of(fork(run_script, words, lambda: None)) == 0
            check_same(contents(run), whole)
        return died

    return check


def rename_kills(run_script, count):
    """Kills before and after each of the first renames."""

    def kill(words, number, after):
        return end_of(fork(run_script, words, lambda: die_at_rename(number, after)))

    return [lambda words, n=n, after=after: kill(words, n, after) for n in range(1, count + 1) for after in (0, 1)]


def random_kills(run_script, count, seed):
    """Kills at random moments of a run."""
    draw = random.Random(seed)

    def make(seconds):
        return [
            lambda words: killed_after(draw.uniform(0, seconds), fork(run_script, words, lambda: None))
            for _ in range(count)
        ]

    return make


@pytest.mark.parametrize("name", SCRIPTS)
def test_training_killed_at_renames(name, teacher, latents, tmp_path, run_script, try_kills):
    """Config, facts, states, and with gates the pruned file: each is written whole, in an order that loses nothing."""
    words = training_words(name, teacher, latents, tmp_path / "run")
    renames = {"train": 7, "train_masked_kd": 7, "prune_by_learning": 9}[name]  # config; facts and state, three times
    kills = rename_kills(run_script, renames)[:: 1 if KILLS > 6 else 3]
    assert try_kills(words, lambda _: kills) == len(kills)


@pytest.mark.parametrize("name", SCRIPTS)
def test_training_killed_at_random(name, teacher, latents, tmp_path, run_script, try_kills):
    words = training_words(name, teacher, latents, tmp_path / "run")
    try_kills(words, random_kills(run_script, max(1, KILLS // 3), name))


def test_extraction_killed(pictures, tmp_path, run_script, try_kills, monkeypatch):
    """Also between a shard and its mark, and while marks are joined."""
    monkeypatch.setattr("engine.extraction.SHARD", 20)
    words = extraction_words(pictures, tmp_path / "run")
    try_kills(words, lambda _: rename_kills(run_script, 10)[:: 1 if KILLS > 6 else 3])
    shutil.rmtree(tmp_path / "run")
    try_kills(words, random_kills(run_script, max(2, KILLS // 6), 0))


def test_sampling_killed(teacher, tmp_path, run_script, try_kills):
    words = sampling_words(teacher, tmp_path / "run")
    try_kills(words, lambda _: rename_kills(run_script, 12)[:: 1 if KILLS > 6 else 5])
    shutil.rmtree(tmp_path / "run")
    try_kills(words, random_kills(run_script, max(2, KILLS // 6), 0))


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.skipif("KILLS" not in os.environ, reason="minutes; set KILLS")
def test_one_of_two_processes_killed(name, teacher, latents, tmp_path, root):
    """The launcher ends the other, and the same command continues."""
    words = training_words(name, teacher, latents, tmp_path / "run")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, str(root / f"{words[0]}.py"), *map(str, words[1:])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def start():
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    begin = time.monotonic()
    assert start().wait() == 0
    seconds, whole = time.monotonic() - begin, contents(tmp_path / "run")
    for k in range(-(-KILLS // 18)):
        shutil.rmtree(tmp_path / "run")
        launched = start()
        time.sleep(random.Random(k).uniform(0.5, 1) * seconds)
        listed = subprocess.run(["pgrep", "-P", str(launched.pid)], capture_output=True, text=True, check=False)
        for process in listed.stdout.split()[k % 2 : k % 2 + 1]:
            os.kill(int(process), signal.SIGKILL)
        launched.wait()
        assert start().wait() == 0
        check_same(contents(tmp_path / "run"), whole)


def test_all_is_on_the_disk_before_it_is_renamed(tmp_path, monkeypatch):
    """A power cut after a rename finds the whole file."""
    from engine.files import write_atomically

    calls, sync, replace = [], os.fsync, os.replace

    def record_sync(handle):
        calls.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        sync(handle)

    def record_replace(*paths):
        calls.append("rename")
        replace(*paths)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(os, "replace", record_replace)
    write_atomically(tmp_path / "a.txt", lambda path: path.write_text("a"))
    assert calls == ["file", "rename", "folder"]
