"""Work behind the caller: done, in order where that counts, bounded, and its errors are not lost."""

import threading
import time

import pytest

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


def test_writing_hides_behind_sampling():
    """20 batches of 50 ms, whose pictures take 40 ms a batch to write: together little more than the sampling."""
    start = time.monotonic()
    with Background(1) as pool:
        for _ in range(20):
            time.sleep(0.05)  # a sampler on another device
            pool.call(time.sleep, 0.04)
    assert time.monotonic() - start <= 1.25 * 20 * 0.05  # 1.04 by itself; 1.8 one after the other
