"""Work behind the caller: done, in order where that counts, bounded, and its errors are not lost."""

import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest
import torch

import sample_ddp
from engine.images import open_picture, pack_npz, save_image
from engine.run import Run
from engine.sample_folder import SampleFolder
from engine.threads import AHEAD, Background, map_ahead, own_cores


def test_all_calls_are_done_at_the_end():
    done = []
    with Background(3) as pool:
        for k in range(50):
            pool.call(done.append, k)
    assert sorted(done) == list(range(50))


def test_few_calls_wait():
    """The caller is held back where it is faster than the threads."""
    gate, begun = threading.Event(), []

    def work(k):
        begun.append(k)
        gate.wait(10)

    threading.Timer(0.3, gate.set).start()
    most = []
    with Background(2) as pool:
        for k in range(2 * AHEAD + 3):
            pool.call(work, k)
            most.append(len(pool.waiting))
        assert gate.is_set()  # without it the last calls could not have been taken
    assert max(most) <= 2 * AHEAD
    assert len(begun) == 2 * AHEAD + 3


@pytest.mark.parametrize("calls", [1, 100])
def test_errors_of_calls(calls):
    """At the end, or before where more calls follow; what has not begun by then is dropped."""

    def fail(k):
        raise OSError("no space left")

    def run():
        with Background(2) as pool:
            for k in range(calls):
                pool.call(fail, k)

    with pytest.raises(OSError, match="no space left"):
        run()


def test_an_error_of_the_caller_comes_first():
    def run():
        with Background(1) as pool:
            pool.call(time.sleep, 0.01)
            raise KeyError

    with pytest.raises(KeyError):
        run()


def test_results_in_order():
    """The first takes longest."""
    found = map_ahead(lambda k: (time.sleep(0.02 if k == 0 else 0), k)[1], range(40), threads=4)
    assert list(found) == list(range(40))


def test_errors_in_their_turn():
    def work(k):
        if k == 3:
            raise ValueError("number 3")
        return k

    found = map_ahead(work, range(10), threads=2)
    assert [next(found) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="number 3"):
        next(found)


def test_cores_are_shared_by_the_processes_of_a_host(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    assert own_cores() == 16
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert own_cores() == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "32")
    assert own_cores() == 1


BATCHES, SIZE = 20, 4
SAMPLING, WRITING = 0.05, 0.008  # seconds of a batch, of a picture: 32 ms a batch for one thread


class Sampler:
    """Sleeps as a sampler on another device does; in the place of a plan too, which loads it."""

    num_classes, seconds = 10, 0.0

    def __init__(self):
        self.space = self

    def load(self, run):
        return self

    def draws(self, seed, batch):
        return self

    def labels(self, num_classes):
        return None

    def sample(self, draws, labels):
        start = time.monotonic()
        time.sleep(SAMPLING)
        self.seconds += time.monotonic() - start
        return torch.zeros(SIZE, 3, 8, 8)


def time_sampling(folder):
    """Seconds of sampling and writing in sample_ddp.py over those of its sampler alone, in the same run."""
    numbers = range(BATCHES * SIZE)
    batches = [numbers[i : i + SIZE] for i in numbers[::SIZE]]
    sampler, run = Sampler(), Run("cpu")
    start = time.monotonic()
    sample_ddp.sample_missing(run, sampler, SampleFolder(folder, "s", {}, 8), batches, set(numbers), 0)
    return (time.monotonic() - start) / sampler.seconds


@pytest.fixture
def written(monkeypatch):
    """Writing a picture takes its time, and no disk; the list of what was written."""
    found = []

    def write(path, pixels, of_many):
        time.sleep(WRITING)
        found.append(int(path.stem))

    monkeypatch.setattr("engine.images.save_image", write)
    return found


def test_writing_hides_behind_sampling(written, tmp_path):
    """Together a tenth more than the sampler alone at most; a busy machine has three tries."""
    ratios = []
    while len(ratios) < 3 and min(ratios, default=2) > 1.1:
        written.clear()
        ratios.append(time_sampling(tmp_path))
        assert sorted(written) == list(range(BATCHES * SIZE))
    assert min(ratios) <= 1.1


def test_blocking_writers_would_be_seen(written, tmp_path, monkeypatch):
    """The bar above is not met where the sampler waits for the disk."""
    monkeypatch.setattr(Background, "call", lambda pool, work, *arguments, **options: work(*arguments, **options))
    assert time_sampling(tmp_path) > 1.4


def test_packing_decodes_with_several_threads_in_order(monkeypatch, tmp_path):
    """Two pictures have to be open at once, and the later one is done first; the archive has them in their order."""
    files = [tmp_path / f"{k}.png" for k in range(12)]
    for k, file in enumerate(files):
        save_image(file, np.full((4, 4, 3), 20 * k, np.uint8), of_many=True)
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    together, threads, whole = threading.Barrier(2, timeout=30), set(), open_picture

    @contextmanager
    def open_two(path):
        with whole(path) as image:
            if threading.current_thread() is not threading.main_thread():  # which looks at the first one's size
                threads.add(threading.get_ident())
                if path in files[:2]:
                    together.wait()
                    time.sleep(0.2 if path == files[0] else 0)
            yield image

    monkeypatch.setattr("engine.images.open_picture", open_two)
    with np.load(pack_npz(tmp_path / "p.npz", files, range(12))) as packed:
        assert packed["arr_0"][:, 0, 0, 0].tolist() == [20 * k for k in range(12)]
        assert packed["arr_1"].tolist() == list(range(12))
    assert len(threads) > 1
